//! Sessions over the life of a migration: the first one, and the next after a loss.
//!
//! Owns when a session is wanted and what is said until the lanes are open. The guest is not touched by any of
//! it: while the link is down in pre-copy it runs on and dirties, and its marks wait.

use std::time::Duration;

use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_proto::error::WireError;
use vmferry_proto::handover::SourceEvent;
use vmferry_proto::message::{Offer, Ready, ToSource};

use super::Migration;
use super::copy::NoSession;
use super::inputs::Input;
use crate::error::MigrateError;

/// Between two tries to connect again in pre-copy, where nobody stands still for it: at first, and at most.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// For how long a lost destination is looked for before the migration ends. The destination keeps a lost
/// migration for the same time.
const RECONNECT_LIMIT: Duration = Duration::from_secs(600);

impl Migration {
    /// Opens a session, once. The first failure is final: nothing was copied yet, and the cause may be a typing error.
    pub(super) async fn connect(&mut self) -> Result<(), MigrateError> {
        self.connect_error = None;
        self.feed(SourceEvent::ConnectWanted).await;
        if self.end.is_some() {
            // A cancel while connecting.
            return Ok(());
        }
        let Some(session) = &self.session else {
            let closed = || MigrateError::from(NoSession);
            return Err(self.connect_error.take().unwrap_or_else(closed));
        };
        self.stats.sessions += 1;
        self.stats.agent = Some(session.agent().to_owned());
        self.stats.on_round_trip(session.rtt());
        Ok(())
    }

    /// Offers the guest and opens the lanes; what the destination has already is not sent again.
    pub(super) async fn offer(&mut self) -> Result<(), MigrateError> {
        let spec = self.guest.spec().clone();
        let blocks = spec.regions.iter().map(|region| region.len.blocks()).sum();
        let offer = Offer {
            spec,
            // Only a copy that is made anew has something to touch.
            populated: if self.stats.sessions == 1 {
                self.guest.populated().await
            } else {
                Vec::new()
            },
        };
        let session = self.session.as_mut().ok_or(NoSession)?;
        session
            .offer(offer)
            .await
            .map_err(MigrateError::SessionLost)?;
        let ready = self.await_ready().await?;
        let resumed = self
            .ledger
            .on_ready(self.handover.session(), self.options.lanes, &ready)
            .map_err(|error| MigrateError::Protocol(WireError::from(error)))?;
        // Without an earlier agent's tracking the ledger is new.
        self.to_compare |= !self.tracking && ready.resume.is_some();
        if ready.resume.is_some() {
            tracing::debug!(?resumed, "the copy goes on");
        }
        let session = self.session.as_mut().ok_or(NoSession)?;
        session
            .open_lanes(self.options.lanes, &self.pacer, &self.counters, blocks)
            .await
            .map_err(MigrateError::SessionLost)
    }

    async fn await_ready(&mut self) -> Result<Ready, MigrateError> {
        loop {
            match self.input().await {
                Input::Peer(ToSource::Ready(ready)) => return Ok(ready),
                other => self.on_input(other)?,
            }
        }
    }

    /// The link is gone in pre-copy: looks for the destination until it is back, then goes on with what is left.
    pub(super) async fn reconnect(&mut self, lost: MigrateError) -> Result<(), MigrateError> {
        self.progress.note(&format!(
            "{}; the guest runs on, connecting again",
            chain(&lost)
        ));
        self.feed(SourceEvent::ConnectionLost {
            reason: lost.to_wire(),
        })
        .await;
        self.session = None;
        self.ledger.on_session_lost();
        let began = Instant::now();
        let mut wait = FIRST_WAIT;
        while self.end.is_none() {
            match self.try_again().await {
                Ok(()) => {
                    self.stats.forget_evidence();
                    self.progress
                        .note(&format!("connected again after {:.1?}", began.elapsed()));
                    return Ok(());
                }
                Err(error) if !error.is_passing() => return Err(error),
                Err(error) => tracing::info!(error = %chain(&error), "not yet"),
            }
            if began.elapsed() > RECONNECT_LIMIT {
                return Err(MigrateError::Unreachable(RECONNECT_LIMIT));
            }
            self.pause_between(wait).await?;
            wait = (wait * 2).min(LONGEST_WAIT);
        }
        Ok(())
    }

    async fn try_again(&mut self) -> Result<(), MigrateError> {
        self.connect().await?;
        if self.end.is_some() {
            return Ok(());
        }
        let offered = self.offer().await;
        if let Err(error) = &offered {
            self.session = None;
            self.feed(SourceEvent::ConnectionLost {
                reason: error.to_wire(),
            })
            .await;
        }
        offered
    }

    async fn pause_between(&mut self, time: Duration) -> Result<(), MigrateError> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if let Ok(attended) = tokio::time::timeout(left, self.attend()).await {
                attended?;
            }
        }
    }
}
