//! What became of migrations that a newer one of the same guest has replaced in the register (`[HAND-16]`).
//!
//! Owns what is kept of each and the answer about it. A source that lost its last answer may ask long after the guest has moved on
//! and come back: without this its question would be answered with *unknown* for ever. Invariant: only settled outcomes are
//! kept, and an answer never changes.

use serde::{Deserialize, Serialize};

use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, Generation, MigrationId, RegisterId};
use crate::message::{AttemptKey, Hello, Verdict};

use super::record::{DestinationRecord, DestinationState};

/// Most earlier migrations that a register remembers of a guest. Forgetting the oldest is safe, since *unknown* settles nothing; and a source that
/// stays in doubt while its guest moves on sixty-four times is an operator's case in any event.
pub const MAX_EARLIER: usize = 64;

/// The settled outcome of a migration that was replaced.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EarlierOutcome {
    /// The migration.
    pub migration: MigrationId,
    /// Its generation.
    pub generation: Generation,
    /// Identity that opened it: nobody else may ask.
    pub sender: String,
    /// Register that settled it.
    pub register: RegisterId,
    /// Its last attempt; every lower one is aborted.
    pub attempt: Attempt,
    /// Whether that attempt was committed.
    pub committed: bool,
}

impl EarlierOutcome {
    /// What the register says of `key`.
    #[must_use]
    pub fn answer(&self, key: &AttemptKey) -> Verdict {
        let known = key.migration == self.migration
            && key.register == self.register
            && key.attempt > Attempt(0)
            && key.attempt <= self.attempt;
        if !known {
            Verdict::Unknown
        } else if self.committed && key.attempt == self.attempt {
            Verdict::Committed {
                record_us: 0,
                start_us: 0,
            }
        } else {
            Verdict::Aborted(WireError::new(
                ErrorCode::Cancelled,
                "it was settled as aborted before a newer migration of the guest came",
            ))
        }
    }

    pub(super) fn is_of(&self, hello: &Hello) -> bool {
        self.migration == hello.migration
    }
}

impl DestinationRecord {
    /// What the record of the next migration keeps: this one's outcome behind the earlier ones. A migration without an attempt leaves nobody in
    /// doubt; one that is undecided is not replaced.
    #[must_use]
    pub fn outcomes(&self) -> Vec<EarlierOutcome> {
        let mut outcomes = self.earlier.clone();
        outcomes.extend(self.outcome());
        let surplus = outcomes.len().saturating_sub(MAX_EARLIER);
        outcomes.drain(..surplus);
        outcomes
    }

    fn outcome(&self) -> Option<EarlierOutcome> {
        let committed = match &self.state {
            DestinationState::Receiving | DestinationState::Opened { .. } => return None,
            DestinationState::Owned { .. } => true,
            DestinationState::Aborted { .. }
            | DestinationState::Relinquished { .. }
            | DestinationState::Ended { .. } => false,
        };
        let attempt = self.state.attempt();
        (attempt > Attempt(0)).then(|| EarlierOutcome {
            migration: self.migration,
            generation: self.generation,
            sender: self.sender.clone(),
            register: self.register,
            attempt,
            committed,
        })
    }
}
