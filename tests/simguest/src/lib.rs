//! The embedded guest: a process that plays a virtual machine, for tests, benchmarks and the demo.
//!
//! Owns a guest that can be migrated without a hypervisor: RAM, a CPU state that depends on every step so far, a disk file, a
//! workload, a self-check and a heartbeat, driven over a control socket (newline-delimited JSON, QMP-shaped). Every page
//! and disk block is a function of (seed, index, version); the versions are part of RAM, their sum is part of the CPU
//! state. So `verify` finds any page that is wrong, stale, lost or misplaced, without a second copy to compare with.
//! Does not own how it is migrated: the `sim` driver and `memtrack` do that from outside, as with any hypervisor.

pub mod client;
pub mod command;
pub mod content;
pub mod cpu;
pub mod disk;
pub mod guest;
pub mod heartbeat;
pub mod machine;
pub mod protocol;
pub mod server;

pub use client::{Client, ClientError};
pub use cpu::{Content, Workload};
pub use guest::{GuestConfig, RamKind, Verdict};
