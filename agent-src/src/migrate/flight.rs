//! The last flight: what is sent while the guest is paused, up to the device state.
//!
//! Owns the order within the stopped time: last dirty marks, last blocks of the disks, then those of memory and `Final` with the
//! device state saved beside them, device state. Digests, where asked for, come before it is saved. Nothing that could be done
//! before the pause is done here. Any failure is an event for the handover machine; none of it touches the guest.

use bytes::Bytes;
use tokio::time::Instant;
use vmferry_common::digest;
use vmferry_common::phase::Phase;
use vmferry_proto::handover::SourceEvent;
use vmferry_proto::ids::Attempt;
use vmferry_proto::message::{Final, ToDestination, ToSource, VerifyWindows};
use vmferry_proto::spec::{RegionKind, RunState};

use super::Migration;
use super::copy::{Barrier, NoSession, Sent};
use super::inputs::Input;
use crate::error::MigrateError;

/// A device state, and when it was written.
#[derive(Debug)]
pub(super) struct Saved {
    pub(super) state: Bytes,
    pub(super) began: Instant,
    pub(super) ended: Instant,
}

/// When the last set was sent, and what had been sent by then.
#[derive(Debug)]
struct LastSet {
    at: Instant,
    so_far: Sent,
}

/// Why the flight ended early: what the machine is told.
#[derive(Debug)]
pub(super) enum Grounded {
    /// Something happened that the machine knows by its own name.
    Event(SourceEvent),
    /// The copy failed at this side.
    Failed(MigrateError),
}

impl From<MigrateError> for Grounded {
    fn from(error: MigrateError) -> Self {
        Self::Failed(error)
    }
}

impl From<NoSession> for Grounded {
    fn from(no_session: NoSession) -> Self {
        let reason = MigrateError::from(no_session).to_wire();
        Self::Event(SourceEvent::ConnectionLost { reason })
    }
}

impl Migration {
    /// Sends everything that is left of the paused guest.
    pub(super) async fn flight(&mut self, attempt: Attempt, run_state: RunState) -> SourceEvent {
        match self.try_flight(attempt, run_state).await {
            Ok(()) => SourceEvent::FinalSent { attempt },
            Err(Grounded::Event(event)) => event,
            Err(Grounded::Failed(error)) => SourceEvent::StreamFailed {
                attempt,
                reason: error.to_wire(),
            },
        }
    }

    async fn try_flight(&mut self, attempt: Attempt, run_state: RunState) -> Result<(), Grounded> {
        self.enter_with(Phase::Final, Self::on_flight_input).await?;
        let (began, before) = (Instant::now(), self.sent());
        self.scan(Barrier::Drained).await?;
        self.stats.on_final_scan(began.elapsed());
        let verify = self.windows_to_verify();
        let (sent, saved) = if verify.is_empty() {
            self.send_dirty(Some(RegionKind::Disk)).await?;
            let saving = self.begin_device_state().await?;
            tokio::join!(self.send_last_set(attempt, run_state, &verify), saving)
        } else {
            // Disks are read until both sides agree about them.
            let sent = self.send_last_set(attempt, run_state, &verify).await?;
            (Ok(sent), self.begin_device_state().await?.await)
        };
        let sent = sent?;
        self.stats
            .on_last_set(sent.at - began, sent.so_far.since(before));
        let saved = saved?;
        self.stats.on_state_saved(&saved, sent.at);
        self.send_device_state(attempt, saved.state).await?;
        self.enter_with(Phase::Load, Self::on_flight_input).await
    }

    /// Begins to save the device state. Needs the last block of the disks read.
    async fn begin_device_state(
        &mut self,
    ) -> Result<impl Future<Output = Result<Saved, MigrateError>> + use<>, MigrateError> {
        let Self { guest, paused, .. } = self;
        let paused = paused
            .as_ref()
            .ok_or_else(|| MigrateError::Internal("no proof of the pause".to_owned()))?;
        let began = Instant::now();
        let saving = guest
            .begin_device_state(paused)
            .await
            .map_err(MigrateError::Guest)?;
        Ok(async move {
            let state = saving.await.map_err(MigrateError::Guest)?;
            Ok(Saved {
                state: state.into(),
                began,
                ended: Instant::now(),
            })
        })
    }

