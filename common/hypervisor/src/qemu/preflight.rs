//! What may not be migrated, and what does not match: pure judgements over inventories.
//!
//! Owns every check before a byte is copied, each with a message that names the thing, both values and what to do.
//! It asks nothing; invariant: an empty list is the only "yes".

use std::collections::BTreeMap;

use vmferry_proto::limits;
use vmferry_proto::spec::{DeviceSpec, GuestSpec, HINT, RegionKind};

use super::inventory::{Layout, Machine, Obstacles};
use super::names;
use crate::space;

/// Block drivers that move data between guest memory and disk past the kernel: dirty-page tracking does not see it.
const DMA_DRIVERS: [&str; 6] = [
    "nvme",
    "nvme-io_uring",
    "io_uring",
    "virtio-blk-vfio-pci",
    "virtio-blk-vhost-user",
    "virtio-blk-vhost-vdpa",
];

/// Beginnings of device types whose memory or state is written by another process or by hardware.
const FOREIGN_DEVICES: [(&str, &str); 6] = [
    (
        "vhost-user",
        "another process writes the guest's memory through a mapping of its own",
    ),
    (
        "vhost-vdpa",
        "hardware writes the guest's memory past the kernel's page tables",
    ),
    (
        "vhost-scsi",
        "its I/O in flight is kept in the kernel, out of QEMU's reach",
    ),
    (
        "vfio",
        "hardware writes the guest's memory past the kernel's page tables",
    ),
    ("x-vfio", "another process writes the guest's memory"),
    (
        "ivshmem",
        "other processes write its memory through mappings of their own",
    ),
];

/// Why the guest cannot leave, as found at the source.
pub(super) fn source(machine: &Machine, layout: &Layout, obstacles: &Obstacles) -> Vec<String> {
    let mut out = Vec::new();
    version(machine, &mut out);
    run_state(&obstacles.status, &mut out);
    migration(obstacles, &mut out);
    for device in &layout.devices {
        foreign(&device.kind, &format!("device {}", device.path), &mut out);
    }
    for (id, kind) in &machine.objects {
        let found = FOREIGN_DEVICES.iter().find(|(name, _)| kind.contains(name));
        if let Some((_, why)) = found {
            out.push(format!(
                "object {id} is a {kind}: {why}, which dirty-page tracking cannot see; remove it"
            ));
        }
    }
    for kind in ["vhost-user", "vhost-vdpa"] {
        let backend = format!("type={kind}");
        for line in machine
            .network
            .lines()
            .filter(|line| line.contains(&backend))
        {
            let name = line
                .trim_matches([' ', '\\', '\r'])
                .split(':')
                .next()
                .unwrap_or("?");
            foreign(kind, &format!("network back end {name}"), &mut out);
        }
    }
    block(layout, obstacles, &mut out);
    out
}

fn version(machine: &Machine, out: &mut Vec<String>) {
    if machine.version.major < 8 {
        out.push(format!(
            "QEMU is {}: vmferry needs 8.0 or newer, which shows where the guest's memory is",
            machine.version
        ));
    }
}

fn run_state(status: &str, out: &mut Vec<String>) {
    let why = match status {
        "running" | "paused" => return,
        "inmigrate" => "it waits for an incoming migration",
        "prelaunch" => "it was never started; start it with `cont`, or boot it at the destination",
        "shutdown" => "it is shut down; boot it at the destination",
        "suspended" => "it sleeps (S3); wake it first",
        "io-error" => "a disk failed; repair it and continue the guest first",
        "postmigrate" => "it was migrated away already",
        "guest-panicked" | "internal-error" => "it crashed; reset it first",
        _ => "only a running or paused guest can be migrated",
    };
    out.push(format!("the guest is in state {status}: {why}"));
}

fn migration(obstacles: &Obstacles, out: &mut Vec<String>) {
    for reason in &obstacles.blocked {
        out.push(format!(
            "QEMU says that the guest cannot be migrated: {}; remove what it names",
            reason.trim_end_matches('.')
        ));
    }
    let status = obstacles.migration.as_deref().unwrap_or("none");
    if !matches!(status, "none" | "completed" | "failed" | "cancelled") {
        out.push(format!(
            "QEMU is carrying out a migration of its own ({status}); end it with `migrate_cancel` or wait for it"
        ));
    }
}

fn foreign(kind: &str, what: &str, out: &mut Vec<String>) {
    let found = FOREIGN_DEVICES
        .iter()
        .find(|(begin, _)| kind.starts_with(begin));
    if let Some((_, why)) = found {
        out.push(format!(
            "{what} is a {kind}: {why}, which dirty-page tracking cannot see; unplug it"
        ));
    }
}

