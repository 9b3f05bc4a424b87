//! A running embedded guest that is to leave this host.
//!
//! Owns what the engine asks of it. The pause is the guest's own `stop`; that nobody let it run since is told by its count of
//! starts. Invariant: marks of the disk that were taken and not acknowledged are reported again.

use std::future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use serde::Deserialize;
use tokio::sync::watch;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::geometry::{RegionBits, RegionLen};
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::RegionId;
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::{GuestSpec, RunState};

use super::client::{Client, LifeWatch};
use super::describe::{self, Description, State, Status};
use super::disk::DiskFile;
use crate::config::{DiskMode, SourceConfig};
use crate::error::GuestError;
use crate::guest::{
    GuestLife, GuestPaused, PauseError, RegionReader, SavingDeviceState, Settlement, SourceGuest,
    Taken,
};
use crate::marks::{MarkLog, TrackingLeft};
use crate::memory::ProcessMemory;
use crate::open::Leftovers;
use crate::watched::Watched;

/// How long a guest that was told to quit may take.
const QUIT_LIMIT: Duration = Duration::from_secs(10);

/// The region that is the disk.
const DISK: RegionId = RegionId(1);

/// A running embedded guest.
#[derive(Debug)]
pub struct SimSource {
    client: Client,
    life: LifeWatch,
    process: Watched,
    found: Description,
    mode: DiskMode,
    spec: GuestSpec,
    memory: ProcessMemory,
    disk: Option<SourceDisk>,
    log: Option<Arc<dyn MarkLog>>,
    /// Count of starts at the pause.
    paused_at: Option<u64>,
}

#[derive(Debug)]
struct SourceDisk {
    file: Arc<DiskFile>,
    /// Reported by the next take: everything at first, then what was taken and not acknowledged.
    owed: RegionBits,
}

/// Answer to `take-disk-dirty`.
#[derive(Debug, Deserialize)]
struct DirtyExtents {
    extents: Vec<(u64, u64)>,
}

/// Answer to `save-state`.
#[derive(Debug, Deserialize)]
struct SavedState {
    state: String,
}

impl SimSource {
    /// Attaches to the guest that `config` names.
    pub async fn attach(config: &SourceConfig, leftovers: Leftovers) -> Result<Self, GuestError> {
        let path = config.socket.as_ref().ok_or_else(|| {
            GuestError::Config(format!(
                "guest {}: driver \"sim\" needs `socket = \"PATH\"`",
                config.name
            ))
        })?;
        let mut client = Client::connect(path).await?;
        let (found, identity) = describe::ask(&mut client).await?;
        if found.state == State::Incoming {
            return Err(GuestError::Incompatible(format!(
                "guest {} waits for content itself: there is nothing to migrate",
                config.name
            )));
        }
        let mode = describe::disk_mode(&config.disks)?;
        let disk = match (&found.disk, mode) {
            (Some(path), DiskMode::Copy) => Some(SourceDisk {
                file: Arc::new(DiskFile::open(path, found.disk_len, false)?),
                owed: RegionBits::full(RegionLen(found.disk_len)),
            }),
            (Some(_), DiskMode::Shared) | (None, _) => None,
        };
        let mut memory = describe::memory(&found, &identity)?;
        match leftovers {
            Leftovers::Remove => remove_leftovers(&mut client, &mut memory, &found).await?,
            Leftovers::KeepTracking => {}
        }
        Ok(Self {
            life: LifeWatch::start(path).await?,
            memory,
            process: Watched::find(identity)?,
            spec: describe::spec(&config.name, &found, mode),
            client,
            found,
            mode,
            disk,
            log: None,
            paused_at: None,
        })
    }

    async fn status(&mut self) -> Result<Status, GuestError> {
        self.client.ask("status", None).await
    }

    /// Fails if the guest is not the one of the spec any more.
    async fn check_unchanged(&mut self) -> Result<(), GuestError> {
        let (now, _) = describe::ask(&mut self.client).await?;
        let spec = describe::spec(&self.spec.name, &now, self.mode);
        if now.ram_address != self.found.ram_address || spec.regions != self.spec.regions {
            return Err(GuestError::Incompatible(format!(
                "guest {} changed its RAM or disk while it was copied: migrate it again",
                self.spec.name
            )));
        }
        self.disk
            .as_ref()
            .map_or(Ok(()), |disk| disk.file.check_len())
    }

