//! The destination's machine: dispatch of events, sessions, the copy, and the wish that is written to the journal.
//!
//! `register` owns attempts and the answers about them. Invariant: the only place that makes a `RunPermit` is the
//! transition behind a durable OWNED (`[HAND-3]`).

use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, RegisterId, SessionNumber};
use crate::message::{AttemptKey, ToSource};

use super::super::Unexpected;
use super::super::journal::Journal;
use super::super::owner::stale_session;
use super::super::record::{DestinationRecord, DestinationState, ProcessRecord};
use super::state::{GuestCopy, Link, State, Step};
use super::{CopyFound, DestinationAction, DestinationEvent, DestinationFacts, DestinationReport};

pub(super) type Actions = Vec<DestinationAction>;

/// The destination's half of the handover, and the outcome register of one migration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationHandover {
    pub(super) facts: DestinationFacts,
    pub(super) session: SessionNumber,
    pub(super) process: Option<ProcessRecord>,
    pub(super) copy: GuestCopy,
    pub(super) link: Link,
    pub(super) state: State,
    pub(super) journal: Journal<DestinationRecord>,
}

impl DestinationHandover {
    /// A migration that [`super::super::admit`] called new. Its first record is written with its first session.
    #[must_use]
    pub const fn new(facts: DestinationFacts) -> Self {
        Self {
            facts,
            session: SessionNumber(0),
            process: None,
            copy: GuestCopy::Missing,
            link: Link::Down,
            state: State::Receiving,
            journal: Journal::unwritten(),
        }
    }

    /// Goes on from what the journal says after a restart (`[HAND-7]`).
    ///
    /// What was read may be visible without being durable, so it is written again before anything is done on its strength. Whether the
    /// process of the record still lives is for the agent to find out when it carries out `Start` or `Discard`.
    #[must_use]
    pub fn recover(record: DestinationRecord, copy: CopyFound) -> (Self, Vec<DestinationAction>) {
        let mut machine = Self {
            facts: DestinationFacts {
                guest: record.guest,
                migration: record.migration,
                generation: record.generation,
                sender: record.sender,
                register: record.register,
                earlier: record.earlier,
            },
            session: record.session,
            process: record.process,
            copy: match copy {
                CopyFound::Missing => GuestCopy::Missing,
                CopyFound::Receiving => GuestCopy::Receiving,
                CopyFound::Used => GuestCopy::Used,
            },
            link: Link::Down,
            state: recovered_state(record.state),
            journal: Journal::unwritten(),
        };
        let mut actions = Vec::new();
        machine.pump(&mut actions);
        (machine, actions)
    }

    /// Feeds one event. An error changes nothing.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] where the event does not fit the state; repeated questions and late results are not errors.
    pub fn handle(
        &mut self,
        event: DestinationEvent,
    ) -> Result<Vec<DestinationAction>, Unexpected> {
        let mut actions = Vec::new();
        let mut next = self.clone();
        next.apply(event, &mut actions)?;
        next.pump(&mut actions);
        *self = next;
        Ok(actions)
    }

