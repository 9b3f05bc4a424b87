//! The heartbeat: one numbered record after the other on the beat port, driven by the guest's own clock.
//!
//! Owns the beat thread. A beat that is late is followed by the next one a whole interval later: beats are never
//! bunched, so that the gap outside is the time in which the guest did not run.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use rustix::thread::{ClockId, clock_nanosleep_absolute};
use rustix::time::{Timespec, clock_gettime};
use vmferry_judge::beat::Beat;

use crate::report::Report;
use crate::setup;

/// Best nice value there is.
const FIRST: i32 = -20;
const NANOS: u64 = 1_000_000_000;

/// The running beat thread.
pub(crate) struct Beats {
    sent: Arc<AtomicU64>,
}

impl Beats {
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

pub(crate) fn start(port: File, boot: u64, interval: Duration, report: Arc<Report>) -> Beats {
    let sent = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&sent);
    let interval = u64::try_from(interval.as_nanos()).unwrap_or(NANOS);
    thread::spawn(move || {
        setup::be_nice(FIRST);
        if let Err(error) = beat(port, boot, interval, &count, &report) {
            report.corrupt(&format!("beats ended: {error}"));
        }
    });
    Beats { sent }
}

fn beat(
    mut port: File,
    boot: u64,
    interval: u64,
    sent: &AtomicU64,
    report: &Report,
) -> std::io::Result<()> {
    let mut due = now();
    for sequence in 0.. {
        let working = report.working();
        let guest_nanos = now();
        let beat = Beat {
            boot,
            sequence,
            guest_nanos,
        };
        // One write is one buffer of the port: the host gets it whole or not yet.
        port.write_all(&beat.encode())?;
        drop(working);
        sent.store(sequence + 1, Ordering::Relaxed);
        due = (due + interval).max(guest_nanos + interval / 2);
        sleep_until(due)?;
    }
    Ok(())
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap_or(0) * NANOS + u64::try_from(time.tv_nsec).unwrap_or(0)
}

fn sleep_until(nanos: u64) -> std::io::Result<()> {
    let until = Timespec {
        tv_sec: i64::try_from(nanos / NANOS).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanos % NANOS).unwrap_or(0),
    };
    loop {
        match clock_nanosleep_absolute(ClockId::Monotonic, &until) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
