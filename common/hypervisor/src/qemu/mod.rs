//! Driver `qemu`: a guest of QEMU >= 8.0 on x86-64, with any accelerator and any image format.
//!
//! Owns how QEMU is spoken to: [`qmp`] for commands and events, [`nbd`] for the content of disks, the process's
//! memory from outside. The running virtual machine needs no preparation but a QMP socket of its own. RAM is never
//! moved by QEMU's own migration; only its device state is, through `xen-save-devices-state` and `migrate-incoming`.
//!
//! ```text
//! source:      attach → start_tracking → (take, read, settle)* → pause → take, read → save → release
//!                                                                  └ resume ┘ (rollback, at any step before release)
//! destination: prepare → write, zero, flush → load → start
//!                     └ discard ┘
//! ```
//!
//! Everything made inside a QEMU is named `vmferry-…`, so that a later agent finds and removes it.

pub mod nbd;
pub mod qmp;

mod describe;
mod disk_io;
mod hmp;
mod inventory;
mod leftovers;
mod link;
mod names;
mod nbd_server;
mod preflight;
mod saving;
mod source;
mod source_disks;
mod state_file;
mod stream;
mod target;
mod target_copy;

pub use source::QemuSource;
pub use target::QemuTarget;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
