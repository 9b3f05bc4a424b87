//! The source's machine: dispatch of events, sessions, and the wish that is written to the journal.
//!
//! `attempt` owns the way to COMMITTING and back, `doubt` what follows COMMITTING. Invariant: the only places that make a
//! `RunPermit` are `on_durable` transitions, behind ROLLED_BACK or FENCED.

use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, RegisterId, SessionNumber};
use crate::message::{AttemptKey, ToDestination};
use crate::spec::RunState;

use super::super::Unexpected;
use super::super::journal::Journal;
use super::super::record::{SourceRecord, SourceState};
use super::state::{Ask, Doubt, Link, State, Step, UnwindStep, Unwinding};
use super::{SourceAction, SourceEnd, SourceEvent, SourceFacts, SourceReport, Timer};

pub(super) type Actions = Vec<SourceAction>;

/// The source's half of the handover.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceHandover {
    pub(super) facts: SourceFacts,
    pub(super) session: SessionNumber,
    pub(super) before: RunState,
    pub(super) link: Link,
    pub(super) state: State,
    pub(super) journal: Journal<SourceRecord>,
}

impl SourceHandover {
    /// A new migration of a guest that is as its users left it. Nothing is durable yet: the first record is written with the
    /// first session.
    #[must_use]
    pub const fn new(facts: SourceFacts) -> Self {
        Self {
            facts,
            session: SessionNumber(0),
            before: RunState::Running,
            link: Link::Down,
            state: State::Copying { last: Attempt(0) },
            journal: Journal::unwritten(),
        }
    }

    /// Goes on from what the journal says after a restart (`[HAND-7]`).
    ///
    /// What was read may be visible without being durable, so it is written again before anything is done on its strength.
    /// Whether the guest's process is still the one of the record is for the agent to find out when it
    /// carries out `Resume`, `Release` or `EndGuest`: it never acts on a pid alone.
    #[must_use]
    pub fn recover(record: SourceRecord) -> (Self, Vec<SourceAction>) {
        let state = recovered_state(record.state);
        let mut machine = Self {
            facts: SourceFacts {
                guest: record.guest,
                migration: record.migration,
                generation: record.generation,
                peer: record.peer,
                process: record.process,
                shared_disks: record.shared_disks,
            },
            session: record.session,
            before: record.run_state_before,
            link: Link::Down,
            state,
            journal: Journal::unwritten(),
        };
        let mut actions = Vec::new();
        if let State::InDoubt(doubt) = &machine.state {
            actions.push(SourceAction::Report(SourceReport::InDoubt {
                key: doubt.key,
            }));
            actions.push(SourceAction::StartTimer(Timer::Doubt(doubt.key.attempt)));
            machine.want_session();
        }
        machine.pump(&mut actions);
        (machine, actions)
    }

    /// Feeds one event. An error changes nothing.
    ///
    /// # Errors
    ///
    /// [`Unexpected`] where the event does not fit the state; late answers and timers of what is over are not errors.
    pub fn handle(&mut self, event: SourceEvent) -> Result<Vec<SourceAction>, Unexpected> {
        let mut actions = Vec::new();
        let mut next = self.clone();
        next.apply(event, &mut actions)?;
        next.pump(&mut actions);
        *self = next;
        Ok(actions)
    }

