//! A QEMU that waits for a guest's content, and then runs it.
//!
//! Owns the order of what is asked of it: launch or attach, compare, export, load, start, end. Invariants: the guest
//! does not run before `start`, which consumes a permit (the loaded state says `paused`, and a guest that somebody else
//! starts is ended); after a start that may have worked nothing here ends the process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::{Incarnation, RegionId};
use vmferry_proto::spec::{GuestSpec, RegionKind, RunState};

use super::describe;
use super::inventory;
use super::qmp::{Qmp, QmpError};
use super::stream;
use super::target_copy::Copy;
use crate::config::TargetConfig;
use crate::error::GuestError;
use crate::guest::{GuestLife, RegionWriter, StartError, TargetGuest};
use crate::open::{CopyLeft, Reopening, TargetOptions};
use crate::watched::Watched;

/// Longest wait for the device state to be loaded.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// A load takes QEMU 5 to 30 ms, in which it answers nothing. So long it is asked again at once, since the guest is
/// stopped meanwhile; after that there is no hurry.
const LOAD_EAGER: Duration = Duration::from_millis(100);
/// Pause between two questions then.
const LOAD_POLL: Duration = Duration::from_millis(2);
/// Longest wait for `cont`: it takes the images back and may wait for their locks.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Content is written.
    Filling,
    /// The load of the device state was begun: this QEMU is used up.
    Loaded,
    /// The start was begun: nothing here ends it any more.
    Started,
    /// It was ended.
    Ended,
}

/// A guest of QEMU at the destination.
#[derive(Debug)]
pub struct QemuTarget {
    config: TargetConfig,
    options: TargetOptions,
    spec: GuestSpec,
    copy: Copy,
    incarnations: Vec<Incarnation>,
    stage: Stage,
}

