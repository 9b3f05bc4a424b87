//! What the driver's tests share: a real QEMU whose guest is a boot sector that writes memory and disks.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::qmp::Qmp;

/// Tells why a test is skipped; in CI that is a failure.
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "skipped in CI: {why}"
    );
    println!("skipped: {why}");
}

/// Counts at 0x8000 and writes the counter's sector to sectors 64 to 127 of the first two disks, for ever:
///
/// ```text
/// cli; ax = ds = es = ss = 0; sp = 0x7c00; sti
/// again: inc dword [0x8000]; [dap.lba] = ([0x8000] & 63) + 64; dl = 0x80; call put; dl = 0x81; call put; jmp again
/// put:   si = dap; ax = 0x4300; int 0x13; ret
/// dap:   db 16, 0; dw 1 sector, offset 0x8000, segment 0; dq lba
/// ```
const BOOT_SECTOR: [u8; 71] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, 0xfb, 0x66, 0xff, 0x06,
    0x00, 0x80, 0x66, 0xa1, 0x00, 0x80, 0x66, 0x83, 0xe0, 0x3f, 0x66, 0x83, 0xc0, 0x40, 0x66, 0xa3,
    0x3f, 0x7c, 0xb2, 0x80, 0xe8, 0x07, 0x00, 0xb2, 0x81, 0xe8, 0x02, 0x00, 0xeb, 0xdf, 0xbe, 0x37,
    0x7c, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0xc3, 0x10, 0x00, 0x01, 0x00, 0x00, 0x80, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];
/// Where the boot sector counts.
pub(crate) const COUNTER: u64 = 0x8000;
/// Bytes of each disk.
pub(crate) const DISK_SIZE: u64 = 24 << 20;

/// The QEMU to test with.
pub(crate) fn qemu_binary() -> Option<String> {
    let binary = std::env::var("VMFERRY_QEMU").unwrap_or("qemu-system-x86_64".to_owned());
    let output = Command::new(&binary).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let major = text.ok().and_then(|text| {
        let number = text.split("version ").nth(1)?.split('.').next()?;
        number.parse::<u32>().ok()
    });
    match major {
        Some(major) if major >= 8 => Some(binary),
        Some(major) => {
            skip(&format!("{binary} is QEMU {major}, older than 8.0"));
            None
        }
        None => {
            skip(&format!("{binary} is not installed"));
            None
        }
    }
}

/// Ends what works in the folder that it is given, once this process is gone.
const SWEEP: &str = include_str!("sweep.sh");

/// A folder with two images: `d0.raw` and `d1.qcow2`.
#[derive(Debug)]
pub(crate) struct Host {
    /// Ends the QEMUs of a test that is killed: they live in sessions of their own.
    sweeper: Child,
    folder: tempfile::TempDir,
    binary: String,
}

impl Host {
    /// A source: `d0.raw` boots, both disks hold some data.
    pub(crate) fn source() -> Option<Self> {
        let host = Self::new()?;
        let mut raw = vec![0u8; usize::try_from(DISK_SIZE).unwrap()];
        raw[..BOOT_SECTOR.len()].copy_from_slice(&BOOT_SECTOR);
        raw[510..512].copy_from_slice(&[0x55, 0xaa]);
        raw[1 << 20..3 << 20].fill(0x5a);
        std::fs::write(host.path("d0.raw"), &raw).unwrap();
        host.image_command(
            &["convert", "-f", "raw", "-O", "raw", "-S", "4k"],
            "d0.raw",
            "sparse",
        );
        std::fs::rename(host.path("sparse"), host.path("d0.raw")).unwrap();
        raw[..512].fill(0);
        raw[5 << 20..6 << 20].fill(0xc3);
        std::fs::write(host.path("plain"), &raw).unwrap();
        host.image_command(
            &["convert", "-f", "raw", "-O", "qcow2"],
            "plain",
            "d1.qcow2",
        );
        Some(host)
    }

