//! Dirty-page tracking and memory access of another process, from outside and without its help.
//!
//! Owns: the userfaultfd that is taken out of a running process ([`Tracker`]), the scan of written pages,
//! reads and writes of its memory ([`RemoteMemory`]), what of it was never touched, and the few other things of this
//! project that need `unsafe`: memory mappings for the embedded guest ([`GuestRam`]) and for what must outlive a
//! killed process ([`SharedWords`]), and a child in a session of its own ([`process::in_new_session`]). It is the only crate with `unsafe`; everything public is safe.
//! Does not own: what a region of a guest is, when a scan is made, and who keeps the descriptor's number.
//!
//! All calls block for as long as they say; callers use them from blocking contexts. A target is left as it was
//! found: see [`Tracker::detach`], and `inject` for what happens when an agent is killed in the middle.

#![allow(
    unsafe_code,
    reason = "ptrace, userfaultfd ioctls, process_vm_readv and mappings have no safe wrapper; they live here and nowhere else"
)]

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "vmferry-memtrack injects system calls with the registers of x86-64 Linux; no other machine is supported"
);

mod error;
mod inject;
mod maps;
mod pages;
pub mod process;
mod ram;
mod remote;
mod sys;
mod tracker;
mod words;

pub use error::TrackError;
pub use maps::Backing;
pub use pages::PageSet;
pub use process::ProcessHandle;
pub use ram::GuestRam;
pub use remote::{MemoryRange, MemoryRun, RemoteMemory};
pub use sys::PAGE_SIZE;
pub use tracker::{Scan, ScanLog, Tracker};
pub use words::SharedWords;