    fn apply(&mut self, event: DestinationEvent, actions: &mut Actions) -> Result<(), Unexpected> {
        match event {
            DestinationEvent::SessionOpened { session } => self.on_session(session, actions),
            DestinationEvent::ConnectionLost => self.link = Link::Down,
            DestinationEvent::Offered => return self.on_offered(actions),
            DestinationEvent::CopyLaunched { process } => return self.on_copy_launched(process),
            DestinationEvent::CopyMade { process } => return self.on_copy_made(process, actions),
            DestinationEvent::MakeCopyFailed { reason } => {
                return self.on_make_copy_failed(reason, actions);
            }
            DestinationEvent::CopyLost { reason } => self.on_copy_lost(reason),
            DestinationEvent::OpenAttempt { attempt } => {
                return self.on_open_attempt(attempt, actions);
            }
            DestinationEvent::StateReceived { attempt, to } => {
                return self.on_state_received(attempt, to, actions);
            }
            DestinationEvent::StateLoaded { timing } => {
                return self.on_state_loaded(timing, actions);
            }
            DestinationEvent::LoadFailed { reason } => return self.on_load_failed(reason, actions),
            DestinationEvent::AttemptFailed { reason } => self.abort_undecided(reason),
            DestinationEvent::Commit(key) => self.on_commit(key, actions),
            DestinationEvent::Query(key) => self.on_query(key, actions),
            DestinationEvent::Abort { attempt, reason } => self.on_abort(attempt, reason, actions),
            DestinationEvent::Cancel { reason } => self.on_end(reason, true, actions),
            DestinationEvent::GiveUp { reason } => self.on_end(reason, false, actions),
            DestinationEvent::Recorded => return self.on_recorded(actions),
            DestinationEvent::RecordFailed { visible, reason } => {
                return self.on_record_failed(visible, reason, actions);
            }
            DestinationEvent::Started {
                record_us,
                start_us,
            } => return self.on_started(record_us, start_us, actions),
            DestinationEvent::StartFailed { never_ran, reason } => {
                return self.on_start_failed(never_ran, reason, actions);
            }
            DestinationEvent::Discarded => return self.on_discarded(actions),
            DestinationEvent::DiscardFailed { reason } => {
                return self.on_discard_failed(reason, actions);
            }
            DestinationEvent::Retry => self.on_retry(actions),
        }
        Ok(())
    }

    /// What the journal should hold now.
    #[must_use]
    pub fn record(&self) -> DestinationRecord {
        DestinationRecord {
            guest: self.facts.guest.clone(),
            migration: self.facts.migration,
            generation: self.facts.generation,
            session: self.session,
            sender: self.facts.sender.clone(),
            register: self.facts.register,
            process: self.process.clone(),
            state: self.state.wanted(),
            earlier: self.facts.earlier.clone(),
        }
    }

