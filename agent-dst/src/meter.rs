//! Bytes received and their rate over the last seconds, for `status`.
//!
//! Owns a count and a few samples of it. Lanes only add; whoever asks takes the sample, so nothing ticks while nobody
//! looks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Samples further apart than this say nothing about now.
const SPAN: Duration = Duration::from_secs(5);
/// Samples are no closer than this, so that their number is bounded.
const STEP: Duration = Duration::from_millis(250);

/// Counts bytes.
#[derive(Debug)]
pub(crate) struct Meter {
    bytes: AtomicU64,
    samples: Mutex<VecDeque<(Instant, u64)>>,
}

impl Meter {
    /// Nothing counted, beginning now.
    pub(crate) fn new() -> Self {
        Self {
            bytes: AtomicU64::new(0),
            samples: Mutex::new(VecDeque::from([(Instant::now(), 0)])),
        }
    }

    /// Counts `bytes` more.
    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// All bytes so far.
    pub(crate) fn total(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Remembers the count at `now`, if the last sample is old enough.
    pub(crate) fn sample(&self, now: Instant) {
        let total = self.total();
        let mut samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        if samples
            .back()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) < STEP)
        {
            return;
        }
        samples.push_back((now, total));
        while samples.len() > 2
            && samples
                .get(1)
                .is_some_and(|(at, _)| now.saturating_duration_since(*at) >= SPAN)
        {
            samples.pop_front();
        }
    }

    /// Bytes a second over the samples that are left; 0 where there is no time between them.
    pub(crate) fn rate(&self, now: Instant) -> u64 {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((at, before)) = samples.front() else {
            return 0;
        };
        let micros = now.saturating_duration_since(*at).as_micros();
        let bytes = u128::from(self.total().saturating_sub(*before));
        let rate = (bytes * 1_000_000).checked_div(micros).unwrap_or(0);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let meter = Meter::new();
        let start = Instant::now();
        meter.add(1_000_000);
        for second in 1..=10 {
            meter.sample(start + Duration::from_secs(second));
        }
        assert_eq!(
            meter.rate(start + Duration::from_secs(11)),
            0,
            "all bytes are long past"
        );
        meter.add(6_000_000);
        let rate = meter.rate(start + Duration::from_secs(11));
        assert!((900_000..=1_300_000).contains(&rate), "{rate}");
        assert_eq!(meter.total(), 7_000_000);
    }
}