fn block(layout: &Layout, obstacles: &Obstacles, out: &mut Vec<String>) {
    for node in &layout.nodes {
        if DMA_DRIVERS.contains(&node.driver.as_str()) {
            out.push(format!(
                "block node {} uses driver {}: it writes guest memory past the kernel, which dirty-page tracking cannot see; use host_device or file",
                node.name, node.driver
            ));
        }
    }
    for export in obstacles
        .exports
        .iter()
        .filter(|export| !names::is_ours(&export.id))
    {
        out.push(format!(
            "block export {} ({}) is in use; another program serves this guest's disks (a backup, a mirror): wait for it or `block-export-del` it",
            export.id, export.kind
        ));
    }
    for job in &obstacles.jobs {
        out.push(format!(
            "block job {job} is running; wait for it or cancel it"
        ));
    }
    let mut seen = BTreeMap::new();
    for disk in &layout.disks {
        if let Some(other) = seen.insert(&disk.name, &disk.node) {
            out.push(format!(
                "block nodes {other} and {} go by the same name {}; give each disk a node-name",
                disk.node, disk.name
            ));
        }
        if disk.size == 0 {
            out.push(format!("disk {} has no size; eject it", disk.name));
        }
    }
}

/// What must be alike at both sides besides RAM blocks and disks to copy: CPU features, devices, other disks.
pub(super) fn devices(machine: &Machine, layout: &Layout, shared: &[String]) -> Vec<DeviceSpec> {
    let mut devices = layout.devices.clone();
    devices.extend(
        machine
            .cpu_features
            .iter()
            .map(|(place, value)| DeviceSpec {
                path: format!("cpu/feature-word/{place}"),
                kind: value.clone(),
            }),
    );
    for disk in &layout.disks {
        if !disk.read_only && !shared.contains(&disk.name) && disk.allocated > 0 {
            devices.push(space::in_use_hint(&disk.name, disk.allocated));
        }
        let mode = if shared.contains(&disk.name) {
            "shared"
        } else if disk.read_only {
            "read-only"
        } else {
            continue;
        };
        devices.push(DeviceSpec {
            path: format!("disk/{}", disk.name),
            kind: format!("{mode}, {} bytes", disk.size),
        });
    }
    devices.sort();
    devices
}

/// Why `spec` cannot be received here: every difference, with both values.
pub(super) fn mismatches(
    spec: &GuestSpec,
    machine: &Machine,
    layout: &Layout,
    shared: &[String],
) -> Vec<String> {
    let mut out = Vec::new();
    version(machine, &mut out);
    let mut unlike = |what: &str, there: &str, here: &str, cure: &str| {
        if there != here {
            out.push(format!(
                "{what} is {there} at the source and {here} here: {cure}"
            ));
        }
    };
    let vcpus = (spec.vcpus.to_string(), machine.vcpus.to_string());
    unlike(
        "the driver",
        &spec.driver,
        "qemu",
        "both guest files must name the same driver",
    );
    unlike(
        "the machine type",
        &spec.machine,
        &machine.kind,
        "start this QEMU with the same versioned `-machine`",
    );
    unlike(
        "the CPU model",
        &spec.cpu_model,
        &machine.cpu_model,
        "start this QEMU with the same `-cpu`",
    );
    unlike(
        "the number of virtual CPUs",
        &vcpus.0,
        &vcpus.1,
        "start this QEMU with the same `-smp`",
    );
    let uuid = (uuid(spec.uuid), uuid(machine.uuid));
    unlike(
        "the UUID",
        &uuid.0,
        &uuid.1,
        "start this QEMU with the same `-uuid`",
    );
    older(spec, machine, &mut out);
    regions(spec, layout, shared, &mut out);
    unlike_devices(&spec.devices, &devices(machine, layout, shared), &mut out);
    out
}

fn uuid(uuid: Option<[u8; 16]>) -> String {
    uuid.map_or_else(
        || "none".to_owned(),
        |bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
    )
}

/// QEMU promises to load the state of an older one with the same machine type, not of a newer one.
fn older(spec: &GuestSpec, machine: &Machine, out: &mut Vec<String>) {
    let mut numbers = spec.hypervisor_version.split('.').map(str::parse::<u64>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        out.push(format!(
            "the source names its QEMU {:?}, which is no version",
            spec.hypervisor_version
        ));
        return;
    };
    if (major, minor) > (machine.version.major, machine.version.minor) {
        out.push(format!(
            "QEMU is {} at the source and {} here: an older QEMU cannot load a newer one's state; upgrade this host",
            spec.hypervisor_version, machine.version
        ));
    }
}

