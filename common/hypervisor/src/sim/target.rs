//! An embedded guest that waits for its content, launched by the agent or found waiting.
//!
//! Owns its life until the start. It never runs before `start`: the guest itself refuses `cont` before a state was
//! loaded, and stands still after that.

use std::path::{Path, PathBuf};
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

use super::client::{Client, LifeWatch};
use super::describe::{self, State, Status};
use super::disk::DiskFile;
use crate::config::TargetConfig;
use crate::error::GuestError;
use crate::guest::{GuestLife, RegionWriter, StartError, TargetGuest};
use crate::launch;
use crate::memory::ProcessMemory;
use crate::open::{CopyLeft, Reopening, TargetOptions};
use crate::space;
use crate::watched::Watched;

/// How long a launched guest may take until it listens.
const LAUNCH_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks whether it does.
const LAUNCH_POLL: Duration = Duration::from_millis(5);

/// The region that is the disk.
const DISK: RegionId = RegionId(1);

/// A waiting embedded guest.
#[derive(Debug)]
pub struct SimTarget {
    config: TargetConfig,
    spec: GuestSpec,
    options: TargetOptions,
    socket: PathBuf,
    incarnations: Vec<Incarnation>,
    copy: Copy,
    /// An earlier agent started it.
    started: bool,
    ended: bool,
}

/// One life of the guest's process.
#[derive(Debug)]
struct Copy {
    client: Client,
    life: LifeWatch,
    process: Watched,
    memory: ProcessMemory,
    disk: Option<Arc<DiskFile>>,
}

impl SimTarget {
    /// Launches the guest of `config`, or attaches to it, and compares it with `spec`.
    pub async fn prepare(
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Self, GuestError> {
        let socket = config.socket.clone().ok_or_else(|| {
            GuestError::Config(format!(
                "guest {}: driver \"sim\" needs `socket = \"PATH\"`",
                config.name
            ))
        })?;
        let copy = Copy::make(config, spec, &socket, options).await?;
        let incarnations = spec.regions.iter().map(|_| fresh_incarnation());
        Ok(Self {
            incarnations: incarnations.collect::<Result<_, _>>()?,
            config: config.clone(),
            spec: spec.clone(),
            options: options.clone(),
            socket,
            copy,
            started: false,
            ended: false,
        })
    }

    /// Attaches to a guest that an earlier agent prepared.
    pub async fn reopen(
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
        left: &CopyLeft,
    ) -> Result<Self, GuestError> {
        let process = Watched::find(left.process.clone())?;
        let socket = config.socket.clone().unwrap_or_default();
        let states: &[State] = match left.purpose {
            Reopening::Fill => &[State::Incoming],
            Reopening::Start => &[State::Paused, State::Running],
        };
        let (copy, state) = Copy::attach_in(config, spec, &socket, states).await?;
        if copy.process.identity() != process.identity() {
            return Err(GuestError::Gone(format!(
                "process {}: another one answers on {}",
                left.process.pid,
                socket.display()
            )));
        }
        Ok(Self {
            incarnations: left.incarnations.clone(),
            config: config.clone(),
            spec: spec.clone(),
            options: options.clone(),
            socket,
            copy,
            started: state == State::Running,
            ended: false,
        })
    }

    /// Removes what a launched guest leaves behind.
    fn remove_files(&self) {
        if self.config.launch.is_none() {
            return;
        }
        for path in [&self.socket, &log_of(&self.config, &self.options)] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "a file of the discarded guest is left");
                }
                Ok(()) | Err(_) => {}
            }
        }
    }
}

fn log_of(config: &TargetConfig, options: &TargetOptions) -> PathBuf {
    options.run_dir.join(format!("{}.log", config.name))
}

impl Copy {
    /// A new copy, whose memory is touched ahead of the data.
    async fn make(
        config: &TargetConfig,
        spec: &GuestSpec,
        socket: &Path,
        options: &TargetOptions,
    ) -> Result<Self, GuestError> {
        let copy = Self::launch_or_attach(config, spec, socket, options).await?;
        copy.memory.touch_ahead(&options.populated);
        Ok(copy)
    }

    async fn launch_or_attach(
        config: &TargetConfig,
        spec: &GuestSpec,
        socket: &Path,
        options: &TargetOptions,
    ) -> Result<Self, GuestError> {
        let Some(argv) = &config.launch else {
            return Self::attach(config, spec, socket).await;
        };
        let log = log_of(config, options);
        let launched = launch::launch(argv, &log, &*options.journal).await?;
        let made = match until_it_listens(&launched, socket).await {
            Ok(()) => Self::attach(config, spec, socket).await,
            Err(error) => Err(error),
        };
        match made {
            Ok(copy) if copy.process.identity() == launched.identity() => Ok(Self {
                process: launched,
                ..copy
            }),
            // The journal names the launched process, so no other one may hold the copy.
            Ok(copy) => {
                let other = copy.process.identity().pid;
                end(&launched).await;
                Err(GuestError::Config(format!(
                    "guest file of {}: `launch` started {}, but the guest is process {other}: let the command become the guest (`exec`)",
                    config.name,
                    launched.identity()
                )))
            }
            Err(error) => {
                end(&launched).await;
                Err(error)
            }
        }
    }

