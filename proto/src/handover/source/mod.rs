//! The source's half of the handover: what it is told, what it wants done.
//!
//! Owns the events and actions; `machine` owns the transitions. The machine lives as long as the migration, over any number of
//! sessions and attempts.
//!
//! ```text
//! COPYING -> OPENING -> RECORDING-PAUSING -> PAUSING -> STREAMING -> AWAITING-PREPARED -> CHECKING
//!    ^          '-----------'------------------'-----------'--------------'-----------------'
//!    |                                         | any failure [HAND-3]                        v
//!    '------------------------------------- UNWINDING <--- ABORTED --- IN-DOUBT <--- RECORDING-COMMITTING
//!                                                                          '-- COMMITTED --> RELEASING -> DONE
//! ```

mod attempt;
mod doubt;
mod machine;
mod state;
mod unwind;

use std::time::Duration;

use crate::error::WireError;
use crate::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use crate::message::{AttemptKey, Outcome, ToDestination};
use crate::spec::RunState;

use super::permit::RunPermit;
use super::record::{Peer, ProcessRecord, SourceRecord};

pub use machine::SourceHandover;

/// What does not change during a migration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceFacts {
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its ownership generation: above every one in the journals of this host (`[HAND-11]`).
    pub generation: Generation,
    /// The destination.
    pub peer: Peer,
    /// The guest's process.
    pub process: ProcessRecord,
    /// Whether a disk is shared with the destination (`[HAND-9]`).
    pub shared_disks: bool,
}

/// What the source's machine is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceEvent {
    /// A session is wanted. Answered by [`SourceAction::Connect`] once its number is durable.
    ConnectWanted,
    /// `Welcome` was read on the session that was asked for.
    Connected {
        /// Register that the destination named.
        register: RegisterId,
    },
    /// The connection could not be made, was lost, or the peer sent `Error`.
    ConnectionLost {
        /// Why.
        reason: WireError,
    },
    /// Cut over now: legal while copying with a session.
    BeginCutover {
        /// State of the guest, asked for right now.
        run_state: RunState,
    },
    /// The peer's `AttemptOpened`.
    AttemptOpened {
        /// The attempt.
        attempt: Attempt,
    },
    /// The pause that [`SourceAction::PauseGuest`] asked for is confirmed.
    GuestPaused {
        /// State before it.
        before: RunState,
    },
    /// That pause failed.
    PauseFailed {
        /// State before it; `None` means that nothing was done to the guest.
        before: Option<RunState>,
        /// Why.
        reason: WireError,
    },
    /// Last blocks, `Final`, digests and device state are sent; what remains is the answer.
    FinalSent {
        /// The attempt.
        attempt: Attempt,
    },
    /// The last copy failed at this side, or the digests differ.
    StreamFailed {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The peer's `Prepared`.
    Prepared {
        /// The attempt and the register that will answer for it.
        key: AttemptKey,
    },
    /// The guest is still as this attempt paused it: answer to [`SourceAction::CheckPaused`]. A hook's veto is
    /// [`AbortAttempt`](Self::AbortAttempt) instead.
    StillPaused {
        /// The attempt.
        attempt: Attempt,
    },
    /// Somebody resumed, reset or shut down the paused guest (`[HAND-10]`), or it is gone.
    GuestTouched {
        /// What happened.
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
    /// The peer's `Outcome`.
    Outcome(Outcome),
    /// The guest is back in the state that [`SourceAction::Resume`] named.
    Resumed,
    /// It could not be brought back; may be tried again.
    ResumeFailed {
        /// Why.
        reason: WireError,
    },
    /// The guest's process is gone, so there is nothing to bring back: the other answer to [`SourceAction::Resume`]. The guest may be
    /// booted here all the same.
    GuestGone,
    /// The copy at this side is let go.
    Released,
    /// It could not be let go; may be tried again.
    ReleaseFailed {
        /// Why.
        reason: WireError,
    },
    /// [`SourceAction::EndGuest`] is done.
    GuestEnded,
    /// [`SourceAction::EndGuest`] failed; may be tried again.
    EndGuestFailed {
        /// Why.
        reason: WireError,
    },
    /// The peer's `Cancelled`.
    Cancelled,
    /// A timer ran out. One that is no longer of interest is ignored.
    TimedOut(Timer),
    /// Give up this attempt, but not the migration.
    AbortAttempt {
        /// Why.
        reason: WireError,
    },
    /// End the migration: somebody cancelled, or it cannot succeed. Before COMMITTING the guest goes on here; in doubt the
    /// destination is asked (`[HAND-4]`).
    Cancel {
        /// Why.
        reason: WireError,
    },
    /// An operator vouches that the destination is lost for good (`[HAND-9]`).
    ResolveDestinationFenced,
}

/// What the source's machine wants done, in this order.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Make this the durable record of the guest. Answered by `Recorded` or `RecordFailed`.
    Record(Box<SourceRecord>),
    /// Open a session with this number. Answered by `Connected` or `ConnectionLost`. In doubt the session carries
    /// only Commit, Query and their answers: no `Offer`.
    Connect {
        /// Number for `Hello`.
        session: SessionNumber,
    },
    /// Send this on the session, if it is still there.
    Send(ToDestination),
    /// Pause the guest. Answered by `GuestPaused` or `PauseFailed`.
    PauseGuest {
        /// The attempt.
        attempt: Attempt,
    },
    /// Send the last blocks, `Final` and the device state. Answered by `FinalSent` or `StreamFailed`.
    StreamFinal {
        /// The attempt.
        attempt: Attempt,
        /// State that the guest is to arrive in.
        run_state: RunState,
    },
    /// Stop what `StreamFinal` began; blocks not acknowledged are dirty again.
    StopStream,
    /// Ask the hypervisor whether the guest is still as it was paused and run the hooks that may veto the commit. Answered by
    /// `StillPaused`, `GuestTouched` or `AbortAttempt`.
    CheckPaused {
        /// The attempt.
        attempt: Attempt,
    },
    /// Bring the guest back. Answered by `Resumed`, `GuestGone` or `ResumeFailed`.
    Resume {
        /// The right to.
        permit: RunPermit,
        /// The state to bring it back to.
        to: RunState,
    },
    /// Let the guest's copy go: the destination owns it. Answered by `Released` or `ReleaseFailed`.
    Release,
    /// End the guest's process without a successor: its shared disks may have been written by a destination that
    /// is now fenced (`[HAND-9]`). Answered by `GuestEnded` or `EndGuestFailed`.
    EndGuest,
    /// Start this timer, replacing an equal kind that runs.
    StartTimer(Timer),
    /// Close the session in good order, after what was sent.
    CloseSession,
    /// Something that people should know.
    Report(SourceReport),
    /// The migration is over at this side.
    Done(SourceEnd),
}

