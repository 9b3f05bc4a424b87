//! How the actions of the handover machine are carried out.
//!
//! Owns their order: what one action answers is fed back before the next event is looked at. Whatever takes time with the guest is
//! queued as a job; before any job that ends or freezes the copy, the lanes are halted, so that no frame is written behind
//! its back.

use std::collections::VecDeque;

use tokio::time::Instant;
use vmferry_common::phase::{Ending, Phase};
use vmferry_hypervisor::GuestLife;
use vmferry_hypervisor::open::TargetOptions;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    DestinationAction, DestinationEnd, DestinationEvent, DestinationReport,
};
use vmferry_proto::ids::{Attempt, SessionNumber};
use vmferry_proto::message::{Ready, ToSource, Welcome};

use super::jobs::{self, Job, JobDone, NotStarted, Outcome, Then, Tools};
use super::{LINGER, Migration};
use crate::receipt::{self, ReceiptContext};
use crate::session::Opening;

/// How this agent names itself in `Welcome`.
pub(crate) const AGENT: &str = concat!("vmferry-dst ", env!("CARGO_PKG_VERSION"));

impl Migration {
    /// Feeds what the peer said; what the machine does not expect is the peer's violation.
    pub(super) async fn feed_peer(&mut self, event: DestinationEvent) {
        match self.handover.handle(event) {
            Ok(actions) => self.carry_out(actions).await,
            Err(unexpected) => {
                let error = WireError::new(ErrorCode::ProtocolViolation, unexpected.to_string());
                Box::pin(self.on_violation(error)).await;
            }
        }
    }

    /// Feeds what happened here; what the machine does not expect is a bug, which must not take other guests down.
    pub(super) async fn feed(&mut self, event: DestinationEvent) {
        match self.handover.handle(event) {
            Ok(actions) => self.carry_out(actions).await,
            Err(unexpected) => tracing::error!(guest = %self.config.name, "internal: {unexpected}"),
        }
    }

    /// Carries out `actions`, and what follows from those that are answered at once.
    pub(super) async fn carry_out(&mut self, actions: Vec<DestinationAction>) {
        let mut queue: VecDeque<DestinationAction> = actions.into();
        while let Some(action) = queue.pop_front() {
            let Some(answer) = self.perform(action).await else {
                continue;
            };
            match self.handover.handle(answer) {
                Ok(more) => queue.extend(more),
                Err(unexpected) => {
                    tracing::error!(guest = %self.config.name, "internal: {unexpected}");
                }
            }
        }
    }

    /// Carries out one action; what it answers at once is fed by the caller.
    async fn perform(&mut self, action: DestinationAction) -> Option<DestinationEvent> {
        match action {
            DestinationAction::Record(record) => {
                return Some(match self.host.store.write(*record).await {
                    Ok(()) => DestinationEvent::Recorded,
                    Err(failed) => DestinationEvent::RecordFailed {
                        visible: failed.visible,
                        reason: failed.reason,
                    },
                });
            }
            DestinationAction::Welcome { session } => self.welcome(session),
            DestinationAction::Refuse(error) => return self.part_with(&error).await,
            DestinationAction::MakeCopy { renew } => {
                if renew {
                    self.halt_lanes().await;
                }
                self.tracker.enter(Phase::Prepare);
                self.jobs.push_back(if self.hooks.has(Phase::Prepare) {
                    Job::Hook {
                        phase: Phase::Prepare,
                        then: Then::MakeCopy { renew },
                    }
                } else {
                    Job::MakeCopy { renew }
                });
            }
            DestinationAction::Ready => {
                let asked = std::mem::replace(&mut self.phase_hooks.copy, true);
                self.tracker.enter(Phase::Copy);
                if !asked && self.hooks.has(Phase::Copy) {
                    self.jobs.push_back(Job::Hook {
                        phase: Phase::Copy,
                        then: Then::SayReady,
                    });
                } else {
                    self.say_ready();
                }
            }
            DestinationAction::Send(message) => self.send(message),
            DestinationAction::LoadState { .. } => self.load().await,
            DestinationAction::Start { permit, to } => {
                self.hooks.tell(Phase::Commit);
                self.tracker.enter(Phase::Start);
                self.jobs.push_back(Job::Start { permit, to });
            }
            DestinationAction::Discard => {
                self.drop_receipt();
                self.halt_lanes().await;
                self.jobs.push_back(Job::Discard);
            }
            DestinationAction::RetryLater => self.retry_later(),
            DestinationAction::Report(report) => self.report(report),
            DestinationAction::Done(end) => self.done(&end),
        }
        None
    }