    /// A destination, whose images hold old data.
    pub(crate) fn destination() -> Option<Self> {
        let host = Self::new()?;
        let old = vec![0xee; 8 << 20];
        std::fs::write(host.path("d0.raw"), &old).unwrap();
        let file = std::fs::File::options()
            .write(true)
            .open(host.path("d0.raw"))
            .unwrap();
        file.set_len(DISK_SIZE).unwrap();
        host.image_command(
            &["convert", "-f", "raw", "-O", "qcow2"],
            "d0.raw",
            "d1.qcow2",
        );
        Some(host)
    }

    fn new() -> Option<Self> {
        let binary = qemu_binary()?;
        let folder = tempfile::tempdir().unwrap();
        let sweeper = Command::new("sh")
            .args(["-c", SWEEP, "sh"])
            .arg(folder.path())
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap();
        Some(Self {
            sweeper,
            folder,
            binary,
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn image_command(&self, arguments: &[&str], from: &str, to: &str) {
        let done = Command::new("qemu-img")
            .args(arguments)
            .args([self.path(from), self.path(to)])
            .status()
            .unwrap();
        assert!(done.success(), "qemu-img {arguments:?}");
    }

    /// The command line of this host's QEMU: the same machine on each host.
    pub(crate) fn command_line(&self, extra: &[&str]) -> Vec<String> {
        let socket = |name: &str| format!("unix:{},server=on,wait=off", self.path(name).display());
        let file = |name: &str| self.path(name).display().to_string();
        let mut line: Vec<String> = [
            &self.binary,
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-machine",
            "pc-q35-8.0",
            "-m",
            "48",
            "-smp",
            "2",
            "-uuid",
            "12345678-1234-1234-1234-123456789abc",
            "-boot",
            "c",
        ]
        .map(str::to_owned)
        .to_vec();
        let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);
        add(
            "-blockdev",
            format!("driver=file,node-name=f0,filename={}", file("d0.raw")),
        );
        add("-blockdev", "driver=raw,node-name=disk0,file=f0".to_owned());
        add(
            "-device",
            "virtio-blk-pci,drive=disk0,bootindex=1,id=vd0".to_owned(),
        );
        add(
            "-drive",
            format!("if=none,id=old1,format=qcow2,file={}", file("d1.qcow2")),
        );
        add(
            "-device",
            "virtio-blk-pci,drive=old1,bootindex=2".to_owned(),
        );
        add("-device", "pcie-root-port,id=rp0,slot=3".to_owned());
        add("-device", "virtio-rng-pci".to_owned());
        add("-qmp", socket("qmp"));
        add("-qmp", socket("admin"));
        line.extend(extra.iter().map(|&part| part.to_owned()));
        line
    }

    /// Starts QEMU and connects to its second QMP socket.
    pub(crate) async fn start(&self, extra: &[&str]) -> Running {
        let line = self.command_line(extra);
        self.start_line(&line).await
    }

    pub(crate) async fn start_line(&self, line: &[String]) -> Running {
        let child = Command::new(&line[0])
            .args(&line[1..])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut running = Running { child, admin: None };
        for _ in 0..500 {
            if let Ok(qmp) = Qmp::connect(&self.path("admin")).await {
                running.admin = Some(qmp);
                return running;
            }
            if let Ok(Some(status)) = running.child.try_wait() {
                panic!("QEMU ended: {status}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("QEMU did not come up");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The test ends by itself: there is nothing to sweep.
        let _ = self.sweeper.kill();
        let _ = self.sweeper.wait();
    }
}

/// A QEMU of a test, killed with it.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    admin: Option<Qmp>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    /// The second QMP connection, as an administrator has it.
    pub(crate) fn admin(&self) -> &Qmp {
        self.admin.as_ref().unwrap()
    }

    pub(crate) async fn ask(&self, command: &str, arguments: Value) -> Value {
        self.admin().execute(command, arguments).await.unwrap()
    }

    pub(crate) async fn status(&self) -> String {
        let answer = self.ask("query-status", json!({})).await;
        answer["status"].as_str().unwrap().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process has ended.
    pub(crate) async fn wait(&mut self) {
        for _ in 0..500 {
            if self.child.try_wait().unwrap().is_some() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("QEMU still runs");
    }
}
