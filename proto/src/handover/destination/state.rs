//! The states of the destination's machine: each carries only its own data.

use crate::error::WireError;
use crate::ids::Attempt;
use crate::spec::RunState;

use super::super::record::DestinationState;

/// The session, beside the handover's own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Link {
    /// None.
    Down,
    /// Its number is being made durable.
    Numbering,
    /// `Welcome` was sent; nothing was offered.
    Welcomed,
    /// `Offer` waits for `Ready`.
    Offered,
    /// `Ready` was sent.
    Ready,
}

/// The copy that takes the guest's content, beside the handover's own state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum GuestCopy {
    /// None.
    Missing,
    /// Being made.
    Making,
    /// It takes content.
    Receiving,
    /// Device state is being loaded.
    Loading,
    /// It was loaded, or may have been: used up but for a start.
    Used,
}

/// Where something that may have to be repeated stands.
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
    Receiving,
    Opening {
        attempt: Attempt,
    },
    Opened {
        attempt: Attempt,
    },
    Loading {
        attempt: Attempt,
        to: RunState,
    },
    Prepared {
        attempt: Attempt,
        to: RunState,
    },
    /// OWNED is handed to the journal. `fresh` is false after a restart: an earlier process may have started the guest.
    Owning {
        attempt: Attempt,
        to: RunState,
        fresh: bool,
    },
    Starting {
        attempt: Attempt,
        to: RunState,
        fresh: bool,
    },
    Owned {
        attempt: Attempt,
        to: RunState,
        started: bool,
    },
    Relinquishing {
        attempt: Attempt,
        reason: WireError,
    },
    Aborting {
        attempt: Attempt,
        reason: WireError,
        /// An attempt that waits for this one to be settled.
        then_open: Option<Attempt>,
    },
    /// ABORTED or RELINQUISHED is durable.
    Settled {
        record: DestinationState,
    },
    Ending {
        last: Attempt,
        reason: WireError,
        step: Step,
        /// Whether the source waits for `Cancelled`.
        asked: bool,
    },
    Ended {
        last: Attempt,
        reason: WireError,
    },
}

impl State {
    pub(super) const fn name(&self) -> &'static str {
        match self {
            Self::Receiving => "RECEIVING",
            Self::Opening { .. } => "OPENING",
            Self::Opened { .. } => "OPENED",
            Self::Loading { .. } => "LOADING",
            Self::Prepared { .. } => "PREPARED",
            Self::Owning { fresh: true, .. } => "OWNING",
            Self::Owning { fresh: false, .. } => "OWNING(after restart)",
            Self::Starting { fresh: true, .. } => "STARTING",
            Self::Starting { fresh: false, .. } => "STARTING(again)",
            Self::Owned { started: true, .. } => "OWNED",
            Self::Owned { started: false, .. } => "OWNED(start uncertain)",
            Self::Relinquishing { .. } => "RELINQUISHING",
            Self::Aborting { .. } => "ABORTING",
            Self::Settled { record } => match record {
                DestinationState::Relinquished { .. } => "SETTLED(relinquished)",
                DestinationState::Receiving
                | DestinationState::Opened { .. }
                | DestinationState::Owned { .. }
                | DestinationState::Aborted { .. }
                | DestinationState::Ended { .. } => "SETTLED(aborted)",
            },
            Self::Ending { step, .. } => match step {
                Step::Recording => "ENDING(recording)",
                Step::Doing => "ENDING(discarding)",
                Step::Failed => "ENDING(discard failed)",
            },
            Self::Ended { .. } => "ENDED",
        }
    }

    /// What the state takes, for an error's text.
    pub(super) const fn expects(&self) -> &'static str {
        match self {
            Self::Receiving => "an offer, or OpenAttempt with a copy that takes content",
            Self::Opening { .. } => "Recorded or RecordFailed",
            Self::Opened { .. } => "StateReceived, or an end of the attempt",
            Self::Loading { .. } => "StateLoaded, LoadFailed, or an end of the attempt",
            Self::Prepared { .. } => "Commit, Query or Abort",
            Self::Owning { .. } => "Recorded or RecordFailed",
            Self::Starting { .. } => "Started or StartFailed",
            Self::Owned { .. } => "Commit or Query",
            Self::Relinquishing { .. } | Self::Aborting { .. } => "Recorded, RecordFailed or Retry",
            Self::Settled { .. } => {
                "an offer, a question, or OpenAttempt with a copy that takes content"
            }
            Self::Ending { .. } => "Recorded, RecordFailed, Discarded, DiscardFailed or Retry",
            Self::Ended { .. } => "a question",
        }
    }

    /// The last attempt that was opened; 0 if none.
    pub(super) const fn attempt(&self) -> Attempt {
        match self {
            Self::Receiving => Attempt(0),
            Self::Opening { attempt }
            | Self::Opened { attempt }
            | Self::Loading { attempt, .. }
            | Self::Prepared { attempt, .. }
            | Self::Owning { attempt, .. }
            | Self::Starting { attempt, .. }
            | Self::Owned { attempt, .. }
            | Self::Relinquishing { attempt, .. }
            | Self::Aborting { attempt, .. } => *attempt,
            Self::Settled { record } => record.attempt(),
            Self::Ending { last, .. } | Self::Ended { last, .. } => *last,
        }
    }

    /// Whether an attempt is open that a question would settle.
    pub(super) const fn is_undecided(&self) -> bool {
        match self {
            Self::Opening { .. }
            | Self::Opened { .. }
            | Self::Loading { .. }
            | Self::Prepared { .. } => true,
            Self::Receiving
            | Self::Owning { .. }
            | Self::Starting { .. }
            | Self::Owned { .. }
            | Self::Relinquishing { .. }
            | Self::Aborting { .. }
            | Self::Settled { .. }
            | Self::Ending { .. }
            | Self::Ended { .. } => false,
        }
    }

    /// What the journal should hold in this state: see the source's twin.
    pub(super) fn wanted(&self) -> DestinationState {
        match self {
            Self::Receiving => DestinationState::Receiving,
            Self::Opening { attempt }
            | Self::Opened { attempt }
            | Self::Loading { attempt, .. }
            | Self::Prepared { attempt, .. } => DestinationState::Opened { attempt: *attempt },
            Self::Owning { attempt, to, .. } | Self::Starting { attempt, to, .. } => {
                DestinationState::Owned {
                    attempt: *attempt,
                    to: *to,
                    started: false,
                }
            }
            Self::Owned {
                attempt,
                to,
                started,
            } => DestinationState::Owned {
                attempt: *attempt,
                to: *to,
                started: *started,
            },
            Self::Relinquishing { attempt, reason } => DestinationState::Relinquished {
                attempt: *attempt,
                reason: reason.clone(),
            },
            Self::Aborting {
                attempt, reason, ..
            } => DestinationState::Aborted {
                attempt: *attempt,
                reason: reason.clone(),
            },
            Self::Settled { record } => record.clone(),
            Self::Ending { last, reason, .. } | Self::Ended { last, reason } => {
                DestinationState::Ended {
                    last: *last,
                    reason: reason.clone(),
                }
            }
        }
    }
}