    fn apply(&mut self, event: SourceEvent, actions: &mut Actions) -> Result<(), Unexpected> {
        match event {
            SourceEvent::ConnectWanted => self.on_connect_wanted(),
            SourceEvent::Connected { register } => self.on_connected(register, actions),
            SourceEvent::ConnectionLost { reason } => {
                self.on_connection_lost(reason, actions);
                Ok(())
            }
            SourceEvent::BeginCutover { run_state } => self.on_begin(run_state, actions),
            SourceEvent::AttemptOpened { attempt } => self.on_attempt_opened(attempt),
            SourceEvent::GuestPaused { before } => self.on_paused(before, actions),
            SourceEvent::PauseFailed { before, reason } => {
                self.on_pause_failed(before, reason, actions)
            }
            SourceEvent::FinalSent { attempt } => self.on_final_sent(attempt),
            SourceEvent::StreamFailed { attempt, reason } => {
                self.on_stream_failed(attempt, reason, actions)
            }
            SourceEvent::Prepared { key } => self.on_prepared(key, actions),
            SourceEvent::StillPaused { attempt } => self.on_still_paused(attempt),
            SourceEvent::GuestTouched { reason } => {
                self.on_touched(reason, actions);
                Ok(())
            }
            SourceEvent::Recorded => self.on_recorded(actions),
            SourceEvent::RecordFailed { visible, reason } => {
                self.on_record_failed(visible, reason, actions)
            }
            SourceEvent::Outcome(outcome) => self.on_outcome(&outcome, actions),
            SourceEvent::Resumed => self.on_resumed(SourceEnd::ResumedByOperator, actions),
            SourceEvent::GuestGone => self.on_resumed(SourceEnd::EndedByOperator, actions),
            SourceEvent::ResumeFailed { reason } => self.on_resume_failed(reason, actions),
            SourceEvent::Released => self.on_released(actions),
            SourceEvent::ReleaseFailed { reason } => self.on_release_failed(reason, actions),
            SourceEvent::GuestEnded => self.on_guest_ended(actions),
            SourceEvent::EndGuestFailed { reason } => self.on_end_guest_failed(reason, actions),
            SourceEvent::Cancelled => self.on_cancelled(actions),
            SourceEvent::TimedOut(timer) => self.on_timer(timer, actions),
            SourceEvent::AbortAttempt { reason } => self.on_abort_attempt(reason, actions),
            SourceEvent::Cancel { reason } => {
                self.on_cancel(reason, actions);
                Ok(())
            }
            SourceEvent::ResolveDestinationFenced => self.on_resolve(actions),
        }
    }

