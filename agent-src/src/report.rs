//! What a migration came to: the `--json` object and the numbers behind the closing summary.
//!
//! Owns the names of the object's fields, which scripts rely on: they are added to, never renamed. Times end in
//! `_ms` and are numbers with up to three decimals, sizes end in `_bytes`. How a person reads it is in [`summary`].
//! Where the guest is now is a fact that the engine states ([`GuestNow`]), not one that is guessed from the outcome.

pub mod summary;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vmferry_common::phase::{Ending, Phase};
use vmferry_proto::error::{ErrorCode, WireError};

use crate::cli::Verify;
use crate::explain;
use crate::policy::RoundStats;

/// A time, as milliseconds in JSON.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub Duration);

/// The object that `--json` prints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The migration.
    pub migration_id: String,
    /// The guest's name.
    pub guest: String,
    /// How it ended.
    pub outcome: Ending,
    /// Exit code of the process.
    pub exit_code: u8,
    /// Where the guest is now.
    pub guest_now: GuestNow,
    /// The same as a sentence.
    pub what_is_true_now: String,
    /// What the administrator should do, as a sentence.
    pub what_to_do: String,
    /// Why it ended so, unless it committed.
    pub error: Option<ErrorReport>,
    /// The destination.
    pub peer: Peer,
    /// From the start of the command to its end.
    pub total_ms: Millis,
    /// For how long the guest stood still in the last attempt; null if it was never paused.
    pub downtime_ms: Option<Millis>,
    /// What that time went to.
    pub downtime_parts: DowntimeParts,
    /// Pauses of the guest: above 1 if an attempt was rolled back before.
    pub attempts: u32,
    /// Sessions with the destination: above 1 if the link was lost.
    pub sessions: u64,
    /// Rounds of the copy; last the one after the pause (`paused`), if it came to that.
    pub rounds: Vec<RoundReport>,
    /// Size of the guest's memory.
    pub memory_bytes: u64,
    /// Size of the guest's copied disks.
    pub disk_bytes: u64,
    /// Bytes of guest content accounted for at the destination, zero blocks and repetitions included.
    pub raw_bytes: u64,
    /// Bytes handed to the transport for it: headers and payload after compression.
    pub wire_bytes: u64,
    /// Blocks of 4 KiB that were zero or a hole, and were sent as that.
    pub zero_blocks: u64,
    /// Bytes that were not sent because the destination had kept them of an earlier agent's copy: both sides compared digests.
    pub kept_bytes: u64,
    /// Blocks of 4 KiB that were sent more than once.
    pub resent_blocks: u64,
    /// Blocks of 4 KiB that were dirtied and not sent again, since their content was what had been sent before.
    pub unchanged_blocks: u64,
    /// Blocks of 4 KiB that were sent as the difference to what had been sent before.
    pub difference_blocks: u64,
    /// Blocks of 4 KiB that were sent as a reference to another block of the guest, since the destination had the same there.
    pub duplicate_blocks: u64,
    /// Size of the device state.
    pub device_state_bytes: u64,
    /// Longest time for which the copy held the running guest at a time: scan, re-arm, barrier.
    pub guest_stall_ms: Millis,
    /// Longest I/O barrier, by itself.
    pub barrier_stall_ms: Millis,
    /// What was compared before the decision.
    pub verified: Verified,
}

/// Where the guest is when the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestNow {
    /// It runs at the destination.
    RunsAtDestination,
    /// It arrived paused at the destination, as it was at the source.
    PausedAtDestination,
    /// It runs at the source.
    RunsAtSource,
    /// It is paused at the source, as it was before the migration.
    PausedAtSource,
    /// It is paused at the source and could not be resumed.
    StuckAtSource,
    /// It was shut down or its process is gone, at the source.
    Ended,
    /// It is paused at the source and may run at the destination.
    InDoubt,
}

/// Why a migration did not commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// The code that `vmferry-src explain` knows.
    pub code: ErrorCode,
    /// Thing, cause, next step.
    pub detail: String,
    /// The phase in which it happened.
    pub phase: Option<Phase>,
}

/// The agent at the destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// As given with `--to`.
    pub address: String,
    /// Name and version of its program, once it has introduced itself.
    pub agent: Option<String>,
}

