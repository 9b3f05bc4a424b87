//! How long the guest would stand still: rates, the costs that do not depend on what is left, and their sum.
//!
//! Owns the formula of the predicted downtime and the priors of costs that have not been measured yet. Every
//! sum saturates and a rate of zero makes an endless time: nothing here can panic.

use std::fmt;
use std::time::Duration;

use vmferry_common::units::{Rate, Span};

use super::RoundStats;

/// Data that a rate must rest on: less than this measures round trips and scans, not the link.
const SAMPLE_BYTES: u64 = 32 << 20;
/// Data in one flight from which its own rate counts.
const FLIGHT_BYTES: u64 = 4 << 20;
/// Assumed of a link over which next to no data went yet (a guest that is all zero): 100 Mbit/s.
const PRIOR_GOODPUT: Rate = Rate(12_500_000);
/// Less data than this says nothing of the link.
const MIN_DATA: u64 = 1 << 20;

/// How many bytes move in `time` at `rate`.
pub(super) fn bytes_in(rate: Rate, time: Duration) -> u64 {
    let bytes = u128::from(rate.0).saturating_mul(time.as_nanos()) / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Bytes that are left to send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Left {
    /// Of RAM blocks.
    pub memory: u64,
    /// Of disks.
    pub disk: u64,
}

impl Left {
    /// Of both.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.memory.saturating_add(self.disk)
    }
}

/// Data that was sent and acknowledged in one go, such as the end of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flight {
    /// Bytes of guest content that were not zero.
    pub bytes: u64,
    /// From the first of them sent to the last acknowledged as applied.
    pub elapsed: Duration,
}

/// Guest content per second, before compression, that the whole path carries: read, compress, send, apply.
///
/// Counted are bytes that were not zero, since zero blocks cost nearly nothing and what a guest dirties is seldom
/// zero. It is in bytes *before* compression over the time it took, so "what is left after compression / wire rate" and
/// "what is left / goodput" are the same number: `left * (wire / raw) / (wire / t) = left / (raw / t)`.
///
/// Each of the last rounds, and those behind it taken together, gives a lower bound of what is carried: a short round
/// spends most of its time on scans and round trips, a first round of a sparse guest on finding zeros. The best of these
/// bounds is taken, back to the round with which they hold 32 MiB. A last flight of at least 4 MiB, which has neither
/// scan nor zeros in its time, lowers it if it was slower: the link may have got a neighbour since. `None` before
/// the first round.
#[must_use]
pub fn goodput(rounds: &[RoundStats], last_flight: Option<Flight>) -> Option<Rate> {
    rounds.last()?;
    let recent = recent(rounds);
    Some(match last_flight {
        Some(flight) if flight.bytes >= FLIGHT_BYTES => {
            recent.min(Rate::of(flight.bytes, flight.elapsed))
        }
        Some(_) | None => recent,
    })
}

fn recent(rounds: &[RoundStats]) -> Rate {
    let (mut data, mut raw, mut time) = (0_u64, 0_u64, Duration::ZERO);
    let mut best = Rate(0);
    // A round in which nothing was sent says nothing of the rate.
    let sending = |round: &&RoundStats| round.raw_bytes_sent > 0;
    for round in rounds.iter().rev().filter(sending) {
        data = data.saturating_add(round.raw_bytes_sent.saturating_sub(round.zero_bytes));
        raw = raw.saturating_add(round.raw_bytes_sent);
        time = time.saturating_add(round.sending());
        best = best.max(Rate::of(data, time));
        if data >= SAMPLE_BYTES {
            break;
        }
    }
    if data >= MIN_DATA {
        return best;
    }
    // Next to nothing but zeros: the rate of data is a lower bound, and that of zeros an upper one.
    match raw {
        0 => PRIOR_GOODPUT,
        _ => best.max(Rate::of(raw, time).min(PRIOR_GOODPUT)),
    }
}

/// What a cutover costs besides sending what is left. The engine overwrites each part as soon as it has measured it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedCosts {
    /// The hypervisor stops the CPUs and lists its RAM blocks and devices again.
    pub pause: Duration,
    /// I/O in flight completes.
    pub barrier: Duration,
    /// The last scan for dirty blocks.
    pub final_scan: Duration,
    /// The device state is written.
    pub state_save: Duration,
    /// The device state is loaded at the destination, its disks flushed before.
    pub state_load: Duration,
    /// Waits for the peer: see [`FixedCosts::round_trips_at`].
    pub round_trips: Duration,
    /// Records made durable between the pause and the start: COMMITTING here, OWNED there.
    pub journal: Duration,
    /// Hooks of the phases `pause` to `start`.
    pub hooks: Duration,
    /// Digests of `--verify`, while the guest is paused.
    pub verify: Duration,
}

