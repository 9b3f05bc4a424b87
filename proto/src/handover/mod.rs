//! The handover: never two running guests, and nothing lost.
//!
//! Owns the two machines that decide which side may run the guest, their durable records, the outcome
//! register's answers and the right to run a guest as a value. The machines are pure: an event goes in,
//! actions come out, and the agent carries them out in their order and feeds their results back. Invariants are the
//! rules `[HAND-1]` to `[HAND-16]` of `PROTOCOL.md`.
//!
//! How an agent drives one: take the next event (a message, the end of an action, a timer, an operator's wish), call
//! `handle`, carry out what it returns. A `Record` is answered by `Recorded` or `RecordFailed`; no second one
//! is issued before. An event that does not fit the state changes nothing and is returned as [`Unexpected`].

pub mod destination;
mod earlier;
mod journal;
mod owner;
mod permit;
mod record;
pub mod source;

pub use destination::{
    CopyFound, DestinationAction, DestinationEnd, DestinationEvent, DestinationFacts,
    DestinationHandover, DestinationReport,
};
pub use earlier::{EarlierOutcome, MAX_EARLIER};
pub use owner::{Admission, Ownership, OwnershipClaim, admit, owner_of_host};
pub use permit::RunPermit;
pub use record::{
    DestinationRecord, DestinationState, Peer, ProcessRecord, RegisterAnswer, SourceRecord,
    SourceState,
};
pub use source::{
    SourceAction, SourceEnd, SourceEvent, SourceFacts, SourceHandover, SourceReport, Timer,
    back_off,
};

/// An event that does not fit the state of a machine. The machine is as it was.
///
/// After a message of the peer it is the peer's violation: the agent closes the session with `protocol-violation`.
/// After anything else it is a bug of the agent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {machine} handover is in state {state} and expects {expected}, but got {got}")]
pub struct Unexpected {
    /// `source` or `destination`.
    pub machine: &'static str,
    /// Name of the state.
    pub state: &'static str,
    /// What it would have taken.
    pub expected: &'static str,
    /// What came.
    pub got: String,
}

#[cfg(test)]
mod destination_tests;
#[cfg(test)]
mod owner_tests;
#[cfg(test)]
mod source_tests;
#[cfg(test)]
mod table_tests;
#[cfg(test)]
mod testing;
