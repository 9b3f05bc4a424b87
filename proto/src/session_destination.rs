//! One session at the destination: which of the source's messages is legal when.
//!
//! Owns the order only; `handover` owns what a message means. The agent tells it what it sends (`on_sent`) and gives it what
//! it reads (`on_message`). Invariant: nothing that touches the copy comes out before `Ready`, no device state before `Complete`, no
//! first `Commit` of this session's attempt before `Prepared`; what was sent before the source could know of an abort comes out as `Late`.
//!
//! ```text
//! HELLO -> ADMITTING -> WELCOMED -- Offer --> OFFERED -> COPYING -> OPENING -> OPENED -> FINAL -> COMPLETE -> STATE -> PREPARED
//!                          '-- Commit, Query --> ASKED
//! ```

use crate::error::WireError;
use crate::handover::DestinationEvent;
use crate::ids::Attempt;
use crate::limits::MAX_COMPARES;
use crate::message::{Final, Hello, Offer, ToDestination, ToSource, Verdict, WindowRange};
use crate::session::ProtocolViolation;
use crate::version::{COMPARE, Features};

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Hello,
    Admitting,
    Welcomed,
    Asked,
    Offered,
    Copying,
    Opening { attempt: Attempt },
    Opened { attempt: Attempt },
    Final { attempt: Attempt },
    Complete { attempt: Attempt },
    State { attempt: Attempt },
    Prepared { attempt: Attempt },
    Closed,
}

/// One session at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationSession {
    phase: Phase,
    lanes: usize,
    /// Highest attempt that the source named in this session.
    highest: Attempt,
    /// Whether both sides can compare.
    compares: bool,
    /// `Compare` that were not answered yet.
    comparing: usize,
}

/// What a legal message is, for the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationSessionEvent {
    /// A session is asked for: see [`crate::session::agree`] and [`crate::handover::admit`].
    Hello(Hello),
    /// The guest: compare it, then feed `DestinationEvent::Offered`.
    Offer(Offer),
    /// What is left fits: hooks and status.
    Converged,
    /// Digests of what is here of these windows are asked for.
    Compare(WindowRange),
    /// The data of the attempt ends with these sequence numbers.
    Final(Final),
    /// The device state follows on its stream.
    DeviceState {
        /// The attempt.
        attempt: Attempt,
        /// Bytes.
        len: u64,
        /// XXH3-128 of them.
        digest: u128,
    },
    /// Feed this to the handover machine as it is.
    Handover(DestinationEvent),
    /// Said before the source could know that the attempt is over: nothing to do.
    Late,
    /// The source has read everything and is done.
    Goodbye,
    /// The source gives up the session. Feed `DestinationEvent::ConnectionLost`.
    PeerError(WireError),
}

