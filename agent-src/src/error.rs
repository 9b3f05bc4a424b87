//! Why a migration stopped going forward, in one type that the script of phases decides on.
//!
//! Owns the classes: lost link (go on after a reconnect), somebody's wish, the peer's answer, the guest,
//! and this host. Before COMMITTING every one of them ends with the guest at the source; after it none of
//! them is reachable by the ordinary rollback path (`[HAND-4]`).

use std::time::Duration;

use vmferry_common::causes::chain;
use vmferry_common::control::ControlError;
use vmferry_common::endpoint::ConnectError;
use vmferry_common::hooks::HookFailure;
use vmferry_common::journal::JournalError;
use vmferry_common::units::Span;
use vmferry_hypervisor::{GuestError, GuestLife, PauseError};
use vmferry_proto::error::{ErrorCode, WireError};

use crate::lanes::LaneError;
use crate::policy::GiveUp;

/// Why the migration cannot go on as it is.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// The connection is gone; in pre-copy the copy goes on over a new one.
    #[error("the connection to the destination was lost")]
    SessionLost(#[source] LinkError),
    /// No connection could be made.
    #[error("no session with the destination")]
    Connect(#[source] ConnectError),
    /// Somebody asked for the end.
    #[error("cancelled by {0}")]
    Cancelled(&'static str),
    /// The destination refused or gave up.
    #[error("the destination says: {}", .0.detail)]
    Peer(WireError),
    /// The destination broke the protocol.
    #[error("the destination broke the protocol: {}", .0.detail)]
    Protocol(WireError),
    /// The guest's driver failed.
    #[error("the guest's hypervisor failed")]
    Guest(#[source] GuestError),
    /// The guest could not be paused.
    #[error("the guest could not be paused for the cutover")]
    Pause(#[source] PauseError),
    /// The guest ended.
    #[error("{}", describe_end(.0))]
    GuestEnded(GuestLife),
    /// A hook said no.
    #[error("a hook refused")]
    Hook(#[source] HookFailure),
    /// The journal cannot be written.
    #[error("the journal cannot be written")]
    Journal(#[source] JournalError),
    /// The policy sees no sense in going on.
    #[error("{0}")]
    GivenUp(Box<GiveUp>),
    /// The whole migration took too long.
    #[error("not done within --timeout {}", Span(*.0))]
    TimedOut(Duration),
    /// The guest would have been paused for too long.
    #[error("the cutover was not done within --pause-timeout {}", Span(*.0))]
    PauseTimedOut(Duration),
    /// The destination could not be reached again.
    #[error("the destination could not be reached again within {}", Span(*.0))]
    Unreachable(Duration),
    /// A lane could not read the guest.
    #[error("the guest could not be read")]
    Read(#[source] LaneError),
    /// An attempt was rolled back, and another one would not fare better.
    #[error("{}", .0.detail)]
    RolledBack(WireError),
    /// The copies differ.
    #[error("the copy differs from the guest: {0}")]
    NotIdentical(String),
    /// Only an earlier agent's work was to be finished.
    #[error("`vmferry-src recover` ended the migration that an earlier agent left")]
    Recovered,
    /// This program broke its own rule.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What broke a session.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The control stream.
    #[error("control stream")]
    Control(#[source] ControlError),
    /// A data lane.
    #[error("data lane")]
    Lane(#[source] LaneError),
    /// The destination closed the control stream without a word.
    #[error("the destination closed the control stream")]
    Closed,
    /// The destination does not have what a frame referred to.
    #[error("the destination gave the session up: {}", .0.detail)]
    GivenUp(WireError),
    /// An attempt was rolled back; the next one begins with a new session.
    #[error("the attempt was rolled back")]
    RolledBack,
    /// The destination does not answer.
    #[error("the destination accepted the connection but did not say Welcome")]
    NoWelcome,
    /// The destination broke the protocol.
    #[error("{}", .0.detail)]
    Protocol(WireError),
}

impl MigrateError {
    /// Whether a new session may go on where this one stopped.
    #[must_use]
    pub const fn is_link_loss(&self) -> bool {
        matches!(self, Self::SessionLost(_))
    }

    /// Whether trying to connect again may help.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::SessionLost(_) => true,
            Self::Connect(error) => error.is_lost_link(),
            // Its copy stays: the agent may come back at once.
            Self::Peer(error) => error.code == ErrorCode::ShuttingDown,
            _ => false,
        }
    }

    /// As it is told to the destination, and under which code it is explained.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        WireError::new(self.code(), chain(self))
    }

    /// The code of this error.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Connect(error) if error.is_refusal() => ErrorCode::NotAuthorized,
            // A client learns of its refused certificate with the first answer (TLS 1.3).
            Self::SessionLost(LinkError::Control(ControlError::Link(link)))
                if link.is_refusal() =>
            {
                ErrorCode::NotAuthorized
            }
            Self::SessionLost(_) | Self::Connect(_) | Self::Unreachable(_) => ErrorCode::LinkLost,
            Self::Cancelled(_) | Self::Recovered => ErrorCode::Cancelled,
            Self::Peer(error) | Self::Protocol(error) | Self::RolledBack(error) => error.code,
            Self::Guest(error) | Self::Pause(PauseError { source: error, .. }) => guest_code(error),
            Self::GuestEnded(_) => ErrorCode::GuestChanged,
            Self::Read(_) => ErrorCode::Hypervisor,
            Self::Hook(_) => ErrorCode::HookVeto,
            Self::Journal(_) => ErrorCode::Journal,
            Self::GivenUp(reason) => reason.code(),
            Self::TimedOut(_) | Self::PauseTimedOut(_) => ErrorCode::TimedOut,
            Self::NotIdentical(_) => ErrorCode::NotIdentical,
            Self::Internal(_) => ErrorCode::Internal,
        }
    }
}

impl From<GuestError> for MigrateError {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

impl From<PauseError> for MigrateError {
    fn from(error: PauseError) -> Self {
        Self::Pause(error)
    }
}

const fn guest_code(error: &GuestError) -> ErrorCode {
    match error {
        GuestError::Gone(_) | GuestError::ShutDown(_) | GuestError::Touched(_) => {
            ErrorCode::GuestChanged
        }
        GuestError::Rebooted => ErrorCode::GuestReset,
        GuestError::Incompatible(_) => ErrorCode::Incompatible,
        GuestError::NoSpace(_) => ErrorCode::NoSpace,
        GuestError::Refused { .. }
        | GuestError::TimedOut { .. }
        | GuestError::Io { .. }
        | GuestError::Tracking(_)
        | GuestError::Config(_) => ErrorCode::Hypervisor,
    }
}

fn describe_end(life: &GuestLife) -> String {
    match life {
        GuestLife::Alive => "the guest is still there".to_owned(),
        GuestLife::ShutDown(how) => format!("the guest was shut down ({how})"),
        GuestLife::Gone(how) => format!("the guest's process is gone ({how})"),
    }
}
