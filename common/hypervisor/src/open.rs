//! The table of drivers: from a guest file to a guest behind the traits.
//!
//! Owns nothing but the choice. A new hypervisor is one folder beside this file and one line in each function.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::ids::Incarnation;
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::GuestSpec;

use crate::config::{DriverKind, SourceConfig, TargetConfig};
use crate::error::GuestError;
use crate::guest::{SourceGuest, TargetGuest};
use crate::launch::LaunchJournal;
use crate::qemu::{QemuSource, QemuTarget};
use crate::sim::{SimSource, SimTarget};
use crate::watched::Watched;

/// What a destination driver needs of its agent.
#[derive(Debug, Clone)]
pub struct TargetOptions {
    /// Folder for logs and private sockets of the guest; it exists.
    pub run_dir: PathBuf,
    /// Where a launched process is named before it begins.
    pub journal: Arc<dyn LaunchJournal>,
    /// Memory that a new copy may touch ahead of the data.
    pub populated: Arc<[PopulatedWindows]>,
}

/// What becomes of the tracking that an earlier agent left in the hypervisor. Its exports and descriptors are of no use to
/// anybody else and always go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftovers {
    /// It goes.
    Remove,
    /// It stays, for [`SourceGuest::resume_tracking`].
    KeepTracking,
}

/// Attaches to the running guest that `config` names and describes it. Nothing is done to it but that leftovers go.
pub async fn open_source(config: &SourceConfig) -> Result<Box<dyn SourceGuest>, GuestError> {
    open_source_with(config, Leftovers::Remove).await
}

/// As [`open_source`], with a say in what becomes of the tracking that was left.
pub async fn open_source_with(
    config: &SourceConfig,
    leftovers: Leftovers,
) -> Result<Box<dyn SourceGuest>, GuestError> {
    match config.driver {
        DriverKind::Qemu => Ok(Box::new(QemuSource::attach_with(config, leftovers).await?)),
        DriverKind::Sim => Ok(Box::new(SimSource::attach(config, leftovers).await?)),
    }
}

/// Launches, or attaches to, the waiting copy that `config` names and compares it with `spec`.
pub async fn open_target(
    config: &TargetConfig,
    spec: &GuestSpec,
    options: &TargetOptions,
) -> Result<Box<dyn TargetGuest>, GuestError> {
    match config.driver {
        DriverKind::Qemu => Ok(Box::new(QemuTarget::prepare(config, spec, options).await?)),
        DriverKind::Sim => Ok(Box::new(SimTarget::prepare(config, spec, options).await?)),
    }
}

/// A copy that an earlier agent made in a process which outlived it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyLeft {
    /// The process.
    pub process: ProcessIdentity,
    /// Incarnations of its regions.
    pub incarnations: Vec<Incarnation>,
    /// What it is wanted for.
    pub purpose: Reopening,
}

/// What a copy is attached to again for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reopening {
    /// To go on filling it: no device state was ever given to it.
    Fill,
    /// To start it: its device state is loaded, or it was started already.
    Start,
}

/// Attaches again to the copy that an earlier agent made for `spec`. [`GuestError::Gone`] if its process is not there any more;
/// an error also where it is not in the state that its purpose needs. It is not ended then.
pub async fn reopen_target(
    config: &TargetConfig,
    spec: &GuestSpec,
    options: &TargetOptions,
    left: &CopyLeft,
) -> Result<Box<dyn TargetGuest>, GuestError> {
    match config.driver {
        DriverKind::Qemu => Ok(Box::new(
            QemuTarget::reopen(config, spec, options, left).await?,
        )),
        DriverKind::Sim => Ok(Box::new(
            SimTarget::reopen(config, spec, options, left).await?,
        )),
    }
}

/// The hypervisors of a host, as its agent sees them: the drivers of this table, or whatever stands for them.
#[async_trait]
pub trait Hypervisors: Send + Sync + fmt::Debug {
    /// [`open_source_with`].
    async fn open_source(
        &self,
        config: &SourceConfig,
        leftovers: Leftovers,
    ) -> Result<Box<dyn SourceGuest>, GuestError>;

    /// [`open_target`].
    async fn open_target(
        &self,
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Box<dyn TargetGuest>, GuestError>;

    /// [`reopen_target`]; without it a copy goes with its agent.
    async fn reopen_target(
        &self,
        _config: &TargetConfig,
        _spec: &GuestSpec,
        _options: &TargetOptions,
        left: &CopyLeft,
    ) -> Result<Box<dyn TargetGuest>, GuestError> {
        Err(GuestError::Gone(format!("process {}", left.process.pid)))
    }

    /// Whether a hypervisor's process still runs. What cannot be told counts as running: it is looked at again when
    /// it is to be ended.
    fn is_alive(&self, process: &ProcessIdentity) -> bool;

    /// Ends a hypervisor's process. One that is gone, or whose pid is another process's now, is no error.
    async fn end(&self, process: &ProcessIdentity) -> Result<(), GuestError>;
}

/// The drivers of this table, on the processes of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Drivers;

#[async_trait]
impl Hypervisors for Drivers {
    async fn open_source(
        &self,
        config: &SourceConfig,
        leftovers: Leftovers,
    ) -> Result<Box<dyn SourceGuest>, GuestError> {
        open_source_with(config, leftovers).await
    }

    async fn open_target(
        &self,
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Box<dyn TargetGuest>, GuestError> {
        open_target(config, spec, options).await
    }

    async fn reopen_target(
        &self,
        config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
        left: &CopyLeft,
    ) -> Result<Box<dyn TargetGuest>, GuestError> {
        reopen_target(config, spec, options, left).await
    }

    fn is_alive(&self, process: &ProcessIdentity) -> bool {
        process.is_alive().unwrap_or(true)
    }

    async fn end(&self, process: &ProcessIdentity) -> Result<(), GuestError> {
        match Watched::find(process.clone()) {
            Ok(found) => found.kill().await,
            Err(GuestError::Gone(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
