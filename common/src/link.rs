//! Why a connection ended, told to people and to the code that decides about another try.
//!
//! Owns the reading of quinn's errors. A refused certificate shows up late and in TLS's words; here it gets
//! its own variant with the next step, on the side that refused as on the side that was refused.

use quinn::{ConnectionError, ReadError, WriteError};

/// Why a connection ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// The peer does not accept this side's certificate.
    #[error("{peer} refused this host's certificate: {reason}")]
    RefusedByPeer {
        /// The peer.
        peer: String,
        /// Why, with the next step.
        reason: String,
    },
    /// This side does not accept the peer's certificate.
    #[error("the certificate of {peer} was refused here: {reason}")]
    PeerRefused {
        /// The peer.
        peer: String,
        /// Why, with the next step.
        reason: String,
    },
    /// The other program speaks another protocol.
    #[error(
        "{peer} does not speak vmferry/1: is another program, or a very different version, listening there?"
    )]
    NotVmferry {
        /// The peer.
        peer: String,
    },
    /// The peer closed the connection in its own words.
    #[error("{peer} closed the connection: {reason}")]
    ClosedByPeer {
        /// The peer.
        peer: String,
        /// Application code of the close.
        code: u64,
        /// What it said.
        reason: String,
    },
    /// Nothing was heard of the peer for the idle time-out.
    #[error("{peer} was not heard of any more: the link, the host or its agent is down")]
    TimedOut {
        /// The peer.
        peer: String,
    },
    /// The peer knows nothing of the connection: its agent was restarted.
    #[error("the agent at {peer} was restarted")]
    Reset {
        /// The peer.
        peer: String,
    },
    /// This side closed the connection.
    #[error("the connection to {peer} was closed here")]
    ClosedHere {
        /// The peer.
        peer: String,
    },
    /// One stream of the connection was given up by the peer.
    #[error("{peer} gave up a stream (code {code})")]
    StreamStopped {
        /// The peer.
        peer: String,
        /// Application code.
        code: u64,
    },
    /// The peer broke QUIC itself, or the transport failed.
    #[error("the connection to {peer} failed: {reason}")]
    Transport {
        /// The peer.
        peer: String,
        /// What quinn says.
        reason: String,
    },
}

/// TLS alerts travel as QUIC error codes from here on (RFC 9001, 4.8).
const CRYPTO_BASE: u64 = 0x100;
/// TLS alert `no_application_protocol`.
const ALERT_NO_PROTOCOL: u64 = 120;
/// TLS alerts about a certificate: bad, unsupported, revoked, expired, unknown, unknown CA, access denied, bad
/// signature, required. Any other tells of a broken or foreign program.
const CERTIFICATE_ALERTS: [u64; 9] = [42, 43, 44, 45, 46, 48, 49, 51, 116];

impl LinkError {
    /// Reads quinn's error about the connection to `peer`.
    #[must_use]
    pub fn of(error: &ConnectionError, peer: &str) -> Self {
        let peer = peer.to_owned();
        match error {
            ConnectionError::TransportError(error) => match alert(u64::from(error.code)) {
                Some(ALERT_NO_PROTOCOL) => Self::NotVmferry { peer },
                Some(alert) if CERTIFICATE_ALERTS.contains(&alert) => Self::PeerRefused {
                    reason: refusal_here(&error.reason),
                    peer,
                },
                Some(_) | None => Self::Transport {
                    peer,
                    reason: error.to_string(),
                },
            },
            ConnectionError::ConnectionClosed(close) => match alert(u64::from(close.error_code)) {
                Some(ALERT_NO_PROTOCOL) => Self::NotVmferry { peer },
                Some(alert) if CERTIFICATE_ALERTS.contains(&alert) => Self::RefusedByPeer {
                    reason: refusal_there(alert),
                    peer,
                },
                Some(_) | None => Self::Transport {
                    peer,
                    reason: peer_text(error.to_string().as_bytes()),
                },
            },
            ConnectionError::ApplicationClosed(close) => Self::ClosedByPeer {
                peer,
                code: close.error_code.into_inner(),
                reason: peer_text(&close.reason),
            },
            ConnectionError::Reset => Self::Reset { peer },
            ConnectionError::TimedOut => Self::TimedOut { peer },
            ConnectionError::LocallyClosed => Self::ClosedHere { peer },
            ConnectionError::VersionMismatch => Self::NotVmferry { peer },
            ConnectionError::CidsExhausted => Self::Transport {
                peer,
                reason: error.to_string(),
            },
        }
    }

