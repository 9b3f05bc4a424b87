//! The states of the source's machine: each carries only its own data.

use crate::error::WireError;
use crate::ids::{Attempt, RegisterId};
use crate::message::AttemptKey;
use crate::spec::RunState;

use super::super::record::SourceState;
use super::SourceEnd;

/// The session, beside the handover's own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Link {
    /// None.
    Down,
    /// Its number is being made durable.
    Numbering,
    /// It is being opened.
    Connecting,
    /// `Welcome` was read.
    Up { register: RegisterId },
}

/// Which of the two idempotent questions is asked in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Ask {
    /// Commit: settles an undecided attempt as owned.
    Commit,
    /// Query: settles an undecided attempt as aborted.
    Query,
}

/// Where an attempt that will not be committed stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum UnwindStep {
    /// The pause that was asked for has not been answered.
    AwaitingPause,
    /// ROLLED_BACK is not durable yet.
    Recording,
    /// The guest is being brought back.
    Resuming,
    /// That failed.
    ResumeFailed,
}

/// An attempt that will not be committed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Unwinding {
    pub(super) attempt: Attempt,
    pub(super) reason: WireError,
    /// Whether the guest was paused by it, or may have been.
    pub(super) paused: bool,
    pub(super) step: UnwindStep,
    /// Why the whole migration ends, if it does.
    pub(super) end: Option<WireError>,
}

/// An attempt whose outcome only the register knows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Doubt {
    pub(super) key: AttemptKey,
    pub(super) ask: Ask,
    pub(super) failures: u8,
    /// Why the whole migration ends if it turns out aborted.
    pub(super) end: Option<WireError>,
}

/// Where something that is carried out once and may be repeated stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Its record is not durable yet.
    Recording,
    /// It is being done.
    Doing,
    /// It failed.
    Failed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum State {
    Copying {
        last: Attempt,
    },
    Opening {
        attempt: Attempt,
        run_state: RunState,
    },
    RecordingPausing {
        attempt: Attempt,
    },
    Pausing {
        attempt: Attempt,
    },
    Streaming {
        attempt: Attempt,
    },
    AwaitingPrepared {
        attempt: Attempt,
    },
    Checking {
        key: AttemptKey,
    },
    /// COMMITTING is handed to the journal: in doubt from here on (`[HAND-3]`, `[HAND-8]`).
    RecordingCommitting(Doubt),
    InDoubt(Doubt),
    Unwinding(Unwinding),
    Releasing {
        key: AttemptKey,
        step: Step,
    },
    Fencing {
        key: AttemptKey,
        step: Step,
    },
    Ending {
        last: Attempt,
        reason: WireError,
        step: Step,
    },
    Done {
        record: SourceState,
        end: SourceEnd,
    },
}

