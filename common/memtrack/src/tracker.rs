//! Tracking of written pages with a userfaultfd inside the target.
//!
//! Owns the descriptor's life (taken, registered, taken again by a later agent, closed) and the meaning of a scan. The descriptor
//! stays open inside the target, so registration and marks outlive this process; [`Tracker::target_fd`] is its number there,
//! for the journal. Dropping a tracker ends nothing.
//!
//! How a scan keeps its promise, per kind of memory:
//! - anonymous: one walk reports and re-arms pages that are there and written; never-touched pages are not armed, and show as
//!   written once they appear. A discard (balloon, MADV_DONTNEED) makes a page vanish without a mark, so a second walk
//!   lists what is there, and a page that was told as data and is gone is reported as dirty and zero.
//! - shared: pages that are not mapped are reported and armed with markers too, since one may have been written, then
//!   unmapped. Holes of the file, asked *after* the re-arm, are zero; data that became a hole is dirty and zero.
//! - anything else: as shared, with nothing known to be zero.
//!
//! The one gap: a page of *shared* memory that was discarded (hole punched) and then only read again between two scans is
//! neither a hole nor marked; it reads as zero here and is old in the copy. Only a comparison of the content finds it.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use linux_raw_sys::general::{
    PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING,
};

use crate::error::TrackError;
use crate::inject::{Call, inject};
use crate::maps::Backing;
use crate::pages::PageSet;
use crate::process::{USERFAULTFD_LINK, descriptor_link, userfaultfds_of};
use crate::remote::{MemoryRange, RemoteMemory, too_old};
use crate::sys::{
    ScanRequest, UFFD_FLAGS, own_userfaultfd, same_open_file, uffd_enable, uffd_register,
    uffd_unregister,
};

/// Longest piece of one scan call: 64 MiB is under 1 ms even when every page is armed for the first time.
const MAX_PIECE: u64 = 64 << 20;
/// Shortest: one page table's worth.
const MIN_PIECE: u64 = 2 << 20;
/// A call that held the target's page tables longer than this makes the next pieces shorter.
const HOLD_GOAL: Duration = Duration::from_millis(1);

/// Written pages of another process, by range.
#[derive(Debug)]
pub struct Tracker {
    memory: Arc<RemoteMemory>,
    uffd: OwnedFd,
    target_fd: i32,
    ranges: Vec<RangeState>,
    piece: u64,
    stopped: Duration,
}

/// What the caller was last told of a range.
#[derive(Debug)]
struct RangeState {
    /// No scan was answered yet: everything counts as written.
    untold: bool,
    /// Pages that the caller holds as possibly not zero.
    told_data: PageSet,
}

impl RangeState {
    /// Makes the answer of the raw one for the pages in `words`: `scan.written` is what is marked, `data` what is not zero.
    fn settle(&mut self, scan: &mut Scan, data: &PageSet, words: Range<usize>) {
        for at in words {
            let all = scan.written.inside(at);
            let told = &mut self.told_data.words_mut()[at];
            let zero = all & !data.words()[at];
            let vanished = *told & zero;
            let written = &mut scan.written.words_mut()[at];
            *written = if self.untold {
                all
            } else {
                *written & !zero | vanished
            };
            *told = (*told | *written) & !zero;
            scan.zero.words_mut()[at] = zero & *written;
        }
    }
}

/// The answer to [`Tracker::take_written`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scan {
    /// Pages written (or discarded) since the last scan, now armed again. The first time: every page.
    pub written: PageSet,
    /// Those of them that read as zero at some moment after they were armed.
    pub zero: PageSet,
    /// Longest single kernel call, for which the target's page faults may have waited.
    pub longest_hold: Duration,
}

/// Is told of each piece of a scan, so that a process which dies in the middle of one loses no mark: the kernel forgets marks in
/// the moment in which it reports them.
pub trait ScanLog {
    /// The marks of `span`, whole pages from the start of the range, are about to be taken.
    fn before(&self, span: &Range<u64>);
    /// They were: pages to report, and pages that the caller holds as possibly not zero from now on, each as the words of a
    /// [`PageSet`] that belong to `span`. Pages of `before` that no `after` followed count as written.
    fn after(&self, span: &Range<u64>, written: &[u64], told: &[u64]);
}

/// A scan whose result dies with the process.
struct Unlogged;

impl ScanLog for Unlogged {
    fn before(&self, _: &Range<u64>) {}
    fn after(&self, _: &Range<u64>, _: &[u64], _: &[u64]) {}
}

