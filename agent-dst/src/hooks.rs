//! The hook scripts of this side, at the phases that the destination sees.
//!
//! Owns what a script is told and what its refusal means here; running scripts belongs to `vmferry_common::hooks`. Phases
//! `negotiate prepare copy converged pause final load` are asked before they begin and may refuse; `commit start release`
//! and the end are told when they are over, in order and beside everything else, since nothing may hold up a guest that is owned.

use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vmferry_common::causes::chain;
use vmferry_common::hooks::Hooks as Scripts;
use vmferry_common::phase::{HookPoint, Phase};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::DestinationFacts;
use vmferry_proto::ids::GuestName;

/// The hooks of one migration.
#[derive(Debug, Clone)]
pub(crate) struct Hooks {
    scripts: Scripts,
    guest: GuestName,
    known: Value,
    told: mpsc::UnboundedSender<HookPoint>,
}

/// The task that tells hooks of what is over.
#[derive(Debug)]
pub(crate) struct Teller(JoinHandle<()>);

impl Hooks {
    /// Hooks of the migration that `facts` describe, sent from `address`.
    pub(crate) fn new(scripts: Scripts, facts: &DestinationFacts) -> (Self, Teller) {
        let (told, mut phases) = mpsc::unbounded_channel();
        let hooks = Self {
            scripts,
            guest: facts.guest.clone(),
            known: json!({
                "side": "destination",
                "guest": facts.guest,
                "migration_id": facts.migration.to_string(),
                "generation": facts.generation.0,
                "peer": facts.sender,
            }),
            told,
        };
        let teller = Self {
            told: mpsc::unbounded_channel().0,
            ..hooks.clone()
        };
        let task = tokio::spawn(async move {
            while let Some(phase) = phases.recv().await {
                if let Err(error) = teller.ask(phase).await {
                    tracing::warn!(guest = %teller.guest, %phase, "{}; the migration goes on", error.detail);
                }
            }
        });
        (hooks, Teller(task))
    }

    /// Whether anything would run.
    pub(crate) fn has(&self, phase: Phase) -> bool {
        // A folder that cannot be read is for `ask` to refuse.
        self.scripts
            .scripts(phase)
            .map_or(true, |scripts| !scripts.is_empty())
    }

    /// Runs the scripts of `phase`; a refusal is `HookVeto`.
    pub(crate) async fn ask(&self, phase: impl Into<HookPoint>) -> Result<(), WireError> {
        let phase = phase.into();
        let mut told = self.known.clone();
        told["phase"] = json!(phase.name());
        let ran = self.scripts.run(phase, &self.guest, &told).await;
        ran.map(drop)
            .map_err(|failure| WireError::new(ErrorCode::HookVeto, chain(&failure)))
    }

    /// Has the scripts of `phase` run some time soon, after those told of before; a failure is only logged.
    pub(crate) fn tell(&self, phase: impl Into<HookPoint>) {
        // The task is there for as long as any handle is.
        let _ = self.told.send(phase.into());
    }
}

impl Teller {
    /// Waits for what was told. All handles must be gone.
    pub(crate) async fn finish(self) {
        if let Err(error) = self.0.await {
            tracing::error!(%error, "the hooks' task ended badly");
        }
    }
}
