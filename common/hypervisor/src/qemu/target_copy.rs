//! One QEMU process at the destination, made ready to be filled.
//!
//! Owns launch or attach, the comparison with the source's description, memory access, and the writable exports of the disks.
//! Invariant: whoever fails here leaves no launched process behind.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::Instant;
use vmferry_proto::ids::RegionId;
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::GuestSpec;

use super::describe;
use super::disk_io::{ALLOCATION, DiskHandle, flush_all};
use super::inventory::{self, Layout, Machine, Obstacles};
use super::leftovers;
use super::link::Link;
use super::names;
use super::nbd_server::NbdServer;
use super::preflight;
use super::qmp::{Qmp, QmpError};
use super::state_file::IncomingPipe;
use crate::config::TargetConfig;
use crate::error::GuestError;
use crate::launch;
use crate::memory::ProcessMemory;
use crate::open::{Leftovers, TargetOptions};
use crate::space;
use crate::watched::Watched;

/// How long a launched QEMU may take until its QMP socket is there: memory may be preallocated.
const LAUNCH_LIMIT: Duration = Duration::from_secs(60);
/// Pause between two tries to connect.
const LAUNCH_POLL: Duration = Duration::from_millis(20);

/// A QEMU with its regions.
#[derive(Debug)]
pub(super) struct Copy {
    pub(super) link: Link,
    pub(super) memory: ProcessMemory,
    pub(super) incoming: IncomingPipe,
    /// Its machine type.
    pub(super) machine: String,
    disks: TargetDisks,
    launched: Option<Watched>,
}

/// The disks of a copy, exported for writing.
#[derive(Debug, Default)]
pub(super) struct TargetDisks {
    disks: Vec<(RegionId, Arc<DiskHandle>)>,
    server: Option<NbdServer>,
}

impl TargetDisks {
    /// Exports every disk for writing, and learns which of it reads as zero.
    async fn open(
        &mut self,
        qmp: &Qmp,
        spec: &GuestSpec,
        layout: &Layout,
    ) -> Result<(), GuestError> {
        let disks = describe::disks(spec, layout);
        if disks.is_empty() {
            return Ok(());
        }
        let server = self.server.insert(NbdServer::start(qmp).await?);
        for (region, node, name, len) in disks {
            let export = names::export(region);
            server.export(qmp, &export, &node, true).await?;
            let nbd = server.connect(&export, &[ALLOCATION]).await?;
            if nbd.is_read_only() {
                return Err(GuestError::Incompatible(format!(
                    "disk {name} is read-only here: attach it writable"
                )));
            }
            let disk = DiskHandle::new(&name, len);
            disk.open(nbd)?;
            disk.learn_zeroes().await?;
            self.disks.push((region, Arc::new(disk)));
        }
        Ok(())
    }

    /// Ends the exports; what was not flushed may be lost.
    pub(super) async fn close(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        self.forget();
        NbdServer::stop(self.server.take(), qmp).await
    }

    fn forget(&self) {
        self.disks.iter().for_each(|(_, disk)| disk.close());
    }
}

