//! A launched process is named in the journal before it becomes a hypervisor.
//!
//! Owns the way from the piece of work that launches it to the machine, whose record names it, and back. Invariant: a process is
//! let go only behind a durable record that names it, so an agent that dies at any moment leaves none that its successor does not
//! know.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use vmferry_common::process::ProcessIdentity;
use vmferry_hypervisor::GuestError;
use vmferry_hypervisor::launch::{LaunchJournal, Recorded};
use vmferry_proto::handover::{DestinationEvent, ProcessRecord};

use super::Migration;

/// A process waits to be named.
#[derive(Debug)]
pub(super) struct Launched {
    process: ProcessIdentity,
    answer: oneshot::Sender<Option<Recorded>>,
}

/// The journal, as the work sees it that launches processes.
#[derive(Debug)]
pub(super) struct Namer(mpsc::Sender<Launched>);

impl Namer {
    /// A migration launches one process at a time.
    pub(super) fn new() -> (Arc<Self>, mpsc::Receiver<Launched>) {
        let (launched, waiting) = mpsc::channel(1);
        (Arc::new(Self(launched)), waiting)
    }
}

#[async_trait]
impl LaunchJournal for Namer {
    async fn record(&self, process: &ProcessIdentity) -> Result<Recorded, GuestError> {
        let (answer, answered) = oneshot::channel();
        let launched = Launched {
            process: process.clone(),
            answer,
        };
        let recorded = match self.0.send(launched).await {
            Ok(()) => answered.await.ok().flatten(),
            Err(_) => None,
        };
        recorded.ok_or_else(|| GuestError::Refused {
            command: format!("launch of {process}"),
            answer: "the journal cannot name it, so it was ended before it began".to_owned(),
        })
    }
}

impl Migration {
    pub(super) async fn on_launched(&mut self, launched: Launched) {
        let Launched { process, answer } = launched;
        let named = ProcessRecord::from(process.clone());
        // The record is written, or has failed, when this returns.
        self.feed(DestinationEvent::CopyLaunched {
            process: named.clone(),
        })
        .await;
        let recorded = self.handover.names(&named);
        // Work that was dropped meanwhile has ended its process.
        let _ = answer.send(recorded.then(|| Recorded::durably(process)));
    }
}
