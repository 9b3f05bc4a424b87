//! How much work is due: turns a rate and a clock into a number of units.
//!
//! Owns no thread and no clock. Work that could not be done in time is dropped after [`LONGEST_DEBT`]: a guest that
//! was short of processor time does not catch up in a burst.

use std::time::{Duration, Instant};

/// How often workers look for due work.
pub(crate) const TICK: Duration = Duration::from_millis(5);
const LONGEST_DEBT: Duration = Duration::from_millis(100);
const NANOS: u128 = 1_000_000_000;

pub(crate) struct Pace {
    rate: u64,
    unit: u64,
    last: Instant,
    /// Bytes due, times a thousand million.
    owed: u128,
}

impl Pace {
    pub(crate) fn new(rate: u64, unit: usize) -> Self {
        Self {
            rate,
            unit: unit as u64,
            last: Instant::now(),
            owed: 0,
        }
    }

    pub(crate) const fn set_rate(&mut self, rate: u64) {
        self.rate = rate;
        self.owed = 0;
    }

    /// Units that became due since the last call.
    pub(crate) fn due(&mut self) -> u64 {
        let now = Instant::now();
        self.due_at(now)
    }

    fn due_at(&mut self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.last).min(LONGEST_DEBT);
        self.last = now;
        self.owed += u128::from(self.rate) * passed.as_nanos();
        let unit = u128::from(self.unit) * NANOS;
        let units = self.owed / unit;
        self.owed %= unit;
        u64::try_from(units).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_many_small_steps() {
        let mut pace = Pace::new(10_000_000, 4096);
        let begin = pace.last;
        let units: u64 = (1..=1000)
            .map(|i| pace.due_at(begin + Duration::from_millis(i)))
            .sum();
        assert_eq!(units, 10_000_000 / 4096);
    }

    #[test]
    fn a_long_sleep_is_not_caught_up() {
        let mut pace = Pace::new(1000 * 4096, 4096);
        let begin = pace.last;
        assert_eq!(pace.due_at(begin + Duration::from_secs(60)), 100);
    }

    #[test]
    fn rates_below_a_unit_per_step_still_get_there() {
        let mut pace = Pace::new(4096, 4096);
        let begin = pace.last;
        let units: u64 = (1..=3000)
            .map(|i| pace.due_at(begin + Duration::from_millis(i)))
            .sum();
        assert_eq!(units, 3);
    }
}
