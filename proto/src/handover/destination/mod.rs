//! The destination's half of the handover: what it is told, what it wants done.
//!
//! Owns the events and actions; `machine` owns the transitions. Its state is the outcome register (`[HAND-2]`): the machine lives as
//! long as anybody may ask about the migration.
//!
//! ```text
//! RECEIVING -> OPENING -> OPENED -> LOADING -> PREPARED -- Commit --> OWNING -> STARTING -> OWNED
//!     |           |          |         |          |                     | not visible   | never ran
//!     |           '----------'---------'----------'--> ABORTING <-------'         RELINQUISHING
//!     |                                                   v                              |
//!     '------------------------> ENDING -> ENDED <---- SETTLED <-------------------------'
//! ```

mod copy;
mod machine;
mod register;
mod state;

use crate::error::WireError;
use crate::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use crate::message::{AttemptKey, PrepareTiming, ToSource};
use crate::spec::RunState;

use super::earlier::EarlierOutcome;
use super::permit::RunPermit;
use super::record::{DestinationRecord, ProcessRecord};

pub use machine::DestinationHandover;

/// What does not change during a migration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationFacts {
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its ownership generation (`[HAND-11]`).
    pub generation: Generation,
    /// Certificate identity that opened it.
    pub sender: String,
    /// Register of this state folder (`[HAND-2]`).
    pub register: RegisterId,
    /// [`DestinationRecord::outcomes`] of the record that the migration's first one replaces (`[HAND-16]`).
    pub earlier: Vec<EarlierOutcome>,
}

/// What is found of the copy after a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CopyFound {
    /// Nothing: there was none, or its process is gone.
    Missing,
    /// It still takes content: no device state was ever given to it.
    Receiving,
    /// It was given device state, or this is not known: it is used up.
    Used,
}

/// What the destination's machine is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationEvent {
    /// A `Hello` that [`super::admit`] let in; every older session of the migration is stopped and drained.
    SessionOpened {
        /// Its number.
        session: SessionNumber,
    },
    /// The session is over.
    ConnectionLost,
    /// An `Offer` that fits this host: the source copies, so it is not in doubt.
    Offered,
    /// The process that is to hold the copy is there, and becomes its hypervisor only when a durable record names it
    /// ([`DestinationHandover::names`]).
    CopyLaunched {
        /// The process.
        process: ProcessRecord,
    },
    /// [`DestinationAction::MakeCopy`] is done.
    CopyMade {
        /// The process that holds it.
        process: ProcessRecord,
    },
    /// It failed: the migration cannot succeed here.
    MakeCopyFailed {
        /// Why.
        reason: WireError,
    },
    /// The copy's process is gone.
    CopyLost {
        /// What is known.
        reason: WireError,
    },
    /// The peer's `OpenAttempt`.
    OpenAttempt {
        /// The attempt.
        attempt: Attempt,
    },
    /// Everything of the attempt is here: complete, digests agreed, device state whole and its digest right.
    StateReceived {
        /// The attempt.
        attempt: Attempt,
        /// State in which the guest is to arrive, from `Final`.
        to: RunState,
    },
    /// [`DestinationAction::LoadState`] is done and the guest is seen to stand still.
    StateLoaded {
        /// Parts of the time, for `Prepared`.
        timing: PrepareTiming,
    },
    /// It failed.
    LoadFailed {
        /// Why.
        reason: WireError,
    },
    /// Something of this attempt failed here before `Prepared` or after: a hook's veto, a full disk, a wrong digest.
    AttemptFailed {
        /// Why.
        reason: WireError,
    },
    /// The peer's `Commit`.
    Commit(AttemptKey),
    /// The peer's `Query`.
    Query(AttemptKey),
    /// The peer's `Abort`.
    Abort {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The peer's `Cancel`.
    Cancel {
        /// Why.
        reason: WireError,
    },
    /// The record in flight is durable.
    Recorded,
    /// The record in flight could not be made durable.
    RecordFailed {
        /// Whether a restart may find it: false only if the failure was before the rename.
        visible: bool,
        /// Why.
        reason: WireError,
    },
    /// [`DestinationAction::Start`] is done: the guest runs, or stands paused as it is to arrive.
    Started {
        /// From `Commit` to OWNED durable, microseconds.
        record_us: u64,
        /// From there to the guest started, microseconds.
        start_us: u64,
    },
    /// It failed.
    StartFailed {
        /// Whether the guest provably never ran (`[HAND-6]`).
        never_ran: bool,
        /// Why.
        reason: WireError,
    },
    /// [`DestinationAction::Discard`] is done.
    Discarded,
    /// It failed; may be tried again.
    DiscardFailed {
        /// Why.
        reason: WireError,
    },
    /// End the migration from this side: nobody came back for it, or an administrator says so. Not possible once owned.
    GiveUp {
        /// Why.
        reason: WireError,
    },
    /// Time to try again what failed here: a record, a start, a discard.
    Retry,
}

/// What the destination's machine wants done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum DestinationAction {
    /// Make this the durable record of the guest. Answered by `Recorded` or `RecordFailed`.
    Record(Box<DestinationRecord>),
    /// Answer `Hello` with `Welcome`.
    Welcome {
        /// The session, durable now.
        session: SessionNumber,
    },
    /// Send `Error` with this and close the session.
    Refuse(WireError),
    /// Make the copy that takes the guest's content. Answered by `CopyMade` or `MakeCopyFailed`.
    MakeCopy {
        /// Whether one that is used up is replaced: memory from zero, disks kept.
        renew: bool,
    },
    /// Answer `Offer` with `Ready`.
    Ready,
    /// Send this on the session, if it is still there.
    Send(ToSource),
    /// Flush, then load the device state that was received. Answered by `StateLoaded` or `LoadFailed`.
    LoadState {
        /// The attempt.
        attempt: Attempt,
    },
    /// Start the guest, or leave it paused where `to` says so. Answered by `Started` or `StartFailed`.
    Start {
        /// The right to.
        permit: RunPermit,
        /// State in which it arrives.
        to: RunState,
    },
    /// Remove the copy and what was made for it; never a disk image. Answered by `Discarded` or `DiscardFailed`.
    Discard,
    /// Something failed that `Retry` repeats: feed it after a while.
    RetryLater,
    /// Something that people should know.
    Report(DestinationReport),
    /// The handover is settled here. The machine goes on answering questions.
    Done(DestinationEnd),
}

/// What people should know.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DestinationReport {
    /// The journal cannot be written: nothing is answered until it can.
    JournalFailed {
        /// Why.
        reason: WireError,
    },
    /// The attempt is settled as aborted.
    Aborted {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// This side owns the guest, but whether it runs is not known: an ordinary crash of that guest, whose disks are here and
    /// flushed (`[HAND-6]`).
    StartUncertain {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The copy could not be removed.
    DiscardFailed {
        /// Why.
        reason: WireError,
    },
    /// This side owns the guest: the migration cannot be ended any more.
    TooLateToGiveUp,
}

/// How a migration ended at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DestinationEnd {
    /// The guest is owned here and started.
    Owned {
        /// The attempt.
        attempt: Attempt,
    },
    /// Nothing of it is left here but the images.
    Ended {
        /// Why.
        reason: WireError,
    },
}
