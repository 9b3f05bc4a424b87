//! One session at the source: which of the destination's messages is legal when.
//!
//! Owns the order only; `handover` owns what an answer means, and the ledger what `Progress` means. The agent tells it what it
//! sends (`on_sent`) and gives it what it reads (`on_message`). Invariant: an event comes out only for a message that this side asked
//! for in this session; answers about an attempt that was given up meanwhile come out as `Late`.
//!
//! ```text
//! to copy:    HELLO -> WELCOMED -> OFFERED -> COPYING -> OPENED -> FINAL -> STATE-SENT
//! in doubt:   HELLO -> WELCOMED -> ASKING
//! ```

use std::collections::VecDeque;

use crate::error::WireError;
use crate::handover::SourceEvent;
use crate::ids::{Attempt, Lane, SessionNumber};
use crate::message::{
    Compared, Digests, Hello, LaneProgress, Prepared, Ready, ToDestination, ToSource, Welcome,
    WindowDigest, WindowRange,
};
use crate::session::ProtocolViolation;
use crate::version::{Features, VersionRange};

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Hello,
    Welcomed,
    Asking,
    Offered { regions: usize },
    Copying,
    Opening { attempt: Attempt },
    Final { attempt: Attempt, complete: bool },
    StateSent { attempt: Attempt },
}

/// One session at the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSession {
    versions: VersionRange,
    features: Features,
    session: SessionNumber,
    lanes: u8,
    phase: Phase,
    /// Highest attempt that was opened or asked for in this session.
    highest: Attempt,
    cancelling: bool,
    /// What `Compare` asked for and was not answered yet.
    comparing: VecDeque<WindowRange>,
}

/// What a legal message is, for the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceSessionEvent {
    /// The session is open. Feed `SourceEvent::Connected`.
    Welcomed(Welcome),
    /// The guest can be received.
    Ready(Ready),
    /// For the ledger.
    Progress(Vec<LaneProgress>),
    /// What the destination still has.
    Compared(Compared),
    /// Digests to compare.
    Digests(Digests),
    /// Everything that `Final` named is applied: the device state may be sent.
    Complete {
        /// The attempt.
        attempt: Attempt,
    },
    /// Ready for the commit: feed `SourceEvent::Prepared` with its key.
    Prepared(Prepared),
    /// Feed this to the handover machine as it is.
    Handover(SourceEvent),
    /// An answer about an attempt that was given up, or one that was not waited for: nothing to do.
    Late,
    /// The peer gives up the session. Feed `SourceEvent::ConnectionLost` with it.
    PeerError(WireError),
}

impl SourceSession {
    /// The session that this `Hello` opens. Up to `last` the migration's attempts were opened in earlier ones: the destination
    /// may have to answer for them here.
    #[must_use]
    pub fn new(hello: &Hello, last: Attempt) -> Self {
        Self {
            versions: hello.versions,
            features: hello.features.clone(),
            session: hello.session,
            lanes: hello.lanes,
            phase: Phase::Hello,
            highest: last,
            cancelling: false,
            comparing: VecDeque::new(),
        }
    }

    /// Notes what this side has sent.
    pub fn on_sent(&mut self, message: &ToDestination) {
        match message {
            ToDestination::Hello(_)
            | ToDestination::Converged
            | ToDestination::Goodbye
            | ToDestination::Error(_) => {}
            ToDestination::Offer(offer) => {
                self.phase = Phase::Offered {
                    regions: offer.spec.regions.len(),
                };
            }
            ToDestination::Compare(range) => self.comparing.push_back(*range),
            ToDestination::OpenAttempt { attempt } => {
                self.highest = self.highest.max(*attempt);
                self.phase = Phase::Opening { attempt: *attempt };
            }
            ToDestination::Final(last) => {
                self.phase = Phase::Final {
                    attempt: last.attempt,
                    complete: false,
                };
            }
            ToDestination::DeviceState { attempt, .. } => {
                self.phase = Phase::StateSent { attempt: *attempt };
            }
            ToDestination::Commit(key) | ToDestination::Query(key) => {
                self.highest = self.highest.max(key.attempt);
                if self.phase == Phase::Welcomed {
                    self.phase = Phase::Asking;
                }
            }
            ToDestination::Abort { attempt, .. } => {
                self.highest = self.highest.max(*attempt);
                self.leave_attempt();
            }
            ToDestination::Cancel { .. } => {
                self.cancelling = true;
                self.leave_attempt();
            }
        }
    }

