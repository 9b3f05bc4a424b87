//! A guest of the lab: what it is made of, where its beats arrive, and what the judge says of it.
//!
//! Owns the guest's description, its temporary folders and the recording; hosts are [`Place`]s. When a guest and its
//! places are dropped, every QEMU that ever beat for it is killed, whoever started it, and every file is removed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;
use vmferry_judge::params::Params;

use super::Lab;
use super::beats::BeatRecorder;
use super::control::Control;
use super::place::{Images, Place, complaints};
use super::turn::Turn;
use crate::harness::leftovers;

/// Time for a boot with filling: an emulated processor on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// Time for looking at all memory and all disks.
const VERIFY_LIMIT: Duration = Duration::from_secs(180);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What the guest's RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// Plain anonymous memory, as without any `-object`.
    Anonymous,
    /// `memory-backend-file` with `share=on`, a file in `/dev/shm`.
    SharedFile,
    /// `memory-backend-memfd` with `share=on`.
    SharedMemfd,
}

/// Format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Plain bytes.
    Raw,
    /// QEMU's own.
    Qcow2,
}

impl DiskFormat {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A disk of the guest. The first one is `vda` in the guest and as node name in QEMU, and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub(crate) format: DiskFormat,
    pub(crate) size: u64,
    pub(crate) direct: bool,
    pub(crate) prefilled: u64,
    pub(crate) shared: bool,
}

impl Disk {
    /// A raw disk; its image is sparse and empty.
    #[must_use]
    pub const fn raw(size: u64) -> Self {
        Self::new(DiskFormat::Raw, size)
    }

    /// A qcow2 disk; its image is empty.
    #[must_use]
    pub const fn qcow2(size: u64) -> Self {
        Self::new(DiskFormat::Qcow2, size)
    }

    const fn new(format: DiskFormat, size: u64) -> Self {
        Self {
            format,
            size,
            direct: false,
            prefilled: 0,
            shared: false,
        }
    }

    /// `cache.direct=on`: QEMU's I/O bypasses the page cache.
    #[must_use]
    pub const fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// One image for all places: storage that every host reaches. The first place makes it.
    #[must_use]
    pub const fn shared(mut self) -> Self {
        self.shared = true;
        self
    }

    /// So many bytes of the image hold something before the guest boots, in pieces with holes between them.
    #[must_use]
    pub const fn prefilled(mut self, bytes: u64) -> Self {
        self.prefilled = bytes;
        self
    }
}

/// Describes a guest; [`build`](Self::build) makes it.
#[derive(Debug, Clone)]
pub struct GuestBuilder {
    lab: &'static Lab,
    pub(crate) name: String,
    pub(crate) memory_mib: u64,
    pub(crate) memory: MemoryKind,
    pub(crate) vcpus: u32,
    pub(crate) disks: Vec<Disk>,
    pub(crate) judge: Params,
    pub(crate) extra: Vec<String>,
}

impl GuestBuilder {
    pub(crate) fn new(lab: &'static Lab, name: &str) -> Self {
        Self {
            lab,
            name: name.into(),
            memory_mib: 256,
            memory: MemoryKind::Anonymous,
            vcpus: 1,
            disks: Vec::new(),
            judge: Params::default(),
            extra: Vec::new(),
        }
    }

    /// RAM in MiB (256). The judge needs 100 MiB beside what it fills.
    #[must_use]
    pub const fn memory_mib(mut self, mib: u64) -> Self {
        self.memory_mib = mib;
        self
    }

    /// What RAM is made of (anonymous).
    #[must_use]
    pub const fn memory(mut self, kind: MemoryKind) -> Self {
        self.memory = kind;
        self
    }

    /// Number of vCPUs (1).
    #[must_use]
    pub const fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// What the judge does; its list of disks is filled in when it is empty.
    #[must_use]
    pub fn judge(mut self, params: Params) -> Self {
        self.judge = params;
        self
    }

