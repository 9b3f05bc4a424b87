//! Carries out what the handover machine decided, and tells it what came of it.
//!
//! Owns the mapping from each action to the one thing that does it. Decides nothing: no action is left out, none
//! is added, and a failure becomes the event that the machine expects, so that what may be done to the guest after a
//! failure is the machine's to say (`[HAND-8]`).

use std::time::Duration;

use tokio::time::Instant;
use vmferry_common::phase::Phase;
use vmferry_hypervisor::GuestLife;
use vmferry_proto::handover::{
    RunPermit, SourceAction, SourceEnd, SourceEvent, SourceRecord, SourceReport, Timer, back_off,
};
use vmferry_proto::ids::{Attempt, SessionNumber};
use vmferry_proto::message::ToDestination;
use vmferry_proto::spec::RunState;

use super::Migration;
use super::copy::NoSession;
use super::inputs::Input;
use crate::error::MigrateError;
use crate::policy::give_up_pause_after;

/// How long the destination may take to make an attempt known, its hooks of phase `pause` included. The guest runs meanwhile.
const OPEN_LIMIT: Duration = Duration::from_secs(120);
/// In doubt for so long with Commit repeated: then Query, which settles an undecided attempt as aborted.
const DOUBT_LIMIT: Duration = Duration::from_secs(60);
/// Between two tries of what failed here.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long the destination may take to clean up after a cancel.
const CANCEL_LIMIT: Duration = Duration::from_secs(15);

/// Whether the destination is to blame where this event fits nothing.
const fn is_of_peer(event: &SourceEvent) -> bool {
    matches!(
        event,
        SourceEvent::AttemptOpened { .. }
            | SourceEvent::Prepared { .. }
            | SourceEvent::Outcome(_)
            | SourceEvent::Cancelled
    )
}

impl Migration {
    /// Tells the machine `event` and carries out what follows, until nothing more does.
    pub(super) async fn feed(&mut self, event: SourceEvent) {
        self.events.push_back(event);
        self.feed_queued().await;
    }

    /// As [`feed`](Self::feed), with what actions have already answered.
    pub(super) async fn feed_queued(&mut self) {
        while let Some(event) = self.events.pop_front() {
            tracing::debug!(?event, "handover");
            let from_peer = is_of_peer(&event);
            match self.handover.handle(event) {
                Ok(actions) => {
                    for action in actions {
                        self.act(action).await;
                    }
                }
                Err(illegal) if from_peer && self.session.is_some() => {
                    // Nothing it says is worth waiting for any more, least of all while the guest stands still.
                    let lost = self.drop_session(&MigrateError::Protocol((&illegal).into()));
                    self.events.push_back(lost);
                }
                Err(illegal) => tracing::warn!(%illegal, "event ignored by the handover"),
            }
        }
    }

    pub(super) async fn act(&mut self, action: SourceAction) {
        tracing::debug!(?action, "handover");
        let event = match action {
            SourceAction::Record(record) => Some(self.record(*record).await),
            SourceAction::Connect { session } => self.open_session(session).await,
            SourceAction::Send(message) => self.say(&message).await,
            SourceAction::PauseGuest { attempt } => Some(self.pause_guest(attempt).await),
            SourceAction::StreamFinal { attempt, run_state } => {
                self.prepared_early = None;
                let ended = self.flight(attempt, run_state).await;
                self.events.push_back(ended);
                self.prepared_early.take()
            }
            // What is queued on the lanes may go on: it is re-armed memory, and a write since marks it again.
            SourceAction::StopStream => None,
            SourceAction::CheckPaused { attempt } => Some(self.check_paused(attempt).await),
            SourceAction::Resume { permit, to } => Some(self.resume_guest(permit, to).await),
            SourceAction::Release => Some(self.release_guest().await),
            SourceAction::EndGuest => Some(self.end_guest().await),
            SourceAction::StartTimer(timer) => {
                self.timers.start(timer, self.duration(timer));
                None
            }
            SourceAction::CloseSession => {
                if let Some(session) = self.session.take() {
                    session.close().await;
                }
                None
            }
            SourceAction::Report(report) => {
                self.report(&report);
                None
            }
            SourceAction::Done(end) => {
                self.on_done(end);
                None
            }
        };
        self.events.extend(event);
    }

