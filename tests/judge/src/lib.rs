//! What the judge and the lab outside share: the init program of the real test guest.
//!
//! The judge fills the guest's memory and disks with content that carries (index, version, seed), changes it at
//! set rates, checks it all the time and says so; and it beats, a numbered record every millisecond on a
//! virtio-serial port. This library owns the formats: content, beat records, kernel command line. The program
//! itself is `main.rs`; what the beats mean outside is the lab's business in `vmferry-tests`.
//!
//! Invariant: what a page or block must hold follows from (seed, index, version) alone, so that a stale, swapped,
//! zeroed or foreign one is always found.

pub mod beat;
pub mod content;
pub mod params;

/// Name of the virtio-serial port that carries the beats.
pub const BEAT_PORT: &str = "vmferry.beat";
/// Name of the virtio-serial port that carries commands and their answers.
pub const CONTROL_PORT: &str = "vmferry.control";
/// Folder of the kernel modules in the initramfs, and the file in it that lists them in the order of loading.
pub const MODULE_FOLDER: &str = "/modules";
/// File in [`MODULE_FOLDER`] with one file name a line.
pub const MODULE_ORDER: &str = "order";
