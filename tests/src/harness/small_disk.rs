//! A small file system of a test's own, to be filled or made read-only.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::skip::skipped;

/// A file system in memory; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// One of `size` (`64m`) at the folder `at`. `None`, with the reason printed, where the test is not run by root.
    ///
    /// # Panics
    /// It cannot be mounted, or it is CI and not root: there no test may be skipped.
    #[must_use]
    pub fn mount(at: &Path, size: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skipped("mounting a small file system needs root");
            return None;
        }
        mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"], at);
        Some(Self(at.to_owned()))
    }

    /// Changes its options: `ro`, `rw`.
    pub fn remount(&self, how: &str) {
        mount(&["-o", &format!("remount,{how}")], &self.0);
    }

    /// Takes all the room that is left, until [`empty`](Self::empty).
    ///
    /// # Panics
    /// It has more room than such a disk may have.
    pub fn fill(&self) {
        let filled = std::fs::write(self.filler(), vec![1; 256 << 20]);
        let error = filled.err().map(|error| error.kind());
        assert_eq!(error, Some(std::io::ErrorKind::StorageFull));
    }

    /// Gives the room back.
    ///
    /// # Panics
    /// It was not filled.
    pub fn empty(&self) {
        std::fs::remove_file(self.filler()).expect("the filler can be removed");
    }

    /// The file that takes the room.
    #[must_use]
    pub fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }
}

fn mount(args: &[&str], at: &Path) {
    let done = Command::new("mount").args(args).arg(at).status();
    assert!(
        done.is_ok_and(|status| status.success()),
        "mount {args:?} at {}",
        at.display()
    );
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // It goes with the test's folder in any event.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}
