//! Acknowledgements that come together: how much more at once than the path's rate explains.
//!
//! A host that is busy with something else (compressing, writing to a guest that pages in) takes packets and acknowledgements in
//! batches, milliseconds apart. A window of what the path holds is then used up between two batches and the sender
//! stands still, although nothing waits on the path. So the excess of a batch over the rate is room that the window needs, as the
//! "extra acked" of BBR version 2 (Cardwell et al., draft-cardwell-iccrg-bbr-congestion-control).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::filters::{RATE_ROUNDS, carried};
use crate::units::Rate;

/// Shortest silence that is a pause of a host: below it the headroom is enough. On a longer path it must be as long as the shortest
/// round trip: what is shorter may be others' packets in between, and the window is not used up by then.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// Longest pause of a host that is made up for: what is longer is not scheduling.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Largest excess of the last rounds.
#[derive(Debug, Clone, Default)]
pub(super) struct Gathered {
    last: Option<Instant>,
    batch: Option<Batch>,
    this_round: u64,
    rounds: VecDeque<u64>,
}

/// What comes after a pause, until the rate explains it.
#[derive(Debug, Clone, Copy)]
struct Batch {
    since: Instant,
    acked: u64,
}

impl Gathered {
    pub(super) fn get(&self) -> u64 {
        self.rounds.iter().copied().max().unwrap_or(0)
    }

    pub(super) fn on_ack(&mut self, now: Instant, bytes: u64, rate: Rate, min_rtt: Duration) {
        let last = self.last.replace(now);
        let pause = SHORTEST_PAUSE.max(min_rtt);
        let after_pause = last.is_some_and(|last| now - last >= pause);
        let batch = if after_pause {
            Batch {
                since: now,
                acked: 0,
            }
        } else if let Some(batch) = self.batch {
            batch
        } else {
            return;
        };
        let acked = batch.acked + bytes;
        let excess = acked.saturating_sub(carried(rate, now - batch.since));
        self.this_round = self
            .this_round
            .max(excess.min(carried(rate, LONGEST_PAUSE)));
        self.batch = (excess > 0).then_some(Batch { acked, ..batch });
    }

    pub(super) fn on_round(&mut self) {
        self.rounds.push_back(std::mem::take(&mut self.this_round));
        while self.rounds.len() > RATE_ROUNDS {
            self.rounds.pop_front();
        }
    }

    /// Nothing was under way: the silence was the sender's.
    pub(super) const fn restart(&mut self) {
        self.last = None;
        self.batch = None;
    }
}