    /// What the journal should hold now.
    #[must_use]
    pub fn record(&self) -> SourceRecord {
        SourceRecord {
            guest: self.facts.guest.clone(),
            migration: self.facts.migration,
            generation: self.facts.generation,
            session: self.session,
            peer: self.facts.peer.clone(),
            process: self.facts.process.clone(),
            shared_disks: self.facts.shared_disks,
            run_state_before: self.before,
            state: self.state.wanted(),
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

    /// Number of the session that is open or was asked for last.
    #[must_use]
    pub const fn session(&self) -> SessionNumber {
        self.session
    }

    /// Whether a session is open.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        matches!(self.link, Link::Up { .. })
    }

    /// Whether `BeginCutover` is legal now.
    #[must_use]
    pub const fn can_cut_over(&self) -> bool {
        matches!(
            (&self.state, self.link),
            (State::Copying { .. }, Link::Up { .. })
        )
    }

    /// Whether no attempt is under way and the migration is not over.
    #[must_use]
    pub const fn is_copying(&self) -> bool {
        matches!(self.state, State::Copying { .. })
    }

    /// Whether only the destination's register can settle who runs the guest (`[HAND-4]`).
    #[must_use]
    pub const fn is_in_doubt(&self) -> bool {
        matches!(
            self.state,
            State::RecordingCommitting(_) | State::InDoubt(_)
        )
    }

    /// Whether the migration is over at this side, and how.
    #[must_use]
    pub const fn end(&self) -> Option<&SourceEnd> {
        match &self.state {
            State::Done { end, .. } => Some(end),
            State::Copying { .. }
            | State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. }
            | State::RecordingCommitting(_)
            | State::InDoubt(_)
            | State::Unwinding(_)
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. } => None,
        }
    }

    pub(super) fn unexpected<T>(&self, got: impl Into<String>) -> Result<T, Unexpected> {
        Err(Unexpected {
            machine: "source",
            state: self.state.name(),
            expected: self.state.expects(),
            got: got.into(),
        })
    }

    pub(super) fn send(&self, message: ToDestination, actions: &mut Actions) {
        if self.is_connected() {
            actions.push(SourceAction::Send(message));
        }
    }

    /// Hands the wish to the journal where it differs from what is durable. A new migration writes nothing before its
    /// first session.
    fn pump(&mut self, actions: &mut Actions) {
        let unborn = self.session == SessionNumber(0) && self.is_copying();
        if unborn || self.end().is_some() {
            return;
        }
        if let Some(record) = self.journal.next_write(self.record()) {
            actions.push(SourceAction::Record(Box::new(record)));
        }
    }

    fn on_connect_wanted(&mut self) -> Result<(), Unexpected> {
        let may = matches!(self.state, State::Copying { .. } | State::InDoubt(_));
        if !may || self.link != Link::Down {
            return self.unexpected("ConnectWanted");
        }
        self.want_session();
        Ok(())
    }

    pub(super) const fn want_session(&mut self) {
        self.session = self.session.next();
        self.link = Link::Numbering;
    }

    fn on_connected(
        &mut self,
        register: RegisterId,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.link != Link::Connecting {
            return self.unexpected("Connected");
        }
        self.link = Link::Up { register };
        self.on_link_up(register, actions);
        Ok(())
    }

    fn on_recorded(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        if !self.journal.on_recorded() {
            return self.unexpected("Recorded");
        }
        let durable = self.journal.durable().map(|record| record.session);
        if self.link == Link::Numbering && durable == Some(self.session) {
            self.link = Link::Connecting;
            actions.push(SourceAction::Connect {
                session: self.session,
            });
        }
        self.on_durable(actions);
        Ok(())
    }

    /// Acts on a state whose record is durable now.
    fn on_durable(&mut self, actions: &mut Actions) {
        let wanted = self.state.wanted();
        if self.journal.durable().map(|record| &record.state) != Some(&wanted) {
            return;
        }
        match self.state.clone() {
            State::RecordingPausing { attempt } => self.begin_pause(attempt, actions),
            State::RecordingCommitting(doubt) => self.enter_doubt(doubt, actions),
            State::Unwinding(unwinding) => self.on_rolled_back(unwinding, actions),
            State::Releasing { key, step } => self.on_released_durable(key, step, actions),
            State::Fencing { key, step } => self.on_fenced_durable(key, step, actions),
            State::Ending { last, reason, step } => {
                self.on_ended_durable(last, reason, step, actions);
            }
            State::Copying { .. }
            | State::Opening { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. }
            | State::InDoubt(_)
            | State::Done { .. } => {}
        }
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
        if self.link == Link::Numbering && failed.session == self.session {
            self.link = Link::Down;
            if let State::InDoubt(doubt) = &mut self.state {
                doubt.failures = doubt.failures.saturating_add(1).min(MAX_FAILURES);
                actions.push(SourceAction::StartTimer(Timer::BackOff {
                    failures: doubt.failures,
                }));
            }
        }
        self.after_failed_record(&failed.state, visible, reason, actions);
        Ok(())
    }

    fn after_failed_record(
        &mut self,
        failed: &SourceState,
        visible: bool,
        reason: WireError,
        actions: &mut Actions,
    ) {
        match self.state.clone() {
            State::RecordingPausing { attempt } => {
                self.unwind(attempt, reason, false, actions);
            }
            State::RecordingCommitting(doubt) => {
                if matches!(failed, SourceState::Committing { .. }) {
                    self.on_committing_failed(doubt, visible, reason, actions);
                }
            }
            State::Unwinding(unwinding) => {
                let waits = matches!(failed, SourceState::RolledBack { .. });
                if waits && unwinding.step == UnwindStep::Recording {
                    journal_failed(unwinding.paused, reason, actions);
                }
            }
            State::Releasing { step, .. } | State::Fencing { step, .. } => {
                if step == Step::Recording && *failed == self.state.wanted() {
                    journal_failed(true, reason, actions);
                }
            }
            State::Ending {
                last,
                reason: why,
                step,
            } => {
                actions.push(journal_report(false, reason));
                if *failed == self.state.wanted() {
                    // The guest is here either way: what the journal still says leads a restart to the same end.
                    self.on_ended_durable(last, why, step, actions);
                }
            }
            State::Copying { .. }
            | State::Opening { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. }
            | State::Done { .. } => actions.push(journal_report(false, reason)),
            State::InDoubt(_) => actions.push(journal_report(true, reason)),
        }
    }

    fn on_timer(&mut self, timer: Timer, actions: &mut Actions) -> Result<(), Unexpected> {
        match timer {
            Timer::Open(attempt) => self.on_attempt_overdue(attempt, false, actions),
            Timer::Pause(attempt) => self.on_attempt_overdue(attempt, true, actions),
            Timer::Doubt(attempt) => self.on_doubt_overdue(attempt, actions),
            Timer::BackOff { .. } => {
                if matches!(self.state, State::InDoubt(_)) && self.link == Link::Down {
                    self.want_session();
                }
            }
            Timer::Retry => self.on_retry(actions),
            Timer::Cancel => self.on_cancel_overdue(actions),
        }
        Ok(())
    }

    fn on_retry(&mut self, actions: &mut Actions) {
        self.journal.release_hold();
        match self.state.clone() {
            State::Unwinding(unwinding) if unwinding.step == UnwindStep::ResumeFailed => {
                self.on_rolled_back(unwinding, actions);
            }
            State::Releasing {
                key,
                step: Step::Failed,
            } => self.on_released_durable(key, Step::Recording, actions),
            State::Fencing {
                key,
                step: Step::Failed,
            } => self.on_fenced_durable(key, Step::Recording, actions),
            State::Copying { .. }
            | State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. }
            | State::RecordingCommitting(_)
            | State::InDoubt(_)
            | State::Unwinding(_)
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. }
            | State::Done { .. } => {}
        }
    }

    pub(super) fn finish(&mut self, end: SourceEnd, actions: &mut Actions) {
        if self.is_connected() {
            actions.push(SourceAction::CloseSession);
        }
        self.link = Link::Down;
        self.state = State::Done {
            record: self.state.wanted(),
            end: end.clone(),
        };
        actions.push(SourceAction::Done(end));
    }

    pub(super) const fn key_of(&self, attempt: Attempt, register: RegisterId) -> AttemptKey {
        AttemptKey {
            migration: self.facts.migration,
            attempt,
            register,
        }
    }
}