fn regions(spec: &GuestSpec, layout: &Layout, shared: &[String], out: &mut Vec<String>) {
    let here = |kind| -> BTreeMap<&str, u64> {
        match kind {
            RegionKind::Memory => layout
                .ram
                .iter()
                .map(|block| (block.name.as_str(), block.used))
                .collect(),
            RegionKind::Disk => layout
                .disks
                .iter()
                .filter(|disk| !disk.read_only && !shared.contains(&disk.name))
                .map(|disk| (disk.name.as_str(), disk.size))
                .collect(),
        }
    };
    for (kind, word, cure) in [
        (
            RegionKind::Memory,
            "RAM block",
            "start this QEMU with the same memory and devices",
        ),
        (
            RegionKind::Disk,
            "disk",
            "attach a disk of that node name and size, such as one made by `qemu-img create`",
        ),
    ] {
        let mut here = here(kind);
        for region in spec.regions.iter().filter(|region| region.kind == kind) {
            match here.remove(region.name.as_str()) {
                Some(size) if size == region.len.0 => {}
                Some(size) => out.push(format!(
                    "{word} {} is {} bytes at the source and {size} here: {cure}",
                    region.name, region.len.0
                )),
                None => out.push(format!(
                    "{word} {} of {} bytes is missing here: {cure}",
                    region.name, region.len.0
                )),
            }
        }
        for (name, size) in here {
            out.push(format!(
                "{word} {name} of {size} bytes is here but not at the source: remove it here"
            ));
        }
    }
}

fn unlike_devices(there: &[DeviceSpec], here: &[DeviceSpec], out: &mut Vec<String>) {
    let is_hint = |device: &&DeviceSpec| device.path.starts_with(HINT);
    let mut left: BTreeMap<&str, &str> = here
        .iter()
        .filter(|device| !is_hint(device))
        .map(|device| (device.path.as_str(), device.kind.as_str()))
        .collect();
    for device in there.iter().filter(|device| !is_hint(device)) {
        match left.remove(device.path.as_str()) {
            Some(kind) if kind == device.kind => {}
            Some(kind) => out.push(format!(
                "{} is {} at the source and {kind} here: {}",
                device.path,
                device.kind,
                cure(&device.path)
            )),
            None => out.push(format!(
                "{} ({}) is missing here: {}",
                device.path,
                device.kind,
                cure(&device.path)
            )),
        }
    }
    for (path, kind) in left {
        out.push(format!(
            "{path} ({kind}) is here but not at the source: {}",
            cure(path)
        ));
    }
}

fn cure(path: &str) -> &'static str {
    if path.starts_with("cpu/") {
        "start this QEMU with the same `-cpu`, flags included, on a host that has them"
    } else if path.starts_with("disk/") {
        "attach the same image, and give it the same mode in both guest files"
    } else {
        "start this QEMU with the same devices in the same places"
    }
}

/// Why the guest is larger than the protocol carries.
pub(super) fn too_large(spec: &GuestSpec) -> Vec<String> {
    let mut out = Vec::new();
    if spec.regions.len() > limits::MAX_REGIONS {
        out.push(format!(
            "the guest has {} RAM blocks and disks; at most {} can be migrated",
            spec.regions.len(),
            limits::MAX_REGIONS
        ));
    }
    if spec.devices.len() > limits::MAX_DEVICES {
        out.push(format!(
            "the guest has {} devices; at most {} can be migrated",
            spec.devices.len(),
            limits::MAX_DEVICES
        ));
    }
    let names = spec.regions.iter().map(|region| &region.name);
    let paths = spec
        .devices
        .iter()
        .flat_map(|device| [&device.path, &device.kind]);
    for name in names
        .chain(paths)
        .filter(|name| name.len() > limits::MAX_NAME)
    {
        out.push(format!(
            "the name {name} is longer than {} bytes",
            limits::MAX_NAME
        ));
    }
    for region in spec
        .regions
        .iter()
        .filter(|region| region.len.0 > limits::MAX_REGION_LEN)
    {
        out.push(format!(
            "{} is larger than {} TiB",
            region.name,
            limits::MAX_REGION_LEN >> 40
        ));
    }
    out
}

#[cfg(test)]
mod tests;