    /// Reads an error of a stream that this side reads.
    #[must_use]
    pub fn of_read(error: &ReadError, peer: &str) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::of(error, peer),
            ReadError::Reset(code) => Self::StreamStopped {
                peer: peer.to_owned(),
                code: code.into_inner(),
            },
            ReadError::ClosedStream
            | ReadError::IllegalOrderedRead
            | ReadError::ZeroRttRejected => Self::Transport {
                peer: peer.to_owned(),
                reason: error.to_string(),
            },
        }
    }

    /// Reads an error of a stream that this side writes.
    #[must_use]
    pub fn of_write(error: &WriteError, peer: &str) -> Self {
        match error {
            WriteError::ConnectionLost(error) => Self::of(error, peer),
            WriteError::Stopped(code) => Self::StreamStopped {
                peer: peer.to_owned(),
                code: code.into_inner(),
            },
            WriteError::ClosedStream | WriteError::ZeroRttRejected => Self::Transport {
                peer: peer.to_owned(),
                reason: error.to_string(),
            },
        }
    }

    /// Whether a certificate was refused, on either side.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::RefusedByPeer { .. } | Self::PeerRefused { .. })
    }

    /// Whether another try can go better without anybody doing anything: the link was lost, not refused.
    #[must_use]
    pub const fn is_lost_link(&self) -> bool {
        match self {
            Self::TimedOut { .. } | Self::Reset { .. } | Self::Transport { .. } => true,
            Self::RefusedByPeer { .. }
            | Self::PeerRefused { .. }
            | Self::NotVmferry { .. }
            | Self::ClosedByPeer { .. }
            | Self::ClosedHere { .. }
            | Self::StreamStopped { .. } => false,
        }
    }
}

fn alert(code: u64) -> Option<u64> {
    (CRYPTO_BASE..CRYPTO_BASE + 0x100)
        .contains(&code)
        .then(|| code - CRYPTO_BASE)
}

/// What the peer said, made safe to print: cut, and without control characters.
fn peer_text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean: String = text
        .chars()
        .take(500)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if clean.is_empty() {
        "without a word".to_owned()
    } else {
        clean
    }
}

/// Why this side refused, from rustls's words, which name the certificate's fault well.
fn refusal_here(reason: &str) -> String {
    let reason = reason
        .strip_prefix("invalid peer certificate: ")
        .unwrap_or(reason);
    let next = if reason.contains("expired") {
        "issue it a new identity with `vmferry-certs issue`"
    } else if reason.contains("not valid yet") || reason.contains("NotValidYet") {
        "compare the clocks of both hosts"
    } else if reason.contains("not valid for name") || reason.contains("NotValidForName") {
        "connect to a name or address in its certificate, or issue it one with --address"
    } else if reason.contains("InvalidPurpose") || reason.contains("extended key usage") {
        "it is not meant for this role: issue it anew with `vmferry-certs issue`, which allows both"
    } else if reason.contains("UnknownIssuer") || reason.contains("BadSignature") {
        "it was issued by another CA than the ca.pem here"
    } else if reason.contains("sent no certificate") || reason.contains("peer sent no certificates")
    {
        "it showed none; give it one with `vmferry-certs issue`"
    } else {
        "issue it anew with `vmferry-certs issue`"
    };
    format!("{reason}: {next}")
}

/// Why the peer refused: only the TLS alert comes across.
fn refusal_there(alert: u64) -> String {
    let text = match alert {
        // What rustls says of a name that does not fit.
        42 => {
            "it does not carry the name that was asked for, or is malformed (bad_certificate): issue it with --name and --address as others reach this host"
        }
        43 => {
            "it is not meant for this use (unsupported_certificate): issue it with `vmferry-certs issue`"
        }
        44 => "it is revoked: issue a new one",
        45 => "it has expired, or a clock is wrong: issue a new one with `vmferry-certs issue`",
        46 => "it is not acceptable there (certificate_unknown): does it carry the right names?",
        48 | 51 => {
            "it is not of the CA that is trusted there: both hosts need certificates of one CA"
        }
        116 => "a certificate is required and none was shown",
        other => return format!("TLS alert {other}"),
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::{LinkError, peer_text};
    use quinn::ConnectionError;

    #[test]
    fn only_a_lost_link_is_tried_again() {
        let lost = LinkError::of(&ConnectionError::TimedOut, "beta");
        assert!(lost.is_lost_link());
        assert!(LinkError::of(&ConnectionError::Reset, "beta").is_lost_link());
        let here = LinkError::of(&ConnectionError::LocallyClosed, "beta");
        assert!(!here.is_lost_link());
        assert_eq!(here.to_string(), "the connection to beta was closed here");
    }

    #[test]
    fn the_words_of_a_peer_cannot_drive_the_terminal() {
        assert_eq!(peer_text(b"\x1b[2Jhello\n"), " [2Jhello ");
        assert_eq!(peer_text(&[b'x'; 9000]).len(), 500);
        assert_eq!(peer_text(b""), "without a word");
    }
}
