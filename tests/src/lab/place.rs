//! A host, as far as the lab plays one: a folder with images, sockets and the console of one guest.
//!
//! Owns QEMU's command line, which is the same at every place but for the paths, and the images. The machine is a q35
//! with virtio devices and TCG: no test may depend on what else the machine can.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use vmferry_judge::content::{Content, Stamp, UNIT};
use vmferry_judge::{BEAT_PORT, CONTROL_PORT};

use super::guest::{Disk, DiskFormat, Inner, MemoryKind, node_name};
use super::qemu::Qemu;

/// What makes the kernel start quickly and say little.
const KERNEL_OPTIONS: &str = "console=ttyS0 quiet loglevel=4 panic=0 tsc=reliable no_timer_check \
    mitigations=off audit=0 nokaslr";
const CONSOLE: &str = "console.log";
/// Words that no console of a healthy guest shows.
const COMPLAINTS: [&str; 7] = [
    "judge: CORRUPT",
    "judge: FAILED",
    "Kernel panic",
    "Oops",
    "BUG: unable",
    "I/O error",
    "general protection",
];
/// Pieces of prefilled content, with holes as large between them.
const PIECE: u64 = 256 << 10;
const SOCKET_LIMIT: Duration = Duration::from_secs(30);

/// How QEMU is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The guest boots.
    Boot,
    /// The guest is there but paused (`-S`).
    BootPaused,
    /// As the destination of a migration, as it should be: `-incoming defer -S`.
    Incoming,
    /// As the destination of a migration, without `-S`.
    IncomingRunning,
}

/// What the images of a place hold at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Images {
    /// What the disks' descriptions say.
    AsDescribed,
    /// Nothing.
    Blank,
    /// Something else, everywhere.
    OldData,
}

/// A host of the guest.
#[derive(Debug, Clone)]
pub struct Place {
    guest: Arc<Inner>,
    folder: PathBuf,
}

