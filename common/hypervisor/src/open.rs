//! The table of drivers: from a guest file to a guest behind the traits.
//!
//! Owns nothing but the choice. A new hypervisor is one folder beside this file and one line in each function.

use std::path::PathBuf;

use vmferry_proto::spec::GuestSpec;

use crate::config::{DriverKind, SourceConfig, TargetConfig};
use crate::error::GuestError;
use crate::guest::{SourceGuest, TargetGuest};
use crate::qemu::{QemuSource, QemuTarget};
use crate::sim::{SimSource, SimTarget};

/// What a destination driver needs of its agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetOptions {
    /// Folder for logs and private sockets of the guest; it exists.
    pub run_dir: PathBuf,
}

/// Attaches to the running guest that `config` names and describes it. Nothing is done to it yet.
pub async fn open_source(config: &SourceConfig) -> Result<Box<dyn SourceGuest>, GuestError> {
    match config.driver {
        DriverKind::Qemu => Ok(Box::new(QemuSource::attach(config).await?)),
        DriverKind::Sim => Ok(Box::new(SimSource::attach(config).await?)),
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
