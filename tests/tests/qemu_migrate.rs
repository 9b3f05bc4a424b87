//! Real Linux guests under QEMU move between real agents, busy in memory and on disk, without one wrong byte.

use vmferry_tests::harness::qemu::{Pair, allocated};
use vmferry_tests::harness::role::Programs;
use vmferry_tests::lab::{Disk, JudgeParams, Lab};

const MIB: u64 = 1 << 20;

fn programs() -> Programs {
    Programs::played_by(env!("CARGO_BIN_EXE_vmferry-demo").as_ref())
}

/// Reads everything on both sides while paused: that takes its time, and must be allowed to.
const VERIFIED: [&str; 4] = ["--verify", "full", "--max-downtime", "20s"];

#[test]
fn a_busy_guest_goes_there_and_back_again() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("there-and-back")
        .memory_mib(512)
        .disk(Disk::raw(256 * MIB).prefilled(64 * MIB))
        .disk(Disk::qcow2(256 * MIB).prefilled(32 * MIB))
        .judge(JudgeParams {
            memory: 256 * MIB,
            dirty: 16 * MIB,
            working_set: 32 * MIB,
            disk: 2 * MIB,
            ..JudgeParams::default()
        })
        .build()
        .unwrap();
    let pair = Pair::new(programs(), guest).unwrap();
    pair.expect_launched().unwrap();
    let _source = pair.boot().unwrap();
    let beta = pair.beta.host.serve(&[]).unwrap();

    let there = pair
        .move_guest((&pair.alpha, &pair.beta), &beta, &VERIFIED)
        .unwrap();
    let unbroken = pair.unbroken(1).unwrap();
    assert_eq!(unbroken.handovers.len(), 1);
    for disk in 0..2 {
        let image = allocated(&pair.beta.place.image(disk)).unwrap();
        println!("image {disk}: {} MiB allocated", image >> 20);
    }
}
