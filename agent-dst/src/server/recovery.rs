//! What an earlier agent left: every record of the journal that is not settled gets its migration (`[HAND-7]`).
//!
//! Owns the search for them at the start, and that one that cannot be taken up (a disk that fails, a name that another process
//! holds, a guest file that is gone) is tried again until it can. A source that comes meanwhile takes its migration up itself.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use vmferry_common::causes::chain;
use vmferry_proto::handover::{DestinationRecord, ProcessRecord};
use vmferry_proto::ids::GuestName;

use super::Server;
use crate::config::Lookup;
use crate::migration::MigrationHandle;

/// After this time what could not be taken up is tried again: soon enough for a guest that is to be started, and nothing to a disk.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// What could not be taken up so far, so that each reason is told once.
#[derive(Debug, Default)]
pub(super) struct Recovery {
    told: HashMap<Option<GuestName>, String>,
}

impl Recovery {
    /// Takes up whatever can be taken up now. Returns whether that is all there is.
    pub(super) async fn take_up_all(&mut self, server: &Server) -> bool {
        let guests = match server.host.store.guests() {
            Ok(guests) => guests,
            Err(error) => {
                self.tell(None, chain(&error));
                return false;
            }
        };
        let mut all = true;
        for guest in guests {
            if let Err(why) = server.take_up(&guest).await {
                self.tell(Some(guest), why);
                all = false;
            }
        }
        all
    }

    /// Takes up the rest, as soon as it can be, unless the agent is told to stop first.
    pub(super) async fn finish(mut self, server: Arc<Server>) {
        loop {
            tokio::select! {
                biased;
                () = server.stop.cancelled() => return,
                () = tokio::time::sleep(RETRY_AFTER) => {}
            }
            if self.take_up_all(&server).await {
                return;
            }
        }
    }

    fn tell(&mut self, guest: Option<GuestName>, why: String) {
        let of = guest
            .as_ref()
            .map_or("all guests", GuestName::as_str)
            .to_owned();
        if self.told.get(&guest) != Some(&why) {
            tracing::error!(
                guest = of,
                "what the journal says cannot be finished yet, and is tried again each {} s: {why}",
                RETRY_AFTER.as_secs()
            );
            self.told.insert(guest, why);
        }
    }
}

impl Server {
    /// Goes on with the migration of this guest, if it needs that and nobody is at work on it.
    async fn take_up(&self, guest: &GuestName) -> Result<(), String> {
        let slot = self.slot(guest);
        let mut slot = slot.lock().await;
        // A stopping agent has told its migrations already.
        if slot.is_none() && !self.stop.is_cancelled() {
            *slot = self.recover(guest)?;
        }
        Ok(())
    }

    fn recover(&self, guest: &GuestName) -> Result<Option<MigrationHandle>, String> {
        let record = self
            .host
            .store
            .read_destination(guest)
            .map_err(|error| chain(&error))?;
        let Some(record) = record.filter(|record| self.needs_work(record)) else {
            return Ok(None);
        };
        let config = match self.host.guests.find(guest) {
            Ok(Lookup::Found(config)) => *config,
            Ok(Lookup::Unknown { .. }) => {
                return Err("its guest file is gone: put it back".to_owned());
            }
            Err(error) => return Err(chain(&error)),
        };
        let lock = self.host.store.lock(guest).map_err(|error| chain(&error))?;
        tracing::info!(%guest, state = record.state.name(), "going on from the journal");
        Ok(Some(self.resume(record, config, lock, false)))
    }

    /// Whether an agent that starts has something to do for this record.
    fn needs_work(&self, record: &DestinationRecord) -> bool {
        use vmferry_proto::handover::DestinationState as State;
        let lives =
            |process: &ProcessRecord| self.host.hypervisors.is_alive(&process.clone().into());
        match &record.state {
            State::Owned { started, .. } => !started,
            State::Ended { .. } => record.process.as_ref().is_some_and(lives),
            State::Receiving
            | State::Opened { .. }
            | State::Aborted { .. }
            | State::Relinquished { .. } => true,
        }
    }
}
