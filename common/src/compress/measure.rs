//! What is measured of a copy, over the times that the policy judges by.

use std::time::Duration;

/// Frames in a running mean: some shrink to a tenth, and some not at all.
const MEAN_OF: f64 = 8.0;
/// A stage is judged by stretches of this length.
pub(super) const STRETCH: Duration = Duration::from_millis(190);
/// The shortest time that says something; a comparison also takes [`CONCLUSIVE`] guest bytes, or a whole stretch.
pub(super) const SHORT_STRETCH: Duration = Duration::from_millis(20);
/// Some frames: they are counted whole, as they are handed over.
const CONCLUSIVE: u64 = 2 << 20;
/// What was carried longer ago than this counts half.
const LATELY: Duration = Duration::from_secs(2);

/// What happened on all lanes since the last report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Interval {
    /// Its length.
    pub elapsed: Duration,
    /// Guest bytes that were handed to the transport, before compression, zero blocks left out.
    pub raw_bytes: u64,
    /// Bytes of headers and payloads that became of them.
    pub wire_bytes: u64,
    /// Bytes that the transport sent: what was handed over may wait in its buffers.
    pub sent_bytes: u64,
    /// Share of the time for which the senders waited for the transport or the bandwidth limit: 0 to 1.
    pub link_wait: f64,
}

/// Some intervals together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stretch {
    elapsed: f64,
    pub(super) raw_bytes: u64,
    wire_bytes: u64,
    sent_bytes: u64,
    waited: f64,
    /// Time spent compressing, by all workers.
    packing: f64,
}

impl Stretch {
    pub(super) fn add(&mut self, interval: &Interval, packing: Duration) {
        let elapsed = interval.elapsed.as_secs_f64();
        self.elapsed += elapsed;
        self.raw_bytes += interval.raw_bytes;
        self.wire_bytes += interval.wire_bytes;
        self.sent_bytes += interval.sent_bytes;
        self.waited += interval.link_wait * elapsed;
        self.packing += packing.as_secs_f64();
    }

    /// Guest bytes per second.
    pub(super) fn goodput(&self) -> f64 {
        as_f64(self.raw_bytes) / self.elapsed
    }

    /// Bytes per second on the wire, which is what a raw copy carries: buffers that fill up are none of it.
    pub(super) fn line(&self) -> f64 {
        as_f64(self.sent_bytes.min(self.wire_bytes)) / self.elapsed
    }

    /// Guest bytes per second without those that only filled buffers.
    pub(super) fn carried(&self) -> f64 {
        self.line() * as_f64(self.raw_bytes) / as_f64(self.wire_bytes.max(1))
    }

    /// Share of the time for which senders waited.
    pub(super) fn link_wait(&self) -> f64 {
        self.waited / self.elapsed
    }

    /// Share of the time of so many workers that compression took.
    pub(super) fn share(&self, workers: f64) -> f64 {
        self.packing / (self.elapsed * workers)
    }

    pub(super) fn lasts(&self, time: Duration) -> bool {
        self.elapsed >= time.as_secs_f64()
    }

    /// Whether it is long enough to be compared with another, whose frames may have been of another size.
    pub(super) fn is_conclusive(&self) -> bool {
        self.lasts(STRETCH) || (self.lasts(SHORT_STRETCH) && self.raw_bytes >= CONCLUSIVE)
    }
}

/// What went over the wire lately: frames are counted whole as they are handed over, so a single stretch says little.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Carried {
    bytes: f64,
    elapsed: f64,
}

impl Carried {
    pub(super) fn add(&mut self, stretch: &Stretch) {
        if self.elapsed >= LATELY.as_secs_f64() {
            self.bytes /= 2.0;
            self.elapsed /= 2.0;
        }
        self.bytes += as_f64(stretch.wire_bytes);
        self.elapsed += stretch.elapsed;
    }

    pub(super) fn rate(&self) -> f64 {
        self.bytes / self.elapsed
    }
}

/// Of the last [`MEAN_OF`] frames, roughly.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mean {
    pub(super) frames: f64,
    value: f64,
}

impl Mean {
    pub(super) fn add(&mut self, newest: f64) {
        self.frames = (self.frames + 1.0).min(MEAN_OF);
        self.value += (newest - self.value) / self.frames;
    }

    pub(super) fn get(&self) -> Option<f64> {
        (self.frames > 0.0).then_some(self.value)
    }
}

/// What was to be compressed, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tried {
    /// Guest bytes: a frame's, or a piece's.
    pub raw: usize,
    /// Bytes that they take: no fewer where they do not shrink.
    pub packed: usize,
    /// What it took to compress them, or to see that they do not shrink.
    pub spent: Spent,
}

/// What it took to compress a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Spent {
    /// By the clock: the longer the more others want the cores.
    pub elapsed: Duration,
    /// Of a core.
    pub cpu: Duration,
}

#[allow(
    clippy::cast_precision_loss,
    reason = "rates are estimates; 2^53 bytes are far above any interval"
)]
pub(super) fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}
