//! Values that the handover's tests share.

use super::{
    DestinationFacts, DestinationHandover, Peer, ProcessRecord, SourceFacts, SourceHandover,
};
use crate::error::{ErrorCode, WireError};
use crate::ids::{Attempt, Generation, MigrationId, RegisterId};
use crate::message::AttemptKey;

pub(super) const KEY: AttemptKey = AttemptKey {
    migration: MigrationId::from_bytes([1; 16]),
    attempt: Attempt(1),
    register: RegisterId::from_bytes([2; 16]),
};
pub(super) const OTHER_KEY: AttemptKey = AttemptKey {
    register: RegisterId::from_bytes([3; 16]),
    ..KEY
};

pub(super) fn why() -> WireError {
    WireError::new(ErrorCode::Internal, "why")
}

pub(super) fn process() -> ProcessRecord {
    ProcessRecord {
        pid: 7,
        start_ticks: 8,
        boot_id: "boot".to_owned(),
    }
}

pub(super) fn source(shared_disks: bool) -> SourceHandover {
    SourceHandover::new(SourceFacts {
        guest: "web".parse().unwrap(),
        migration: KEY.migration,
        generation: Generation(4),
        peer: Peer {
            address: "beta:7000".to_owned(),
            identity: "beta".to_owned(),
        },
        process: process(),
        shared_disks,
    })
}

pub(super) fn destination() -> DestinationHandover {
    DestinationHandover::new(DestinationFacts {
        guest: "web".parse().unwrap(),
        migration: KEY.migration,
        generation: Generation(4),
        sender: "alpha".to_owned(),
        register: KEY.register,
        earlier: Vec::new(),
    })
}