    async fn attach(
        config: &TargetConfig,
        spec: &GuestSpec,
        socket: &Path,
    ) -> Result<Self, GuestError> {
        let (copy, _) = Self::attach_in(config, spec, socket, &[State::Incoming]).await?;
        Ok(copy)
    }

    /// Attaches to a guest that is in one of `states`.
    async fn attach_in(
        config: &TargetConfig,
        spec: &GuestSpec,
        socket: &Path,
        states: &[State],
    ) -> Result<(Self, State), GuestError> {
        let mut client = Client::connect(socket).await?;
        let (found, identity) = describe::ask(&mut client).await?;
        let mode = describe::disk_mode(&config.disks)?;
        let mut problems = describe::differences(spec, &describe::spec(&config.name, &found, mode));
        if !states.contains(&found.state) {
            problems.push(match states {
                [State::Incoming] => {
                    "it does not wait for content (start it with --incoming)".to_owned()
                }
                _ => format!("it is {:?}", found.state),
            });
        }
        if !problems.is_empty() {
            return Err(GuestError::Incompatible(format!(
                "guest {} cannot be taken by {}: {}",
                spec.name,
                socket.display(),
                problems.join("; ")
            )));
        }
        space::check(&describe::needs(spec, &found))?;
        let copied = spec
            .regions
            .iter()
            .any(|region| region.kind == RegionKind::Disk);
        let disk = match &found.disk {
            Some(path) if copied => Some(Arc::new(DiskFile::open(path, found.disk_len, true)?)),
            Some(_) | None => None,
        };
        let copy = Self {
            life: LifeWatch::start(socket).await?,
            memory: describe::memory(&found, &identity)?,
            process: Watched::find(identity)?,
            client,
            disk,
        };
        Ok((copy, found.state))
    }
}

async fn end(launched: &Watched) {
    if let Err(left) = launched.kill().await {
        tracing::warn!(%left, "the launched guest is left");
    }
}

async fn until_it_listens(launched: &Watched, socket: &Path) -> Result<(), GuestError> {
    let deadline = Instant::now() + LAUNCH_LIMIT;
    loop {
        match Client::connect(socket).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
        }
        tokio::select! {
            how = launched.ended() => return Err(GuestError::Gone(how)),
            () = tokio::time::sleep(LAUNCH_POLL) => {}
        }
    }
}

fn fresh_incarnation() -> Result<Incarnation, GuestError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| GuestError::Io {
        what: "cannot draw random bytes".to_owned(),
        source: std::io::Error::other(error.to_string()),
    })?;
    Ok(Incarnation::from_bytes(bytes))
}

#[async_trait]
impl TargetGuest for SimTarget {
    fn writer(&self, region: RegionId) -> Option<Arc<dyn RegionWriter>> {
        match &self.copy.disk {
            Some(disk) if region == DISK => Some(Arc::clone(disk) as Arc<dyn RegionWriter>),
            Some(_) | None => self.copy.memory.writer(region),
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
        match &self.copy.disk {
            Some(disk) => disk.flush().await,
            None => Ok(()),
        }
    }

    async fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let text = std::str::from_utf8(state).map_err(|_| GuestError::Refused {
            command: "load-state".to_owned(),
            answer: "the state is not one of an embedded guest".to_owned(),
        })?;
        let arguments = json!({ "state": text });
        let status: Status = self.copy.client.ask("load-state", Some(arguments)).await?;
        if status.state == State::Paused {
            return Ok(());
        }
        self.copy.process.kill().await?;
        Err(GuestError::Refused {
            command: "load-state".to_owned(),
            answer: format!(
                "the guest is {:?} after it, not paused, and was ended",
                status.state
            ),
        })
    }

    async fn start(&mut self, _permit: RunPermit, to: RunState) -> Result<(), StartError> {
        if to == RunState::Paused || self.started {
            return Ok(());
        }
        let client = &mut self.copy.client;
        let sent = client.send("cont", None).await;
        sent.map_err(StartError::NeverRan)?;
        match client.answer("cont").await {
            Ok(_) => Ok(()),
            Err(error @ GuestError::Refused { .. }) => Err(StartError::NeverRan(error)),
            Err(error) => Err(StartError::MayHaveRun(error)),
        }
    }

    async fn discard(&mut self) -> Result<(), GuestError> {
        if !self.ended {
            self.copy.process.kill().await?;
            self.ended = true;
        }
        self.remove_files();
        Ok(())
    }

    async fn renew(&mut self) -> Result<(), GuestError> {
        if self.config.launch.is_none() {
            return Err(GuestError::Refused {
                command: "a fresh copy".to_owned(),
                answer: format!(
                    "guest {} has no `launch` in its guest file: start it again with --incoming, and migrate again",
                    self.config.name
                ),
            });
        }
        self.copy.process.kill().await?;
        self.copy = Copy::make(&self.config, &self.spec, &self.socket, &self.options).await?;
        self.ended = false;
        for (region, incarnation) in self.spec.regions.iter().zip(&mut self.incarnations) {
            if region.kind == RegionKind::Memory {
                *incarnation = fresh_incarnation()?;
            }
        }
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.copy.life.receiver()
    }

    fn process(&self) -> ProcessIdentity {
        self.copy.process.identity().clone()
    }
}
