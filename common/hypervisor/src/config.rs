//! Guest files: what an administrator says of a guest on each host.
//!
//! Owns the two file formats. Unknown keys are refused, so that a typing error is not a silent default.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmferry_proto::ids::GuestName;

/// Guest file at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Name of the guest.
    pub name: GuestName,
    /// Driver of its hypervisor.
    pub driver: DriverKind,
    /// QMP socket (driver `qemu`).
    pub qmp: Option<PathBuf>,
    /// Control socket of the embedded guest (driver `sim`).
    pub socket: Option<PathBuf>,
    /// Disks that are treated otherwise than `copy`.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
    /// Of use to the destination agent only: one file serves both agents of a host.
    #[serde(default)]
    pub from: Vec<String>,
    /// Of use to the destination agent only: one file serves both agents of a host.
    #[serde(default)]
    pub launch: Option<Vec<String>>,
}

/// Guest file at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetConfig {
    /// Name of the guest.
    pub name: GuestName,
    /// Driver of its hypervisor.
    pub driver: DriverKind,
    /// QMP socket (driver `qemu`).
    pub qmp: Option<PathBuf>,
    /// Control socket of the embedded guest (driver `sim`).
    pub socket: Option<PathBuf>,
    /// Identities that may send this guest; none means nobody.
    #[serde(default)]
    pub from: Vec<String>,
    /// Command that starts the waiting hypervisor; without it, it is already there.
    pub launch: Option<Vec<String>>,
    /// Disks that are treated otherwise than `copy`.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskConfig>,
}

/// What is done with a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Node name of the disk.
    pub node: String,
    /// Copied, or reached by both hosts.
    pub mode: DiskMode,
}

/// Copied, or reached by both hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// Copied to the destination's image.
    Copy,
    /// On storage that both hosts reach: not copied, released here before the start there.
    Shared,
}

/// The drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverKind {
    /// QEMU, over QMP and NBD.
    Qemu,
    /// The embedded guest.
    Sim,
}