    /// Sends every block that is left, up to `Final`.
    async fn send_last_set(
        &mut self,
        attempt: Attempt,
        run_state: RunState,
        verify: &[VerifyWindows],
    ) -> Result<LastSet, Grounded> {
        self.send_dirty(None).await?;
        self.send_final(attempt, run_state, verify).await?;
        Ok(LastSet {
            at: Instant::now(),
            so_far: self.sent(),
        })
    }

    /// Sends what is dirty, of regions of `kind` if one is given.
    async fn send_dirty(&mut self, kind: Option<RegionKind>) -> Result<(), Grounded> {
        self.send_until(kind, None, &mut Self::on_flight_input)
            .await
            .map(|_all| ())
    }

    /// Names the end of the data; with digests, returns when both sides agree.
    async fn send_final(
        &mut self,
        attempt: Attempt,
        run_state: RunState,
        verify: &[VerifyWindows],
    ) -> Result<(), Grounded> {
        self.say_final(attempt, run_state, verify.to_vec()).await?;
        if verify.is_empty() {
            return Ok(());
        }
        let began = Instant::now();
        let differing = self.compare_digests(attempt, verify).await?;
        if !differing.is_empty() {
            self.resend_discarded(&differing).await?;
            self.send_dirty(None).await?;
            self.say_final(attempt, run_state, verify.to_vec()).await?;
            let still = self.compare_digests(attempt, verify).await?;
            if let Some(window) = still.first() {
                return Err(self.differs(window).into());
            }
        }
        self.stats.on_verified(began.elapsed());
        Ok(())
    }

    async fn say_final(
        &mut self,
        attempt: Attempt,
        run_state: RunState,
        verify: Vec<VerifyWindows>,
    ) -> Result<(), Grounded> {
        let lanes = self.ledger.final_seqs();
        let message = ToDestination::Final(Final {
            attempt,
            lanes,
            verify,
            run_state,
        });
        Ok(self.say_to_peer(&message).await?)
    }

    async fn send_device_state(&mut self, attempt: Attempt, state: Bytes) -> Result<(), Grounded> {
        let message = ToDestination::DeviceState {
            attempt,
            len: state.len() as u64,
            digest: digest::plain(&state),
        };
        let began = Instant::now();
        self.say_to_peer(&message).await?;
        let session = self.session.as_mut().ok_or(NoSession)?;
        session
            .send_device_state(attempt, state)
            .await
            .map_err(MigrateError::SessionLost)?;
        self.stats.on_state_sent(began.elapsed());
        Ok(())
    }

    /// Says something on the session.
    ///
    /// # Errors
    /// [`MigrateError::SessionLost`].
    pub(super) async fn say_to_peer(
        &mut self,
        message: &ToDestination,
    ) -> Result<(), MigrateError> {
        let session = self.session.as_mut().ok_or(NoSession)?;
        session
            .send(message)
            .await
            .map_err(MigrateError::SessionLost)
    }

    /// While the lanes work: only progress is ordinary.
    fn on_flight_input(&mut self, input: Input) -> Result<(), Grounded> {
        self.flight_message(input).map(|_ignored| ())
    }

    /// What came, if it is a message of the flight; anything else grounds it.
    pub(super) fn flight_message(&mut self, input: Input) -> Result<Option<ToSource>, Grounded> {
        match input {
            Input::Peer(ToSource::Progress(lanes)) => {
                self.on_progress(&lanes)?;
                Ok(None)
            }
            Input::Peer(message @ (ToSource::Digests(_) | ToSource::Complete { .. })) => {
                Ok(Some(message))
            }
            // While a hook of phase `load` is asked here: the machine hears it behind the end of the flight.
            Input::Peer(message @ ToSource::Prepared(_)) => {
                self.prepared_early = self.handover_input(Input::Peer(message));
                Ok(None)
            }
            other => match self.handover_input(other) {
                Some(event) => Err(Grounded::Event(event)),
                None => Ok(None),
            },
        }
    }
}
