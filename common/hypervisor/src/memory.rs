//! Memory regions of a guest that lives in a process of this host: the part that all drivers share.
//!
//! Owns the way from `memtrack` (address ranges, page sets) to the engine's regions and blocks: readers, writers,
//! dirty marks and their settlement. A driver says which address range of which process is which region.
//! Does not own when marks are taken. Invariant: a mark that was taken is either settled as acknowledged or reported again,
//! also when the future that took it was dropped.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use vmferry_common::process::ProcessIdentity;
use vmferry_memtrack::{
    Backing, MemoryRange, MemoryRun, PageSet, ProcessHandle, RemoteMemory, ScanLog, TrackError,
    Tracker,
};
use vmferry_proto::geometry::{RegionBits, RegionLen, Run, WINDOW_SIZE};
use vmferry_proto::ids::RegionId;
use vmferry_proto::limits::MAX_POPULATED;
use vmferry_proto::message::PopulatedWindows;

use crate::error::GuestError;
use crate::guest::{RegionReader, RegionWriter, Settlement, Taken};
use crate::marks::{MarkLog, TrackingLeft};
use crate::touching::Touching;
use crate::watched;

/// Bytes of a region that are looked at for populated windows at once: some milliseconds of the kernel's time at most.
const LOOK_PIECE: usize = 1 << 30;
/// The time for which populated windows are looked for: longer than the other side takes to make ready nobody waits for a hint.
const LOOK_LIMIT: Duration = Duration::from_millis(50);
/// Runs farther apart than this are asked for their holes one by one.
const WIDEST_ASKED: u64 = 8 << 20;

/// A memory region and where it is in the guest's process. What kind of mapping it is, is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBlock {
    /// The region.
    pub region: RegionId,
    /// Address of its first byte in the process; a multiple of the page size.
    pub host_addr: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// How the tracking began, for the journal and the statistics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrackingStarted {
    /// Number of the descriptor that stays open inside the process: a later agent goes on with it.
    pub descriptor: i32,
    /// How long the process's main thread was held; virtual CPUs ran on.
    pub stopped: Duration,
}

/// The memory regions of one process.
#[derive(Debug)]
pub struct ProcessMemory {
    memory: Arc<RemoteMemory>,
    blocks: Vec<MemoryBlock>,
    marks: Arc<Mutex<Marks>>,
    log: Option<Arc<dyn MarkLog>>,
    touching: Arc<Touching>,
}

impl Drop for ProcessMemory {
    fn drop(&mut self) {
        self.touching.end();
    }
}

/// The tracker, and what was taken from it.
#[derive(Debug, Default)]
struct Marks {
    tracker: Option<Tracker>,
    /// Taken and not settled, or put back: reported by the next take.
    owed: BTreeMap<RegionId, RegionBits>,
}

impl ProcessMemory {
    /// Opens the memory of `process`. Nothing is done to it yet; a process that only has the same pid is refused.
    pub fn attach(process: &ProcessIdentity, blocks: Vec<MemoryBlock>) -> Result<Self, GuestError> {
        let handle = ProcessHandle::open(process.pid).map_err(tracking)?;
        // Compared after the pidfd is open: from here on the pid cannot come to mean another process.
        if watched::identify(process.pid)? != *process {
            return Err(GuestError::Gone(format!("process {}", process.pid)));
        }
        let ranges: Vec<MemoryRange> = blocks
            .iter()
            .map(|block| MemoryRange {
                start: block.host_addr,
                len: block.len,
            })
            .collect();
        let memory = RemoteMemory::open(handle, &ranges).map_err(tracking)?;
        Ok(Self {
            memory: Arc::new(memory),
            blocks,
            marks: Arc::default(),
            log: None,
            touching: Arc::default(),
        })
    }

    /// Windows of which every page was touched, ascending: at most [`MAX_POPULATED`] ranges, and no more than a moment's look finds.
    /// A hint, which asks nothing of the guest; where there is none the list ends.
    pub async fn populated_windows(&self) -> Vec<PopulatedWindows> {
        let memory = Arc::clone(&self.memory);
        let blocks = self.blocks.clone();
        let look = move || look_for_populated(&memory, &blocks);
        tokio::task::spawn_blocking(look).await.unwrap_or_default()
    }

