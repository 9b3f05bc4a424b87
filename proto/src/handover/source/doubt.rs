//! What follows COMMITTING at the source: doubt, and its ends.
//!
//! Owns the point of no return (`[HAND-8]`): no function here returns to a running guest but on the register's ABORTED of exactly
//! this attempt (`[HAND-4]`), on a failed write that is known to be invisible (`[HAND-3]`), or on an operator's word (`[HAND-9]`).

use crate::error::WireError;
use crate::ids::{Attempt, RegisterId};
use crate::message::{AttemptKey, Outcome, ToDestination, Verdict};

use super::super::Unexpected;
use super::super::permit::RunPermit;
use super::super::record::SourceState;
use super::machine::{Actions, MAX_FAILURES, SourceHandover, journal_report};
use super::state::{Ask, Doubt, Link, State, Step};
use super::{SourceAction, SourceEnd, SourceReport, Timer};

impl SourceHandover {
    /// COMMITTING is durable.
    pub(super) fn enter_doubt(&mut self, doubt: Doubt, actions: &mut Actions) {
        actions.push(SourceAction::StartTimer(Timer::Doubt(doubt.key.attempt)));
        let failures = doubt.failures;
        self.state = State::InDoubt(doubt);
        if self.is_connected() {
            self.ask(actions);
        } else {
            actions.push(SourceAction::StartTimer(Timer::BackOff { failures }));
        }
    }

    /// `[HAND-3]`: from the rename on a failed write counts as COMMITTING. Commit was not sent, and the journal is ill: the
    /// attempt is settled by Query, which needs no durable COMMITTING.
    pub(super) fn on_committing_failed(
        &mut self,
        doubt: Doubt,
        visible: bool,
        reason: WireError,
        actions: &mut Actions,
    ) {
        if visible {
            actions.push(journal_report(true, reason));
            self.enter_doubt(
                Doubt {
                    ask: Ask::Query,
                    ..doubt
                },
                actions,
            );
            return;
        }
        let attempt = doubt.key.attempt;
        self.send(
            ToDestination::Abort {
                attempt,
                reason: reason.clone(),
            },
            actions,
        );
        self.unwind(attempt, reason, true, actions);
        if let State::Unwinding(unwinding) = &mut self.state {
            unwinding.end = doubt.end;
        }
    }

    /// Asks the question again; both are idempotent (`[HAND-5]`).
    fn ask(&self, actions: &mut Actions) {
        if let State::InDoubt(doubt) = &self.state {
            let question = match doubt.ask {
                Ask::Commit => ToDestination::Commit(doubt.key),
                Ask::Query => ToDestination::Query(doubt.key),
            };
            self.send(question, actions);
        }
    }

    /// A new session is up: what was asked and not answered is asked again.
    pub(super) fn on_link_up(&mut self, register: RegisterId, actions: &mut Actions) {
        if let State::InDoubt(doubt) = &self.state {
            if doubt.key.register != register {
                actions.push(SourceAction::Report(SourceReport::OtherRegister {
                    register,
                }));
            }
            self.ask(actions);
        }
    }

