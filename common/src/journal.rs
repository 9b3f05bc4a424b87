//! Durable records: one value per file, replaced whole.
//!
//! Owns how a record becomes a file that survives a crash: magic, version, length and checksum in front of the
//! value's layout; temporary file, fsync, rename, fsync of the folder. What a record means is `vmferry-proto`'s.
//! Invariant: a reader gets the last record written or an error that names the file, never a guess. A write that
//! fails says whether the new record may be there all the same: from the rename on it may.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmferry_proto::layout::{self, LayoutError};
use xxhash_rust::xxh3::xxh3_64;

use crate::storage::{Files, Storage};

/// What a record file begins with.
const MAGIC: [u8; 8] = *b"vmferryJ";
/// Magic, version of the record's type, length, checksum.
const HEADER_LEN: usize = 8 + 4 + 4 + 8;

/// A record could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} {path}: {next}", path = path.display(), next = if *visible {
    "the new record may already be in force; it counts as written"
} else {
    "the record before is in force; is the disk full?"
})]
pub struct JournalError {
    /// Whether the rename may have happened: then the new record counts, whatever comes after.
    pub visible: bool,
    /// The file.
    pub path: PathBuf,
    step: &'static str,
    #[source]
    source: io::Error,
}

/// A record could not be read. Nothing is deduced from such a file.
#[derive(Debug, thiserror::Error)]
pub enum JournalReadError {
    /// The file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It is no record of ours.
    #[error("{path} is not a vmferry record: move it away if it was put there by mistake", path = path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// It was written by another version of the program.
    #[error("{path} has record version {found}, this program reads {expected}: use the program that wrote it to end the migration", path = path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// This program's.
        expected: u32,
    },
    /// It is cut off or damaged.
    #[error("{path} is damaged ({problem}): who has the guest must be found out by hand, see `vmferry-src explain journal`", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The checksum is right and the value still cannot be read: a bug.
    #[error("{path} holds a value that this program cannot read", path = path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: LayoutError,
    },
}

/// One record file.
#[derive(Debug)]
pub struct RecordFile<T> {
    storage: Arc<dyn Storage>,
    path: PathBuf,
    version: u32,
    holds: PhantomData<fn(T) -> T>,
}

impl<T> Clone for RecordFile<T> {
    fn clone(&self) -> Self {
        Self {
            storage: self.storage.clone(),
            path: self.path.clone(),
            version: self.version,
            holds: PhantomData,
        }
    }
}

impl<T: Serialize + DeserializeOwned> RecordFile<T> {
    /// The record in the file `path`; `version` is that of `T`'s layout and must change whenever `T` does.
    /// One writer at a time, which the guest's lock sees to.
    #[must_use]
    pub fn new(path: PathBuf, version: u32) -> Self {
        Self::on(Arc::new(Files), path, version)
    }

    /// As [`new`](Self::new), in `storage`.
    #[must_use]
    pub fn on(storage: Arc<dyn Storage>, path: PathBuf, version: u32) -> Self {
        Self {
            storage,
            path,
            version,
            holds: PhantomData,
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the record, durably. On an error with `visible` unset the record before is still in force.
    pub fn write(&self, record: &T) -> Result<(), JournalError> {
        let bytes = self
            .encode(record)
            .map_err(|error| self.failed(false, "encode a record for", io::Error::other(error)))?;
        self.write_bytes(&bytes)
    }

    /// [`write`](Self::write) off the threads of the runtime, since a disk may take long.
    pub async fn write_aside(&self, record: T) -> Result<(), JournalError>
    where
        T: Send + 'static,
    {
        if !self.storage.blocks() {
            return self.write(&record);
        }
        let file = self.clone();
        let written = tokio::task::spawn_blocking(move || file.write(&record)).await;
        // The writer panicked: nobody knows how far it came, so a restart may find the record.
        written.unwrap_or_else(|panic| Err(self.failed(true, "write", io::Error::other(panic))))
    }

    fn encode(&self, record: &T) -> Result<Vec<u8>, LayoutError> {
        let value = layout::encode(record)?;
        let len =
            u32::try_from(value.len()).map_err(|_| LayoutError::TooLong { len: value.len() })?;
        let mut bytes = Vec::with_capacity(HEADER_LEN + value.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&checksum(self.version, &value).to_le_bytes());
        bytes.extend_from_slice(&value);
        Ok(bytes)
    }

    fn write_bytes(&self, bytes: &[u8]) -> Result<(), JournalError> {
        let temporary = self.temporary();
        let prepared = self.write_temporary(&temporary, bytes);
        if let Err((step, source)) = prepared {
            // What is left of it is of no use; the next write would truncate it anyway.
            drop(self.storage.remove(&temporary));
            return Err(self.failed(false, step, source));
        }
        // An error of rename itself may come after the change was made (a network file system): it counts as made.
        self.storage
            .rename(&temporary, &self.path)
            .map_err(|source| self.failed(true, "rename the new record to", source))?;
        self.sync_folder()
            .map_err(|source| self.failed(true, "make durable the folder of", source))
    }

    /// The record; `None` where there is none.
    pub fn read(&self) -> Result<Option<T>, JournalReadError> {
        let bytes = match self.storage.read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(JournalReadError::Io {
                    path: self.path.clone(),
                    source,
                });
            }
        };
        self.decode(&bytes).map(Some)
    }