impl QemuTarget {
    /// Launches the QEMU of `config`, or attaches to it where it waits already, and compares it with `spec`.
    ///
    /// # Errors
    /// [`GuestError::Incompatible`] with every difference; what was launched is ended then.
    pub async fn prepare(
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Self, GuestError> {
        let copy = Copy::make(config, spec, options).await?;
        let mut incarnations = Vec::with_capacity(spec.regions.len());
        for _ in &spec.regions {
            incarnations.push(fresh_incarnation()?);
        }
        Ok(Self {
            config: config.clone(),
            options: options.clone(),
            spec: spec.clone(),
            copy,
            incarnations,
            stage: Stage::Filling,
        })
    }

    /// Attaches to a QEMU that an earlier agent made ready.
    ///
    /// # Errors
    /// It is gone, or not in the state that is needed.
    pub async fn reopen(
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
        left: &CopyLeft,
    ) -> Result<Self, GuestError> {
        let process = Watched::find(left.process.clone())?;
        let (copy, stage) = match left.purpose {
            Reopening::Fill => (Copy::refill(config, spec, process).await?, Stage::Filling),
            Reopening::Start => {
                let (copy, runs) = Copy::take_loaded(config, spec, process).await?;
                let stage = if runs { Stage::Started } else { Stage::Loaded };
                (copy, stage)
            }
        };
        Ok(Self {
            config: config.clone(),
            options: options.clone(),
            spec: spec.clone(),
            copy,
            incarnations: left.incarnations.clone(),
            stage,
        })
    }

    /// What the source said of the guest.
    #[must_use]
    pub fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn qmp(&self) -> &Qmp {
        &self.copy.link.qmp
    }

    /// Hands the stream over and waits until QEMU has taken it in.
    async fn load(&mut self, stream: &[u8]) -> Result<(), GuestError> {
        let begun = Instant::now();
        self.stage = Stage::Loaded;
        let qmp = self.copy.link.qmp.clone();
        let uri = json!({ "uri": format!("fd:{}", super::names::INCOMING) });
        let (disks, incoming) = self.copy.split();
        // Sent together: the exports are gone before QEMU looks at the incoming state.
        let taken = async {
            let (closed, taken) =
                tokio::join!(disks.close(&qmp), qmp.execute("migrate-incoming", uri));
            closed.and(taken.map(drop))
        };
        let (taken, sent) = tokio::join!(taken, incoming.send(stream));
        tracing::debug!(elapsed = ?begun.elapsed(), "handed the device state over");
        let paused = match taken {
            Ok(()) => self.wait_until_paused().await,
            Err(error) => Err(self.how_it_ended(error).await),
        };
        // QEMU's own words first: a send that failed says only that it stopped reading.
        paused.and(sent)?;
        tracing::debug!(elapsed = ?begun.elapsed(), bytes = stream.len(), "loaded the device state");
        Ok(())
    }

    async fn wait_until_paused(&self) -> Result<(), GuestError> {
        let begun = Instant::now();
        loop {
            let status = match inventory::status(self.qmp()).await {
                Ok(status) => status,
                Err(error) => return Err(self.how_it_ended(error).await),
            };
            match status.as_str() {
                "paused" => return Ok(()),
                "inmigrate" if begun.elapsed() < LOAD_EAGER => {}
                "inmigrate" if begun.elapsed() < LOAD_LIMIT => tokio::time::sleep(LOAD_POLL).await,
                "inmigrate" => {
                    return Err(GuestError::TimedOut {
                        command: "migrate-incoming".to_owned(),
                        seconds: LOAD_LIMIT.as_secs(),
                    });
                }
                other => {
                    return Err(GuestError::Refused {
                        command: "migrate-incoming".to_owned(),
                        answer: format!("QEMU is in state {other} after the load, not paused"),
                    });
                }
            }
        }
    }

    /// A QEMU that cannot load a state ends itself and says why in its output.
    async fn how_it_ended(&self, error: QmpError) -> GuestError {
        let ended = tokio::time::timeout(Duration::from_secs(5), self.copy.link.ended());
        match ended.await {
            Ok(how) => GuestError::Gone(format!("it did not load the device state: {how}")),
            Err(_) => error.into(),
        }
    }

    /// Whether the guest provably does not run after `cont` failed with `error`.
    async fn classify(&self, error: QmpError) -> StartError {
        match &error {
            QmpError::NotSent { .. } => StartError::NeverRan(error.into()),
            QmpError::Refused { .. } => match inventory::status(self.qmp()).await.as_deref() {
                Ok("paused") => StartError::NeverRan(error.into()),
                Ok(_) | Err(_) => StartError::MayHaveRun(error.into()),
            },
            QmpError::Connect { .. }
            | QmpError::Busy { .. }
            | QmpError::NotQmp { .. }
            | QmpError::Unexpected { .. }
            | QmpError::TimedOut { .. }
            | QmpError::Closed { .. } => StartError::MayHaveRun(error.into()),
        }
    }

    /// The part of `start` behind the permit.
    pub(super) async fn start_permitted(&mut self, to: RunState) -> Result<(), StartError> {
        if self.stage == Stage::Started {
            // By an agent before this one, whose answer was lost with it.
            return Ok(());
        }
        if self.stage != Stage::Loaded {
            return Err(StartError::NeverRan(GuestError::Refused {
                command: "start".to_owned(),
                answer: "no device state was loaded".to_owned(),
            }));
        }
        self.copy.link.check_alive().map_err(StartError::NeverRan)?;
        match to {
            RunState::Running => self.run().await,
            RunState::Paused => {
                self.copy.link.permit();
                let activated = describe::activate_disks(self.qmp()).await;
                activated.map_err(|error| StartError::NeverRan(error.into()))?;
                self.stage = Stage::Started;
                Ok(())
            }
        }
    }

    async fn run(&mut self) -> Result<(), StartError> {
        let begun = Instant::now();
        // Before the command: an event of our own start must not look like somebody else's.
        self.copy.link.permit();
        self.stage = Stage::Started;
        let qmp = self.qmp().clone();
        match qmp.execute_within("cont", json!({}), START_LIMIT).await {
            Ok(_) => {}
            Err(error) => {
                let error = self.classify(error).await;
                if matches!(error, StartError::NeverRan(_)) {
                    self.stage = Stage::Loaded;
                }
                return Err(error);
            }
        }
        tracing::debug!(elapsed = ?begun.elapsed(), "started the guest");
        // Switches learn the new place; the guest runs whether that works or not.
        tokio::spawn(async move {
            let rounds = json!({ "initial": 50, "max": 550, "rounds": 5, "step": 100 });
            if let Err(error) = qmp.execute("announce-self", rounds).await {
                tracing::warn!(%error, "the guest's network addresses were not announced");
            }
        });
        Ok(())
    }
}

fn fresh_incarnation() -> Result<Incarnation, GuestError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| GuestError::Io {
        what: "cannot draw a random number".to_owned(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(Incarnation::from_bytes(bytes))
}

#[async_trait]
impl TargetGuest for QemuTarget {
    fn writer(&self, region: RegionId) -> Option<Arc<dyn RegionWriter>> {
        match self.spec.region(region)?.kind {
            RegionKind::Memory => self.copy.memory.writer(region),
            RegionKind::Disk => Some(self.copy.disk(region)?),
        }
    }

    fn incarnations(&self) -> Vec<Incarnation> {
        self.incarnations.clone()
    }

    fn keep_incarnation(&mut self, region: RegionId, incarnation: Incarnation) {
        if let Some(slot) = self.incarnations.get_mut(usize::from(region.0)) {
            *slot = incarnation;
        }
    }

    async fn flush(&mut self) -> Result<(), GuestError> {
        self.copy.link.check_alive()?;
        self.copy.flush_disks().await
    }

    async fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        if self.stage != Stage::Filling {
            return Err(GuestError::Refused {
                command: "load of the device state".to_owned(),
                answer: "this QEMU is used up: a QEMU takes one load".to_owned(),
            });
        }
        self.copy.link.check_alive()?;
        let stream =
            stream::incoming(state, &self.copy.machine).map_err(|error| GuestError::Refused {
                command: "load of the device state".to_owned(),
                answer: error.to_string(),
            })?;
        let loaded = self.load(&stream).await;
        if loaded.is_err() {
            // Whatever state it is in, it must never run.
            self.copy.link.kill().await?;
            self.stage = Stage::Ended;
        }
        loaded
    }

    async fn start(&mut self, _permit: RunPermit, to: RunState) -> Result<(), StartError> {
        self.start_permitted(to).await
    }

    async fn discard(&mut self) -> Result<(), GuestError> {
        match self.stage {
            Stage::Ended => return Ok(()),
            Stage::Started => {
                return Err(GuestError::Refused {
                    command: "discard".to_owned(),
                    answer: "the guest was started here and may run".to_owned(),
                });
            }
            Stage::Filling if !self.copy.is_launched() => self.copy.leave().await?,
            // A loaded copy is ended whoever started it: nobody must be able to run it.
            Stage::Filling | Stage::Loaded => self.copy.end().await?,
        }
        self.stage = Stage::Ended;
        Ok(())
    }

    async fn renew(&mut self) -> Result<(), GuestError> {
        if self.config.launch.is_none() {
            return Err(GuestError::Incompatible(format!(
                "guest {}: this QEMU is used up by one load, and the guest file has no `launch` to start another; start one with `-incoming defer -S` and migrate again",
                self.spec.name
            )));
        }
        self.discard().await?;
        self.copy = Copy::make(&self.config, &self.spec, &self.options).await?;
        for (region, incarnation) in self.spec.regions.iter().zip(&mut self.incarnations) {
            if region.kind == RegionKind::Memory {
                *incarnation = fresh_incarnation()?;
            }
        }
        self.stage = Stage::Filling;
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.copy.link.life()
    }

    fn process(&self) -> ProcessIdentity {
        self.copy.link.identity()
    }
}
