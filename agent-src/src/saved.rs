//! How a guest under migration is reached, kept beside its journal.
//!
//! Owns the few answers that `recover` and `resolve` need and that no record of the handover holds: which socket, which identity,
//! which hooks. Written before anything is done to the guest. It decides nothing: who may run the guest is the journal's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmferry_common::journal::RecordFile;
use vmferry_common::state::StateDir;
use vmferry_hypervisor::config::SourceConfig;
use vmferry_proto::ids::GuestName;

/// Layout version.
const VERSION: u32 = 1;

/// How to come back to a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedCommand {
    /// The guest file's content.
    pub guest: SourceConfig,
    /// Identity folder.
    pub identity: PathBuf,
    /// Hooks folder.
    pub hooks: PathBuf,
}

/// Where it is kept.
#[must_use]
pub fn file(state: &StateDir, name: &GuestName) -> RecordFile<SavedCommand> {
    state.record(name, "command", VERSION)
}
