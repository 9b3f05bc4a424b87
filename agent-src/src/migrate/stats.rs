//! What a migration measures of itself: rounds, the parts of the downtime, how long the guest was held.
//!
//! Owns the clocks' readings; decides nothing. Measured costs feed the policy's prediction of the next attempt.

use std::time::Duration;

use tokio::time::Instant;
use vmferry_common::units::Rate;
use vmferry_proto::message::PrepareTiming;
use vmferry_proto::spec::{GuestSpec, RegionKind};

use super::flight::Saved;
use super::verify::SAMPLE_STRIDE;
use crate::cli::Verify;
use crate::policy::{FixedCosts, PredictedDowntime, RoundStats};
use crate::report::{DowntimeParts, Millis};

/// Readings of one migration.
#[derive(Debug, Clone)]
pub struct Stats {
    /// Finished rounds.
    pub rounds: Vec<RoundStats>,
    /// What was sent while the guest was paused; of the last attempt, unless the copy went on after it.
    pub last_set: Option<RoundStats>,
    /// Rounds up to this number say nothing about convergence.
    pub evidence_after: u32,
    /// The policy's last prediction.
    pub prediction: Option<PredictedDowntime>,
    /// Costs of a cutover that do not depend on what is left.
    pub fixed: FixedCosts,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Size of its copied disks.
    pub disk_bytes: u64,
    /// Size of the device state.
    pub device_state_bytes: u64,
    /// Longest hold of the running guest by a scan.
    pub longest_hold: Duration,
    /// Longest I/O barrier.
    pub longest_barrier: Duration,
    /// Windows compared and found equal, or explained.
    pub windows_compared: u64,
    /// Bytes in them.
    pub bytes_compared: u64,
    /// Discarded pages that were sent again.
    pub resent_discarded: u64,
    /// Bytes that the destination had kept of an earlier agent's copy: compared instead of sent.
    pub kept_bytes: u64,
    /// Sessions opened.
    pub sessions: u64,
    /// Pauses of the guest.
    pub attempts: u32,
    /// The destination's program.
    pub agent: Option<String>,
    /// What goes over the wire now.
    pub wire_rate: Option<Rate>,
    wire_mark: Option<(Instant, u64)>,
    paused_at: Option<Instant>,
    downtime: Option<Duration>,
    parts: DowntimeParts,
}

impl Stats {
    /// Nothing measured yet.
    #[must_use]
    pub fn new(spec: &GuestSpec, verify: Verify) -> Self {
        Self {
            rounds: Vec::new(),
            last_set: None,
            evidence_after: 0,
            prediction: None,
            fixed: priors(spec, verify),
            memory_bytes: spec.bytes(RegionKind::Memory),
            disk_bytes: spec.bytes(RegionKind::Disk),
            device_state_bytes: 0,
            longest_hold: Duration::ZERO,
            longest_barrier: Duration::ZERO,
            windows_compared: 0,
            bytes_compared: 0,
            resent_discarded: 0,
            kept_bytes: 0,
            sessions: 0,
            attempts: 0,
            agent: None,
            wire_rate: None,
            wire_mark: None,
            paused_at: None,
            downtime: None,
            parts: DowntimeParts::default(),
        }
    }

    /// Number of the round that comes next.
    #[must_use]
    pub fn next_round(&self) -> u32 {
        self.rounds.last().map_or(1, |round| round.number + 1)
    }

    pub(super) fn on_round(&mut self, round: RoundStats) {
        self.rounds.push(round);
        self.last_set = None;
    }

    /// What happened until now says nothing about convergence any more.
    pub fn forget_evidence(&mut self) {
        self.evidence_after = self.rounds.last().map_or(0, |round| round.number);
    }

    /// The predicted downtime; zero before there is a prediction.
    #[must_use]
    pub fn predicted(&self) -> Duration {
        self.prediction
            .map_or(Duration::ZERO, |prediction| prediction.total())
    }

    /// The downtime of the last attempt and its parts.
    #[must_use]
    pub const fn downtime(&self) -> Option<(Duration, DowntimeParts)> {
        match self.downtime {
            Some(downtime) => Some((downtime, self.parts)),
            None => None,
        }
    }

    pub(super) fn on_round_trip(&mut self, rtt: Duration) {
        self.fixed.round_trips = FixedCosts::round_trips_at(rtt);
    }

    /// `bytes` have gone over the wire so far.
    pub(super) fn on_wire(&mut self, bytes: u64) {
        const WINDOW: Duration = Duration::from_millis(150);
        let now = Instant::now();
        let (at, before) = *self.wire_mark.get_or_insert((now, bytes));
        if now - at >= WINDOW {
            self.wire_rate = Some(Rate::of(bytes.saturating_sub(before), now - at));
            self.wire_mark = Some((now, bytes));
        }
    }