impl Tracker {
    /// Takes a userfaultfd out of the process and registers all ranges of `memory` with it. From here on no write
    /// is missed. On an error nothing is left behind in the process.
    pub fn attach(memory: Arc<RemoteMemory>) -> Result<Self, TrackError> {
        check_kernel()?;
        let process = memory.process();
        let made = inject(process, &USERFAULTFD)?;
        let target_fd = i32::try_from(made.value).unwrap_or(-1);
        tracing::debug!(
            pid = process.pid(),
            target_fd,
            stopped_us = made.stopped.as_micros(),
            "took a userfaultfd"
        );
        let registered = Self::register(&memory, target_fd);
        match registered {
            Ok(uffd) => Ok(Self::new(memory, uffd, target_fd, made.stopped)),
            Err(error) => {
                // Closing the target's copy, then ours, drops whatever was registered.
                if let Err(left) = inject(process, &close_call(target_fd)) {
                    tracing::warn!(pid = process.pid(), target_fd, %left, "a userfaultfd is left open in the process");
                }
                Err(error)
            }
        }
    }

    /// Takes the descriptor `target_fd` that an earlier tracker left open inside the process. Marks are as they were; what the
    /// earlier one knew of data and zero pages is not, so a page that is not there is reported once more.
    pub fn reattach(memory: Arc<RemoteMemory>, target_fd: i32) -> Result<Self, TrackError> {
        let pid = memory.process().pid();
        match descriptor_link(pid, target_fd) {
            Some(link) if link == USERFAULTFD_LINK => {}
            other => {
                memory.process().check_alive()?;
                return Err(TrackError::DescriptorLost {
                    pid,
                    fd: target_fd,
                    found: other.unwrap_or_else(|| "closed".to_owned()),
                });
            }
        }
        let uffd = memory.process().take_descriptor(target_fd)?;
        let mut tracker = Self::new(memory, uffd, target_fd, Duration::ZERO);
        for (state, range) in tracker.ranges.iter_mut().zip(tracker.memory.ranges()) {
            state.untold = false;
            state.told_data = PageSet::full(range.len);
        }
        Ok(tracker)
    }

    fn new(memory: Arc<RemoteMemory>, uffd: OwnedFd, target_fd: i32, stopped: Duration) -> Self {
        let ranges = memory
            .ranges()
            .map(|range| RangeState {
                untold: true,
                told_data: PageSet::empty(range.len),
            })
            .collect();
        Self {
            memory,
            uffd,
            target_fd,
            ranges,
            piece: MAX_PIECE / 4,
            stopped,
        }
    }

    fn register(memory: &RemoteMemory, target_fd: i32) -> Result<OwnedFd, TrackError> {
        let process = memory.process();
        let uffd = process.take_descriptor(target_fd)?;
        uffd_enable(uffd.as_fd()).map_err(|_| too_old())?;
        for range in memory.ranges() {
            let len = range.len.next_multiple_of(crate::PAGE_SIZE);
            uffd_register(uffd.as_fd(), range.start, len)
                .map_err(|source| register_failed(memory, range, target_fd, source))?;
        }
        Ok(uffd)
    }

    /// Number of the descriptor inside the target, for [`reattach`](Self::reattach).
    #[must_use]
    pub const fn target_fd(&self) -> i32 {
        self.target_fd
    }

    /// How long the attach held the target's main thread; other threads ran on.
    #[must_use]
    pub const fn stopped(&self) -> Duration {
        self.stopped
    }

    /// The memory that is tracked.
    #[must_use]
    pub const fn memory(&self) -> &Arc<RemoteMemory> {
        &self.memory
    }

    /// Says what an earlier tracker's caller held of range `index` as possibly not zero, so that the rest is not reported
    /// again.
    pub fn recall(&mut self, index: usize, told: PageSet) {
        if let Some(state) = self.ranges.get_mut(index) {
            state.told_data = told;
        }
    }

    /// [`take_written_to`](Self::take_written_to), with a result that dies with this process.
    pub fn take_written(&mut self, index: usize) -> Result<Scan, TrackError> {
        self.take_written_to(index, &Unlogged)
    }

    /// Reads and re-arms the marks of range `index`, atomically for each page, in pieces that hold the target for about
    /// a millisecond at most; each piece is told to `log`. On an error marks may have been taken: the range counts as wholly
    /// written then.
    pub fn take_written_to(&mut self, index: usize, log: &dyn ScanLog) -> Result<Scan, TrackError> {
        let range = self.memory.range(index)?;
        let answer = self.scan_range(range, index, log);
        if let Some(state) = self.ranges.get_mut(index) {
            state.untold = answer.is_err();
        }
        answer
    }

    fn scan_range(
        &mut self,
        range: MemoryRange,
        index: usize,
        log: &dyn ScanLog,
    ) -> Result<Scan, TrackError> {
        let mut scan = Scan {
            written: PageSet::empty(range.len),
            zero: PageSet::empty(range.len),
            longest_hold: Duration::ZERO,
        };
        let end = range.len.next_multiple_of(crate::PAGE_SIZE);
        let backing = self.memory.backing(index).unwrap_or(Backing::Opaque);
        let request = arm_request(backing);
        let mut at = 0;
        let mut data = PageSet::empty(range.len);
        while at < end {
            let span = at..end.min(at + self.piece);
            log.before(&span);
            let began = Instant::now();
            self.memory.scan(range, &span, &request, |part| {
                scan.written.insert_bytes(part);
            })?;
            let held = began.elapsed();
            for part in self.memory.populated(index, span.clone())? {
                data.insert_bytes(part);
            }
            scan.longest_hold = scan.longest_hold.max(held);
            if let Some(state) = self.ranges.get_mut(index) {
                let words = PageSet::words_of(&span);
                state.settle(&mut scan, &data, words.clone());
                let told = &state.told_data.words()[words.clone()];
                log.after(&span, &scan.written.words()[words], told);
            }
            self.adapt(held, &span);
            at = span.end;
        }
        Ok(scan)
    }

