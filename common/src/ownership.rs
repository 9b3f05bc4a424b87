//! Who may run a guest, as this host's journals alone say: no agent, no network.
//!
//! Owns the names of the two records of a guest and the reading of both together: the one of the higher ownership generation
//! counts (`[HAND-11]`). What a record says is `vmferry_proto::handover`'s. Invariant: `may_run` is true only where no
//! other host can hold a durable record that lets it run the guest.

use std::time::SystemTime;

use serde::Serialize;
use vmferry_proto::handover::{DestinationRecord, DestinationState, SourceRecord, SourceState};
use vmferry_proto::ids::{Generation, GuestName};

use crate::journal::{JournalReadError, RecordFile};
use crate::state::StateDir;

/// Kind of the source's records.
pub const SOURCE_KIND: &str = "source";
/// Layout version of the source's records.
pub const SOURCE_VERSION: u32 = 1;
/// Kind of the destination's records.
pub const DESTINATION_KIND: &str = "destination";
/// Layout version of the destination's records.
pub const DESTINATION_VERSION: u32 = 1;

/// The source's record file of a guest.
#[must_use]
pub fn source_file(state: &StateDir, name: &GuestName) -> RecordFile<SourceRecord> {
    state.record(name, SOURCE_KIND, SOURCE_VERSION)
}

/// The destination's record file of a guest.
#[must_use]
pub fn destination_file(state: &StateDir, name: &GuestName) -> RecordFile<DestinationRecord> {
    state.record(name, DESTINATION_KIND, DESTINATION_VERSION)
}

/// What the journals say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// The guest.
    pub guest: GuestName,
    /// Whether this host may run it.
    pub may_run: bool,
    /// The same, and why, as a sentence.
    pub why: String,
    /// What would settle a doubt, or what to do first; where there is something.
    pub next: Option<String>,
    /// Role of this host in the migration that counts: `source` or `destination`; `None` without a record.
    pub role: Option<&'static str>,
    /// State of the record that counts.
    pub state: Option<&'static str>,
    /// Its migration.
    pub migration: Option<String>,
    /// Its generation.
    pub generation: Option<u64>,
    /// Its attempt.
    pub attempt: Option<u32>,
    /// The other host.
    pub peer: Option<String>,
    /// When the record was made durable, in seconds since 1970.
    pub since: Option<u64>,
}

/// Reads both journals of this host.
pub fn of(state: &StateDir, name: &GuestName) -> Result<Ownership, JournalReadError> {
    let (source, destination) = (source_file(state, name), destination_file(state, name));
    let (source_record, destination_record) = (source.read()?, destination.read()?);
    let mut ownership = decide(name, source_record.as_ref(), destination_record.as_ref());
    let path = match ownership.role {
        Some("source") => Some(source.path().to_owned()),
        Some(_) => Some(destination.path().to_owned()),
        None => None,
    };
    ownership.since = path
        .and_then(|path| std::fs::metadata(path).ok())
        .and_then(|meta| meta.modified().ok())
        .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok())
        .map(|since| since.as_secs());
    Ok(ownership)
}

/// The highest generation in this host's journals of the guest; 0 without any.
pub fn highest_generation(
    state: &StateDir,
    name: &GuestName,
) -> Result<Generation, JournalReadError> {
    let source = source_file(state, name)
        .read()?
        .map(|record| record.generation);
    let destination = destination_file(state, name)
        .read()?
        .map(|record| record.generation);
    Ok(source.max(destination).unwrap_or_default())
}

/// What two records say together.
#[must_use]
pub fn decide(
    name: &GuestName,
    source: Option<&SourceRecord>,
    destination: Option<&DestinationRecord>,
) -> Ownership {
    match (source, destination) {
        (None, None) => Ownership {
            guest: name.clone(),
            may_run: true,
            why: "no migration of this guest is recorded on this host".to_owned(),
            next: None,
            role: None,
            state: None,
            migration: None,
            generation: None,
            attempt: None,
            peer: None,
            since: None,
        },
        (Some(source), Some(destination)) if destination.generation > source.generation => {
            of_destination(destination)
        }
        (Some(source), _) => of_source(source),
        (None, Some(destination)) => of_destination(destination),
    }
}

