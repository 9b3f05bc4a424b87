//! Answers about migrations that a newer one of the guest has replaced (`[HAND-16]`).
//!
//! Owns one short session: `Welcome`, then an answer for each question. A source asks here that lost its last answer and has been in doubt since,
//! while its guest moved on. It decides nothing and touches no guest: the record says what became of each attempt.

use std::time::Duration;

use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{DestinationEvent, DestinationRecord, RegisterAnswer};
use vmferry_proto::ids::{MigrationId, RegisterId};
use vmferry_proto::message::{AttemptKey, Outcome, ToSource, Verdict};
use vmferry_proto::session_destination::DestinationSessionEvent;

use crate::admission;
use crate::migration::AGENT;
use crate::session::{self, Opening};
use vmferry_common::causes::chain;

/// Longest time of such a session: the source has its guest to let go or to resume in it.
const SESSION_TIME: Duration = Duration::from_secs(60);

/// Answers the questions of `opening` from `record` until the source parts.
pub(crate) async fn answer(opening: Opening, record: DestinationRecord, register: RegisterId) {
    tracing::info!(peer = %opening.peer, guest = %opening.hello.guest, migration_id = %opening.hello.migration, "asked about an earlier migration");
    let welcome = match admission::welcome(&opening.hello, register, AGENT) {
        Ok(welcome) => welcome,
        Err(error) => return opening.refuse(&error),
    };
    let Opening {
        hello,
        connection,
        outgoing,
        mut messages,
        ..
    } = opening;
    let answers = Answers {
        record,
        register,
        migration: hello.migration,
    };
    outgoing.send(ToSource::Welcome(welcome));
    let asked = async {
        loop {
            let message = match messages.recv().await {
                Ok(Some(message)) => message,
                Ok(None) => return Ok(()),
                Err(error) => {
                    tracing::debug!("control stream: {}", chain(&error));
                    return Ok(());
                }
            };
            match answers.to(outgoing.heard(message)?)? {
                Some(answer) => outgoing.send(answer),
                None => return Ok(()),
            };
        }
    };
    let ended = tokio::time::timeout(SESSION_TIME, asked).await;
    match ended {
        Ok(Err(error)) => session::refuse(outgoing, vec![connection], &error),
        Ok(Ok(())) | Err(_) => session::part(outgoing, vec![connection], 0, "done"),
    }
}

/// What a replaced migration's source may hear.
struct Answers {
    record: DestinationRecord,
    register: RegisterId,
    migration: MigrationId,
}

impl Answers {
    /// The answer to `message`; `None` where the source parts.
    fn to(&self, message: DestinationSessionEvent) -> Result<Option<ToSource>, WireError> {
        let DestinationSessionEvent::Handover(event) = message else {
            return match message {
                DestinationSessionEvent::Goodbye | DestinationSessionEvent::PeerError(_) => {
                    Ok(None)
                }
                _ => Err(replaced()),
            };
        };
        match event {
            DestinationEvent::Commit(key) | DestinationEvent::Query(key) => {
                Ok(Some(self.outcome(key)))
            }
            DestinationEvent::Abort { attempt, .. } => Ok(Some(self.outcome(AttemptKey {
                migration: self.migration,
                attempt,
                register: self.register,
            }))),
            // Nothing of it is left here.
            DestinationEvent::Cancel { .. } => Ok(Some(ToSource::Cancelled)),
            _ => Err(replaced()),
        }
    }

    fn outcome(&self, key: AttemptKey) -> ToSource {
        let verdict = if key.migration == self.migration {
            match self.record.answer(&key) {
                RegisterAnswer::Settled(verdict) => verdict,
                RegisterAnswer::Undecided => Verdict::Unknown,
            }
        } else {
            Verdict::Unknown
        };
        ToSource::Outcome(Outcome { key, verdict })
    }
}

fn replaced() -> WireError {
    WireError::new(
        ErrorCode::StaleSession,
        "a newer migration of this guest has replaced this one here: it can only be asked about; begin a new migration",
    )
}