    fn duration(&self, timer: Timer) -> Duration {
        match timer {
            Timer::Open(_) => OPEN_LIMIT,
            Timer::Pause(_) => {
                let limits = &self.options.limits;
                give_up_pause_after(limits.pause_limit(self.stats.predicted()))
            }
            Timer::Doubt(_) => DOUBT_LIMIT,
            Timer::BackOff { failures } => back_off(failures),
            Timer::Retry => RETRY_AFTER,
            Timer::Cancel => CANCEL_LIMIT,
        }
    }

    async fn record(&mut self, record: SourceRecord) -> SourceEvent {
        let began = Instant::now();
        let written = self.journal.write_aside(record).await;
        self.stats.on_journal(began.elapsed());
        match written {
            Ok(()) => SourceEvent::Recorded,
            Err(error) => SourceEvent::RecordFailed {
                visible: error.visible,
                reason: MigrateError::Journal(error).to_wire(),
            },
        }
    }

    /// Opens a session while everything else goes on; a cancel meanwhile gives it up.
    async fn open_session(&mut self, number: SessionNumber) -> Option<SourceEvent> {
        self.session = None;
        let (dialer, last) = (self.dialer.clone(), self.handover.record().state.attempt());
        let mut dialing = Box::pin(async move { dialer.dial(number, last).await });
        loop {
            let input = tokio::select! {
                biased;
                input = self.input() => input,
                dialed = &mut dialing => match dialed {
                    Ok(session) => {
                        let register = session.register();
                        self.session = Some(session);
                        return Some(SourceEvent::Connected { register });
                    }
                    Err(error) => {
                        let reason = error.to_wire();
                        self.connect_error = Some(error);
                        return Some(SourceEvent::ConnectionLost { reason });
                    }
                },
            };
            if let Some(event) = self.while_dialing(input) {
                let reason = MigrateError::Cancelled("a request while connecting").to_wire();
                self.events
                    .push_back(SourceEvent::ConnectionLost { reason });
                return Some(event);
            }
        }
    }

    /// What is worth giving up a connection attempt for.
    fn while_dialing(&mut self, input: Input) -> Option<SourceEvent> {
        match input {
            Input::Cancel(who) => Some(SourceEvent::Cancel {
                reason: MigrateError::Cancelled(who).to_wire(),
            }),
            Input::Leave => {
                self.left_in_doubt = self.handover.is_in_doubt();
                Some(SourceEvent::Cancel {
                    reason: MigrateError::Cancelled("a second signal").to_wire(),
                })
            }
            Input::Fenced => Some(SourceEvent::ResolveDestinationFenced),
            Input::GuestEnded(_) if self.parting => None,
            Input::GuestEnded(life) => {
                let reason = MigrateError::GuestEnded(life).to_wire();
                Some(if self.handover.is_copying() {
                    SourceEvent::Cancel { reason }
                } else {
                    SourceEvent::GuestTouched { reason }
                })
            }
            Input::Timer(timer) => {
                self.events.push_back(SourceEvent::TimedOut(timer));
                None
            }
            Input::Deadline => Some(SourceEvent::Cancel {
                reason: MigrateError::TimedOut(self.options.limits.timeout).to_wire(),
            }),
            Input::Trigger => {
                self.triggered = true;
                None
            }
            Input::Peer(_) | Input::LinkLost(_) | Input::Failed(_) => None,
        }
    }

    /// Says something on the session; a failure is the loss of it.
    async fn say(&mut self, message: &ToDestination) -> Option<SourceEvent> {
        let Some(session) = self.session.as_mut() else {
            let reason = MigrateError::from(NoSession).to_wire();
            return Some(SourceEvent::ConnectionLost { reason });
        };
        match session.send(message).await {
            Ok(()) => {
                // In doubt it is said again and again.
                if matches!(message, ToDestination::Commit(_)) && self.phase < Phase::Commit {
                    self.tell(Phase::Commit);
                }
                None
            }
            Err(error) => {
                self.session = None;
                let reason = MigrateError::SessionLost(error).to_wire();
                Some(SourceEvent::ConnectionLost { reason })
            }
        }
    }