    fn send(&mut self, message: ToSource) {
        if let ToSource::AttemptOpened { attempt } = &message {
            self.begin_receipt(*attempt);
        }
        let Some(session) = &self.session else {
            return;
        };
        if !session.outgoing.send(message) {
            tracing::warn!(guest = %self.config.name, "the source does not read: an answer is lost");
        }
    }

    fn welcome(&mut self, session: SessionNumber) {
        if let Some(open) = self
            .session
            .as_ref()
            .filter(|open| open.number() == session)
        {
            let hello = open.hello.clone();
            let welcome = crate::admission::welcome(&hello, self.host.register, AGENT);
            self.send_if(welcome);
        }
    }

    fn send_if(&mut self, welcome: Result<Welcome, WireError>) {
        match welcome {
            Ok(welcome) => self.send(ToSource::Welcome(welcome)),
            // The version was agreed before the session was let in.
            Err(error) => tracing::error!(guest = %self.config.name, "internal: {error}"),
        }
    }

    /// A further connection of the session hears the same `Welcome`.
    pub(super) fn welcome_further(&self, opening: &Opening) {
        if let Ok(welcome) = crate::admission::welcome(&opening.hello, self.host.register, AGENT) {
            opening.outgoing.send(ToSource::Welcome(welcome));
        }
    }

    /// The machine has let the session go already; it is only parted with here.
    async fn part_with(&mut self, error: &WireError) -> Option<DestinationEvent> {
        self.drop_receipt();
        let mut session = self.session.take()?;
        session.halt().await;
        session.close(Some(error));
        self.tracker.failed(error.to_string());
        self.tracker.disconnected();
        self.keep_until = Some(Instant::now() + self.host.keep);
        Some(DestinationEvent::ConnectionLost)
    }

    /// Frames may come from here on.
    pub(super) fn say_ready(&mut self) {
        let (Some(copy), Some(session)) = (&mut self.copy, &mut self.session) else {
            return;
        };
        let board = session.begin_flow(copy.sink.clone(), self.tracker.meter.clone());
        self.tracker.lanes_on(board.clone());
        copy.board = Some(board);
        let ready = Ready {
            incarnations: copy.incarnations.clone(),
            resume: self.resume.clone(),
        };
        self.send(ToSource::Ready(ready));
    }

    /// The script that receives the attempt must be there before the source hears that it may begin.
    fn begin_receipt(&mut self, attempt: Attempt) {
        let (Some(copy), Some(session)) = (&self.copy, &self.session) else {
            return;
        };
        let Some(board) = copy.board.clone() else {
            return;
        };
        self.tracker.attempt(attempt.0);
        let (handle, script) = receipt::begin(ReceiptContext {
            migration: session.hello.migration,
            attempt,
            sink: copy.sink.clone(),
            board,
            outgoing: session.outgoing.clone(),
            hooks: self.hooks.clone(),
            tracker: self.tracker.clone(),
        });
        self.receipt = Some(handle);
        self.receiving = Some(Box::pin(script));
    }

    async fn load(&mut self) {
        let began = Instant::now();
        self.tracker.enter(Phase::Load);
        // Nothing may be written behind the load; a flush is part of it.
        self.halt_lanes().await;
        match self.received.take() {
            Some(received) => self.jobs.push_back(Job::Load { received, began }),
            // It was put there by the event that this action answers.
            None => tracing::error!(guest = %self.config.name, "internal: nothing to load"),
        }
    }

    /// Ends the lanes of the session and keeps how far they came: nothing is written to the guest after this.
    async fn halt_lanes(&mut self) {
        if let Some(session) = &mut self.session
            && let Some(lanes) = session.halt().await
        {
            let session = session.number();
            self.resume = Some(vmferry_proto::message::ResumePoint { session, lanes });
        }
    }

    fn report(&mut self, report: DestinationReport) {
        let guest = &self.config.name;
        match report {
            DestinationReport::JournalFailed { reason } => {
                tracing::error!(%guest, "the journal cannot be written: {reason}");
                self.tracker.failed(reason.to_string());
            }
            DestinationReport::Aborted { attempt, reason } => {
                tracing::warn!(%guest, attempt = attempt.0, "the attempt is aborted: {reason}");
                self.tracker.failed(reason.to_string());
                self.drop_receipt();
            }
            DestinationReport::StartUncertain { attempt, reason } => {
                self.start_uncertain(attempt, &reason);
            }
            DestinationReport::DiscardFailed { reason } => {
                tracing::error!(%guest, "{reason}");
                self.tracker.failed(reason.to_string());
            }
            DestinationReport::TooLateToGiveUp => {
                tracing::info!(%guest, "this host owns the guest: the migration cannot be ended any more");
            }
        }
    }