    pub(super) fn on_hold(&mut self, held: Duration) {
        self.longest_hold = self.longest_hold.max(held);
    }

    pub(super) fn on_barrier(&mut self, held: Duration) {
        self.longest_barrier = self.longest_barrier.max(held);
        self.fixed.barrier = held;
    }

    pub(super) fn on_pause_begins(&mut self) {
        self.attempts += 1;
        self.parts = DowntimeParts::default();
        self.downtime = None;
        self.paused_at = Some(Instant::now());
    }

    pub(super) fn on_paused(&mut self) {
        let took = self.since_pause();
        self.parts.pause_ms = Millis(took);
        self.fixed.pause = took;
    }

    pub(super) const fn on_final_scan(&mut self, took: Duration) {
        self.fixed.final_scan = took;
    }

    /// `sent` went out after the pause, in `took`.
    pub(super) fn on_last_set(&mut self, took: Duration, sent: RoundStats) {
        let elapsed = took.saturating_sub(self.parts.verify_ms.0);
        self.parts.last_set_ms = Millis(elapsed);
        self.last_set = Some(RoundStats {
            number: self.next_round(),
            elapsed,
            ..sent
        });
    }

    pub(super) fn on_verified(&mut self, took: Duration) {
        self.parts.verify_ms = Millis(took);
        self.fixed.verify = took;
    }

    pub(super) const fn on_compared(&mut self, windows: u64, bytes: u64) {
        self.windows_compared = windows;
        self.bytes_compared = bytes;
    }

    /// The part of the downtime is what it took longer than the last set beside it, which was sent `at` that moment. Next time there may be less to be beside of, so the
    /// prediction is told the whole.
    pub(super) fn on_state_saved(&mut self, saved: &Saved, at: Instant) {
        self.device_state_bytes = saved.state.len() as u64;
        let alone = saved.ended.saturating_duration_since(at.max(saved.began));
        self.parts.state_save_ms = Millis(alone);
        self.fixed.state_save = saved.ended - saved.began;
    }

    pub(super) fn on_state_sent(&mut self, took: Duration) {
        self.parts.send_ms = Millis(took);
    }

    pub(super) fn on_prepared(&mut self, timing: &PrepareTiming) {
        let load = Duration::from_micros(timing.load_us);
        let flush = Duration::from_micros(timing.flush_us);
        self.parts.load_ms = Millis(load);
        self.parts.flush_ms = Millis(flush);
        self.fixed.state_load = load + flush;
    }

    pub(super) fn on_hooks(&mut self, took: Duration) {
        if self.paused_at.is_some() && self.downtime.is_none() {
            self.parts.hooks_ms = Millis(self.parts.hooks_ms.0 + took);
        }
    }

    pub(super) fn on_journal(&mut self, took: Duration) {
        if self.paused_at.is_some() && self.downtime.is_none() {
            self.parts.journal_ms = Millis(self.parts.journal_ms.0 + took);
        }
    }

    pub(super) fn on_committed(&mut self, record_us: u64, start_us: u64) {
        if self.downtime.is_some() || self.paused_at.is_none() {
            return;
        }
        let record = Duration::from_micros(record_us);
        self.parts.journal_ms = Millis(self.parts.journal_ms.0 + record);
        self.parts.start_ms = Millis(Duration::from_micros(start_us));
        self.fixed.journal = self.parts.journal_ms.0;
        self.downtime = Some(self.since_pause());
    }

    pub(super) fn on_resumed(&mut self) {
        self.downtime = Some(self.since_pause());
    }

    fn since_pause(&self) -> Duration {
        self.paused_at.map_or(Duration::ZERO, |at| at.elapsed())
    }
}

/// What a cutover is expected to cost before anything was measured.
fn priors(spec: &GuestSpec, verify: Verify) -> FixedCosts {
    let bytes = spec.bytes(RegionKind::Memory) + spec.bytes(RegionKind::Disk);
    let digested = match verify {
        Verify::Off => 0,
        Verify::Sample => bytes / u64::from(SAMPLE_STRIDE),
        Verify::Full => bytes,
    };
    let fixed = FixedCosts {
        verify: FixedCosts::verify_prior(digested),
        ..FixedCosts::default()
    };
    if spec.driver != "sim" {
        return fixed;
    }
    // The embedded guest has a few hundred bytes of state and answers within a step of its workload.
    let quick = Duration::from_millis(1);
    FixedCosts {
        pause: quick,
        state_save: quick,
        state_load: quick,
        ..fixed
    }
}
