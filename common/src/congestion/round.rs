//! A round: from one moment until what was sent after it is acknowledged.
//!
//! Owns the counting within it. The span of a round is the longer of the time between its acknowledgements and the
//! time between the sendings of what they acknowledge: acknowledgements that were held up and come
//! together do not look like a fast path.

use std::time::{Duration, Instant};

use super::filters::{percent, rate_of};
use crate::units::Rate;

/// Shortest round. On a path of 0.2 ms a round trip holds some 15 packets, and the host's scheduling, not the path,
/// decides when their acknowledgements come.
pub(super) const MIN_ROUND: Duration = Duration::from_millis(4);

/// What is counted in the round under way.
#[derive(Debug, Clone)]
pub(super) struct Round {
    began: Instant,
    /// When the newest packet acknowledged before this round was sent.
    sent_before: Instant,
    newest_sent: Instant,
    acked: u64,
    lost: u64,
    looks: Looks,
    limited: bool,
    /// The round before was limited: what is acknowledged in this one was sent then.
    limited_before: bool,
}

/// Round trips by the looks at which they were seen: acknowledgements that a host takes at once have the same time, which is that of
/// its looking. A host that is held up between reading its clock and its socket finds there what came meanwhile, and takes it for
/// faster than the path is. That happens to single looks, so the shortest but one is believed.
#[derive(Debug, Clone, Copy, Default)]
struct Looks {
    at: Option<Instant>,
    /// Of the look at hand.
    this: Option<Duration>,
    /// Of those before.
    shortest: Option<Duration>,
    next: Option<Duration>,
}

impl Looks {
    fn push(&mut self, at: Instant, rtt: Duration) {
        if self.at != Some(at) {
            self.close();
            self.at = Some(at);
        }
        self.this = Some(self.this.map_or(rtt, |this| this.min(rtt)));
    }

    fn close(&mut self) {
        let Some(this) = self.this.take() else { return };
        if self.shortest.is_none_or(|shortest| this < shortest) {
            self.next = self.shortest.replace(this);
        } else if self.next.is_none_or(|next| this < next) {
            self.next = Some(this);
        }
    }

    /// The round trip to be believed, and what the next round begins with: its last look.
    fn end(mut self) -> Option<(Duration, Self)> {
        let last = Self {
            shortest: Some(self.this?),
            ..Self::default()
        };
        self.close();
        Some((self.next.or(self.shortest)?, last))
    }
}

/// A round that is over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Report {
    pub(super) ended: Instant,
    pub(super) rate: Rate,
    pub(super) span: Duration,
    pub(super) acked: u64,
    pub(super) lost: u64,
    pub(super) min_rtt: Duration,
    /// The sender had too little to send: the rate says nothing about the path.
    pub(super) limited: bool,
}

impl Report {
    /// Whether more than this part of what it tells of was lost, in percent.
    pub(super) const fn loses_more_than(&self, part: u64) -> bool {
        self.lost > percent(self.acked + self.lost, part)
    }
}

impl Round {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            sent_before: now,
            newest_sent: now,
            acked: 0,
            lost: 0,
            looks: Looks::default(),
            // Nothing was under way: what a first round carries is less than what the path would.
            limited: false,
            limited_before: true,
        }
    }

    pub(super) fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, limited: bool) {
        let rtt = now.saturating_duration_since(sent);
        self.acked += bytes;
        self.newest_sent = self.newest_sent.max(sent);
        self.looks.push(now, rtt);
        self.limited |= limited;
    }

    pub(super) const fn on_lost(&mut self, bytes: u64) {
        self.lost += bytes;
    }

    /// Ends the round if what was sent after its beginning has been acknowledged.
    pub(super) fn end(&mut self, now: Instant) -> Option<Report> {
        let span = now.saturating_duration_since(self.began);
        let (min_rtt, looks) = self.looks.end()?;
        if self.newest_sent <= self.began || span < MIN_ROUND {
            return None;
        }
        let sending = self.newest_sent.saturating_duration_since(self.sent_before);
        let report = Report {
            ended: now,
            rate: rate_of(self.acked, span.max(sending)),
            span,
            acked: self.acked,
            lost: self.lost,
            min_rtt,
            limited: self.limited || self.limited_before,
        };
        *self = Self {
            began: now,
            sent_before: self.newest_sent,
            looks,
            limited_before: self.limited,
            ..Self::new(now)
        };
        self.newest_sent = self.sent_before;
        Some(report)
    }
}
