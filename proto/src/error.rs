//! Coded errors of the wire: what one agent tells the other. Local errors are each crate's own enums;
//! they never go on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An error as it is sent: a code that programs decide on and a detail that people read.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[error("{detail} ({code})")]
pub struct WireError {
    /// What kind of thing went wrong.
    pub code: ErrorCode,
    /// One sentence: thing, cause, next step.
    pub detail: String,
}

impl WireError {
    /// An error with this code. The detail is cut to `limits::MAX_DETAIL` and control characters but newline and
    /// tab become spaces: it may come from a peer and ends up on terminals.
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        if detail.contains(must_not_be_printed) {
            detail = detail.replace(must_not_be_printed, " ");
        }
        let mut end = detail.len().min(crate::limits::MAX_DETAIL);
        while !detail.is_char_boundary(end) {
            end -= 1;
        }
        detail.truncate(end);
        Self { code, detail }
    }
}

fn must_not_be_printed(c: char) -> bool {
    c.is_control() && c != '\n' && c != '\t'
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Kinds of errors. Numbers are part of the protocol and never reused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        #[repr(u32)]
        pub enum ErrorCode {
            $($(#[$doc])* $name = $number,)*
        }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> u32 {
                self as u32
            }

            /// The code with this number.
            #[must_use]
            pub const fn from_number(number: u32) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }

            /// The name that people and scripts see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

codes! {
    /// A message broke the protocol: wrong order, cap exceeded, unknown value, undecodable.
    ProtocolViolation = 1, "protocol-violation";
    /// No protocol version in common.
    VersionMismatch = 2, "version-mismatch";
    /// The sender's identity may not do this (not in `from`, or another identity opened the migration).
    NotAuthorized = 3, "not-authorized";
    /// The destination has no guest file of this name.
    UnknownGuest = 4, "unknown-guest";
    /// Another migration holds the guest here.
    GuestBusy = 5, "guest-busy";
    /// The session number or generation is not above the last one.
    StaleSession = 6, "stale-session";
    /// Guest and destination do not match: machine, CPU, region, device.
    Incompatible = 7, "incompatible";
    /// Not enough memory or disk space.
    NoSpace = 8, "no-space";
    /// The guest's driver failed.
    Hypervisor = 9, "hypervisor";
    /// A hook refused.
    HookVeto = 10, "hook-veto";
    /// A frame was wrong: digest, size, range, encoding.
    BadFrame = 11, "bad-frame";
    /// The copy is not complete or differs.
    NotIdentical = 12, "not-identical";
    /// A limit of time passed.
    TimedOut = 13, "timed-out";
    /// Somebody cancelled.
    Cancelled = 14, "cancelled";
    /// The journal cannot be written or read.
    Journal = 15, "journal";
    /// The guest was touched by somebody else, or ended.
    GuestChanged = 16, "guest-changed";
    /// A bug here.
    Internal = 17, "internal";
    /// The guest dirties faster than the link carries.
    NotConverging = 18, "not-converging";
    /// The agent is told to stop.
    ShuttingDown = 19, "shutting-down";
    /// The connection was lost, or none could be made.
    LinkLost = 20, "link-lost";
    /// The guest reset itself in the moment of the pause.
    GuestReset = 21, "guest-reset";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `[WIRE-41]`: the table of PROTOCOL.md is the registry.
    #[test]
    fn every_code_stands_in_the_protocol_under_its_number_and_name() {
        let text = include_str!("../PROTOCOL.md");
        for code in ErrorCode::ALL {
            let entry = format!("| {} | {} |", code.number(), code.name());
            assert!(text.contains(&entry), "PROTOCOL.md lacks {entry:?}");
            assert_eq!(ErrorCode::from_number(code.number()), Some(*code));
        }
    }

    #[test]
    fn a_detail_is_cut_at_a_character_and_cannot_steer_a_terminal() {
        let max = crate::limits::MAX_DETAIL;
        let detail = "a".repeat(max - 1) + "ä";
        assert_eq!(
            WireError::new(ErrorCode::Internal, detail).detail.len(),
            max - 1
        );
        let error = WireError::new(ErrorCode::Internal, "a\u{1b}[2J\u{9b}b\n\tc");
        assert_eq!(error.detail, "a [2J b\n\tc");
        assert_eq!(error.to_string(), "a [2J b\n\tc (internal)");
    }
}
