//! What is held while a guest is worked on: its lock, its control socket, the guest itself, and what an earlier agent left of it.
//!
//! Owns the taking of all that, in an order that harms nobody who is at work already, and the choice of the machine: of what the
//! journal left unfinished, or a new one. What is done at the desk is `run`'s.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::endpoint::{Connector, Udp};
use vmferry_common::local::Events;
use vmferry_common::ownership;
use vmferry_common::process::ProcessIdentity;
use vmferry_common::state::{GuestLock, StateDir, new_migration_id};
use vmferry_hypervisor::open::{Drivers, Hypervisors, Leftovers};
use vmferry_hypervisor::{GoneGuest, SourceGuest};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    Peer as PeerRecord, SourceAction, SourceFacts, SourceHandover, SourceRecord, SourceState,
};
use vmferry_proto::ids::GuestName;

use crate::cli::MigrateOptions;
use crate::durable::{self, DurableFiles, Keeping};
use crate::error::MigrateError;
use crate::local::{self, Command};

/// A migration that never began: nothing was done to the guest.
#[derive(Debug)]
pub struct NotBegun {
    /// Whether the user's input or configuration is to blame (exit code 2).
    pub usage: bool,
    /// Why.
    pub error: WireError,
}

impl NotBegun {
    pub(crate) fn usage(error: &dyn std::error::Error) -> Self {
        Self {
            usage: true,
            error: WireError::new(ErrorCode::Internal, chain(error)),
        }
    }

    /// No runtime could be started.
    #[must_use]
    pub fn runtime(error: &std::io::Error) -> Self {
        Self::failed(ErrorCode::Internal, error)
    }

    pub(crate) fn failed(code: ErrorCode, error: &dyn std::error::Error) -> Self {
        Self {
            usage: false,
            error: WireError::new(code, chain(error)),
        }
    }
}

/// Everything that must be held while a guest is worked on.
#[derive(Debug)]
pub struct Desk {
    /// The guest, attached.
    pub guest: Box<dyn SourceGuest>,
    /// Where its journal is.
    pub state: StateDir,
    /// The right to work on it.
    pub lock: GuestLock,
    /// What the destination is reached by.
    pub connector: Arc<dyn Connector>,
    /// What people at other terminals want.
    pub commands: mpsc::Receiver<Command>,
    /// Those who listen.
    pub events: Events,
    /// What is kept for a later agent, and what one before this one kept; `None` where a killed agent cannot be gone on with.
    pub keeping: Option<Keeping>,
    /// When the program began.
    pub began: Instant,
}

impl Desk {
    pub(crate) fn found(&self, name: &GuestName) -> Result<Option<SourceRecord>, NotBegun> {
        ownership::source_file(&self.state, name)
            .read()
            .map_err(|error| NotBegun::failed(ErrorCode::Journal, &error))
    }
}

/// What an agent has come for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose {
    /// To go on.
    Migrate,
    /// To finish and to leave no trace.
    Recover,
}

impl Purpose {
    /// Whether what `found` says of its guest is settled before anything else is done.
    const fn settles(self, found: &SourceRecord) -> bool {
        match self {
            Self::Migrate => matches!(found.state, SourceState::Committing { .. }),
            Self::Recover => !matches!(found.state, SourceState::Ended { .. }),
        }
    }
}

/// The desk, and the control socket while it is held.
pub(crate) async fn sit_down(
    options: &MigrateOptions,
    began: Instant,
    purpose: Purpose,
) -> Result<(Desk, local::Server), NotBegun> {
    let name = &options.guest.name;
    let state = StateDir::open(&options.state).map_err(|error| NotBegun::usage(&error))?;
    let lock = state
        .lock(name)
        .map_err(|error| NotBegun::failed(ErrorCode::GuestBusy, &error))?;
    let (sender, commands) = mpsc::channel(local::QUEUE);
    local::forward_signals(sender.clone())
        .map_err(|error| NotBegun::failed(ErrorCode::Internal, &error))?;
    let socket = local::Server::start(&local::socket_path(&options.state, name.as_str()), sender)
        .map_err(|error| NotBegun::usage(&error))?;
    let files = DurableFiles::new(&options.state, name);
    let (guest, keeping) = open_guest(options, &state, files, &Drivers, purpose).await?;
    let desk = Desk {
        guest,
        state,
        lock,
        connector: Arc::new(Udp),
        commands,
        events: socket.events(),
        keeping: Some(keeping),
        began,
    };
    Ok((desk, socket))
}

