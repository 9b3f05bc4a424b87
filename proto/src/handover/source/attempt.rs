//! One attempt at the source: the way from the open question to COMMITTING.
//!
//! Owns the order of `[HAND-3]` up to COMMITTING and the checks of `[HAND-10]`; `unwind` owns the ways back. Invariants: the pause
//! follows a durable PAUSING, and COMMITTING is handed to the journal only when everything was sent, the register that
//! welcomed this session answered `Prepared`, and the guest was seen to stand still after that.

use crate::error::{ErrorCode, WireError};
use crate::ids::Attempt;
use crate::message::{AttemptKey, ToDestination};
use crate::spec::RunState;

use super::super::Unexpected;
use super::machine::{Actions, SourceHandover};
use super::state::{Ask, Doubt, Link, State, UnwindStep};
use super::{SourceAction, SourceReport, Timer};

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
        if self.pause_answered(true) {
            self.before = before;
            return Ok(());
        }
        let State::Pausing { attempt } = self.state else {
            return self.unexpected("GuestPaused");
        };
        if before == self.before {
            self.state = State::Streaming { attempt };
            actions.push(SourceAction::StreamFinal {
                attempt,
                run_state: before,
            });
            return Ok(());
        }
        self.before = before;
        let reason = WireError::new(
            ErrorCode::GuestChanged,
            "somebody paused or resumed the guest just as it was to be paused for the cutover",
        );
        self.give_up_paused(attempt, reason, true, actions);
        Ok(())
    }

    /// The pause of an attempt that was given up meanwhile is answered: now it can be rolled back.
    fn pause_answered(&mut self, paused: bool) -> bool {
        if let State::Unwinding(unwinding) = &mut self.state
            && unwinding.step == UnwindStep::AwaitingPause
        {
            unwinding.step = UnwindStep::Recording;
            unwinding.paused = paused;
            return true;
        }
        false
    }

    fn give_up_paused(
        &mut self,
        attempt: Attempt,
        reason: WireError,
        paused: bool,
        actions: &mut Actions,
    ) {
        self.tell_abort(attempt, &reason, actions);
        self.unwind(attempt, reason, paused, actions);
    }

    pub(super) fn on_pause_failed(
        &mut self,
        before: Option<RunState>,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        let paused = before.is_some();
        if !self.pause_answered(paused) {
            let State::Pausing { attempt } = self.state else {
                return self.unexpected("PauseFailed");
            };
            self.give_up_paused(attempt, reason, paused, actions);
        }
        self.before = before.unwrap_or(self.before);
        Ok(())
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
            State::RecordingCommitting(doubt) => {
                // Commit was not sent: a question instead settles it as aborted.
                self.state = State::RecordingCommitting(Doubt {
                    ask: Ask::Query,
                    ..doubt
                });
                actions.push(SourceAction::Report(SourceReport::TouchedInDoubt {
                    reason,
                }));
            }
            State::InDoubt(_) => {
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
}
