//! The durable records of the handover: what each agent finds in its journal after a restart.
//!
//! Owns their content and the outcome register's answer. It does not own their bytes: the journal frames,
//! sums and versions them. Invariant: one record per guest and side, replaced as a whole, so that the newest
//! durable one says by itself which side may run the guest.

use serde::{Deserialize, Serialize};

use crate::error::WireError;
use crate::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use crate::message::{AttemptKey, Verdict};
use crate::spec::RunState;

use super::earlier::EarlierOutcome;

/// A hypervisor process, so named that another one with the same pid is not taken for it (`[HAND-7]`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
    /// Boot id of the kernel that ran it.
    pub boot_id: String,
}

/// The other agent.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Peer {
    /// Address and port as the administrator gave them, for the next connection.
    pub address: String,
    /// Name in its certificate.
    pub identity: String,
}

/// What the source's journal holds of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceRecord {
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its ownership generation (`[HAND-11]`).
    pub generation: Generation,
    /// Highest session number that was used or may have been.
    pub session: SessionNumber,
    /// The destination.
    pub peer: Peer,
    /// The guest's process at this side.
    pub process: ProcessRecord,
    /// Whether a disk is shared with the destination: then the guest never resumes here by an operator's word (`[HAND-9]`).
    pub shared_disks: bool,
    /// State of the guest before the pause of the last attempt: what a rollback brings it back to.
    pub run_state_before: RunState,
    /// How far the handover is.
    pub state: SourceState,
}

/// How far the handover is at the source.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SourceState {
    /// The guest is as its users left it; no attempt is open.
    Copying {
        /// Last attempt that was opened; 0 before the first.
        last: Attempt,
    },
    /// Written before the pause: the guest may be paused by this attempt.
    Pausing {
        /// The attempt.
        attempt: Attempt,
    },
    /// The destination is prepared and may have been told to commit: in doubt until its register answers (`[HAND-4]`).
    Committing {
        /// The attempt and the register whose answer counts.
        key: AttemptKey,
    },
    /// This attempt will never be committed: the guest goes on here (`[HAND-3]`).
    RolledBack {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// The destination owns the guest: this side's copy is let go.
    Released {
        /// The attempt.
        key: AttemptKey,
    },
    /// An operator vouched that the destination is fenced (`[HAND-9]`).
    Fenced {
        /// The attempt that was in doubt.
        key: AttemptKey,
    },
    /// The migration ended without a commit: the guest is as its users left it.
    Ended {
        /// Last attempt that was opened; 0 if none.
        last: Attempt,
        /// Why.
        reason: WireError,
    },
}

/// What the destination's journal holds of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DestinationRecord {
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its ownership generation (`[HAND-11]`).
    pub generation: Generation,
    /// Highest session number that was accepted.
    pub session: SessionNumber,
    /// Certificate identity that opened the migration: nobody else may continue it.
    pub sender: String,
    /// The register of the state folder that this record lives in (`[HAND-2]`).
    pub register: RegisterId,
    /// The process that holds the copy, once there is one.
    pub process: Option<ProcessRecord>,
    /// How far the handover is.
    pub state: DestinationState,
    /// Outcomes of migrations of this guest before this one, oldest first (`[HAND-16]`).
    pub earlier: Vec<EarlierOutcome>,
}

/// How far the handover is at the destination: the outcome register's content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DestinationState {
    /// No attempt was opened yet.
    Receiving,
    /// This attempt may be committed; it is undecided. Every lower one is aborted.
    Opened {
        /// The attempt.
        attempt: Attempt,
    },
    /// This side owns the guest from this attempt on.
    Owned {
        /// The attempt.
        attempt: Attempt,
        /// State in which the guest arrives.
        to: RunState,
        /// Whether the start is known to have been answered: a guest that its users paused since is then left alone.
        started: bool,
    },
    /// This side will never run the guest from this attempt.
    Aborted {
        /// The attempt.
        attempt: Attempt,
        /// Why.
        reason: WireError,
    },
    /// Owned for a moment, but the guest provably never ran and never will from this attempt (`[HAND-6]`).
    Relinquished {
        /// The attempt.
        attempt: Attempt,
        /// Why it did not start.
        reason: WireError,
    },
    /// The migration ended without a commit; what was made for it here is discarded.
    Ended {
        /// Last attempt that was opened; 0 if none. It and every lower one are aborted.
        last: Attempt,
        /// Why.
        reason: WireError,
    },
}

