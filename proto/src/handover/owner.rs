//! Who may run a guest, from the journals alone; and whether a new session may be let in.
//!
//! Owns two pure answers: what both records of one host together say (`[HAND-11]`), and what a destination may admit. Invariant:
//! doubt is never answered with "here".

use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, Generation, MigrationId};
use crate::message::Hello;

use super::earlier::EarlierOutcome;
use super::record::{DestinationRecord, DestinationState, SourceRecord, SourceState};

/// What one record says about this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OwnershipClaim {
    /// Another host owns the guest, or this one has no right to it.
    Elsewhere,
    /// Only the destination's register knows.
    InDoubt,
    /// Nothing was committed, but this host may run it only once that is recorded (`[HAND-3]`): an agent may still go on to
    /// commit the attempt.
    NotYet,
    /// This host may run it.
    Here,
}

/// Who may run a guest, as far as this host knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ownership {
    /// The answer.
    pub claim: OwnershipClaim,
    /// Generation that it rests on.
    pub generation: Generation,
    /// Migration that it rests on.
    pub migration: MigrationId,
    /// Attempt that it rests on; 0 if none was opened.
    pub attempt: Attempt,
    /// Name of the record's state.
    pub state: &'static str,
}

impl SourceRecord {
    /// What this record says about this host.
    #[must_use]
    pub const fn claim(&self) -> OwnershipClaim {
        match &self.state {
            SourceState::Copying { .. }
            | SourceState::RolledBack { .. }
            | SourceState::Fenced { .. }
            | SourceState::Ended { .. } => OwnershipClaim::Here,
            SourceState::Pausing { .. } => OwnershipClaim::NotYet,
            SourceState::Committing { .. } => OwnershipClaim::InDoubt,
            SourceState::Released { .. } => OwnershipClaim::Elsewhere,
        }
    }

    /// Whether the migration is not over at this side.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        match &self.state {
            SourceState::Copying { .. }
            | SourceState::Pausing { .. }
            | SourceState::RolledBack { .. }
            | SourceState::Committing { .. } => true,
            SourceState::Released { .. }
            | SourceState::Fenced { .. }
            | SourceState::Ended { .. } => false,
        }
    }

    fn ownership(&self) -> Ownership {
        Ownership {
            claim: self.claim(),
            generation: self.generation,
            migration: self.migration,
            attempt: self.state.attempt(),
            state: self.state.name(),
        }
    }
}

impl DestinationRecord {
    /// What this record says about this host.
    #[must_use]
    pub const fn claim(&self) -> OwnershipClaim {
        match &self.state {
            DestinationState::Owned { .. } => OwnershipClaim::Here,
            DestinationState::Receiving
            | DestinationState::Opened { .. }
            | DestinationState::Aborted { .. }
            | DestinationState::Relinquished { .. }
            | DestinationState::Ended { .. } => OwnershipClaim::Elsewhere,
        }
    }

    fn ownership(&self) -> Ownership {
        Ownership {
            claim: self.claim(),
            generation: self.generation,
            migration: self.migration,
            attempt: self.state.attempt(),
            state: self.state.name(),
        }
    }
}

/// Who may run the guest, from both records of this host: the highest generation counts (`[HAND-11]`). `None` where neither journal
/// knows the guest: no migration has ever concerned it.
///
/// Two records of one generation are the two ends of one migration within this host: then it may run here as soon as
/// either end says so.
#[must_use]
pub fn owner_of_host(
    source: Option<&SourceRecord>,
    destination: Option<&DestinationRecord>,
) -> Option<Ownership> {
    let source = source.map(SourceRecord::ownership);
    let destination = destination.map(DestinationRecord::ownership);
    match (source, destination) {
        (Some(s), Some(d)) => Some(if (s.generation, s.claim) >= (d.generation, d.claim) {
            s
        } else {
            d
        }),
        (s, d) => s.or(d),
    }
}