    /// `[HAND-6]`: the guest is this host's, and its start failed behind the point of no return.
    fn start_uncertain(&mut self, attempt: Attempt, reason: &WireError) {
        let guest = &self.config.name;
        self.tracker.failed(reason.to_string());
        let life = self.copy.as_ref().map(|copy| copy.life.borrow().clone());
        if let Some(GuestLife::Gone(how) | GuestLife::ShutDown(how)) = life {
            tracing::error!(%guest, attempt = attempt.0, "this host owns the guest, whose hypervisor ended before its start was answered: {how}. It is an ordinary crash of that guest, whose images are here and flushed: boot it from them");
            return self.settle();
        }
        tracing::error!(%guest, attempt = attempt.0, "this host owns the guest, but it is not known whether it runs: {reason}");
        if life.is_some() {
            return self.retry_later();
        }
        // An agent before this one held the copy, and it could not be taken in hand: only its own monitor can say more.
        tracing::error!(%guest, "if the guest's hypervisor is there still, look at it: where it stands paused, let it go on by hand");
        self.settle();
    }

    /// The handover is settled: the guest is let go or was discarded, and its name is free for the next migration.
    fn done(&mut self, end: &DestinationEnd) {
        let guest = &self.config.name;
        match end {
            DestinationEnd::Owned { attempt } => {
                tracing::info!(%guest, attempt = attempt.0, "committed: the guest is this host's");
                self.tracker.ended(Ending::Committed);
                self.hooks.tell(Phase::Start);
                self.hooks.tell(Phase::Release);
                self.hooks.tell(Ending::Committed);
                self.folder().remove_notes();
                self.tracker.enter(Phase::Release);
            }
            DestinationEnd::Ended { reason } => {
                tracing::info!(%guest, "ended without a commit: {reason}");
                let cancelled = reason.code == ErrorCode::Cancelled;
                let ending = if cancelled {
                    Ending::Cancelled
                } else {
                    Ending::Failed
                };
                self.hooks.tell(ending);
                self.tracker.ended(ending);
                self.tracker.failed(reason.to_string());
            }
        }
        self.settle();
    }

    /// There is nothing more to do for the guest: it and its name are let go.
    pub(super) fn settle(&mut self) {
        self.copy = None;
        self.lock = None;
        self.over = true;
        // The source parts when it has read the outcome; one that never does is not waited for.
        self.keep_until = Some(Instant::now() + LINGER);
    }

    /// Takes the next piece of work, if nothing is being done.
    pub(super) fn begin_next_job(&mut self) {
        if self.job.is_some() {
            return;
        }
        let Some(job) = self.jobs.pop_front() else {
            return;
        };
        let tools = Tools {
            hypervisors: self.host.hypervisors.clone(),
            config: self.config.clone(),
            options: TargetOptions {
                run_dir: self.folder().path,
                journal: self.namer.clone(),
                populated: self.populated.clone(),
            },
            folder: self.folder(),
            hooks: self.hooks.clone(),
            spec: self.spec.clone(),
            migration: self.handover.record().migration,
            leftover: self.leftover.clone(),
        };
        let (asking, guest) = match &job {
            Job::Hook { then, .. } => (Some(*then), None),
            Job::FlushAhead { .. }
            | Job::MakeCopy { .. }
            | Job::Load { .. }
            | Job::Start { .. }
            | Job::Discard => (None, self.copy.as_mut().and_then(|copy| copy.guest.take())),
        };
        self.asking = asking;
        self.job = Some(Box::pin(jobs::run(job, tools, guest)));
    }

    pub(super) async fn on_job_done(&mut self, done: JobDone) {
        let JobDone { guest, outcome } = done;
        if let Outcome::CopyMade(made) = outcome {
            return self.on_copy_made(guest, made).await;
        }
        if let Outcome::Asked { then, asked } = outcome {
            self.asking = None;
            return self.on_asked(then, asked).await;
        }
        if let Some(copy) = &mut self.copy {
            copy.guest = guest;
        }
        match outcome {
            Outcome::FlushedAhead(then) => self.go_on(then).await,
            Outcome::Asked { .. } | Outcome::CopyMade(_) => {}
            Outcome::Loaded(Ok(timing)) => {
                self.feed(DestinationEvent::StateLoaded { timing }).await;
            }
            Outcome::Loaded(Err(reason)) => {
                self.feed(DestinationEvent::LoadFailed { reason }).await;
            }
            Outcome::Started(started) => self.on_started(started).await,
            Outcome::Discarded(Ok(())) => self.feed(DestinationEvent::Discarded).await,
            Outcome::Discarded(Err(reason)) => {
                self.feed(DestinationEvent::DiscardFailed { reason }).await;
            }
        }
    }

