//! Attempts at the destination, and what the register answers about them.
//!
//! Owns the two ends of an attempt: OWNED and ABORTED. Invariants: whichever is durable first stays (`[HAND-2]`); nothing is answered
//! that is not durable; the guest starts behind a durable OWNED, and RELINQUISHED is written only while it provably
//! never ran (`[HAND-6]`).

use crate::error::{ErrorCode, WireError};
use crate::ids::Attempt;
use crate::message::{AttemptKey, Outcome, PrepareTiming, Prepared, ToSource, Verdict};
use crate::spec::RunState;

use super::super::Unexpected;
use super::super::permit::RunPermit;
use super::super::record::DestinationState;
use super::machine::{Actions, DestinationHandover};
use super::state::{GuestCopy, Link, State};
use super::{DestinationAction, DestinationEnd, DestinationReport};

/// What a question does to an attempt that is undecided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    Commit,
    Query,
}

impl DestinationHandover {
    pub(super) fn on_open_attempt(
        &mut self,
        attempt: Attempt,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.link != Link::Ready {
            return self.unexpected("OpenAttempt before Ready");
        }
        let known = self.state.attempt();
        if attempt <= known {
            return self.on_open_again(attempt, actions);
        }
        match &self.state {
            State::Receiving | State::Settled { .. } if self.copy == GuestCopy::Receiving => {
                self.state = State::Opening { attempt };
                Ok(())
            }
            State::Opening { .. } | State::Opened { .. } => {
                self.begin_abort(
                    known,
                    WireError::new(ErrorCode::Cancelled, "the source opened a later attempt"),
                    Some(attempt),
                );
                Ok(())
            }
            State::Aborting {
                then_open: None, ..
            } if self.copy == GuestCopy::Receiving => {
                if let State::Aborting { then_open, .. } = &mut self.state {
                    *then_open = Some(attempt);
                }
                Ok(())
            }
            State::Receiving
            | State::Settled { .. }
            | State::Aborting { .. }
            | State::Loading { .. }
            | State::Prepared { .. }
            | State::Owning { .. }
            | State::Starting { .. }
            | State::Owned { .. }
            | State::Relinquishing { .. }
            | State::Ending { .. }
            | State::Ended { .. } => self.unexpected(format!("OpenAttempt {attempt}")),
        }
    }

    /// An attempt that is known already: a source that was restarted before it recorded PAUSING opens it once more.
    fn on_open_again(&self, attempt: Attempt, actions: &mut Actions) -> Result<(), Unexpected> {
        match &self.state {
            State::Opened { attempt: open } if *open == attempt => {
                self.send(ToSource::AttemptOpened { attempt }, actions);
                Ok(())
            }
            State::Opening { attempt: open } if *open == attempt => Ok(()),
            State::Aborting { attempt: open, .. } if *open == attempt => Ok(()),
            State::Settled { record } if record.attempt() == attempt => {
                self.answer_aborted(attempt, settled_reason(record), actions);
                Ok(())
            }
            State::Receiving
            | State::Opening { .. }
            | State::Opened { .. }
            | State::Aborting { .. }
            | State::Settled { .. }
                if attempt < self.state.attempt() && attempt > Attempt(0) =>
            {
                self.answer_aborted(attempt, lower(self.state.attempt()), actions);
                Ok(())
            }
            State::Receiving
            | State::Opening { .. }
            | State::Opened { .. }
            | State::Loading { .. }
            | State::Prepared { .. }
            | State::Owning { .. }
            | State::Starting { .. }
            | State::Owned { .. }
            | State::Relinquishing { .. }
            | State::Aborting { .. }
            | State::Settled { .. }
            | State::Ending { .. }
            | State::Ended { .. } => self.unexpected(format!("OpenAttempt {attempt} again")),
        }
    }

    pub(super) fn on_state_received(
        &mut self,
        received: Attempt,
        to: RunState,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Opened { attempt } = self.state
            && attempt == received
            && self.link == Link::Ready
            && self.copy == GuestCopy::Receiving
        {
            self.state = State::Loading { attempt, to };
            self.copy = GuestCopy::Loading;
            actions.push(DestinationAction::LoadState { attempt });
            return Ok(());
        }
        let over = received <= self.state.attempt()
            && !matches!(
                self.state,
                State::Opening { .. }
                    | State::Opened { .. }
                    | State::Loading { .. }
                    | State::Prepared { .. }
            );
        if over {
            Ok(())
        } else {
            self.unexpected(format!("the device state of attempt {received}"))
        }
    }