    fn decode(&self, bytes: &[u8]) -> Result<T, JournalReadError> {
        let path = || self.path.clone();
        let damaged = |problem: String| JournalReadError::Damaged {
            path: path(),
            problem,
        };
        if !bytes.starts_with(&MAGIC) {
            // An empty or cut file that could have been ours is damaged, not foreign.
            return Err(if MAGIC.starts_with(bytes) {
                damaged(format!("only {} bytes", bytes.len()))
            } else {
                JournalReadError::Foreign { path: path() }
            });
        }
        let header = bytes
            .get(..HEADER_LEN)
            .ok_or_else(|| damaged(format!("only {} bytes", bytes.len())))?;
        let number = |at: usize| {
            let mut four = [0; 4];
            four.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(four)
        };
        let (found, len) = (number(8), number(12));
        let sum = u64::from(number(16)) | u64::from(number(20)) << 32;
        let value = bytes.get(HEADER_LEN..).unwrap_or_default();
        if value.len() != len as usize {
            return Err(damaged(format!("{} bytes instead of {len}", value.len())));
        }
        if checksum(found, value) != sum {
            return Err(damaged("its checksum is wrong".to_owned()));
        }
        // Only now: a damaged version number is damage, not another program.
        if found != self.version {
            return Err(JournalReadError::Version {
                path: path(),
                found,
                expected: self.version,
            });
        }
        layout::decode(value).map_err(|source| JournalReadError::Value {
            path: path(),
            source,
        })
    }

    /// Removes the record, durably. No record is no error.
    pub fn remove(&self) -> Result<(), JournalError> {
        match self.storage.remove(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(self.failed(false, "remove", source)),
        }
        self.sync_folder()
            .map_err(|source| self.failed(true, "make durable the folder of", source))
    }

    fn write_temporary(&self, path: &Path, bytes: &[u8]) -> Result<(), (&'static str, io::Error)> {
        let mut file = self
            .storage
            .create(path)
            .map_err(|error| ("create the new record beside", error))?;
        file.write_all(bytes)
            .map_err(|error| ("write the new record beside", error))?;
        file.sync()
            .map_err(|error| ("make durable the new record beside", error))
    }

    /// A rename is durable only with its folder.
    fn sync_folder(&self) -> io::Result<()> {
        let folder = self
            .path
            .parent()
            .filter(|path| !path.as_os_str().is_empty());
        self.storage.sync_folder(folder.unwrap_or(Path::new(".")))
    }

    fn temporary(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        self.path.with_file_name(name)
    }

    fn failed(&self, visible: bool, step: &'static str, source: io::Error) -> JournalError {
        JournalError {
            visible,
            path: self.path.clone(),
            step,
            source,
        }
    }
}