impl Default for DestinationSession {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationSession {
    /// A control stream on which nothing was said.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            phase: Phase::Hello,
            lanes: 0,
            highest: Attempt(0),
            compares: false,
            comparing: 0,
        }
    }

    /// Notes what this side has sent.
    pub fn on_sent(&mut self, message: &ToSource) {
        match message {
            ToSource::Welcome(_) => self.advance(Phase::Admitting, Phase::Welcomed),
            ToSource::Ready(_) => self.advance(Phase::Offered, Phase::Copying),
            ToSource::AttemptOpened { attempt } => {
                let attempt = *attempt;
                self.advance(Phase::Opening { attempt }, Phase::Opened { attempt });
            }
            ToSource::Complete { attempt } => {
                let attempt = *attempt;
                self.advance(Phase::Final { attempt }, Phase::Complete { attempt });
            }
            ToSource::Prepared(prepared) => {
                let attempt = prepared.key.attempt;
                self.advance(Phase::State { attempt }, Phase::Prepared { attempt });
            }
            ToSource::Outcome(outcome) => match outcome.verdict {
                Verdict::Aborted(_) => self.leave_attempt(outcome.key.attempt),
                Verdict::Committed { .. } | Verdict::Unknown => {}
            },
            ToSource::Error(_) => self.phase = Phase::Closed,
            ToSource::Compared(_) => self.comparing = self.comparing.saturating_sub(1),
            ToSource::Progress(_) | ToSource::Digests(_) | ToSource::Cancelled => {}
        }
    }

    fn advance(&mut self, from: Phase, to: Phase) {
        if self.phase == from {
            self.phase = to;
        }
    }

    fn leave_attempt(&mut self, attempt: Attempt) {
        if self.current() == Some(attempt) {
            self.phase = Phase::Copying;
        }
    }

    const fn current(&self) -> Option<Attempt> {
        match self.phase {
            Phase::Opening { attempt }
            | Phase::Opened { attempt }
            | Phase::Final { attempt }
            | Phase::Complete { attempt }
            | Phase::State { attempt }
            | Phase::Prepared { attempt } => Some(attempt),
            Phase::Hello
            | Phase::Admitting
            | Phase::Welcomed
            | Phase::Asked
            | Phase::Offered
            | Phase::Copying
            | Phase::Closed => None,
        }
    }

    /// Takes one message.
    ///
    /// # Errors
    ///
    /// [`ProtocolViolation`] where the source may not say this now. Nothing has changed.
    pub fn on_message(
        &mut self,
        message: ToDestination,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        if matches!(self.phase, Phase::Hello | Phase::Admitting | Phase::Closed) {
            return self.on_stranger(message);
        }
        self.on_admitted(message)
    }

    fn on_stranger(
        &mut self,
        message: ToDestination,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        if let ToDestination::Hello(hello) = message {
            return self.on_hello(hello);
        }
        if let ToDestination::Error(error) = message {
            return Ok(self.on_error(error));
        }
        self.violation(name(&message))
    }

    fn on_error(&mut self, error: WireError) -> DestinationSessionEvent {
        self.phase = Phase::Closed;
        DestinationSessionEvent::PeerError(error)
    }

    fn on_hello(&mut self, hello: Hello) -> Result<DestinationSessionEvent, ProtocolViolation> {
        if self.phase != Phase::Hello {
            return self.violation("Hello");
        }
        self.phase = Phase::Admitting;
        self.lanes = usize::from(hello.lanes);
        self.compares = Features::supported().common(&hello.features).has(COMPARE);
        Ok(DestinationSessionEvent::Hello(hello))
    }

    fn on_admitted(
        &mut self,
        message: ToDestination,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        match message {
            ToDestination::Offer(offer) if self.phase == Phase::Welcomed => {
                self.phase = Phase::Offered;
                Ok(DestinationSessionEvent::Offer(offer))
            }
            ToDestination::Converged if self.phase == Phase::Copying => {
                Ok(DestinationSessionEvent::Converged)
            }
            ToDestination::Compare(range) => self.on_compare(range),
            ToDestination::OpenAttempt { attempt } => self.on_open_attempt(attempt),
            ToDestination::Final(last) => self.on_final(last),
            ToDestination::DeviceState {
                attempt,
                len,
                digest,
            } => self.on_device_state(attempt, len, digest),
            ToDestination::Commit(key) => {
                self.on_question(key.attempt, DestinationEvent::Commit(key))
            }
            ToDestination::Query(key) => {
                self.on_question(key.attempt, DestinationEvent::Query(key))
            }
            ToDestination::Abort { attempt, reason } => {
                if attempt > self.highest {
                    return self.violation(format!("Abort of attempt {attempt}"));
                }
                Ok(DestinationSessionEvent::Handover(DestinationEvent::Abort {
                    attempt,
                    reason,
                }))
            }
            ToDestination::Cancel { reason } => Ok(DestinationSessionEvent::Handover(
                DestinationEvent::Cancel { reason },
            )),
            ToDestination::Goodbye => {
                self.phase = Phase::Closed;
                Ok(DestinationSessionEvent::Goodbye)
            }
            ToDestination::Error(error) => Ok(self.on_error(error)),
            other @ (ToDestination::Hello(_)
            | ToDestination::Offer(_)
            | ToDestination::Converged) => self.violation(name(&other)),
        }
    }

    fn on_compare(
        &mut self,
        range: WindowRange,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        if self.phase != Phase::Copying {
            return self.violation("Compare");
        }
        if !self.compares {
            return self.violation("Compare, a feature that was not agreed");
        }
        if self.comparing >= MAX_COMPARES {
            return self.violation(format!("Compare while {MAX_COMPARES} wait for an answer"));
        }
        self.comparing += 1;
        Ok(DestinationSessionEvent::Compare(range))
    }

    fn on_open_attempt(
        &mut self,
        attempt: Attempt,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        // Also while an earlier one is open: its `Abort` and this one were sent without waiting between them.
        let ready = self.phase == Phase::Copying || self.current().is_some();
        if !ready || attempt <= self.highest {
            return self.violation(format!("OpenAttempt {attempt}"));
        }
        self.highest = attempt;
        self.phase = Phase::Opening { attempt };
        Ok(DestinationSessionEvent::Handover(
            DestinationEvent::OpenAttempt { attempt },
        ))
    }

    fn on_final(&mut self, last: Final) -> Result<DestinationSessionEvent, ProtocolViolation> {
        let attempt = last.attempt;
        // Once more after `Complete`, for what differed.
        let due = [Phase::Opened { attempt }, Phase::Complete { attempt }];
        if !due.contains(&self.phase) {
            return self.late(attempt, "Final");
        }
        if last.lanes.len() != self.lanes {
            return self.violation(format!(
                "Final for {} of {} lanes",
                last.lanes.len(),
                self.lanes
            ));
        }
        self.phase = Phase::Final { attempt };
        Ok(DestinationSessionEvent::Final(last))
    }

    fn on_device_state(
        &mut self,
        attempt: Attempt,
        len: u64,
        digest: u128,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        // It need not wait for `Complete`: a round trip of the guest's downtime. The load does.
        let due = [Phase::Final { attempt }, Phase::Complete { attempt }];
        if !due.contains(&self.phase) {
            return self.late(attempt, "DeviceState");
        }
        self.phase = Phase::State { attempt };
        Ok(DestinationSessionEvent::DeviceState {
            attempt,
            len,
            digest,
        })
    }

    /// Questions are idempotent and always answered, but a source that copies may not commit what is not prepared.
    fn on_question(
        &mut self,
        attempt: Attempt,
        event: DestinationEvent,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        match self.phase {
            Phase::Welcomed => self.phase = Phase::Asked,
            Phase::Asked | Phase::Prepared { .. } => {}
            Phase::Copying
            | Phase::Opening { .. }
            | Phase::Opened { .. }
            | Phase::Final { .. }
            | Phase::Complete { .. }
            | Phase::State { .. }
                if attempt <= self.highest && Some(attempt) != self.current() => {}
            Phase::Hello
            | Phase::Admitting
            | Phase::Offered
            | Phase::Copying
            | Phase::Opening { .. }
            | Phase::Opened { .. }
            | Phase::Final { .. }
            | Phase::Complete { .. }
            | Phase::State { .. }
            | Phase::Closed => {
                return self.violation(format!("a Commit or Query of attempt {attempt}"));
            }
        }
        Ok(DestinationSessionEvent::Handover(event))
    }

    /// What belongs to an attempt that this side has settled was sent before the source could know.
    fn late(
        &self,
        attempt: Attempt,
        what: &str,
    ) -> Result<DestinationSessionEvent, ProtocolViolation> {
        let named = attempt > Attempt(0) && attempt <= self.highest;
        if named && self.current() != Some(attempt) {
            Ok(DestinationSessionEvent::Late)
        } else {
            self.violation(format!("{what} of attempt {attempt}"))
        }
    }

    fn violation<T>(&self, got: impl Into<String>) -> Result<T, ProtocolViolation> {
        let (phase, expected) = match self.phase {
            Phase::Hello => ("HELLO", "Hello"),
            Phase::Admitting => ("ADMITTING", "nothing before Welcome"),
            Phase::Welcomed => ("WELCOMED", "Offer, Commit, Query, Cancel, Goodbye or Error"),
            Phase::Asked => ("ASKED", "Commit, Query, Cancel, Goodbye or Error"),
            Phase::Offered => ("OFFERED", "Cancel, Goodbye or Error before Ready"),
            Phase::Copying => (
                "COPYING",
                "Converged, Compare, OpenAttempt, Cancel, Goodbye or Error",
            ),
            Phase::Opening { .. } => ("OPENING", "Abort, Cancel or Error"),
            Phase::Opened { .. } => ("OPENED", "Final, Abort, Cancel or Error"),
            Phase::Final { .. } => ("FINAL", "Abort, Cancel or Error before Complete"),
            Phase::Complete { .. } => ("COMPLETE", "DeviceState, Final, Abort, Cancel or Error"),
            Phase::State { .. } => ("STATE", "Abort, Cancel or Error before Prepared"),
            Phase::Prepared { .. } => {
                ("PREPARED", "Commit, Query, Abort, Cancel, Goodbye or Error")
            }
            Phase::Closed => ("CLOSED", "nothing"),
        };
        Err(ProtocolViolation {
            phase,
            expected,
            got: got.into(),
        })
    }
}

fn name(message: &ToDestination) -> &'static str {
    match message {
        ToDestination::Hello(_) => "Hello",
        ToDestination::Offer(_) => "Offer",
        ToDestination::Converged => "Converged",
        ToDestination::Compare(_) => "Compare",
        ToDestination::OpenAttempt { .. } => "OpenAttempt",
        ToDestination::Final(_) => "Final",
        ToDestination::DeviceState { .. } => "DeviceState",
        ToDestination::Commit(_) => "Commit",
        ToDestination::Query(_) => "Query",
        ToDestination::Abort { .. } => "Abort",
        ToDestination::Cancel { .. } => "Cancel",
        ToDestination::Goodbye => "Goodbye",
        ToDestination::Error(_) => "Error",
    }
}
