//! Builds the judge: statically linked, optimised, in a target folder of its own.
//!
//! Owns the call of cargo. Cargo itself knows whether anything is to be done and keeps several test processes out of
//! each other's way; the folder is apart, because the outer `cargo test` may hold the lock of the usual one.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{target_folder, workspace};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// Static, and small: the whole initramfs is unpacked by an emulated processor.
const FLAGS: [&str; 4] = [
    "-Ctarget-feature=+crt-static",
    "-Crelocation-model=static",
    "-Cstrip=symbols",
    "-Cdebuginfo=0",
];

/// The judge's binary, built now if it is not up to date.
pub(crate) fn binary() -> Result<PathBuf> {
    let folder = target_folder().join("judge");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Offline and locked: whoever could build the tests has the judge's few dependencies already.
    let output = Command::new(cargo)
        .current_dir(workspace())
        .args(["build", "--release", "--offline", "--locked"])
        .args(["-p", "vmferry-judge", "--bin", "vmferry-judge"])
        .args(["--target", TRIPLE, "--target-dir"])
        .arg(&folder)
        .env_remove("RUSTFLAGS")
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
        .output()
        .context("cargo cannot be run")?;
    ensure!(
        output.status.success(),
        "cargo build -p vmferry-judge: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(folder.join(TRIPLE).join("release/vmferry-judge"))
}