impl Default for FixedCosts {
    /// Priors: what an unremarkable host takes, doubled. QEMU 10 saves the device state of a small guest in 1 to 2 ms
    /// and loads it in 6 ms; `stop` and the listings are some ten QMP calls of well under a millisecond; a scan costs
    /// under 1 ms per GiB; an fsync of a small file is 1 to 5 ms on a disk with a cache. Hooks and verification are
    /// zero, because the engine knows beforehand whether there are any.
    fn default() -> Self {
        Self {
            pause: Duration::from_millis(5),
            barrier: Duration::from_millis(2),
            final_scan: Duration::from_millis(2),
            state_save: Duration::from_millis(4),
            state_load: Duration::from_millis(12),
            round_trips: Self::round_trips_at(Duration::from_millis(1)),
            journal: Duration::from_millis(10),
            hooks: Duration::ZERO,
            verify: Duration::ZERO,
        }
    }
}

impl FixedCosts {
    /// Time spent waiting for the peer at this round-trip time: last blocks until `Complete` (1), device state until
    /// `Prepared` (1), and `Commit` on its way to the start (0.5).
    #[must_use]
    pub fn round_trips_at(rtt: Duration) -> Duration {
        rtt.saturating_mul(5) / 2
    }

    /// From the last scan to the pause, no part of the downtime: the attempt is made durable on both sides, which takes
    /// one round trip and as many records as the decision does later. The guest goes on dirtying meanwhile.
    #[must_use]
    pub fn before_pause(&self) -> Duration {
        (self.round_trips.saturating_mul(2) / 5).saturating_add(self.journal)
    }

    /// Prior of digesting `bytes` on both sides at once: 1 GiB/s, which is BLAKE3 of one core at half its speed on
    /// 4 KiB pieces, with the reads of the guest's memory.
    #[must_use]
    pub fn verify_prior(bytes: u64) -> Duration {
        Rate(1 << 30).time_for(bytes)
    }

    /// Name and length of each part, in the order in which they happen.
    #[must_use]
    pub const fn parts(&self) -> [(&'static str, Duration); 9] {
        [
            ("pause", self.pause),
            ("barrier", self.barrier),
            ("final scan", self.final_scan),
            ("verify", self.verify),
            ("state save", self.state_save),
            ("state load", self.state_load),
            ("round trips", self.round_trips),
            ("journal", self.journal),
            ("hooks", self.hooks),
        ]
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.parts()
            .iter()
            .fold(Duration::ZERO, |sum, (_, part)| sum.saturating_add(*part))
    }
}

/// What a cutover is going to take: what is left over the goodput, and the fixed costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PredictedDowntime {
    /// Sending what is left.
    pub transfer: Duration,
    /// Everything else.
    pub fixed: FixedCosts,
    /// The goodput that `transfer` was computed with.
    pub goodput: Rate,
}

impl PredictedDowntime {
    /// The prediction for `left` bytes at `goodput`.
    #[must_use]
    pub fn new(left: u64, goodput: Rate, fixed: FixedCosts) -> Self {
        Self {
            transfer: goodput.time_for(left),
            fixed,
            goodput,
        }
    }

    /// The whole of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.transfer.saturating_add(self.fixed.total())
    }

    /// Name and length of the parts that are not zero, longest first.
    #[must_use]
    pub fn longest_parts(&self) -> Vec<(&'static str, Duration)> {
        let mut parts = vec![("transfer", self.transfer)];
        parts.extend(self.fixed.parts());
        parts.retain(|(_, part)| !part.is_zero());
        parts.sort_by_key(|(_, part)| std::cmp::Reverse(*part));
        parts
    }
}

impl fmt::Display for PredictedDowntime {
    /// `186 ms (transfer 120 ms, state load 41 ms, round trips 12 ms)`: the total and its three longest parts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Span(self.total()))?;
        let parts: Vec<String> = self
            .longest_parts()
            .into_iter()
            .take(3)
            .map(|(name, part)| format!("{name} {}", Span(part)))
            .collect();
        if parts.is_empty() {
            return Ok(());
        }
        write!(f, " ({})", parts.join(", "))
    }
}
