//! The lab itself: real guests boot, beat and check themselves, and the judge bites.
//!
//! No agent takes part here. What the lab says of a migration is only worth something if this holds.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use serde_json::json;
use vmferry_tests::lab::{
    BeatFault, Content, Disk, Guest, JudgeParams, Lab, MemoryKind, Start, content,
    find_judged_page, read_memory, write_memory,
};

const LONG: Duration = Duration::from_secs(120);
const RAM_MIB: u64 = 192;
const PAGE: usize = 4096;

fn small() -> JudgeParams {
    JudgeParams {
        memory: 32 << 20,
        ..JudgeParams::default()
    }
}

#[test]
fn a_guest_boots_beats_verifies_itself_and_shuts_down() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("boots")
        .memory_mib(RAM_MIB)
        .disk(Disk::raw(64 << 20).prefilled(8 << 20))
        .disk(Disk::qcow2(64 << 20).direct())
        .judge(small())
        .build()
        .unwrap();
    let place = guest.place("alpha").unwrap();
    let qemu = place.start(Start::Boot).unwrap();
    guest.wait_ready().unwrap();
    guest.wait_for_beats(1000).unwrap();
    let answer = guest.verify_now().unwrap();
    let units = |bytes: u64| bytes / 4096;
    for part in [
        format!("mem:{}:0", units(32 << 20)),
        format!("vda:{}:0", units(64 << 20)),
        format!("vdb:{}:0", units(64 << 20)),
    ] {
        assert!(answer.contains(&part), "{answer}");
    }
    assert!(place.console().contains("judge: ok, 0 mismatches"));
    println!("{}", guest.beats().report(1).unwrap());
    assert_eq!(guest.running_pid().unwrap(), qemu.pid());
    guest.tell("shutdown").unwrap();
    qemu.wait_end(LONG).unwrap();
    guest.assert_no_corrupt();
}

#[test]
fn a_guest_reboots_and_then_shuts_down_when_its_command_line_says_so() {
    let Some(lab) = Lab::get() else { return };
    let judge = JudgeParams {
        shutdown_after: Some(Duration::from_secs(4)),
        ..small()
    };
    let guest = lab
        .guest("reboots")
        .memory_mib(RAM_MIB)
        .judge(judge)
        .build()
        .unwrap();
    let qemu = guest.place("alpha").unwrap().start(Start::Boot).unwrap();
    guest.wait_ready().unwrap();
    guest.tell("reboot").unwrap();
    guest.wait_ready_again(2).unwrap();
    qemu.wait_end(LONG).unwrap();
    println!("{}", guest.beats().report(2).unwrap());
    let one_boot = BeatFault::Boots {
        got: 2,
        expected: 1,
    };
    assert_eq!(guest.beats().report(1), Err(one_boot));
    guest.assert_no_corrupt();
}

/// A guest in which every page and block of a small working set changes soon.
fn quiet_guest(lab: &'static Lab, name: &str) -> anyhow::Result<Guest> {
    lab.guest(name)
        .memory_mib(RAM_MIB)
        .disk(Disk::raw(16 << 20))
        .judge(JudgeParams {
            content: Content::Random,
            // Little to choose from: each page and block changes soon.
            working_set: 1 << 20,
            ..small()
        })
        .build()
}

#[test]
fn the_judge_finds_a_stale_page_and_a_changed_byte_in_memory() {
    let Some(lab) = Lab::get() else { return };
    let guest = quiet_guest(lab, "stale-page").unwrap();
    let qemu = guest.place("alpha").unwrap().start(Start::Boot).unwrap();
    guest.wait_ready().unwrap();
    let (pid, ram) = (qemu.pid(), RAM_MIB << 20);
    let address = find_judged_page(pid, ram, 17).unwrap();
    let old = read_memory(pid, address, PAGE).unwrap();
    while read_memory(pid, address, PAGE).unwrap() == old {
        thread::sleep(Duration::from_millis(20));
    }
    guest.set_dirty_rate(0).unwrap();
    guest.verify_now().unwrap();
    write_memory(pid, address, &old).unwrap();
    let error = format!("{:#}", guest.verify_now().unwrap_err());
    assert!(
        error.contains("CORRUPT") && error.contains("mem page 17 "),
        "{error}"
    );

    // Far outside of the working set: only checking finds it.
    let address = find_judged_page(pid, ram, 5000).unwrap();
    let byte = read_memory(pid, address + 2000, 1).unwrap();
    write_memory(pid, address + 2000, &[byte[0] ^ 1]).unwrap();
    guest.ask("verify").unwrap();
    let error = format!("{:#}", guest.check_no_corrupt().unwrap_err());
    assert!(error.contains("mem page 5000 "), "{error}");
}

