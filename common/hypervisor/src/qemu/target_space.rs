//! Whether this host has the memory and the disk space that an incoming guest will need.
//!
//! Owns the estimates. They are made before a byte is copied and promise nothing: others use the host too.

use std::fs;
use std::path::PathBuf;

use vmferry_common::process::ProcessIdentity;
use vmferry_proto::spec::{GuestSpec, RegionKind};

use super::describe::free_space;
use super::inventory::{Disk, Layout};
use super::preflight;
use crate::error::GuestError;

/// Checks memory and disk space for `spec` in the QEMU `process` with `layout`.
pub(super) fn check(
    spec: &GuestSpec,
    layout: &Layout,
    process: &ProcessIdentity,
) -> Result<(), GuestError> {
    let mut lacks: Vec<String> = memory(layout, process).into_iter().collect();
    for region in spec
        .regions
        .iter()
        .filter(|region| region.kind == RegionKind::Disk)
    {
        let Some(disk) = layout.disks.iter().find(|disk| disk.name == region.name) else {
            continue;
        };
        let used = preflight::bytes_in_use(spec, &region.name).unwrap_or(region.len.0);
        lacks.extend(disk_space(disk, used, process));
    }
    if lacks.is_empty() {
        return Ok(());
    }
    Err(GuestError::NoSpace(format!(
        "this host has no room for the guest: {}",
        lacks.join("; ")
    )))
}

/// RAM blocks of huge pages were reserved when QEMU started.
fn memory(layout: &Layout, process: &ProcessIdentity) -> Option<String> {
    let blocks = layout.ram.iter().filter(|block| !block.huge_pages);
    let needed: u64 = blocks.map(|block| block.used).sum();
    let resident = resident_bytes(process.pid).unwrap_or(0);
    let free = available_memory()?;
    let missing = needed.saturating_sub(resident);
    (missing > free).then(|| {
        format!(
            "its memory needs {} MiB more and {} MiB are available (MemAvailable and free swap): free some",
            missing >> 20,
            free >> 20
        )
    })
}

fn available_memory() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    Some(kib(&meminfo, "MemAvailable:")? + kib(&meminfo, "SwapFree:").unwrap_or(0))
}

fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

fn resident_bytes(pid: u32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// `used` bytes will be written to an image that holds `allocated` now. An image that is no file is its own space.
fn disk_space(disk: &Disk, used: u64, process: &ProcessIdentity) -> Option<String> {
    // Relative paths are QEMU's.
    let path = PathBuf::from(format!("/proc/{}/cwd", process.pid)).join(&disk.image);
    if !fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let free = free_space(&path)?;
    let missing = used.saturating_sub(disk.allocated);
    (missing > free).then(|| {
        format!(
            "disk {} needs {} MiB more in {} and its file system has {} MiB: free some, or put the image elsewhere",
            disk.name,
            missing >> 20,
            disk.image,
            free >> 20
        )
    })
}

#[cfg(test)]
mod tests {
    use super::{available_memory, kib, resident_bytes};

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemAvailable:    2048 kB\nSwapFree: 0 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(kib(text, "Nothing:"), None);
        assert!(available_memory().unwrap() > 0);
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }
}
