//! A guest whose process is gone, for an agent that has to finish what the journal says of it.
//!
//! Owns nothing: whatever is to be done to the guest is either done already (let go, tracking removed) or can never be done again. So an
//! agent asks the destination how an attempt came out although there is nobody left here to resume, and whoever answers at the guest's
//! socket by now is left alone.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::{GuestName, RegionId};
use vmferry_proto::spec::{GuestSpec, RunState};

use crate::error::GuestError;
use crate::guest::{
    GuestLife, GuestPaused, PauseError, RegionReader, SavingDeviceState, Settlement, SourceGuest,
    Taken,
};

/// Such a guest.
#[derive(Debug)]
pub struct GoneGuest {
    process: ProcessIdentity,
    spec: GuestSpec,
    /// Kept, so that those who watch wait on.
    life: watch::Sender<GuestLife>,
}

impl GoneGuest {
    /// The guest `name`, which was `process`.
    #[must_use]
    pub fn new(name: &GuestName, process: ProcessIdentity) -> Self {
        let (life, _) = watch::channel(GuestLife::Gone(process.to_string()));
        Self {
            spec: GuestSpec {
                name: name.clone(),
                uuid: None,
                driver: String::new(),
                hypervisor_version: String::new(),
                machine: String::new(),
                cpu_model: String::new(),
                vcpus: 0,
                run_state: RunState::Paused,
                regions: Vec::new(),
                shared_disks: Vec::new(),
                devices: Vec::new(),
            },
            process,
            life,
        }
    }

    fn gone<T>(&self) -> Result<T, GuestError> {
        Err(GuestError::Gone(self.process.to_string()))
    }
}

#[async_trait]
impl SourceGuest for GoneGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn reader(&self, _region: RegionId) -> Option<Arc<dyn RegionReader>> {
        None
    }

    async fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.gone()
    }

    async fn stop_tracking(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    async fn take_dirty(&mut self, _region: RegionId) -> Result<Taken, GuestError> {
        self.gone()
    }

    async fn settle(&mut self, _region: RegionId, _outcome: Settlement) -> Result<(), GuestError> {
        self.gone()
    }

    async fn io_barrier(&mut self) -> Result<Duration, GuestError> {
        self.gone()
    }

    async fn run_state(&mut self) -> Result<RunState, GuestError> {
        self.gone()
    }

    async fn pause(&mut self) -> Result<GuestPaused, PauseError> {
        self.gone().map_err(|source| PauseError {
            before: None,
            source,
        })
    }

    async fn still_paused(&mut self, _paused: &GuestPaused) -> Result<(), GuestError> {
        self.gone()
    }

    async fn begin_device_state(
        &mut self,
        _paused: &GuestPaused,
    ) -> Result<SavingDeviceState, GuestError> {
        self.gone()
    }

    async fn resume(&mut self, _permit: RunPermit, _to: RunState) -> Result<(), GuestError> {
        self.gone()
    }

    async fn release(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.life.subscribe()
    }

    fn process(&self) -> ProcessIdentity {
        self.process.clone()
    }
}