    /// Keeps a call near the goal: half the piece when it took longer, double when it took far less.
    fn adapt(&mut self, held: Duration, span: &Range<u64>) {
        if held > HOLD_GOAL {
            self.piece = (self.piece / 2).max(MIN_PIECE);
        } else if held < HOLD_GOAL / 4 && span.end - span.start == self.piece {
            self.piece = (self.piece * 2).min(MAX_PIECE);
        }
    }

    /// Ends the tracking: protection and marks are gone, and the descriptor inside the process is closed.
    pub fn detach(self) -> Result<(), TrackError> {
        let process = self.memory.process();
        let pid = process.pid();
        if !process.is_alive() {
            return Ok(());
        }
        for range in self.memory.ranges() {
            let len = range.len.next_multiple_of(crate::PAGE_SIZE);
            if let Err(error) = uffd_unregister(self.uffd.as_fd(), range.start, len) {
                // The range may have been unmapped meanwhile; closing the descriptor drops what is left.
                tracing::debug!(pid, start = range.start, %error, "a range was not unregistered by itself");
            }
        }
        let ours = descriptor_link(pid, self.target_fd)
            .is_some_and(|link| link == USERFAULTFD_LINK)
            && same_open_file(&self.uffd, pid, self.target_fd) != Some(false);
        if !ours {
            tracing::warn!(
                pid,
                fd = self.target_fd,
                "the process closed the tracking descriptor by itself"
            );
            return Ok(());
        }
        match inject(process, &close_call(self.target_fd)) {
            Ok(_) | Err(TrackError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

const USERFAULTFD: Call = Call {
    name: "userfaultfd",
    number: libc::SYS_userfaultfd,
    args: [UFFD_FLAGS.cast_unsigned() as u64, 0, 0],
};

const fn close_call(fd: i32) -> Call {
    Call {
        name: "close",
        number: libc::SYS_close,
        args: [fd.cast_unsigned() as u64, 0, 0],
    }
}

/// Which pages a scan reports and arms; the module's text says why it differs.
const fn arm_request(backing: Backing) -> ScanRequest {
    let anyof = match backing {
        // Pages that are not there count as written for the kernel: without this they would get a marker each.
        Backing::Anonymous => PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        Backing::Shared | Backing::Opaque => 0,
    };
    ScanRequest {
        flags: (PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC) as u64,
        start: 0,
        end: 0,
        inverted: 0,
        mask: PAGE_IS_WRITTEN as u64,
        anyof: anyof as u64,
        wanted: PAGE_IS_WRITTEN as u64,
    }
}

/// Tries on this process what will be done to the target, before the target is touched.
fn check_kernel() -> Result<(), TrackError> {
    let uffd = own_userfaultfd().map_err(|source| match source.raw_os_error() {
        Some(libc::ENOSYS | libc::EINVAL) => too_old(),
        _ => TrackError::from_os(std::process::id(), "make a userfaultfd in", source),
    })?;
    uffd_enable(uffd.as_fd()).map_err(|_| too_old())
}

fn register_failed(
    memory: &RemoteMemory,
    range: MemoryRange,
    target_fd: i32,
    source: std::io::Error,
) -> TrackError {
    let pid = memory.process().pid();
    let MemoryRange { start, len } = range;
    match source.raw_os_error() {
        Some(libc::EBUSY) => TrackError::RangeTaken {
            pid,
            start,
            len,
            descriptors: others(pid, target_fd),
        },
        Some(libc::EINVAL) => TrackError::BadRange {
            pid,
            start,
            len,
            why: "the kernel cannot write-protect this mapping (not whole pages, or a kind of memory without support)".to_owned(),
        },
        Some(libc::ENOMEM | libc::ESRCH) if !memory.process().is_alive() => TrackError::Gone { pid },
        _ => TrackError::from_os(pid, "register memory of", source),
    }
}

/// The target's userfaultfds but ours, for a message.
fn others(pid: u32, ours: i32) -> String {
    let list: Vec<String> = userfaultfds_of(pid)
        .into_iter()
        .filter(|fd| *fd != ours)
        .map(|fd| fd.to_string())
        .collect();
    if list.is_empty() {
        "none: it was handed out of the process".to_owned()
    } else {
        list.join(", ")
    }
}
