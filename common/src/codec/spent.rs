//! What a piece of work takes of the thread that does it.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::compress::Spent;

/// The beginning of a piece of work.
pub(super) struct Started {
    at: Instant,
    cpu: Duration,
}

impl Started {
    pub(super) fn now() -> Self {
        Self {
            at: Instant::now(),
            cpu: of_this_thread(),
        }
    }

    /// What it took; asked by the thread that began.
    pub(super) fn spent(&self) -> Spent {
        Spent {
            elapsed: self.at.elapsed(),
            cpu: of_this_thread().saturating_sub(self.cpu),
        }
    }
}

fn of_this_thread() -> Duration {
    // A thread's time is not negative.
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}
