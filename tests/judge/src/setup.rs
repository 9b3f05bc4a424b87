//! What an init program has to do before the work: mounts, modules, ports; and the end of the guest.
//!
//! Owns every dealing with /proc, /sys and the kernel's administration. Nothing here runs once the guest is ready,
//! but [`end`].

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, finit_module, reboot};
use vmferry_judge::{MODULE_FOLDER, MODULE_ORDER};

use crate::report::{Failure, Report};

/// How long devices may take to appear after their driver was loaded; emulated processors are slow.
const DEVICE_WAIT: Duration = Duration::from_secs(30);

pub(crate) fn mount_all() -> Result<(), Failure> {
    for (kind, folder) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(folder).map_err(|e| Failure::of(folder, e))?;
        mount(kind, folder, kind, MountFlags::empty(), None).map_err(|e| Failure::of(folder, e))?;
    }
    Ok(())
}

/// Loads the modules that the initramfs lists, in its order. One that the kernel has already is no error.
pub(crate) fn load_modules() -> Result<(), Failure> {
    let folder = Path::new(MODULE_FOLDER);
    let order = read(folder.join(MODULE_ORDER))?;
    for name in order.lines() {
        let module = File::open(folder.join(name)).map_err(|e| Failure::of(name, e))?;
        match finit_module(&module, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(Failure::of(name, error)),
        }
    }
    Ok(())
}

pub(crate) fn command_line() -> Result<String, Failure> {
    read("/proc/cmdline")
}

/// A random number of this boot. The kernel's boot id, because reading it never waits for entropy.
pub(crate) fn boot_number() -> Result<u64, Failure> {
    let id = read("/proc/sys/kernel/random/boot_id")?;
    let digits: String = id
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&digits, 16).map_err(|_| Failure::new("boot_id is no number"))
}

/// Waits for the virtio-serial port `name` and opens it for reading and writing.
pub(crate) fn port(name: &str) -> Result<File, Failure> {
    let device = wait_for(name, || find_port(name))?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(&device)
        .map_err(|e| Failure::of(name, e))
}

/// Waits for the block device `name`.
pub(crate) fn disk(name: &str) -> Result<PathBuf, Failure> {
    let device = Path::new("/dev").join(name);
    wait_for(name, || device.exists().then(|| device.clone()))
}

fn find_port(name: &str) -> Option<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()? {
        let entry = entry.ok()?;
        let found = fs::read_to_string(entry.path().join("name")).ok()?;
        let device = Path::new("/dev").join(entry.file_name());
        if found.trim() == name && device.exists() {
            return Some(device);
        }
    }
    None
}

fn wait_for<T>(name: &str, find: impl Fn() -> Option<T>) -> Result<T, Failure> {
    let begin = Instant::now();
    loop {
        if let Some(found) = find() {
            return Ok(found);
        }
        if begin.elapsed() > DEVICE_WAIT {
            return Err(Failure::new(format!("{name} did not appear")));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Nice value of the calling thread: the beats go before the work.
pub(crate) fn be_nice(value: i32) {
    // Without it everything works, only less evenly.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), value);
}

/// Ends the guest; returns only if that failed.
pub(crate) fn end(how: RebootCommand, report: &Report) -> Result<(), Failure> {
    let _stopped = report.stop_work();
    rustix::fs::sync();
    reboot(how).map_err(|e| Failure::of("reboot", e))
}

fn read(path: impl AsRef<Path>) -> Result<String, Failure> {
    let path = path.as_ref();
    fs::read_to_string(path).map_err(|e| Failure::of(path.display(), e))
}
