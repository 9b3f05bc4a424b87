//! Processes of hypervisors, found or launched: watched and ended.
//!
//! Owns the watch by pidfd and the end by pidfd: nothing is signalled by pid alone. How a process comes to be launched is
//! `launch`'s.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use vmferry_common::process::{ProcessError, ProcessIdentity};

use crate::error::GuestError;

/// How much of a hypervisor's output is shown in an error.
const TAIL: u64 = 2000;
/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A process that is watched by its pidfd, launched here or found running.
#[derive(Debug)]
pub struct Watched {
    identity: ProcessIdentity,
    pidfd: AsyncFd<OwnedFd>,
    launched: Option<Launched>,
}

/// What is known of a process only by the one that launched it.
#[derive(Debug)]
struct Launched {
    log: PathBuf,
    status: watch::Receiver<Option<ExitStatus>>,
}

impl Watched {
    /// Watches `child`, whose output goes to `log`, and waits for its end.
    pub(crate) fn launched(child: Child, log: &Path) -> Result<Self, GuestError> {
        let pid = child.id();
        // Before anybody waits for it: until then even a child that ended at once keeps its pid.
        let opened = identify(pid).and_then(|identity| Ok((identity, open_pidfd(pid)?)));
        let status = reap(child);
        let (identity, pidfd) = opened?;
        Ok(Self {
            identity,
            pidfd,
            launched: Some(Launched {
                log: log.to_owned(),
                status,
            }),
        })
    }

    /// Watches the process `identity`, which runs already. [`GuestError::Gone`] if it does not, or its pid is another's now.
    pub fn find(identity: ProcessIdentity) -> Result<Self, GuestError> {
        let pidfd = open_pidfd(identity.pid)?;
        // Compared after the pidfd is open: from here on the pid cannot come to mean another process.
        if identify(identity.pid)? != identity {
            return Err(GuestError::Gone(format!("process {}", identity.pid)));
        }
        Ok(Self {
            identity,
            pidfd,
            launched: None,
        })
    }

    /// The process.
    #[must_use]
    pub const fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// Returns when the process has ended, with what is known of how. Cancel safe.
    pub async fn ended(&self) -> String {
        // An error of the reactor means that the runtime ends; then nobody waits for the answer.
        let _ = self.pidfd.readable().await;
        let Some(launched) = &self.launched else {
            return format!("process {} has ended", self.identity.pid);
        };
        let mut status = launched.status.clone();
        let how = match status.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(status)) => status.to_string(),
            Ok(None) | Err(_) => "its exit status is not known".to_owned(),
        };
        let tail = tail_of(&launched.log);
        let said = if tail.is_empty() {
            format!("it printed nothing to {}", launched.log.display())
        } else {
            format!("its last output: {tail}")
        };
        format!("process {} has ended ({how}); {said}", self.identity.pid)
    }

    /// Kills the process and waits for its end. Fine if it has ended already.
    pub async fn kill(&self) -> Result<(), GuestError> {
        match pidfd_send_signal(self.pidfd.get_ref().as_fd(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => {
                let what = format!("cannot end process {}", self.identity.pid);
                return Err(io_error(what, errno.into()));
            }
        }
        tokio::time::timeout(KILL_LIMIT, self.pidfd.readable())
            .await
            .map_err(|_| GuestError::TimedOut {
                command: format!("SIGKILL of process {}", self.identity.pid),
                seconds: KILL_LIMIT.as_secs(),
            })?
            .map(drop)
            .map_err(|source| io_error("cannot watch a process".to_owned(), source))
    }
}

fn open_pidfd(pid: u32) -> Result<AsyncFd<OwnedFd>, GuestError> {
    let gone = || GuestError::Gone(format!("process {pid}"));
    let failed = |source| io_error(format!("cannot watch process {pid}"), source);
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pidfd = pidfd_open(raw.ok_or_else(gone)?, PidfdFlags::NONBLOCK).map_err(|errno| {
        if errno == rustix::io::Errno::SRCH {
            gone()
        } else {
            failed(errno.into())
        }
    })?;
    #[expect(
        deprecated,
        reason = "the safe constructor is deprecated for descriptor types that may change their descriptor; OwnedFd does not, and this crate has no unsafe"
    )]
    AsyncFd::with_interest(pidfd, Interest::READABLE).map_err(failed)
}

/// The identity of the process that has `pid` now.
pub fn identify(pid: u32) -> Result<ProcessIdentity, GuestError> {
    ProcessIdentity::of(pid).map_err(|error| match error {
        ProcessError::Gone { pid } => GuestError::Gone(format!("process {pid}")),
        other @ (ProcessError::Proc { .. } | ProcessError::Format { .. }) => GuestError::Io {
            what: format!("cannot identify process {pid}"),
            source: io::Error::other(other),
        },
    })
}

/// Waits for the child on a thread of its own, so that it never stays a zombie.
fn reap(mut child: Child) -> watch::Receiver<Option<ExitStatus>> {
    let (sender, receiver) = watch::channel(None);
    std::thread::spawn(move || {
        if let Ok(status) = child.wait() {
            // Nobody may be listening any more.
            let _ = sender.send(Some(status));
        }
    });
    receiver
}

/// The end of a log, in one line.
fn tail_of(log: &Path) -> String {
    let read = || {
        let mut file = fs::File::open(log)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        io::Result::Ok(String::from_utf8_lossy(&bytes).trim().replace('\n', " | "))
    };
    read().unwrap_or_default()
}

pub(crate) fn io_error(what: String, source: io::Error) -> GuestError {
    GuestError::Io { what, source }
}
