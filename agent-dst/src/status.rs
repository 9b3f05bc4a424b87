//! How the migrations of this agent stand, for `status` and the control socket.
//!
//! Owns what is shown of a migration while it is under way; the journals say what became of it. The migration writes, whoever
//! asks reads: nothing is decided on these figures.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use vmferry_common::phase::{Ending, Phase};
use vmferry_common::units::Size;
use vmferry_proto::handover::DestinationFacts;
use vmferry_proto::ids::GuestName;

use crate::board::Board;
use crate::meter::Meter;

/// A migration, as it is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration_id: String,
    /// Identity that sends it.
    pub sender: String,
    /// Its ownership generation.
    pub generation: u64,
    /// Newest session.
    pub session: u64,
    /// Whether that session is connected.
    pub connected: bool,
    /// Phase that it is in.
    pub phase: Phase,
    /// How it ended, once it has.
    pub ending: Option<Ending>,
    /// Last attempt to cut over; 0 before the first.
    pub attempt: u32,
    /// Bytes received and applied so far, as they came over the wire.
    pub applied_bytes: u64,
    /// The same in the last seconds, per second.
    pub bytes_per_second: u64,
    /// Lanes of the session.
    pub lanes: Vec<LaneStatus>,
    /// What went wrong last.
    pub error: Option<String>,
}

impl MigrationStatus {
    /// A migration that has just begun.
    pub(crate) fn begun(facts: &DestinationFacts) -> Self {
        Self {
            guest: facts.guest.clone(),
            migration_id: facts.migration.to_string(),
            sender: facts.sender.clone(),
            generation: facts.generation.0,
            session: 0,
            connected: false,
            phase: Phase::Negotiate,
            ending: None,
            attempt: 0,
            applied_bytes: 0,
            bytes_per_second: 0,
            lanes: Vec::new(),
            error: None,
        }
    }
}

impl fmt::Display for MigrationStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = if self.connected {
            "connected"
        } else {
            "not connected"
        };
        write!(f, "{} from {}: {}", self.guest, self.sender, self.phase)?;
        if let Some(ending) = self.ending {
            write!(f, ", {ending}")?;
        }
        write!(
            f,
            ", {link}, {} applied, {}/s, session {}, attempt {}",
            Size(self.applied_bytes),
            Size(self.bytes_per_second),
            self.session,
            self.attempt
        )?;
        match &self.error {
            Some(error) => write!(f, "; {error}"),
            None => Ok(()),
        }
    }
}

/// A lane, as it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneStatus {
    /// The lane.
    pub lane: u8,
    /// Last frame applied.
    pub applied: u64,
    /// Last frame whose disk blocks are flushed.
    pub flushed: u64,
}

/// What a running migration tells of itself.
#[derive(Debug)]
pub(crate) struct Tracker {
    pub(crate) meter: Arc<Meter>,
    shown: Mutex<Shown>,
}

#[derive(Debug)]
struct Shown {
    status: MigrationStatus,
    board: Option<Arc<Board>>,
}

impl Tracker {
    /// Shows `status` until told otherwise.
    pub(crate) fn new(status: MigrationStatus) -> Self {
        Self {
            meter: Arc::new(Meter::new()),
            shown: Mutex::new(Shown {
                status,
                board: None,
            }),
        }
    }

    /// The migration is in `phase` now.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut shown = self.lock();
        if shown.status.phase != phase {
            shown.status.phase = phase;
            let status = &shown.status;
            tracing::info!(guest = %status.guest, migration_id = %status.migration_id, %phase, "phase");
        }
    }

    /// The session `number` is connected; its lanes are on `board` as soon as there is one.
    pub(crate) fn connected(&self, number: u64) {
        let mut shown = self.lock();
        shown.status.session = number;
        shown.status.connected = true;
        shown.board = None;
    }

    /// Lanes are on `board`.
    pub(crate) fn lanes_on(&self, board: Arc<Board>) {
        self.lock().board = Some(board);
    }

    /// No session any more.
    pub(crate) fn disconnected(&self) {
        self.lock().status.connected = false;
    }

    /// The attempt is open.
    pub(crate) fn attempt(&self, attempt: u32) {
        self.lock().status.attempt = attempt;
    }

    /// Something went wrong.
    pub(crate) fn failed(&self, error: impl Into<String>) {
        self.lock().status.error = Some(error.into());
    }

    /// The migration ended this way.
    pub(crate) fn ended(&self, ending: Ending) {
        self.lock().status.ending = Some(ending);
    }

    /// How it stands now.
    pub(crate) fn status(&self) -> MigrationStatus {
        let now = Instant::now();
        self.meter.sample(now);
        let shown = self.lock();
        let positions = shown.board.as_ref().map(|board| board.positions());
        let lanes = positions.unwrap_or_default();
        MigrationStatus {
            applied_bytes: self.meter.total(),
            bytes_per_second: self.meter.rate(now),
            lanes: lanes
                .into_iter()
                .map(|lane| LaneStatus {
                    lane: lane.lane.0,
                    applied: lane.applied.0,
                    flushed: lane.flushed.0,
                })
                .collect(),
            ..shown.status.clone()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
