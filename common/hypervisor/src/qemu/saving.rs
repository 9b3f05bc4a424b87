//! A QEMU's device state being saved, while its paused memory is still read.
//!
//! Owns the order: exports and server gone, nothing in the way, then saved, and nobody touched the guest meanwhile. QEMU's
//! descriptor of the file is taken back however it ends.

use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;

use super::inventory;
use super::nbd_server::NbdServer;
use super::qmp::{EventTally, Qmp};
use super::source::check_untouched;
use super::state_file::StateFile;
use super::stream;
use crate::error::GuestError;

/// Longest wait for the device state to be written.
const SAVE_LIMIT: Duration = Duration::from_secs(120);

/// What it takes to save.
#[derive(Debug)]
pub(super) struct Saving {
    pub(super) qmp: Qmp,
    /// The server of exports that nobody reads any more.
    pub(super) server: Option<NbdServer>,
    pub(super) file: StateFile,
    /// Events before the pause.
    pub(super) tally: EventTally,
    /// Whether QEMU keeps its disks active: those that both hosts reach are let go by the handover.
    pub(super) live: bool,
}

impl Saving {
    /// Saves, and returns what was saved.
    ///
    /// # Errors
    /// Something is in the way, somebody touched the guest, or QEMU refuses.
    pub(super) async fn run(mut self) -> Result<Vec<u8>, GuestError> {
        let saved = self.save().await;
        let Self { qmp, file, .. } = self;
        match saved {
            Ok(_) => file.remove_later(&qmp),
            Err(_) => file.remove(&qmp).await,
        }
        saved
    }

    async fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        let begun = Instant::now();
        self.clear_the_way().await?;
        let cleared = begun.elapsed();
        let arguments = json!({ "filename": self.file.path(), "live": self.live });
        let (saved, status) = tokio::join!(
            self.qmp
                .execute_within("xen-save-devices-state", arguments, SAVE_LIMIT),
            inventory::status(&self.qmp),
        );
        saved?;
        check_untouched(&self.qmp, &self.tally, &status?)?;
        let bytes = self.file.read()?;
        stream::check_saved(&bytes).map_err(|error| GuestError::Refused {
            command: "xen-save-devices-state".to_owned(),
            answer: error.to_string(),
        })?;
        tracing::debug!(?cleared, elapsed = ?begun.elapsed(), bytes = bytes.len(), "saved the device state");
        Ok(bytes)
    }

    /// Exports and server gone, nothing in the way of the device state: else QEMU would crash in saving it.
    async fn clear_the_way(&mut self) -> Result<(), GuestError> {
        let qmp = &self.qmp;
        let (closed, exports, migrate) = tokio::join!(
            NbdServer::stop(self.server.take(), qmp),
            inventory::exports(qmp),
            qmp.execute("query-migrate", json!({})),
        );
        closed?;
        if let Some(export) = exports?.first() {
            return Err(GuestError::Touched(format!(
                "block export {} is there, which this agent did not make or could not remove",
                export.id
            )));
        }
        match inventory::blocked_reasons(&migrate?).as_slice() {
            [] => Ok(()),
            reasons => Err(GuestError::Incompatible(format!(
                "QEMU says that the guest cannot be migrated any more: {}",
                reasons.join("; ")
            ))),
        }
    }
}
