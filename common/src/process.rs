//! Identity of a process that outlives reuse of its pid.

use serde::{Deserialize, Serialize};

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
