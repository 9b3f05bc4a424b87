//! What a migration came to, as a report.
//!
//! Owns the translation of the machine's end and of what was measured; what is printed is `report`'s.

use std::time::Duration;

use vmferry_common::phase::{Ending, Phase};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{SourceEnd, SourceRecord, SourceState};
use vmferry_proto::spec::RunState;

use crate::cli::MigrateOptions;
use crate::local::Waiter;
use crate::migrate::Ended;
use crate::report::{End, GuestNow, Millis, Peer, Report, Verified};

/// The state that the guest is in while nobody migrates it: it may be an earlier agent that paused it.
pub(crate) fn state_before(record: &SourceRecord, found: RunState) -> RunState {
    match record.state {
        SourceState::Copying { .. } | SourceState::Ended { .. } => found,
        SourceState::Pausing { .. }
        | SourceState::Committing { .. }
        | SourceState::RolledBack { .. }
        | SourceState::Released { .. }
        | SourceState::Fenced { .. } => record.run_state_before,
    }
}

pub(crate) fn summarise(
    options: &MigrateOptions,
    record: &SourceRecord,
    before: RunState,
    ended: Ended,
    total: Duration,
) -> (Report, Vec<Waiter>) {
    let end = ending(&ended, before);
    let peer = Peer {
        address: options.to.to_string(),
        agent: ended.stats.agent.clone(),
    };
    let mut report = Report::new(
        record.migration.to_string(),
        record.guest.to_string(),
        peer,
        end,
    );
    let stats = &ended.stats;
    report.total_ms = Millis(total);
    report.set_rounds(&stats.rounds, stats.last_set.as_ref());
    if let Some((downtime, parts)) = stats.downtime() {
        report.set_downtime(downtime, parts);
    }
    report.attempts = stats.attempts;
    report.sessions = stats.sessions;
    report.memory_bytes = stats.memory_bytes;
    report.disk_bytes = stats.disk_bytes;
    report.raw_bytes = ended.sent.raw_bytes;
    report.wire_bytes = ended.sent.wire_bytes;
    report.zero_blocks = ended.sent.zero_blocks;
    report.kept_bytes = stats.kept_bytes;
    report.resent_blocks = ended.sent.resent_blocks;
    report.unchanged_blocks = ended.sent.unchanged_blocks;
    report.difference_blocks = ended.sent.difference_blocks;
    report.duplicate_blocks = ended.sent.duplicate_blocks;
    report.device_state_bytes = stats.device_state_bytes;
    report.guest_stall_ms = Millis(stats.longest_hold);
    report.barrier_stall_ms = Millis(stats.longest_barrier);
    report.verified = Verified {
        mode: options.verify,
        windows: stats.windows_compared,
        bytes: stats.bytes_compared,
        resent_discarded: stats.resent_discarded,
    };
    (report, ended.waiters)
}

fn ending(ended: &Ended, before: RunState) -> End {
    let here = match before {
        RunState::Running => GuestNow::RunsAtSource,
        RunState::Paused => GuestNow::PausedAtSource,
    };
    let there = match before {
        RunState::Running => GuestNow::RunsAtDestination,
        RunState::Paused => GuestNow::PausedAtDestination,
    };
    let with_error = |outcome, guest_now, error: &WireError, phase: Phase| End {
        outcome,
        guest_now,
        error: Some((error.clone(), Some(phase))),
    };
    match &ended.end {
        Some(SourceEnd::Committed) => End {
            outcome: Ending::Committed,
            guest_now: there,
            error: None,
        },
        Some(SourceEnd::NotCommitted { reason, .. }) => {
            let now = if ended.guest_is_gone {
                GuestNow::Ended
            } else {
                here
            };
            let outcome = match reason.code {
                ErrorCode::Cancelled => Ending::Cancelled,
                _ if ended.rolled_back.is_some() && ended.stats.attempts > 0 => Ending::RolledBack,
                _ => Ending::Failed,
            };
            with_error(outcome, now, reason, ended.phase)
        }
        Some(SourceEnd::ResumedByOperator) => End {
            outcome: Ending::RolledBack,
            guest_now: here,
            error: None,
        },
        Some(SourceEnd::EndedByOperator) => End {
            outcome: Ending::RolledBack,
            guest_now: GuestNow::Ended,
            error: None,
        },
        None => {
            let now = if ended.in_doubt {
                GuestNow::InDoubt
            } else {
                GuestNow::StuckAtSource
            };
            let outcome = if ended.in_doubt {
                Ending::InDoubt
            } else {
                Ending::Failed
            };
            let told = WireError::new(
                ErrorCode::ShuttingDown,
                "the agent was told to stop before the migration was settled",
            );
            with_error(
                outcome,
                now,
                ended.rolled_back.as_ref().unwrap_or(&told),
                ended.phase,
            )
        }
    }
}