/// The guest, and what an agent that was killed in the copy left of it in `files` for this one.
///
/// # Errors
/// The journal cannot be read, the guest cannot be attached to, or another one answers in its place.
pub async fn open_guest(
    options: &MigrateOptions,
    state: &StateDir,
    files: DurableFiles,
    hypervisors: &dyn Hypervisors,
    purpose: Purpose,
) -> Result<(Box<dyn SourceGuest>, Keeping), NotBegun> {
    let name = &options.guest.name;
    let found = ownership::source_file(state, name)
        .read()
        .map_err(|error| NotBegun::failed(ErrorCode::Journal, &error))?;
    let settled = found.as_ref().filter(|found| purpose.settles(found));
    if let Some(gone) = settled.and_then(|found| gone(name, found, hypervisors)) {
        let process = gone.process();
        let about = format!(
            "{process}, which held the guest, is gone: what the journal says is settled without it"
        );
        let keeping = Keeping {
            files,
            taken_over: None,
            about: Some(about),
        };
        return Ok((Box::new(gone), keeping));
    }
    let left = match (purpose, &found) {
        (Purpose::Migrate, Some(found)) if can_go_on(found, options) => Some(files.find(found)),
        (Purpose::Migrate | Purpose::Recover, _) => None,
    };
    let leftovers = match &left {
        Some(Ok(_)) => Leftovers::KeepTracking,
        Some(Err(_)) | None => Leftovers::Remove,
    };
    let opened = hypervisors.open_source(&options.guest, leftovers).await;
    let mut guest = opened.map_err(|error| NotBegun {
        usage: false,
        error: MigrateError::Guest(error).to_wire(),
    })?;
    if let Some(other) = settled.filter(|found| !is_same(found, &*guest)) {
        return Err(another_answers(other, &*guest));
    }
    let keeping = durable::take_over(files, left, &mut *guest).await;
    Ok((guest, keeping))
}

/// The guest of `found`, if its process is gone for sure. Whoever answers at its socket by now is not the one that was paused, and must
/// be neither resumed nor ended on the strength of that record.
fn gone(
    name: &GuestName,
    found: &SourceRecord,
    hypervisors: &dyn Hypervisors,
) -> Option<GoneGuest> {
    let process = ProcessIdentity::from(found.process.clone());
    // What cannot be told counts as there: then it is attached to, or that fails with the reason.
    (!hypervisors.is_alive(&process)).then(|| GoneGuest::new(name, process))
}

fn is_same(found: &SourceRecord, guest: &dyn SourceGuest) -> bool {
    found.process == guest.process().into()
}

fn another_answers(found: &SourceRecord, guest: &dyn SourceGuest) -> NotBegun {
    let detail = format!(
        "the journal speaks of guest {} in process {}, which still runs, but {} answers at the socket of its guest file: correct the guest file, or end the process that is not the guest",
        found.guest,
        found.process.pid,
        guest.process()
    );
    NotBegun {
        usage: false,
        error: WireError::new(ErrorCode::GuestBusy, detail),
    }
}

/// Whether the copy that the journal tells of can be gone on with. In doubt it cannot: the images may be inactive, and what
/// follows is hardly a copy.
fn can_go_on(found: &SourceRecord, options: &MigrateOptions) -> bool {
    is_unfinished(found, options)
        && matches!(
            found.state,
            SourceState::Copying { .. }
                | SourceState::Pausing { .. }
                | SourceState::RolledBack { .. }
        )
}

/// The handover machine: of what the journal left unfinished, else a new one.
pub(crate) fn machine(
    options: &MigrateOptions,
    desk: &Desk,
) -> Result<(SourceHandover, Vec<SourceAction>), NotBegun> {
    match desk.found(&options.guest.name)? {
        Some(found) if is_left_of(&found, options, desk) => Ok(SourceHandover::recover(found)),
        // The guest was booted afresh: what the destination has of its copy is compared.
        Some(found) if is_copy_for(&found, options) => Ok(SourceHandover::recover(SourceRecord {
            process: desk.guest.process().into(),
            shared_disks: has_shared_disks(desk),
            ..found
        })),
        Some(_) | None => Ok((SourceHandover::new(facts(options, desk)?), Vec::new())),
    }
}

/// Whether `found` must be settled, or is gone on with, with the guest that is here. One that was booted afresh since is no matter of an
/// attempt that was not committed. The very process that a commit has let go must never be moved or run again: its agent died
/// before it ended it.
fn is_left_of(found: &SourceRecord, options: &MigrateOptions, desk: &Desk) -> bool {
    let released = matches!(found.state, SourceState::Released { .. });
    is_same(found, &*desk.guest) && (released || is_unfinished(found, options))
}

/// Whether an earlier agent left something of this guest that must be finished, or can be gone on with.
fn is_unfinished(found: &SourceRecord, options: &MigrateOptions) -> bool {
    match &found.state {
        // Gone on with only where the destination is the same one.
        SourceState::Copying { .. } => is_copy_for(found, options),
        SourceState::Pausing { .. }
        | SourceState::Committing { .. }
        | SourceState::RolledBack { .. }
        | SourceState::Fenced { .. } => true,
        SourceState::Released { .. } | SourceState::Ended { .. } => false,
    }
}

fn is_copy_for(found: &SourceRecord, options: &MigrateOptions) -> bool {
    matches!(found.state, SourceState::Copying { .. })
        && found.peer.address == options.to.to_string()
}

fn has_shared_disks(desk: &Desk) -> bool {
    !desk.guest.spec().shared_disks.is_empty()
}

fn facts(options: &MigrateOptions, desk: &Desk) -> Result<SourceFacts, NotBegun> {
    let journal = |error: &dyn std::error::Error| NotBegun::failed(ErrorCode::Journal, error);
    let migration = new_migration_id().map_err(|error| journal(&error))?;
    let known = ownership::highest_generation(&desk.state, &options.guest.name)
        .map_err(|error| journal(&error))?;
    Ok(SourceFacts {
        guest: options.guest.name.clone(),
        migration,
        generation: known.next(),
        peer: PeerRecord {
            address: options.to.to_string(),
            identity: options.to.host.clone(),
        },
        process: desk.guest.process().into(),
        shared_disks: has_shared_disks(desk),
    })
}
