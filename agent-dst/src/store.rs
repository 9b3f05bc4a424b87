//! The journal of this host, as the destination uses it.
//!
//! Owns which record files there are and how their errors are told; writing them durably belongs to `vmferry_common::journal`.
//! The destination writes its own records only, but reads those of the source beside them: both together say who owns a
//! guest (`[HAND-11]`).

use vmferry_common::causes::chain;
use vmferry_common::journal::{JournalError, JournalReadError, RecordFile};
use vmferry_common::ownership;
use vmferry_common::state::{GuestLock, LockError, StateDir, StateError};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{DestinationRecord, SourceRecord};
use vmferry_proto::ids::GuestName;

/// The records of one state folder.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    state: StateDir,
}

impl Store {
    /// Records in `state`.
    pub(crate) const fn new(state: StateDir) -> Self {
        Self { state }
    }

    fn destination_file(&self, guest: &GuestName) -> RecordFile<DestinationRecord> {
        ownership::destination_file(&self.state, guest)
    }

    /// What the destination's journal says of `guest`.
    pub(crate) fn read_destination(
        &self,
        guest: &GuestName,
    ) -> Result<Option<DestinationRecord>, JournalReadError> {
        self.destination_file(guest).read()
    }

    /// What the source's journal says of `guest`.
    pub(crate) fn read_source(
        &self,
        guest: &GuestName,
    ) -> Result<Option<SourceRecord>, JournalReadError> {
        ownership::source_file(&self.state, guest).read()
    }

    /// [`read_destination`](Self::read_destination), its error as the peer is told.
    pub(crate) fn destination(
        &self,
        guest: &GuestName,
    ) -> Result<Option<DestinationRecord>, WireError> {
        self.read_destination(guest)
            .map_err(|error| unreadable(&error))
    }

    /// [`read_source`](Self::read_source), its error as the peer is told.
    pub(crate) fn source(&self, guest: &GuestName) -> Result<Option<SourceRecord>, WireError> {
        self.read_source(guest).map_err(|error| unreadable(&error))
    }

    /// Makes `record` the durable one of its guest.
    pub(crate) async fn write(&self, record: DestinationRecord) -> Result<(), WriteFailed> {
        let file = self.destination_file(&record.guest);
        let written = file.write_aside(record).await;
        written.map_err(|error| WriteFailed::from(&error))
    }

    /// Guests that the destination has a record of.
    pub(crate) fn guests(&self) -> Result<Vec<GuestName>, StateError> {
        self.state.guests_with(ownership::DESTINATION_KIND)
    }

    /// Takes the guest's name on this host.
    pub(crate) fn lock(&self, guest: &GuestName) -> Result<GuestLock, LockError> {
        self.state.lock(guest)
    }
}

/// A record could not be made durable.
#[derive(Debug)]
pub(crate) struct WriteFailed {
    /// Whether a restart may find it.
    pub(crate) visible: bool,
    /// Why.
    pub(crate) reason: WireError,
}

impl From<&JournalError> for WriteFailed {
    fn from(error: &JournalError) -> Self {
        Self {
            visible: error.visible,
            reason: journal(chain(error)),
        }
    }
}

fn unreadable(error: &JournalReadError) -> WireError {
    journal(chain(error))
}

fn journal(detail: String) -> WireError {
    WireError::new(ErrorCode::Journal, detail)
}
