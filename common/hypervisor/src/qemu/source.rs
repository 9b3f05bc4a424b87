//! A running guest of QEMU that is to leave this host.
//!
//! Owns the order of what is asked of QEMU: attach, tracking, pause, device state, resume, release. Disks are in
//! `source_disks`, memory in the crate's `memory`, judgements in `preflight`. Invariant: nothing that this driver made
//! inside QEMU outlives `stop_tracking`, and only `resume`, which consumes a permit, says `cont`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::RegionId;
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::{GuestSpec, RegionKind, RunState};

use super::describe;
use super::inventory::{self, Changing, Disk, Layout, Machine, Obstacles};
use super::leftovers;
use super::link::Link;
use super::names;
use super::preflight;
use super::qmp::{EventTally, Qmp, QmpError, Touch};
use super::saving::Saving;
use super::source_disks::SourceDisks;
use super::state_file::StateFile;
use crate::config::SourceConfig;
use crate::error::GuestError;
use crate::guest::{
    GuestLife, GuestPaused, PauseError, RegionReader, SavingDeviceState, Settlement, SourceGuest,
    Taken,
};
use crate::marks::{MarkLog, TrackingLeft};
use crate::memory::ProcessMemory;
use crate::open::Leftovers;

/// Longest wait for `stop`: it ends when the slowest disk request in flight has, and flushes the images.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// A guest of QEMU at the source.
#[derive(Debug)]
pub struct QemuSource {
    spec: GuestSpec,
    link: Link,
    has_direct_io: bool,
    at_attach: Changing,
    memory: ProcessMemory,
    disks: SourceDisks,
    /// Object in QEMU that names the tracking descriptor.
    tracking_mark: Option<String>,
    pause: Option<Pause>,
    released: bool,
}

/// What is known of the current pause.
#[derive(Debug)]
struct Pause {
    /// Events before it: any more of some kinds mean that somebody else touched the guest.
    tally: EventTally,
    /// Dirty bitmaps as they were found in it.
    disks: Vec<Disk>,
    state: Option<StateFile>,
}

impl QemuSource {
    /// Attaches to the QEMU that `config` names, removes what an earlier agent left, and makes every check of a source.
    ///
    /// # Errors
    /// [`GuestError::Incompatible`] with every reason why this guest cannot be migrated.
    pub async fn attach(config: &SourceConfig) -> Result<Self, GuestError> {
        Self::attach_with(config, Leftovers::Remove).await
    }

    /// As [`attach`](Self::attach), with a say in what becomes of the tracking that was left.
    ///
    /// # Errors
    /// As there.
    pub async fn attach_with(config: &SourceConfig, left: Leftovers) -> Result<Self, GuestError> {
        let path = config.qmp.as_ref().ok_or_else(|| {
            GuestError::Config(format!(
                "guest file of {}: driver \"qemu\" needs `qmp = \"PATH\"`",
                config.name
            ))
        })?;
        let qmp = Qmp::connect(path).await?;
        let machine = Machine::of(&qmp).await?;
        let link = Link::new(qmp, &machine, true)?;
        leftovers::remove(&link.qmp, &link.identity(), left).await?;
        let (layout, changing, obstacles) = tokio::join!(
            Layout::of(&link.qmp),
            Changing::of(&link.qmp),
            Obstacles::of(&link.qmp)
        );
        let (layout, changing, obstacles) = (layout?, changing?, obstacles?);
        let shared = describe::shared_disks(&config.disks, &layout)?;
        let mut refusals = preflight::source(&machine, &layout, &obstacles);
        let run_state = run_state(&obstacles.status).unwrap_or(RunState::Paused);
        let spec = describe::spec(&config.name, &machine, &layout, run_state, shared);
        refusals.extend(preflight::too_large(&spec));
        describe::refuse("this guest cannot be migrated", &refusals)?;
        let blocks = describe::memory(&spec, &layout);
        let mut memory = ProcessMemory::attach(&link.identity(), blocks)?;
        match left {
            Leftovers::Remove => {
                leftovers::end_tracking(&link.qmp, &machine, &mut memory).await?;
            }
            Leftovers::KeepTracking => {}
        }
        let disks = SourceDisks::new(describe::disks(&spec, &layout));
        Ok(Self {
            spec,
            link,
            has_direct_io: layout.has_direct_io(),
            at_attach: changing,
            memory,
            disks,
            tracking_mark: None,
            pause: None,
            released: false,
        })
    }

