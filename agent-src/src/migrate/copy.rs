//! The pre-copy: rounds over all regions until the policy says that it is time.
//!
//! Owns the order that makes the copy right: take and re-arm the dirty marks, *then* wait for the I/O
//! barrier, *then* let the lanes read (`[COPY-1]`). A device transfer in flight across the re-arm has landed
//! before the read; one that starts later marks its block again. Marks that were taken are in the ledger before
//! anything is read, so a failed attempt loses none. When to stop is `policy`'s to say.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use vmferry_common::phase::Phase;
use vmferry_hypervisor::Settlement;
use vmferry_proto::geometry::BLOCK_SIZE;
use vmferry_proto::ids::{Lane, RegionId};
use vmferry_proto::message::{LaneProgress, ToDestination};
use vmferry_proto::spec::{RegionKind, RunState};

use super::Migration;
use super::inputs::Input;
use crate::error::MigrateError;
use crate::lanes::{Again, LaneJob};
use crate::policy::{self, Decision, Left, RoundStats, Situation};
use crate::session::Session;

/// Between two looks at what is written while a round runs, at least: each look makes the guest fault once more on its hot pages.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// And at least this part of the round until then, so that a long round of a large guest has tens of them and not thousands.
const LOOKS: u32 = 8;

impl Migration {
    /// Copies rounds until the guest is to be paused.
    ///
    /// # Errors
    /// Whatever interrupts the copy (a lost link) or ends it.
    pub(super) async fn copy_until_time(&mut self) -> Result<(), MigrateError> {
        if self.phase < Phase::Copy {
            self.enter(Phase::Copy).await?;
        }
        if self.stats.rounds.is_empty() {
            self.scan(Barrier::Wait).await?;
            self.compare().await?;
        }
        loop {
            match policy::decide(&self.situation()) {
                Decision::Continue { predicted, warning } => {
                    self.stats.prediction = predicted;
                    if let Some(stall) = warning {
                        self.progress.note(&stall.to_string());
                    }
                    self.round(Duration::ZERO).await?;
                }
                Decision::AwaitTrigger {
                    predicted,
                    recheck_after,
                } => {
                    self.stats.prediction = Some(predicted);
                    self.converged().await?;
                    let idle = self.idle(recheck_after).await?;
                    self.round(idle).await?;
                }
                Decision::CutOver { predicted } => {
                    self.stats.prediction = Some(predicted);
                    return self.converged().await;
                }
                Decision::ForceCutOver { predicted, stall } => {
                    self.stats.prediction = Some(predicted);
                    self.progress.note(&format!(
                        "moving it all the same (--on-stall force): {stall}"
                    ));
                    return self.converged().await;
                }
                Decision::GiveUp(reason) => {
                    return Err(MigrateError::GivenUp(Box::new(reason)));
                }
            }
        }
    }

