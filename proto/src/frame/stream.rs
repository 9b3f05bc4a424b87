//! The header that a unidirectional stream begins with: what the stream is for, and of which session.

use serde::{Deserialize, Serialize};

use super::LAYOUT_VERSION;
use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, Lane, MigrationId, SessionNumber};
use crate::layout;
use crate::limits;

/// What a unidirectional stream is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// A data lane.
    Lane {
        /// Which one.
        lane: Lane,
    },
    /// The device state of an attempt: the bytes that the `DeviceState` message announced, then the end.
    DeviceState {
        /// The attempt.
        attempt: Attempt,
    },
}

/// What a unidirectional stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// What it is for.
    pub kind: StreamKind,
    /// The session: a stream of another one is refused.
    pub session: SessionNumber,
    /// The migration, likewise.
    pub migration: MigrationId,
}

/// The layout: fields in this order.
#[derive(Serialize, Deserialize)]
struct RawStreamHeader {
    version: u8,
    kind: u8,
    reserved: u16,
    number: u32,
    session: u64,
    migration: [u8; 16],
}

/// A stream header that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamHeaderError {
    /// Another layout.
    #[error("layout version {got} instead of {LAYOUT_VERSION}")]
    Version {
        /// What came.
        got: u8,
    },
    /// A kind that this version does not have.
    #[error("unknown kind of stream {got}")]
    Kind {
        /// What came.
        got: u8,
    },
    /// Reserved bytes that are not zero.
    #[error("reserved bytes are not zero")]
    Reserved,
    /// A lane that the session does not have.
    #[error("lane {got} of a session with {lanes} lanes")]
    Lane {
        /// What came.
        got: u32,
        /// How many there are (at most, where the session is not known yet).
        lanes: u8,
    },
    /// Attempts are counted from 1.
    #[error("attempt 0")]
    Attempt,
    /// A stream of another session or migration.
    #[error("stream of session {got}, but this is session {expected} of its migration")]
    Session {
        /// What had to come.
        expected: SessionNumber,
        /// What came.
        got: SessionNumber,
    },
    /// A stream of another migration.
    #[error("stream of migration {got}")]
    Migration {
        /// What came.
        got: MigrationId,
    },
}

impl From<StreamHeaderError> for WireError {
    fn from(error: StreamHeaderError) -> Self {
        Self::new(
            ErrorCode::ProtocolViolation,
            format!("bad stream header: {error}"),
        )
    }
}

impl StreamHeader {
    /// Bytes of a header.
    pub const ENCODED_LEN: usize = 32;

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::ENCODED_LEN] {
        let (kind, number) = match self.kind {
            StreamKind::Lane { lane } => (0, u32::from(lane.0)),
            StreamKind::DeviceState { attempt } => (1, attempt.0),
        };
        let raw = RawStreamHeader {
            version: LAYOUT_VERSION,
            kind,
            reserved: 0,
            number,
            session: self.session.0,
            migration: *self.migration.as_bytes(),
        };
        layout::encode_fixed(&raw).expect("integers and arrays of them always take the same bytes")
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Any but [`StreamHeaderError::Session`] and [`StreamHeaderError::Migration`].
    pub fn decode(bytes: &[u8; Self::ENCODED_LEN]) -> Result<Self, StreamHeaderError> {
        if bytes[0] != LAYOUT_VERSION {
            return Err(StreamHeaderError::Version { got: bytes[0] });
        }
        let raw: RawStreamHeader =
            layout::decode(bytes).expect("any bytes of this length are integers");
        if raw.reserved != 0 {
            return Err(StreamHeaderError::Reserved);
        }
        Ok(Self {
            kind: Self::decode_kind(raw.kind, raw.number)?,
            session: SessionNumber(raw.session),
            migration: MigrationId::from_bytes(raw.migration),
        })
    }

    fn decode_kind(kind: u8, number: u32) -> Result<StreamKind, StreamHeaderError> {
        match kind {
            0 => {
                let lane = u8::try_from(number)
                    .ok()
                    .filter(|lane| *lane < limits::MAX_LANES)
                    .ok_or(StreamHeaderError::Lane {
                        got: number,
                        lanes: limits::MAX_LANES,
                    })?;
                Ok(StreamKind::Lane { lane: Lane(lane) })
            }
            1 if number == 0 => Err(StreamHeaderError::Attempt),
            1 => Ok(StreamKind::DeviceState {
                attempt: Attempt(number),
            }),
            got => Err(StreamHeaderError::Kind { got }),
        }
    }

    /// Checks that the stream belongs to session `session` of `migration`, which has `lanes` lanes.
    ///
    /// # Errors
    /// [`StreamHeaderError::Migration`], [`StreamHeaderError::Session`] or [`StreamHeaderError::Lane`].
    pub fn check(
        &self,
        migration: MigrationId,
        session: SessionNumber,
        lanes: u8,
    ) -> Result<(), StreamHeaderError> {
        if self.migration != migration {
            return Err(StreamHeaderError::Migration {
                got: self.migration,
            });
        }
        if self.session != session {
            return Err(StreamHeaderError::Session {
                expected: session,
                got: self.session,
            });
        }
        match self.kind {
            StreamKind::Lane { lane } if lane.0 >= lanes => Err(StreamHeaderError::Lane {
                got: u32::from(lane.0),
                lanes,
            }),
            StreamKind::Lane { .. } | StreamKind::DeviceState { .. } => Ok(()),
        }
    }
}
