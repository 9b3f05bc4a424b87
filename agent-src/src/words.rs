//! What the handover reports, in sentences for a person.

use vmferry_proto::handover::SourceReport;

/// One line.
#[must_use]
pub fn of_report(report: &SourceReport) -> String {
    match report {
        SourceReport::RolledBack { attempt, reason } => {
            format!("attempt {attempt} was rolled back, the guest is as before: {reason}")
        }
        SourceReport::JournalFailed {
            guest_stays_paused: true,
            reason,
        } => format!(
            "the journal cannot be written and the guest stays PAUSED until it can: {reason}; trying again"
        ),
        SourceReport::JournalFailed {
            guest_stays_paused: false,
            reason,
        } => {
            format!("the journal cannot be written: {reason}; trying again")
        }
        SourceReport::ResumeFailed { reason } => {
            format!("the guest is PAUSED here and could not be resumed: {reason}; trying again")
        }
        SourceReport::InDoubt { key } => format!(
            "in doubt: attempt {} was committed here and not yet answered; the guest stays paused until the destination answers",
            key.attempt
        ),
        SourceReport::UnknownToDestination { key } => format!(
            "the destination has never heard of attempt {}: that settles nothing (has its state folder been replaced?)",
            key.attempt
        ),
        SourceReport::OtherRegister { register } => format!(
            "the destination answers from another state folder (register {register}) than the one that prepared: that settles nothing"
        ),
        SourceReport::TouchedInDoubt { reason } => {
            format!("somebody touched the guest while its outcome is in doubt: {reason}")
        }
        SourceReport::ReleaseFailed { reason } => format!(
            "the destination owns the guest, but the copy here could not be ended: {reason}; trying again"
        ),
        SourceReport::TooLateToCancel => {
            "too late to cancel: the destination already owns the guest".to_owned()
        }
        SourceReport::ResolvedByOperator {
            key,
            guest_is_ended,
        } => format!(
            "attempt {} is settled by the operator's word that the destination is fenced: the guest is {} here",
            key.attempt,
            if *guest_is_ended {
                "ended (boot it afresh)"
            } else {
                "resumed"
            }
        ),
    }
}
