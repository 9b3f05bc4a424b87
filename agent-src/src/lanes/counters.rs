//! What the lanes of a migration have done, over all its sessions.
//!
//! Owns the counters, which are read without a lock, and the policy of compression, which is asked once a frame.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use vmferry_common::codec::Encoded;
use vmferry_common::compress::{CompressMode, CompressPolicy, Interval};
use vmferry_common::waits::LinkWaits;
use vmferry_proto::frame::{Encoding, FrameHeader};

use super::workers;

/// What all lanes of a migration have done so far, and the choice of compression that follows from it.
#[derive(Debug)]
pub struct LaneCounters {
    wire_bytes: AtomicU64,
    zero_blocks: AtomicU64,
    unchanged_blocks: AtomicU64,
    difference_blocks: AtomicU64,
    duplicate_blocks: AtomicU64,
    /// Set where the destination did not have what a frame referred to.
    only_whole: AtomicBool,
    raw_bytes: AtomicU64,
    link_waits: LinkWaits,
    began: Instant,
    compress: Mutex<(CompressPolicy, Mark)>,
}

/// The counters at the end of the last interval that the policy was told of.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mark {
    at: Duration,
    raw_bytes: u64,
    wire_bytes: u64,
    sent_bytes: u64,
    waited: Duration,
}

impl LaneCounters {
    /// Nothing done yet; frames are compressed as `mode` says.
    #[must_use]
    pub fn new(mode: CompressMode) -> Self {
        let policy = CompressPolicy::new(mode, u32::try_from(workers()).unwrap_or(u32::MAX));
        Self {
            wire_bytes: AtomicU64::new(0),
            zero_blocks: AtomicU64::new(0),
            unchanged_blocks: AtomicU64::new(0),
            difference_blocks: AtomicU64::new(0),
            duplicate_blocks: AtomicU64::new(0),
            only_whole: AtomicBool::new(false),
            raw_bytes: AtomicU64::new(0),
            link_waits: LinkWaits::default(),
            began: Instant::now(),
            compress: Mutex::new((policy, Mark::default())),
        }
    }

    /// A session begins over a path of this round-trip time.
    pub fn open(&self, rtt: Duration) {
        let (policy, last) = &mut *self.compress();
        policy.open(rtt);
        last.sent_bytes = 0;
    }

    /// Tells the compression policy what happened since the last call, with `lanes` lanes at work and `sent_bytes` sent by the
    /// session's connections.
    pub fn tick(&self, lanes: usize, sent_bytes: u64) {
        let now = Mark {
            at: self.began.elapsed(),
            raw_bytes: self.raw_bytes.load(Ordering::Relaxed),
            wire_bytes: self.wire(),
            sent_bytes,
            waited: self.link_waits.total(),
        };
        let mut compress = self.compress();
        let (policy, last) = &mut *compress;
        let elapsed = now.at.saturating_sub(last.at);
        let waited = now.waited.saturating_sub(last.waited).as_secs_f64();
        let lane_time = elapsed.as_secs_f64() * f64::from(u32::try_from(lanes.max(1)).unwrap_or(1));
        let interval = Interval {
            elapsed,
            raw_bytes: now.raw_bytes - last.raw_bytes,
            wire_bytes: now.wire_bytes - last.wire_bytes,
            sent_bytes: now.sent_bytes.saturating_sub(last.sent_bytes),
            link_wait: if lane_time > 0.0 {
                (waited / lane_time).min(1.0)
            } else {
                0.0
            },
        };
        policy.on_interval(now.at, &interval);
        *last = now;
    }

    pub(super) fn compress(&self) -> MutexGuard<'_, (CompressPolicy, Mark)> {
        self.compress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of headers and payloads handed to the transport.
    #[must_use]
    pub fn wire(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// Blocks sent as zero.
    #[must_use]
    pub fn zero(&self) -> u64 {
        self.zero_blocks.load(Ordering::Relaxed)
    }

    /// Blocks that were dirtied and not sent, since they were as before.
    #[must_use]
    pub fn unchanged(&self) -> u64 {
        self.unchanged_blocks.load(Ordering::Relaxed)
    }

    /// Blocks sent as differences.
    #[must_use]
    pub fn differences(&self) -> u64 {
        self.difference_blocks.load(Ordering::Relaxed)
    }

    /// Blocks sent as duplicates.
    #[must_use]
    pub fn duplicates(&self) -> u64 {
        self.duplicate_blocks.load(Ordering::Relaxed)
    }

    /// The sessions to come send no differences and no duplicates.
    pub fn send_only_whole(&self) {
        self.only_whole.store(true, Ordering::Relaxed);
    }

    /// Whether this session may refer to what the destination has.
    pub(super) fn may_refer(&self) -> bool {
        !self.only_whole.load(Ordering::Relaxed)
    }

    /// How long lanes waited for the link.
    pub(super) const fn link_waits(&self) -> &LinkWaits {
        &self.link_waits
    }

    /// A frame goes.
    pub(super) fn count(&self, encoded: &Encoded) {
        let on_wire = FrameHeader::ENCODED_LEN as u64 + encoded.payload.len() as u64;
        let zero = u64::from(encoded.zero.count());
        self.wire_bytes.fetch_add(on_wire, Ordering::Relaxed);
        let unchanged = u64::from(encoded.unchanged.count());
        self.zero_blocks.fetch_add(zero, Ordering::Relaxed);
        self.unchanged_blocks
            .fetch_add(unchanged, Ordering::Relaxed);
        let by_reference = match encoded.encoding {
            Encoding::Raw | Encoding::Zstd => None,
            Encoding::Difference => Some(&self.difference_blocks),
            Encoding::Duplicate => Some(&self.duplicate_blocks),
        };
        if let Some(blocks) = by_reference {
            let count = u64::from(encoded.by_reference.count());
            blocks.fetch_add(count, Ordering::Relaxed);
        }
        self.raw_bytes
            .fetch_add(u64::from(encoded.raw_len), Ordering::Relaxed);
    }
}
