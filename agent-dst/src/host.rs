//! What all migrations of one agent share and none changes.

use std::path::PathBuf;
use std::time::Duration;

use vmferry_common::hooks::Hooks;
use vmferry_proto::ids::RegisterId;

use crate::config::GuestFiles;
use crate::store::Store;

/// This host, as the migrations see it.
#[derive(Debug)]
pub(crate) struct Host {
    /// The guests that may arrive.
    pub(crate) guests: GuestFiles,
    /// The journal.
    pub(crate) store: Store,
    /// The outcome register of the state folder (`[HAND-2]`).
    pub(crate) register: RegisterId,
    /// Scripts to ask and tell.
    pub(crate) hooks: Hooks,
    /// For how long a copy is kept without its source.
    pub(crate) keep: Duration,
    /// Folder under which each guest has one for its logs and sockets.
    pub(crate) run_dir: PathBuf,
}
