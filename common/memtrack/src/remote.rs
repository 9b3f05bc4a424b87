//! Reads and writes of another process's memory, and what of it was ever touched.
//!
//! Owns the layout of the ranges that the caller named: every access is checked against it, so a wrong run is an
//! error and never a write elsewhere. Works with and without tracking; safe to use from several threads at once. The process
//! is held by its pidfd: after its end every call fails with [`TrackError::Gone`].

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use linux_raw_sys::general::{PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::error::TrackError;
use crate::maps::{self, Backing, Vma};
use crate::process::ProcessHandle;
use crate::sys::{
    NO_REGION, PAGE_SIZE, RemotePiece, ScanRequest, pagemap_scan, read_remote, write_remote,
};

/// Most pieces of either side in one process_vm_readv or process_vm_writev (the kernel's UIO_MAXIOV).
const MAX_PIECES: usize = 1024;
/// Answer slots of one scan: 24 KiB, more than the kernel fills in one step of its own.
const SCAN_SLOTS: usize = 1024;

/// A range of a process's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// First address, a multiple of the page size.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// Bytes of one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRun {
    /// First byte, from the start of the range.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// Memory ranges of another process.
#[derive(Debug)]
pub struct RemoteMemory {
    process: ProcessHandle,
    pagemap: File,
    layouts: Vec<Layout>,
}

#[derive(Debug)]
struct Layout {
    range: MemoryRange,
    backing: Backing,
    files: Vec<FilePiece>,
}

/// A part of a shared range and the file under it.
#[derive(Debug)]
struct FilePiece {
    /// Bytes from the start of the range.
    at: Range<u64>,
    file: File,
    file_offset: u64,
}

impl RemoteMemory {
    /// Looks up what `ranges` of `process` are made of. Nothing is done to the process.
    pub fn open(process: ProcessHandle, ranges: &[MemoryRange]) -> Result<Self, TrackError> {
        let pid = process.pid();
        if pid == std::process::id() {
            return Err(TrackError::BadRange {
                pid,
                start: 0,
                len: 0,
                why: "this is the agent's own process".to_owned(),
            });
        }
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|source| gone_or(pid, "read the page map of", source))?;
        let all = maps::read(pid)?;
        let layouts = ranges
            .iter()
            .map(|range| Layout::look_up(&all, pid, *range))
            .collect::<Result<_, _>>()?;
        process.check_alive()?;
        Ok(Self {
            process,
            pagemap,
            layouts,
        })
    }

    /// The process.
    #[must_use]
    pub const fn process(&self) -> &ProcessHandle {
        &self.process
    }

    /// The ranges, as given.
    pub fn ranges(&self) -> impl ExactSizeIterator<Item = MemoryRange> + '_ {
        self.layouts.iter().map(|layout| layout.range)
    }

    /// What range `index` is made of; `None` for an index that was not given.
    #[must_use]
    pub fn backing(&self, index: usize) -> Option<Backing> {
        self.layouts.get(index).map(|layout| layout.backing)
    }

    /// Reads `runs` of range `index`, one behind the other, into `buf`, which is exactly as long as they together.
    pub fn read(&self, index: usize, runs: &[MemoryRun], buf: &mut [u8]) -> Result<(), TrackError> {
        let pieces = self.pieces(index, runs, buf.len())?;
        let pid = self.process.pid();
        let mut done = 0;
        for batch in pieces.chunks(MAX_PIECES) {
            let mut batch = batch.to_vec();
            while !batch.is_empty() {
                let want = batch.iter().map(|piece| piece.len).sum::<usize>();
                let got = read_remote(pid, &batch, &mut buf[done..done + want]);
                done += self.progress(&mut batch, got, "read")?;
            }
        }
        // The pid meant our process during the calls if it is alive now: a pid is not reused before that.
        self.process.check_alive()
    }

    /// Writes `data`, which is exactly as long as `runs` of range `index` together.
    pub fn write(&self, index: usize, runs: &[MemoryRun], data: &[u8]) -> Result<(), TrackError> {
        self.write_vectored(index, runs, &[IoSlice::new(data)])
    }

    /// Writes the parts of `data`, one behind the other, which are exactly as long as `runs` of range `index` together.
    pub fn write_vectored(
        &self,
        index: usize,
        runs: &[MemoryRun],
        data: &[IoSlice<'_>],
    ) -> Result<(), TrackError> {
        let len = data.iter().map(|part| part.len()).sum();
        let pieces = self.pieces(index, runs, len)?;
        let pid = self.process.pid();
        let mut data = data.to_vec();
        let mut data = &mut data[..];
        for batch in pieces.chunks(MAX_PIECES) {
            let mut batch = batch.to_vec();
            while !batch.is_empty() {
                self.process.check_alive()?;
                let put = write_remote(pid, &batch, &data[..data.len().min(MAX_PIECES)]);
                let put = self.progress(&mut batch, put, "write")?;
                IoSlice::advance_slices(&mut data, put);
            }
        }
        self.process.check_alive()
    }

    /// Parts of `span` (bytes from the start of range `index`) that may read as anything but zero, ascending, cut to `span`.
    /// What is not in them read as zero at some moment during the call, and neither asking nor that answer touched it.
    ///
    /// With tracking: arm first, ask then. A page that is written after the answer is marked.
    pub fn populated(&self, index: usize, span: Range<u64>) -> Result<Vec<Range<u64>>, TrackError> {
        let layout = self.layout(index)?;
        let span = span.start..span.end.min(layout.range.len);
        if span.is_empty() {
            return Ok(Vec::new());
        }
        match layout.backing {
            Backing::Anonymous => self.populated_anonymous(layout, &span),
            Backing::Shared => layout.data_extents(&span).map_err(|source| {
                TrackError::from_os(
                    self.process.pid(),
                    "look for holes in the memory of",
                    source,
                )
            }),
            Backing::Opaque => Ok(vec![span]),
        }
    }

    fn populated_anonymous(
        &self,
        layout: &Layout,
        span: &Range<u64>,
    ) -> Result<Vec<Range<u64>>, TrackError> {
        let pages = span.start / PAGE_SIZE * PAGE_SIZE..span.end.next_multiple_of(PAGE_SIZE);
        let request = ScanRequest {
            // "Present or swapped, and not the kernel's page of zeroes."
            inverted: u64::from(PAGE_IS_PFNZERO),
            mask: u64::from(PAGE_IS_PFNZERO),
            anyof: u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED),
            wanted: u64::from(PAGE_IS_PRESENT),
            ..ScanRequest::default()
        };
        let mut found: Vec<Range<u64>> = Vec::new();
        self.scan(layout.range, &pages, &request, |part| {
            let part = part.start.max(span.start)..part.end.min(span.end);
            match found.last_mut() {
                Some(last) if last.end == part.start => last.end = part.end,
                _ if part.is_empty() => {}
                _ => found.push(part),
            }
        })?;
        Ok(found)
    }

    /// Runs one scan over `span` (page-aligned bytes of `range`) in as many calls as the answer needs.
    pub(crate) fn scan(
        &self,
        range: MemoryRange,
        span: &Range<u64>,
        request: &ScanRequest,
        mut found: impl FnMut(Range<u64>),
    ) -> Result<(), TrackError> {
        let mut slots = [NO_REGION; SCAN_SLOTS];
        let (mut at, end) = (range.start + span.start, range.start + span.end);
        while at < end {
            let request = ScanRequest {
                start: at,
                end,
                ..*request
            };
            let (filled, walked) = match pagemap_scan(self.pagemap.as_fd(), &request, &mut slots) {
                Ok(answer) => answer,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.scan_failed(source)),
            };
            for page_region { start, end, .. } in &slots[..filled] {
                found(start - range.start..end - range.start);
            }
            // The kernel may say "done" although the answer was full; it never walks backwards.
            at = if walked > at { walked } else { end };
        }
        Ok(())
    }

    fn scan_failed(&self, source: io::Error) -> TrackError {
        let pid = self.process.pid();
        match source.raw_os_error() {
            Some(libc::ENOTTY) => too_old(),
            Some(libc::ESRCH) => TrackError::Gone { pid },
            _ => match self.process.check_alive() {
                Ok(()) => TrackError::Os {
                    pid,
                    what: "the page map could not be scanned",
                    source,
                },
                Err(gone) => gone,
            },
        }
    }

    pub(crate) fn range(&self, index: usize) -> Result<MemoryRange, TrackError> {
        self.layout(index).map(|layout| layout.range)
    }

    fn layout(&self, index: usize) -> Result<&Layout, TrackError> {
        self.layouts
            .get(index)
            .ok_or_else(|| self.bad(MemoryRange { start: 0, len: 0 }, "there is no such range"))
    }

    fn bad(&self, range: MemoryRange, why: &str) -> TrackError {
        TrackError::BadRange {
            pid: self.process.pid(),
            start: range.start,
            len: range.len,
            why: why.to_owned(),
        }
    }

    /// Addresses of `runs`, checked against the range and the buffer's length.
    fn pieces(
        &self,
        index: usize,
        runs: &[MemoryRun],
        len: usize,
    ) -> Result<Vec<RemotePiece>, TrackError> {
        let range = self.layout(index)?.range;
        let mut total = 0usize;
        let mut pieces = Vec::with_capacity(runs.len());
        for run in runs.iter().filter(|run| run.len > 0) {
            let end = run.offset.checked_add(run.len as u64);
            if end.is_none_or(|end| end > range.len) {
                return Err(self.bad(range, "an access ends outside it"));
            }
            total = total.saturating_add(run.len);
            pieces.push(RemotePiece {
                addr: range.start + run.offset,
                len: run.len,
            });
        }
        if total != len {
            return Err(self.bad(range, "the buffer is not as long as the runs together"));
        }
        Ok(pieces)
    }

    /// Cuts what was transferred off the front of `batch`.
    fn progress(
        &self,
        batch: &mut Vec<RemotePiece>,
        moved: io::Result<usize>,
        what: &'static str,
    ) -> Result<usize, TrackError> {
        let pid = self.process.pid();
        let moved = match moved {
            Ok(0) => return Err(self.fault(batch, what)),
            Ok(moved) => moved,
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                return Err(self.fault(batch, what));
            }
            Err(source) => return Err(TrackError::from_os(pid, "access the memory of", source)),
        };
        let mut left = moved;
        let whole = batch
            .iter()
            .take_while(|piece| {
                let fits = piece.len <= left;
                if fits {
                    left -= piece.len;
                }
                fits
            })
            .count();
        batch.drain(..whole);
        if let Some(first) = batch.first_mut() {
            first.addr += left as u64;
            first.len -= left;
        }
        Ok(moved)
    }

    /// The kernel could not reach the first piece of `batch`: unmapped, protected, or the process is ending.
    fn fault(&self, batch: &[RemotePiece], what: &str) -> TrackError {
        if let Err(gone) = self.process.check_alive() {
            return gone;
        }
        let range = batch
            .first()
            .map_or(MemoryRange { start: 0, len: 0 }, |piece| MemoryRange {
                start: piece.addr,
                len: piece.len as u64,
            });
        self.bad(
            range,
            &format!("cannot {what} there: it is not mapped (any more) or protected"),
        )
    }
}

