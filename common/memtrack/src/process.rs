//! Processes by pidfd, and what /proc says of them.
//!
//! Owns the handle that keeps a pid from meaning another process, the facts asked of /proc before a process is touched,
//! and the launch of a child in a session of its own. A pid is only acted on while its pidfd says that it lives.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::error::TrackError;

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: u32,
    pidfd: OwnedFd,
}

impl ProcessHandle {
    /// Opens the process that has `pid` now. The caller compares its start time where it knows it from before.
    pub fn open(pid: u32) -> Result<Self, TrackError> {
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(TrackError::Gone { pid })?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty())
            .map_err(|errno| TrackError::from_os(pid, "open", errno.into()))?;
        Ok(Self { pid, pidfd })
    }

    /// Its pid.
    #[must_use]
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it lives. A zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A pidfd is readable once the process has ended.
        !matches!(poll(&mut fds, Some(&now)), Ok(1..))
    }

    /// Fails if the process has ended.
    pub fn check_alive(&self) -> Result<(), TrackError> {
        if self.is_alive() {
            Ok(())
        } else {
            Err(TrackError::Gone { pid: self.pid })
        }
    }

    /// A copy of its descriptor `fd`: the same open file, in this process.
    pub(crate) fn take_descriptor(&self, fd: i32) -> Result<OwnedFd, TrackError> {
        pidfd_getfd(&self.pidfd, fd, PidfdGetfdFlags::empty()).map_err(|errno| match errno {
            rustix::io::Errno::BADF => TrackError::DescriptorLost {
                pid: self.pid,
                fd,
                found: "closed".to_owned(),
            },
            other => TrackError::from_os(self.pid, "take a descriptor out of", other.into()),
        })
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Makes `command` start as the leader of a new session and process group, so that neither a Ctrl-C nor
/// a hang-up of this process's terminal reaches it.
pub fn in_new_session(command: &mut Command) -> &mut Command {
    let new_session = || {
        // SAFETY: setsid takes no argument and touches no memory.
        if unsafe { libc::setsid() } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and calls only setsid and errno access, which are
    // async-signal-safe; it neither allocates nor locks.
    unsafe { command.pre_exec(new_session) }
}

/// The host's monotonic clock in nanoseconds: the same for all processes of this host, unlike an `Instant`.
#[must_use]
pub fn monotonic_nanos() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec, which lives until the call returns.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// One line of /proc/PID/status.
pub(crate) fn status_field(pid: u32, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
}

/// Process that traces `pid`, if any.
pub(crate) fn tracer_of(pid: u32) -> Option<u32> {
    status_field(pid, "TracerPid")?
        .parse()
        .ok()
        .filter(|tracer| *tracer != 0)
}

/// Whether this process has CAP_SYS_PTRACE.
pub(crate) fn has_ptrace_capability() -> bool {
    const CAP_SYS_PTRACE: u64 = 19;
    status_field(std::process::id(), "CapEff")
        .and_then(|hex| u64::from_str_radix(&hex, 16).ok())
        .is_some_and(|set| set & (1 << CAP_SYS_PTRACE) != 0)
}

/// What descriptor `fd` of `pid` is, as /proc names it.
pub(crate) fn descriptor_link(pid: u32, fd: i32) -> Option<String> {
    std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))
        .ok()
        .map(|link| link.to_string_lossy().into_owned())
}

/// Numbers of the userfaultfds that `pid` holds.
pub(crate) fn userfaultfds_of(pid: u32) -> Vec<i32> {
    let Ok(folder) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Vec::new();
    };
    let mut found: Vec<i32> = folder
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| descriptor_link(pid, *fd).is_some_and(|link| link == USERFAULTFD_LINK))
        .collect();
    found.sort_unstable();
    found
}

/// How /proc/PID/fd names a userfaultfd.
pub(crate) const USERFAULTFD_LINK: &str = "anon_inode:[userfaultfd]";
