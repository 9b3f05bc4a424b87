//! The emulated bottleneck: a rate, a bounded queue, a delay, and what goes wrong behind it.

use std::ops::Range;
use std::time::{Duration, Instant};

/// Largest UDP payload on a path of 1,500 bytes.
const MTU: u16 = 1472;

/// What a link does to packets.
#[derive(Debug, Clone)]
pub(super) struct LinkPlan {
    /// Bytes a second, headers of IP and UDP included.
    pub(super) rate: u64,
    /// Both ways together.
    pub(super) rtt: Duration,
    /// Largest UDP payload.
    pub(super) mtu: u16,
    /// Bytes that may wait.
    pub(super) queue: u64,
    /// Lost at random behind the queue, in parts of a million.
    pub(super) loss_ppm: u64,
    /// Delayed by a tenth of the round trip, in parts of a million: later packets overtake.
    pub(super) reorder_ppm: u64,
    /// Acknowledgements whose host reads its clock a quarter of the round trip before it takes them, in parts of a million.
    pub(super) early_ppm: u64,
    /// Loss within these times, from the start of the run, in parts of a million.
    pub(super) bursts: Vec<(Range<Duration>, u64)>,
    /// The receiving host looks at its packets only so often.
    pub(super) grain: Duration,
    pub(super) seed: u64,
}

impl LinkPlan {
    /// `mbit` and `rtt`, without loss, with a queue of `bdps` percent of what the path holds, at least 128 kB.
    pub(super) fn new(mbit: u64, rtt: Duration, bdp_percent: u64) -> Self {
        let rate = mbit * 125_000;
        let bdp = rate * u64::try_from(rtt.as_micros()).unwrap() / 1_000_000;
        Self {
            rate,
            rtt,
            mtu: MTU,
            queue: (bdp * bdp_percent / 100).max(128_000),
            loss_ppm: 0,
            reorder_ppm: 0,
            early_ppm: 0,
            bursts: Vec::new(),
            grain: Duration::ZERO,
            seed: 1,
        }
    }
}

/// The link at work.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) plan: LinkPlan,
    start: Instant,
    busy_until: Instant,
    random: u64,
    /// Sum and number of the waits of packets taken, for their mean.
    waited: (Duration, u32),
    pub(super) longest_wait: Duration,
    pub(super) overflowed: u64,
}

/// IPv4 and UDP.
const HEADERS: u64 = 28;

impl Link {
    pub(super) fn new(plan: LinkPlan, start: Instant) -> Self {
        let random = plan.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Self {
            plan,
            start,
            busy_until: start,
            random,
            waited: (Duration::ZERO, 0),
            longest_wait: Duration::ZERO,
            overflowed: 0,
        }
    }

    /// When a packet offered now arrives; `None` if it does not.
    pub(super) fn offer(&mut self, now: Instant, bytes: u64) -> Option<Instant> {
        let bytes = bytes + HEADERS;
        let wait = self.busy_until.saturating_duration_since(now);
        let waiting = u128::from(self.plan.rate) * wait.as_nanos() / 1_000_000_000;
        if waiting + u128::from(bytes) > u128::from(self.plan.queue) {
            self.overflowed += 1;
            return None;
        }
        self.waited = (self.waited.0 + wait, self.waited.1 + 1);
        self.longest_wait = self.longest_wait.max(wait);
        self.busy_until = now + wait + Duration::from_nanos(bytes * 1_000_000_000 / self.plan.rate);
        if self.happens(self.loss_at(now)) {
            return None;
        }
        let late = if self.happens(self.plan.reorder_ppm) {
            self.plan.rtt / 10
        } else {
            Duration::ZERO
        };
        Some(self.next_look(self.busy_until + self.plan.rtt / 2 + late))
    }

    /// When an acknowledgement sent now seems to arrive.
    pub(super) fn answer(&mut self, now: Instant) -> Instant {
        let early = if self.happens(self.plan.early_ppm) {
            self.plan.rtt / 4
        } else {
            Duration::ZERO
        };
        now + self.plan.rtt / 2 - early
    }

    fn next_look(&self, arrival: Instant) -> Instant {
        let grain = self.plan.grain.as_nanos();
        if grain == 0 {
            return arrival;
        }
        let looks = (arrival - self.start).as_nanos().div_ceil(grain);
        self.start + self.plan.grain * u32::try_from(looks).unwrap()
    }

    pub(super) fn set_rate(&mut self, now: Instant, rate: u64) {
        let wait = self.busy_until.saturating_duration_since(now);
        let wait = wait.mul_f64(self.plan.rate as f64 / rate as f64);
        self.busy_until = now + wait;
        self.plan.rate = rate;
    }

    /// Mean wait in the queue since the last call.
    pub(super) fn take_mean_wait(&mut self) -> Duration {
        let (sum, count) = std::mem::take(&mut self.waited);
        sum / count.max(1)
    }

    fn loss_at(&self, now: Instant) -> u64 {
        let at = now - self.start;
        let burst = self.plan.bursts.iter().find(|(span, _)| span.contains(&at));
        burst.map_or(self.plan.loss_ppm, |(_, ppm)| *ppm)
    }

    fn happens(&mut self, ppm: u64) -> bool {
        // xorshift64*: a seeded sequence is all that is needed.
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let value = self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
        value % 1_000_000 < ppm
    }
}
