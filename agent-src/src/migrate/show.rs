//! What a migration shows of itself: the snapshot behind progress and `status`, and the facts that hooks get.

use serde_json::{Value, json};
use vmferry_common::phase::Phase;
use vmferry_common::units::Rate;

use super::Migration;
use super::inputs::Input;
use crate::error::MigrateError;
use crate::progress::Snapshot;

impl Migration {
    /// How far it is, now.
    pub(super) fn snapshot(&self) -> Snapshot {
        let note = (self.session.is_none() && self.tracking).then(|| "no connection".to_owned());
        let of_phase = Snapshot::of_phase(self.phase, self.began.elapsed());
        // Figures of the copy say nothing before it begins and after its last set.
        if self.phase < Phase::Copy || self.phase > Phase::Final {
            return Snapshot { note, ..of_phase };
        }
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
            note,
            ..of_phase
        }
    }

    pub(super) fn show(&mut self) {
        self.stats.on_wire(self.counters.wire());
        let snapshot = self.snapshot();
        self.progress.update(&snapshot);
    }

    /// Answer to `status`.
    pub(super) fn status(&self) -> Value {
        let (snapshot, guest) = (self.snapshot(), self.guest.spec().name.as_str());
        let mut status = snapshot.to_json(guest);
        if let Value::Object(fields) = &mut status {
            fields.insert("text".to_owned(), json!(snapshot.to_line(guest)));
            fields.insert(
                "migration_id".to_owned(),
                json!(self.dialer.migration.to_string()),
            );
            fields.insert("state".to_owned(), json!(self.handover.state_name()));
            fields.insert("to".to_owned(), json!(self.dialer.to.to_string()));
            fields.insert("sessions".to_owned(), json!(self.stats.sessions));
            fields.insert("limits".to_owned(), self.limits());
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

    /// Enters a phase of the copy: status, progress, hooks. Everything else is attended meanwhile, so that a script that takes its
    /// time holds up neither a cancel nor the news that the guest is gone.
    ///
    /// # Errors
    /// [`MigrateError::Hook`], or what ended or interrupted the copy meanwhile. After the loss of the link the phase was not
    /// entered, and its hooks are asked again.
    pub(super) async fn enter(&mut self, phase: Phase) -> Result<(), MigrateError> {
        let before = self.phase;
        let entered = self.enter_with(phase, Self::on_input).await;
        if entered.as_ref().is_err_and(MigrateError::is_link_loss) {
            self.phase = before;
        }
        entered
    }

    /// Enters a phase before the decision, in which a hook may say no; what happens meanwhile goes to `on_input`. Where that gives
    /// up, the script that runs is killed.
    pub(super) async fn enter_with<E>(
        &mut self,
        phase: Phase,
        mut on_input: impl FnMut(&mut Self, Input) -> Result<(), E>,
    ) -> Result<(), E>
    where
        E: From<MigrateError>,
    {
        tracing::debug!(%phase, "phase");
        self.phase = phase;
        self.show();
        let (hooks, name) = (self.hooks.clone(), self.guest.spec().name.clone());
        let facts = self.hook_facts();
        self.listeners.send("PHASE", facts.clone());
        let running = hooks.run(phase, &name, &facts);
        tokio::pin!(running);
        loop {
            let input = tokio::select! {
                biased;
                ran = &mut running => {
                    let report = ran.map_err(MigrateError::Hook)?;
                    self.stats.on_hooks(report.total());
                    return Ok(());
                }
                input = self.input() => input,
            };
            on_input(self, input)?;
        }
    }

    /// A phase after the decision has begun: its hooks are told, beside everything else, since nothing may hold up a guest that
    /// is the destination's. A failure is only logged.
    pub(super) fn tell(&mut self, phase: Phase) {
        tracing::debug!(%phase, "phase");
        self.phase = phase;
        self.show();
        let facts = self.hook_facts();
        self.listeners.send("PHASE", facts.clone());
        self.teller.tell(phase, facts);
    }
}