impl Layout {
    fn look_up(all: &[Vma], pid: u32, range: MemoryRange) -> Result<Self, TrackError> {
        if !range.start.is_multiple_of(PAGE_SIZE) {
            return Err(TrackError::BadRange {
                pid,
                start: range.start,
                len: range.len,
                why: "it does not begin at a page".to_owned(),
            });
        }
        let vmas = maps::covering(all, pid, &range)?;
        let files: Vec<Option<File>> = vmas.iter().map(|vma| open_backing(pid, vma)).collect();
        let unusable = |vma: &Vma| {
            let file = vmas.iter().zip(&files).find(|(other, _)| *other == vma);
            file.is_none_or(|(_, file)| file.as_ref().is_none_or(has_huge_pages))
        };
        let backing = maps::backing(&vmas, unusable);
        let end = range.start + range.len;
        let files = (vmas.iter().zip(files))
            .filter(|_| backing == Backing::Shared)
            .filter_map(|(vma, file)| {
                let from = vma.start.max(range.start);
                Some(FilePiece {
                    at: from - range.start..vma.end.min(end) - range.start,
                    file: file?,
                    file_offset: vma.offset + (from - vma.start),
                })
            })
            .collect();
        Ok(Self {
            range,
            backing,
            files,
        })
    }

    /// Parts of `span` that are not holes of the files under it.
    fn data_extents(&self, span: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for piece in &self.files {
            let part = span.start.max(piece.at.start)..span.end.min(piece.at.end);
            if part.is_empty() {
                continue;
            }
            let to_file = |at: u64| at - piece.at.start + piece.file_offset;
            let to_range = |at: u64| at - piece.file_offset + piece.at.start;
            let (mut at, end) = (to_file(part.start), to_file(part.end));
            while at < end {
                let data = match rustix::fs::seek(&piece.file, SeekFrom::Data(at)) {
                    Ok(data) if data < end => data,
                    Ok(_) | Err(Errno::NXIO) => break,
                    Err(errno) => return Err(errno.into()),
                };
                let hole = rustix::fs::seek(&piece.file, SeekFrom::Hole(data))?.min(end);
                found.push(to_range(data)..to_range(hole));
                // A hole punched between the two calls may make them meet; the block is then asked again from `data` on.
                at = hole.max(data + 1);
            }
        }
        Ok(found)
    }
}

