//! The copy at the destination: made for an offer, renewed when used up, discarded at the end.
//!
//! Owns what happens to the copy beside the attempts. Invariants: a launched process is let go only when
//! a durable record names it; `Ready` is said only when nothing is undecided and that is so; the copy goes only when it is durable that this side will not run it.

use crate::error::{ErrorCode, WireError};
use crate::ids::SessionNumber;
use crate::message::ToSource;

use super::super::Unexpected;
use super::super::record::{DestinationState, ProcessRecord};
use super::machine::{Actions, DestinationHandover};
use super::state::{GuestCopy, Link, State, Step};
use super::{DestinationAction, DestinationEnd, DestinationReport};

impl DestinationHandover {
    /// An offer says that the source copies, so it is not in doubt: what is undecided is settled as aborted before `Ready`.
    pub(super) fn on_offered(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        if self.link != Link::Welcomed {
            return self.unexpected("Offer");
        }
        self.link = Link::Offered;
        self.abort_undecided(WireError::new(
            ErrorCode::Cancelled,
            "the source went on copying in a new session",
        ));
        self.advance_offer(actions);
        Ok(())
    }

    /// Takes a waiting offer as far as it goes: settle, make the copy, write its process down, `Ready`.
    pub(super) fn advance_offer(&mut self, actions: &mut Actions) {
        if self.link != Link::Offered {
            return;
        }
        match &self.state {
            State::Receiving | State::Settled { .. } => {}
            State::Opening { .. }
            | State::Opened { .. }
            | State::Loading { .. }
            | State::Prepared { .. }
            | State::Aborting { .. }
            | State::Relinquishing { .. } => return,
            State::Owning { .. } | State::Starting { .. } | State::Owned { .. } => {
                self.refuse(
                    "this host owns the guest: its source must ask, not copy",
                    actions,
                );
                return;
            }
            State::Ending { .. } | State::Ended { .. } => {
                self.refuse("this migration has ended here: begin a new one", actions);
                return;
            }
        }
        match self.copy {
            GuestCopy::Missing => self.make_copy(false, actions),
            GuestCopy::Used => self.make_copy(true, actions),
            GuestCopy::Making | GuestCopy::Loading => {}
            GuestCopy::Receiving => {
                if self.journal.durable() == Some(&self.record()) {
                    self.link = Link::Ready;
                    actions.push(DestinationAction::Ready);
                }
            }
        }
    }

    fn make_copy(&mut self, renew: bool, actions: &mut Actions) {
        self.copy = GuestCopy::Making;
        actions.push(DestinationAction::MakeCopy { renew });
    }

    pub(super) fn refuse(&mut self, why: &str, actions: &mut Actions) {
        self.link = Link::Down;
        actions.push(DestinationAction::Refuse(WireError::new(
            ErrorCode::GuestBusy,
            why,
        )));
    }

    pub(super) fn on_copy_launched(&mut self, process: ProcessRecord) -> Result<(), Unexpected> {
        if self.copy != GuestCopy::Making {
            return self.unexpected("CopyLaunched");
        }
        self.process = Some(process);
        Ok(())
    }

    pub(super) fn on_copy_made(
        &mut self,
        process: ProcessRecord,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.copy != GuestCopy::Making {
            return self.unexpected("CopyMade");
        }
        self.copy = GuestCopy::Receiving;
        self.process = Some(process);
        self.advance_offer(actions);
        self.continue_ending(actions);
        Ok(())
    }

    pub(super) fn on_make_copy_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if self.copy != GuestCopy::Making {
            return self.unexpected("MakeCopyFailed");
        }
        self.copy = GuestCopy::Missing;
        if matches!(self.state, State::Receiving | State::Settled { .. }) {
            if self.is_up() {
                actions.push(DestinationAction::Refuse(reason.clone()));
                self.link = Link::Down;
            }
            self.on_end(reason, false, actions);
        } else {
            self.continue_ending(actions);
        }
        Ok(())
    }

    pub(super) fn on_copy_lost(&mut self, reason: WireError) {
        self.copy = GuestCopy::Missing;
        self.abort_undecided(reason);
    }

    pub(super) fn on_end(&mut self, reason: WireError, asked: bool, actions: &mut Actions) {
        if asked && self.link == Link::Offered {
            // It takes its offer back: the answer is `Cancelled`, not a refusal of what it no longer offers.
            self.link = Link::Welcomed;
        }
        match &mut self.state {
            State::Receiving
            | State::Opening { .. }
            | State::Opened { .. }
            | State::Loading { .. }
            | State::Prepared { .. }
            | State::Aborting { .. }
            | State::Settled { .. } => {
                self.state = State::Ending {
                    last: self.state.attempt(),
                    reason,
                    step: Step::Recording,
                    asked,
                };
                if self.session == SessionNumber(0) {
                    self.continue_ending(actions);
                }
            }
            State::Ending { asked: before, .. } => *before |= asked,
            State::Ended { .. } => {
                if asked {
                    self.send(ToSource::Cancelled, actions);
                }
            }
            State::Owning { .. }
            | State::Starting { .. }
            | State::Owned { .. }
            | State::Relinquishing { .. } => {
                actions.push(DestinationAction::Report(
                    DestinationReport::TooLateToGiveUp,
                ));
            }
        }
    }

    /// ENDED is durable and nothing is being done with the copy: it may go.
    pub(super) fn continue_ending(&mut self, actions: &mut Actions) {
        let State::Ending { step, .. } = &mut self.state else {
            return;
        };
        let busy = matches!(self.copy, GuestCopy::Making | GuestCopy::Loading);
        let durable = matches!(
            self.journal.durable().map(|record| &record.state),
            Some(DestinationState::Ended { .. })
        );
        let unborn = self.session == SessionNumber(0);
        if !busy && (durable || unborn) && *step != Step::Doing {
            *step = Step::Doing;
            actions.push(DestinationAction::Discard);
        }
    }

    pub(super) fn on_discarded(&mut self, actions: &mut Actions) -> Result<(), Unexpected> {
        let State::Ending {
            last,
            reason,
            step: Step::Doing,
            asked,
        } = self.state.clone()
        else {
            return self.unexpected("Discarded");
        };
        self.copy = GuestCopy::Missing;
        if asked {
            self.send(ToSource::Cancelled, actions);
        }
        actions.push(DestinationAction::Done(DestinationEnd::Ended {
            reason: reason.clone(),
        }));
        self.state = State::Ended { last, reason };
        Ok(())
    }

    pub(super) fn on_discard_failed(
        &mut self,
        reason: WireError,
        actions: &mut Actions,
    ) -> Result<(), Unexpected> {
        if let State::Ending { step, .. } = &mut self.state
            && *step == Step::Doing
        {
            *step = Step::Failed;
            actions.push(DestinationAction::Report(
                DestinationReport::DiscardFailed { reason },
            ));
            actions.push(DestinationAction::RetryLater);
            return Ok(());
        }
        self.unexpected("DiscardFailed")
    }
}