    /// Stops the guest and looks at it again; everything is sent together and carried out in this order.
    async fn stop_and_look(&mut self) -> Result<(), GuestError> {
        let qmp = &self.link.qmp;
        let tally = qmp.tally();
        let begun = Instant::now();
        let stop = async {
            let stopped = qmp.execute_within("stop", json!({}), STOP_LIMIT).await;
            (stopped, begun.elapsed())
        };
        let ((stopped, stop_took), now, status) =
            tokio::join!(stop, Changing::of(qmp), inventory::status(qmp));
        stopped?;
        let now = now?;
        let tally = qmp.tally().at_stop_since(&tally);
        tracing::debug!(?stop_took, elapsed = ?begun.elapsed(), "stopped the guest and listed it again");
        check_untouched(qmp, &tally, &status?)?;
        let changes = describe::changes(&self.at_attach, &now);
        let pause = Pause {
            tally,
            disks: now.disks,
            state: self.pause.take().and_then(|pause| pause.state),
        };
        self.pause = Some(pause);
        if changes.is_empty() {
            return Ok(());
        }
        Err(GuestError::Touched(format!(
            "it changed since the migration began: {}; migrate it again",
            changes.join("; ")
        )))
    }

    /// Makes ready what the device state will need, while the guest still runs.
    async fn prepare_pause(&mut self) -> Result<(), GuestError> {
        let begun = Instant::now();
        let (state, ()) = tokio::join!(
            StateFile::for_saving(&self.link.qmp),
            self.disks.flush_ahead()
        );
        self.pause = Some(Pause {
            tally: self.link.qmp.tally(),
            disks: Vec::new(),
            state: Some(state?),
        });
        tracing::debug!(elapsed = ?begun.elapsed(), "made ready for the pause");
        Ok(())
    }

    /// The part of `resume` behind the permit.
    pub(super) async fn resume_permitted(&mut self, to: RunState) -> Result<(), GuestError> {
        let qmp = &self.link.qmp;
        match to {
            RunState::Running => {
                qmp.execute_within("cont", json!({}), STOP_LIMIT).await?;
            }
            RunState::Paused => describe::activate_disks(qmp).await?,
        }
        if let Some(state) = self.pause.take().and_then(|pause| pause.state) {
            state.remove(qmp).await;
        }
        Ok(())
    }

    /// Ends a tracking that an earlier agent left and that was not gone on with.
    async fn end_left_tracking(&mut self) -> Result<(), GuestError> {
        if self.tracking_mark.is_some() {
            return Ok(());
        }
        let machine = Machine::of(&self.link.qmp).await?;
        leftovers::end_tracking(&self.link.qmp, &machine, &mut self.memory).await
    }

    async fn state(&self) -> Result<RunState, GuestError> {
        self.link.check_alive()?;
        let status = inventory::status(&self.link.qmp).await?;
        run_state(&status).ok_or_else(|| not_runnable(&status))
    }
}

fn run_state(status: &str) -> Option<RunState> {
    match status {
        "running" => Some(RunState::Running),
        "paused" => Some(RunState::Paused),
        _ => None,
    }
}

fn not_runnable(status: &str) -> GuestError {
    match status {
        "shutdown" => GuestError::ShutDown(format!("QEMU's state is {status}")),
        _ => GuestError::Touched(format!(
            "QEMU's state is {status}, neither running nor paused"
        )),
    }
}

/// Whether the guest is paused, and nobody else did anything to it since `tally`.
pub(super) fn check_untouched(
    qmp: &Qmp,
    tally: &EventTally,
    status: &str,
) -> Result<(), GuestError> {
    match (qmp.tally().touched_since(tally), status) {
        (Some(Touch::ShutDown(reason)), _) => Err(GuestError::ShutDown(reason)),
        (Some(Touch::Rebooted), _) => Err(GuestError::Rebooted),
        (Some(Touch::Reset), _) => Err(GuestError::Touched("it was reset".to_owned())),
        (Some(Touch::Resumed), _) => Err(GuestError::Touched("it was resumed".to_owned())),
        (None, "paused") => Ok(()),
        (None, other) => Err(not_runnable(other)),
    }
}

#[async_trait]
impl SourceGuest for QemuSource {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn reader(&self, region: RegionId) -> Option<Arc<dyn RegionReader>> {
        match self.spec.region(region)?.kind {
            RegionKind::Memory => self.memory.reader(region),
            RegionKind::Disk => Some(self.disks.handle(region)?),
        }
    }

    async fn populated(&mut self) -> Vec<PopulatedWindows> {
        self.memory.populated_windows().await
    }

