//! Every way back before COMMITTING at the source: roll back, resume, end.
//!
//! Owns everything that ends in a running guest at this side. Invariants: the resume follows a durable ROLLED_BACK of
//! the same attempt (`[HAND-3]`), and nothing here is reached from COMMITTING but by a failed write that is known to be invisible, or the
//! register's ABORTED.

use crate::error::WireError;
use crate::ids::Attempt;
use crate::message::ToDestination;

use super::super::Unexpected;
use super::super::permit::RunPermit;
use super::machine::{Actions, SourceHandover};
use super::state::{Link, State, Step, UnwindStep, Unwinding};
use super::{SourceAction, SourceEnd, SourceReport, Timer};

impl SourceHandover {
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
    pub(super) fn tell_abort(&self, attempt: Attempt, reason: &WireError, actions: &mut Actions) {
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

    /// The guest is back, or there is nothing to bring back: what the journal says of it is the same. `resolved` is the end where it was
    /// an operator who said so.
    pub(super) fn on_resumed(
        &mut self,
        resolved: SourceEnd,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Unwinding(unwinding) = &self.state
            && unwinding.step == UnwindStep::Resuming
        {
            let unwinding = unwinding.clone();
            self.finish_unwinding(unwinding, actions);
            return Ok(());
        }
        if self.is_fencing_done() && !self.facts.shared_disks {
            self.finish(resolved, actions);
            return Ok(());
        }
        self.unexpected("Resumed or GuestGone")
    }

    pub(super) const fn is_fencing_done(&self) -> bool {
        matches!(
            self.state,
            State::Fencing {
                step: Step::Doing,
                ..
            }
        )
    }

    pub(super) fn on_resume_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Unwinding(unwinding) = &mut self.state
            && unwinding.step == UnwindStep::Resuming
        {
            unwinding.step = UnwindStep::ResumeFailed;
        } else if let State::Fencing { step, .. } = &mut self.state
            && *step == Step::Doing
            && !self.facts.shared_disks
        {
            *step = Step::Failed;
        } else {
            return self.unexpected("ResumeFailed");
        }
        actions.push(SourceAction::Report(SourceReport::ResumeFailed { reason }));
        actions.push(SourceAction::StartTimer(Timer::Retry));
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
        if let State::Ending {
            reason,
            step: Step::Doing,
            ..
        } = &self.state
        {
            let reason = reason.clone();
            self.send(ToDestination::Goodbye, actions);
            self.finish_ending(reason, true, actions);
            return Ok(());
        }
        if self.end().is_some() {
            return Ok(());
        }
        self.unexpected("Cancelled")
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
