//! The machine as a run is to find it, whatever ran before.
//!
//! Owns what a run would otherwise pay for another one: data that file systems have yet to write, and free memory that a virtual
//! machine's host has taken back (free page reporting), which costs a guest's new page ten times what clearing it does.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use crate::link::on_thread;

/// Memory that is made present: more than a run takes.
const BYTES: usize = 2000 << 20;
/// A huge page: smaller ones would leave memory of both kinds among what is free.
const PIECE: usize = 2 << 20;

/// Writes back what waits for it, and has the host give its free memory.
///
/// # Errors
/// Not root, or a kernel without huge pages in `tmpfs`.
pub fn make_ready() -> Result<()> {
    rustix::fs::sync();
    let folder = tempfile::tempdir()?;
    // The file system is the thread's alone, so that it is gone with it, however that ends.
    on_thread(|| touch(folder.path()))
}

fn touch(folder: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace needs root")?;
    mount(&["--make-rprivate", "/"])?;
    let place = folder.to_str().context("the temporary folder's name")?;
    mount(&["-t", "tmpfs", "-o", "huge=always,size=100%", "tmpfs", place])?;
    let mut file = File::create(folder.join("memory"))?;
    let piece = vec![0; PIECE];
    for _ in 0..BYTES / PIECE {
        file.write_all(&piece).context("touching free memory")?;
    }
    Ok(())
}

fn mount(arguments: &[&str]) -> Result<()> {
    let done = Command::new("mount").args(arguments).status();
    ensure!(
        done.context("mount")?.success(),
        "mount {} failed",
        arguments.join(" ")
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_is_left_of_what_made_the_machine_ready() {
        if !rustix::process::geteuid().is_root() {
            crate::skip::skipped("mounting a file system needs root");
            return;
        }
        let mounts = || std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let before = mounts();
        super::make_ready().unwrap();
        assert_eq!(mounts(), before);
    }
}
