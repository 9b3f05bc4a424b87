//! One attempt at the source: the way to COMMITTING, and every way back before it.
//!
//! Owns everything that ends in a running guest at this side. Invariants: the pause follows a durable PAUSING, the resume
//! follows a durable ROLLED_BACK of the same attempt (`[HAND-3]`), and nothing here is reached from COMMITTING but by
//! a failed write that is known to be invisible, or the register's ABORTED.

use crate::error::{ErrorCode, WireError};
use crate::ids::Attempt;
use crate::message::{AttemptKey, ToDestination};
use crate::spec::RunState;

use super::super::Unexpected;
use super::super::permit::RunPermit;
use super::machine::{Actions, SourceHandover};
use super::state::{Ask, Doubt, Link, State, Step, UnwindStep, Unwinding};
use super::{SourceAction, SourceEnd, SourceReport, Timer};

impl SourceHandover {
    pub(super) fn on_begin(
        &mut self,
        run_state: RunState,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let State::Copying { last } = self.state else {
            return self.unexpected("BeginCutover");
        };
        if !self.is_connected() {
            return self.unexpected("BeginCutover without a session");
        }
        let attempt = last.next();
        self.state = State::Opening { attempt, run_state };
        self.send(ToDestination::OpenAttempt { attempt }, actions);
        actions.push(SourceAction::StartTimer(Timer::Open(attempt)));
        Ok(())
    }

    pub(super) fn on_attempt_opened(&mut self, opened: Attempt) -> Result<(), Unexpected> {
        if let State::Opening { attempt, run_state } = self.state
            && attempt == opened
        {
            self.before = run_state;
            self.state = State::RecordingPausing { attempt };
            return Ok(());
        }
        self.late(opened, "AttemptOpened")
    }

    /// A message about an attempt that is over is late, not wrong; one about an attempt never opened is wrong.
    pub(super) fn late(&self, attempt: Attempt, what: &str) -> Result<(), Unexpected> {
        if attempt <= self.state.attempt() {
            Ok(())
        } else {
            self.unexpected(format!("{what} of attempt {attempt}"))
        }
    }

    pub(super) fn begin_pause(&mut self, attempt: Attempt, actions: &mut Actions) {
        self.state = State::Pausing { attempt };
        actions.push(SourceAction::StartTimer(Timer::Pause(attempt)));
        actions.push(SourceAction::PauseGuest { attempt });
    }

    pub(super) fn on_paused(
        &mut self,
        before: RunState,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        match self.state.clone() {
            State::Pausing { attempt } if before == self.before => {
                self.state = State::Streaming { attempt };
                actions.push(SourceAction::StreamFinal {
                    attempt,
                    run_state: before,
                });
                Ok(())
            }
            State::Pausing { attempt } => {
                self.before = before;
                let reason = WireError::new(
                    ErrorCode::GuestChanged,
                    "somebody paused or resumed the guest just as it was to be paused for the cutover",
                );
                self.unwind(attempt, reason, true, actions);
                Ok(())
            }
            State::Unwinding(unwinding) if unwinding.step == UnwindStep::AwaitingPause => {
                self.before = before;
                self.state = State::Unwinding(Unwinding {
                    step: UnwindStep::Recording,
                    ..unwinding
                });
                Ok(())
            }
            _ => self.unexpected("GuestPaused"),
        }
    }

    pub(super) fn on_pause_failed(
        &mut self,
        before: Option<RunState>,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let paused = before.is_some();
        match self.state.clone() {
            State::Pausing { attempt } => {
                self.before = before.unwrap_or(self.before);
                self.unwind(attempt, reason, paused, actions);
                Ok(())
            }
            State::Unwinding(unwinding) if unwinding.step == UnwindStep::AwaitingPause => {
                self.before = before.unwrap_or(self.before);
                self.state = State::Unwinding(Unwinding {
                    step: UnwindStep::Recording,
                    paused,
                    ..unwinding
                });
                Ok(())
            }
            _ => self.unexpected("PauseFailed"),
        }
    }

    pub(super) fn on_final_sent(&mut self, sent: Attempt) -> Result<(), Unexpected> {
        if let State::Streaming { attempt } = self.state
            && attempt == sent
        {
            self.state = State::AwaitingPrepared { attempt };
            return Ok(());
        }
        self.late(sent, "FinalSent")
    }

    pub(super) fn on_stream_failed(
        &mut self,
        failed: Attempt,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Streaming { attempt } | State::AwaitingPrepared { attempt } = self.state
            && attempt == failed
        {
            self.unwind(attempt, reason, true, actions);
            return Ok(());
        }
        self.late(failed, "StreamFailed")
    }