/// How a `Hello` is let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Admission {
    /// A migration that this host does not know yet: make a new machine; its first record replaces what is there.
    New,
    /// One that it knows: feed `SessionOpened` to its machine.
    Known,
    /// One that a newer migration has replaced: its source may only ask, and is answered by the record (`[HAND-16]`).
    Replaced,
}

/// Whether a `Hello` from `sender` may open a session, given both records of this host.
///
/// # Errors
///
/// The refusal to send. The guest is untouched.
pub fn admit(
    hello: &Hello,
    sender: &str,
    source: Option<&SourceRecord>,
    destination: Option<&DestinationRecord>,
) -> Result<Admission, WireError> {
    if let Some(known) = destination
        && known.migration == hello.migration
    {
        return admit_known(hello, sender, known);
    }
    if let Some(earlier) = destination.and_then(|record| earlier_of(record, hello)) {
        check_sender(&earlier.sender, sender)?;
        return Ok(Admission::Replaced);
    }
    let newest = source
        .map(|record| record.generation)
        .max(destination.map(|record| record.generation));
    if newest.is_some_and(|newest| hello.generation <= newest) {
        return Err(WireError::new(
            ErrorCode::StaleSession,
            format!(
                "generation {} of guest {} is not above what this host has seen: its newest journal has {}",
                hello.generation,
                hello.guest,
                newest.unwrap_or_default()
            ),
        ));
    }
    if source.is_some_and(SourceRecord::is_open) {
        return Err(busy(hello, "it is being migrated away from this host"));
    }
    if let Some(record) = destination {
        check_settled(hello, record)?;
    }
    if let Some(owned) = owner_of_host(source, destination)
        && owned.claim != OwnershipClaim::Elsewhere
    {
        return Err(busy(hello, "this host owns it"));
    }
    Ok(Admission::New)
}

fn admit_known(
    hello: &Hello,
    sender: &str,
    known: &DestinationRecord,
) -> Result<Admission, WireError> {
    check_sender(&known.sender, sender)?;
    if known.guest != hello.guest || known.generation != hello.generation {
        return Err(WireError::new(
            ErrorCode::ProtocolViolation,
            format!(
                "this migration is of guest {} in generation {}, not of {} in generation {}",
                known.guest, known.generation, hello.guest, hello.generation
            ),
        ));
    }
    if hello.session <= known.session {
        return Err(stale_session(hello.session, known.session));
    }
    Ok(Admission::Known)
}

fn earlier_of<'a>(record: &'a DestinationRecord, hello: &Hello) -> Option<&'a EarlierOutcome> {
    record.earlier.iter().find(|earlier| earlier.is_of(hello))
}

fn check_sender(opened_by: &str, sender: &str) -> Result<(), WireError> {
    if opened_by == sender {
        return Ok(());
    }
    Err(WireError::new(
        ErrorCode::NotAuthorized,
        format!("this migration was opened by {opened_by}, not by {sender}"),
    ))
}

/// The refusal of a session whose number was used before.
pub(super) fn stale_session(
    got: crate::ids::SessionNumber,
    last: crate::ids::SessionNumber,
) -> WireError {
    WireError::new(
        ErrorCode::StaleSession,
        format!("session {got} is not above session {last}, the last one of this migration"),
    )
}

fn check_settled(hello: &Hello, record: &DestinationRecord) -> Result<(), WireError> {
    match &record.state {
        // The other source may be in doubt: forgetting the attempt would leave it there for ever.
        DestinationState::Opened { .. } => {
            Err(busy(hello, "an attempt of another migration is undecided"))
        }
        DestinationState::Receiving
        | DestinationState::Owned { .. }
        | DestinationState::Aborted { .. }
        | DestinationState::Relinquished { .. }
        | DestinationState::Ended { .. } => Ok(()),
    }
}

fn busy(hello: &Hello, why: &str) -> WireError {
    WireError::new(
        ErrorCode::GuestBusy,
        format!("guest {} is not free here: {why}", hello.guest),
    )
}
