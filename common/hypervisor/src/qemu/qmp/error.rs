//! What can go wrong on a QMP connection, and what each case says of the command that was under way.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::GuestError;

/// A QMP connection or command failed.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there, or we may not connect.
    #[error(
        "cannot connect to the QMP socket {path}: is QEMU running with `-qmp unix:{path},server=on,wait=off`?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Connected, but no greeting: QEMU serves one client per socket.
    #[error(
        "the QMP socket {path} accepted the connection but sent no greeting within {seconds} s: another program is connected to it \
         (QEMU serves one at a time) or QEMU hangs. Start QEMU with a second `-qmp unix:PATH,server=on,wait=off` and name that socket"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// What listens there does not speak QMP.
    #[error("{path} does not speak QMP: {detail}")]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// What it said.
        detail: String,
    },
    /// QEMU answered with an error: the command had no effect.
    #[error("{command}: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of error.
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// QEMU answered, but not as this command is documented.
    #[error("{command}: unexpected answer {answer}")]
    Unexpected {
        /// The command.
        command: String,
        /// The answer, shortened.
        answer: String,
    },
    /// No answer in time. The command may still be carried out.
    #[error("{command} was not answered within {seconds} s")]
    TimedOut {
        /// The command.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The connection ended before the answer. The command may have been carried out.
    #[error("{command}: the QMP connection ended before the answer: {why}")]
    Closed {
        /// The command.
        command: String,
        /// Why it ended.
        why: String,
    },
    /// The connection had already ended: QEMU never saw the command.
    #[error("{command} was not sent: the QMP connection had ended: {why}")]
    NotSent {
        /// The command.
        command: String,
        /// Why it ended.
        why: String,
    },
}

/// Longest piece of an answer that is shown to a person.
const SHOWN: usize = 300;

impl QmpError {
    /// An answer that is not as documented.
    pub fn unexpected(command: &str, answer: &impl Display) -> Self {
        Self::Unexpected {
            command: command.to_owned(),
            answer: answer.to_string().chars().take(SHOWN).collect(),
        }
    }

    pub(super) fn refused(command: &str, error: &Value) -> Self {
        let text = |key: &str| {
            error[key]
                .as_str()
                .unwrap_or("?")
                .chars()
                .take(2000)
                .collect()
        };
        Self::Refused {
            command: command.to_owned(),
            class: text("class"),
            description: text("desc"),
        }
    }

    pub(super) fn not_qmp(path: &Path, detail: impl Display) -> Self {
        Self::NotQmp {
            path: path.to_owned(),
            detail: detail.to_string().chars().take(SHOWN).collect(),
        }
    }

    /// Whether QEMU certainly did not carry the command out: it never saw it, or refused it.
    #[must_use]
    pub const fn had_no_effect(&self) -> bool {
        match self {
            Self::Connect { .. }
            | Self::Busy { .. }
            | Self::NotQmp { .. }
            | Self::Refused { .. }
            | Self::NotSent { .. } => true,
            Self::Unexpected { .. } | Self::TimedOut { .. } | Self::Closed { .. } => false,
        }
    }
}

impl From<QmpError> for GuestError {
    fn from(error: QmpError) -> Self {
        match error {
            QmpError::Connect { path, source } => Self::Io {
                what: format!(
                    "cannot connect to the QMP socket {0}: is QEMU running with `-qmp unix:{0},server=on,wait=off`?",
                    path.display()
                ),
                source,
            },
            QmpError::Refused {
                command,
                description,
                ..
            } => Self::Refused {
                command,
                answer: description,
            },
            QmpError::Unexpected { command, answer } => Self::Refused {
                command,
                answer: format!("unexpected answer {answer}"),
            },
            QmpError::TimedOut { command, seconds } => Self::TimedOut { command, seconds },
            QmpError::Busy { .. } | QmpError::NotQmp { .. } => Self::Config(error.to_string()),
            QmpError::Closed { .. } | QmpError::NotSent { .. } => Self::Gone(error.to_string()),
        }
    }
}