/// Over version and value, so that neither can be damaged unseen.
fn checksum(version: u32, value: &[u8]) -> u64 {
    xxh3_64(value) ^ u64::from(version).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Locked, NewFile, Patience, Words};
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
    struct Record {
        attempt: u32,
        what: String,
    }

    fn record(attempt: u32) -> Record {
        Record {
            attempt,
            what: "committing".to_owned(),
        }
    }

    fn file(dir: &Path) -> RecordFile<Record> {
        RecordFile::new(dir.join("guest.record"), 3)
    }

    /// The files of this host; counts the waits for the disk.
    #[derive(Debug, Default, Clone)]
    struct Counting(Arc<AtomicU32>);

    struct CountedFile(Box<dyn NewFile>, Arc<AtomicU32>);

    impl Write for CountedFile {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    impl NewFile for CountedFile {
        fn sync(&mut self) -> io::Result<()> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.sync()
        }
    }

    impl Storage for Counting {
        fn blocks(&self) -> bool {
            Files.blocks()
        }

        fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
            Files.read(path)
        }

        fn create(&self, path: &Path) -> io::Result<Box<dyn NewFile>> {
            Ok(Box::new(CountedFile(Files.create(path)?, self.0.clone())))
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            Files.rename(from, to)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            Files.remove(path)
        }

        fn sync_folder(&self, folder: &Path) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Files.sync_folder(folder)
        }

        fn make_folder(&self, path: &Path) -> io::Result<()> {
            Files.make_folder(path)
        }

        fn list(&self, folder: &Path) -> io::Result<Vec<std::ffi::OsString>> {
            Files.list(folder)
        }

        fn lock(&self, path: &Path, patience: Patience) -> io::Result<Locked> {
            Files.lock(path, patience)
        }

        fn remove_folder(&self, path: &Path) -> io::Result<()> {
            Files.remove_folder(path)
        }

        fn create_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
            Files.create_words(path, count)
        }

        fn open_words(&self, path: &Path, count: usize) -> io::Result<Box<dyn Words>> {
            Files.open_words(path, count)
        }
    }

    /// The guest stands still for one record of each side: this is what the journal costs it there.
    #[test]
    fn a_record_costs_two_waits_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Counting::default();
        let path = dir.path().join("guest.record");
        let file = RecordFile::on(Arc::new(storage.clone()), path, 3);
        for attempt in 1..4 {
            file.write(&record(attempt)).unwrap();
            assert_eq!(storage.0.load(Ordering::Relaxed), attempt * 2);
        }
        assert_eq!(file.read().unwrap(), Some(record(3)));
    }

    #[test]
    fn the_last_record_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        assert_eq!(file.read().unwrap(), None);
        for attempt in 0..3 {
            file.write(&record(attempt)).unwrap();
            assert_eq!(file.read().unwrap(), Some(record(attempt)));
        }
        let mode = fs::metadata(file.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            1,
            "no temporary file is left"
        );
        file.remove().unwrap();
        file.remove().unwrap();
        assert_eq!(file.read().unwrap(), None);
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        file.write(&record(7)).unwrap();
        let good = fs::read(file.path()).unwrap();
        for len in 0..good.len() {
            fs::write(file.path(), &good[..len]).unwrap();
            assert!(
                matches!(file.read(), Err(JournalReadError::Damaged { .. })),
                "cut to {len}"
            );
        }
        for at in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[at / 8] ^= 1 << (at % 8);
            fs::write(file.path(), &bad).unwrap();
            assert!(file.read().is_err(), "bit {at} was flipped");
        }
        fs::write(file.path(), [good.as_slice(), b"x"].concat()).unwrap();
        assert!(matches!(file.read(), Err(JournalReadError::Damaged { .. })));
    }

    #[test]
    fn foreign_files_and_other_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        fs::write(file.path(), "{\"attempt\": 1}").unwrap();
        let error = file.read().unwrap_err();
        assert!(matches!(error, JournalReadError::Foreign { .. }));
        assert!(error.to_string().contains("guest.record"), "{error}");
        let other = RecordFile::<Record>::new(file.path().to_owned(), 2);
        other.write(&record(1)).unwrap();
        assert!(matches!(
            file.read(),
            Err(JournalReadError::Version {
                found: 2,
                expected: 3,
                ..
            })
        ));
    }

    #[test]
    fn before_the_rename_a_failure_leaves_the_old_record_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        file.write(&record(1)).unwrap();
        // A folder stands where the temporary file goes.
        fs::create_dir(file.temporary()).unwrap();
        let error = file.write(&record(2)).unwrap_err();
        assert!(!error.visible);
        assert!(
            error.to_string().contains("the record before is in force"),
            "{error}"
        );
        assert_eq!(file.read().unwrap(), Some(record(1)));
    }

    #[test]
    fn a_failed_rename_counts_as_visible() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        // rename(2) of a file over a folder fails.
        fs::create_dir(file.path()).unwrap();
        assert!(file.write(&record(1)).unwrap_err().visible);
    }

    #[test]
    fn a_full_disk_leaves_the_old_record_in_force() {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "none"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            assert!(
                std::env::var_os("CI").is_none(),
                "CI must be able to mount a tmpfs"
            );
            eprintln!("skipped: a small tmpfs can only be mounted as root");
            return;
        }
        let outcome = std::panic::catch_unwind(|| {
            let file = file(dir.path());
            file.write(&record(1)).unwrap();
            let filler = fs::write(dir.path().join("filler"), vec![1; 1 << 20]);
            assert_eq!(filler.unwrap_err().kind(), io::ErrorKind::StorageFull);
            let error = file.write(&record(2)).unwrap_err();
            assert!(!error.visible, "{error}");
            assert_eq!(file.read().unwrap(), Some(record(1)));
            fs::remove_file(dir.path().join("filler")).unwrap();
            file.write(&record(2)).unwrap();
            assert_eq!(file.read().unwrap(), Some(record(2)));
        });
        Command::new("umount").arg(dir.path()).status().unwrap();
        outcome.unwrap();
    }
}