    const fn leave_attempt(&mut self) {
        match self.phase {
            Phase::Opening { .. } | Phase::Final { .. } | Phase::StateSent { .. } => {
                self.phase = Phase::Copying;
            }
            Phase::Hello
            | Phase::Welcomed
            | Phase::Asking
            | Phase::Offered { .. }
            | Phase::Copying => {}
        }
    }

    /// Takes one message.
    ///
    /// # Errors
    ///
    /// [`ProtocolViolation`] where the destination may not say this now. Nothing has changed.
    pub fn on_message(
        &mut self,
        message: ToSource,
    ) -> Result<SourceSessionEvent, ProtocolViolation> {
        match message {
            ToSource::Welcome(welcome) => self.on_welcome(welcome),
            ToSource::Ready(ready) => self.on_ready(ready),
            ToSource::Progress(lanes) => self.on_progress(lanes),
            ToSource::Compared(compared) => self.on_compared(compared),
            ToSource::AttemptOpened { attempt } => self.on_attempt_opened(attempt),
            ToSource::Digests(digests) => self.on_digests(digests),
            ToSource::Complete { attempt } => self.on_complete(attempt),
            ToSource::Prepared(prepared) => self.on_prepared(prepared),
            ToSource::Outcome(outcome) => {
                if outcome.key.attempt > self.highest {
                    return self.violation("Outcome of an attempt that was not asked for");
                }
                if outcome.key.attempt == self.highest {
                    self.leave_attempt();
                }
                Ok(SourceSessionEvent::Handover(SourceEvent::Outcome(outcome)))
            }
            ToSource::Cancelled => {
                if self.cancelling {
                    Ok(SourceSessionEvent::Handover(SourceEvent::Cancelled))
                } else {
                    self.violation("Cancelled")
                }
            }
            ToSource::Error(error) => Ok(SourceSessionEvent::PeerError(error)),
        }
    }

    fn on_welcome(&mut self, welcome: Welcome) -> Result<SourceSessionEvent, ProtocolViolation> {
        if self.phase != Phase::Hello {
            return self.violation("Welcome");
        }
        if welcome.version < self.versions.min || welcome.version > self.versions.max {
            return self.violation(format!(
                "Welcome with version {}, which was not offered",
                welcome.version.0
            ));
        }
        if welcome.session != self.session {
            return self.violation(format!("Welcome for session {}", welcome.session));
        }
        if welcome.features.common(&self.features) != welcome.features {
            return self.violation("Welcome with a feature that was not offered");
        }
        self.phase = Phase::Welcomed;
        Ok(SourceSessionEvent::Welcomed(welcome))
    }

    fn on_ready(&mut self, ready: Ready) -> Result<SourceSessionEvent, ProtocolViolation> {
        let Phase::Offered { regions } = self.phase else {
            return self.violation("Ready");
        };
        if ready.incarnations.len() != regions {
            return self.violation(format!(
                "Ready with {} incarnations for {regions} regions",
                ready.incarnations.len()
            ));
        }
        if let Some(resume) = &ready.resume
            && resume.session >= self.session
        {
            return self.violation(format!("Ready that resumes session {}", resume.session));
        }
        self.phase = Phase::Copying;
        Ok(SourceSessionEvent::Ready(ready))
    }

    fn on_progress(
        &self,
        lanes: Vec<LaneProgress>,
    ) -> Result<SourceSessionEvent, ProtocolViolation> {
        match self.phase {
            Phase::Copying
            | Phase::Opening { .. }
            | Phase::Final { .. }
            | Phase::StateSent { .. } => {}
            Phase::Hello | Phase::Welcomed | Phase::Asking | Phase::Offered { .. } => {
                return self.violation("Progress");
            }
        }
        if let Some(Lane(lane)) = lanes
            .iter()
            .map(|progress| progress.lane)
            .find(|lane| lane.0 >= self.lanes)
        {
            return self.violation(format!("Progress of lane {lane} of {}", self.lanes));
        }
        Ok(SourceSessionEvent::Progress(lanes))
    }

