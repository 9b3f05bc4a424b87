//! What all migrations of one agent share and none changes.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vmferry_common::hooks::Hooks;
use vmferry_common::state::{StateDir, StateError};
use vmferry_common::storage::{Files, Storage};
use vmferry_hypervisor::open::Hypervisors;
use vmferry_proto::ids::RegisterId;

use crate::config::GuestFiles;
use crate::store::Store;

/// Folder under which each guest has one for its logs, its sockets and what is noted of its copy.
#[derive(Debug, Clone)]
pub struct RunFolder {
    /// Where it is.
    pub storage: Arc<dyn Storage>,
    /// Its path there.
    pub path: PathBuf,
}

impl From<PathBuf> for RunFolder {
    fn from(path: PathBuf) -> Self {
        Self {
            storage: Arc::new(Files),
            path,
        }
    }
}

/// This host, as the migrations see it.
#[derive(Debug)]
pub struct Host {
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
    /// Where each guest has a folder.
    pub(crate) run: RunFolder,
    /// The hypervisors that guests arrive in.
    pub(crate) hypervisors: Arc<dyn Hypervisors>,
}

impl Host {
    /// A host whose journal is in `state`.
    ///
    /// # Errors
    /// The folder has no register id and cannot be given one.
    pub fn new(
        state: StateDir,
        guests: GuestFiles,
        hooks: Hooks,
        keep: Duration,
        run: RunFolder,
        hypervisors: Arc<dyn Hypervisors>,
    ) -> Result<Self, StateError> {
        Ok(Self {
            register: state.register()?,
            store: Store::new(state),
            guests,
            hooks,
            keep,
            run,
            hypervisors,
        })
    }
}
