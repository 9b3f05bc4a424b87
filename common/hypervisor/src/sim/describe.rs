//! What an embedded guest says of itself, and the comparison of two of them.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vmferry_common::process::ProcessIdentity;
use vmferry_common::units::Size;
use vmferry_proto::geometry::RegionLen;
use vmferry_proto::ids::{GuestName, RegionId};
use vmferry_proto::spec::{GuestSpec, RegionKind, RegionSpec, RunState};

use super::client::Client;
use crate::config::{DiskConfig, DiskMode};
use crate::error::GuestError;
use crate::memory::{MemoryBlock, ProcessMemory};
use crate::space::{self, DiskNeed, Needs};

/// Name of the one RAM block.
pub(super) const RAM: &str = "ram";
/// Name of the one disk.
pub(super) const DISK: &str = "disk0";

/// Answer to `describe`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Description {
    pub(super) pid: u32,
    pub(super) version: String,
    pub(super) ram_address: u64,
    pub(super) ram_len: u64,
    pub(super) disk: Option<PathBuf>,
    pub(super) disk_len: u64,
    pub(super) state: State,
}

/// Answer to `status` and to the commands that change the state, as far as the driver needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) struct Status {
    pub(super) state: State,
    pub(super) was_running: bool,
    pub(super) starts: u64,
}

/// Whether it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum State {
    /// Waits for content.
    Incoming,
    /// Stands still.
    Paused,
    /// Runs.
    Running,
}

/// Asks the guest and identifies its process.
pub(super) async fn ask(client: &mut Client) -> Result<(Description, ProcessIdentity), GuestError> {
    let found: Description = client.ask("describe", None).await?;
    let pid = client.peer_pid()?;
    if pid != found.pid {
        return Err(GuestError::Refused {
            command: "describe".to_owned(),
            answer: format!(
                "the guest says it is process {} and the socket belongs to {pid}: is it in another pid namespace?",
                found.pid
            ),
        });
    }
    let identity = crate::watched::identify(pid)?;
    Ok((found, identity))
}

/// Whether `disks` says that the disk is shared.
pub(super) fn disk_mode(disks: &[DiskConfig]) -> Result<DiskMode, GuestError> {
    if let Some(unknown) = disks.iter().find(|disk| disk.node != DISK) {
        return Err(GuestError::Config(format!(
            "disk {:?} is not a disk of this guest: its only one is {DISK:?}",
            unknown.node
        )));
    }
    Ok(disks.first().map_or(DiskMode::Copy, |disk| disk.mode))
}

/// The guest as the engine sees it.
pub(super) fn spec(name: &GuestName, found: &Description, mode: DiskMode) -> GuestSpec {
    let mut regions = vec![RegionSpec {
        id: RegionId(0),
        name: RAM.to_owned(),
        kind: RegionKind::Memory,
        len: RegionLen(found.ram_len),
    }];
    let mut shared_disks = Vec::new();
    let mut devices = Vec::new();
    match (&found.disk, mode) {
        (None, _) => {}
        (Some(_), DiskMode::Shared) => shared_disks.push(DISK.to_owned()),
        (Some(path), DiskMode::Copy) => {
            regions.push(RegionSpec {
                id: RegionId(1),
                name: DISK.to_owned(),
                kind: RegionKind::Disk,
                len: RegionLen(found.disk_len),
            });
            devices.extend(allocated(path).map(|bytes| space::in_use_hint(DISK, bytes)));
        }
    }
    GuestSpec {
        name: name.clone(),
        uuid: None,
        driver: "sim".to_owned(),
        hypervisor_version: found.version.clone(),
        machine: "sim".to_owned(),
        cpu_model: "sim".to_owned(),
        vcpus: 1,
        run_state: match found.state {
            State::Running => RunState::Running,
            State::Paused | State::Incoming => RunState::Paused,
        },
        regions,
        shared_disks,
        devices,
    }
}

/// What this host must have for a guest that comes to the waiting one of `found`. Its memory is left out: such a guest is made large
/// and mostly never written to, so its size says nothing.
pub(super) fn needs(spec: &GuestSpec, found: &Description) -> Needs {
    let copied = spec.regions.iter().find(|region| region.name == DISK);
    let disk = found
        .disk
        .as_ref()
        .zip(copied)
        .map(|(path, region)| DiskNeed {
            name: DISK.to_owned(),
            image: path.clone(),
            used: space::bytes_in_use(spec, DISK).unwrap_or(region.len.0),
            allocated: allocated(path).unwrap_or(0),
        });
    Needs {
        disks: disk.into_iter().collect(),
        ..Needs::default()
    }
}

/// Bytes that an image takes up.
fn allocated(path: &Path) -> Option<u64> {
    Some(std::fs::metadata(path).ok()?.blocks() * 512)
}

/// Every difference that keeps `ours` from taking what `theirs` says, or nothing.
pub(super) fn differences(theirs: &GuestSpec, ours: &GuestSpec) -> Vec<String> {
    let mut found = Vec::new();
    if theirs.driver != ours.driver {
        found.push(format!(
            "the guest is one of driver {} at the source and of driver {} at the destination",
            theirs.driver, ours.driver
        ));
    }
    for region in &theirs.regions {
        match ours.regions.iter().find(|other| other.name == region.name) {
            None => found.push(format!("{} is missing at the destination", region.name)),
            Some(other)
                if (other.len, other.kind, other.id) != (region.len, region.kind, region.id) =>
            {
                found.push(format!(
                    "{} is {} at the source and {} at the destination: make it the same",
                    region.name,
                    exact(region.len.0),
                    exact(other.len.0)
                ));
            }
            Some(_) => {}
        }
    }
    for region in &ours.regions {
        if !theirs.regions.iter().any(|other| other.name == region.name) {
            found.push(format!("{} is only at the destination", region.name));
        }
    }
    if theirs.shared_disks != ours.shared_disks {
        found.push(format!(
            "shared disks are {:?} at the source and {:?} at the destination",
            theirs.shared_disks, ours.shared_disks
        ));
    }
    found
}

/// A length for a person, and to the byte: two that differ must not look alike.
fn exact(len: u64) -> String {
    format!("{} ({len} bytes)", Size(len))
}

/// The guest's RAM, from outside.
pub(super) fn memory(
    found: &Description,
    process: &ProcessIdentity,
) -> Result<ProcessMemory, GuestError> {
    let block = MemoryBlock {
        region: RegionId(0),
        host_addr: found.ram_address,
        len: found.ram_len,
    };
    ProcessMemory::attach(process, vec![block])
}
