//! What a migration does with what happens to it.
//!
//! Owns the reaction to requests, messages, losses and time. A message is either fed to the handover machine, which judges whether it
//! is due, or belongs to the script of the attempt that is open. Whatever the peer does wrong ends the session with one
//! coded error and, while that is still possible, the migration at this side.

use tokio::time::Instant;
use vmferry_common::phase::Phase;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{DestinationEvent, admit};
use vmferry_proto::ids::Attempt;
use vmferry_proto::message::{Offer, ResumePoint};
use vmferry_proto::session_destination::DestinationSessionEvent;

use super::jobs::{Job, Then};
use super::{Event, LINGER, Migration, RETRY_AFTER, Request};
use crate::receipt::{Order, ReceiptError, Received};
use crate::session::{Opening, Session, SessionEvent};

impl Migration {
    pub(super) async fn on(&mut self, event: Event) {
        match event {
            Event::Request(Some(Request::Open { opening, answer })) => {
                self.awaited = false;
                let back = self.take_opening(opening).await;
                // A server that no longer waits has closed the connection.
                let _ = answer.send(back);
            }
            Event::Request(Some(Request::ShutDown) | None) => self.on_shut_down().await,
            Event::Session(event) => self.on_session(event).await,
            Event::Received(received) => self.on_received(received).await,
            Event::JobDone(done) => self.on_job_done(done).await,
            Event::Launched(launched) => self.on_launched(launched).await,
            Event::CopyGone(reason) => self.on_copy_gone(reason).await,
            Event::KeepOver => self.on_keep_over().await,
            Event::Retry => {
                self.retry_at = None;
                self.feed(DestinationEvent::Retry).await;
            }
        }
    }

    async fn on_open(&mut self, opening: Opening) {
        if opening.hello.connection != 0 {
            self.on_bind(opening);
            return;
        }
        if self.shutting_down {
            opening.refuse(&shutting_down());
            return;
        }
        if let Err(error) = self.admit(&opening) {
            opening.refuse(&error);
            return;
        }
        // Whatever the older session still had in hand is settled before the newer one hears how far it came.
        self.end_session(Some(&WireError::new(
            ErrorCode::StaleSession,
            "a newer session of this migration was opened",
        )))
        .await;
        let session = opening.hello.session;
        tracing::info!(guest = %opening.hello.guest, peer = %opening.peer, session = session.0, "session opened");
        self.tracker.connected(session.0);
        self.session = Some(Session::new(opening));
        self.keep_until = self.over.then(|| Instant::now() + LINGER);
        if std::mem::replace(&mut self.phase_hooks.negotiate, true) {
            self.feed(DestinationEvent::SessionOpened { session }).await;
        } else {
            self.ask_hook(Phase::Negotiate, Then::OpenSession(session))
                .await;
        }
    }

    /// Deals with a session that wants in, or gives it back and goes away. A copy gives way to its source's next migration: who
    /// begins one there holds the guest's name, so the old one is over, also where this side has not noticed it yet.
    async fn take_opening(&mut self, opening: Box<Opening>) -> Option<Box<Opening>> {
        let record = self.handover.record();
        let wanted = opening.hello.migration;
        if wanted == record.migration {
            self.on_open(*opening).await;
            return None;
        }
        if self.over {
            self.end_session(None).await;
            return Some(opening);
        }
        let same_sender = opening.peer.as_str() == record.sender;
        if self.handover.is_owned() || !same_sender {
            opening.refuse(&WireError::new(
                ErrorCode::GuestBusy,
                format!(
                    "migration {} from {} holds guest {} here",
                    record.migration, record.sender, record.guest
                ),
            ));
            return None;
        }
        self.give_up(WireError::new(
            ErrorCode::Cancelled,
            format!("its source began a new migration, {wanted}"),
        ))
        .await;
        Some(opening)
    }

    /// Whether a session of this migration may be let in.
    fn admit(&self, opening: &Opening) -> Result<(), WireError> {
        let record = self.handover.record();
        let source = self.host.store.source(&opening.hello.guest)?;
        let sender = opening.peer.as_str();
        admit(&opening.hello, sender, source.as_ref(), Some(&record)).map(drop)
    }

    fn on_bind(&mut self, opening: Opening) {
        let bound = match &mut self.session {
            Some(session) => session.bind(&opening),
            None => Err(WireError::new(
                ErrorCode::ProtocolViolation,
                "there is no session that this connection could belong to",
            )),
        };
        match bound {
            Ok(()) => self.welcome_further(&opening),
            Err(error) => opening.refuse(&error),
        }
    }

