//! The connection to one QEMU: its QMP socket, the process behind it, and whether it lives.
//!
//! Owns the proof which process is QEMU and the watch over its end. Invariant: `life` changes once, and a guest
//! that runs without this agent's permit where one is needed is ended, not watched.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::{broadcast, watch};
use vmferry_common::process::ProcessIdentity;

use super::inventory::Machine;
use super::qmp::{Event, Qmp};
use crate::error::GuestError;
use crate::guest::GuestLife;
use crate::watched::{self, Watched};

/// How long a QEMU whose socket closed may take to end, so that its end can be told instead.
const END_GRACE: Duration = Duration::from_secs(2);
/// How long a QEMU may take to end after `quit`: it flushes its disks.
const QUIT_LIMIT: Duration = Duration::from_secs(30);

/// A QEMU, connected.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) qmp: Qmp,
    process: Arc<Watched>,
    life: watch::Receiver<GuestLife>,
    /// Whether the guest may run here: false at a destination before its start.
    may_run: Arc<AtomicBool>,
    watcher: tokio::task::AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl Link {
    /// Finds the process behind `qmp` and begins to watch it. Needs a tokio runtime.
    pub(super) fn new(qmp: Qmp, machine: &Machine, may_run: bool) -> Result<Self, GuestError> {
        let pid = qemu_pid(qmp.peer_pid(), machine.vcpu_thread)?;
        let process = Arc::new(Watched::find(watched::identify(pid)?)?);
        let (sender, life) = watch::channel(GuestLife::Alive);
        let may_run = Arc::new(AtomicBool::new(may_run));
        let task = watch_life(
            qmp.events(),
            qmp.closed(),
            Arc::clone(&process),
            Arc::clone(&may_run),
            sender,
        );
        Ok(Self {
            qmp,
            process,
            life,
            may_run,
            watcher: tokio::spawn(task).abort_handle(),
        })
    }

    pub(super) fn identity(&self) -> ProcessIdentity {
        self.process.identity().clone()
    }

    pub(super) fn life(&self) -> watch::Receiver<GuestLife> {
        self.life.clone()
    }

    /// From here on the guest may run.
    pub(super) fn permit(&self) {
        self.may_run.store(true, Ordering::SeqCst);
    }

    /// The error that `life` says, if it is over.
    pub(super) fn check_alive(&self) -> Result<(), GuestError> {
        match self.life.borrow().clone() {
            GuestLife::Alive => Ok(()),
            GuestLife::ShutDown(how) => Err(GuestError::ShutDown(how)),
            GuestLife::Gone(why) => Err(GuestError::Gone(why)),
        }
    }

    /// Returns when the process has ended, with what is known of how.
    pub(super) async fn ended(&self) -> String {
        self.process.ended().await
    }

    /// Kills the process. Fine if it has ended.
    pub(super) async fn kill(&self) -> Result<(), GuestError> {
        self.process.kill().await
    }

    /// Ends QEMU in an orderly way, or by SIGKILL where it does not follow. Fine if it has ended.
    pub(super) async fn quit(&self) -> Result<(), GuestError> {
        // Whatever it answers: its end alone counts.
        if let Err(error) = self.qmp.execute("quit", json!({})).await {
            tracing::debug!(%error, "QEMU did not answer quit");
        }
        match tokio::time::timeout(QUIT_LIMIT, self.process.ended()).await {
            Ok(_) => Ok(()),
            Err(_) => {
                tracing::warn!(process = %self.process.identity().pid, "QEMU did not follow quit and is killed");
                self.process.kill().await
            }
        }
    }
}

/// Which process is QEMU: the peer of the socket, unless somebody made the socket for QEMU (a
/// management daemon may pass it); then the one that a virtual CPU's thread belongs to.
fn qemu_pid(peer: u32, vcpu_thread: Option<u32>) -> Result<u32, GuestError> {
    let Some(thread) = vcpu_thread else {
        return Ok(peer);
    };
    if Path::new(&format!("/proc/{peer}/task/{thread}")).exists() {
        return Ok(peer);
    }
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let group = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    let is_qemu = |pid: &u32| {
        std::fs::read_link(format!("/proc/{pid}/exe"))
            .ok()
            .and_then(|exe| Some(exe.file_name()?.to_str()?.contains("qemu")))
            .unwrap_or(false)
    };
    group.filter(is_qemu).ok_or_else(|| {
        GuestError::Config(format!(
            "process {peer} owns the QMP socket but not the guest's virtual CPUs: is QEMU in another PID namespace? Run vmferry where it can see QEMU's process"
        ))
    })
}

async fn watch_life(
    mut events: broadcast::Receiver<Event>,
    mut closed: watch::Receiver<Option<String>>,
    process: Arc<Watched>,
    may_run: Arc<AtomicBool>,
    life: watch::Sender<GuestLife>,
) {
    let end = loop {
        tokio::select! {
            biased;
            event = events.recv() => match event {
                Ok(event) if event.name == "SHUTDOWN" => {
                    let reason = event.data["reason"].as_str().unwrap_or("no reason given");
                    break GuestLife::ShutDown(reason.to_owned());
                }
                Ok(event) if event.name == "RESUME" && !may_run.load(Ordering::SeqCst) => {
                    // Two running guests are worse than none: see rule 1 of the handover.
                    if let Err(error) = process.kill().await {
                        tracing::error!(%error, "a guest that somebody else started could not be ended");
                    }
                    break GuestLife::Gone("somebody else started it before the commit, so it was ended".to_owned());
                }
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break lost(&process, "its end was not told").await,
            },
            how = process.ended() => break GuestLife::Gone(how),
            why = closed_because(&mut closed) => break lost(&process, &why).await,
        }
    };
    tracing::debug!(
        ?end,
        process = process.identity().pid,
        "QEMU's guest has ended"
    );
    // Nobody has to listen.
    let _ = life.send(end);
}

async fn closed_because(closed: &mut watch::Receiver<Option<String>>) -> String {
    match closed.wait_for(Option::is_some).await {
        Ok(why) => why.clone().unwrap_or_default(),
        Err(_) => "the connection was let go".to_owned(),
    }
}

/// The QMP connection ended: mostly because the process did, a moment later.
async fn lost(process: &Watched, why: &str) -> GuestLife {
    match tokio::time::timeout(END_GRACE, process.ended()).await {
        Ok(how) => GuestLife::Gone(how),
        Err(_) => GuestLife::Gone(format!(
            "the QMP connection was lost ({why}), though process {} still runs",
            process.identity().pid
        )),
    }
}
