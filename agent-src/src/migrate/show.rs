//! What a migration shows of itself: the snapshot behind progress and `status`, and the facts that hooks get.

use serde_json::{Value, json};
use vmferry_common::phase::Phase;
use vmferry_common::units::Rate;

use super::Migration;
use crate::error::MigrateError;
use crate::progress::Snapshot;

impl Migration {
    /// How far it is, now.
    pub(super) fn snapshot(&self) -> Snapshot {
        let left = self.left().total() + self.ledger.in_flight().amount.bytes;
        let total = self.stats.memory_bytes + self.stats.disk_bytes;
        let round_total = self
            .stats
            .rounds
            .last()
            .map_or(total, |round| round.left_bytes);
        Snapshot {
            round: self.stats.next_round(),
            bytes_total: round_total,
            bytes_done: round_total.saturating_sub(left),
            left_bytes: left,
            rate: self.stats.wire_rate.unwrap_or(Rate(0)),
            dirty_rate: self
                .stats
                .rounds
                .last()
                .map(|round| Rate::of(round.dirtied_bytes, round.elapsed)),
            predicted_downtime: self.stats.prediction.map(|prediction| prediction.total()),
            note: (self.session.is_none() && self.tracking).then(|| "no connection".to_owned()),
            ..Snapshot::of_phase(self.phase, self.began.elapsed())
        }
    }

    pub(super) fn show(&mut self) {
        self.stats.on_wire(self.counters.wire());
        let snapshot = self.snapshot();
        self.progress.update(&snapshot);
    }

    /// Answer to `status`.
    pub(super) fn status(&self) -> Value {
        let mut status = self.snapshot().to_json(self.guest.spec().name.as_str());
        if let Value::Object(fields) = &mut status {
            fields.insert(
                "migration_id".to_owned(),
                json!(self.dialer.migration.to_string()),
            );
            fields.insert("state".to_owned(), json!(self.handover.state_name()));
            fields.insert("to".to_owned(), json!(self.dialer.to.to_string()));
            fields.insert("sessions".to_owned(), json!(self.stats.sessions));
        }
        status
    }

    /// What a hook reads on its standard input.
    pub(super) fn hook_facts(&self) -> Value {
        let mut facts = self.status();
        if let Value::Object(fields) = &mut facts {
            fields.insert("side".to_owned(), json!("source"));
            fields.insert("generation".to_owned(), json!(self.dialer.generation.0));
        }
        facts
    }

    /// Enters a phase: status, progress, hooks. A hook may say no, before the decision.
    ///
    /// # Errors
    /// [`MigrateError::Hook`], where this phase's hooks may veto.
    pub(super) async fn enter(&mut self, phase: Phase) -> Result<(), MigrateError> {
        tracing::debug!(%phase, "phase");
        self.phase = phase;
        self.show();
        let name = self.guest.spec().name.clone();
        let facts = self.hook_facts();
        self.listeners.send("PHASE", facts.clone());
        let ran = self.hooks.run(phase, &name, &facts).await;
        match ran {
            Ok(report) => {
                self.stats.on_hooks(report.total());
                Ok(())
            }
            Err(failure) if phase.can_veto() => Err(MigrateError::Hook(failure)),
            Err(failure) => {
                tracing::warn!(%phase, error = %MigrateError::Hook(failure).chain(), "a hook failed; after the decision this changes nothing");
                Ok(())
            }
        }
    }
}