    /// Touches `populated`, as far as it is untouched, until anybody reads or writes the memory.
    pub fn touch_ahead(&self, populated: &[PopulatedWindows]) {
        let found = populated.iter().filter_map(|populated| {
            let (index, _) = self.find(populated.region).ok()?;
            Some((index, populated.windows.clone()))
        });
        let windows = found.flat_map(|(index, windows)| windows.map(move |window| (index, window)));
        self.touching.begin(&self.memory, windows);
    }

    /// Begins to track writes to all regions: the first take reports everything.
    pub async fn start_tracking(&mut self) -> Result<TrackingStarted, GuestError> {
        let memory = Arc::clone(&self.memory);
        self.with_marks(move |marks| match &marks.tracker {
            Some(tracker) => Ok(TrackingStarted {
                descriptor: tracker.target_fd(),
                stopped: Duration::ZERO,
            }),
            None => {
                let tracker = Tracker::attach(memory)?;
                let started = TrackingStarted {
                    descriptor: tracker.target_fd(),
                    stopped: tracker.stopped(),
                };
                marks.tracker = Some(tracker);
                Ok(started)
            }
        })
        .await
    }

    /// Takes marks in the sight of `log` from here on.
    pub fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.log = Some(log);
    }

    /// What a later agent needs to go on with the tracking.
    #[must_use]
    pub fn tracking(&self) -> Option<TrackingLeft> {
        let marks = lock(&self.marks);
        Some(TrackingLeft {
            descriptor: marks.tracker.as_ref()?.target_fd(),
            memory: self.blocks.clone(),
        })
    }

    /// Goes on with the tracking that an earlier agent left under `descriptor`, with what the log says was told of it.
    pub async fn resume_tracking(&mut self, descriptor: i32) -> Result<(), GuestError> {
        let memory = Arc::clone(&self.memory);
        let (blocks, log) = (self.blocks.clone(), self.log.clone());
        self.with_marks(move |marks| {
            let mut tracker = Tracker::reattach(memory, descriptor)?;
            if let Some(log) = log {
                for (index, block) in blocks.iter().enumerate() {
                    let told = PageSet::of_words(block.len, log.told(block.region));
                    tracker.recall(index, told);
                }
            }
            marks.tracker = Some(tracker);
            Ok(())
        })
        .await
    }

    /// As [`resume_tracking`](Self::resume_tracking), if the regions are still where they were.
    pub async fn resume(&mut self, left: &TrackingLeft) -> Result<(), GuestError> {
        if left.memory != self.blocks {
            return Err(GuestError::Touched(
                "its memory is not where it was when the tracking began".to_owned(),
            ));
        }
        self.resume_tracking(left.descriptor).await
    }

    /// Ends the tracking and closes the descriptor inside the process. Idempotent.
    pub async fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.with_marks(|marks| {
            marks.owed.clear();
            marks.tracker.take().map_or(Ok(()), Tracker::detach)
        })
        .await
    }

    /// Takes and re-arms the marks of `region`, in pieces that hold the guest for about a millisecond at most.
    ///
    /// Blocks of an earlier take that was neither acknowledged nor put back are reported again.
    pub async fn take_dirty(&mut self, region: RegionId) -> Result<Taken, GuestError> {
        let (index, block) = self.find(region)?;
        let log = self.log.clone().map(|log| PieceLog { log, region });
        self.with_marks(move |marks| {
            let Some(tracker) = &mut marks.tracker else {
                return Ok(None);
            };
            let scan = match &log {
                Some(log) => tracker.take_written_to(index, log)?,
                None => tracker.take_written(index)?,
            };
            let len = RegionLen(block.len);
            let mut dirty = bits(&scan.written, len);
            if let Some(owed) = marks.owed.get(&region) {
                dirty.union(owed);
            }
            marks.owed.insert(region, dirty.clone());
            Ok(Some(Taken {
                dirty,
                zero: bits(&scan.zero, len),
                longest_hold: scan.longest_hold,
            }))
        })
        .await?
        .ok_or_else(|| GuestError::Refused {
            command: format!("dirty marks of region {region}"),
            answer: "memory tracking was not started".to_owned(),
        })
    }

    /// Says what became of the blocks of the last take of `region`.
    pub fn settle(&mut self, region: RegionId, outcome: Settlement) {
        match outcome {
            Settlement::Acknowledged => {
                lock(&self.marks).owed.remove(&region);
            }
            // They are owed already.
            Settlement::PutBack => {}
        }
    }

    /// Handle for reading `region`; `None` if it is not one of these.
    #[must_use]
    pub fn reader(&self, region: RegionId) -> Option<Arc<dyn RegionReader>> {
        Some(Arc::new(self.access(region)?))
    }

    /// Handle for writing `region`; `None` if it is not one of these.
    #[must_use]
    pub fn writer(&self, region: RegionId) -> Option<Arc<dyn RegionWriter>> {
        Some(Arc::new(self.access(region)?))
    }

    fn access(&self, region: RegionId) -> Option<MemoryAccess> {
        let (index, _) = self.find(region).ok()?;
        Some(MemoryAccess {
            memory: Arc::clone(&self.memory),
            index,
            touching: Arc::clone(&self.touching),
        })
    }

    fn find(&self, region: RegionId) -> Result<(usize, MemoryBlock), GuestError> {
        let found = self.blocks.iter().enumerate();
        found
            .map(|(index, block)| (index, *block))
            .find(|(_, block)| block.region == region)
            .ok_or_else(|| GuestError::Refused {
                command: format!("memory region {region}"),
                answer: "the guest has no such memory region".to_owned(),
            })
    }

    /// Runs `work` where it may block; it finishes even if this future is dropped, so no mark gets lost.
    async fn with_marks<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Marks) -> Result<T, TrackError> + Send + 'static,
    ) -> Result<T, GuestError> {
        let marks = Arc::clone(&self.marks);
        tokio::task::spawn_blocking(move || work(&mut lock(&marks)))
            .await
            .map_err(|error| GuestError::Tracking(Box::new(error)))?
            .map_err(tracking)
    }
}