/// Enough for [`super::back_off`] to have reached its longest.
pub(super) const MAX_FAILURES: u8 = 7;

pub(super) const fn journal_report(guest_stays_paused: bool, reason: WireError) -> SourceAction {
    SourceAction::Report(SourceReport::JournalFailed {
        guest_stays_paused,
        reason,
    })
}

fn journal_failed(guest_stays_paused: bool, reason: WireError, actions: &mut Actions) {
    actions.push(journal_report(guest_stays_paused, reason));
    actions.push(SourceAction::StartTimer(Timer::Retry));
}

/// `[HAND-7]`: what each record leads to after a restart.
fn recovered_state(record: SourceState) -> State {
    match record {
        SourceState::Copying { last } => State::Copying { last },
        SourceState::Pausing { attempt } => State::Unwinding(Unwinding {
            attempt,
            reason: WireError::new(
                ErrorCode::ShuttingDown,
                "the source agent was restarted before the commit",
            ),
            paused: true,
            step: UnwindStep::Recording,
            end: None,
        }),
        SourceState::RolledBack { attempt, reason } => State::Unwinding(Unwinding {
            attempt,
            reason,
            paused: true,
            step: UnwindStep::Recording,
            end: None,
        }),
        SourceState::Committing { key } => State::InDoubt(Doubt {
            key,
            ask: Ask::Commit,
            failures: 0,
            end: None,
        }),
        SourceState::Released { key } => State::Releasing {
            key,
            step: Step::Recording,
        },
        SourceState::Fenced { key } => State::Fencing {
            key,
            step: Step::Recording,
        },
        SourceState::Ended { last, reason } => State::Done {
            record: SourceState::Ended {
                last,
                reason: reason.clone(),
            },
            end: SourceEnd::NotCommitted {
                reason,
                peer_told: false,
            },
        },
    }
}
