//! Identity of a process that outlives reuse of its pid.
//!
//! Owns how a process is named in the journal and how that name is compared with what runs now.
//! Invariant: nothing is taken for the process that was meant by its pid alone.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};
use vmferry_proto::handover::ProcessRecord;

/// A process, so named that another one with the same pid is not taken for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// Boot id of the kernel that ran it (/proc/sys/kernel/random/boot_id).
    pub boot_id: String,
}

/// A process that cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No such process.
    #[error("there is no process {pid}")]
    Gone {
        /// Its id.
        pid: u32,
    },
    /// /proc cannot be read.
    #[error("cannot read {path}: is /proc mounted?")]
    Proc {
        /// The file.
        path: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// /proc says something that this program does not understand.
    #[error("{path} holds no start time")]
    Format {
        /// The file.
        path: String,
    },
}

impl ProcessIdentity {
    /// The process that has this pid now.
    pub fn of(pid: u32) -> Result<Self, ProcessError> {
        let start_ticks = start_ticks(pid)?;
        Ok(Self {
            pid,
            start_ticks,
            boot_id: this_boot_id()?,
        })
    }

    /// This very process.
    pub fn own() -> Result<Self, ProcessError> {
        Self::of(std::process::id())
    }

    /// Whether this process still runs: same boot, same pid, same start. A zombie runs no more.
    pub fn is_alive(&self) -> Result<bool, ProcessError> {
        if this_boot_id()? != self.boot_id {
            return Ok(false);
        }
        match state_and_start(self.pid) {
            Ok((state, start)) => Ok(start == self.start_ticks && !matches!(state, b'Z' | b'X')),
            Err(ProcessError::Gone { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// As the journal keeps it.
impl From<ProcessIdentity> for ProcessRecord {
    fn from(identity: ProcessIdentity) -> Self {
        Self {
            pid: identity.pid,
            start_ticks: identity.start_ticks,
            boot_id: identity.boot_id,
        }
    }
}

/// As this host compares it.
impl From<ProcessRecord> for ProcessIdentity {
    fn from(record: ProcessRecord) -> Self {
        Self {
            pid: record.pid,
            start_ticks: record.start_ticks,
            boot_id: record.boot_id,
        }
    }
}

impl std::fmt::Display for ProcessIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {}", self.pid)
    }
}

/// Boot id of the running kernel: another one means that every process of before is gone.
pub fn this_boot_id() -> Result<String, ProcessError> {
    let path = "/proc/sys/kernel/random/boot_id";
    match fs::read_to_string(path) {
        Ok(id) => Ok(id.trim().to_owned()),
        Err(source) => Err(ProcessError::Proc {
            path: path.to_owned(),
            source,
        }),
    }
}

fn start_ticks(pid: u32) -> Result<u64, ProcessError> {
    state_and_start(pid).map(|(_, start)| start)
}

fn state_and_start(pid: u32) -> Result<(u8, u64), ProcessError> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read(&path).map_err(|source| match source.raw_os_error() {
        // ESRCH: it ended between the open and the read.
        Some(libc::ENOENT | libc::ESRCH) => ProcessError::Gone { pid },
        _ => ProcessError::Proc {
            path: path.clone(),
            source,
        },
    })?;
    parse_stat(&stat).ok_or(ProcessError::Format { path })
}

/// State (field 3) and start time (field 22). The name in field 2 may hold spaces and brackets, so the
/// fields are counted from the last bracket.
fn parse_stat(stat: &[u8]) -> Option<(u8, u64)> {
    let name_end = stat.iter().rposition(|byte| *byte == b')')?;
    let text = std::str::from_utf8(stat.get(name_end + 1..)?).ok()?;
    let mut fields = text.split_ascii_whitespace();
    let state = fields.next()?.bytes().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::{ProcessError, ProcessIdentity, parse_stat};

    #[test]
    fn a_name_with_brackets_and_spaces_does_not_confuse() {
        let stat = b"7 (a) Z 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4242 9 9";
        assert_eq!(parse_stat(stat), Some((b'S', 4242)));
        assert_eq!(parse_stat(b"7 (short) S 1"), None);
        assert_eq!(parse_stat(b""), None);
    }

    #[test]
    fn a_process_is_alive_until_it_ends_and_its_pid_is_not_enough() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.is_alive().unwrap());
        let mut earlier = own.clone();
        earlier.start_ticks -= 1;
        assert!(!earlier.is_alive().unwrap());
        let other_boot = ProcessIdentity {
            boot_id: "another".to_owned(),
            ..own
        };
        assert!(!other_boot.is_alive().unwrap());
    }

    #[test]
    fn a_zombie_and_a_reaped_process_are_not_alive() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap();
        assert!(identity.is_alive().unwrap());
        child.kill().unwrap();
        // The state becomes Z some time after the signal; waiting for it is bounded by the test runner.
        while identity.is_alive().unwrap() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!identity.is_alive().unwrap());
        assert!(matches!(
            ProcessIdentity::of(child.id()),
            Err(ProcessError::Gone { .. })
        ));
    }
}