impl State {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Copying { .. } => "COPYING",
            Self::Opening { .. } => "OPENING",
            Self::RecordingPausing { .. } => "RECORDING-PAUSING",
            Self::Pausing { .. } => "PAUSING",
            Self::Streaming { .. } => "STREAMING",
            Self::AwaitingPrepared { .. } => "AWAITING-PREPARED",
            Self::Checking { .. } => "CHECKING",
            Self::RecordingCommitting(_) => "RECORDING-COMMITTING",
            Self::InDoubt(_) => "IN-DOUBT",
            Self::Unwinding(unwinding) => match unwinding.step {
                UnwindStep::AwaitingPause => "UNWINDING(awaiting pause)",
                UnwindStep::Recording => "UNWINDING(recording)",
                UnwindStep::Resuming => "UNWINDING(resuming)",
                UnwindStep::ResumeFailed => "UNWINDING(resume failed)",
            },
            Self::Releasing { step, .. } => match step {
                Step::Recording => "RELEASING(recording)",
                Step::Doing => "RELEASING(letting go)",
                Step::Failed => "RELEASING(failed)",
            },
            Self::Fencing { step, .. } => match step {
                Step::Recording => "FENCING(recording)",
                Step::Doing => "FENCING(doing)",
                Step::Failed => "FENCING(failed)",
            },
            Self::Ending { step, .. } => match step {
                Step::Recording => "ENDING(recording)",
                Step::Doing | Step::Failed => "ENDING(telling the destination)",
            },
            Self::Done { .. } => "DONE",
        }
    }

    /// What the state takes, for an error's text.
    pub(super) const fn expects(&self) -> &'static str {
        match self {
            Self::Copying { .. } => "ConnectWanted, BeginCutover or Cancel",
            Self::Opening { .. } => "AttemptOpened or an end of the attempt",
            Self::RecordingPausing { .. } => "Recorded, RecordFailed or an end of the attempt",
            Self::Pausing { .. } => "GuestPaused, PauseFailed or an end of the attempt",
            Self::Streaming { .. } => "FinalSent, StreamFailed or an end of the attempt",
            Self::AwaitingPrepared { .. } => {
                "Prepared of this attempt and register, or an end of the attempt"
            }
            Self::Checking { .. } => "StillPaused, GuestTouched or an end of the attempt",
            Self::RecordingCommitting(_) => "Recorded or RecordFailed",
            Self::InDoubt(_) => "Outcome, ConnectWanted, Cancel or an operator's resolve",
            Self::Unwinding(unwinding) => match unwinding.step {
                UnwindStep::AwaitingPause => "GuestPaused or PauseFailed",
                UnwindStep::Recording => "Recorded, RecordFailed or Retry",
                UnwindStep::Resuming => "Resumed, GuestGone or ResumeFailed",
                UnwindStep::ResumeFailed => "Retry",
            },
            Self::Releasing { .. } => "Recorded, RecordFailed, Released, ReleaseFailed or Retry",
            Self::Fencing { .. } => "Recorded, RecordFailed, the end of the action, or Retry",
            Self::Ending { .. } => "Recorded, RecordFailed or Cancelled",
            Self::Done { .. } => "nothing",
        }
    }

    /// The last attempt that was opened; 0 if none.
    pub(super) const fn attempt(&self) -> Attempt {
        match self {
            Self::Copying { last } | Self::Ending { last, .. } => *last,
            Self::Opening { attempt, .. }
            | Self::RecordingPausing { attempt }
            | Self::Pausing { attempt }
            | Self::Streaming { attempt }
            | Self::AwaitingPrepared { attempt } => *attempt,
            Self::Checking { key } | Self::Releasing { key, .. } | Self::Fencing { key, .. } => {
                key.attempt
            }
            Self::RecordingCommitting(doubt) | Self::InDoubt(doubt) => doubt.key.attempt,
            Self::Unwinding(unwinding) => unwinding.attempt,
            Self::Done { record, .. } => record.attempt(),
        }
    }

    /// What the journal should hold in this state.
    ///
    /// The rules about order live here and in `on_recorded`: a state that needs a record has it as its wish, and the
    /// action that the record permits is issued only once the wish is durable.
    pub(super) fn wanted(&self) -> SourceState {
        match self {
            Self::Copying { last } => SourceState::Copying { last: *last },
            // Not yet opened as far as this side's journal is concerned: nothing was paused.
            Self::Opening { attempt, .. } => SourceState::Copying {
                last: Attempt(attempt.0.saturating_sub(1)),
            },
            Self::RecordingPausing { attempt }
            | Self::Pausing { attempt }
            | Self::Streaming { attempt }
            | Self::AwaitingPrepared { attempt } => SourceState::Pausing { attempt: *attempt },
            Self::Checking { key } => SourceState::Pausing {
                attempt: key.attempt,
            },
            Self::RecordingCommitting(doubt) | Self::InDoubt(doubt) => {
                SourceState::Committing { key: doubt.key }
            }
            Self::Unwinding(unwinding) => match unwinding.step {
                UnwindStep::AwaitingPause => SourceState::Pausing {
                    attempt: unwinding.attempt,
                },
                UnwindStep::Recording | UnwindStep::Resuming | UnwindStep::ResumeFailed => {
                    SourceState::RolledBack {
                        attempt: unwinding.attempt,
                        reason: unwinding.reason.clone(),
                    }
                }
            },
            Self::Releasing { key, .. } => SourceState::Released { key: *key },
            Self::Fencing { key, .. } => SourceState::Fenced { key: *key },
            Self::Ending { last, reason, .. } => SourceState::Ended {
                last: *last,
                reason: reason.clone(),
            },
            Self::Done { record, .. } => record.clone(),
        }
    }
}
