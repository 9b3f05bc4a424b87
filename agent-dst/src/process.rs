//! The two names of a process: the one that the journal keeps and the one that this host compares.

use vmferry_common::process::ProcessIdentity;
use vmferry_proto::handover::ProcessRecord;

/// As this host compares it.
pub(crate) fn identity(record: &ProcessRecord) -> ProcessIdentity {
    ProcessIdentity {
        pid: record.pid,
        start_ticks: record.start_ticks,
        boot_id: record.boot_id.clone(),
    }
}

/// As the journal keeps it.
pub(crate) fn record(identity: ProcessIdentity) -> ProcessRecord {
    ProcessRecord {
        pid: identity.pid,
        start_ticks: identity.start_ticks,
        boot_id: identity.boot_id,
    }
}
