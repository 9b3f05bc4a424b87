//! Network namespaces without a name: each lives as long as something uses it, and nobody has to remove it.
//!
//! Owns the namespace's handle and what runs inside: [`Namespace::run`] takes a closure there on a thread of its own.
//! Sockets that it opens and processes that it starts stay in the namespace; threads, files and Unix sockets are as ever.
//! A named namespace would be left behind by a killed test; of this one the kernel removes everything, devices too.

use std::fs::{self, File};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// The thread's own entry: after `unshare` it names the new namespace.
const OWN: &str = "/proc/thread-self/ns/net";
/// Enough for 1 Gbit/s at 250 ms, as an administrator of long lines sets it; the default ends at 6 MiB.
const TCP_BUFFER: &str = "4096 131072 67108864";

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    handle: File,
}

impl Namespace {
    /// A new one, with its loopback up.
    ///
    /// # Errors
    /// Not root, or no namespaces in this kernel.
    pub fn new() -> Result<Self> {
        let made = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace needs root")?;
            Ok(Self {
                handle: File::open(OWN).context(OWN)?,
            })
        })?;
        made.run(set_up)?;
        Ok(made)
    }

    /// Runs `work` inside.
    ///
    /// # Errors
    /// What `work` says.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(&self.handle, CloneFlags::CLONE_NEWNET).context("entering a namespace")?;
            work()
        })
    }
}

/// Runs `work` on a thread that ends with it: what it does to its own namespace touches no other thread.
pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let done = scope.spawn(work).join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Joins two namespaces by a cable: a pair of devices of one name, without any limit.
pub(super) fn join(name: &str, near: &Namespace, far: &Namespace) -> Result<()> {
    thread::scope(|scope| {
        let (says, hears) = mpsc::channel();
        let (done, wait) = mpsc::channel::<()>();
        // The kernel finds a nameless namespace by a task in it.
        scope.spawn(move || {
            far.run(move || {
                says.send(rustix::thread::gettid())?;
                // Ends when `done` is dropped.
                let _ = wait.recv();
                Ok(())
            })
        });
        let task = hears.recv().context("entering a namespace")?;
        let task = task.as_raw_nonzero().to_string();
        let cable = ["link", "add", "name", name, "type", "veth"];
        let peer = ["peer", "name", name, "netns", &task];
        let made = near.run(|| ip(&[&cable[..], &peer].concat()));
        drop(done);
        made
    })
}

/// Runs `ip` where the calling thread is.
pub(super) fn ip(words: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(words)
        .output()
        .context("`ip` cannot be run: apt-get install iproute2")?;
    ensure!(
        output.status.success(),
        "ip {}: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn set_up() -> Result<()> {
    ip(&["link", "set", "lo", "up"])?;
    for name in ["tcp_rmem", "tcp_wmem"] {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::write(&path, TCP_BUFFER).context(path)?;
    }
    Ok(())
}
