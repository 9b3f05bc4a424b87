//! Everything that is drawn in a run, from its seed alone.
//!
//! Owns one small generator (SplitMix64); each part of the simulation has one of its own, so that one more draw here does
//! not change what is drawn there.

use std::time::Duration;

/// A stream of draws.
#[derive(Debug, Clone)]
pub(super) struct Dice(u64);

impl Dice {
    /// The stream `part` of `seed`.
    #[must_use]
    pub(super) const fn new(seed: u64, part: u64) -> Self {
        Self(mix(seed ^ mix(part)))
    }

    /// 64 random bits.
    pub(super) const fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`, which is not zero.
    pub(super) const fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }

    /// From `low` to `high`, both included.
    pub(super) const fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// From `low` to `high`, small ones as likely as large ones: by order of magnitude.
    pub(super) const fn spread(&mut self, low: u64, high: u64) -> u64 {
        let octaves = (high / if low == 0 { 1 } else { low }).ilog2() as u64 + 1;
        let top = (low << self.between(1, octaves)).saturating_add(1);
        let top = if top > high { high } else { top };
        self.between(low, if top < low { low } else { top })
    }

    /// True in `per_mille` of 1,000 cases.
    pub(super) const fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// One of `all`.
    ///
    /// # Panics
    /// `all` is empty.
    pub(super) fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        let at = self.below(all.len() as u64);
        all[usize::try_from(at).unwrap_or_default()]
    }

    /// [`spread`](Self::spread), in milliseconds.
    pub(super) const fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.spread(low, high))
    }
}

/// The finaliser of SplitMix64: every bit of the result depends on every bit of `value`.
#[must_use]
pub(super) const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