/// The windows of `blocks` of which every page was touched.
fn look_for_populated(memory: &RemoteMemory, blocks: &[MemoryBlock]) -> Vec<PopulatedWindows> {
    let (begun, mut found) = (Instant::now(), Vec::new());
    for (index, block) in blocks.iter().enumerate() {
        if memory.backing(index) == Some(Backing::Opaque) {
            continue;
        }
        for start in (0..block.len).step_by(LOOK_PIECE) {
            let span = start..block.len.min(start + LOOK_PIECE as u64);
            let Ok(parts) = memory.populated(index, span) else {
                return found;
            };
            found.extend(
                parts
                    .iter()
                    .filter_map(|part| whole_windows(block.region, part)),
            );
            if found.len() >= MAX_POPULATED || begun.elapsed() > LOOK_LIMIT {
                found.truncate(MAX_POPULATED);
                return found;
            }
        }
    }
    found
}

/// The windows that lie in `part` as a whole.
fn whole_windows(region: RegionId, part: &Range<u64>) -> Option<PopulatedWindows> {
    let window = u64::from(WINDOW_SIZE);
    let first = u32::try_from(part.start.div_ceil(window)).ok()?;
    let end = u32::try_from(part.end / window).ok()?;
    let windows = first..end;
    (!windows.is_empty()).then_some(PopulatedWindows { region, windows })
}

/// Tells pieces of a range as windows of its region.
struct PieceLog {
    log: Arc<dyn MarkLog>,
    region: RegionId,
}

impl ScanLog for PieceLog {
    fn before(&self, span: &Range<u64>) {
        self.log.before(self.region, windows(span));
    }

