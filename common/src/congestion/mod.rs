//! Congestion control: how much a sender may have under way.
//!
//! Owns the choice ([`Congestion`]) and a controller of our own behind quinn's trait. It does no I/O and has no clock; quinn
//! tells it of each packet and asks for the window. What follows is its paper.
//!
//! # Why
//!
//! Cubic takes every loss for congestion. A line of 200 Mbit/s and 80 ms that loses one packet in a thousand carries 6 Mbit/s with
//! it; a migration needs the line. So the window does not follow loss but a model of the path, as in BBR
//! (Cardwell et al., 2016), reduced to what quinn's trait allows: quinn paces by itself at 1.25 windows a round trip, so the window is
//! all that can be set.
//!
//! # The model
//!
//! ```text
//! rate   = most bytes acknowledged in a round over its span, of the last 10 rounds   (filters, round)
//! rtt    = shortest round trip of the last 10 s of full use                          (filters)
//! window = gain × rate × rtt + headroom      headroom = rate × 1 ms, at least 16 packets,
//!                                                     and what came together in one of the last 10 rounds  (gathered)
//! ```
//!
//! A *round* lasts until what was sent after its beginning is acknowledged, at least 4 ms: on a shorter path the host's
//! scheduling, not the path, decides when acknowledgements come. Its span is the longer of that between its acknowledgements and
//! that between the sendings of what they acknowledge, so that acknowledgements which were held up and come together show no
//! faster path. Of its round trips the shortest but one is believed, where those of acknowledgements taken at once count as one: a host
//! that is held up between reading its clock and its socket sees one that is too short by milliseconds, and by that the window would be too
//! small until the 10 s are over. The headroom is for timers and batches: a host that is busy compressing or writing takes packets in batches, and what
//! of a batch the rate does not explain is added to the window, up to 50 ms' worth. Where the queue has not even room for that, loss takes it away.
//!
//! # Phases
//!
//! ```text
//! StartUp ──rate grew by less than a quarter──▶ Cycle: ×1.35, ×0.90, 6 × ×1.05, and again
//!    ▲                                            │ ▲
//!    │◀── a probe showed 15 % more, no queue ─────┘ │
//!    │                          rtt older than 10 s │
//!    └◀── outage                  Drain (2 rounds) ◀┘ ──▶
//! ```
//!
//! * **Start-up** adds ¾ byte for each that is acknowledged and stops growing where the round trip is longer by an eighth and
//!   what the headroom takes, which is 1 ms or, on a path of less than 4 ms, a busy host's batches. A queue shows one round trip after
//!   it began; with doubling it would be as long as the path by then. It ends after three rounds that grew by less than a quarter, at
//!   once if a queue stands or loss exceeds the ceiling; but not by loss as long as the window is about the initial one and more comes through
//!   from round to round: a queue of others that runs over just as the first packets come tells of that moment. They leave half the window.
//!   What its last window still loses when it is over does not count: a round is without those bytes because of what start-up did, not because of the path.
//! * **The cycle** probes for one round in eight, makes up for it in the next, and cruises just above what fits. A probe that finds
//!   much more goes on as start-up: a path that became ten times faster is taken in some twenty rounds. A probe answered with
//!   loss makes the next one twice as rare, up to one in 64 rounds.
//! * **Drain**: if no round trip near the shortest was seen for 10 s of full use, two rounds at 0.75 show it. A path that has become longer
//!   is told from a queue by what less under way does to the wait: nothing, or something.
//!
//! # Loss, bursts, reordering
//!
//! Up to 8 % of a round is the line's noise. More in one round is a burst and passes. More in two rounds running is a slower path:
//! the rate is what these rounds carried. An outage of several round trips leaves a quarter of the window and start-up. Packets that overtake
//! look like loss to quinn and fall under the same ceiling. A path that becomes slower without loss fills its queue; while one
//! stands, the rate is remembered for 3 rounds only.
//!
//! # A sender with little to send
//!
//! A migration idles while it waits for its trigger, and its last flight must find the window as it was. Rounds in which quinn had nothing to
//! send (or the round before had not) never lower the rate, do not age the filters, end no start-up, probe and drain nothing; they can only
//! show that the path carries more. If a queue stands or packets are lost over the ceiling, the path was the limit after all. Idle time
//! begins a new round.
//!
//! # Beside others
//!
//! Two of ours keep a short queue and come to even parts within some cycles, since a third more is much for who has little. A flow
//! that fills the queue would take all from one that does not; see `sharing`: where the queue stands in 7 of 8 rounds, three fifths of pipe and queue as they
//! are known are taken, which comes to about half, and every 48 rounds it is looked whether that is still needed.
//! Where start-up showed it (beyond what timers vary, 2 ms) this is not ended before: the round trip was never seen without the others' queue, and a queue above it need not stand.
//!
//! # Limits
//!
//! * Half is taken also beside several filling flows, together.
//! * Who joins a filling flow 80 ms away gets between 0.3 and 0.65 of the line, by the moment at which it comes, where the queue is as
//!   long as the path or longer; up to 0.75 where it is half as long.
//! * Beside a filling flow with a queue of a quarter of the path or less, losses are few and short: ours takes two thirds and more.
//! * The first ten round trips of a path of under 1 ms are shorter than a timer's grain.
//!
//! # Shown by
//!
//! `tests`: quinn's own state machines at both ends of a seeded link in simulated time: use of the line from 100 Mbit/s to
//! 1 Gbit/s, 0.2 to 80 ms, without loss and up to 1 %; the tenth round trip; the wait in the queue; short queues, rate changes,
//! bursts, a cut, reordering, a host that looks every 5 ms; the last flight after idling; parts of the line beside Cubic and beside another of ours.
//! `cargo bench -p vmferry-tests --bench links -- --table goodput,share`: the same of real agents on an emulated link, beside the kernel's Cubic.

mod filters;
mod gathered;
mod model;
mod round;
mod sharing;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory, CubicConfig};

/// How a sender finds out how much it may have under way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Congestion {
    /// By a model of the path: line rate also where packets are lost at random, and short queues.
    #[default]
    Model,
    /// By loss, as most TCP does (RFC 9438).
    Cubic,
}

impl Congestion {
    pub(crate) fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Model => Arc::new(ModelFactory),
            Self::Cubic => Arc::new(CubicConfig::default()),
        }
    }
}

#[derive(Debug)]
struct ModelFactory;

impl ControllerFactory for ModelFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(model::Model::new(now, current_mtu))
    }
}