    /// Further arguments of QEMU, at every place (`-device`, `nvme,…`).
    #[must_use]
    pub fn extra(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(ToString::to_string));
        self
    }

    /// Makes the guest, when it is its turn: folders and listening ports. Nothing runs yet.
    pub fn build(mut self) -> Result<Guest> {
        if self.judge.disks.is_empty() {
            self.judge.disks = (0..self.disks.len()).map(node_name).collect();
        }
        let turn = Turn::wait()?;
        let folder = leftovers::folder("lab")?;
        let shm = match self.memory {
            MemoryKind::SharedFile => Some(shared_folder(self.memory_mib)?),
            MemoryKind::Anonymous | MemoryKind::SharedMemfd => None,
        };
        let beats = BeatRecorder::listen(&folder.path().join("beat"))?;
        let control = Control::listen(&folder.path().join("control"))?;
        Ok(Guest {
            inner: Arc::new(Inner {
                description: self,
                beats,
                control,
                shm,
                folder,
                _turn: turn,
            }),
        })
    }
}

/// A folder in `/dev/shm` with room for the guest at two places: what is missing there would end QEMU by a signal.
fn shared_folder(memory_mib: u64) -> Result<TempDir> {
    const SHM: &str = "/dev/shm";
    let room = rustix::fs::statvfs(SHM).context(SHM)?;
    let free_mib = (room.f_bavail * room.f_frsize) >> 20;
    let needed = memory_mib * 2;
    ensure!(
        free_mib >= needed,
        "{SHM} has {free_mib} MiB free and the guest needs {needed}: mount -o remount,size=4G {SHM}"
    );
    Ok(TempDir::with_prefix_in("vmferry-lab-", SHM)?)
}

/// Node name in QEMU, and kernel name in the guest, of disk number `index`.
pub(crate) fn node_name(index: usize) -> String {
    let letter = u8::try_from(index % 26).map_or('z', |i| char::from(b'a' + i));
    format!("vd{letter}")
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) description: GuestBuilder,
    pub(crate) beats: BeatRecorder,
    control: Control,
    shm: Option<TempDir>,
    folder: TempDir,
    // Last, so that it is given back when the rest is gone.
    _turn: Turn,
}

impl Inner {
    pub(crate) const fn lab(&self) -> &'static Lab {
        self.description.lab
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Folder for the files of shared memory.
    pub(crate) fn shm(&self) -> Option<&Path> {
        self.shm.as_ref().map(TempDir::path)
    }

    pub(crate) fn port_path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.beats.kill_all();
        if !self.beats.all_ended_within(KILL_LIMIT) {
            eprintln!("a QEMU of guest {} does not die", self.description.name);
        }
    }
}

/// A guest, wherever it runs.
#[derive(Debug, Clone)]
pub struct Guest {
    inner: Arc<Inner>,
}

