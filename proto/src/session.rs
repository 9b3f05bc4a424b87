//! What both session machines share: the violation, and the agreement on version and features.
//!
//! A session is one control stream from `Hello` to its end. `session_source` and `session_destination` say which message is
//! legal when; the handover machines say what it means.

use crate::error::{ErrorCode, WireError};
use crate::message::Hello;
use crate::version::{Features, ProtocolVersion, SUPPORTED};

/// A message that may not come now. The session is closed with [`to_wire`](Self::to_wire); the guest is not harmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("in phase {phase} the peer may send {expected}, but it sent {got}")]
pub struct ProtocolViolation {
    /// Where the session was.
    pub phase: &'static str,
    /// What was legal.
    pub expected: &'static str,
    /// What came.
    pub got: String,
}

impl ProtocolViolation {
    /// What the peer is told.
    #[must_use]
    pub fn to_wire(&self) -> WireError {
        WireError::new(ErrorCode::ProtocolViolation, self.to_string())
    }
}

/// What the peer is told of a message that the handover machine did not expect.
impl From<&crate::handover::Unexpected> for WireError {
    fn from(unexpected: &crate::handover::Unexpected) -> Self {
        Self::new(ErrorCode::ProtocolViolation, unexpected.to_string())
    }
}

/// Version and features of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreement {
    /// Newest version that both speak.
    pub version: ProtocolVersion,
    /// Features that both have.
    pub features: Features,
}

/// Agrees with the sender of `hello`.
///
/// # Errors
///
/// The refusal to send, where there is no version in common.
pub fn agree(hello: &Hello) -> Result<Agreement, WireError> {
    let Some(version) = SUPPORTED.agree(hello.versions) else {
        return Err(WireError::new(
            ErrorCode::VersionMismatch,
            format!(
                "the source speaks protocol versions {} to {}, this destination {} to {}: update the older one",
                hello.versions.min.0, hello.versions.max.0, SUPPORTED.min.0, SUPPORTED.max.0
            ),
        ));
    };
    Ok(Agreement {
        version,
        features: Features::supported().common(&hello.features),
    })
}
