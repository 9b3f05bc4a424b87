//! What can go wrong with another process's memory, each with the cause and what to do about it.
//!
//! Owns the error enum and the words that explain a refused permission on this host. An error says what became
//! of the target only where it matters: on every path its registers are as they were.

use std::io;

/// Tracking or memory access failed. The target runs on as before unless it is [`Gone`](Self::Gone).
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel lacks asynchronous write-protection or PAGEMAP_SCAN.
    #[error(
        "Linux {release} cannot track written pages (userfaultfd WP_ASYNC and PAGEMAP_SCAN are missing): use Linux 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP"
    )]
    KernelTooOld {
        /// `uname -r`.
        release: String,
    },
    /// The kernel refused access to the process.
    #[error("no permission to {what} process {pid}: {hint}")]
    NoPermission {
        /// The target.
        pid: u32,
        /// What was tried.
        what: &'static str,
        /// Why it is likely and what helps, from this host's settings.
        hint: String,
    },
    /// The process has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The target.
        pid: u32,
    },
    /// The process does not run 64-bit code.
    #[error("process {pid} is a 32-bit program: only 64-bit x86 hypervisors can be tracked")]
    ThirtyTwoBit {
        /// The target.
        pid: u32,
    },
    /// Somebody else traces the process.
    #[error(
        "process {pid} is already traced by process {tracer}: end that debugger or strace first"
    )]
    AlreadyTraced {
        /// The target.
        pid: u32,
        /// Its tracer.
        tracer: u32,
    },
    /// Another userfaultfd holds the range.
    #[error(
        "memory {start:#x}+{len:#x} of process {pid} is already registered with another userfaultfd (open there: {descriptors}): another migration, snapshot or post-copy of this guest is under way; end it first"
    )]
    RangeTaken {
        /// The target.
        pid: u32,
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
        /// Descriptor numbers inside the target that are userfaultfds.
        descriptors: String,
    },
    /// The range is not what it was said to be.
    #[error("memory {start:#x}+{len:#x} of process {pid}: {why}")]
    BadRange {
        /// The target.
        pid: u32,
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
        /// What is wrong with it.
        why: String,
    },
    /// The target's own seccomp filter refused the injected call.
    #[error(
        "process {pid} runs under a seccomp filter that refuses {call}: allow userfaultfd in its sandbox, or start it without that filter"
    )]
    SeccompRefused {
        /// The target.
        pid: u32,
        /// The system call.
        call: &'static str,
    },
    /// An injected call was answered with an error.
    #[error("{call} inside process {pid} failed")]
    CallFailed {
        /// The target.
        pid: u32,
        /// The system call.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The target did not come to a stop.
    #[error(
        "process {pid} did not stop within {seconds} s (its main thread waits in the kernel, often for storage): try again when that is over"
    )]
    NotStopped {
        /// The target.
        pid: u32,
        /// How long was waited.
        seconds: u64,
    },
    /// The descriptor number does not name our userfaultfd (any more).
    #[error(
        "descriptor {fd} of process {pid} is {found}, not a userfaultfd: the tracking was ended; start afresh"
    )]
    DescriptorLost {
        /// The target.
        pid: u32,
        /// The number.
        fd: i32,
        /// What is there.
        found: String,
    },
    /// The helper process ended without an answer.
    #[error(
        "the helper that works on process {pid} ended without an answer; if it was killed with SIGKILL in the middle, that process may be damaged"
    )]
    HelperLost {
        /// The target.
        pid: u32,
    },
    /// Any other refusal of the kernel.
    #[error("{what} (process {pid})")]
    Os {
        /// The target.
        pid: u32,
        /// What was being done.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

impl TrackError {
    /// Sorts the kernel's answer to something done to `pid` into the kinds above.
    pub(crate) fn from_os(pid: u32, what: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Gone { pid },
            Some(libc::EPERM | libc::EACCES) => Self::NoPermission {
                pid,
                what,
                hint: permission_hint(pid),
            },
            _ => Self::Os { pid, what, source },
        }
    }
}

/// Why this process may not touch `pid`, as far as the host's settings tell.
fn permission_hint(pid: u32) -> String {
    let capable = crate::process::has_ptrace_capability();
    let yama = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope")
        .ok()
        .map(|text| text.trim().to_owned());
    match (capable, yama.as_deref()) {
        (_, Some("3")) => "kernel.yama.ptrace_scope is 3, which forbids tracing to everybody until the next boot: set it to 2 or less and reboot".to_owned(),
        (true, _) => format!(
            "this agent has CAP_SYS_PTRACE, so a security module or a user namespace stands in the way: see the audit log for process {pid} (AppArmor needs `ptrace (tracedby)` for the agent's label)"
        ),
        (false, Some("1" | "2")) => format!(
            "kernel.yama.ptrace_scope is {} and this agent lacks CAP_SYS_PTRACE: run it as root or give it CAP_SYS_PTRACE",
            yama.as_deref().unwrap_or_default()
        ),
        (false, _) => "run the agent as root, as the user that runs the hypervisor, or with CAP_SYS_PTRACE".to_owned(),
    }
}