    fn situation(&self) -> Situation<'_> {
        Situation {
            rounds: &self.stats.rounds,
            evidence_after: self.stats.evidence_after,
            left: self.left(),
            last_flight: None,
            fixed: self.stats.fixed,
            limits: self.options.limits,
            elapsed: self.began.elapsed(),
            triggered: self.triggered,
            guest_runs: self.run_state == RunState::Running,
        }
    }

    pub(super) fn left(&self) -> Left {
        Left {
            memory: self.ledger.dirty(Some(RegionKind::Memory)).all.bytes,
            disk: self.ledger.dirty(Some(RegionKind::Disk)).all.bytes,
        }
    }

    async fn converged(&mut self) -> Result<(), MigrateError> {
        if self.phase == Phase::Converged {
            return Ok(());
        }
        self.enter(Phase::Converged).await?;
        self.say_to_peer(&ToDestination::Converged).await
    }

    /// Waits for the trigger, at most for `time`.
    async fn idle(&mut self, time: Duration) -> Result<Duration, MigrateError> {
        let began = Instant::now();
        while !self.triggered && began.elapsed() < time {
            let left = time.saturating_sub(began.elapsed());
            if let Ok(attended) = tokio::time::timeout(left, self.attend()).await {
                attended?;
            }
        }
        if self.triggered {
            self.stats.forget_evidence();
        }
        Ok(began.elapsed())
    }

    /// One round: everything dirty is sent and applied; then the scan that says what was dirtied meanwhile.
    async fn round(&mut self, idle: Duration) -> Result<(), MigrateError> {
        let began = Instant::now() - idle;
        let before = self.sent();
        self.send_round(!idle.is_zero()).await?;
        self.await_applied().await?;
        let dirtied_bytes = self.scan(Barrier::Wait).await?;
        self.stats.on_round(RoundStats {
            number: self.stats.next_round(),
            elapsed: began.elapsed(),
            idle,
            dirtied_bytes,
            left_bytes: self.left().total(),
            ..self.sent().since(before)
        });
        self.show();
        Ok(())
    }

    /// What has been sent since the migration began.
    pub(super) fn sent(&self) -> Sent {
        Sent {
            raw_bytes: self.ledger.counters().bytes,
            zero_bytes: self.counters.zero() * u64::from(BLOCK_SIZE),
            wire_bytes: self.counters.wire(),
        }
    }

    /// Waits until every frame is applied.
    async fn await_applied(&mut self) -> Result<(), MigrateError> {
        while self.ledger.in_flight().frames > 0 {
            self.attend().await?;
        }
        Ok(())
    }

    /// Sends everything that is dirty and not written again before its turn comes, the hottest last: not at all where it may as well go
    /// when the guest stands still. A round in which nothing else goes does send it, unless the guest has `waited` for the trigger:
    /// what did not fit before does not fit now.
    async fn send_round(&mut self, waited: bool) -> Result<(), MigrateError> {
        let (began, before) = (Instant::now(), self.ledger.counters().blocks);
        let mut on_input = Self::on_input;
        loop {
            let look = Instant::now() + LOOK_EVERY.max(began.elapsed() / LOOKS);
            if !self.send_until(None, Some(look), &mut on_input).await? {
                self.look().await?;
                continue;
            }
            let may_stay = waited || self.ledger.counters().blocks > before;
            if self.ledger.late_blocks() == 0 || may_stay && policy::rest_fits(&self.situation()) {
                return Ok(());
            }
            self.ledger.release_late();
        }
    }

    /// Holds back what was written since the last look or scan: it would have to be sent again. No barrier is needed, since none of it is
    /// read before the next scan has waited for one. Memory only: of disks each look would be a transaction.
    async fn look(&mut self) -> Result<(), MigrateError> {
        if self.ledger.is_exhausted(None) {
            return Ok(());
        }
        for region in self.regions(Some(RegionKind::Memory)) {
            self.take(region).await?;
        }
        Ok(())
    }

    fn regions(&self, kind: Option<RegionKind>) -> Vec<RegionId> {
        let all = self.guest.spec().regions.iter();
        all.filter(|region| kind.is_none_or(|kind| kind == region.kind))
            .map(|region| region.id)
            .collect()
    }

    /// Takes the dirty marks of every region into the ledger, then lets device I/O in flight land. Returns the bytes found dirty,
    /// by this scan and the looks since the last one.
    pub(super) async fn scan(&mut self, barrier: Barrier) -> Result<u64, MigrateError> {
        for region in self.regions(None) {
            self.take(region).await?;
        }
        if matches!(barrier, Barrier::Wait) {
            let held = self.guest.io_barrier().await?;
            self.stats.on_barrier(held);
        }
        let found = match barrier {
            Barrier::Wait => self.ledger.release_cold(),
            Barrier::Drained => self.ledger.release(),
        };
        Ok(found * u64::from(BLOCK_SIZE))
    }

    /// Takes and re-arms the dirty marks of a region. They are held back in the ledger until a barrier has passed.
    async fn take(&mut self, region: RegionId) -> Result<(), MigrateError> {
        // What was taken before is applied, or is dirty or in flight in the ledger: the driver need not keep it.
        self.guest.settle(region, Settlement::Acknowledged).await?;
        let taken = self.guest.take_dirty(region).await?;
        self.stats.on_hold(taken.longest_hold);
        self.ledger
            .hold(region, &taken.dirty)
            .map_err(|error| internal(&error))?;
        self.ledger
            .mark_zero(region, &taken.zero)
            .map_err(|error| internal(&error))
    }

    /// Gives the lanes what is dirty and not held back, of regions of `kind` if one is given, and waits until they have read and sent it,
    /// or until a moment. What happens meanwhile goes to `on_input`. Returns whether all is sent.
    pub(super) async fn send_until<E>(
        &mut self,
        kind: Option<RegionKind>,
        until: Option<Instant>,
        on_input: &mut impl FnMut(&mut Self, Input) -> Result<(), E>,
    ) -> Result<bool, E>
    where
        E: From<NoSession>,
    {
        loop {
            let busy = self.fill_lanes(kind)?;
            if !busy {
                return Ok(true);
            }
            let moved = self
                .session
                .as_ref()
                .and_then(Session::lanes)
                .ok_or(NoSession)?
                .moved();
            let input = tokio::select! {
                // Lanes move all the time; what comes in does not, and is not to wait for them to rest.
                biased;
                input = self.input() => input,
                () = passed(until) => return Ok(false),
                () = moved.notified() => continue,
            };
            on_input(self, input)?;
        }
    }

    /// Hands out frames, of regions of `kind` if one is given, while lanes have room. Returns whether any lane still has work.
    fn fill_lanes(&mut self, kind: Option<RegionKind>) -> Result<bool, NoSession> {
        let Self {
            session,
            ledger,
            readers,
            guest,
            stats,
            phase,
            ..
        } = self;
        // What is sent after the first round was written since the migration began. Of a paused guest nothing is written any
        // more, and the first block that is kept takes a lane's whole cache from the system.
        let again = if stats.rounds.is_empty() || *phase == Phase::Final {
            Again::Unlikely
        } else {
            Again::Likely
        };
        let lanes = session.as_ref().and_then(Session::lanes).ok_or(NoSession)?;
        for (index, lane) in (0u8..).map(Lane).zip(lanes.handles()) {
            while lane.has_room() {
                let Some(frame) = ledger.next_frame(index, kind) else {
                    break;
                };
                let region = usize::from(frame.region.0);
                let (Some(reader), Some(spec)) =
                    (readers.get(region), guest.spec().region(frame.region))
                else {
                    break;
                };
                let job = LaneJob {
                    frame,
                    len: spec.len,
                    kind: spec.kind,
                    reader: reader.clone(),
                    again,
                };
                if !lane.push(job) {
                    // Its task has failed and says why on its own way.
                    break;
                }
            }
        }
        Ok(lanes.are_busy() || !ledger.is_exhausted(kind))
    }

    pub(super) fn on_progress(&mut self, lanes: &[LaneProgress]) -> Result<(), MigrateError> {
        self.ledger
            .on_progress(lanes)
            .map_err(|error| MigrateError::Protocol(error.into()))?;
        if let Some(own) = self.session.as_ref().and_then(Session::lanes) {
            own.on_progress(lanes);
        }
        Ok(())
    }
}

/// What had been sent at some moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    raw_bytes: u64,
    zero_bytes: u64,
    wire_bytes: u64,
}

impl Sent {
    /// What was sent after `before`, as a round that knows nothing else of itself.
    pub(super) fn since(self, before: Self) -> RoundStats {
        RoundStats {
            raw_bytes_sent: self.raw_bytes - before.raw_bytes,
            zero_bytes: self.zero_bytes - before.zero_bytes,
            wire_bytes: self.wire_bytes - before.wire_bytes,
            ..RoundStats::default()
        }
    }
}

/// Whether device I/O may be in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Barrier {
    /// The guest runs.
    Wait,
    /// It is paused: the pause has drained its I/O.
    Drained,
}

/// The session went away while the lanes were being filled.
#[derive(Debug)]
pub(super) struct NoSession;

impl From<NoSession> for MigrateError {
    fn from(NoSession: NoSession) -> Self {
        Self::SessionLost(crate::error::LinkError::Closed)
    }
}

/// Waits until `moment`, or for ever where there is none.
async fn passed(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn internal(error: &vmferry_proto::ledger::LedgerError) -> MigrateError {
    MigrateError::Internal(error.to_string())
}