    async fn take_disk(&mut self) -> Result<Taken, GuestError> {
        let disk = self.disk.as_mut().ok_or_else(no_disk)?;
        let all = 0..disk.owed.windows();
        // The guest forgets its marks when it answers.
        if let Some(log) = &self.log {
            log.before(DISK, all.clone());
        }
        let dirty: DirtyExtents = self.client.ask("take-disk-dirty", None).await?;
        for (offset, len) in dirty.extents {
            disk.owed.insert_bytes(offset, len);
        }
        if let Some(log) = &self.log {
            log.found(DISK, &disk.owed);
            log.after(DISK, all, &[], &[]);
        }
        // Asked after the marks were taken: a block that is written later is marked again.
        let file = Arc::clone(&disk.file);
        let holes = tokio::task::spawn_blocking(move || file.holes())
            .await
            .map_err(|error| GuestError::Tracking(Box::new(error)))??;
        let mut zero = RegionBits::empty(disk.owed.region_len());
        for (window, bits) in disk.owed.iter() {
            zero.insert(window, &bits.and(&holes.get(window)));
        }
        Ok(Taken {
            dirty: disk.owed.clone(),
            zero,
            longest_hold: Duration::ZERO,
        })
    }
}

/// Ends the tracking that an agent which was killed left in the guest. The guest makes no userfaultfd by itself, so one that is there
/// is an agent's; whoever attaches holds the guest's lock, so that agent is dead.
async fn remove_leftovers(
    client: &mut Client,
    memory: &mut ProcessMemory,
    found: &Description,
) -> Result<(), GuestError> {
    while let Some(descriptor) = tracking_descriptor(found.pid) {
        tracing::info!(
            pid = found.pid,
            descriptor,
            "ending the tracking that an earlier agent left"
        );
        memory.resume_tracking(descriptor).await?;
        memory.stop_tracking().await?;
        if tracking_descriptor(found.pid) == Some(descriptor) {
            return Err(GuestError::Refused {
                command: format!("close of descriptor {descriptor}"),
                answer: "it is open in the guest's process still".to_owned(),
            });
        }
        if found.disk.is_some() {
            client.tell("stop-disk-tracking", None).await?;
        }
    }
    Ok(())
}

fn tracking_descriptor(pid: u32) -> Option<i32> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    entries
        .filter_map(Result::ok)
        .filter(|entry| {
            std::fs::read_link(entry.path())
                .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
        })
        .find_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn no_disk() -> GuestError {
    GuestError::Refused {
        command: format!("disk region {DISK}"),
        answer: "the guest has no such disk".to_owned(),
    }
}

fn run_state(state: State) -> RunState {
    match state {
        State::Running => RunState::Running,
        State::Paused | State::Incoming => RunState::Paused,
    }
}

#[async_trait]
impl SourceGuest for SimSource {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn reader(&self, region: RegionId) -> Option<Arc<dyn RegionReader>> {
        match &self.disk {
            Some(disk) if region == DISK => Some(Arc::clone(&disk.file) as Arc<dyn RegionReader>),
            Some(_) | None => self.memory.reader(region),
        }
    }

    async fn populated(&mut self) -> Vec<PopulatedWindows> {
        self.memory.populated_windows().await
    }

    async fn start_tracking(&mut self) -> Result<(), GuestError> {
        if let Some(disk) = &mut self.disk {
            disk.owed.fill();
            self.client.tell("start-disk-tracking", None).await?;
        }
        let started = self.memory.start_tracking().await?;
        tracing::debug!(guest = %self.spec.name, ?started, "memory is tracked");
        Ok(())
    }

    fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.memory.keep_marks(Arc::clone(&log));
        self.log = Some(log);
    }

    fn tracking(&self) -> Option<TrackingLeft> {
        self.memory.tracking()
    }

    async fn resume_tracking(&mut self, left: &TrackingLeft) -> Result<(), GuestError> {
        self.memory.resume(left).await?;
        // The guest goes on marking by itself, and what was taken is in the log.
        if let Some(disk) = &mut self.disk {
            disk.owed.clear();
        }
        Ok(())
    }

    async fn stop_tracking(&mut self) -> Result<(), GuestError> {
        let memory = self.memory.stop_tracking().await;
        let left = remove_leftovers(&mut self.client, &mut self.memory, &self.found).await;
        let disk = match &self.disk {
            Some(_) => self.client.tell("stop-disk-tracking", None).await,
            None => Ok(()),
        };
        match memory.and(left).and(disk) {
            // A guest that is gone has no trace left in it.
            Err(GuestError::Gone(_)) => Ok(()),
            done => done,
        }
    }

    async fn take_dirty(&mut self, region: RegionId) -> Result<Taken, GuestError> {
        if region == DISK && self.disk.is_some() {
            self.take_disk().await
        } else {
            self.memory.take_dirty(region).await
        }
    }

    async fn settle(&mut self, region: RegionId, outcome: Settlement) -> Result<(), GuestError> {
        match (&mut self.disk, outcome) {
            (Some(disk), Settlement::Acknowledged) if region == DISK => disk.owed.clear(),
            (Some(_), Settlement::PutBack) if region == DISK => {}
            (Some(_) | None, Settlement::Acknowledged | Settlement::PutBack) => {
                self.memory.settle(region, outcome);
            }
        }
        Ok(())
    }

    async fn io_barrier(&mut self) -> Result<Duration, GuestError> {
        Ok(Duration::ZERO)
    }

    async fn run_state(&mut self) -> Result<RunState, GuestError> {
        Ok(run_state(self.status().await?.state))
    }

    async fn pause(&mut self) -> Result<GuestPaused, PauseError> {
        let stopped: Result<Status, GuestError> = self.client.ask("stop", None).await;
        let status = stopped.map_err(|source| PauseError {
            // It was sent, and the guest may have stopped: it goes back to what it did when this began.
            before: Some(self.spec.run_state),
            source,
        })?;
        self.paused_at = Some(status.starts);
        let before = if status.was_running {
            RunState::Running
        } else {
            RunState::Paused
        };
        match self.check_unchanged().await {
            Ok(()) => Ok(GuestPaused::confirmed_by_driver(before)),
            Err(source) => Err(PauseError {
                before: Some(before),
                source,
            }),
        }
    }

    async fn still_paused(&mut self, _paused: &GuestPaused) -> Result<(), GuestError> {
        if let GuestLife::ShutDown(how) = &*self.life.receiver.borrow() {
            return Err(GuestError::ShutDown(how.clone()));
        }
        let status = self.status().await?;
        if status.state == State::Paused && Some(status.starts) == self.paused_at {
            return Ok(());
        }
        Err(GuestError::Touched(format!(
            "guest {} was let run while it was paused for the cutover",
            self.spec.name
        )))
    }

    /// A few hundred bytes of an idle program: nothing that would be worth doing beside something else.
    async fn begin_device_state(
        &mut self,
        paused: &GuestPaused,
    ) -> Result<SavingDeviceState, GuestError> {
        self.still_paused(paused).await?;
        let saved: SavedState = self.client.ask("save-state", None).await?;
        Ok(future::ready(Ok(saved.state.into_bytes())).boxed())
    }

    async fn resume(&mut self, _permit: RunPermit, to: RunState) -> Result<(), GuestError> {
        self.paused_at = None;
        match to {
            RunState::Running => self.client.tell("cont", None).await,
            RunState::Paused => Ok(()),
        }
    }

    async fn release(&mut self) -> Result<(), GuestError> {
        match self.client.tell("quit", None).await {
            Ok(()) | Err(GuestError::Gone(_) | GuestError::Io { .. }) => {}
            Err(error) => {
                tracing::warn!(guest = %self.spec.name, %error, "the guest did not take its quit");
            }
        }
        if tokio::time::timeout(QUIT_LIMIT, self.process.ended())
            .await
            .is_err()
        {
            self.process.kill().await?;
        }
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.life.receiver()
    }

    fn process(&self) -> ProcessIdentity {
        self.process.identity().clone()
    }
}
