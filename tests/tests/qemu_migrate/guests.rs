//! The guests of these tests.

use vmferry_tests::harness::qemu::Pair;
use vmferry_tests::lab::{Content, Disk, Guest, GuestBuilder, JudgeParams, Lab, MemoryKind};

use super::programs;

pub(crate) const MIB: u64 = 1 << 20;

/// Reads everything on both sides while paused: that takes its time, and must be allowed to.
pub(crate) const VERIFIED: [&str; 4] = ["--verify", "full", "--max-downtime", "20s"];

/// Two disks of different formats, memory and disks being written all the time.
pub(crate) fn busy(lab: &'static Lab, name: &str) -> Pair {
    let guest = lab
        .guest(name)
        .memory_mib(512)
        .disk(Disk::raw(96 * MIB).prefilled(32 * MIB))
        .disk(Disk::qcow2(96 * MIB).prefilled(16 * MIB))
        .judge(JudgeParams {
            memory: 256 * MIB,
            dirty: 16 * MIB,
            working_set: 32 * MIB,
            ..JudgeParams::default()
        })
        .build();
    pair(guest)
}

/// Memory and disks that the kernel does not stand between: a file that others can map, and I/O past the page cache.
pub(crate) fn shared_and_direct(lab: &'static Lab, name: &str) -> Pair {
    let guest = lab
        .guest(name)
        .memory_mib(512)
        .memory(MemoryKind::SharedFile)
        .vcpus(2)
        .disk(Disk::raw(48 * MIB).prefilled(8 * MIB).direct())
        .disk(Disk::qcow2(48 * MIB).direct())
        .judge(JudgeParams {
            memory: 192 * MIB,
            dirty: 16 * MIB,
            working_set: 32 * MIB,
            disk: 4 * MIB,
            ..JudgeParams::default()
        })
        .build();
    pair(guest)
}

/// Small, and works a little; content that does not compress, so that rates mean what they say.
pub(crate) fn small(lab: &'static Lab, name: &str) -> GuestBuilder {
    lab.guest(name)
        .memory_mib(192)
        .disk(Disk::raw(16 * MIB))
        .judge(working_a_little())
}

/// What a small guest does.
pub(crate) fn working_a_little() -> JudgeParams {
    JudgeParams {
        memory: 64 * MIB,
        working_set: 32 * MIB,
        content: Content::Random,
        ..JudgeParams::default()
    }
}

/// The guest and two hosts.
pub(crate) fn pair(guest: anyhow::Result<Guest>) -> Pair {
    Pair::new(programs(), guest.unwrap()).unwrap()
}
