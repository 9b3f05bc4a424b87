//! Hooks that are told of what is decided: in order, beside the migration, never in its way.
//!
//! Owns the task that runs them and the wait for its end. After the decision no script can say no, and none may delay the
//! release of a guest that runs elsewhere already; so they are queued here, and a failure is a line in the log.

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vmferry_common::causes::chain;
use vmferry_common::hooks::Hooks;
use vmferry_common::phase::Phase;
use vmferry_proto::ids::GuestName;

use crate::error::MigrateError;

/// The way to the hooks' task.
#[derive(Debug)]
pub(super) struct Teller {
    phases: mpsc::UnboundedSender<(Phase, Value)>,
    task: JoinHandle<()>,
}

impl Teller {
    /// Starts the task.
    pub(super) fn start(hooks: Hooks, name: GuestName) -> Self {
        let (phases, mut queue) = mpsc::unbounded_channel::<(Phase, Value)>();
        let task = tokio::spawn(async move {
            while let Some((phase, facts)) = queue.recv().await {
                if let Err(failure) = hooks.run(phase, &name, &facts).await {
                    tracing::warn!(%phase, "{}; after the decision this changes nothing", chain(&MigrateError::Hook(failure)));
                }
            }
        });
        Self { phases, task }
    }

    /// Has the scripts of `phase` run after those told of before.
    pub(super) fn tell(&self, phase: Phase, facts: Value) {
        // The task is there for as long as this is.
        let _ = self.phases.send((phase, facts));
    }

    /// Waits until all were told: each script has its own time limit.
    pub(super) async fn finish(self) {
        let Self { phases, task } = self;
        drop(phases);
        if let Err(error) = task.await {
            tracing::error!(%error, "the hooks' task ended badly");
        }
    }
}