/// What the downtime went to. Parts may be zero; what is in none of them is `other_ms`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DowntimeParts {
    /// The hypervisor stopped the CPUs and listed its memory and devices again.
    pub pause_ms: Millis,
    /// I/O in flight completed.
    pub barrier_ms: Millis,
    /// The last dirty blocks were found, sent and applied.
    pub last_set_ms: Millis,
    /// Digests of both sides were taken and compared.
    pub verify_ms: Millis,
    /// The device state was written, as far as that took longer than the last set beside it.
    pub state_save_ms: Millis,
    /// The device state went over, and answers came back.
    pub send_ms: Millis,
    /// The destination flushed its disks.
    pub flush_ms: Millis,
    /// The destination loaded the device state.
    pub load_ms: Millis,
    /// Records were made durable: COMMITTING here, OWNED there.
    pub journal_ms: Millis,
    /// Hooks ran.
    pub hooks_ms: Millis,
    /// The destination started the guest.
    pub start_ms: Millis,
    /// The rest.
    pub other_ms: Millis,
}

/// A round of the copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Counted from 1.
    pub number: u32,
    /// Whether the guest stood still: this is the last set, part of the downtime. Nothing was dirtied in it.
    pub paused: bool,
    /// From the scan before it to the scan at its end.
    pub elapsed_ms: Millis,
    /// The part of it in which nothing could be sent.
    pub idle_ms: Millis,
    /// Bytes of guest content accounted for.
    pub raw_bytes: u64,
    /// Those of them that were zero.
    pub zero_bytes: u64,
    /// Bytes handed to the transport.
    pub wire_bytes: u64,
    /// Bytes found dirty at its end.
    pub dirtied_bytes: u64,
    /// Bytes left to send at its end.
    pub left_bytes: u64,
}

/// What was compared by digest while the guest was paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// What was asked for.
    pub mode: Verify,
    /// Windows compared and found equal.
    pub windows: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Pages of shared memory that the guest had given back and that read as zero at the source, sent again.
    pub resent_discarded: u64,
}

/// How a migration ended, as far as it is not numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// The ending.
    pub outcome: Ending,
    /// Where the guest is.
    pub guest_now: GuestNow,
    /// Why, unless it committed.
    pub error: Option<(WireError, Option<Phase>)>,
}

impl Report {
    /// A report of this end, all numbers zero: the engine fills in those it has.
    #[must_use]
    pub fn new(migration_id: String, guest: String, peer: Peer, end: End) -> Self {
        let code = end.error.as_ref().map(|(error, _)| error.code);
        Self {
            what_is_true_now: end.guest_now.sentence().to_owned(),
            what_to_do: todo(end.outcome, end.guest_now, code).replace("NAME", &guest),
            migration_id,
            guest,
            outcome: end.outcome,
            exit_code: end.outcome.exit_code(),
            guest_now: end.guest_now,
            error: end.error.map(|(error, phase)| ErrorReport {
                code: error.code,
                detail: error.detail,
                phase,
            }),
            peer,
            total_ms: Millis::default(),
            downtime_ms: None,
            downtime_parts: DowntimeParts::default(),
            attempts: 0,
            sessions: 0,
            rounds: Vec::new(),
            memory_bytes: 0,
            disk_bytes: 0,
            raw_bytes: 0,
            wire_bytes: 0,
            zero_blocks: 0,
            kept_bytes: 0,
            resent_blocks: 0,
            unchanged_blocks: 0,
            difference_blocks: 0,
            duplicate_blocks: 0,
            device_state_bytes: 0,
            guest_stall_ms: Millis::default(),
            barrier_stall_ms: Millis::default(),
            verified: Verified::default(),
        }
    }

    /// Takes the rounds over, and what was sent after the pause.
    pub fn set_rounds(&mut self, rounds: &[RoundStats], last_set: Option<&RoundStats>) {
        self.rounds = rounds.iter().map(RoundReport::from).collect();
        self.rounds.extend(last_set.map(|round| RoundReport {
            paused: true,
            ..RoundReport::from(round)
        }));
    }

