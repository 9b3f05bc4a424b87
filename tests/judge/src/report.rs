//! What the judge says: statistics and mismatches on the console, mismatches and readiness on the control port too.
//!
//! Owns the counters and the two outputs. Details of the first [`DETAILED`] mismatches are printed, all are counted.

use std::fmt::Display;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vmferry_judge::params::ParamError;

/// Mismatches printed in detail; the console is slow, and the first ones tell the story.
const DETAILED: u64 = 24;

/// Why the judge cannot do its work.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failure(String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn of(what: impl Display, error: impl Display) -> Self {
        Self(format!("{what}: {error}"))
    }
}

impl From<ParamError> for Failure {
    fn from(error: ParamError) -> Self {
        Self(error.to_string())
    }
}

/// Counters of one worker.
struct Counters {
    name: String,
    passes: u64,
    written: u64,
}

pub(crate) struct Report {
    control: Mutex<File>,
    corrupt: AtomicU64,
    ending: AtomicBool,
    work: RwLock<()>,
    workers: Mutex<Vec<Counters>>,
}

impl Report {
    pub(crate) fn new(control: &File) -> Result<Self, Failure> {
        let control = control
            .try_clone()
            .map_err(|e| Failure::of("control port", e))?;
        Ok(Self {
            control: Mutex::new(control),
            corrupt: AtomicU64::new(0),
            ending: AtomicBool::new(false),
            work: RwLock::new(()),
            workers: Mutex::new(Vec::new()),
        })
    }

    /// Everything is filled and the work begins.
    pub(crate) fn ready(&self, boot: u64) {
        println!("judge: ready, boot {boot:016x}");
        self.tell(&format!("ready {boot:016x}"));
    }

    /// Held during each piece of work that uses a device.
    pub(crate) fn working(&self) -> RwLockReadGuard<'_, ()> {
        self.work.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the work in progress and lets no other begin while this is held: the kernel takes the devices away
    /// under a running program, and their errors would look like faults.
    pub(crate) fn stop_work(&self) -> RwLockWriteGuard<'_, ()> {
        self.ending.store(true, Ordering::Relaxed);
        self.work.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something is not as it must be.
    pub(crate) fn corrupt(&self, text: &str) {
        if self.corrupt.fetch_add(1, Ordering::Relaxed) < DETAILED {
            println!("judge: CORRUPT: {text}");
            self.tell(&format!("CORRUPT {text}"));
        }
    }

    /// Adds to the statistics of worker `name`.
    pub(crate) fn count(&self, name: &str, passes: u64, written: u64) {
        let mut workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        match workers.iter_mut().find(|worker| worker.name == name) {
            Some(worker) => {
                worker.passes += passes;
                worker.written += written;
            }
            None => workers.push(Counters {
                name: name.into(),
                passes,
                written,
            }),
        }
    }

    pub(crate) fn statistics(&self, beats: u64) {
        let corrupt = self.corrupt.load(Ordering::Relaxed);
        let verdict = if corrupt == 0 { "ok" } else { "CORRUPT" };
        let mut line = format!("judge: {verdict}, {corrupt} mismatches, {beats} beats");
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for Counters {
            name,
            passes,
            written,
        } in workers.iter()
        {
            line += &format!("; {name} pass {passes}, wrote {} KiB", written >> 10);
        }
        println!("{line}");
    }

    /// A line to the control port.
    pub(crate) fn tell(&self, line: &str) {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = control.write_all(format!("{line}\n").as_bytes())
            && !self.ending.load(Ordering::Relaxed)
        {
            println!("judge: FAILED: control port: {error}");
        }
    }
}
