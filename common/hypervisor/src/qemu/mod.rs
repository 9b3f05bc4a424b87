//! Driver `qemu`: a guest of QEMU >= 8.0 on x86-64, spoken to over QMP and NBD.

pub mod nbd;
pub mod qmp;
#[cfg(test)]
pub(crate) mod testing;
mod hmp;
mod stream;
mod inventory;
mod names;
mod preflight;