    pub(super) fn on_state_loaded(
        &mut self,
        timing: PrepareTiming,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.copy != GuestCopy::Loading {
            return self.unexpected("StateLoaded");
        }
        self.copy = GuestCopy::Used;
        if let State::Loading { attempt, to } = self.state {
            self.state = State::Prepared { attempt, to };
            let key = self.key_of(attempt);
            self.send(ToSource::Prepared(Prepared { key, timing }), actions);
        }
        self.advance_offer(actions);
        self.continue_ending(actions);
        Ok(())
    }

    pub(super) fn on_load_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.copy != GuestCopy::Loading {
            return self.unexpected("LoadFailed");
        }
        self.copy = GuestCopy::Used;
        self.abort_undecided(reason);
        self.advance_offer(actions);
        self.continue_ending(actions);
        Ok(())
    }

    /// Any time before OWNED the attempt may be settled as aborted (`[HAND-2]`).
    pub(super) fn abort_undecided(&mut self, reason: WireError) {
        if self.state.is_undecided() {
            let attempt = self.state.attempt();
            self.begin_abort(attempt, reason, None);
        }
    }

    pub(super) fn begin_abort(
        &mut self,
        attempt: Attempt,
        reason: WireError,
        then_open: Option<Attempt>,
    ) {
        self.state = State::Aborting {
            attempt,
            reason,
            then_open,
        };
    }

    pub(super) fn on_commit(&mut self, key: AttemptKey, actions: &mut Actions) {
        self.on_question(key, Question::Commit, actions);
    }

    pub(super) fn on_query(&mut self, key: AttemptKey, actions: &mut Actions) {
        self.on_question(key, Question::Query, actions);
    }

    /// `[HAND-2]`, `[HAND-5]`: one answer per attempt, whoever asks, however often.
    fn on_question(&mut self, key: AttemptKey, question: Question, actions: &mut Actions) {
        let known = self.state.attempt();
        if key != self.key_of(key.attempt) || key.attempt > known || key.attempt == Attempt(0) {
            self.answer(key, Verdict::Unknown, actions);
            return;
        }
        if key.attempt < known {
            self.answer_aborted(key.attempt, lower(known), actions);
            return;
        }
        match self.state.clone() {
            State::Prepared { attempt, to } if question == Question::Commit => {
                self.state = State::Owning {
                    attempt,
                    to,
                    fresh: true,
                };
            }
            State::Opening { .. }
            | State::Opened { .. }
            | State::Loading { .. }
            | State::Prepared { .. } => self.abort_undecided(match question {
                Question::Commit => WireError::new(
                    ErrorCode::Cancelled,
                    "the destination was not prepared when it was told to commit",
                ),
                Question::Query => {
                    WireError::new(ErrorCode::Cancelled, "the source asked before it committed")
                }
            }),
            State::Owned { .. } => self.answer(key, COMMITTED_AGAIN, actions),
            State::Settled { record } => {
                self.answer_aborted(key.attempt, settled_reason(&record), actions);
            }
            State::Ended { reason, .. } => self.answer_aborted(key.attempt, reason, actions),
            State::Ending { reason, .. } => {
                let durable = self.journal.durable().map(|record| record.answer(&key));
                if let Some(super::super::RegisterAnswer::Settled(Verdict::Aborted(_))) = durable {
                    self.answer_aborted(key.attempt, reason, actions);
                } else {
                    self.journal.release_hold();
                }
            }
            // The answer follows when it is durable; a write that failed is tried again for the one who asks.
            State::Owning { .. }
            | State::Starting { .. }
            | State::Relinquishing { .. }
            | State::Aborting { .. } => self.journal.release_hold(),
            // No attempt is known, so none can be equal.
            State::Receiving => {}
        }
    }

    pub(super) fn on_abort(&mut self, attempt: Attempt, reason: WireError, actions: &mut Actions) {
        if self.state.is_undecided() && attempt == self.state.attempt() {
            self.abort_undecided(reason);
            return;
        }
        self.on_question(self.key_of(attempt), Question::Query, actions);
    }

    /// Acts on a state whose record is durable now.
    pub(super) fn on_durable(&mut self, actions: &mut Actions) {
        match self.state.clone() {
            State::Opening { attempt } => {
                self.state = State::Opened { attempt };
                self.send(ToSource::AttemptOpened { attempt }, actions);
            }
            State::Owning { attempt, to, fresh } => self.start(attempt, to, fresh, actions),
            State::Relinquishing { attempt, reason } => {
                self.copy = GuestCopy::Used;
                self.settle(
                    DestinationState::Relinquished { attempt, reason },
                    None,
                    actions,
                );
            }
            State::Aborting {
                attempt,
                reason,
                then_open,
            } => {
                let record = DestinationState::Aborted { attempt, reason };
                self.settle(record, then_open, actions);
            }
            State::Ending { .. } => {
                self.answer_ending(actions);
                self.continue_ending(actions);
            }
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

    /// A source in doubt that asked while ENDED was being written hears that its attempt is aborted.
    fn answer_ending(&self, actions: &mut Actions) {
        if let State::Ending {
            last,
            reason,
            asked: false,
            ..
        } = &self.state
            && *last > Attempt(0)
        {
            self.answer_aborted(*last, reason.clone(), actions);
        }
    }

    fn settle(
        &mut self,
        record: DestinationState,
        then_open: Option<Attempt>,
        actions: &mut Actions,
    ) {
        let attempt = record.attempt();
        let reason = settled_reason(&record);
        actions.push(DestinationAction::Report(DestinationReport::Aborted {
            attempt,
            reason: reason.clone(),
        }));
        self.state = State::Settled { record };
        if let Some(attempt) = then_open {
            self.state = State::Opening { attempt };
        } else {
            self.answer_aborted(attempt, reason, actions);
        }
    }

    /// `[HAND-3]`: OWNED is durable. The permit is made here and nowhere else.
    fn start(&mut self, attempt: Attempt, to: RunState, fresh: bool, actions: &mut Actions) {
        self.state = State::Starting { attempt, to, fresh };
        actions.push(DestinationAction::Start {
            permit: RunPermit::new(),
            to,
        });
    }

    pub(super) fn on_started(
        &mut self,
        record_us: u64,
        start_us: u64,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let State::Starting { attempt, to, .. } = self.state else {
            return self.unexpected("Started");
        };
        self.state = State::Owned {
            attempt,
            to,
            started: true,
        };
        let verdict = Verdict::Committed {
            record_us,
            start_us,
        };
        self.answer(self.key_of(attempt), verdict, actions);
        actions.push(DestinationAction::Done(DestinationEnd::Owned { attempt }));
        Ok(())
    }

    /// `[HAND-6]`: given back only if the guest provably never ran, which no one can say of a start before a restart.
    pub(super) fn on_start_failed(
        &mut self,
        never_ran: bool,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let State::Starting { attempt, to, fresh } = self.state else {
            return self.unexpected("StartFailed");
        };
        if never_ran && fresh {
            self.state = State::Relinquishing { attempt, reason };
            return Ok(());
        }
        self.state = State::Owned {
            attempt,
            to,
            started: false,
        };
        self.answer(self.key_of(attempt), COMMITTED_AGAIN, actions);
        actions.push(DestinationAction::Report(
            DestinationReport::StartUncertain { attempt, reason },
        ));
        Ok(())
    }

    /// An uncertain start may be repeated: the source never runs the guest again, and a running guest takes no harm.
    pub(super) fn retry_start(&mut self, actions: &mut Actions) {
        if let State::Owned {
            attempt,
            to,
            started: false,
        } = self.state
        {
            self.start(attempt, to, false, actions);
        }
    }

    fn answer(&self, key: AttemptKey, verdict: Verdict, actions: &mut Actions) {
        self.send(ToSource::Outcome(Outcome { key, verdict }), actions);
    }

    fn answer_aborted(&self, attempt: Attempt, reason: WireError, actions: &mut Actions) {
        self.answer(self.key_of(attempt), Verdict::Aborted(reason), actions);
    }
}

const COMMITTED_AGAIN: Verdict = Verdict::Committed {
    record_us: 0,
    start_us: 0,
};

fn settled_reason(record: &DestinationState) -> WireError {
    match record {
        DestinationState::Aborted { reason, .. }
        | DestinationState::Relinquished { reason, .. }
        | DestinationState::Ended { reason, .. } => reason.clone(),
        DestinationState::Receiving
        | DestinationState::Opened { .. }
        | DestinationState::Owned { .. } => lower(record.attempt()),
    }
}

fn lower(known: Attempt) -> WireError {
    WireError::new(
        ErrorCode::Cancelled,
        format!("it was settled as aborted before attempt {known} was opened"),
    )
}
