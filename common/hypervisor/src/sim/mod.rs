//! Driver `sim`: the embedded guest, a process that plays a virtual machine.
//!
//! Owns its control socket's client and the traits for it. Memory is tracked, read and written from outside, by the same
//! code as for any hypervisor; disk marks come from the guest's process over the socket, as a hypervisor's dirty
//! bitmap does. No I/O of it bypasses the page cache, so there is no I/O barrier to wait for.

mod client;
mod describe;
mod disk;
mod source;
mod target;

pub use source::SimSource;
pub use target::SimTarget;