    /// Takes the downtime and its parts over; what the parts do not explain becomes `other_ms`.
    pub fn set_downtime(&mut self, downtime: Duration, parts: DowntimeParts) {
        let known = parts
            .named()
            .iter()
            .fold(Duration::ZERO, |sum, (_, part)| sum.saturating_add(*part))
            .saturating_sub(parts.other_ms.0);
        self.downtime_ms = Some(Millis(downtime));
        self.downtime_parts = DowntimeParts {
            other_ms: Millis(downtime.saturating_sub(known)),
            ..parts
        };
    }

    /// Prints the object on stdout, and ends the line.
    pub fn print_json(&self) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let mut stdout = io::stdout().lock();
        stdout.write_all(&line)?;
        stdout.flush()
    }
}

/// What to do: of the place of the guest where somebody must see to it (stuck, ended), of the ending where that decides (moved, in
/// doubt, cancelled), else of the error.
fn todo(outcome: Ending, guest_now: GuestNow, code: Option<ErrorCode>) -> &'static str {
    if let (GuestNow::StuckAtSource | GuestNow::Ended, Some(entry)) =
        (guest_now, explain::of_guest_now(guest_now))
    {
        return entry.todo;
    }
    match (outcome, code) {
        (Ending::Committed | Ending::InDoubt | Ending::Cancelled, _)
        | (Ending::Failed | Ending::RolledBack, None) => explain::of_ending(outcome).todo,
        (Ending::Failed | Ending::RolledBack, Some(code)) => explain::of_error(code).todo,
    }
}

impl GuestNow {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::RunsAtDestination,
        Self::PausedAtDestination,
        Self::RunsAtSource,
        Self::PausedAtSource,
        Self::StuckAtSource,
        Self::Ended,
        Self::InDoubt,
    ];

    /// One sentence for a person.
    #[must_use]
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::RunsAtDestination => "The guest runs at the destination.",
            Self::PausedAtDestination => "The guest is at the destination, paused as it was here.",
            Self::RunsAtSource => "The guest runs here, at the source.",
            Self::PausedAtSource => {
                "The guest is here, at the source, paused as it was before the migration."
            }
            Self::StuckAtSource => {
                "The guest is here, at the source, and PAUSED: it could not be resumed."
            }
            Self::Ended => {
                "The guest has ended; it runs nowhere, and may be booted afresh here, at the source."
            }
            Self::InDoubt => {
                "The guest is PAUSED here, at the source, or gone, and may be running at the destination."
            }
        }
    }
}

impl DowntimeParts {
    /// Name and length of each part, in the order in which they happen.
    #[must_use]
    pub const fn named(&self) -> [(&'static str, Duration); 12] {
        [
            ("pause", self.pause_ms.0),
            ("barrier", self.barrier_ms.0),
            ("last set", self.last_set_ms.0),
            ("verify", self.verify_ms.0),
            ("state save", self.state_save_ms.0),
            ("send", self.send_ms.0),
            ("flush", self.flush_ms.0),
            ("load", self.load_ms.0),
            ("journal", self.journal_ms.0),
            ("hooks", self.hooks_ms.0),
            ("start", self.start_ms.0),
            ("other", self.other_ms.0),
        ]
    }
}

impl From<&RoundStats> for RoundReport {
    fn from(round: &RoundStats) -> Self {
        Self {
            number: round.number,
            paused: false,
            elapsed_ms: Millis(round.elapsed),
            idle_ms: Millis(round.idle),
            raw_bytes: round.raw_bytes_sent,
            zero_bytes: round.zero_bytes,
            wire_bytes: round.wire_bytes,
            dirtied_bytes: round.dirtied_bytes,
            left_bytes: round.left_bytes,
        }
    }
}

impl From<Duration> for Millis {
    fn from(time: Duration) -> Self {
        Self(time)
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Whole microseconds: more digits would be noise.
        let micros = self.0.subsec_micros();
        let millis = self.0.as_secs_f64().trunc() * 1e3 + f64::from(micros) / 1e3;
        serializer.serialize_f64(millis)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let millis = f64::deserialize(deserializer)?;
        Duration::try_from_secs_f64(millis / 1e3)
            .map(|time| Self(Duration::from_micros(rounded_micros(time))))
            .map_err(serde::de::Error::custom)
    }
}

fn rounded_micros(time: Duration) -> u64 {
    let micros = time.saturating_add(Duration::from_nanos(500)).as_micros();
    u64::try_from(micros).unwrap_or(u64::MAX)
}
