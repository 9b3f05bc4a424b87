//! The disk of an embedded guest: a sparse raw file that both the guest and the driver have open.
//!
//! Owns reads, writes, holes and durability of that file. Holes stay holes: what is to be zero is punched out, and a
//! hole is never read.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use vmferry_proto::geometry::{RegionBits, RegionLen, Run};

use crate::error::GuestError;
use crate::guest::{RegionReader, RegionWriter};

/// A raw image.
#[derive(Debug)]
pub(super) struct DiskFile {
    path: PathBuf,
    file: Arc<File>,
    len: u64,
}

impl DiskFile {
    /// Opens the image, for writing too where `write` says so.
    pub(super) fn open(path: &Path, len: u64, write: bool) -> Result<Self, GuestError> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        let disk = Self {
            path: path.to_owned(),
            file: Arc::new(file.map_err(|source| failed("open", path, source))?),
            len,
        };
        disk.check_len()?;
        Ok(disk)
    }

    /// Fails if the image is not as long any more as it was said to be.
    pub(super) fn check_len(&self) -> Result<(), GuestError> {
        let found = self.file.metadata();
        let found = found
            .map_err(|source| self.failed("look at", source))?
            .len();
        if found == self.len {
            return Ok(());
        }
        Err(GuestError::Incompatible(format!(
            "{} holds {found} bytes and the guest's disk has {}: it was resized",
            self.path.display(),
            self.len
        )))
    }

    /// Blocks that are holes, and so read as zero.
    pub(super) fn holes(&self) -> Result<RegionBits, GuestError> {
        let mut holes = RegionBits::empty(RegionLen(self.len));
        let mut at = 0;
        for data in self.data(&(0..self.len))? {
            holes.insert_whole_blocks(at, data.start - at);
            at = data.end;
        }
        holes.insert_whole_blocks(at, self.len - at);
        Ok(holes)
    }

    /// Parts of `span` that are not holes.
    fn data(&self, span: &Range<u64>) -> Result<Vec<Range<u64>>, GuestError> {
        let failed = |errno: Errno| self.failed("look for holes in", errno.into());
        let mut found = Vec::new();
        let mut at = span.start;
        while at < span.end {
            let start = match seek(&*self.file, SeekFrom::Data(at)) {
                Ok(start) if start < span.end => start,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed(errno)),
            };
            let end = seek(&*self.file, SeekFrom::Hole(start)).map_err(failed)?;
            let end = end.clamp(start + 1, span.end);
            found.push(start..end);
            at = end;
        }
        Ok(found)
    }

    fn failed(&self, what: &str, source: io::Error) -> GuestError {
        failed(what, &self.path, source)
    }
}

fn failed(what: &str, path: &Path, source: io::Error) -> GuestError {
    if source.kind() == io::ErrorKind::StorageFull {
        return GuestError::NoSpace(format!(
            "no space left for {}: free some on its file system",
            path.display()
        ));
    }
    GuestError::Io {
        what: format!("cannot {what} {}", path.display()),
        source,
    }
}

/// Cuts `buf` into the pieces that belong to `runs`.
fn check(runs: &[Run], len: usize, disk_len: u64) -> Result<(), GuestError> {
    let total: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
    let inside = runs
        .iter()
        .all(|run| run.offset.saturating_add(u64::from(run.len)) <= disk_len);
    if total == len as u64 && inside {
        return Ok(());
    }
    Err(GuestError::Refused {
        command: "disk access".to_owned(),
        answer: format!("{total} bytes named and {len} given, on a disk of {disk_len} bytes"),
    })
}

#[async_trait]
impl RegionReader for DiskFile {
    async fn read(&self, runs: &[Run], buf: &mut [u8]) -> Result<(), GuestError> {
        check(runs, buf.len(), self.len)?;
        let mut rest = buf;
        for run in runs {
            let (piece, behind) = rest.split_at_mut(run.len as usize);
            let done = self.file.read_exact_at(piece, run.offset);
            done.map_err(|source| self.failed("read", source))?;
            rest = behind;
        }
        Ok(())
    }
}