    async fn on_session(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Message(message) => self.on_message(*message).await,
            SessionEvent::DeviceState(stream) => {
                // A stream of an attempt that is over is dropped, which stops it.
                if let Some(receipt) = &self.receipt
                    && stream.device_state_of() == Some(receipt.attempt)
                    && let Err(error) = receipt.stream(stream)
                {
                    self.on_violation(error).await;
                }
            }
            SessionEvent::Violation(error) => self.on_violation(error).await,
            SessionEvent::GuestFailed(error) => self.give_up(error).await,
            SessionEvent::GivenUp(error) => {
                tracing::warn!(guest = %self.config.name, "session given up: {}", error.detail);
                self.end_session(Some(&error)).await;
            }
            SessionEvent::Lost(why) => {
                tracing::info!(guest = %self.config.name, "session lost: {why}");
                self.end_session(None).await;
            }
        }
    }

    async fn on_message(&mut self, message: DestinationSessionEvent) {
        match message {
            // It was read before the session was let in; the rules of the session let no second one through.
            DestinationSessionEvent::Hello(_) | DestinationSessionEvent::Late => {}
            DestinationSessionEvent::Offer(offer) => self.on_offer(offer).await,
            DestinationSessionEvent::Converged => {
                self.ask_hook(Phase::Converged, Then::Nothing).await;
            }
            DestinationSessionEvent::Compare(range) => {
                let asked = self.session.as_ref().map(|session| session.compare(range));
                if let Some(Err(error)) = asked {
                    self.on_violation(error).await;
                }
            }
            DestinationSessionEvent::Final(order) => {
                let attempt = order.attempt;
                self.on_order(attempt, Order::Final(order)).await;
            }
            DestinationSessionEvent::DeviceState {
                attempt,
                len,
                digest,
            } => {
                self.on_order(attempt, Order::DeviceState { len, digest })
                    .await;
            }
            DestinationSessionEvent::Handover(event) => self.on_handover(event).await,
            DestinationSessionEvent::Goodbye => {
                tracing::info!(guest = %self.config.name, "the source parts");
                self.end_session(None).await;
            }
            DestinationSessionEvent::PeerError(error) => {
                tracing::warn!(guest = %self.config.name, code = %error.code, "the source cannot go on: {}", error.detail);
                self.tracker.failed(error.to_string());
                self.end_session(None).await;
            }
        }
    }

    async fn on_handover(&mut self, event: DestinationEvent) {
        if let DestinationEvent::OpenAttempt { attempt } = &event {
            return self.prepare_attempt(*attempt).await;
        }
        if let DestinationEvent::Commit(_) = &event {
            self.commit_began = Some(Instant::now());
        }
        if let DestinationEvent::Abort { reason, .. } | DestinationEvent::Cancel { reason } = &event
        {
            tracing::info!(guest = %self.config.name, code = %reason.code, "the source gives up: {}", reason.detail);
            self.drop_receipt();
        }
        let cancelled = match &event {
            DestinationEvent::Cancel { reason } => Some(reason.clone()),
            _ => None,
        };
        self.feed_peer(event).await;
        if let Some(reason) = cancelled {
            self.stop_asking(&reason).await;
        }
    }

    async fn on_offer(&mut self, offer: Offer) {
        let Offer { spec, populated } = offer;
        if spec.name != self.config.name {
            let error = out_of_order(&format!("an offer of guest {}", spec.name));
            self.on_violation(error).await;
            return;
        }
        if let Some(before) = &self.spec
            && !before.is_same_guest(&spec)
        {
            self.give_up(WireError::new(
                ErrorCode::GuestChanged,
                "the guest is not the one that this migration began with: begin a new migration",
            ))
            .await;
            return;
        }
        if self.spec.is_none() {
            self.spec = Some(std::sync::Arc::new(spec));
        }
        self.populated = populated.into();
        self.feed_peer(DestinationEvent::Offered).await;
    }

    /// `Final` and `DeviceState` belong to the attempt that is open; those of one that was aborted meanwhile are late, not wrong.
    async fn on_order(&mut self, attempt: Attempt, order: Order) {
        let queued = match &self.receipt {
            Some(receipt) if receipt.attempt == attempt => receipt.order(order),
            Some(_) | None if attempt <= self.handover.attempt() => Ok(()),
            Some(_) | None => Err(out_of_order(&format!("the data of attempt {attempt}"))),
        };
        if let Err(error) = queued {
            self.on_violation(error).await;
        }
    }

    async fn on_received(&mut self, received: Result<Received, ReceiptError>) {
        self.receipt = None;
        match received {
            Ok(received) => {
                let (attempt, to) = (received.attempt, received.to);
                self.received = Some(received);
                self.feed_peer(DestinationEvent::StateReceived { attempt, to })
                    .await;
            }
            Err(ReceiptError::Attempt(reason)) => {
                tracing::warn!(guest = %self.config.name, "attempt failed: {reason}");
                self.tracker.failed(reason.to_string());
                self.feed(DestinationEvent::AttemptFailed { reason }).await;
            }
            Err(ReceiptError::Violation(error)) => self.on_violation(error).await,
            Err(ReceiptError::Lost) => {}
        }
    }

    async fn on_copy_gone(&mut self, reason: WireError) {
        if self.handover.is_owned() {
            // From here on it is the guest itself, which is its users' affair.
            return;
        }
        self.feed(DestinationEvent::CopyLost {
            reason: reason.clone(),
        })
        .await;
        self.give_up(reason).await;
    }

    async fn on_keep_over(&mut self) {
        self.keep_until = None;
        if self.over {
            return self.end_session(None).await;
        }
        let kept = vmferry_common::units::Span(self.host.keep);
        self.give_up(WireError::new(
            ErrorCode::TimedOut,
            format!("the source did not come back within {kept}"),
        ))
        .await;
    }

    async fn on_shut_down(&mut self) {
        self.shutting_down = true;
        self.drop_receipt();
        // An attempt that is open ends here; the copy waits for the next agent, which goes on with it.
        self.feed(DestinationEvent::AttemptFailed {
            reason: shutting_down(),
        })
        .await;
        Box::pin(self.stop_asking(&shutting_down())).await;
        // What is owned stays; its source hears the outcome when it asks again.
        let last_word = (!self.handover.is_owned()).then(shutting_down);
        self.end_session(last_word.as_ref()).await;
        self.over |= !self.handover.is_starting();
    }

    /// The peer broke the protocol: it hears why, and the migration ends here while that is possible.
    pub(super) async fn on_violation(&mut self, error: WireError) {
        tracing::warn!(guest = %self.config.name, code = %error.code, "the source broke the protocol: {}", error.detail);
        self.give_up(error).await;
    }

    /// Ends the migration from this side, if it is not owned, and the session with `error` in any case.
    pub(super) async fn give_up(&mut self, error: WireError) {
        self.drop_receipt();
        self.tracker.failed(error.to_string());
        if !self.handover.is_owned() && !self.handover.is_ended() {
            self.feed(DestinationEvent::GiveUp {
                reason: error.clone(),
            })
            .await;
            Box::pin(self.stop_asking(&error)).await;
        }
        self.end_session(Some(&error)).await;
    }

    /// Stops and drains the session, if there is one, remembers how far it came, and parts with it.
    pub(super) async fn end_session(&mut self, last_word: Option<&WireError>) {
        self.drop_receipt();
        let Some(mut session) = self.session.take() else {
            return;
        };
        if let Some(lanes) = session.halt().await {
            self.resume = Some(ResumePoint {
                session: session.number(),
                lanes,
            });
        }
        session.close(last_word);
        self.tracker.disconnected();
        self.keep_until = Some(Instant::now() + self.host.keep);
        self.feed(DestinationEvent::ConnectionLost).await;
    }

    pub(super) fn drop_receipt(&mut self) {
        self.receipt = None;
        self.receiving = None;
        self.received = None;
    }

    pub(super) fn retry_later(&mut self) {
        self.retry_at = Some(Instant::now() + RETRY_AFTER);
    }

    /// Asks the hooks of `phase`, if there are any, and goes on with `then`; behind those of earlier phases, which may still refuse.
    pub(super) async fn ask_hook(&mut self, phase: Phase, then: Then) {
        self.tracker.enter(phase);
        let queued = |job: &Job| matches!(job, Job::Hook { .. });
        if self.hooks.has(phase) || self.asking.is_some() || self.jobs.iter().any(queued) {
            self.jobs.push_back(Job::Hook { phase, then });
        } else {
            self.go_on(then).await;
        }
    }
}

fn out_of_order(what: &str) -> WireError {
    WireError::new(ErrorCode::ProtocolViolation, format!("{what} is not due"))
}

fn shutting_down() -> WireError {
    WireError::new(
        ErrorCode::ShuttingDown,
        "the destination agent is told to stop",
    )
}