    fn after(&self, span: &Range<u64>, written: &[u64], told: &[u64]) {
        self.log.after(self.region, windows(span), written, told);
    }
}

/// The windows that `span` touches: a piece begins with one.
fn windows(span: &Range<u64>) -> Range<u32> {
    let window = |at: u64| u32::try_from(at / u64::from(WINDOW_SIZE)).unwrap_or(u32::MAX);
    window(span.start)..window(span.end.next_multiple_of(u64::from(WINDOW_SIZE)))
}

/// A thread that panicked while it held the lock left at worst marks that are reported again.
fn lock(marks: &Mutex<Marks>) -> MutexGuard<'_, Marks> {
    marks.lock().unwrap_or_else(PoisonError::into_inner)
}

fn bits(pages: &PageSet, len: RegionLen) -> RegionBits {
    let mut bits = RegionBits::empty(len);
    for range in pages.ranges() {
        bits.insert_bytes(range.start, range.end - range.start);
    }
    bits
}

/// The end of the process is the guest's end; everything else is a failure of the tracking.
fn tracking(error: TrackError) -> GuestError {
    match error {
        TrackError::Gone { pid } => GuestError::Gone(format!("process {pid}")),
        other => GuestError::Tracking(Box::new(other)),
    }
}

/// Reads and writes one region.
#[derive(Debug)]
struct MemoryAccess {
    memory: Arc<RemoteMemory>,
    index: usize,
    touching: Arc<Touching>,
}

impl MemoryAccess {
    /// The memory, which nobody touches any more.
    fn memory(&self) -> &RemoteMemory {
        self.touching.end();
        &self.memory
    }

    /// The parts of `runs` that may hold anything but zero, ascending if the runs are, each with its place in a buffer
    /// that holds the runs one behind the other.
    fn populated(&self, runs: &[Run]) -> Result<Vec<(usize, MemoryRun)>, GuestError> {
        let start = runs.iter().map(|run| run.offset).min().unwrap_or(0);
        let end = runs.iter().map(run_end).max().unwrap_or(0);
        let ask = |span: Range<u64>| self.memory().populated(self.index, span).map_err(tracking);
        let together = if end - start <= WIDEST_ASKED {
            Some(ask(start..end)?)
        } else {
            None
        };
        let mut found = Vec::new();
        let mut at = 0;
        for run in runs {
            let alone;
            let parts = match &together {
                Some(parts) => parts,
                None => {
                    alone = ask(run.offset..run_end(run))?;
                    &alone
                }
            };
            cut(run, parts, at, &mut found);
            at += run.len as usize;
        }
        Ok(found)
    }
}

/// Adds what `run` (which stands at `at` in the buffer) shares with `parts` (ascending) to `found`.
fn cut(run: &Run, parts: &[Range<u64>], at: usize, found: &mut Vec<(usize, MemoryRun)>) {
    let first = parts.partition_point(|part| part.end <= run.offset);
    for part in &parts[first..] {
        let from = part.start.max(run.offset);
        let to = part.end.min(run_end(run));
        if from >= to {
            break;
        }
        let place = at + within_run(from - run.offset);
        let len = within_run(to - from);
        found.push((place, MemoryRun { offset: from, len }));
    }
}