    async fn on_asked(&mut self, then: Then, asked: Result<(), WireError>) {
        match (asked, then) {
            (Ok(()), then) => self.go_on(then).await,
            (Err(reason), Then::MakeCopy { .. }) => {
                self.feed(DestinationEvent::MakeCopyFailed { reason }).await;
            }
            (
                Err(error),
                Then::OpenSession(_)
                | Then::SayReady
                | Then::AskPause(..)
                | Then::OpenAttempt(..)
                | Then::Nothing,
            ) => self.give_up(error).await,
        }
    }

    /// The migration ends: a script that is still being asked need not answer any more, and is killed.
    pub(super) async fn stop_asking(&mut self, reason: &WireError) {
        self.ending = true;
        let asked = self.asking.take().inspect(|_| self.job = None);
        let mut gone: Vec<Then> = asked.into_iter().collect();
        self.jobs.retain(|job| match job {
            Job::Hook { then, .. } => {
                gone.push(*then);
                false
            }
            Job::FlushAhead { .. } => false,
            Job::MakeCopy { .. } | Job::Load { .. } | Job::Start { .. } | Job::Discard => true,
        });
        if gone
            .iter()
            .any(|then| matches!(then, Then::MakeCopy { .. }))
        {
            // The machine waits for its copy.
            let reason = reason.clone();
            self.feed(DestinationEvent::MakeCopyFailed { reason }).await;
        }
    }

    /// Goes on after a hook that did not refuse.
    pub(super) async fn go_on(&mut self, then: Then) {
        match then {
            Then::OpenSession(session) => {
                if self.is_open(session) {
                    self.feed(DestinationEvent::SessionOpened { session }).await;
                }
            }
            Then::MakeCopy { renew } => self.jobs.push_back(Job::MakeCopy { renew }),
            Then::SayReady => self.say_ready(),
            Then::AskPause(session, attempt) => {
                let then = Then::OpenAttempt(session, attempt);
                Box::pin(self.ask_hook(Phase::Pause, then)).await;
            }
            // An attempt of a session that was lost or cancelled meanwhile is over before it began.
            Then::OpenAttempt(session, attempt) => {
                if self.is_open(session) && !self.ending {
                    match self.note_for_start() {
                        Ok(()) => {
                            let event = DestinationEvent::OpenAttempt { attempt };
                            self.feed_peer(event).await;
                        }
                        Err(reason) => self.give_up(reason).await,
                    }
                }
            }
            Then::Nothing => {}
        }
    }

    fn is_open(&self, session: SessionNumber) -> bool {
        let open = self.session.as_ref();
        open.is_some_and(|open| open.number() == session)
    }

    /// Makes durable what the disks got so far, then asks the hooks and opens the attempt: what is flushed while the guest
    /// runs need not be flushed while it stands still.
    pub(super) async fn prepare_attempt(&mut self, attempt: Attempt) {
        let Some(session) = self.session.as_ref().map(crate::session::Session::number) else {
            return;
        };
        let then = Then::AskPause(session, attempt);
        let copy = self.copy.as_ref();
        let written = copy.and_then(|copy| Some((copy.sink.clone(), copy.board.clone()?)));
        match written.filter(|(_, board)| board.unflushed() > 0) {
            Some((sink, board)) => self.jobs.push_back(Job::FlushAhead { sink, board, then }),
            None => self.go_on(then).await,
        }
    }

    async fn on_started(&mut self, started: Result<u64, NotStarted>) {
        let event = match started {
            Ok(start_us) => DestinationEvent::Started {
                record_us: self.record_us(start_us),
                start_us,
            },
            Err(NotStarted { never_ran, reason }) => {
                DestinationEvent::StartFailed { never_ran, reason }
            }
        };
        self.feed(event).await;
    }

    /// From `Commit` to OWNED durable: all of the time since, less the start.
    fn record_us(&mut self, start_us: u64) -> u64 {
        let since = self
            .commit_began
            .take()
            .map_or(0, |began| began.elapsed().as_micros());
        u64::try_from(since)
            .unwrap_or(u64::MAX)
            .saturating_sub(start_us)
    }
}
