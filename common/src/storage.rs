//! Where an agent keeps its journal and what it leaves for a later agent: the files of this host, or whatever stands for them.
//!
//! Owns the few operations that durable records are made of, each as the kernel offers it: a write may be short, nothing
//! is durable before it is synced, a rename is durable only with its folder. What is done with them, in which order,
//! is `journal`'s and `state`'s. Beside them are files of words, which outlive the process and need not outlive the host.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use vmferry_memtrack::SharedWords;

/// A place for records.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Whether a call may take long enough to be made off the threads of the runtime.
    fn blocks(&self) -> bool;

    /// The whole file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;

    /// An empty file, mode 0600, in place of whatever was there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>>;

    /// Puts `from` in the place of `to`.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes durable what was renamed into or removed from `folder`.
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;

    /// A folder with mode 0700 and all above it, where they are missing.
    fn make_folder(&self, path: &Path) -> io::Result<()>;

    /// Names of what is in `folder`.
    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>>;

    /// Locks the file `path`, which is made where it is missing, for this process.
    fn lock(&self, path: &Path, patience: Patience) -> io::Result<Locked>;

    /// Removes a folder and everything in it; one that is not there is no error.
    fn remove_folder(&self, path: &Path) -> io::Result<()>;

    /// A file of `count` words that are zero, its space reserved, in place of whatever was there. Whoever has that open goes on
    /// with the old one.
    fn create_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>>;

    /// A file of exactly `count` words; one of another length is `InvalidData`.
    fn open_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>>;
}

/// Words of a file, each of 64 bits. A change is there for a later process from the moment in which it is made, in the order in
/// which they are made. Outside of the file there is nothing but zeroes, which do not change.
pub trait Words: Send + Sync + fmt::Debug {
    /// A word.
    fn get(&self, at: usize) -> u64;

    /// Stores a word.
    fn set(&self, at: usize, value: u64);

    /// Adds bits to a word.
    fn add(&self, at: usize, bits: u64);

    /// Takes bits out of a word.
    fn remove(&self, at: usize, bits: u64);
}

impl Words for SharedWords {
    fn get(&self, at: usize) -> u64 {
        Self::get(self, at)
    }

    fn set(&self, at: usize, value: u64) {
        Self::set(self, at, value);
    }

    fn add(&self, at: usize, bits: u64) {
        Self::add(self, at, bits);
    }

    fn remove(&self, at: usize, bits: u64) {
        Self::remove(self, at, bits);
    }
}

/// A file that is being written.
pub trait NewFile: Write {
    /// Makes durable what was written.
    fn sync(&mut self) -> io::Result<()>;
}

/// What to do where somebody else has the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Wait for him.
    Wait,
    /// Say who he is.
    Try,
}

/// How a lock was answered.
#[derive(Debug)]
pub enum Locked {
    /// It is held until this is dropped, or until the process ends however it ends.
    Taken(Box<dyn Held>),
    /// Somebody has it: this process where it is its own id.
    HeldBy(Option<u32>),
}

/// A lock that is held.
pub trait Held: Send + Sync + fmt::Debug {}

/// The files of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Files;

impl Storage for Files {
    fn blocks(&self) -> bool {
        true
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?;
        Ok(Box::new(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    fn make_folder(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(folder)?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    }

    fn lock(&self, path: &Path, patience: Patience) -> io::Result<Locked> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        let operation = match patience {
            Patience::Wait => FlockOperation::LockExclusive,
            Patience::Try => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&file, operation) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(Locked::HeldBy(holder(&mut file))),
            Err(errno) => return Err(errno.into()),
        }
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        writeln!(file, "{}", std::process::id())?;
        Ok(Locked::Taken(Box::new(FileLock(file))))
    }

    fn remove_folder(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn create_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
        Ok(Box::new(SharedWords::create(path, count)?))
    }

    fn open_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
        Ok(Box::new(SharedWords::open(path, count)?))
    }
}

impl NewFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

#[derive(Debug)]
struct FileLock(File);

impl Held for FileLock {}

impl Drop for FileLock {
    fn drop(&mut self) {
        // The file stays: removing it would let two processes lock two files of one name.
        drop(self.0.set_len(0));
    }
}

/// Who holds the lock, as far as the file says: it is written just after the lock is taken.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.take(64).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