#[test]
fn the_judge_finds_a_stale_block_and_a_lost_one_on_disk() {
    let Some(lab) = Lab::get() else { return };
    let guest = quiet_guest(lab, "stale-block").unwrap();
    let place = guest.place("alpha").unwrap();
    let _qemu = place.start(Start::Boot).unwrap();
    guest.wait_ready().unwrap();
    let image = File::options()
        .read(true)
        .write(true)
        .open(place.image(0))
        .unwrap();
    let read = |block: usize| {
        let mut bytes = vec![0; PAGE];
        image
            .read_exact_at(&mut bytes, (block * PAGE) as u64)
            .unwrap();
        bytes
    };
    let old: Vec<_> = (0..512).map(read).collect();
    let changed = loop {
        thread::sleep(Duration::from_millis(20));
        if let Some(block) = (0..512).find(|&block| read(block) != old[block]) {
            break block;
        }
    };
    guest.set_disk_rate(0).unwrap();
    guest.verify_now().unwrap();
    image
        .write_all_at(&old[changed], (changed * PAGE) as u64)
        .unwrap();
    let error = format!("{:#}", guest.verify_now().unwrap_err());
    assert!(error.contains(&format!("vda block {changed}: ")), "{error}");

    // A block that was never written must stay as it was found.
    let marks = content::MARK.to_le_bytes();
    let untouched = (0..4096)
        .find(|&block| !read(block).starts_with(&marks))
        .unwrap();
    let mut bytes = read(untouched);
    bytes[4095] ^= 0x80;
    image
        .write_all_at(&bytes, (untouched * PAGE) as u64)
        .unwrap();
    guest.ask("verify").unwrap();
    let error = format!("{:#}", guest.check_no_corrupt().unwrap_err());
    assert!(
        error.contains(&format!("vda block {untouched}: ")),
        "{error}"
    );
}

#[test]
fn a_migration_by_qemu_itself_is_one_sequence_with_one_gap() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("moves")
        .memory_mib(RAM_MIB)
        .memory(MemoryKind::SharedFile)
        .vcpus(2)
        .disk(Disk::raw(32 << 20).shared())
        .disk(Disk::qcow2(32 << 20).shared())
        .judge(small())
        .build()
        .unwrap();
    let alpha = guest.place("alpha").unwrap();
    let beta = guest.place("beta").unwrap();
    let source = alpha.start(Start::Boot).unwrap();
    guest.wait_ready().unwrap();
    let destination = beta.start(Start::Incoming).unwrap();
    let uri = format!("unix:{}", beta.folder().join("stream").display());
    destination
        .qmp()
        .execute("migrate-incoming", json!({ "uri": uri }))
        .unwrap();
    let fast = json!({ "max-bandwidth": 1_u64 << 32, "downtime-limit": 500 });
    source
        .qmp()
        .execute("migrate-set-parameters", fast)
        .unwrap();
    source
        .qmp()
        .execute("migrate", json!({ "uri": uri }))
        .unwrap();
    loop {
        let state = source.qmp().execute("query-migrate", json!({})).unwrap();
        match state["status"].as_str() {
            Some("completed") => break,
            Some("failed") => panic!("{state}"),
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
    while destination.qmp().status().unwrap() == "inmigrate" {
        thread::sleep(Duration::from_millis(5));
    }
    // Nobody runs it now: this is the gap that the recorder must see.
    thread::sleep(Duration::from_millis(500));
    assert_eq!(guest.beats().count_from(destination.pid()), 0);
    destination.qmp().execute("cont", json!({})).unwrap();
    guest
        .beats()
        .wait_for_from(destination.pid(), 500, LONG)
        .unwrap();
    guest.verify_now().unwrap();
    let report = guest.beats().report(1).unwrap();
    println!("{report}");
    assert_eq!(report.handovers.len(), 1);
    let gap = report.handovers[0];
    assert_eq!(
        (gap.from_pid, gap.to_pid),
        (source.pid(), destination.pid())
    );
    assert!(gap.length > Duration::from_millis(100), "{gap}");
    guest.assert_no_corrupt();
}
