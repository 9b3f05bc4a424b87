//! Disks on storage that both hosts reach: not copied, let go at the source before the destination may run, and taken back by a
//! rollback. The guest's memory is a memfd that others can map.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::qemu::{Pair, ended};
use vmferry_tests::lab::{Disk, JudgeParams, Lab, MemoryKind};

use super::guests::{MIB, VERIFIED, pair};

const LIMIT: Duration = Duration::from_secs(180);

fn on_shared_storage(lab: &'static Lab) -> Pair {
    let guest = lab
        .guest("on-shared-storage")
        .memory_mib(512)
        .memory(MemoryKind::SharedMemfd)
        .disk(Disk::raw(64 * MIB).prefilled(8 * MIB).shared())
        .disk(Disk::qcow2(32 * MIB).prefilled(8 * MIB))
        .judge(JudgeParams {
            memory: 192 * MIB,
            dirty: 16 * MIB,
            working_set: 32 * MIB,
            ..JudgeParams::default()
        })
        .build();
    pair(guest)
}

/// Whether some QEMU holds the image of `disk`, which is a raw one, for writing: its locks keep others from opening it so.
fn is_held(lab: &Lab, pair: &Pair, disk: usize) -> bool {
    let opened = Command::new(lab.qemu_img().with_file_name("qemu-io"))
        .args(["-f", "raw", "-c", "quit"])
        .arg(pair.alpha.place.image(disk))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&opened.stderr);
    assert!(opened.status.success() || said.contains("lock"), "{said}");
    !opened.status.success()
}

#[test]
fn a_shared_disk_is_not_copied_and_is_let_go_before_the_destination_may_run() {
    let Some(lab) = Lab::get() else { return };
    let pair = on_shared_storage(lab);
    let (alpha, beta) = (&pair.alpha, &pair.beta);
    assert_eq!(alpha.place.image(0), beta.place.image(0));
    assert_ne!(alpha.place.image(1), beta.place.image(1));
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = beta.host.serve(&[]).unwrap();
    let name = pair.guest.name();
    assert!(is_held(lab, &pair, 0), "the running guest holds its disk");

    // Rolled back when the source has let go of it already: the guest takes it back and writes on.
    let held = beta.hold_at("load").unwrap();
    let more = ["--max-downtime", "20s"];
    let mut migration = alpha.host.start_migrate(name, agent.port, &more).unwrap();
    held.wait_reached(&mut migration).unwrap();
    assert_eq!(source.qmp().status().unwrap(), "paused");
    assert!(!is_held(lab, &pair, 0), "let go before the load");
    migration.signal(Signal::INT).unwrap();
    held.release().unwrap();
    ended(&migration.wait(LIMIT).unwrap(), 4, "cancelled").unwrap();
    pair.stayed(source.pid(), beta).unwrap();
    assert!(is_held(lab, &pair, 0), "taken back");
    pair.guest.verify_now().unwrap();

    let moved = pair.move_guest((alpha, beta), &agent, &VERIFIED).unwrap();
    let copied = moved.report["disk_bytes"].as_u64();
    assert_eq!(copied, Some(32 * MIB), "{}", moved.report);
    assert!(!source.is_alive());
    assert!(is_held(lab, &pair, 0), "the destination holds it now");
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);
}
