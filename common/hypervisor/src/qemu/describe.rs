//! From inventories to the guest's description, and back to what the drivers work with.

use std::path::PathBuf;

use serde_json::json;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::geometry::RegionLen;
use vmferry_proto::ids::{GuestName, RegionId};
use vmferry_proto::spec::{GuestSpec, RegionKind, RegionSpec, RunState};

use super::inventory::{Changing, Disk, Layout, Machine};
use super::preflight;
use super::qmp::{Qmp, QmpError};
use crate::config::{DiskConfig, DiskMode};
use crate::error::GuestError;
use crate::memory::MemoryBlock;
use crate::space::{self, DiskNeed, Needs};

/// One error out of all reasons; none, no error.
pub(super) fn refuse(what: &str, reasons: &[String]) -> Result<(), GuestError> {
    match reasons {
        [] => Ok(()),
        [reason] => Err(GuestError::Incompatible(format!("{what}: {reason}"))),
        many => Err(GuestError::Incompatible(format!(
            "{what}, for {} reasons:\n- {}",
            many.len(),
            many.join("\n- ")
        ))),
    }
}

/// Names of the disks of mode `shared`. Every disk that the guest file names must be there.
pub(super) fn shared_disks(
    configured: &[DiskConfig],
    layout: &Layout,
) -> Result<Vec<String>, GuestError> {
    let mut shared = Vec::new();
    for config in configured {
        let names = |disk: &&Disk| disk.name == config.node || disk.node == config.node;
        let Some(disk) = layout.disks.iter().find(names) else {
            let known: Vec<&str> = layout.disks.iter().map(|disk| disk.name.as_str()).collect();
            return Err(GuestError::Config(format!(
                "the guest file names disk {}, which this QEMU does not have; it has: {}",
                config.node,
                known.join(", ")
            )));
        };
        match config.mode {
            DiskMode::Shared => shared.push(disk.name.clone()),
            DiskMode::Copy => {}
        }
    }
    Ok(shared)
}

/// The guest's description: RAM blocks first, then disks to copy.
pub(super) fn spec(
    name: &GuestName,
    machine: &Machine,
    layout: &Layout,
    run_state: RunState,
    shared: Vec<String>,
) -> GuestSpec {
    let memory = layout
        .ram
        .iter()
        .map(|block| (block.name.clone(), RegionKind::Memory, block.used));
    let disks = layout
        .disks
        .iter()
        .filter(|disk| !disk.read_only && !shared.contains(&disk.name))
        .map(|disk| (disk.name.clone(), RegionKind::Disk, disk.size));
    let regions = (0u16..).zip(memory.chain(disks));
    GuestSpec {
        name: name.clone(),
        uuid: machine.uuid,
        driver: "qemu".to_owned(),
        hypervisor_version: machine.version.to_string(),
        machine: machine.kind.clone(),
        cpu_model: machine.cpu_model.clone(),
        vcpus: machine.vcpus,
        run_state,
        regions: regions
            .map(|(id, (name, kind, len))| RegionSpec {
                id: RegionId(id),
                name,
                kind,
                len: RegionLen(len),
            })
            .collect(),
        devices: preflight::devices(machine, layout, &shared),
        shared_disks: shared,
    }
}

/// Where the memory regions of `spec` are in this QEMU.
pub(super) fn memory(spec: &GuestSpec, layout: &Layout) -> Vec<MemoryBlock> {
    let regions = spec
        .regions
        .iter()
        .filter(|region| region.kind == RegionKind::Memory);
    regions
        .filter_map(|region| {
            let block = layout.ram.iter().find(|block| block.name == region.name)?;
            Some(MemoryBlock {
                region: region.id,
                host_addr: block.host,
                len: region.len.0,
            })
        })
        .collect()
}

/// Region, node name, name and length of the disks of `spec` in this QEMU.
pub(super) fn disks(
    spec: &GuestSpec,
    layout: &Layout,
) -> Vec<(RegionId, String, String, RegionLen)> {
    let regions = spec
        .regions
        .iter()
        .filter(|region| region.kind == RegionKind::Disk);
    regions
        .filter_map(|region| {
            let disk = layout.disks.iter().find(|disk| disk.name == region.name)?;
            Some((region.id, disk.node.clone(), disk.name.clone(), region.len))
        })
        .collect()
}

/// What this host must have for a guest that comes to the waiting QEMU `process`.
pub(super) fn needs(spec: &GuestSpec, layout: &Layout, process: &ProcessIdentity) -> Needs {
    let blocks = layout.ram.iter().filter(|block| !block.huge_pages);
    let disks = disks(spec, layout)
        .into_iter()
        .filter_map(|(_, node, name, len)| {
            let disk = layout.disks.iter().find(|disk| disk.node == node)?;
            Some(DiskNeed {
                // Relative paths are QEMU's.
                image: PathBuf::from(format!("/proc/{}/cwd", process.pid)).join(&disk.image),
                used: space::bytes_in_use(spec, &name).unwrap_or(len.0),
                allocated: disk.allocated,
                name,
            })
        });
    Needs {
        memory: blocks.map(|block| block.used).sum(),
        resident: space::resident_bytes(process.pid).unwrap_or(0),
        disks: disks.collect(),
    }
}

/// What is not as it was when the migration began.
pub(super) fn changes(then: &Changing, now: &Changing) -> Vec<String> {
    let mut out = Vec::new();
    let ram = |layout: &Changing| -> Vec<String> {
        let blocks = layout.ram.iter();
        blocks
            .map(|block| {
                format!(
                    "RAM block {} of {} bytes at {:#x}",
                    block.name, block.used, block.host
                )
            })
            .collect()
    };
    let devices = |layout: &Changing| -> Vec<String> {
        let devices = layout.plugged.iter();
        devices
            .map(|(id, kind)| format!("device {id} ({kind})"))
            .collect()
    };
    let disks = |layout: &Changing| -> Vec<String> {
        let disks = layout.disks.iter();
        disks
            .map(|disk| {
                let mode = if disk.read_only { "read-only " } else { "" };
                format!(
                    "{mode}disk {} (node {}) of {} bytes",
                    disk.name, disk.node, disk.size
                )
            })
            .collect()
    };
    for (then, now) in [
        (ram(then), ram(now)),
        (devices(then), devices(now)),
        (disks(then), disks(now)),
    ] {
        let gone = then.iter().filter(|thing| !now.contains(thing));
        out.extend(gone.map(|thing| format!("{thing} is gone")));
        let new = now.iter().filter(|thing| !then.contains(thing));
        out.extend(new.map(|thing| format!("{thing} is new")));
    }
    out
}

/// Lets a paused guest's images be used again after a device state was saved or loaded (QEMU >= 10.0 has a command for
/// it; older ones keep them in use).
pub(super) async fn activate_disks(qmp: &Qmp) -> Result<(), QmpError> {
    match qmp
        .execute("blockdev-set-active", json!({ "active": true }))
        .await
    {
        Ok(_) => Ok(()),
        Err(QmpError::Refused { class, .. }) if class == "CommandNotFound" => Ok(()),
        Err(error) => Err(error),
    }
}
