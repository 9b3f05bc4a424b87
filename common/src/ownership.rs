//! Who may run a guest, as this host's journals alone say: no agent, no network.
//!
//! Owns the names of the two records of a guest, the reading of both together and the words for the answer. Which record counts
//! and what it says (`[HAND-11]`) is `vmferry_proto::handover`'s. Invariant: `may_run` is true only where no
//! other host can hold a durable record that lets it run the guest.

use std::time::SystemTime;

use serde::Serialize;
use vmferry_proto::handover::{
    DestinationRecord, DestinationState, OwnershipClaim, SourceRecord, SourceState, owner_of_host,
};
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
pub const DESTINATION_VERSION: u32 = 2;

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

/// What two records say together: which of them counts is `owner_of_host`'s to say.
#[must_use]
pub fn decide(
    name: &GuestName,
    source: Option<&SourceRecord>,
    destination: Option<&DestinationRecord>,
) -> Ownership {
    let Some(owner) = owner_of_host(source, destination) else {
        return unknown(name);
    };
    let counts = |generation, claim| (generation, claim) == (owner.generation, owner.claim);
    let source = source.filter(|record| counts(record.generation, record.claim()));
    match (source, destination) {
        (Some(source), _) => of_source(source),
        (None, Some(destination)) => of_destination(destination),
        (None, None) => unknown(name),
    }
}

fn unknown(name: &GuestName) -> Ownership {
    Ownership {
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
    }
}

fn of_source(record: &SourceRecord) -> Ownership {
    let name = &record.guest;
    let (why, next) = match &record.state {
        SourceState::Copying { .. } => (
            "it was being copied to the destination and is still this host's",
            None,
        ),
        SourceState::Pausing { .. } => (
            "it was being handed over and nothing was committed: it is this host's once that is recorded as rolled back",
            Some(format!("run `vmferry-src recover {name}`")),
        ),
        SourceState::Committing { .. } => (
            "in doubt: this host has committed the handover and does not know the destination's answer",
            Some(format!(
                "run `vmferry-src recover {name}`, which asks the destination; if that host is lost for good and cannot come back, `vmferry-src resolve {name} --destination-is-fenced`"
            )),
        ),
        SourceState::RolledBack { .. } => {
            ("the last attempt was rolled back: it is this host's", None)
        }
        SourceState::Released { .. } => {
            ("the destination owns it: this host's copy was let go", None)
        }
        SourceState::Fenced { .. } => (
            "an operator vouched that the destination is fenced: it is this host's",
            None,
        ),
        SourceState::Ended { .. } => (
            "the migration ended without a commit: it is this host's",
            None,
        ),
    };
    Ownership {
        guest: name.clone(),
        may_run: record.claim() == OwnershipClaim::Here,
        why: why.to_owned(),
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
    let (name, sender) = (&record.guest, &record.sender);
    let why = match &record.state {
        DestinationState::Owned { .. } => format!("it came from {sender} and is this host's"),
        DestinationState::Receiving | DestinationState::Opened { .. } => {
            format!("it is on its way from {sender} and nothing was committed")
        }
        DestinationState::Aborted { .. }
        | DestinationState::Relinquished { .. }
        | DestinationState::Ended { .. } => {
            format!("its migration from {sender} was given up: it is still there")
        }
    };
    Ownership {
        guest: record.guest.clone(),
        may_run: record.claim() == OwnershipClaim::Here,
        why,
        next: match &record.state {
            DestinationState::Receiving | DestinationState::Opened { .. } => Some(format!(
                "the migration's end, at either host: `vmferry-src status {name}` on {sender} says how it stands"
            )),
            DestinationState::Owned { .. }
            | DestinationState::Aborted { .. }
            | DestinationState::Relinquished { .. }
            | DestinationState::Ended { .. } => None,
        },
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

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_proto::error::{ErrorCode, WireError};
    use vmferry_proto::handover::{Peer, ProcessRecord};
    use vmferry_proto::ids::{Attempt, MigrationId, RegisterId, SessionNumber};
    use vmferry_proto::message::AttemptKey;
    use vmferry_proto::spec::RunState;

    fn name() -> GuestName {
        "web".parse().unwrap()
    }

    fn key() -> AttemptKey {
        AttemptKey {
            migration: MigrationId::from_bytes([1; 16]),
            attempt: Attempt(1),
            register: RegisterId::from_bytes([2; 16]),
        }
    }

    fn reason() -> WireError {
        WireError::new(ErrorCode::Cancelled, "somebody cancelled")
    }

    fn source(generation: u64, state: SourceState) -> SourceRecord {
        SourceRecord {
            guest: name(),
            migration: MigrationId::from_bytes([1; 16]),
            generation: Generation(generation),
            session: SessionNumber(1),
            peer: Peer {
                address: "beta:7447".to_owned(),
                identity: "beta".to_owned(),
            },
            process: ProcessRecord {
                pid: 1,
                start_ticks: 1,
                boot_id: String::new(),
            },
            shared_disks: false,
            run_state_before: RunState::Running,
            state,
        }
    }

    fn destination(generation: u64, state: DestinationState) -> DestinationRecord {
        DestinationRecord {
            guest: name(),
            migration: MigrationId::from_bytes([3; 16]),
            generation: Generation(generation),
            session: SessionNumber(1),
            sender: "beta".to_owned(),
            register: RegisterId::from_bytes([2; 16]),
            process: None,
            state,
            earlier: Vec::new(),
        }
    }

    fn owned() -> DestinationState {
        DestinationState::Owned {
            attempt: Attempt(1),
            to: RunState::Running,
            started: true,
        }
    }

    #[test]
    fn each_state_of_the_source_has_its_answer() {
        let attempt = Attempt(1);
        let cases = [
            (SourceState::Copying { last: Attempt(0) }, true),
            (SourceState::Pausing { attempt }, false),
            (SourceState::Committing { key: key() }, false),
            (
                SourceState::RolledBack {
                    attempt,
                    reason: reason(),
                },
                true,
            ),
            (SourceState::Released { key: key() }, false),
            (SourceState::Fenced { key: key() }, true),
            (
                SourceState::Ended {
                    last: attempt,
                    reason: reason(),
                },
                true,
            ),
        ];
        for (state, may_run) in cases {
            let said = decide(&name(), Some(&source(1, state.clone())), None);
            assert_eq!(said.may_run, may_run, "{state:?}");
            assert_eq!(said.role, Some("source"));
        }
    }

    #[test]
    fn after_there_and_back_again_the_highest_generation_counts() {
        let released = source(1, SourceState::Released { key: key() });
        let back = destination(2, owned());
        assert!(decide(&name(), Some(&released), Some(&back)).may_run);
        let gone_again = source(3, SourceState::Released { key: key() });
        let said = decide(&name(), Some(&gone_again), Some(&back));
        assert!(!said.may_run);
        assert_eq!(said.generation, Some(3));
        let not_yet_back = destination(2, DestinationState::Receiving);
        assert!(!decide(&name(), Some(&released), Some(&not_yet_back)).may_run);
    }

    #[test]
    fn a_doubt_names_the_way_out() {
        let doubt = source(1, SourceState::Committing { key: key() });
        let words = decide(&name(), Some(&doubt), None).sentence();
        assert!(words.contains("must NOT run here"), "{words}");
        assert!(words.contains("vmferry-src recover web"), "{words}");
        assert!(words.contains("--destination-is-fenced"), "{words}");
    }
}