impl Copy {
    /// Launches or attaches, compares with `spec`, and opens all regions.
    pub(super) async fn make(
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Self, GuestError> {
        let path = config.qmp.as_ref().ok_or_else(|| {
            GuestError::Config(format!(
                "guest file of {}: driver \"qemu\" needs `qmp = \"PATH\"`",
                config.name
            ))
        })?;
        let Some(argv) = &config.launch else {
            let qmp = Qmp::connect(path).await?;
            return Self::fit(config, spec, qmp, None, &options.populated).await;
        };
        refuse_running(path).await?;
        let log = options.run_dir.join(format!("{}.qemu.log", config.name));
        let launched = launch::launch(argv, &log, &*options.journal).await?;
        let made = match connect_launched(path, &launched).await {
            Ok(qmp) => Self::fit(config, spec, qmp, Some(&launched), &options.populated).await,
            Err(error) => Err(error),
        };
        match made {
            Ok(mut copy) => {
                copy.launched = Some(launched);
                Ok(copy)
            }
            Err(error) => {
                if let Err(left) = launched.kill().await {
                    tracing::error!(%left, "a QEMU that does not fit was not ended");
                }
                Err(error)
            }
        }
    }

    /// Goes on filling the QEMU `process`, which waits for content still.
    pub(super) async fn refill(
        config: &TargetConfig,
        spec: &GuestSpec,
        process: Watched,
    ) -> Result<Self, GuestError> {
        let qmp = connect_again(config, &process).await?;
        // What it has is not to be touched.
        let mut copy = Self::fit(config, spec, qmp, Some(&process), &[]).await?;
        copy.launched = config.launch.is_some().then_some(process);
        Ok(copy)
    }

    /// Takes the QEMU `process` in hand, which has its device state; its disks are not opened. Says whether the guest runs already.
    pub(super) async fn take_loaded(
        config: &TargetConfig,
        spec: &GuestSpec,
        process: Watched,
    ) -> Result<(Self, bool), GuestError> {
        let qmp = connect_again(config, &process).await?;
        let machine = Machine::of(&qmp).await?;
        let runs = match inventory::status(&qmp).await?.as_str() {
            "running" => true,
            "paused" => false,
            other => {
                return Err(GuestError::Touched(format!(
                    "QEMU's state is {other}, neither paused with the guest in it nor running"
                )));
            }
        };
        let layout = Layout::of(&qmp).await?;
        let link = Link::new(qmp, &machine, runs)?;
        let memory = ProcessMemory::attach(&link.identity(), describe::memory(spec, &layout))?;
        let incoming = IncomingPipe::hand_over(&link.qmp).await?;
        let copy = Self {
            link,
            memory,
            incoming,
            machine: machine.kind,
            disks: TargetDisks::default(),
            launched: config.launch.is_some().then_some(process),
        };
        Ok((copy, runs))
    }

    async fn fit(
        config: &TargetConfig,
        spec: &GuestSpec,
        qmp: Qmp,
        launched: Option<&Watched>,
        populated: &[PopulatedWindows],
    ) -> Result<Self, GuestError> {
        let machine = Machine::of(&qmp).await?;
        let link = Link::new(qmp, &machine, false)?;
        let process = link.identity();
        if let Some(launched) = launched.filter(|launched| *launched.identity() != process) {
            return Err(GuestError::Config(format!(
                "guest file of {}: `launch` started process {}, but QEMU is process {}: let the command become QEMU (`exec`), without -daemonize",
                config.name,
                launched.identity().pid,
                process.pid
            )));
        }
        leftovers::remove(&link.qmp, &process, Leftovers::Remove).await?;
        let (layout, obstacles) = tokio::join!(Layout::of(&link.qmp), Obstacles::of(&link.qmp));
        let (layout, obstacles) = (layout?, obstacles?);
        check_waiting(&obstacles)?;
        let shared = describe::shared_disks(&config.disks, &layout)?;
        let differences = preflight::mismatches(spec, &machine, &layout, &shared);
        describe::refuse("this QEMU does not fit the guest", &differences)?;
        space::check(&describe::needs(spec, &layout, &process))?;
        let memory = ProcessMemory::attach(&process, describe::memory(spec, &layout))?;
        memory.touch_ahead(populated);
        let incoming = IncomingPipe::hand_over(&link.qmp).await?;
        let mut copy = Self {
            link,
            memory,
            incoming,
            machine: machine.kind,
            disks: TargetDisks::default(),
            launched: None,
        };
        copy.disks.open(&copy.link.qmp, spec, &layout).await?;
        Ok(copy)
    }

    pub(super) fn disk(&self, region: RegionId) -> Option<Arc<DiskHandle>> {
        let found = self
            .disks
            .disks
            .iter()
            .find(|(known, _)| *known == region)?;
        Some(Arc::clone(&found.1))
    }

    pub(super) async fn flush_disks(&self) -> Result<(), GuestError> {
        let disks: Vec<_> = self
            .disks
            .disks
            .iter()
            .map(|(_, disk)| Arc::clone(disk))
            .collect();
        flush_all(&disks).await
    }

    /// What a load needs of it at the same time.
    pub(super) fn split(&mut self) -> (&mut TargetDisks, &mut IncomingPipe) {
        (&mut self.disks, &mut self.incoming)
    }

    pub(super) fn is_launched(&self) -> bool {
        self.launched.is_some()
    }

    /// Leaves a QEMU that somebody else started as it was found.
    pub(super) async fn leave(&mut self) -> Result<(), GuestError> {
        if self.link.check_alive().is_err() {
            return Ok(());
        }
        self.disks.close(&self.link.qmp).await?;
        let name = serde_json::json!({ "fdname": names::INCOMING });
        self.link.qmp.execute("closefd", name).await?;
        Ok(())
    }

    /// Ends the process. Nothing of it is worth an orderly end: disks were flushed where they count.
    pub(super) async fn end(&mut self) -> Result<(), GuestError> {
        self.disks.forget();
        self.disks.server = None;
        self.link.kill().await
    }
}

/// Somebody's QEMU behind the socket of a QEMU that is to be launched would be taken for it.
async fn refuse_running(path: &Path) -> Result<(), GuestError> {
    match UnixStream::connect(path).await {
        Ok(_) => Err(GuestError::Config(format!(
            "a process listens on {} already: end that QEMU, or remove `launch` from the guest file if it is the one that waits for the guest",
            path.display()
        ))),
        Err(_) => Ok(()),
    }
}

/// Connects to the QEMU of `config`, which must be `process`.
async fn connect_again(config: &TargetConfig, process: &Watched) -> Result<Qmp, GuestError> {
    let path = config.qmp.as_deref().unwrap_or(Path::new(""));
    let qmp = Qmp::connect(path).await?;
    let machine = Machine::of(&qmp).await?;
    let link = Link::new(qmp.clone(), &machine, true)?;
    if link.identity() == *process.identity() {
        return Ok(qmp);
    }
    Err(GuestError::Gone(format!(
        "process {}: another one answers on {}",
        process.identity().pid,
        path.display()
    )))
}

async fn connect_launched(path: &Path, launched: &Watched) -> Result<Qmp, GuestError> {
    let deadline = Instant::now() + LAUNCH_LIMIT;
    loop {
        match Qmp::connect(path).await {
            Ok(qmp) => return Ok(qmp),
            // Also a connection that ends at once: a QEMU with a wrong option opens its socket and gives up.
            Err(error) if Instant::now() < deadline && !matches!(error, QmpError::Busy { .. }) => {
                tracing::trace!(%error, "QEMU is not there yet");
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            biased;
            how = launched.ended() => {
                return Err(GuestError::Gone(format!("the QEMU that was launched did not come up: {how}")));
            }
            () = tokio::time::sleep(LAUNCH_POLL) => {}
        }
    }
}

fn check_waiting(obstacles: &Obstacles) -> Result<(), GuestError> {
    if obstacles.status != "inmigrate" {
        return Err(GuestError::Incompatible(format!(
            "this QEMU is in state {}, it does not wait for a guest: start it with `-incoming defer -S`",
            obstacles.status
        )));
    }
    if let Some(status) = obstacles
        .migration
        .as_deref()
        .filter(|status| *status != "none")
    {
        return Err(GuestError::Incompatible(format!(
            "this QEMU has taken a migration already ({status}): start a fresh one with `-incoming defer -S`"
        )));
    }
    if let Some(export) = obstacles.exports.first() {
        return Err(GuestError::Incompatible(format!(
            "block export {} ({}) is in use in this QEMU: end it first",
            export.id, export.kind
        )));
    }
    Ok(())
}
