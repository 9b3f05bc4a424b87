//! Beside others: whether somebody else fills the queue, and how much to take then.
//!
//! A flow that only fills the pipe and one that fills pipe and queue do not share: the second takes all. So the model
//! looks whether the queue stands although it keeps its own part of it small. If it does, the window is made three fifths of all
//! that pipe and queue hold, which is the line's rate times the round trip as it is now, until the queue is seen empty
//! again. The line's rate is the best that was carried of late. Who joins a full line has not seen that, but start-up shows it: what it
//! adds waits behind itself, so bytes added over time added to the round trip is the line's rate, from the last round trip on that is not longer than
//! the shortest by more than timers explain: what is added before fills the pipe, and single steps are too much of what the others do meanwhile.

use std::time::Duration;

use super::filters::{carried, percent, rate_of};
use crate::units::Rate;

/// Rounds looked back at: one probe cycle, so that the round trip of a drain is among them.
const LOOK_BACK: u32 = 8;
/// So many of them with a standing queue: somebody else keeps it.
const ENTER_QUEUED: u32 = 7;
/// So few of them: nobody does any more.
const LEAVE_QUEUED: u32 = 1;
/// Rounds after which the own part of the queue is let run empty, to see whether it is only the own one by now.
const CHECK_EVERY: u32 = 48;
/// Rounds among the last eight in which the queue ran over that mean more than an end of the others' growth.
const OVERFLOWING: u32 = 4;
/// Part of pipe and queue taken, in percent. The line is mostly known as slower than it is, by headers and by what others had of it,
/// so that it comes to about half.
const SHARE: u64 = 60;

/// A line that is this much faster, in percent, than what start-up got of it is shared.
const CROWDED: u64 = 225;
/// Most that is believed of such a line, as a multiple of what start-up got: what was measured is not exact.
const MOST_BELIEVED: u64 = 10;
/// A round trip that is longer by this is so by the hosts' timers, and not by what was added.
const GRAIN: Duration = Duration::from_millis(2);
/// Part of the line's known rate, as a divisor, that is forgotten each round: slower than any sharing lasts, faster than a
/// line that became slower would mislead.
const FORGET: u64 = 1024;
/// What is taken off it, as a divisor, when it turned out too much.
const LESS: u64 = 8;

/// Sees and answers competition.
#[derive(Debug, Clone, Default)]
pub(super) struct Sharing {
    /// One bit a round, the newest lowest: whether a queue stood.
    queued: u8,
    /// The same: whether it ran over.
    overflowed: u8,
    /// Highest rate of late: what the line carries, as far as it is known.
    line: Rate,
    slope: Slope,
    /// Rounds since it was taken up.
    active: Option<u32>,
    /// Start-up showed it: the shortest round trip known may be one of a queue that others keep, so that none is seen to stand.
    crowded: bool,
}

/// How the round trip follows the bytes under way while start-up adds to them: what is added waits behind itself. Each end has bytes
/// and a round trip.
#[derive(Debug, Clone, Default)]
struct Slope {
    shortest: Option<Duration>,
    /// The newest round trip that was longer than that by [`GRAIN`] at most: up to there what was added filled the pipe.
    low: Option<(u64, Duration)>,
    /// The longest one after it.
    high: Option<(u64, Duration)>,
}

impl Slope {
    fn push(&mut self, bytes: u64, rtt: Duration) {
        let shortest = self.shortest.map_or(rtt, |shortest| shortest.min(rtt));
        self.shortest = Some(shortest);
        if rtt <= shortest + GRAIN {
            (self.low, self.high) = (Some((bytes, rtt)), None);
        } else if self.high.is_none_or(|high| rtt > high.1) {
            self.high = Some((bytes, rtt));
        }
    }

    fn rate(&self) -> Rate {
        let (low, high) = self.low.zip(self.high).unwrap_or_default();
        match high.1.saturating_sub(low.1) {
            Duration::ZERO => Rate(0),
            time => rate_of(high.0.saturating_sub(low.0), time),
        }
    }
}

impl Sharing {
    pub(super) const fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// What the line carries, as far as is known.
    pub(super) fn line(&self) -> Rate {
        self.line
    }

    /// Window that is a fair part of what is under way in all at this round trip.
    pub(super) fn window(&self, rtt: Duration) -> Option<u64> {
        self.active.map(|_| percent(carried(self.line, rtt), SHARE))
    }

    /// Notes what was under way when a packet was sent, and that packet's round trip.
    pub(super) fn on_step(&mut self, under_way: u64, rtt: Duration) {
        self.slope.push(under_way, rtt);
    }

    /// Notes a round that counts: whether a queue stood, whether it ran over, and what was carried.
    pub(super) fn on_round(&mut self, queued: bool, overflowed: bool, rate: Rate) {
        self.queued = self.queued << 1 | u8::from(queued);
        if let Some(rounds) = &mut self.active {
            *rounds += 1;
            self.overflowed = self.overflowed << 1 | u8::from(overflowed);
            if self.overflowed.count_ones() >= OVERFLOWING {
                // The others cannot give way any more: the line was taken for faster than it is.
                self.overflowed = 0;
                self.line = Rate(self.line.0 - self.line.0 / LESS);
            }
            self.line = self.line.max(rate);
            return;
        }
        self.line = Rate((self.line.0 - self.line.0 / FORGET).max(rate.0));
    }

    /// Whether it is time to take over.
    pub(super) const fn should_enter(&self) -> bool {
        self.active.is_none() && self.queued.count_ones() >= ENTER_QUEUED
    }

    /// Start-up is over, at this rate. If it ended because the line was full of others, what it added says how fast the
    /// line is, and half of it is taken at once.
    pub(super) fn on_started(&mut self, rate: Rate) {
        let line = self.slope.rate();
        self.slope = Slope::default();
        if line.0 > percent(rate.0, CROWDED) {
            self.line = self
                .line
                .max(line.min(Rate(rate.0.saturating_mul(MOST_BELIEVED))));
            self.enter();
            self.crowded = true;
        }
    }

    /// Takes over.
    pub(super) fn enter(&mut self) {
        self.active = Some(0);
    }

    /// Whether the queue has mostly been empty of late, as far as that can be seen.
    pub(super) const fn is_over(&self) -> bool {
        self.active.is_some() && !self.crowded && self.queued.count_ones() <= LEAVE_QUEUED
    }

    /// Whether the own part of the queue should be let run empty, to see what is left of it.
    pub(super) fn should_check(&self) -> bool {
        self.active
            .is_some_and(|rounds| rounds > 0 && rounds % CHECK_EVERY == 0)
    }

    /// Gives the window back to the model.
    pub(super) fn leave(&mut self) {
        self.active = None;
        self.crowded = false;
        self.queued = 0;
    }
}

const _: () = assert!(LOOK_BACK == u8::BITS, "one bit a round");
