//! Child processes with their output kept, ended when their guard goes.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// A process that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    name: String,
    log: PathBuf,
    out: PathBuf,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Running {
    /// Starts `command` with stdout and stderr in files of `dir`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(name: &str, command: Command, dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(name, command, dir, false)
    }

    /// As [`start`](Self::start), with its standard error where ours is.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_in_view(name: &str, command: Command, dir: &Path) -> anyhow::Result<Self> {
        Self::start_with(name, command, dir, true)
    }

    fn start_with(
        name: &str,
        mut command: Command,
        dir: &Path,
        in_view: bool,
    ) -> anyhow::Result<Self> {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let log = dir.join(format!("{name}-{number}.err"));
        let out = dir.join(format!("{name}-{number}.out"));
        let open = |path: &Path| File::create(path).with_context(|| path.display().to_string());
        let child = command
            .stdin(Stdio::null())
            .stdout(open(&out)?)
            .stderr(if in_view {
                Stdio::inherit()
            } else {
                open(&log)?.into()
            })
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self {
            child,
            name: name.to_owned(),
            log,
            out,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has said on standard error.
    #[must_use]
    pub fn stderr(&self) -> String {
        read(&self.log)
    }

    /// What it has said on standard output.
    #[must_use]
    pub fn stdout(&self) -> String {
        read(&self.out)
    }

    /// Waits until `found` sees what it wants in standard output and error.
    ///
    /// # Errors
    /// The process ends first, or `limit` passes.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut found: impl FnMut(&str, &str) -> Option<T>,
    ) -> anyhow::Result<T> {
        let began = Instant::now();
        loop {
            if let Some(value) = found(&self.stdout(), &self.stderr()) {
                return Ok(value);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended ({status}) before {what}:\n{}",
                    self.name,
                    self.stderr()
                );
            }
            if began.elapsed() > limit {
                bail!(
                    "{} did not come to {what} in {limit:?}:\n{}",
                    self.name,
                    self.stderr()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it has ended.
    ///
    /// # Errors
    /// The system does not say.
    pub fn has_ended(&mut self) -> io::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| io::Error::other("no pid"))?;
        Ok(kill_process(pid, signal)?)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// It does not come within `limit`.
    pub fn wait(mut self, limit: Duration) -> anyhow::Result<Finished> {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if began.elapsed() > limit {
                bail!("{} did not end in {limit:?}:\n{}", self.name, self.stderr());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Ok(Finished {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            // A failed test's folder goes with it.
            eprintln!("--- {} said:\n{}", self.name, self.stderr());
        }
    }
}

impl Finished {
    /// The `--json` object that it printed last.
    ///
    /// # Errors
    /// There is none.
    pub fn json(&self) -> anyhow::Result<serde_json::Value> {
        let line = self.stdout.lines().last().unwrap_or_default();
        serde_json::from_str(line)
            .with_context(|| format!("no JSON on stdout: {:?}\n{}", self.stdout, self.stderr))
    }

    /// Its exit code; -1 where a signal ended it.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

/// Processes in whose command line `words` occur, zombies aside.
#[must_use]
pub fn with_words(words: &str) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id())
        .filter(|pid| {
            let words_of = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&words_of).contains(words)
        })
        .collect()
}

/// Ends a process at once and waits until it has ended, so that its sockets are closed; it may be gone already.
pub fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(Ok(process)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) else {
        return;
    };
    let _ = pidfd_send_signal(&process, Signal::KILL);
    // Readable once it has ended, whoever its parent is.
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let _ = poll(&mut fds, Some(&limit));
}

/// What the descriptors of a process point at, sorted; those of short life (connections to its socket) aside.
#[must_use]
pub fn descriptors(pid: u32) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let mut found: Vec<String> = entries
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| !target.starts_with("socket:"))
        .collect();
    found.sort();
    found
}

fn read(path: &Path) -> String {
    let mut bytes = Vec::new();
    // What cannot be read yet is empty.
    if let Ok(mut file) = File::open(path) {
        let _ = file.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