/// Opens the file under a shared mapping, by the mapping itself or by one of the process's descriptors.
fn open_backing(pid: u32, vma: &Vma) -> Option<File> {
    if !vma.shared {
        return None;
    }
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let mut options = OpenOptions::new();
    options.read(true);
    options
        .open(link)
        .ok()
        .or_else(|| open_descriptor_of(pid, vma, &options))
}

/// One of the process's descriptors for the file of `vma` (map_files needs more privileges than this).
fn open_descriptor_of(pid: u32, vma: &Vma, options: &OpenOptions) -> Option<File> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .ok()?
        .filter_map(Result::ok)
        .find_map(|entry| {
            let found = std::fs::metadata(entry.path()).ok()?;
            let (major, minor) = (
                rustix::fs::major(found.dev()),
                rustix::fs::minor(found.dev()),
            );
            let same = found.ino() == vma.inode && format!("{major:02x}:{minor:02x}") == vma.device;
            same.then(|| options.open(entry.path()).ok()).flatten()
        })
}

/// Whether a file lies on hugetlbfs, whose holes cannot be asked for.
fn has_huge_pages(file: &File) -> bool {
    const HUGETLBFS_MAGIC: i64 = 0x958_458f6;
    rustix::fs::fstatfs(file).is_ok_and(|stat| stat.f_type == HUGETLBFS_MAGIC)
}

fn gone_or(pid: u32, what: &'static str, source: io::Error) -> TrackError {
    if source.kind() == io::ErrorKind::NotFound {
        TrackError::Gone { pid }
    } else {
        TrackError::from_os(pid, what, source)
    }
}

/// The error of a kernel that lacks what this crate needs.
pub(crate) fn too_old() -> TrackError {
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    TrackError::KernelTooOld { release }
}
