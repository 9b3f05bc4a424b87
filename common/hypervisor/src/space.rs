//! Whether this host has the memory and the disk space that an incoming guest will need.
//!
//! Owns the estimates, and the hint by which the source says how much of a disk is in use. They are made before a byte is
//! copied and promise nothing: others use the host too.

use std::fs;
use std::path::{Path, PathBuf};

use vmferry_common::units::Size;
use vmferry_proto::spec::{DeviceSpec, GuestSpec, HINT};

use crate::error::GuestError;

/// What a guest will take of its new host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Memory in ordinary pages. Huge pages were reserved when the hypervisor started.
    pub(crate) memory: u64,
    /// How much of that the waiting hypervisor has already.
    pub(crate) resident: u64,
    /// Its disks to copy.
    pub(crate) disks: Vec<DiskNeed>,
}

/// What one disk will take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskNeed {
    /// Its name.
    pub(crate) name: String,
    /// Its image, as this process finds it.
    pub(crate) image: PathBuf,
    /// Bytes that will be written to it.
    pub(crate) used: u64,
    /// Bytes that it takes up now.
    pub(crate) allocated: u64,
}

/// Says what this host lacks for `needs`.
pub(crate) fn check(needs: &Needs) -> Result<(), GuestError> {
    let memory = available_memory().and_then(|free| memory_lacks(needs, free));
    let disks = needs.disks.iter().filter_map(|disk| {
        // An image that is no file is its own space.
        if !fs::metadata(&disk.image).ok()?.is_file() {
            return None;
        }
        disk_lacks(disk, free_space(&disk.image)?)
    });
    let lacks: Vec<String> = memory.into_iter().chain(disks).collect();
    if lacks.is_empty() {
        return Ok(());
    }
    Err(GuestError::NoSpace(format!(
        "this host has no room for the guest: {}",
        lacks.join("; ")
    )))
}

fn memory_lacks(needs: &Needs, free: u64) -> Option<String> {
    let missing = needs.memory.saturating_sub(needs.resident);
    (missing > free).then(|| {
        format!(
            "its memory needs {} more and {} are available (MemAvailable and free swap): free some",
            Size(missing),
            Size(free)
        )
    })
}

fn disk_lacks(disk: &DiskNeed, free: u64) -> Option<String> {
    let missing = disk.used.saturating_sub(disk.allocated);
    (missing > free).then(|| {
        format!(
            "disk {} needs {} more in {} and its file system has {}: free some, or put the image elsewhere",
            disk.name,
            Size(missing),
            disk.image.display(),
            Size(free)
        )
    })
}

/// The hint that `bytes` of `disk` are in use.
pub(crate) fn in_use_hint(disk: &str, bytes: u64) -> DeviceSpec {
    DeviceSpec {
        path: in_use_path(disk),
        kind: bytes.to_string(),
    }
}

/// How much of `disk` is in use at the source, where it says so; at most its length.
pub(crate) fn bytes_in_use(spec: &GuestSpec, disk: &str) -> Option<u64> {
    let path = in_use_path(disk);
    let hint = spec.devices.iter().find(|device| device.path == path)?;
    let region = spec.regions.iter().find(|region| region.name == disk)?;
    Some(hint.kind.parse::<u64>().ok()?.min(region.len.0))
}

fn in_use_path(disk: &str) -> String {
    format!("{HINT}bytes-in-use/{disk}")
}

/// Memory that process `pid` has.
pub(crate) fn resident_bytes(pid: u32) -> Option<u64> {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
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

/// Free bytes for an unprivileged user on the file system that holds `path`.
fn free_space(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::{DiskNeed, Needs, available_memory, check, kib, memory_lacks, resident_bytes};
    use crate::error::GuestError;

    /// More than any machine has.
    const TOO_MUCH: u64 = 1 << 60;

    fn refusal(needs: &Needs) -> String {
        match check(needs) {
            Err(GuestError::NoSpace(words)) => words,
            other => panic!("not refused for want of space: {other:?}"),
        }
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       100 kB\nMemAvailable:    2048 kB\nSwapFree: 0 kB\n";
        assert_eq!(kib(text, "MemAvailable:"), Some(2 << 20));
        assert_eq!(kib(text, "Nothing:"), None);
        assert!(available_memory().unwrap() > 0);
        assert!(resident_bytes(std::process::id()).unwrap() > 0);
    }

    #[test]
    fn memory_that_this_host_does_not_have_is_named_with_what_it_has() {
        let mut needs = Needs {
            memory: TOO_MUCH,
            resident: TOO_MUCH - (3 << 30),
            ..Needs::default()
        };
        let words = memory_lacks(&needs, 2 << 30).unwrap();
        assert!(
            words.contains("needs 3 GiB more and 2 GiB are available"),
            "{words}"
        );
        assert_eq!(memory_lacks(&needs, 3 << 30), None);
        needs.resident = 0;
        assert!(refusal(&needs).contains("its memory needs"));
    }

    #[test]
    fn an_image_without_room_is_named_and_what_it_has_counts() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let disk = DiskNeed {
            name: "d0".into(),
            image: image.path().to_owned(),
            used: TOO_MUCH,
            allocated: 0,
        };
        let with = |disk: DiskNeed| Needs {
            disks: vec![disk],
            ..Needs::default()
        };
        let words = refusal(&with(disk.clone()));
        let path = image.path().display().to_string();
        assert!(
            words.contains("disk d0 needs 1024 PiB more") && words.contains(&path),
            "{words}"
        );
        let mut had = disk.clone();
        had.allocated = TOO_MUCH;
        check(&with(had)).unwrap();
        let mut device = disk;
        device.image = "/dev/null".into();
        check(&with(device)).unwrap();
    }
}