#[async_trait]
impl RegionWriter for DiskFile {
    async fn write(&self, runs: &[Run], data: &[u8]) -> Result<(), GuestError> {
        check(runs, data.len(), self.len)?;
        let mut rest = data;
        for run in runs {
            let (piece, behind) = rest.split_at(run.len as usize);
            let done = self.file.write_all_at(piece, run.offset);
            done.map_err(|source| self.failed("write", source))?;
            rest = behind;
        }
        Ok(())
    }

    async fn zero(&self, runs: &[Run]) -> Result<(), GuestError> {
        let total: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
        check(runs, usize::try_from(total).unwrap_or(usize::MAX), self.len)?;
        for run in runs {
            let span = run.offset..run.offset + u64::from(run.len);
            for part in self.data(&span)? {
                punch(&self.file, &part)
                    .map_err(|source| self.failed("write zeroes to", source))?;
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), GuestError> {
        let file = Arc::clone(&self.file);
        let done = tokio::task::spawn_blocking(move || file.sync_data()).await;
        done.unwrap_or_else(|error| Err(io::Error::other(error)))
            .map_err(|source| self.failed("flush", source))
    }
}

/// Makes `part` a hole; where the file system knows none, writes zeroes.
fn punch(file: &File, part: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match fallocate(file, flags, part.start, part.end - part.start) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            const ZEROES: &[u8] = &[0; 64 << 10];
            let mut at = part.start;
            while at < part.end {
                let len = ZEROES
                    .len()
                    .min(usize::try_from(part.end - at).unwrap_or(ZEROES.len()));
                file.write_all_at(&ZEROES[..len], at)?;
                at += len as u64;
            }
            Ok(())
        }
        done => done.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::DiskFile;
    use crate::guest::{RegionReader, RegionWriter};
    use std::os::unix::fs::MetadataExt;
    use vmferry_proto::geometry::{Run, WindowIndex};

    #[tokio::test]
    async fn zeroes_leave_holes_and_old_data_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        const SIZE: u32 = 1 << 20;
        let len = u64::from(SIZE);
        std::fs::write(&path, vec![7u8; SIZE as usize]).unwrap();
        let disk = DiskFile::open(&path, len, true).unwrap();
        assert!(disk.holes().unwrap().is_empty());
        let all = Run {
            offset: 0,
            len: SIZE,
        };
        disk.zero(&[all]).await.unwrap();
        disk.write(
            &[Run {
                offset: 8192,
                len: 4096,
            }],
            &[9; 4096],
        )
        .await
        .unwrap();
        disk.flush().await.unwrap();
        let mut bytes = vec![1; SIZE as usize];
        disk.read(&[all], &mut bytes).await.unwrap();
        let wrong = bytes
            .iter()
            .enumerate()
            .find(|(at, byte)| **byte != if (8192..12288).contains(at) { 9 } else { 0 });
        assert_eq!(wrong, None);
        assert!(std::fs::metadata(&path).unwrap().blocks() < 64);
        let holes = disk.holes().unwrap();
        assert_eq!(holes.count(), len / 4096 - 1);
        assert!(!holes.get(WindowIndex(0)).contains(2));
    }

    #[tokio::test]
    async fn nothing_outside_the_disk_is_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, [0u8; 8192]).unwrap();
        let disk = DiskFile::open(&path, 8192, true).unwrap();
        let outside = [Run {
            offset: 4096,
            len: 8192,
        }];
        assert!(disk.write(&outside, &[1; 8192]).await.is_err());
        assert!(disk.zero(&outside).await.is_err());
        assert!(disk.read(&outside, &mut [0; 8192]).await.is_err());
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 8192);
        std::fs::write(&path, [0u8; 4096]).unwrap();
        assert!(disk.check_len().is_err());
    }
}
