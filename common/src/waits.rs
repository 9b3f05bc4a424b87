//! For how long senders wait for the link, all of them together.
//!
//! Owns the sum. Invariant: who still waits is in it up to now, since on a slow link one wait is longer than the time between two
//! looks at the sum.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The sum of all waits.
#[derive(Debug)]
pub struct LinkWaits(Mutex<Sum>);

#[derive(Debug)]
struct Sum {
    waiting: u32,
    /// All waits up to then.
    total: Duration,
    then: Instant,
}

/// A sender waits, until this is dropped.
#[derive(Debug)]
pub struct Waiting<'a>(&'a LinkWaits);

impl Default for LinkWaits {
    fn default() -> Self {
        Self(Mutex::new(Sum {
            waiting: 0,
            total: Duration::ZERO,
            then: Instant::now(),
        }))
    }
}

impl LinkWaits {
    /// A sender begins to wait.
    #[must_use]
    pub fn begin(&self) -> Waiting<'_> {
        self.up_to_now().waiting += 1;
        Waiting(self)
    }

    /// Time that was waited so far: two senders that wait for a second make two.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.up_to_now().total
    }

    fn up_to_now(&self) -> MutexGuard<'_, Sum> {
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let passed = now.saturating_duration_since(sum.then) * sum.waiting;
        sum.total += passed;
        sum.then = now;
        sum
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.up_to_now().waiting -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_still_waits_is_in_the_sum_and_who_waits_no_more_adds_nothing() {
        const WAIT: Duration = Duration::from_millis(5);
        let waits = LinkWaits::default();
        std::thread::sleep(WAIT);
        assert_eq!(waits.total(), Duration::ZERO);
        let both = (waits.begin(), waits.begin());
        std::thread::sleep(WAIT);
        assert!(waits.total() >= 2 * WAIT);
        drop(both);
        let total = waits.total();
        std::thread::sleep(WAIT);
        assert_eq!(waits.total(), total);
    }
}