/// What the register says of an attempt (`[HAND-2]`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterAnswer {
    /// It is settled.
    Settled(Verdict),
    /// It is the open one and undecided: a query settles it as aborted, a commit as owned.
    Undecided,
}

impl DestinationRecord {
    /// What this record, taken as durable, says of `key`.
    ///
    /// A lower attempt than the opened one is aborted, since an attempt is opened only when the one before
    /// is settled. A higher one, an unknown migration's or another register's is unknown, which settles nothing.
    #[must_use]
    pub fn answer(&self, key: &AttemptKey) -> RegisterAnswer {
        let known = self.state.attempt();
        if key.migration != self.migration {
            let earlier = self.earlier.iter().find(|it| it.migration == key.migration);
            let verdict = earlier.map_or(Verdict::Unknown, |earlier| earlier.answer(key));
            return RegisterAnswer::Settled(verdict);
        }
        if key.register != self.register || key.attempt > known || key.attempt == Attempt(0) {
            return RegisterAnswer::Settled(Verdict::Unknown);
        }
        if key.attempt < known {
            return RegisterAnswer::Settled(Verdict::Aborted(superseded(known)));
        }
        match &self.state {
            DestinationState::Receiving => RegisterAnswer::Settled(Verdict::Unknown),
            DestinationState::Opened { .. } => RegisterAnswer::Undecided,
            DestinationState::Owned { .. } => RegisterAnswer::Settled(Verdict::Committed {
                record_us: 0,
                start_us: 0,
            }),
            DestinationState::Aborted { reason, .. }
            | DestinationState::Relinquished { reason, .. }
            | DestinationState::Ended { reason, .. } => {
                RegisterAnswer::Settled(Verdict::Aborted(reason.clone()))
            }
        }
    }

    /// The key under which the open or last attempt is asked for.
    #[must_use]
    pub const fn key(&self) -> AttemptKey {
        AttemptKey {
            migration: self.migration,
            attempt: self.state.attempt(),
            register: self.register,
        }
    }
}

fn superseded(by: Attempt) -> WireError {
    WireError::new(
        crate::error::ErrorCode::Cancelled,
        format!("the attempt was settled as aborted before attempt {by} was opened"),
    )
}

impl DestinationState {
    /// The last attempt that was opened; 0 if none.
    #[must_use]
    pub const fn attempt(&self) -> Attempt {
        match self {
            Self::Receiving => Attempt(0),
            Self::Opened { attempt }
            | Self::Owned { attempt, .. }
            | Self::Aborted { attempt, .. }
            | Self::Relinquished { attempt, .. }
            | Self::Ended { last: attempt, .. } => *attempt,
        }
    }

    /// The name that people see.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Receiving => "RECEIVING",
            Self::Opened { .. } => "OPENED",
            Self::Owned { .. } => "OWNED",
            Self::Aborted { .. } => "ABORTED",
            Self::Relinquished { .. } => "RELINQUISHED",
            Self::Ended { .. } => "ENDED",
        }
    }
}

impl SourceState {
    /// The last attempt that was opened; 0 if none.
    #[must_use]
    pub const fn attempt(&self) -> Attempt {
        match self {
            Self::Pausing { attempt } | Self::RolledBack { attempt, .. } => *attempt,
            Self::Committing { key } | Self::Released { key } | Self::Fenced { key } => key.attempt,
            Self::Copying { last } | Self::Ended { last, .. } => *last,
        }
    }

    /// The name that people see.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Copying { .. } => "COPYING",
            Self::Pausing { .. } => "PAUSING",
            Self::Committing { .. } => "COMMITTING",
            Self::RolledBack { .. } => "ROLLED_BACK",
            Self::Released { .. } => "RELEASED",
            Self::Fenced { .. } => "FENCED",
            Self::Ended { .. } => "ENDED",
        }
    }
}
