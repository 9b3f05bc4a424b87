//! From checked options to a report: the setting-up and taking-down around a migration.
//!
//! Owns guest lock, journal, generation, control socket and signals, and what a failure before the first connection
//! looks like. What happens between is `migrate`'s; what is printed is `report`'s.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::endpoint::{Connector, TransportTuning, Udp};
use vmferry_common::hooks::Hooks;
use vmferry_common::identity::Identity;
use vmferry_common::local::Events;
use vmferry_common::ownership;
use vmferry_common::phase::{Ending, Phase};
use vmferry_common::state::{GuestLock, StateDir, new_migration_id};
use vmferry_hypervisor::SourceGuest;
use vmferry_hypervisor::open::{Leftovers, open_source_with};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    Peer as PeerRecord, SourceAction, SourceEnd, SourceEvent, SourceFacts, SourceHandover,
    SourceRecord, SourceState,
};
use vmferry_proto::ids::GuestName;
use vmferry_proto::spec::RunState;

use crate::cli::MigrateOptions;
use crate::durable::{self, DurableFiles, Keeping};
use crate::error::MigrateError;
use crate::local::{self, Command, Waiter};
use crate::migrate::{Ended, Migration, Parts};
use crate::progress::Progress;
use crate::report::{End, GuestNow, Millis, Peer, Report, Verified};
use crate::saved::{self, SavedCommand};
use crate::session::Dialer;

/// How long a hook script may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

/// A migration that never began: nothing was done to the guest.
#[derive(Debug)]
pub struct NotBegun {
    /// Whether the user's input or configuration is to blame (exit code 2).
    pub usage: bool,
    /// Why.
    pub error: WireError,
}

