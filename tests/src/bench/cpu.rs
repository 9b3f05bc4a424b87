//! CPU time of processes, their emulated processors left out.
//!
//! Owns reading `/proc` while the processes live: a thread looks again and again, since what has ended can no longer be
//! asked. An emulated processor burns what it can get whether its guest moves or not, so its thread is not counted.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Time between two looks: what a process uses in its last moments is missed.
const LOOK: Duration = Duration::from_millis(5);
const GIB: f64 = 1_073_741_824.0;

/// A process to watch.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its id.
    pub pid: u32,
    /// Threads of it that do not count.
    pub without: Vec<u32>,
}

#[derive(Debug)]
struct Entry {
    process: Watched,
    before: Duration,
    now: Duration,
}

/// Adds up what some processes use.
#[derive(Debug, Default)]
pub struct CpuMeter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    entries: Mutex<Vec<Entry>>,
    over: AtomicBool,
}

impl CpuMeter {
    /// Watches nothing yet.
    #[must_use]
    pub fn start() -> Self {
        let shared = Arc::<Shared>::default();
        let looking = Arc::clone(&shared);
        let thread = thread::spawn(move || {
            while !looking.over.load(Ordering::Acquire) {
                looking.look();
                thread::sleep(LOOK);
            }
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// Counts from now on what `process` uses.
    pub fn watch(&self, process: Watched) {
        let before = process.used().unwrap_or_default();
        self.shared.lock().push(Entry {
            process,
            before,
            now: before,
        });
    }

    /// What all of them used so far.
    #[must_use]
    pub fn used(&self) -> Duration {
        self.shared.look();
        let entries = self.shared.lock();
        entries
            .iter()
            .map(|entry| entry.now.saturating_sub(entry.before))
            .sum()
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // It has nothing that could panic.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) {
        for entry in self.lock().iter_mut() {
            if let Some(used) = entry.process.used() {
                entry.now = entry.now.max(used);
            }
        }
    }
}

impl Watched {
    /// A process all of which counts.
    #[must_use]
    pub const fn whole(pid: u32) -> Self {
        Self {
            pid,
            without: Vec::new(),
        }
    }

    fn used(&self) -> Option<Duration> {
        let pid = self.pid;
        let all = time_in(&format!("/proc/{pid}/stat"))?;
        let mut aside = Duration::ZERO;
        for thread in &self.without {
            aside += time_in(&format!("/proc/{pid}/task/{thread}/stat"))?;
        }
        Some(all.saturating_sub(aside))
    }
}

/// CPU seconds per GiB of `bytes`.
#[allow(
    clippy::cast_precision_loss,
    reason = "a rate for people; 2^53 bytes are far above any run"
)]
#[must_use]
pub fn per_gib(cpu: Duration, bytes: u64) -> f64 {
    cpu.as_secs_f64() / (bytes as f64 / GIB)
}

/// User and system time in a `stat` file.
fn time_in(path: &str) -> Option<Duration> {
    parse(&fs::read_to_string(path).ok()?)
}

fn parse(stat: &str) -> Option<Duration> {
    // The name may hold anything; behind its bracket the fields count from the third.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).take(2);
    let mut next = || ticks.next()?.parse::<u64>().ok();
    let sum = next()? + next()?;
    let per_second = rustix::param::clock_ticks_per_second();
    Some(Duration::from_millis(sum * 1000 / per_second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_found_behind_any_name() {
        let stat = "7 (a (b) c) S 1 7 7 0 -1 4194304 100 0 0 0 150 50 0 0 20 0 1 0 9 9";
        let ticks = rustix::param::clock_ticks_per_second();
        assert_eq!(parse(stat), Some(Duration::from_millis(200_000 / ticks)));
    }

    #[test]
    fn own_work_is_counted_and_what_has_ended_keeps_its_last() {
        let meter = CpuMeter::start();
        meter.watch(Watched::whole(std::process::id()));
        meter.watch(Watched::whole(u32::MAX));
        let mut sum = 0_u64;
        while meter.used() < Duration::from_millis(50) {
            sum = (0..100_000).fold(sum, |sum, number| std::hint::black_box(sum ^ number));
        }
    }
}
