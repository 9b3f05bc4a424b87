//! What the model remembers: the bottleneck's rate and the path's shortest round trip.
//!
//! Both are windowed extremes. Neither looks at a clock: the rate ages by rounds that count, the round trip by the
//! time that such rounds took, so that an idle connection forgets nothing.

use std::collections::VecDeque;
use std::time::Duration;

use crate::units::Rate;

/// Rounds that a rate sample is remembered: one probe cycle and a reserve, so that the sample of the last probe is
/// still there when the next one is judged.
pub(super) const RATE_ROUNDS: usize = 10;
/// The same while a queue stands that is not the model's doing: the path may have become slower.
pub(super) const RATE_ROUNDS_QUEUED: usize = 3;
/// Age from which the shortest round trip is measured anew: routes change, but rarely.
pub(super) const RTT_AGE: Duration = Duration::from_secs(10);
/// A sample this near to the shortest round trip, as a part of it, confirms it.
const RTT_CONFIRM_PART: u32 = 32;

/// The rate at which `bytes` were carried in `span`.
pub(super) fn rate_of(bytes: u64, span: Duration) -> Rate {
    let nanos = span.as_nanos().max(1);
    Rate(u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX))
}

/// What `rate` carries in `span`.
pub(super) fn carried(rate: Rate, span: Duration) -> u64 {
    u64::try_from(u128::from(rate.0) * span.as_nanos() / 1_000_000_000).unwrap_or(u64::MAX)
}

/// How long `rate` takes for `bytes`.
pub(super) fn time_of(bytes: u64, rate: Rate) -> Duration {
    Duration::from_nanos(bytes.saturating_mul(1_000_000_000) / rate.0.max(1))
}

/// `percent` of `value`.
pub(super) const fn percent(value: u64, percent: u64) -> u64 {
    value.saturating_mul(percent) / 100
}

/// Highest rate of the last rounds that count.
#[derive(Debug, Clone, Default)]
pub(super) struct RateFilter {
    samples: VecDeque<Rate>,
}

impl RateFilter {
    pub(super) fn get(&self) -> Rate {
        self.samples.iter().copied().max().unwrap_or_default()
    }

    /// A round in which the path, not the sender, was the limit.
    pub(super) fn push(&mut self, sample: Rate, keep: usize) {
        self.samples.push_back(sample);
        while self.samples.len() > keep {
            self.samples.pop_front();
        }
    }

    /// A round in which the sender had too little to send: it can only show that the path carries more.
    pub(super) fn push_limited(&mut self, sample: Rate) {
        if sample > self.get() {
            self.push(sample, RATE_ROUNDS);
        }
    }

    /// Forgets all but this.
    pub(super) fn reset(&mut self, to: Rate) {
        self.samples.clear();
        self.samples.push_back(to);
    }
}

/// Shortest round trip of the last [`RTT_AGE`].
#[derive(Debug, Clone, Default)]
pub(super) struct RttFilter {
    min: Option<Duration>,
    age: Duration,
}

impl RttFilter {
    pub(super) const fn get(&self) -> Option<Duration> {
        self.min
    }

    pub(super) fn push(&mut self, sample: Duration) {
        match self.min {
            Some(min) if sample > min + min / RTT_CONFIRM_PART => {}
            Some(min) => {
                self.min = Some(min.min(sample));
                self.age = Duration::ZERO;
            }
            None => self.min = Some(sample),
        }
    }

    /// Time passed in which the path was in full use.
    pub(super) fn grow_older(&mut self, by: Duration) {
        self.age += by;
    }

    pub(super) fn is_old(&self) -> bool {
        self.age >= RTT_AGE
    }

    /// The queue could not be let run empty: what is known stays, until the next try.
    pub(super) const fn keep(&mut self) {
        self.age = Duration::ZERO;
    }

    /// The queue was let run empty, and this is what was measured.
    pub(super) const fn renew(&mut self, measured: Duration) {
        self.min = Some(measured);
        self.age = Duration::ZERO;
    }
}