    /// Answers come in the order of the questions, and only of windows that were asked for.
    fn on_compared(&mut self, compared: Compared) -> Result<SourceSessionEvent, ProtocolViolation> {
        let Some(asked) = self.comparing.front() else {
            return self.violation("Compared that was not asked for");
        };
        let other = |it: &&WindowDigest| !asked.contains(it.region, it.window);
        if let Some(other) = compared.windows.iter().find(other) {
            let WindowDigest { region, window, .. } = other;
            let window = window.0;
            return self.violation(format!("Compared with window {window} of region {region}"));
        }
        self.comparing.pop_front();
        Ok(SourceSessionEvent::Compared(compared))
    }

    fn on_attempt_opened(&self, attempt: Attempt) -> Result<SourceSessionEvent, ProtocolViolation> {
        if self.phase == (Phase::Opening { attempt }) {
            let event = SourceEvent::AttemptOpened { attempt };
            return Ok(SourceSessionEvent::Handover(event));
        }
        self.late(attempt, "AttemptOpened")
    }

    fn on_digests(&self, digests: Digests) -> Result<SourceSessionEvent, ProtocolViolation> {
        match self.phase {
            Phase::Final { attempt, .. } if attempt == digests.attempt => {
                Ok(SourceSessionEvent::Digests(digests))
            }
            Phase::Final { .. }
            | Phase::Hello
            | Phase::Welcomed
            | Phase::Asking
            | Phase::Offered { .. }
            | Phase::Copying
            | Phase::Opening { .. }
            | Phase::StateSent { .. } => self.late(digests.attempt, "Digests"),
        }
    }

    fn on_complete(&mut self, attempt: Attempt) -> Result<SourceSessionEvent, ProtocolViolation> {
        if self.phase
            == (Phase::Final {
                attempt,
                complete: false,
            })
        {
            self.phase = Phase::Final {
                attempt,
                complete: true,
            };
            return Ok(SourceSessionEvent::Complete { attempt });
        }
        if self.phase == (Phase::StateSent { attempt }) {
            // The device state did not wait for it.
            return Ok(SourceSessionEvent::Late);
        }
        self.late(attempt, "Complete")
    }

    fn on_prepared(&self, prepared: Prepared) -> Result<SourceSessionEvent, ProtocolViolation> {
        let attempt = prepared.key.attempt;
        if self.phase == (Phase::StateSent { attempt }) {
            return Ok(SourceSessionEvent::Prepared(prepared));
        }
        self.late(attempt, "Prepared")
    }

    /// An answer about an attempt that this side has left crossed its `Abort`; anything else was never asked for.
    fn late(&self, attempt: Attempt, what: &str) -> Result<SourceSessionEvent, ProtocolViolation> {
        let current = match self.phase {
            Phase::Opening { attempt }
            | Phase::Final { attempt, .. }
            | Phase::StateSent { attempt } => Some(attempt),
            Phase::Hello
            | Phase::Welcomed
            | Phase::Asking
            | Phase::Offered { .. }
            | Phase::Copying => None,
        };
        let asked = attempt > Attempt(0) && attempt <= self.highest;
        if asked && current != Some(attempt) {
            Ok(SourceSessionEvent::Late)
        } else {
            self.violation(format!("{what} of attempt {attempt}"))
        }
    }

    fn violation<T>(&self, got: impl Into<String>) -> Result<T, ProtocolViolation> {
        let (phase, expected) = match self.phase {
            Phase::Hello => ("HELLO", "Welcome or Error"),
            Phase::Welcomed => ("WELCOMED", "Error until an Offer or a question is sent"),
            Phase::Asking => (
                "ASKING",
                "Outcome of what was asked, Cancelled once asked for, or Error",
            ),
            Phase::Offered { .. } => ("OFFERED", "Ready or Error"),
            Phase::Copying => (
                "COPYING",
                "Progress, Compared or Cancelled once asked for, or Error",
            ),
            Phase::Opening { .. } => ("OPENING", "AttemptOpened, Outcome, Progress or Error"),
            Phase::Final { .. } => ("FINAL", "Digests, Complete, Outcome, Progress or Error"),
            Phase::StateSent { .. } => (
                "STATE-SENT",
                "Complete, Prepared, Outcome, Progress or Error",
            ),
        };
        Err(ProtocolViolation {
            phase,
            expected,
            got: got.into(),
        })
    }
}
