//! What a guest is, as both agents describe it to each other before a byte is copied.
//!
//! Owns the typed description only; a driver fills it in and a driver at the other side compares.

use crate::geometry::RegionLen;
use crate::ids::{GuestName, RegionId};

/// A guest: what must be alike at both sides.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GuestSpec {
    /// Name under which both sides know the guest.
    pub name: GuestName,
    /// UUID of the machine, where it has one.
    pub uuid: Option<[u8; 16]>,
    /// Driver: `qemu` or `sim`.
    pub driver: String,
    /// Version of the hypervisor, for messages: `10.0.2`.
    pub hypervisor_version: String,
    /// Versioned machine type, such as `pc-q35-10.0`.
    pub machine: String,
    /// CPU model, such as `qemu64-x86_64-cpu`.
    pub cpu_model: String,
    /// Number of virtual CPUs.
    pub vcpus: u32,
    /// Whether the guest ran or was paused when the migration began: it arrives the same way.
    pub run_state: RunState,
    /// Everything that is copied: RAM blocks and disks of mode `copy`; ids are the indices.
    pub regions: Vec<RegionSpec>,
    /// Nodes of disks of mode `shared`: not copied, released at the source before the start here.
    pub shared_disks: Vec<String>,
    /// Devices that must be there at both sides, by path and type.
    pub devices: Vec<DeviceSpec>,
}

/// Beginning of the paths of devices that only give a hint, such as how full a disk is: they are not compared.
pub const HINT: &str = "hint/";

impl GuestSpec {
    /// Whether two descriptions, made at different times, are of one guest. Its run state may change, and hints do.
    #[must_use]
    pub fn is_same_guest(&self, other: &Self) -> bool {
        let settled = |spec: &Self| {
            let mut spec = spec.clone();
            spec.run_state = self.run_state;
            spec.devices.retain(|device| !device.path.starts_with(HINT));
            spec
        };
        settled(self) == settled(other)
    }
}

/// Whether the guest's CPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Running.
    Running,
    /// Paused by somebody before the migration.
    Paused,
}

/// A RAM block or a disk.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RegionSpec {
    /// Its id: the index in [`GuestSpec::regions`].
    pub id: RegionId,
    /// Name that is the same at both sides: RAM block name, or node name of the disk.
    pub name: String,
    /// Memory or disk.
    pub kind: RegionKind,
    /// Length in bytes.
    pub len: RegionLen,
}

/// What a region is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionKind {
    /// A RAM block.
    Memory,
    /// A disk.
    Disk,
}

/// A device of the guest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct DeviceSpec {
    /// Where it is: a QOM path or id, the same at both sides.
    pub path: String,
    /// Its type, such as `virtio-blk-pci`.
    pub kind: String,
}

impl GuestSpec {
    /// The region with this id.
    #[must_use]
    pub fn region(&self, id: RegionId) -> Option<&RegionSpec> {
        self.regions.get(usize::from(id.0))
    }

    /// Bytes of all regions of `kind`.
    #[must_use]
    pub fn bytes(&self, kind: RegionKind) -> u64 {
        self.regions
            .iter()
            .filter(|region| region.kind == kind)
            .map(|region| region.len.0)
            .sum()
    }
}
