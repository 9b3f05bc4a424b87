//! Memory that is touched before there is anything to write to it.
//!
//! A page that the system gives as it is first written costs more than the write: it is cleared, and on a virtual machine whose host gives
//! memory the same way it comes from there. Between the offer and the first frame the destination's cores have little else to do.
//! Owns the threads that do it. Invariants: only windows that are untouched are touched, with zeros, so that no content changes;
//! whoever has something else to do on their cores goes first; and whoever accesses the memory for the migration first waits until
//! every thread has ended.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmferry_memtrack::{MemoryRun, RemoteMemory, TrackError};
use vmferry_proto::geometry::{BLOCK_SIZE, WINDOW_SIZE};

/// Pages touched at once: whoever waits for the end waits for at most so many of each thread.
const PIECE: usize = 32;
/// What is written to each of them.
const ZEROS: [u8; PIECE] = [0; PIECE];
/// The threads' nice value: a tenth of the share of others. No less, so that they end soon where somebody waits for that.
const NICE: i32 = 10;

/// The threads that touch one process's memory, if any.
#[derive(Debug, Default)]
pub(crate) struct Touching {
    stop: AtomicBool,
    ended: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
    touched: AtomicU32,
}

impl Touching {
    /// Begins to touch `windows`, whole ones of ranges by their index, on all cores, until there is no more or [`end`](Self::end) is called.
    pub(crate) fn begin(
        self: &Arc<Self>,
        memory: &Arc<RemoteMemory>,
        windows: impl Iterator<Item = (usize, u32)>,
    ) {
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let windows: Arc<[_]> = windows.collect();
        let next = Arc::new(AtomicUsize::new(0));
        let mut threads = self.threads();
        for _ in 0..cores.min(windows.len()) {
            let (this, memory) = (Arc::clone(self), Arc::clone(memory));
            let (windows, next) = (Arc::clone(&windows), Arc::clone(&next));
            let work = move || this.touch_all(&memory, &windows, &next);
            match thread::Builder::new().name("touch".to_owned()).spawn(work) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::debug!(%error, "memory is touched by fewer threads"),
            }
        }
    }

    /// Returns when nothing is touched any more. It waits for at most one piece of each thread.
    pub(crate) fn end(&self) {
        if self.ended.load(Ordering::Acquire) {
            return;
        }
        self.stop.store(true, Ordering::Relaxed);
        // Held until all have ended: a second caller must not go on before that.
        let mut threads = self.threads();
        for thread in threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that touched memory panicked");
            }
        }
        let windows = self.touched.swap(0, Ordering::Relaxed);
        if windows > 0 {
            tracing::debug!(windows, "touched memory ahead of the data");
        }
        self.ended.store(true, Ordering::Release);
    }

    fn touch_all(&self, memory: &RemoteMemory, windows: &[(usize, u32)], next: &AtomicUsize) {
        // Refused to nobody.
        let _ = rustix::process::nice(NICE);
        while !self.is_over() {
            let Some((index, window)) = windows.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            match self.touch(memory, *index, *window) {
                Ok(false) => {}
                Ok(true) => {
                    self.touched.fetch_add(1, Ordering::Relaxed);
                }
                // Whoever writes there next says it to those who can do something about it.
                Err(error) => {
                    tracing::debug!(%error, "memory is not touched ahead");
                    return;
                }
            }
        }
    }

    /// Touches every page of a window, unless one of them was touched before. Returns whether it did.
    fn touch(&self, memory: &RemoteMemory, index: usize, window: u32) -> Result<bool, TrackError> {
        let start = u64::from(window) * u64::from(WINDOW_SIZE);
        let end = start + u64::from(WINDOW_SIZE);
        if !memory.populated(index, start..end)?.is_empty() {
            return Ok(false);
        }
        let pages = (start..end).step_by(BLOCK_SIZE as usize);
        let runs: Vec<MemoryRun> = pages.map(|offset| MemoryRun { offset, len: 1 }).collect();
        for piece in runs.chunks(PIECE) {
            if self.is_over() {
                break;
            }
            memory.write(index, piece, &ZEROS[..piece.len()])?;
        }
        Ok(true)
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