    pub(super) fn on_connection_lost(&mut self, reason: WireError, actions: &mut Actions) {
        if self.link == Link::Down {
            return;
        }
        self.link = Link::Down;
        match &mut self.state {
            State::InDoubt(doubt) => {
                doubt.failures = doubt.failures.saturating_add(1).min(MAX_FAILURES);
                let (key, failures) = (doubt.key, doubt.failures);
                actions.push(SourceAction::Report(SourceReport::InDoubt { key }));
                actions.push(SourceAction::StartTimer(Timer::BackOff { failures }));
            }
            State::Ending {
                reason: why,
                step: Step::Doing,
                ..
            } => {
                let why = why.clone();
                self.finish_ending(why, false, actions);
            }
            State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. } => self.give_up_attempt(reason, None, actions),
            State::Copying { .. }
            | State::RecordingCommitting(_)
            | State::Unwinding(_)
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. }
            | State::Done { .. } => {}
        }
    }

    pub(super) fn on_doubt_overdue(&mut self, overdue: Attempt, actions: &mut Actions) {
        if self.state.attempt() == overdue && matches!(self.state, State::InDoubt(_)) {
            self.ask_rather_than_commit(actions);
        }
    }

    /// From Commit to Query, once; an open session is asked at once.
    pub(super) fn ask_rather_than_commit(&mut self, actions: &mut Actions) {
        if let State::InDoubt(doubt) = &mut self.state
            && doubt.ask == Ask::Commit
        {
            doubt.ask = Ask::Query;
            self.ask(actions);
        }
    }

    pub(super) fn on_cancel(&mut self, reason: WireError, actions: &mut Actions) {
        match &mut self.state {
            State::Copying { last } => {
                let last = *last;
                self.begin_ending(last, reason);
            }
            State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. } => {
                self.give_up_attempt(reason.clone(), Some(reason), actions);
            }
            State::RecordingCommitting(doubt) => {
                doubt.ask = Ask::Query;
                doubt.end = Some(reason);
            }
            State::InDoubt(doubt) => {
                doubt.end = Some(reason);
                self.ask_rather_than_commit(actions);
            }
            State::Unwinding(unwinding) => unwinding.end = Some(reason),
            State::Releasing { .. } => {
                actions.push(SourceAction::Report(SourceReport::TooLateToCancel));
            }
            State::Fencing { .. } | State::Ending { .. } | State::Done { .. } => {}
        }
    }

    /// The register's answer. Only that of exactly this attempt and register settles anything (`[HAND-2]`, `[HAND-4]`).
    pub(super) fn on_outcome(
        &mut self,
        outcome: &Outcome,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::InDoubt(Doubt { key, end, .. }) = &self.state
            && *key == outcome.key
        {
            let end = end.clone();
            self.settle(outcome.key, end, &outcome.verdict, actions);
            return Ok(());
        }
        // The word of the register itself overrules the operator's as long as the guest stands still. A FENCED that a restart found may have let
        // it go before: then the operator's word holds.
        if let State::Fencing {
            key,
            step: Step::Recording,
        } = &self.state
            && *key == outcome.key
            && self.is_still_committing()
        {
            self.settle(outcome.key, None, &outcome.verdict, actions);
            return Ok(());
        }
        if self.is_before_commit() && self.state.attempt() == outcome.key.attempt {
            return self.on_outcome_before_commit(outcome, actions);
        }
        self.late(outcome.key.attempt, "Outcome")
    }

    fn is_still_committing(&self) -> bool {
        matches!(
            self.journal.durable().map(|record| &record.state),
            Some(SourceState::Committing { .. })
        )
    }

    const fn is_before_commit(&self) -> bool {
        matches!(
            self.state,
            State::Opening { .. }
                | State::RecordingPausing { .. }
                | State::Pausing { .. }
                | State::Streaming { .. }
                | State::AwaitingPrepared { .. }
                | State::Checking { .. }
        )
    }

    fn on_outcome_before_commit(
        &mut self,
        outcome: &Outcome,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        match &outcome.verdict {
            Verdict::Aborted(reason) => {
                self.give_up_attempt(reason.clone(), None, actions);
                // It need not be told what it said itself.
                actions.retain(|action| {
                    !matches!(action, SourceAction::Send(ToDestination::Abort { .. }))
                });
                Ok(())
            }
            Verdict::Committed { .. } => self.unexpected("Outcome committed before any Commit"),
            Verdict::Unknown => {
                self.unexpected("Outcome unknown of an attempt that nobody asked for")
            }
        }
    }

    fn settle(
        &mut self,
        key: AttemptKey,
        end: Option<WireError>,
        verdict: &Verdict,
        actions: &mut Actions,
    ) {
        match verdict {
            Verdict::Committed { .. } => {
                self.state = State::Releasing {
                    key,
                    step: Step::Recording,
                };
            }
            Verdict::Aborted(reason) => {
                self.unwind(key.attempt, reason.clone(), true, actions);
                if let State::Unwinding(unwinding) = &mut self.state {
                    unwinding.end = end;
                }
            }
            Verdict::Unknown => {
                actions.push(SourceAction::Report(SourceReport::UnknownToDestination {
                    key,
                }));
            }
        }
    }

    /// RELEASED is durable: the copy here may go.
    pub(super) fn on_released_durable(
        &mut self,
        key: AttemptKey,
        step: Step,
        actions: &mut Actions,
    ) {
        if step == Step::Recording {
            self.send(ToDestination::Goodbye, actions);
            actions.push(SourceAction::Release);
            self.state = State::Releasing {
                key,
                step: Step::Doing,
            };
        }
    }

    pub(super) fn on_released(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        if let State::Releasing {
            step: Step::Doing, ..
        } = self.state
        {
            self.finish(SourceEnd::Committed, actions);
            return Ok(());
        }
        self.unexpected("Released")
    }

    pub(super) fn on_release_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Releasing { step, .. } = &mut self.state
            && *step == Step::Doing
        {
            *step = Step::Failed;
            actions.push(SourceAction::Report(SourceReport::ReleaseFailed { reason }));
            actions.push(SourceAction::StartTimer(Timer::Retry));
            return Ok(());
        }
        self.unexpected("ReleaseFailed")
    }

    /// `[HAND-9]`: only out of doubt, and only on an operator's word.
    pub(super) fn on_resolve(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        let State::InDoubt(Doubt { key, .. }) = self.state else {
            return self.unexpected("ResolveDestinationFenced");
        };
        actions.push(SourceAction::Report(SourceReport::ResolvedByOperator {
            key,
            guest_is_ended: self.facts.shared_disks,
        }));
        self.state = State::Fencing {
            key,
            step: Step::Recording,
        };
        Ok(())
    }

    /// FENCED is durable. With a shared disk the destination may have written it, so the memory here is stale: it never
    /// resumes.
    pub(super) fn on_fenced_durable(&mut self, key: AttemptKey, step: Step, actions: &mut Actions) {
        if step != Step::Recording {
            return;
        }
        self.state = State::Fencing {
            key,
            step: Step::Doing,
        };
        actions.push(if self.facts.shared_disks {
            SourceAction::EndGuest
        } else {
            SourceAction::Resume {
                permit: RunPermit::new(),
                to: self.before,
            }
        });
    }

    pub(super) fn on_guest_ended(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        if self.is_fencing_done() && self.facts.shared_disks {
            self.finish(SourceEnd::EndedByOperator, actions);
            return Ok(());
        }
        self.unexpected("GuestEnded")
    }

    pub(super) fn on_end_guest_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Fencing { step, .. } = &mut self.state
            && *step == Step::Doing
            && self.facts.shared_disks
        {
            *step = Step::Failed;
            actions.push(SourceAction::Report(SourceReport::ReleaseFailed { reason }));
            actions.push(SourceAction::StartTimer(Timer::Retry));
            return Ok(());
        }
        self.unexpected("EndGuestFailed")
    }
}
