//! What can go wrong on an NBD connection.

use std::io;

use crate::error::GuestError;

/// An NBD connection or request failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The socket could not be connected, read or written.
    #[error("NBD export {export}: {what}")]
    Io {
        /// The export.
        export: String,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The server refused the export or a feature that is needed.
    #[error("NBD export {export} was refused: {why}")]
    Refused {
        /// The export.
        export: String,
        /// What the server said.
        why: String,
    },
    /// The server broke the protocol; the connection is closed.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(String),
    /// The server could not carry out a request.
    #[error("NBD {request} at byte {offset} failed")]
    Failed {
        /// The request.
        request: &'static str,
        /// First byte it was for.
        offset: u64,
        /// What the server said.
        #[source]
        source: io::Error,
    },
    /// The connection ended before the answer.
    #[error("the NBD connection ended: {0}")]
    Closed(String),
    /// No answer in time.
    #[error("NBD {request} was not answered within {seconds} s")]
    TimedOut {
        /// The request.
        request: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The request does not fit the export: a mistake of the caller.
    #[error("NBD {request} of {len} bytes at byte {offset} is outside the export of {size} bytes")]
    OutOfRange {
        /// The request.
        request: &'static str,
        /// First byte.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// Size of the export in bytes.
        size: u64,
    },
}

impl From<NbdError> for GuestError {
    fn from(error: NbdError) -> Self {
        let text = error.to_string();
        match error {
            NbdError::Failed { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Self::NoSpace(format!(
                    "{text}: no space left for the disk image; free some and migrate again"
                ))
            }
            NbdError::Io { source, .. } | NbdError::Failed { source, .. } => {
                Self::Io { what: text, source }
            }
            NbdError::TimedOut { request, seconds } => Self::TimedOut {
                command: format!("NBD {request}"),
                seconds,
            },
            NbdError::Closed(why) => Self::Io {
                what: "the NBD connection ended".to_owned(),
                source: io::Error::new(io::ErrorKind::UnexpectedEof, why),
            },
            NbdError::Refused { .. } | NbdError::Protocol(_) | NbdError::OutOfRange { .. } => {
                Self::Refused {
                    command: "NBD".to_owned(),
                    answer: text,
                }
            }
        }
    }
}
