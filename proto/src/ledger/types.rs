//! What the ledger hands out: frames to send, amounts, totals, and what it refuses.

use super::lanes::Flight;
use crate::error::{ErrorCode, WireError};
use crate::geometry::{WindowBits, WindowIndex};
use crate::ids::{FrameSeq, Lane, RegionId, SessionNumber};

/// A frame to be read, encoded and sent as number `seq` of its lane; it counts as in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameJob {
    /// The region.
    pub region: RegionId,
    /// The window.
    pub window: WindowIndex,
    /// The blocks: 1 to [`crate::limits::MAX_FRAME_BLOCKS`].
    pub blocks: WindowBits,
    /// Those of them that are known to be zero and need not be read.
    pub known_zero: WindowBits,
    /// The lane: frames of one lane go out in order of `seq`.
    pub lane: Lane,
    /// The frame's number.
    pub seq: FrameSeq,
}

/// A number of blocks, and the bytes they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// Blocks.
    pub blocks: u64,
    /// Their bytes (a region's last block may be short).
    pub bytes: u64,
}

/// Dirty blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dirty {
    /// All of them.
    pub all: Amount,
    /// Blocks among them that are known to be zero and cost next to nothing to send.
    pub known_zero_blocks: u64,
}

/// Frames, with what they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Frames {
    /// Number of frames.
    pub frames: u64,
    /// Blocks and bytes in them, zero ones included.
    pub amount: Amount,
}

/// Totals since the migration began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames taken.
    pub frames: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// Bytes of those blocks before encoding.
    pub bytes: u64,
    /// Different blocks among them.
    pub distinct_blocks: u64,
    /// Blocks among them that were known to be zero without being read.
    pub known_zero_blocks: u64,
}

impl Counters {
    /// Blocks sent more than once, counted once per repetition.
    #[must_use]
    pub const fn resent_blocks(&self) -> u64 {
        self.blocks - self.distinct_blocks
    }
}

/// What a new session began with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resumed {
    /// Regions whose copy starts from nothing: wholly dirty again.
    pub restarted: Vec<RegionId>,
    /// Frames of the lost session that were not settled when it was lost and turned out to be safe.
    pub kept: Frames,
    /// Frames whose blocks are dirty again.
    pub put_back: Frames,
}

/// A call or a peer's statement that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A region that the guest does not have.
    #[error("region {0} does not exist")]
    UnknownRegion(RegionId),
    /// Blocks of a region of another length.
    #[error("region {region} is {expected} bytes long, the marks are for {got} bytes")]
    RegionLength {
        /// The region.
        region: RegionId,
        /// Its length.
        expected: u64,
        /// What the marks are for.
        got: u64,
    },
    /// No session is open.
    #[error("no session is open")]
    NoSession,
    /// The peer speaks of a lane that the session does not have, or twice of one.
    #[error("progress of lane {lane} in a session of {lanes} lanes, or twice of one lane")]
    Lane {
        /// What the peer named.
        lane: Lane,
        /// How many there are.
        lanes: usize,
    },
    /// The peer answers for frames that were not sent.
    #[error("lane {lane}: frame {claimed} is said to be applied, the last one sent is {sent}")]
    NotSent {
        /// The lane.
        lane: Lane,
        /// Last frame sent.
        sent: FrameSeq,
        /// What the peer said.
        claimed: FrameSeq,
    },
    /// The peer takes back what it said.
    #[error("lane {lane}: progress went back from {before} to {claimed}")]
    Backwards {
        /// The lane.
        lane: Lane,
        /// What the peer said before.
        before: FrameSeq,
        /// What it says now.
        claimed: FrameSeq,
    },
    /// Flushed before it was applied.
    #[error("lane {lane}: frame {flushed} is said to be flushed, but only {applied} applied")]
    FlushedUnapplied {
        /// The lane.
        lane: Lane,
        /// Applied, it says.
        applied: FrameSeq,
        /// Flushed, it says.
        flushed: FrameSeq,
    },
    /// What an earlier process is said to have left is not what a ledger of this guest leaves.
    #[error("the ledger that was left does not fit the guest: {0}")]
    Image(&'static str),
    /// `Ready` does not name one incarnation per region.
    #[error("{got} incarnations for {expected} regions")]
    Incarnations {
        /// Regions.
        expected: usize,
        /// Incarnations.
        got: usize,
    },
    /// A session number that is not above the last one, or a number of lanes out of range.
    #[error("session {got} with {lanes} lanes cannot follow session {last}")]
    SessionNumber {
        /// The last session.
        last: SessionNumber,
        /// The new one.
        got: SessionNumber,
        /// Its lanes.
        lanes: u8,
    },
}

impl From<LedgerError> for WireError {
    fn from(error: LedgerError) -> Self {
        Self::new(ErrorCode::ProtocolViolation, error.to_string())
    }
}

impl Amount {
    pub(super) fn add(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.bytes += other.bytes;
    }
}

impl Dirty {
    pub(super) fn plus(mut self, other: Self) -> Self {
        self.all.add(other.all);
        self.known_zero_blocks += other.known_zero_blocks;
        self
    }
}

impl Frames {
    pub(super) fn add(&mut self, flight: &Flight) {
        self.frames += 1;
        self.amount.add(flight.amount());
    }

    pub(super) fn remove(&mut self, flight: &Flight) {
        self.frames -= 1;
        self.amount.blocks -= flight.amount().blocks;
        self.amount.bytes -= flight.amount().bytes;
    }

    pub(super) fn remove_all(&mut self, other: Self) {
        self.frames -= other.frames;
        self.amount.blocks -= other.amount.blocks;
        self.amount.bytes -= other.amount.bytes;
    }

    pub(super) fn add_all(&mut self, other: Self) {
        self.frames += other.frames;
        self.amount.add(other.amount);
    }
}