    async fn pause_guest(&mut self, attempt: Attempt) -> SourceEvent {
        self.stats.on_pause_begins();
        match self.guest.pause().await {
            Ok(paused) => {
                let before = paused.before();
                self.paused = Some(paused);
                self.stats.on_paused();
                SourceEvent::GuestPaused { before }
            }
            Err(error) => {
                tracing::warn!(%attempt, "the pause failed");
                SourceEvent::PauseFailed {
                    before: error.before,
                    reason: MigrateError::Pause(error).to_wire(),
                }
            }
        }
    }

    async fn check_paused(&mut self, attempt: Attempt) -> SourceEvent {
        let Some(paused) = &self.paused else {
            let error = MigrateError::Internal("no proof of the pause".to_owned());
            return SourceEvent::AbortAttempt {
                reason: error.to_wire(),
            };
        };
        match self.guest.still_paused(paused).await {
            Ok(()) => SourceEvent::StillPaused { attempt },
            Err(error) => SourceEvent::GuestTouched {
                reason: MigrateError::Guest(error).to_wire(),
            },
        }
    }

    async fn resume_guest(&mut self, permit: RunPermit, to: RunState) -> SourceEvent {
        match self.guest.resume(permit, to).await {
            Ok(()) => {
                self.paused = None;
                self.stats.on_resumed();
                SourceEvent::Resumed
            }
            Err(error) if *self.life.borrow() != GuestLife::Alive => {
                // There is nothing to bring back any more, nor anything that a later try could change.
                tracing::warn!(%error, "the guest has ended, so it is not resumed");
                self.paused = None;
                SourceEvent::GuestGone
            }
            Err(error) => SourceEvent::ResumeFailed {
                reason: MigrateError::Guest(error).to_wire(),
            },
        }
    }

    async fn release_guest(&mut self) -> SourceEvent {
        if self.phase < Phase::Start {
            self.tell(Phase::Start);
        }
        match self.guest.release().await {
            Ok(()) => {
                self.tell(Phase::Release);
                SourceEvent::Released
            }
            Err(error) => SourceEvent::ReleaseFailed {
                reason: MigrateError::Guest(error).to_wire(),
            },
        }
    }

    async fn end_guest(&mut self) -> SourceEvent {
        match self.guest.release().await {
            Ok(()) => SourceEvent::GuestEnded,
            Err(error) => SourceEvent::EndGuestFailed {
                reason: MigrateError::Guest(error).to_wire(),
            },
        }
    }

    fn report(&mut self, report: &SourceReport) {
        match report {
            SourceReport::RolledBack { reason, .. } => {
                self.rolled_back += 1;
                self.last_rollback = Some(reason.clone());
            }
            SourceReport::InDoubt { .. } if *self.life.borrow() != GuestLife::Alive => {
                self.progress.note(
                    "in doubt: the guest is gone here, and only the destination knows whether it runs there; asking again",
                );
            }
            SourceReport::InDoubt { .. } => self.progress.note(
                "in doubt: the guest waits, paused, for the destination's answer; asking again",
            ),
            SourceReport::JournalFailed { .. }
            | SourceReport::ResumeFailed { .. }
            | SourceReport::UnknownToDestination { .. }
            | SourceReport::OtherRegister { .. }
            | SourceReport::TouchedInDoubt { .. }
            | SourceReport::ReleaseFailed { .. }
            | SourceReport::TooLateToCancel
            | SourceReport::ResolvedByOperator { .. } => {
                self.progress.note(&crate::words::of_report(report));
            }
        }
        tracing::debug!(?report, "handover");
    }

    fn on_done(&mut self, end: SourceEnd) {
        tracing::debug!(?end, "the handover has ended");
        self.end = Some(end);
    }
}