    /// `Prepared` counts only after everything was sent, of this attempt, from the register that said `Welcome`.
    pub(super) fn on_prepared(
        &mut self,
        key: AttemptKey,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::AwaitingPrepared { attempt } = self.state
            && let Link::Up { register } = self.link
            && key == self.key_of(attempt, register)
        {
            self.state = State::Checking { key };
            actions.push(SourceAction::CheckPaused { attempt });
            return Ok(());
        }
        let current = matches!(
            self.state,
            State::Streaming { .. } | State::AwaitingPrepared { .. }
        ) && key.attempt == self.state.attempt();
        if current {
            return self.unexpected("Prepared too early or from another register or migration");
        }
        self.late(key.attempt, "Prepared")
    }

    /// `[HAND-3]`, `[HAND-10]`: the last moment at which the attempt can be given up without asking anybody.
    pub(super) fn on_still_paused(&mut self, checked: Attempt) -> Result<(), Unexpected> {
        if let State::Checking { key } = self.state
            && key.attempt == checked
        {
            self.state = State::RecordingCommitting(Doubt {
                key,
                ask: Ask::Commit,
                failures: 0,
                end: None,
            });
            return Ok(());
        }
        self.late(checked, "StillPaused")
    }

    pub(super) fn on_touched(&mut self, reason: WireError, actions: &mut Actions) {
        match self.state.clone() {
            State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. } => self.give_up_attempt(reason, None, actions),
            State::RecordingCommitting(_) | State::InDoubt(_) => {
                actions.push(SourceAction::Report(SourceReport::TouchedInDoubt {
                    reason,
                }));
            }
            State::Copying { .. }
            | State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Unwinding(_)
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. }
            | State::Done { .. } => {}
        }
    }

    pub(super) fn on_attempt_overdue(
        &mut self,
        overdue: Attempt,
        paused: bool,
        actions: &mut Actions,
    ) {
        let opening = matches!(
            self.state,
            State::Opening { .. } | State::RecordingPausing { .. }
        );
        let stopped = matches!(
            self.state,
            State::Pausing { .. }
                | State::Streaming { .. }
                | State::AwaitingPrepared { .. }
                | State::Checking { .. }
        );
        let applies = if paused { stopped } else { opening };
        if applies && self.state.attempt() == overdue {
            let reason = WireError::new(
                ErrorCode::TimedOut,
                if paused {
                    "the guest was paused for longer than the pause timeout allows"
                } else {
                    "the destination did not open the attempt in time"
                },
            );
            self.give_up_attempt(reason, None, actions);
        }
    }

    pub(super) fn on_abort_attempt(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        match &mut self.state {
            State::Opening { .. }
            | State::RecordingPausing { .. }
            | State::Pausing { .. }
            | State::Streaming { .. }
            | State::AwaitingPrepared { .. }
            | State::Checking { .. } => {
                self.give_up_attempt(reason, None, actions);
                Ok(())
            }
            State::RecordingCommitting(doubt) => {
                doubt.ask = Ask::Query;
                Ok(())
            }
            State::InDoubt(_) => {
                self.ask_rather_than_commit(actions);
                Ok(())
            }
            State::Unwinding(_) => Ok(()),
            State::Copying { .. }
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. }
            | State::Done { .. } => self.unexpected("AbortAttempt"),
        }
    }

    /// Ends the attempt that is open and not yet in doubt; any other state is left alone.
    pub(super) fn give_up_attempt(
        &mut self,
        reason: WireError,
        end: Option<WireError>,
        actions: &mut Actions,
    ) {
        let attempt = self.state.attempt();
        match &self.state {
            State::Opening { .. } | State::RecordingPausing { .. } => {
                self.tell_abort(attempt, &reason, actions);
                self.unwind(attempt, reason, false, actions);
            }
            State::Pausing { .. } => {
                self.tell_abort(attempt, &reason, actions);
                self.unwind_from(attempt, reason, true, UnwindStep::AwaitingPause);
            }
            State::Streaming { .. } | State::AwaitingPrepared { .. } | State::Checking { .. } => {
                self.tell_abort(attempt, &reason, actions);
                self.unwind(attempt, reason, true, actions);
            }
            State::Copying { .. }
            | State::RecordingCommitting(_)
            | State::InDoubt(_)
            | State::Unwinding(_)
            | State::Releasing { .. }
            | State::Fencing { .. }
            | State::Ending { .. }
            | State::Done { .. } => return,
        }
        if let State::Unwinding(unwinding) = &mut self.state {
            unwinding.end = end;
        }
    }

    /// Best effort: whether it arrives or not, the attempt is settled as aborted before the next one is opened.
    fn tell_abort(&self, attempt: Attempt, reason: &WireError, actions: &mut Actions) {
        self.send(
            ToDestination::Abort {
                attempt,
                reason: reason.clone(),
            },
            actions,
        );
    }

    /// Leaves the way to COMMITTING: from here the guest goes on at this side once ROLLED_BACK is durable.
    pub(super) fn unwind(
        &mut self,
        attempt: Attempt,
        reason: WireError,
        paused: bool,
        actions: &mut Actions,
    ) {
        if matches!(
            self.state,
            State::Streaming { .. }
                | State::AwaitingPrepared { .. }
                | State::Checking { .. }
                | State::RecordingCommitting(_)
                | State::InDoubt(_)
                | State::Fencing { .. }
        ) {
            actions.push(SourceAction::StopStream);
        }
        self.unwind_from(attempt, reason, paused, UnwindStep::Recording);
    }

    fn unwind_from(&mut self, attempt: Attempt, reason: WireError, paused: bool, step: UnwindStep) {
        self.state = State::Unwinding(Unwinding {
            attempt,
            reason,
            paused,
            step,
            end: None,
        });
    }

    /// `[HAND-3]`: ROLLED_BACK of this attempt is durable, so the guest may go on.
    pub(super) fn on_rolled_back(&mut self, unwinding: Unwinding, actions: &mut Actions) {
        match unwinding.step {
            UnwindStep::Recording | UnwindStep::ResumeFailed => {}
            UnwindStep::AwaitingPause | UnwindStep::Resuming => return,
        }
        if !unwinding.paused {
            self.finish_unwinding(unwinding, actions);
            return;
        }
        self.state = State::Unwinding(Unwinding {
            step: UnwindStep::Resuming,
            ..unwinding
        });
        actions.push(SourceAction::Resume {
            permit: RunPermit::new(),
            to: self.before,
        });
    }

    pub(super) fn on_resumed(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        match self.state.clone() {
            State::Unwinding(unwinding) if unwinding.step == UnwindStep::Resuming => {
                self.finish_unwinding(unwinding, actions);
                Ok(())
            }
            State::Fencing {
                step: Step::Doing, ..
            } if !self.facts.shared_disks => {
                self.finish(SourceEnd::ResumedByOperator, actions);
                Ok(())
            }
            _ => self.unexpected("Resumed"),
        }
    }

    pub(super) fn on_resume_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        match &mut self.state {
            State::Unwinding(unwinding) if unwinding.step == UnwindStep::Resuming => {
                unwinding.step = UnwindStep::ResumeFailed;
            }
            State::Fencing { step, .. } if *step == Step::Doing => *step = Step::Failed,
            _ => return self.unexpected("ResumeFailed"),
        }
        actions.push(SourceAction::Report(SourceReport::ResumeFailed { reason }));
        Ok(())
    }

    /// The guest is as before. After a pause the session is closed: the next one's `Offer` makes the destination settle the
    /// attempt and renew its copy, and its `Ready` says what of it still counts.
    fn finish_unwinding(&mut self, unwinding: Unwinding, actions: &mut Actions) {
        let Unwinding {
            attempt,
            reason,
            paused,
            step: _,
            end,
        } = unwinding;
        actions.push(SourceAction::Report(SourceReport::RolledBack {
            attempt,
            reason,
        }));
        if let Some(reason) = end {
            self.begin_ending(attempt, reason);
            return;
        }
        if paused && self.is_connected() {
            actions.push(SourceAction::CloseSession);
            self.link = Link::Down;
        }
        self.state = State::Copying { last: attempt };
    }

    pub(super) fn begin_ending(&mut self, last: Attempt, reason: WireError) {
        self.state = State::Ending {
            last,
            reason,
            step: Step::Recording,
        };
    }

    /// ENDED is durable, or cannot be written: tell the destination, if it can be told.
    pub(super) fn on_ended_durable(
        &mut self,
        last: Attempt,
        reason: WireError,
        step: Step,
        actions: &mut Actions,
    ) {
        if step != Step::Recording {
            return;
        }
        if !self.is_connected() {
            self.finish_ending(reason, false, actions);
            return;
        }
        self.send(
            ToDestination::Cancel {
                reason: reason.clone(),
            },
            actions,
        );
        actions.push(SourceAction::StartTimer(Timer::Cancel));
        self.state = State::Ending {
            last,
            reason,
            step: Step::Doing,
        };
    }

    pub(super) fn finish_ending(
        &mut self,
        reason: WireError,
        peer_told: bool,
        actions: &mut Actions,
    ) {
        self.finish(SourceEnd::NotCommitted { reason, peer_told }, actions);
    }

    pub(super) fn on_cancelled(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        match self.state.clone() {
            State::Ending {
                reason,
                step: Step::Doing,
                ..
            } => {
                self.send(ToDestination::Goodbye, actions);
                self.finish_ending(reason, true, actions);
                Ok(())
            }
            State::Done { .. } => Ok(()),
            _ => self.unexpected("Cancelled"),
        }
    }

    pub(super) fn on_cancel_overdue(&mut self, actions: &mut Actions) {
        if let State::Ending {
            reason,
            step: Step::Doing,
            ..
        } = self.state.clone()
        {
            self.finish_ending(reason, false, actions);
        }
    }
}