fn of_source(record: &SourceRecord) -> Ownership {
    let name = &record.guest;
    let recover = || Some(format!("run `vmferry-src recover {name}`"));
    let (may_run, why, next) = match &record.state {
        SourceState::Copying { .. } => {
            (true, "it was being copied to the destination and is still this host's".to_owned(), None)
        }
        SourceState::Pausing { .. } => (
            false,
            "it was being handed over and nothing was committed: it is this host's once that is recorded as rolled back".to_owned(),
            recover(),
        ),
        SourceState::Committing { .. } => (
            false,
            "in doubt: this host has committed the handover and does not know the destination's answer".to_owned(),
            Some(format!(
                "run `vmferry-src recover {name}`, which asks the destination; if that host is lost for good and cannot come back, `vmferry-src resolve {name} --destination-is-fenced`"
            )),
        ),
        SourceState::RolledBack { .. } => {
            (true, "the last attempt was rolled back: it is this host's".to_owned(), None)
        }
        SourceState::Released { .. } => {
            (false, "the destination owns it: this host's copy was let go".to_owned(), None)
        }
        SourceState::Fenced { .. } => (
            true,
            "an operator vouched that the destination is fenced: it is this host's".to_owned(),
            None,
        ),
        SourceState::Ended { .. } => {
            (true, "the migration ended without a commit: it is this host's".to_owned(), None)
        }
    };
    Ownership {
        guest: name.clone(),
        may_run,
        why,
        next,
        role: Some("source"),
        state: Some(record.state.name()),
        migration: Some(record.migration.to_string()),
        generation: Some(record.generation.0),
        attempt: Some(record.state.attempt().0),
        peer: Some(record.peer.address.clone()),
        since: None,
    }
}

fn of_destination(record: &DestinationRecord) -> Ownership {
    let sender = &record.sender;
    let (may_run, why) = match &record.state {
        DestinationState::Owned { .. } => {
            (true, format!("it came from {sender} and is this host's"))
        }
        DestinationState::Receiving | DestinationState::Opened { .. } => (
            false,
            format!("it is on its way from {sender} and nothing was committed"),
        ),
        DestinationState::Aborted { .. }
        | DestinationState::Relinquished { .. }
        | DestinationState::Ended { .. } => (
            false,
            format!("its migration from {sender} was given up: it is still there"),
        ),
    };
    Ownership {
        guest: record.guest.clone(),
        may_run,
        why,
        next: None,
        role: Some("destination"),
        state: Some(record.state.name()),
        migration: Some(record.migration.to_string()),
        generation: Some(record.generation.0),
        attempt: Some(record.state.attempt().0),
        peer: Some(sender.clone()),
        since: None,
    }
}

impl Ownership {
    /// As a person reads it: one line, and another with what to do.
    #[must_use]
    pub fn sentence(&self) -> String {
        let verdict = if self.may_run {
            "may run here"
        } else {
            "must NOT run here"
        };
        let mut text = format!("{}: {verdict}: {}", self.guest, self.why);
        if let (Some(state), Some(generation), Some(attempt)) =
            (self.state, self.generation, self.attempt)
        {
            let since = self
                .since
                .map_or_else(String::new, |since| format!(", since {}", utc(since)));
            text.push_str(&format!(
                " ({state}, attempt {attempt}, generation {generation}{since})"
            ));
        }
        if let Some(next) = &self.next {
            text.push_str(&format!("\nto settle it: {next}"));
        }
        text
    }
}

fn utc(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map_or_else(|| format!("{seconds} s after 1970"), |at| at.to_string())
}
