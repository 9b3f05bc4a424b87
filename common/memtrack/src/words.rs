//! A file of 64-bit words, mapped: what is stored there outlives the process that stored it, however it ends.
//!
//! Owns the file's size and the mapping. What the words mean, and in which order they are stored so that any beginning of
//! the stores makes sense, is the user's. The kernel keeps the pages when the process is killed; nothing is
//! synchronised to a disk, so a crash of the machine loses it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, fallocate};

/// Words of a file.
#[derive(Debug)]
pub struct SharedWords {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to this value alone, is not bound to a thread, and is only accessed atomically.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Makes the file anew, of `words` zeroes, with all of its space reserved: a full file system fails here and not later
    /// with a signal.
    pub fn create(path: &Path, words: usize) -> io::Result<Self> {
        // One that is still mapped by a process which is about to end must not change under it.
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path)?;
        let reserved = fallocate(&file, FallocateFlags::empty(), 0, bytes(words)? as u64);
        if let Err(errno) = reserved {
            drop(std::fs::remove_file(path));
            return Err(errno.into());
        }
        Self::map(&file, words)
    }

    /// Opens a file of exactly `words` words; another length is `InvalidData`.
    pub fn open(path: &Path, words: usize) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let found = file.metadata()?.len();
        if found != bytes(words)? as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it holds {found} bytes and not {}", words * 8),
            ));
        }
        Self::map(&file, words)
    }

    fn map(file: &File, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                bytes(words)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words })
    }

    /// A word; zero outside.
    #[must_use]
    pub fn get(&self, at: usize) -> u64 {
        let word = self.words().get(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Stores a word, behind everything that was stored before. Nothing happens outside, here and below.
    pub fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.words().get(at) {
            word.store(value, Ordering::Release);
        }
    }

    /// Adds bits to a word; where they are there, nothing is stored.
    pub fn add(&self, at: usize, bits: u64) {
        if let Some(word) = self.words().get(at)
            && word.load(Ordering::Acquire) & bits != bits
        {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Takes bits out of a word; where none is there, nothing is stored.
    pub fn remove(&self, at: usize, bits: u64) {
        if let Some(word) = self.words().get(at)
            && word.load(Ordering::Acquire) & bits != 0
        {
            word.fetch_and(!bits, Ordering::AcqRel);
        }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is as long, page aligned and lives as long as `self`; atomics may be changed by others.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }
}

fn bytes(words: usize) -> io::Result<usize> {
    words
        .checked_mul(8)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_is_found_by_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("words");
        let first = SharedWords::create(&path, 1000).unwrap();
        assert!((0..1000).all(|at| first.get(at) == 0));
        first.set(999, 7);
        first.add(1, 0b110);
        first.remove(1, 0b010);
        let second = SharedWords::open(&path, 1000).unwrap();
        assert_eq!([999, 1, 1000].map(|at| second.get(at)), [7, 0b100, 0]);
        // Made anew, it is another file.
        let third = SharedWords::create(&path, 1000).unwrap();
        first.set(0, 1);
        assert_eq!(third.get(0), 0);
        let error = SharedWords::open(&path, 999).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(SharedWords::create(&path, 0).is_err());
    }
}