/// A timer of the source. The agent owns the durations, but for [`back_off`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timer {
    /// `AttemptOpened` is overdue.
    Open(Attempt),
    /// The pause takes longer than `--pause-timeout`.
    Pause(Attempt),
    /// In doubt for long enough: ask rather than commit.
    Doubt(Attempt),
    /// Time to connect again, after so many failures: [`back_off`] says when.
    BackOff {
        /// Failures so far.
        failures: u8,
    },
    /// Time to try again what failed here: a record, a resume, a release.
    Retry,
    /// `Cancelled` is overdue.
    Cancel,
}

/// How long to wait before connecting again after `failures` failures in doubt: 100 ms doubled each time, at most 5 s,
/// since a guest stands still meanwhile.
#[must_use]
pub fn back_off(failures: u8) -> Duration {
    let doublings = u32::from(failures.saturating_sub(1)).min(6);
    Duration::from_millis(100 << doublings).min(Duration::from_secs(5))
}

/// What people should know.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceReport {
    /// The attempt is rolled back and the guest is as before; another may be tried.
    RolledBack {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The journal cannot be written. Where `guest_stays_paused`, the guest waits for it (`[HAND-3]`).
    JournalFailed {
        /// Whether the guest stands still because of it.
        guest_stays_paused: bool,
        /// Why.
        reason: WireError,
    },
    /// The guest may go on here but could not be brought back.
    ResumeFailed {
        /// Why.
        reason: WireError,
    },
    /// The guest waits, paused, for the destination's answer (`[HAND-4]`).
    InDoubt {
        /// The attempt.
        key: AttemptKey,
    },
    /// The destination's register has never heard of the attempt: this settles nothing (`[HAND-2]`).
    UnknownToDestination {
        /// The attempt.
        key: AttemptKey,
    },
    /// The destination answers from another register than the one that prepared: this settles nothing (`[HAND-2]`).
    OtherRegister {
        /// The register that answers now.
        register: RegisterId,
    },
    /// Somebody touched the guest while its outcome was in doubt: only the register can settle that now.
    TouchedInDoubt {
        /// What happened.
        reason: WireError,
    },
    /// The destination owns the guest, but the copy here could not be let go.
    ReleaseFailed {
        /// Why.
        reason: WireError,
    },
    /// A cancel came when the destination already owned the guest.
    TooLateToCancel,
    /// An operator's word brings the guest back, or ends it where disks are shared (`[HAND-9]`).
    ResolvedByOperator {
        /// The attempt that was in doubt.
        key: AttemptKey,
        /// Whether the guest is ended instead of resumed.
        guest_is_ended: bool,
    },
}

/// How a migration ended at the source.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SourceEnd {
    /// The destination owns the guest.
    Committed,
    /// The guest is here, as its users left it.
    NotCommitted {
        /// Why.
        reason: WireError,
        /// Whether the destination has confirmed that it cleaned up.
        peer_told: bool,
    },
    /// Resumed on an operator's word.
    ResumedByOperator,
    /// The guest is this host's on an operator's word and is not running, because of shared disks or since its process was gone
    /// before: boot it afresh.
    EndedByOperator,
}
