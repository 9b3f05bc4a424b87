//! A lab of real guests: Linux kernels under QEMU with the judge as init program, and the judge's heartbeat stamped
//! on this host's clock.
//!
//! Owns finding QEMU and a kernel, building the judge and its initramfs, starting guests and waiting destinations,
//! recording beats, and cleaning up. Does not know the agents: whoever moves the guest, the lab only sees which
//! QEMU process beats. Invariant: no QEMU process and no file outlives its [`Guest`], whoever started it.
//!
//! ```text
//! let Some(lab) = Lab::get() else { return };              // says why, and panics where CI=true
//! let guest = lab.guest("g1").memory_mib(512).disk(Disk::raw(128 << 20)).build()?;
//! let alpha = guest.place("alpha")?;                       // a host: folder, images, sockets
//! let source = alpha.start(Start::Boot)?;
//! guest.wait_ready()?;                                     // filled, working
//! …                                                        // move it
//! guest.verify_now()?;                                     // the judge looks at every page and block
//! println!("{}", guest.beats().report(1)?);                // continuous, and the longest gap
//! ```

mod beats;
mod control;
mod guest;
mod initramfs;
mod judge;
mod kernel;
mod place;
mod plant;
mod port;
mod qemu;
mod qmp;
mod turn;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fmt};

use anyhow::{Context, Result, bail};

use crate::skip::skipped;

pub use beats::{BeatFault, BeatRecorder, BeatReport, BeatStream, Gap, StampedBeat};
pub use guest::{Disk, DiskFormat, Guest, GuestBuilder, MemoryKind};
pub use place::{Images, Place, Start};
pub use plant::{find_judged_page, read_memory, write_memory};
pub use qemu::Qemu;
pub use qmp::Qmp;
pub use vmferry_judge::content::{self, Content};
pub use vmferry_judge::params::Params as JudgeParams;

/// Oldest QEMU whose `info ramblock` shows host addresses.
const OLDEST_QEMU: u32 = 8;

/// Everything that a real guest needs, found or built.
#[derive(Debug)]
pub struct Lab {
    qemu: PathBuf,
    qemu_img: PathBuf,
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// What is not there, and what to do.
#[derive(Debug)]
struct Missing(String);

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Lab {
    /// The lab of this process, or `None` with the reason printed: the test is then skipped.
    ///
    /// # Panics
    /// Where `CI=true`: there no test may be skipped. And where the judge does not build.
    pub fn get() -> Option<&'static Self> {
        match Self::find() {
            Ok(lab) => Some(lab),
            Err(missing) => {
                skipped(missing);
                None
            }
        }
    }

    /// The lab of this process, or what is missing and how to get it.
    pub fn find() -> Result<&'static Self, &'static str> {
        static LAB: OnceLock<Result<Lab, Missing>> = OnceLock::new();
        LAB.get_or_init(Self::build)
            .as_ref()
            .map_err(|missing| missing.0.as_str())
    }

    fn build() -> Result<Self, Missing> {
        let qemu = qemu_binary().map_err(|e| Missing(format!("{e:#}")))?;
        let qemu_img = tool("VMFERRY_QEMU_IMG", "qemu-img", "qemu-utils")?;
        let kernel = kernel::find().map_err(|e| Missing(format!("{e:#}")))?;
        // From here on nothing is missing on this machine: what fails now is a fault of this program.
        let initramfs = judge::binary()
            .and_then(|judge| initramfs::build(&judge, &kernel))
            .unwrap_or_else(|error| panic!("the guest's init program cannot be built: {error:#}"));
        Ok(Self {
            qemu,
            qemu_img,
            kernel: kernel.image,
            initramfs,
        })
    }

    /// Begins the description of a guest.
    #[must_use]
    pub fn guest(&'static self, name: &str) -> GuestBuilder {
        GuestBuilder::new(self, name)
    }

    /// The QEMU binary.
    #[must_use]
    pub fn qemu(&self) -> &Path {
        &self.qemu
    }

    /// The `qemu-img` binary.
    #[must_use]
    pub fn qemu_img(&self) -> &Path {
        &self.qemu_img
    }

    pub(crate) fn kernel(&self) -> &Path {
        &self.kernel
    }

    pub(crate) fn initramfs(&self) -> &Path {
        &self.initramfs
    }
}

/// Folder of what the lab builds once: `vmferry-lab` in cargo's target folder.
fn cache() -> PathBuf {
    target_folder().join("vmferry-lab")
}

fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

fn target_folder() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn qemu_binary() -> Result<PathBuf> {
    let advice = "QEMU 8.0 or newer is needed: apt-get install qemu-system-x86 qemu-utils \
                  (Debian 12: with -t bookworm-backports), or name a binary in VMFERRY_QEMU";
    let qemu = env::var_os("VMFERRY_QEMU").map_or("qemu-system-x86_64".into(), PathBuf::from);
    let output = Command::new(&qemu)
        .arg("--version")
        .output()
        .with_context(|| format!("{} cannot be run; {advice}", qemu.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match qemu_major(&text) {
        Some(major) if major >= OLDEST_QEMU => Ok(qemu),
        Some(_) | None => bail!(
            "{} says {:?}; {advice}",
            qemu.display(),
            text.lines().next().unwrap_or("nothing")
        ),
    }
}

fn qemu_major(version: &str) -> Option<u32> {
    let number = version.strip_prefix("QEMU emulator version ")?;
    number.split('.').next()?.parse().ok()
}

fn tool(variable: &str, name: &str, package: &str) -> Result<PathBuf, Missing> {
    let path = env::var_os(variable).map_or(name.into(), PathBuf::from);
    match Command::new(&path).arg("--version").output() {
        Ok(_) => Ok(path),
        Err(error) => Err(Missing(format!(
            "{} cannot be run ({error}): apt-get install {package}, or name a binary in {variable}",
            path.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu_are_read() {
        let text = "QEMU emulator version 10.0.2 (Debian 1:10.0.2)\nCopyright";
        assert_eq!(qemu_major(text), Some(10));
        assert_eq!(qemu_major("QEMU emulator version 7.2.1"), Some(7));
        assert_eq!(qemu_major("qemu: no"), None);
    }
}