    /// Name of the state, for logs and the transition table.
    #[must_use]
    pub const fn state_name(&self) -> &'static str {
        self.state.name()
    }

    /// Last attempt that was opened; 0 if none.
    #[must_use]
    pub const fn attempt(&self) -> Attempt {
        self.state.attempt()
    }

    /// Number of the newest session.
    #[must_use]
    pub const fn session(&self) -> SessionNumber {
        self.session
    }

    /// The register that answers here.
    #[must_use]
    pub const fn register(&self) -> RegisterId {
        self.facts.register
    }

    /// Whether this side owns the guest, or may: OWNED is durable or on its way.
    #[must_use]
    pub const fn is_owned(&self) -> bool {
        matches!(
            self.state,
            State::Owning { .. } | State::Starting { .. } | State::Owned { .. }
        )
    }

    /// Whether OWNED or the start is on its way: nobody may leave in the middle of that.
    #[must_use]
    pub const fn is_starting(&self) -> bool {
        matches!(self.state, State::Owning { .. } | State::Starting { .. })
    }

    /// Whether a durable record names `process` as the one that holds the copy.
    #[must_use]
    pub fn names(&self, process: &ProcessRecord) -> bool {
        let durable = self.journal.durable();
        durable.is_some_and(|record| record.process.as_ref() == Some(process))
    }

    /// Whether the migration ended here without a commit and nothing is left of it.
    #[must_use]
    pub const fn is_ended(&self) -> bool {
        matches!(self.state, State::Ended { .. })
    }

    pub(super) fn unexpected<T>(&self, got: impl Into<String>) -> Result<T, Unexpected> {
        Err(Unexpected {
            machine: "destination",
            state: self.state.name(),
            expected: self.state.expects(),
            got: got.into(),
        })
    }

    /// Whether `Welcome` was sent on the session that is open.
    pub(super) const fn is_up(&self) -> bool {
        matches!(self.link, Link::Welcomed | Link::Offered | Link::Ready)
    }

    pub(super) fn send(&self, message: ToSource, actions: &mut Actions) {
        if self.is_up() {
            actions.push(DestinationAction::Send(message));
        }
    }

    pub(super) const fn key_of(&self, attempt: Attempt) -> AttemptKey {
        AttemptKey {
            migration: self.facts.migration,
            attempt,
            register: self.facts.register,
        }
    }

    /// Hands the wish to the journal where it differs from what is durable. A new migration writes nothing before its
    /// first session.
    fn pump(&mut self, actions: &mut Actions) {
        if self.session == SessionNumber(0) {
            return;
        }
        if let Some(record) = self.journal.next_write(self.record()) {
            actions.push(DestinationAction::Record(Box::new(record)));
        }
    }

    fn on_session(&mut self, session: SessionNumber, actions: &mut Actions) {
        if session <= self.session {
            actions.push(DestinationAction::Refuse(stale_session(
                session,
                self.session,
            )));
            return;
        }
        self.session = session;
        self.link = Link::Numbering;
    }

    fn on_recorded(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        if !self.journal.on_recorded() {
            return self.unexpected("Recorded");
        }
        let session = self.journal.durable().map(|record| record.session);
        if self.link == Link::Numbering && session == Some(self.session) {
            self.link = Link::Welcomed;
            actions.push(DestinationAction::Welcome {
                session: self.session,
            });
        }
        if self.journal.durable().map(|record| &record.state) == Some(&self.state.wanted()) {
            self.on_durable(actions);
        }
        self.advance_offer(actions);
        Ok(())
    }

    fn on_record_failed(
        &mut self,
        visible: bool,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let Some(failed) = self.journal.on_failed(visible) else {
            return self.unexpected("RecordFailed");
        };
        actions.push(DestinationAction::Report(
            DestinationReport::JournalFailed {
                reason: reason.clone(),
            },
        ));
        if self.link == Link::Numbering && failed.session == self.session {
            self.link = Link::Down;
            actions.push(DestinationAction::Refuse(reason.clone()));
        }
        if self.link == Link::Offered && failed.process == self.process {
            self.link = Link::Down;
            actions.push(DestinationAction::Refuse(reason.clone()));
        }
        self.after_failed_record(&failed.state, visible, reason, actions);
        Ok(())
    }

    fn after_failed_record(
        &mut self,
        failed: &DestinationState,
        visible: bool,
        reason: WireError,
        actions: &mut Actions,
    ) {
        match &self.state {
            // Not durable, so not open: settled as aborted, which the source learns when that is durable.
            State::Opening { .. } => self.abort_undecided(reason),
            State::Owning {
                attempt,
                fresh: true,
                ..
            } if !visible && self.journal.durable().is_some() && is_owned(failed) => {
                let attempt = *attempt;
                self.begin_abort(attempt, reason, None);
            }
            // From the rename on (of this write or an earlier one) a failed OWNED may be found by a restart: it is repeated until it is durable.
            State::Owning { .. }
            | State::Aborting { .. }
            | State::Relinquishing { .. }
            | State::Ending { .. } => actions.push(DestinationAction::RetryLater),
            State::Receiving
            | State::Opened { .. }
            | State::Loading { .. }
            | State::Prepared { .. }
            | State::Starting { .. }
            | State::Owned { .. }
            | State::Settled { .. }
            | State::Ended { .. } => {}
        }
    }

    pub(super) fn on_retry(&mut self, actions: &mut Actions) {
        self.journal.release_hold();
        self.continue_ending(actions);
        self.retry_start(actions);
    }
}

const fn is_owned(state: &DestinationState) -> bool {
    matches!(state, DestinationState::Owned { .. })
}

/// `[HAND-7]`: what each record leads to after a restart.
fn recovered_state(record: DestinationState) -> State {
    match record {
        DestinationState::Receiving => State::Receiving,
        DestinationState::Opened { attempt } => State::Aborting {
            attempt,
            reason: WireError::new(
                ErrorCode::ShuttingDown,
                "the destination agent was restarted before the commit",
            ),
            then_open: None,
        },
        DestinationState::Owned {
            attempt,
            to,
            started: false,
        } => State::Owning {
            attempt,
            to,
            fresh: false,
        },
        DestinationState::Owned {
            attempt,
            to,
            started: true,
        } => State::Owned {
            attempt,
            to,
            started: true,
        },
        DestinationState::Aborted { attempt, reason } => State::Aborting {
            attempt,
            reason,
            then_open: None,
        },
        DestinationState::Relinquished { attempt, reason } => {
            State::Relinquishing { attempt, reason }
        }
        DestinationState::Ended { last, reason } => State::Ending {
            last,
            reason,
            step: Step::Recording,
            asked: false,
        },
    }
}