impl NotBegun {
    fn usage(error: &dyn std::error::Error) -> Self {
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

    fn failed(code: ErrorCode, error: &dyn std::error::Error) -> Self {
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
    fn found(&self, name: &GuestName) -> Result<Option<SourceRecord>, NotBegun> {
        ownership::source_file(&self.state, name)
            .read()
            .map_err(|error| NotBegun::failed(ErrorCode::Journal, &error))
    }
}

/// Moves a guest.
///
/// # Errors
/// [`NotBegun`] before anything was done to the guest.
pub async fn migrate(options: MigrateOptions, progress: Progress) -> Result<Report, NotBegun> {
    let began = Instant::now();
    let identity = Identity::load(&options.identity).map_err(|error| NotBegun::usage(&error))?;
    let (desk, _socket) = sit_down(&options, began, Purpose::Migrate).await?;
    migrate_at(desk, options, Arc::new(identity), progress).await
}

/// [`migrate`], at a desk where everything is there.
///
/// # Errors
/// [`NotBegun`] before anything was done to the guest.
pub async fn migrate_at(
    desk: Desk,
    options: MigrateOptions,
    identity: Arc<Identity>,
    mut progress: Progress,
) -> Result<Report, NotBegun> {
    if let Some(text) = desk.keeping.as_ref().and_then(|kept| kept.about.as_ref()) {
        progress.note(text);
    }
    let machine = machine(&options, &desk)?;
    remember(&options, &desk)?;
    run(options, identity, desk, machine, progress, false).await
}

/// The operator's word that the destination host cannot run the guest nor write to its disks (`[HAND-9]`).
#[derive(Debug, Clone, Copy)]
pub struct DestinationIsFenced;

/// Finishes what the journal says of a guest, and nothing more; on the operator's word without asking the destination.
///
/// # Errors
/// [`NotBegun`] before anything was done.
pub async fn recover(
    state: &Path,
    name: &GuestName,
    identity: Option<PathBuf>,
    fenced: Option<DestinationIsFenced>,
    progress: Progress,
) -> Result<Report, NotBegun> {
    let began = Instant::now();
    let dir = StateDir::existing(state).map_err(|error| NotBegun::usage(&error))?;
    let options = saved_options(&dir, name, identity)?;
    let identity = Identity::load(&options.identity).map_err(|error| NotBegun::usage(&error))?;
    let (desk, _socket) = sit_down(&options, began, Purpose::Recover).await?;
    recover_at(desk, options, Arc::new(identity), fenced, progress).await
}

/// [`recover`], at a desk where everything is there, with the options of [`saved_options`].
///
/// # Errors
/// [`NotBegun`] before anything was done.
pub async fn recover_at(
    desk: Desk,
    options: MigrateOptions,
    identity: Arc<Identity>,
    fenced: Option<DestinationIsFenced>,
    progress: Progress,
) -> Result<Report, NotBegun> {
    let name = &options.guest.name;
    let Some(found) = desk.found(name)? else {
        return Err(nothing_to_recover(&desk.state, name));
    };
    if let SourceState::Ended { reason, .. } = &found.state {
        return Err(settled_already(name, reason));
    }
    let (mut handover, mut actions) = SourceHandover::recover(found);
    if fenced.is_some() {
        let word = handover.handle(SourceEvent::ResolveDestinationFenced);
        actions.extend(word.map_err(|error| NotBegun::usage(&error))?);
    }
    run(options, identity, desk, (handover, actions), progress, true).await
}

fn nothing_to_recover(state: &StateDir, name: &GuestName) -> NotBegun {
    let detail = format!(
        "no migration of {name} is recorded in {}: nothing to recover",
        state.path().display()
    );
    NotBegun {
        usage: true,
        error: WireError::new(ErrorCode::Journal, detail),
    }
}

fn settled_already(name: &GuestName, reason: &WireError) -> NotBegun {
    let detail = format!(
        "the last migration of {name} has ended and the guest is this host's: nothing to recover (it ended so: {})",
        reason.detail
    );
    NotBegun {
        usage: true,
        error: WireError::new(ErrorCode::Journal, detail),
    }
}

/// The options of the migration that the journal tells of.
///
/// # Errors
/// [`NotBegun`] where the journal cannot be read or tells of none.
pub fn saved_options(
    state: &StateDir,
    name: &GuestName,
    identity: Option<PathBuf>,
) -> Result<MigrateOptions, NotBegun> {
    let journal = |error: &dyn std::error::Error| NotBegun::failed(ErrorCode::Journal, error);
    let record = ownership::source_file(state, name)
        .read()
        .map_err(|error| journal(&error))?;
    let saved = saved::file(state, name)
        .read()
        .map_err(|error| journal(&error))?;
    let (Some(record), Some(saved)) = (record, saved) else {
        return Err(nothing_to_recover(state, name));
    };
    let to = record
        .peer
        .address
        .parse()
        .map_err(|error| NotBegun::usage(&error))?;
    let identity = identity.unwrap_or(saved.identity);
    Ok(MigrateOptions::to_recover(
        saved.guest,
        to,
        identity,
        state.path().to_owned(),
        saved.hooks,
    ))
}

/// Writes down how to come back to this guest, before anything is done to it.
fn remember(options: &MigrateOptions, desk: &Desk) -> Result<(), NotBegun> {
    let saved = SavedCommand {
        guest: options.guest.clone(),
        identity: options.identity.clone(),
        hooks: options.hooks.clone(),
    };
    saved::file(&desk.state, &options.guest.name)
        .write(&saved)
        .map_err(|error| NotBegun::failed(ErrorCode::Journal, &error))
}

/// What an agent has come for.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    /// To go on.
    Migrate,
    /// To finish and to leave no trace.
    Recover,
}

/// The desk, and the control socket while it is held.
async fn sit_down(
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
    let (guest, keeping) = open_guest(options, &state, purpose).await?;
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

/// The guest, and what an agent that was killed in the copy left of it for this one.
async fn open_guest(
    options: &MigrateOptions,
    state: &StateDir,
    purpose: Purpose,
) -> Result<(Box<dyn SourceGuest>, Keeping), NotBegun> {
    let files = DurableFiles::new(&options.state, &options.guest.name);
    let found = ownership::source_file(state, &options.guest.name)
        .read()
        .map_err(|error| NotBegun::failed(ErrorCode::Journal, &error))?;
    let left = match (purpose, found) {
        (Purpose::Migrate, Some(found)) if can_go_on(&found, options) => Some(files.find(&found)),
        (Purpose::Migrate | Purpose::Recover, _) => None,
    };
    let leftovers = match &left {
        Some(Ok(_)) => Leftovers::KeepTracking,
        Some(Err(_)) | None => Leftovers::Remove,
    };
    let opened = open_source_with(&options.guest, leftovers).await;
    let mut guest = opened.map_err(|error| NotBegun {
        usage: false,
        error: MigrateError::Guest(error).to_wire(),
    })?;
    let keeping = durable::take_over(files, left, &mut *guest).await;
    Ok((guest, keeping))
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
fn machine(
    options: &MigrateOptions,
    desk: &Desk,
) -> Result<(SourceHandover, Vec<SourceAction>), NotBegun> {
    match desk.found(&options.guest.name)? {
        Some(found) if is_unfinished(&found, options) || is_stale_copy(&found, desk) => {
            Ok(SourceHandover::recover(found))
        }
        Some(_) | None => Ok((SourceHandover::new(facts(options, desk)?), Vec::new())),
    }
}

/// Whether the guest here is the very process that a commit has let go: its agent died before it ended it, and it must never be
/// moved or run again.
fn is_stale_copy(found: &SourceRecord, desk: &Desk) -> bool {
    let here = desk.guest.process();
    let known = &found.process;
    matches!(found.state, SourceState::Released { .. })
        && (known.pid, known.start_ticks, &known.boot_id)
            == (here.pid, here.start_ticks, &here.boot_id)
}

/// Whether an earlier agent left something of this guest that must be finished, or can be gone on with.
fn is_unfinished(found: &SourceRecord, options: &MigrateOptions) -> bool {
    match &found.state {
        // Gone on with only where the destination is the same one.
        SourceState::Copying { .. } => found.peer.address == options.to.to_string(),
        SourceState::Pausing { .. }
        | SourceState::Committing { .. }
        | SourceState::RolledBack { .. }
        | SourceState::Fenced { .. } => true,
        SourceState::Released { .. } | SourceState::Ended { .. } => false,
    }
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
        shared_disks: !desk.guest.spec().shared_disks.is_empty(),
    })
}

async fn run(
    options: MigrateOptions,
    identity: Arc<Identity>,
    desk: Desk,
    (handover, actions): (SourceHandover, Vec<SourceAction>),
    progress: Progress,
    only_recover: bool,
) -> Result<Report, NotBegun> {
    let Desk {
        guest,
        state,
        lock: _lock,
        connector,
        commands,
        events,
        keeping,
        began,
    } = desk;
    let record = handover.record();
    let dialer = Dialer {
        connector,
        to: options.to.clone(),
        identity,
        tuning: TransportTuning {
            congestion: options.congestion,
            ..TransportTuning::default()
        },
        guest: record.guest.clone(),
        migration: record.migration,
        generation: record.generation,
        lanes: options.lanes,
        connections: options.connections,
    };
    let before = state_before(&record, guest.spec().run_state);
    let hooks = Hooks::new(Some(options.hooks.clone()), HOOK_LIMIT);
    let parts = Parts {
        hooks: hooks.clone(),
        events: events.clone(),
        options: options.clone(),
        guest,
        dialer,
        handover,
        keeping,
        journal: ownership::source_file(&state, &record.guest),
        commands,
        progress,
        began,
        only_recover,
    };
    let migration = Migration::new(parts).map_err(|error| NotBegun {
        usage: false,
        error: error.to_wire(),
    })?;
    let ended = migration.run(actions).await;
    let (report, waiters) = summarise(&options, &record, before, ended, began.elapsed());
    tell_the_end(&hooks, &events, &record.guest, &report).await;
    answer(waiters, &report).await;
    Ok(report)
}

/// The state that the guest is in while nobody migrates it: it may be an earlier agent that paused it.
fn state_before(record: &SourceRecord, found: RunState) -> RunState {
    match record.state {
        SourceState::Copying { .. } | SourceState::Ended { .. } => found,
        SourceState::Pausing { .. }
        | SourceState::Committing { .. }
        | SourceState::RolledBack { .. }
        | SourceState::Released { .. }
        | SourceState::Fenced { .. } => record.run_state_before,
    }
}

/// Tells scripts and listeners how it ended; it changes nothing any more.
async fn tell_the_end(hooks: &Hooks, events: &Events, guest: &GuestName, report: &Report) {
    let object = serde_json::to_value(report).unwrap_or_default();
    if let Err(failure) = hooks.run(report.outcome, guest, &object).await {
        tracing::warn!(error = %chain(&failure), "a hook of the end failed; that changes nothing");
    }
    events.send("END", object);
}

/// Tells those who wait at the control socket, and gives the answers time to leave.
async fn answer(waiters: Vec<Waiter>, report: &Report) {
    let Ok(object) = serde_json::to_value(report) else {
        return;
    };
    let any = !waiters.is_empty();
    for waiter in waiters {
        // The asker may have gone away: then nobody wants the answer.
        let _ = waiter.send(object.clone());
    }
    if any {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn summarise(
    options: &MigrateOptions,
    record: &SourceRecord,
    before: RunState,
    ended: Ended,
    total: Duration,
) -> (Report, Vec<Waiter>) {
    let end = ending(&ended, before);
    let peer = Peer {
        address: options.to.to_string(),
        agent: ended.stats.agent.clone(),
    };
    let mut report = Report::new(
        record.migration.to_string(),
        record.guest.to_string(),
        peer,
        end,
    );
    let stats = &ended.stats;
    report.total_ms = Millis(total);
    report.set_rounds(&stats.rounds, stats.last_set.as_ref());
    if let Some((downtime, parts)) = stats.downtime() {
        report.set_downtime(downtime, parts);
    }
    report.attempts = stats.attempts;
    report.sessions = stats.sessions;
    report.memory_bytes = stats.memory_bytes;
    report.disk_bytes = stats.disk_bytes;
    report.raw_bytes = ended.sent.raw_bytes;
    report.wire_bytes = ended.sent.wire_bytes;
    report.zero_blocks = ended.sent.zero_blocks;
    report.resent_blocks = ended.sent.resent_blocks;
    report.device_state_bytes = stats.device_state_bytes;
    report.guest_stall_ms = Millis(stats.longest_hold);
    report.barrier_stall_ms = Millis(stats.longest_barrier);
    report.verified = Verified {
        mode: options.verify,
        windows: stats.windows_compared,
        bytes: stats.bytes_compared,
        resent_discarded: stats.resent_discarded,
    };
    (report, ended.waiters)
}

fn ending(ended: &Ended, before: RunState) -> End {
    let here = match before {
        RunState::Running => GuestNow::RunsAtSource,
        RunState::Paused => GuestNow::PausedAtSource,
    };
    let there = match before {
        RunState::Running => GuestNow::RunsAtDestination,
        RunState::Paused => GuestNow::PausedAtDestination,
    };
    let with_error = |outcome, guest_now, error: &WireError, phase: Phase| End {
        outcome,
        guest_now,
        error: Some((error.clone(), Some(phase))),
    };
    match &ended.end {
        Some(SourceEnd::Committed) => End {
            outcome: Ending::Committed,
            guest_now: there,
            error: None,
        },
        Some(SourceEnd::NotCommitted { reason, .. }) => {
            let now = if ended.guest_is_gone {
                GuestNow::Ended
            } else {
                here
            };
            let outcome = match reason.code {
                ErrorCode::Cancelled => Ending::Cancelled,
                _ if ended.rolled_back.is_some() && ended.stats.attempts > 0 => Ending::RolledBack,
                _ => Ending::Failed,
            };
            with_error(outcome, now, reason, ended.phase)
        }
        Some(SourceEnd::ResumedByOperator) => End {
            outcome: Ending::RolledBack,
            guest_now: here,
            error: None,
        },
        Some(SourceEnd::EndedByOperator) => End {
            outcome: Ending::RolledBack,
            guest_now: GuestNow::Ended,
            error: None,
        },
        None => {
            let now = if ended.in_doubt {
                GuestNow::InDoubt
            } else {
                GuestNow::StuckAtSource
            };
            let outcome = if ended.in_doubt {
                Ending::InDoubt
            } else {
                Ending::Failed
            };
            let told = WireError::new(
                ErrorCode::ShuttingDown,
                "the agent was told to stop before the migration was settled",
            );
            with_error(
                outcome,
                now,
                ended.rolled_back.as_ref().unwrap_or(&told),
                ended.phase,
            )
        }
    }
}
