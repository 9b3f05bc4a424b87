//! A QEMU process of the lab.
//!
//! Owns the process: it is killed, by its own handle and no other, when this is dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::port::Peer;
use super::qmp::Qmp;

const ERRORS: &str = "qemu.err";
const SOCKET_LIMIT: Duration = Duration::from_secs(30);
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A running QEMU.
#[derive(Debug)]
pub struct Qemu {
    process: Peer,
    child: Option<Child>,
    qmp: Mutex<Qmp>,
    folder: PathBuf,
}

impl Qemu {
    pub(crate) fn start(argv: &[String], folder: &Path, qmp: &Path) -> Result<Self> {
        let (program, arguments) = argv.split_first().context("no program")?;
        let errors = File::create(folder.join(ERRORS))?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(errors.try_clone()?)
            .stderr(errors)
            .spawn()
            .with_context(|| program.clone())?;
        let mut started = Guarded(Some(child));
        let qmp = Qmp::connect(qmp, SOCKET_LIMIT);
        let qmp = qmp.with_context(|| format!("QEMU did not start:\n{}", errors_in(folder)))?;
        let process = Peer::of_pid(qmp.peer()?)?;
        Ok(Self {
            process,
            child: started.0.take(),
            qmp: Mutex::new(qmp),
            folder: folder.into(),
        })
    }

    pub(crate) fn adopt(folder: &Path, qmp: &Path, limit: Duration) -> Result<Self> {
        let qmp = Qmp::connect(qmp, limit)?;
        Ok(Self {
            process: Peer::of_pid(qmp.peer()?)?,
            child: None,
            qmp: Mutex::new(qmp),
            folder: folder.into(),
        })
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Its monitor.
    pub fn qmp(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for its end.
    pub fn wait_end(&self, limit: Duration) -> Result<()> {
        ensure!(
            self.process.ended_within(limit),
            "QEMU {} did not end within {limit:?}",
            self.pid()
        );
        Ok(())
    }

    /// Whether it still lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        !self.process.ended_within(Duration::ZERO)
    }

    /// What it wrote on its standard output and error.
    #[must_use]
    pub fn errors(&self) -> String {
        errors_in(&self.folder)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.process.kill();
        self.process.ended_within(KILL_LIMIT);
        if let Some(child) = &mut self.child {
            // It is dead: this only takes it from the process table.
            let _ = child.wait();
        }
    }
}

/// Kills a child that did not become a [`Qemu`].
struct Guarded(Option<Child>);

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Already gone is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn errors_in(folder: &Path) -> String {
    fs::read_to_string(folder.join(ERRORS)).unwrap_or_default()
}
