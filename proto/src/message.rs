//! The typed control messages: what each side may say to the other.
//!
//! Owns the types; `wire` is the only door between them and protobuf. Everything a peer can send has
//! passed the caps of `limits` by the time it is one of these.

use std::ops::Range;

use crate::error::WireError;
use crate::geometry::{WindowBits, WindowIndex};
use crate::ids::{
    Attempt, FrameSeq, Generation, GuestName, Incarnation, Lane, MigrationId, RegionId, RegisterId,
    SessionNumber,
};
use crate::spec::{GuestSpec, RunState};
use crate::version::{Features, ProtocolVersion, VersionRange};

/// What the source says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToDestination {
    /// First message of a session.
    Hello(Hello),
    /// The guest, first message after `Welcome`.
    Offer(Offer),
    /// What is left fits the limits: the cutover begins now or at the trigger. For the destination's hooks and
    /// status only; may be said again after more copying.
    Converged,
    /// Asks for the digests of what the destination still has of these windows, outside an attempt (`[WIRE-49]`).
    Compare(WindowRange),
    /// Asks the destination to make attempt `attempt` known (durably) before the guest is paused.
    OpenAttempt {
        /// The attempt: one above every earlier one of this migration.
        attempt: Attempt,
    },
    /// The guest is paused and nothing follows on the lanes after these sequence numbers.
    Final(Final),
    /// All windows agree: load what comes on the device-state stream, then answer `Prepared`.
    DeviceState {
        /// The attempt.
        attempt: Attempt,
        /// Bytes on the device-state stream.
        len: u64,
        /// XXH3-128 of those bytes.
        digest: u128,
    },
    /// The source has recorded COMMITTING. Idempotent.
    Commit(AttemptKey),
    /// What became of this attempt? Settles an undecided one as aborted. Idempotent.
    Query(AttemptKey),
    /// Give the attempt up (the source has not committed). Idempotent.
    Abort {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The migration is over without a commit: clean up, answer `Cancelled`.
    Cancel {
        /// Why.
        reason: WireError,
    },
    /// The last answer was read; the connection may be closed.
    Goodbye,
    /// The peer broke a rule, or this side cannot go on.
    Error(WireError),
}

/// What the destination says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToSource {
    /// Answer to `Hello`.
    Welcome(Welcome),
    /// Answer to `Offer`: the guest can be received.
    Ready(Ready),
    /// What has been applied and flushed, per lane. Sent from time to time and at each `Final`.
    Progress(Vec<LaneProgress>),
    /// Answer to `Compare`, in the order of the questions.
    Compared(Compared),
    /// The attempt is durable: the guest may be paused.
    AttemptOpened {
        /// The attempt.
        attempt: Attempt,
    },
    /// Digests that a `Final` asked for, in pieces; the last piece has `last` set.
    Digests(Digests),
    /// Everything is applied and complete up to the sequence numbers of the last `Final`.
    Complete {
        /// The attempt.
        attempt: Attempt,
    },
    /// Flushed, device state loaded, guest not running: ready for `Commit`.
    Prepared(Prepared),
    /// What the register says of an attempt.
    Outcome(Outcome),
    /// Answer to `Cancel`: everything of the migration is gone here.
    Cancelled,
    /// The peer broke a rule, or this side cannot go on.
    Error(WireError),
}

/// An attempt, as Commit, Query and the records name it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct AttemptKey {
    /// The migration.
    pub migration: MigrationId,
    /// The attempt within it.
    pub attempt: Attempt,
    /// The register that `Prepared` named: only its answer counts.
    pub register: RegisterId,
}

/// Opens a session, or binds a further connection to one that connection 0 opened (`[WIRE-13]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Versions that the source speaks.
    pub versions: VersionRange,
    /// Features that the source can use.
    pub features: Features,
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its ownership generation.
    pub generation: Generation,
    /// Session number: above every earlier one of this migration.
    pub session: SessionNumber,
    /// Number of data lanes that the source will open.
    pub lanes: u8,
    /// Connections of this session, this one included.
    pub connections: u8,
    /// Position of this connection among them, from 0. The control stream and the device state are on connection 0;
    /// lane `l` is on connection `l % connections`.
    pub connection: u8,
}

/// Accepts a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome {
    /// Version chosen.
    pub version: ProtocolVersion,
    /// Features that both sides have.
    pub features: Features,
    /// Register of the destination's state folder.
    pub register: RegisterId,
    /// The session accepted.
    pub session: SessionNumber,
    /// Name and version of the destination's program, for messages.
    pub agent: String,
}

/// Describes the guest and what is asked of the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The guest.
    pub spec: GuestSpec,
    /// Memory that the destination may touch ahead of the data (`[WIRE-58]`).
    pub populated: Vec<PopulatedWindows>,
}

