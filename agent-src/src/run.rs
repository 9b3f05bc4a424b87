//! From checked options to a report: the verbs that work on a guest.
//!
//! Owns the order of a migration and of a recovery: take the desk, remember how to come back, run, tell the end. What is held meanwhile is
//! `desk`'s, what happens in between is `migrate`'s, what it came to is `outcome`'s.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::endpoint::TransportTuning;
use vmferry_common::hooks::Hooks;
use vmferry_common::identity::Identity;
use vmferry_common::local::Events;
use vmferry_common::ownership;
use vmferry_common::state::StateDir;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{SourceAction, SourceEvent, SourceHandover, SourceState};
use vmferry_proto::ids::GuestName;

use crate::cli::MigrateOptions;
pub use crate::desk::{Desk, NotBegun, Purpose, open_guest};
use crate::desk::{machine, sit_down};
use crate::local::Waiter;
use crate::migrate::{Migration, Parts};
use crate::outcome::{state_before, summarise};
use crate::progress::Progress;
use crate::report::Report;
use crate::saved::{self, SavedCommand};
use crate::session::Dialer;

/// How long a hook script may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

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
    note_what_was_found(&desk, &mut progress);
    let machine = machine(&options, &desk)?;
    remember(&options, &desk)?;
    run(options, identity, desk, machine, progress, false).await
}

fn note_what_was_found(desk: &Desk, progress: &mut Progress) {
    if let Some(text) = desk.keeping.as_ref().and_then(|kept| kept.about.as_ref()) {
        progress.note(text);
    }
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
    mut progress: Progress,
) -> Result<Report, NotBegun> {
    note_what_was_found(&desk, &mut progress);
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