    async fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.disks.start(&self.link.qmp).await?;
        let started = self.memory.start_tracking().await?;
        tracing::info!(
            descriptor = started.descriptor,
            stopped = ?started.stopped,
            "tracking the guest's writes"
        );
        if self.tracking_mark.is_none() {
            leftovers::mark_tracking(&self.link.qmp, started.descriptor).await?;
            self.tracking_mark = Some(names::tracking_mark(started.descriptor));
        }
        Ok(())
    }

    fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.memory.keep_marks(Arc::clone(&log));
        self.disks.keep_marks(log);
    }

    fn tracking(&self) -> Option<TrackingLeft> {
        self.memory.tracking()
    }

    async fn resume_tracking(&mut self, left: &TrackingLeft) -> Result<(), GuestError> {
        self.memory.resume(left).await?;
        self.tracking_mark = Some(names::tracking_mark(left.descriptor));
        self.disks.resume(&self.link.qmp).await
    }

    async fn stop_tracking(&mut self) -> Result<(), GuestError> {
        let memory = match self.memory.stop_tracking().await {
            Ok(()) => self.end_left_tracking().await,
            failed => failed,
        };
        if let Some(state) = self.pause.as_mut().and_then(|pause| pause.state.take()) {
            state.remove(&self.link.qmp).await;
        }
        let mark = match self.tracking_mark.take() {
            Some(mark) => leftovers::unmark_tracking(&self.link.qmp, &mark).await,
            None => Ok(()),
        };
        let disks = self
            .disks
            .stop(&self.link.qmp)
            .await
            .and(mark.map_err(GuestError::from));
        // A process that is gone holds nothing any more.
        match memory.and(disks) {
            Err(GuestError::Gone(_)) => Ok(()),
            other => other,
        }
    }

    async fn take_dirty(&mut self, region: RegionId) -> Result<Taken, GuestError> {
        self.link.check_alive()?;
        if self.disks.has(region) {
            let listed = self.pause.as_ref().map(|pause| pause.disks.as_slice());
            return self.disks.take(&self.link.qmp, region, listed).await;
        }
        self.memory.take_dirty(region).await
    }

    async fn settle(&mut self, region: RegionId, outcome: Settlement) -> Result<(), GuestError> {
        if self.disks.has(region) {
            let paused = self.pause.is_some();
            return self
                .disks
                .settle(&self.link.qmp, region, outcome, paused)
                .await;
        }
        self.memory.settle(region, outcome);
        Ok(())
    }

    async fn io_barrier(&mut self) -> Result<Duration, GuestError> {
        if self.pause.is_some() || !self.has_direct_io {
            return Ok(Duration::ZERO);
        }
        // QEMU drains in-flight requests before it runs a transaction, so an empty one is a barrier.
        let begun = Instant::now();
        let arguments = json!({ "actions": [] });
        self.link
            .qmp
            .execute_within("transaction", arguments, STOP_LIMIT)
            .await?;
        Ok(begun.elapsed())
    }

    async fn run_state(&mut self) -> Result<RunState, GuestError> {
        self.state().await
    }

    async fn pause(&mut self) -> Result<GuestPaused, PauseError> {
        let untouched = |source| PauseError {
            before: None,
            source,
        };
        let before = self.state().await.map_err(untouched)?;
        self.prepare_pause().await.map_err(untouched)?;
        match self.stop_and_look().await {
            Ok(()) => Ok(GuestPaused::confirmed_by_driver(before)),
            Err(source) => Err(PauseError {
                before: Some(before),
                source,
            }),
        }
    }

    async fn still_paused(&mut self, _paused: &GuestPaused) -> Result<(), GuestError> {
        self.link.check_alive()?;
        let status = inventory::status(&self.link.qmp).await?;
        let pause = self.pause.as_ref().ok_or_else(not_paused_by_us)?;
        check_untouched(&self.link.qmp, &pause.tally, &status)
    }

    async fn begin_device_state(
        &mut self,
        _paused: &GuestPaused,
    ) -> Result<SavingDeviceState, GuestError> {
        let pause = self.pause.as_mut().ok_or_else(not_paused_by_us)?;
        let saving = Saving {
            qmp: self.link.qmp.clone(),
            file: pause.state.take().ok_or_else(not_paused_by_us)?,
            server: self.disks.let_go(),
            tally: pause.tally.clone(),
            live: !self.spec.shared_disks.is_empty(),
        };
        Ok(saving.run().boxed())
    }

    async fn resume(&mut self, _permit: RunPermit, to: RunState) -> Result<(), GuestError> {
        self.resume_permitted(to).await
    }

    async fn release(&mut self) -> Result<(), GuestError> {
        if self.released {
            return Ok(());
        }
        self.link.quit().await?;
        self.released = true;
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.link.life()
    }

    fn process(&self) -> ProcessIdentity {
        self.link.identity()
    }
}

fn not_paused_by_us() -> GuestError {
    GuestError::Touched("it is not paused by this agent".to_owned())
}

impl From<QmpError> for PauseError {
    fn from(error: QmpError) -> Self {
        Self {
            before: None,
            source: error.into(),
        }
    }
}