impl Place {
    pub(crate) fn create(guest: Arc<Inner>, name: &str, images: Images) -> Result<Self> {
        let folder = guest.folder().join(name);
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let place = Self { guest, folder };
        for index in 0..place.guest.description.disks.len() {
            place.create_image(index, images)?;
        }
        Ok(place)
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// QMP socket for the agent.
    #[must_use]
    pub fn qmp_path(&self) -> PathBuf {
        self.folder.join("qmp")
    }

    /// QMP socket for the test.
    #[must_use]
    pub fn lab_qmp_path(&self) -> PathBuf {
        self.folder.join("qmp-lab")
    }

    /// Image of disk number `index`.
    #[must_use]
    pub fn image(&self, index: usize) -> PathBuf {
        let disk = &self.guest.description.disks[index];
        let folder = if disk.shared {
            self.guest.folder()
        } else {
            &self.folder
        };
        folder.join(format!("{}.{}", node_name(index), disk.format.name()))
    }

    /// What the guest wrote on its serial console here.
    #[must_use]
    pub fn console(&self) -> String {
        fs::read(self.folder.join(CONSOLE))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Starts QEMU here.
    pub fn start(&self, how: Start) -> Result<Qemu> {
        let argv = self.argv(how);
        Qemu::start(&argv, &self.folder, &self.lab_qmp_path())
    }

    /// The QEMU that somebody else started here with [`argv`](Self::argv).
    pub fn adopt(&self) -> Result<Qemu> {
        Qemu::adopt(&self.folder, &self.lab_qmp_path(), SOCKET_LIMIT)
    }

    /// QEMU's command line here, program first.
    #[must_use]
    pub fn argv(&self, how: Start) -> Vec<String> {
        let mut argv = self.machine_arguments();
        argv.extend(self.port_arguments());
        for (index, disk) in self.guest.description.disks.iter().enumerate() {
            argv.extend(self.disk_arguments(index, disk));
        }
        argv.extend(self.guest.description.extra.iter().cloned());
        let how: &[&str] = match how {
            Start::Boot => &[],
            Start::BootPaused => &["-S"],
            Start::Incoming => &["-incoming", "defer", "-S"],
            Start::IncomingRunning => &["-incoming", "defer"],
        };
        argv.extend(how.iter().map(ToString::to_string));
        argv
    }

    fn machine_arguments(&self) -> Vec<String> {
        let guest = &self.guest.description;
        let lab = self.guest.lab();
        let mut argv = vec![lab.qemu().display().to_string()];
        let mut add = |arguments: &[&str]| argv.extend(arguments.iter().map(ToString::to_string));
        add(&["-name", &guest.name, "-uuid", &self.uuid()]);
        add(&["-nodefaults", "-no-user-config", "-display", "none"]);
        add(&["-accel", "tcg", "-cpu", "qemu64"]);
        let (backend, machine) = self.memory_arguments();
        add(&["-machine", &machine]);
        if let Some(backend) = backend {
            add(&["-object", &backend]);
        }
        add(&["-m", &format!("{}M", guest.memory_mib)]);
        add(&["-smp", &guest.vcpus.to_string()]);
        add(&["-kernel", &lab.kernel().display().to_string()]);
        add(&["-initrd", &lab.initramfs().display().to_string()]);
        add(&["-append", &format!("{KERNEL_OPTIONS} {}", guest.judge)]);
        argv
    }

    fn memory_arguments(&self) -> (Option<String>, String) {
        let size = self.guest.description.memory_mib;
        let backend = match self.guest.description.memory {
            MemoryKind::Anonymous => return (None, "q35".into()),
            MemoryKind::SharedFile => {
                let shm = self.guest.shm().unwrap_or(&self.folder);
                let name = self.folder.file_name().unwrap_or_default();
                let file = shm.join(name).display().to_string();
                format!("memory-backend-file,id=ram0,size={size}M,share=on,mem-path={file}")
            }
            MemoryKind::SharedMemfd => {
                format!("memory-backend-memfd,id=ram0,size={size}M,share=on")
            }
        };
        (Some(backend), "q35,memory-backend=ram0".into())
    }

    fn port_arguments(&self) -> Vec<String> {
        let in_folder = |name: &str| self.folder.join(name).display().to_string();
        let port = |name: &str| self.guest.port_path(name).display().to_string();
        let mut argv = Vec::new();
        let mut add = |arguments: &[&str]| argv.extend(arguments.iter().map(ToString::to_string));
        for socket in [self.qmp_path(), self.lab_qmp_path()] {
            add(&[
                "-qmp",
                &format!("unix:{},server=on,wait=off", socket.display()),
            ]);
        }
        let console = in_folder(CONSOLE);
        add(&[
            "-chardev",
            &format!("file,id=console,path={console},append=on"),
        ]);
        add(&["-serial", "chardev:console"]);
        add(&["-device", "virtio-serial-pci,id=ports"]);
        for (id, name) in [("beat", BEAT_PORT), ("control", CONTROL_PORT)] {
            add(&["-chardev", &format!("socket,id={id},path={}", port(id))]);
            add(&[
                "-device",
                &format!("virtserialport,bus=ports.0,chardev={id},name={name}"),
            ]);
        }
        argv
    }

    fn disk_arguments(&self, index: usize, disk: &Disk) -> Vec<String> {
        let (node, format) = (node_name(index), disk.format.name());
        let direct = if disk.direct { "on" } else { "off" };
        let file = self.image(index).display().to_string();
        [
            "-blockdev".into(),
            format!("driver=file,node-name={node}-file,filename={file},cache.direct={direct},discard=unmap"),
            "-blockdev".into(),
            format!("driver={format},node-name={node},file={node}-file,cache.direct={direct},discard=unmap"),
            "-device".into(),
            format!("virtio-blk-pci,id=disk-{node},drive={node}"),
        ]
        .into()
    }

    /// Made from the name: the same at every place.
    fn uuid(&self) -> String {
        let hash = xxhash_rust::xxh3::xxh3_128(self.guest.description.name.as_bytes());
        let hex = format!("{hash:032x}");
        format!(
            "{}-{}-4{}-8{}-{}",
            &hex[..8],
            &hex[8..12],
            &hex[13..16],
            &hex[17..20],
            &hex[20..]
        )
    }

    fn create_image(&self, index: usize, images: Images) -> Result<()> {
        let disk = &self.guest.description.disks[index];
        let path = self.image(index);
        if disk.shared && path.exists() {
            return Ok(());
        }
        let raw = match disk.format {
            DiskFormat::Raw => path.clone(),
            DiskFormat::Qcow2 => self.folder.join(format!("{}.draft", node_name(index))),
        };
        let file = File::create(&raw).with_context(|| raw.display().to_string())?;
        file.set_len(disk.size)?;
        let seed = index as u64;
        match images {
            Images::Blank => {}
            Images::AsDescribed => fill(&file, disk.size, disk.prefilled, PIECE * 2, 1000 + seed)?,
            Images::OldData => fill(&file, disk.size, disk.size, PIECE, 2000 + seed)?,
        }
        if disk.format == DiskFormat::Qcow2 {
            self.qemu_img(&["convert", "-O", "qcow2", &text(&raw), &text(&path)])?;
            fs::remove_file(&raw)?;
        }
        Ok(())
    }

    /// Whether disk number `index` has the same content here and at `other`. Both guests must be stopped or gone.
    pub fn same_disk(&self, other: &Self, index: usize) -> Result<bool> {
        let format = self.guest.description.disks[index].format.name();
        let (one, two) = (text(&self.image(index)), text(&other.image(index)));
        let status = Command::new(self.guest.lab().qemu_img())
            .args(["compare", "-U", "-f", format, "-F", format, &one, &two])
            .status()?;
        match status.code() {
            Some(0) => Ok(true),
            Some(1) => Ok(false),
            Some(_) | None => anyhow::bail!("qemu-img compare {one} {two}: {status}"),
        }
    }

    fn qemu_img(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(self.guest.lab().qemu_img())
            .args(arguments)
            .output()?;
        ensure!(
            output.status.success(),
            "qemu-img {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

/// Writes `bytes` bytes of content in pieces that begin every `step` bytes.
fn fill(file: &File, size: u64, bytes: u64, step: u64, seed: u64) -> Result<()> {
    let mut unit = vec![0; UNIT];
    let mut left = bytes;
    for start in (0..size).step_by(usize::try_from(step)?) {
        let piece = left.min(PIECE).min(size - start);
        for at in (start..start + piece).step_by(UNIT) {
            let stamp = Stamp {
                seed,
                index: at / UNIT as u64,
                version: 0,
            };
            Content::Random.fill(stamp, &mut unit);
            file.write_all_at(&unit, at)?;
        }
        left -= piece;
    }
    Ok(())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// The consoles of all places in `folder`.
pub(crate) fn consoles(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let mut bytes = Vec::new();
        let console = File::open(entry.path().join(CONSOLE));
        if console
            .and_then(|mut file| file.read_to_end(&mut bytes))
            .is_ok()
        {
            let name = entry.file_name();
            all += &format!("--- {}\n", name.to_string_lossy());
            all += &String::from_utf8_lossy(&bytes);
        }
    }
    all
}

/// The lines of a console that must not be there.
pub(crate) fn complaints(console: &str) -> Vec<String> {
    console
        .lines()
        .filter(|line| COMPLAINTS.iter().any(|word| line.contains(word)))
        .map(Into::into)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_found_and_statistics_are_none() {
        let console = "judge: ok, 0 mismatches, 5 beats\n\
            judge: CORRUPT: mem page 3\n\
            [    3.1] Kernel panic - not syncing\n";
        assert_eq!(complaints(console).len(), 2);
    }
}
