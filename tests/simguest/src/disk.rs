//! The guest's disk: a sparse raw file, and the marks of what was written to it.
//!
//! Owns the file and the dirty marks that a migration asks for, as a hypervisor keeps a dirty bitmap: they are taken by the one
//! thread that also writes, so a mark and its write are never apart. Does not own what is written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::content::{PAGE, Page};

/// A disk.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: File,
    len: u64,
    /// One flag per block while a migration tracks them.
    dirty: Option<Vec<bool>>,
}

impl Disk {
    /// Makes a new empty disk; what the file held before is gone.
    pub fn create(path: &Path, len: u64) -> io::Result<Self> {
        let file = options().create(true).truncate(true).open(path)?;
        file.set_len(len)?;
        Self::of(path, file, len)
    }

    /// Opens the disk of an incoming guest: made if missing, else used with what it holds.
    pub fn open(path: &Path, len: u64) -> io::Result<Self> {
        let file = options().create(true).truncate(false).open(path)?;
        match file.metadata()?.len() {
            0 => file.set_len(len)?,
            found if found == len => {}
            found => {
                return Err(io::Error::other(format!(
                    "{} holds {found} bytes and not {len}: name the right size, or another file",
                    path.display()
                )));
            }
        }
        Self::of(path, file, len)
    }

    fn of(path: &Path, file: File, len: u64) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(PAGE as u64) {
            return Err(io::Error::other(format!(
                "a disk of {len} bytes: its size must be a multiple of {PAGE}"
            )));
        }
        Ok(Self {
            path: path.canonicalize()?,
            file,
            len,
            dirty: None,
        })
    }

    /// Absolute path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no byte; a disk never has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of blocks.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        self.len / PAGE as u64
    }

    /// Reads block `block`.
    pub fn read(&self, block: u64, page: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(page, block * PAGE as u64)
    }

    /// Writes block `block` and marks it.
    pub fn write(&mut self, block: u64, page: &Page) -> io::Result<()> {
        self.file.write_all_at(page, block * PAGE as u64)?;
        if let Some(flag) =
            (self.dirty.as_mut()).and_then(|flags| flags.get_mut(usize::try_from(block).ok()?))
        {
            *flag = true;
        }
        Ok(())
    }

    /// Begins to mark writes, from no mark.
    pub fn start_tracking(&mut self) {
        let blocks = usize::try_from(self.blocks()).unwrap_or(usize::MAX);
        self.dirty = Some(vec![false; blocks]);
    }

    /// Ends it.
    pub fn stop_tracking(&mut self) {
        self.dirty = None;
    }

    /// Takes all marks, as (offset, length) in bytes, ascending; `None` if writes are not tracked.
    pub fn take_dirty(&mut self) -> Option<Vec<(u64, u64)>> {
        let flags = self.dirty.as_mut()?;
        let mut extents: Vec<(u64, u64)> = Vec::new();
        for (offset, flag) in (0u64..).step_by(PAGE).zip(flags) {
            if !std::mem::take(flag) {
                continue;
            }
            match extents.last_mut() {
                Some((start, len)) if *start + *len == offset => *len += PAGE as u64,
                _ => extents.push((offset, PAGE as u64)),
            }
        }
        Some(extents)
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}
