//! The control socket's words: one JSON object per line, shaped as QEMU's are.
//!
//! Owns requests, answers and events as types for both ends. `{"execute": NAME, "arguments": {…}, "id": N}` is answered by
//! `{"return": {…}, "id": N}` or `{"error": {"class": …, "desc": …}, "id": N}`. After `subscribe` a connection also gets
//! `{"event": NAME, "data": {…}}`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cpu::Workload;
use crate::guest::RamKind;

/// A command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
pub enum Command {
    /// What the guest is made of.
    Describe,
    /// What it is doing.
    Status,
    /// Stop; returns when no step is under way.
    Stop,
    /// Go on. Refused while no CPU state was loaded.
    Cont,
    /// The CPU state; the guest must be stopped.
    SaveState,
    /// Gives an incoming guest its CPU state. It does not run afterwards.
    LoadState {
        /// The state as hexadecimal digits.
        state: String,
    },
    /// The full check. It holds the guest as a stop does.
    Verify,
    /// Changes what the guest does.
    SetWorkload(Workload),
    /// Begins to mark disk writes.
    StartDiskTracking,
    /// Ends it.
    StopDiskTracking,
    /// Takes the marks: written extents since the last time.
    TakeDiskDirty,
    /// This connection wants events.
    Subscribe,
    /// The guest shuts itself down.
    Shutdown,
    /// The host ends it.
    Quit,
}

/// A line from a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// What to do.
    #[serde(flatten)]
    pub command: Command,
    /// Comes back in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
}

/// Whether it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Waits for content.
    Incoming,
    /// Has a CPU state and stands still.
    Paused,
    /// Runs.
    Running,
}

/// Answer to [`Command::Describe`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Name.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// Version of the program.
    pub version: String,
    /// Kind of RAM.
    pub ram_kind: RamKind,
    /// Address of RAM in the process.
    pub ram_address: u64,
    /// Bytes of RAM.
    pub ram_len: u64,
    /// File of the disk, absolute.
    pub disk: Option<PathBuf>,
    /// Bytes of disk.
    pub disk_len: u64,
    /// Whether it runs.
    pub state: State,
}

/// Answer to [`Command::Status`], and to those that change the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether it runs.
    pub state: State,
    /// Whether it ran before the command.
    pub was_running: bool,
    /// How often it was let run.
    pub starts: u64,
    /// Pages written in its life.
    pub steps: u64,
    /// Disk blocks written in its life.
    pub disk_steps: u64,
    /// Beats in its life.
    pub beats: u64,
    /// Beats of this process that nobody took.
    pub beats_lost: u64,
    /// Wrong pages that this process came across.
    pub corrupt: u64,
    /// What it does.
    pub workload: Option<Workload>,
}

/// A command that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Kind of the failure.
    pub class: String,
    /// In words.
    pub desc: String,
}

impl Failure {
    /// A failure that is the command's fault or the guest's.
    #[must_use]
    pub fn new(desc: impl Into<String>) -> Self {
        Self {
            class: "GenericError".to_owned(),
            desc: desc.into(),
        }
    }
}

/// A line to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// A command was carried out.
    Return {
        /// Its result.
        #[serde(rename = "return")]
        value: Value,
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
    },
    /// A command failed.
    Error {
        /// Why.
        error: Failure,
        /// The request's id.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u64>,
    },
    /// Something happened.
    Event {
        /// `STOP`, `RESUME`, `SHUTDOWN` or `CORRUPT`.
        event: String,
        /// More about it.
        data: Value,
    },
}

/// Bytes as hexadecimal digits.
#[must_use]
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hexadecimal digits as bytes.
#[must_use]
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let value = |digit: u8| char::from(digit).to_digit(16);
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() {
        return None;
    }
    pairs
        .iter()
        .map(|[high, low]| u8::try_from(value(*high)? << 4 | value(*low)?).ok())
        .collect()
}
