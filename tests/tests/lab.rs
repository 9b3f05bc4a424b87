//! The lab itself: real guests boot, beat and check themselves, and the judge bites.
//!
//! No agent takes part here. What the lab says of a migration is only worth something if this holds.

use std::time::Duration;

use vmferry_tests::lab::{Disk, JudgeParams, Lab, Start};

const LONG: Duration = Duration::from_secs(60);

fn small() -> JudgeParams {
    JudgeParams {
        memory: 48 << 20,
        ..JudgeParams::default()
    }
}

#[test]
fn a_guest_boots_beats_and_verifies_itself() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("boots")
        .disk(Disk::raw(64 << 20).prefilled(8 << 20))
        .disk(Disk::qcow2(64 << 20))
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
        format!("mem:{}:0", units(48 << 20)),
        format!("vda:{}:0", units(64 << 20)),
        format!("vdb:{}:0", units(64 << 20)),
    ] {
        assert!(answer.contains(&part), "{answer}");
    }
    let report = guest.beats().report(1).unwrap();
    println!("{report}");
    println!("{}", place.console());
    assert_eq!(guest.running_pid().unwrap(), qemu.pid());
    guest.assert_no_corrupt();
    guest.tell("shutdown").unwrap();
    qemu.wait_end(LONG).unwrap();
}