/// Windows of a memory region of which the source's guest has every page, one behind the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PopulatedWindows {
    /// The region.
    pub region: RegionId,
    /// The windows, all of them inside the region.
    pub windows: Range<u32>,
}

/// The guest can be received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// One per region, in order of id.
    pub incarnations: Vec<Incarnation>,
    /// What was applied of earlier sessions of this migration, or `None` for a first one.
    pub resume: Option<ResumePoint>,
}

/// What a destination had applied when the last session ended. It is drained: nothing of that
/// session will be applied any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumePoint {
    /// The session that ended.
    pub session: SessionNumber,
    /// Its lanes.
    pub lanes: Vec<LaneProgress>,
}

/// How far a lane has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LaneProgress {
    /// The lane.
    pub lane: Lane,
    /// Every frame up to this one is applied.
    pub applied: FrameSeq,
    /// Every disk frame up to this one is flushed (at most `applied`).
    pub flushed: FrameSeq,
}

/// Ends the data of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Final {
    /// The attempt.
    pub attempt: Attempt,
    /// Last sequence number of each lane, by lane.
    pub lanes: Vec<FrameSeq>,
    /// Windows whose digests the source wants to compare, at most one entry per region, in order of id: none, a
    /// sample, or all.
    pub verify: Vec<VerifyWindows>,
    /// State of the guest before this pause: it arrives the same way, whatever the offer said.
    pub run_state: RunState,
}

/// Windows of one region to be digested: every `stride`-th, beginning with `first`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyWindows {
    /// The region.
    pub region: RegionId,
    /// First window.
    pub first: WindowIndex,
    /// Distance to the next; 1 means every window.
    pub stride: u32,
}

/// Windows of one region, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowRange {
    /// The region.
    pub region: RegionId,
    /// First window.
    pub first: WindowIndex,
    /// How many: 1 to [`crate::limits::MAX_COMPARE_WINDOWS`]. Those outside the region do not exist.
    pub count: u32,
}

impl WindowRange {
    /// Its windows, of which some may be outside the region.
    pub fn windows(self) -> impl Iterator<Item = WindowIndex> {
        let end = self.first.0.saturating_add(self.count);
        (self.first.0..end).map(WindowIndex)
    }

    /// Whether `window` of `region` is one of them.
    #[must_use]
    pub const fn contains(&self, region: RegionId, window: WindowIndex) -> bool {
        let distance = window.0.checked_sub(self.first.0);
        region.0 == self.region.0 && matches!(distance, Some(distance) if distance < self.count)
    }
}

/// What the destination still has of the windows of a `Compare`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    /// Those of which every block was received and is there, ascending. The others have to be sent.
    pub windows: Vec<WindowDigest>,
}

/// A piece of the digests asked for, in the order in which they were asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Digests {
    /// The attempt.
    pub attempt: Attempt,
    /// Digests: BLAKE3 keyed with the migration id (twice, 32 bytes), first 16 bytes, of each window.
    pub windows: Vec<WindowDigest>,
    /// Whether this was the last piece.
    pub last: bool,
}

/// Digest of a window's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowDigest {
    /// The region.
    pub region: RegionId,
    /// The window.
    pub window: WindowIndex,
    /// The digest.
    pub digest: [u8; 16],
}

/// The destination is ready for `Commit`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// The attempt, with this destination's register.
    pub key: AttemptKey,
    /// What the time since `Final` went to, in microseconds.
    pub timing: PrepareTiming,
}

/// Parts of the stopped time at the destination, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrepareTiming {
    /// From `Final` to everything applied.
    pub apply_us: u64,
    /// Digests.
    pub verify_us: u64,
    /// Flush of the disks.
    pub flush_us: u64,
    /// Load of the device state.
    pub load_us: u64,
}

/// Answer of the register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The attempt that was asked for.
    pub key: AttemptKey,
    /// The answer.
    pub verdict: Verdict,
}

/// What the register knows of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// OWNED is durable and the guest was started (or arrives paused).
    Committed {
        /// From `Commit` to OWNED durable, microseconds; 0 on a repeated answer.
        record_us: u64,
        /// From OWNED durable to the guest started, microseconds; 0 on a repeated answer.
        start_us: u64,
    },
    /// ABORTED (or RELINQUISHED) is durable: this side will never run the guest from this attempt.
    Aborted(WireError),
    /// This register has never heard of the attempt: this settles nothing.
    Unknown,
}

/// Blocks of a window: what a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameBlocks {
    /// Blocks present in the frame, zero ones included.
    pub present: WindowBits,
    /// Those that are zero; they take no payload.
    pub zero: WindowBits,
}