impl Guest {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.description.name
    }

    /// A host for it, with images as the disks are described.
    pub fn place(&self, name: &str) -> Result<Place> {
        self.place_with(name, Images::AsDescribed)
    }

    /// A host for it, with images of the right sizes that hold `images`.
    pub fn place_with(&self, name: &str, images: Images) -> Result<Place> {
        Place::create(Arc::clone(&self.inner), name, images)
    }

    /// Node names of the disks on shared storage.
    #[must_use]
    pub fn shared_disks(&self) -> Vec<String> {
        let disks = self.inner.description.disks.iter().enumerate();
        disks
            .filter(|(_, disk)| disk.shared)
            .map(|(index, _)| node_name(index))
            .collect()
    }

    /// Its beats.
    #[must_use]
    pub fn beats(&self) -> &BeatRecorder {
        &self.inner.beats
    }

    /// Waits until the judge has filled everything and works.
    pub fn wait_ready(&self) -> Result<()> {
        self.wait_ready_again(1)
    }

    /// Waits until the judge has done so for the `boots`th time.
    pub fn wait_ready_again(&self, boots: usize) -> Result<()> {
        let ready = self.inner.control.wait_said("ready", boots, BOOT_LIMIT);
        ready.with_context(|| format!("consoles:\n{}", self.consoles()))
    }

    /// Waits for `more` beats.
    pub fn wait_for_beats(&self, more: usize) -> Result<()> {
        let came = self.inner.beats.wait_for(more, ANSWER_LIMIT);
        came.with_context(|| format!("consoles:\n{}", self.consoles()))
    }

    /// The judge looks at every page and every block now. An error if one is wrong, or was at any time before.
    pub fn verify_now(&self) -> Result<String> {
        let answer = self.ask_within("verify", VERIFY_LIMIT)?;
        self.check_no_corrupt()?;
        ensure!(answer.starts_with("ok"), "the judge says: {answer}");
        Ok(answer)
    }

    /// Gives the judge in the running QEMU a command and returns its answer (`ok …` or `corrupt …`).
    pub fn ask(&self, command: &str) -> Result<String> {
        self.ask_within(command, ANSWER_LIMIT)
    }

    /// Sets the rate of memory writing, in bytes per second.
    pub fn set_dirty_rate(&self, rate: u64) -> Result<()> {
        self.order(&format!("dirty {rate}"))
    }

    /// Sets the rate of writing to each disk, in bytes per second.
    pub fn set_disk_rate(&self, rate: u64) -> Result<()> {
        self.order(&format!("disk {rate}"))
    }

    /// Has the guest discard so many bytes of each disk, from its start on, and check all of them.
    pub fn discard(&self, bytes: u64) -> Result<()> {
        let answer = self.ask_within(&format!("discard {bytes}"), VERIFY_LIMIT)?;
        ensure!(answer.starts_with("ok"), "the judge says: {answer}");
        Ok(())
    }

    /// Tells the guest to reboot or to power off (`reboot`, `shutdown`), without waiting for an answer.
    pub fn tell(&self, command: &str) -> Result<()> {
        let pid = self.running_pid()?;
        // There is no answer from a guest that is going down: not waiting is the point.
        let _ = self.inner.control.ask(pid, command, Duration::ZERO);
        Ok(())
    }

    /// The QEMU process that runs the guest, by its beats.
    pub fn running_pid(&self) -> Result<u32> {
        self.inner
            .beats
            .running_pid()
            .context("the guest never beat")
    }

    /// An error if the judge, or the guest's kernel, ever complained at any place.
    pub fn check_no_corrupt(&self) -> Result<()> {
        let mut found: Vec<_> = self
            .inner
            .control
            .said()
            .into_iter()
            .filter(|(_, line)| line.starts_with("CORRUPT"))
            .map(|(pid, line)| format!("QEMU {pid}: {line}"))
            .collect();
        found.extend(complaints(&self.consoles()));
        if !found.is_empty() {
            bail!("guest {}:\n{}", self.name(), found.join("\n"));
        }
        Ok(())
    }

    /// As [`check_no_corrupt`](Self::check_no_corrupt), for the end of a test.
    ///
    /// # Panics
    /// If there was a complaint.
    pub fn assert_no_corrupt(&self) {
        if let Err(error) = self.check_no_corrupt() {
            panic!("{error:#}");
        }
    }

    /// The consoles of all places, one behind the other.
    #[must_use]
    pub fn consoles(&self) -> String {
        super::place::consoles(self.inner.folder())
    }

    fn order(&self, command: &str) -> Result<()> {
        let answer = self.ask(command)?;
        ensure!(
            answer == "ok",
            "the judge answers {command:?} with {answer:?}"
        );
        Ok(())
    }

    fn ask_within(&self, command: &str, limit: Duration) -> Result<String> {
        let pid = self.running_pid()?;
        let answer = self.inner.control.ask(pid, command, limit);
        answer.with_context(|| format!("consoles:\n{}", self.consoles()))
    }
}