/// A length within a run, which has 32 bits.
fn within_run(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

const fn run_end(run: &Run) -> u64 {
    run.offset.saturating_add(run.len as u64)
}

#[async_trait]
impl RegionReader for MemoryAccess {
    async fn read(&self, runs: &[Run], buf: &mut [u8]) -> Result<(), GuestError> {
        check_length(runs, buf.len())?;
        // A hole of a shared mapping would be allocated by reading it.
        let parts = self.populated(runs)?;
        let wanted: Vec<MemoryRun> = parts.iter().map(|(_, run)| *run).collect();
        let packed: usize = wanted.iter().map(|run| run.len).sum();
        self.memory()
            .read(self.index, &wanted, &mut buf[..packed])
            .map_err(tracking)?;
        spread(&parts, packed, buf);
        Ok(())
    }
}

/// Moves parts that stand packed at the front of `buf` to their places, the last first, and zeroes what lies between.
fn spread(parts: &[(usize, MemoryRun)], packed: usize, buf: &mut [u8]) {
    let mut source_end = packed;
    let mut filled_from = buf.len();
    for (place, run) in parts.iter().rev() {
        let source = source_end - run.len;
        let end = place + run.len;
        if source != *place {
            buf.copy_within(source..source_end, *place);
        }
        buf[end..filled_from].fill(0);
        source_end = source;
        filled_from = *place;
    }
    buf[..filled_from].fill(0);
}

#[async_trait]
impl RegionWriter for MemoryAccess {
    async fn write(&self, runs: &[Run], data: &[u8]) -> Result<(), GuestError> {
        self.write_vectored(runs, &[IoSlice::new(data)]).await
    }

    async fn write_vectored(&self, runs: &[Run], data: &[IoSlice<'_>]) -> Result<(), GuestError> {
        check_length(runs, data.iter().map(|part| part.len()).sum())?;
        let runs: Vec<MemoryRun> = runs
            .iter()
            .map(|run| MemoryRun {
                offset: run.offset,
                len: run.len as usize,
            })
            .collect();
        self.memory()
            .write_vectored(self.index, &runs, data)
            .map_err(tracking)
    }

    async fn zero(&self, runs: &[Run]) -> Result<(), GuestError> {
        const ZEROES: &[u8] = &[0; 64 << 10];
        // Asked anew each time: the hypervisor writes its memory too, and what was never touched is zero already.
        for (_, part) in self.populated(runs)? {
            for done in (0..part.len).step_by(ZEROES.len()) {
                let len = (part.len - done).min(ZEROES.len());
                let run = MemoryRun {
                    offset: part.offset + done as u64,
                    len,
                };
                self.memory()
                    .write(self.index, &[run], &ZEROES[..len])
                    .map_err(tracking)?;
            }
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), GuestError> {
        Ok(())
    }
}

fn check_length(runs: &[Run], len: usize) -> Result<(), GuestError> {
    let total: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
    if total == len as u64 {
        Ok(())
    } else {
        Err(GuestError::Refused {
            command: "memory access".to_owned(),
            answer: format!("{total} bytes named, {len} given"),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmferry_proto::geometry::Run;

    use super::{cut, spread};

    /// Runs and populated parts of a region of 64 bytes.
    fn places() -> impl Strategy<Value = (Vec<Run>, Vec<bool>)> {
        let run = (0u64..64, 0u32..20).prop_map(|(offset, len)| Run {
            offset,
            len: len.min(64 - u32::try_from(offset).unwrap()),
        });
        let populated = prop::collection::vec(any::<bool>(), 64);
        (prop::collection::vec(run, 0..6), populated)
    }

    proptest! {
        #[test]
        fn populated_parts_land_in_their_places_and_the_rest_is_zero((runs, populated) in places()) {
            let mut parts: Vec<std::ops::Range<u64>> = Vec::new();
            for at in (0u64..64).filter(|at| populated[usize::try_from(*at).unwrap()]) {
                match parts.last_mut() {
                    Some(part) if part.end == at => part.end += 1,
                    _ => parts.push(at..at + 1),
                }
            }
            let (mut found, mut expected) = (Vec::new(), Vec::new());
            for run in &runs {
                cut(run, &parts, expected.len(), &mut found);
                let bytes = run.offset..run.offset + u64::from(run.len);
                expected.extend(bytes.map(|at| {
                    let byte = u8::try_from(at).unwrap();
                    if populated[usize::from(byte)] { byte + 1 } else { 0 }
                }));
            }
            let mut buf = vec![0xff; expected.len()];
            let mut packed = 0;
            for (_, run) in &found {
                for at in run.offset..run.offset + run.len as u64 {
                    buf[packed] = u8::try_from(at + 1).unwrap();
                    packed += 1;
                }
            }
            spread(&found, packed, &mut buf);
            prop_assert_eq!(buf, expected);
        }
    }
}
