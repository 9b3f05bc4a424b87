//! What a migration does that takes time: hooks, and everything that the driver does with the guest.
//!
//! Owns the work itself, one piece after the other, since each may need the guest; the guest travels into the work and
//! back. Does not own what follows: the result is fed to the machine. A piece is never dropped half way but for the end of the
//! agent itself; only hooks are, which never have the guest in hand.

use std::sync::Arc;

use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::phase::Phase;
use vmferry_hypervisor::config::TargetConfig;
use vmferry_hypervisor::open::{CopyLeft, Hypervisors, Reopening, TargetOptions};
use vmferry_hypervisor::{GuestError, StartError, TargetGuest};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{ProcessRecord, RunPermit};
use vmferry_proto::ids::{Attempt, MigrationId, SessionNumber};
use vmferry_proto::message::{PrepareTiming, ResumePoint};
use vmferry_proto::spec::{GuestSpec, RegionKind, RunState};

use crate::board::Board;
use crate::durable::{CopyFiles, Folder};
use crate::error::guest_to_wire;
use crate::flusher;
use crate::hooks::Hooks;
use crate::receipt::Received;
use crate::sink::Sink;

/// A piece of work.
#[derive(Debug)]
pub(super) enum Job {
    /// Ask the hooks of a phase, then go on.
    Hook { phase: Phase, then: Then },
    /// Make the copy, or replace one that is used up.
    MakeCopy { renew: bool },
    /// Flush what was written so far, ahead of the pause.
    FlushAhead {
        sink: Arc<Sink>,
        board: Arc<Board>,
        then: Then,
    },
    /// Flush and load the device state.
    Load { received: Received, began: Instant },
    /// Start the guest.
    Start { permit: RunPermit, to: RunState },
    /// Remove the copy.
    Discard,
}

/// What follows a hook that did not refuse.
#[derive(Debug, Clone, Copy)]
pub(super) enum Then {
    OpenSession(SessionNumber),
    MakeCopy { renew: bool },
    SayReady,
    AskPause(SessionNumber, Attempt),
    OpenAttempt(SessionNumber, Attempt),
    Nothing,
}

/// A piece of work is done.
#[derive(Debug)]
pub(super) struct JobDone {
    /// The guest, back.
    pub(super) guest: Guest,
    /// How it went.
    pub(super) outcome: Outcome,
}

/// How a piece of work went.
#[derive(Debug)]
pub(super) enum Outcome {
    Asked {
        then: Then,
        asked: Result<(), WireError>,
    },
    /// Or not: the flush before the load tells, and the session's own flusher.
    FlushedAhead(Then),
    CopyMade(Result<Option<Box<Kept>>, WireError>),
    Loaded(Result<PrepareTiming, WireError>),
    Started(Result<u64, NotStarted>),
    Discarded(Result<(), WireError>),
}

/// What an earlier agent noted of a copy that is gone on with, or of one whose disks are.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) files: CopyFiles,
    pub(super) resume: Option<ResumePoint>,
}

/// A start that failed.
#[derive(Debug)]
pub(super) struct NotStarted {
    /// Whether the guest provably never ran.
    pub(super) never_ran: bool,
    pub(super) reason: WireError,
}

/// What the work is done with.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) hypervisors: Arc<dyn Hypervisors>,
    pub(super) config: TargetConfig,
    pub(super) options: TargetOptions,
    /// Where `options` says too: for what is noted there.
    pub(super) folder: Folder,
    pub(super) hooks: Hooks,
    pub(super) spec: Option<Arc<GuestSpec>>,
    pub(super) migration: MigrationId,
    pub(super) leftover: Option<ProcessRecord>,
}

pub(super) type Guest = Option<Box<dyn TargetGuest>>;

/// Does one piece of work.
pub(super) async fn run(job: Job, tools: Tools, mut guest: Guest) -> JobDone {
    let outcome = match job {
        Job::Hook { phase, then } => Outcome::Asked {
            then,
            asked: tools.hooks.ask(phase).await,
        },
        Job::FlushAhead { sink, board, then } => {
            if let Err(error) = flusher::flush_once(&sink, &board).await {
                tracing::warn!(guest = %tools.config.name, "the flush ahead of the pause failed: {}", chain(&error));
            }
            Outcome::FlushedAhead(then)
        }
        Job::MakeCopy { renew } => Outcome::CopyMade(make_copy(&tools, &mut guest, renew).await),
        Job::Load { received, began } => {
            Outcome::Loaded(load(guest.as_deref_mut(), &received, began).await)
        }
        Job::Start { permit, to } => Outcome::Started(start(&tools, &mut guest, permit, to).await),
        Job::Discard => Outcome::Discarded(discard(&tools, &mut guest).await),
    };
    JobDone { guest, outcome }
}

async fn make_copy(
    tools: &Tools,
    guest: &mut Guest,
    renew: bool,
) -> Result<Option<Box<Kept>>, WireError> {
    let failed = |error: GuestError| guest_to_wire(&error, "the guest's copy cannot be prepared");
    if let Some(used) = guest.as_mut() {
        if renew {
            used.renew().await.map_err(failed)?;
        }
        return Ok(None);
    }
    let spec = tools
        .spec
        .as_deref()
        .ok_or_else(|| missing("description of the guest"))?;
    let left = what_was_left(tools, spec);
    // Notes of an earlier process say nothing of this one's memory.
    if let Some(files) = left
        .as_ref()
        .filter(|files| files.record.process == tools.leftover)
        && let Some(found) = reopen_to_fill(tools, spec, files).await
    {
        *guest = Some(found);
        return Ok(left.map(|files| {
            Box::new(Kept {
                // It was flushed just now.
                resume: files.applied.resume_point(true),
                files,
            })
        }));
    }
    end_leftover(tools).await.map_err(failed)?;
    let Folder { storage, path } = &tools.folder;
    storage.make_folder(path).map_err(|source| {
        failed(GuestError::Io {
            what: format!("cannot make {}", path.display()),
            source,
        })
    })?;
    let opened = tools
        .hypervisors
        .open_target(&tools.config, spec, &tools.options)
        .await
        .map_err(failed)?;
    let opened = guest.insert(opened);
    Ok(left.map(|files| Box::new(keep_disks(&mut **opened, spec, files))))
}

/// The notes of an agent before this one, if it was this guest that it received.
fn what_was_left(tools: &Tools, spec: &GuestSpec) -> Option<CopyFiles> {
    let process = tools.leftover.as_ref()?;
    let guest = &tools.config.name;
    match CopyFiles::find(&tools.folder, tools.migration) {
        Ok(files) if files.record.spec.is_same_guest(spec) => Some(files),
        Ok(_) => {
            tracing::warn!(%guest, "the guest is not the one that an agent before this one received: its copy is made anew");
            None
        }
        Err(error) => {
            tracing::warn!(%guest, pid = process.pid, "the copy that an agent before this one made is not gone on with: {}", chain(&error));
            None
        }
    }
}

/// The copy that an agent before this one made, flushed; `None` where it cannot be filled on.
async fn reopen_to_fill(
    tools: &Tools,
    spec: &GuestSpec,
    files: &CopyFiles,
) -> Option<Box<dyn TargetGuest>> {
    let left = CopyLeft {
        process: tools.leftover.clone()?.into(),
        incarnations: files.record.incarnations.clone(),
        purpose: Reopening::Fill,
    };
    let Tools {
        config, options, ..
    } = tools;
    let found = match tools
        .hypervisors
        .reopen_target(config, spec, options, &left)
        .await
    {
        Ok(mut found) => found.flush().await.map(|()| found),
        Err(error) => Err(error),
    };
    let (guest, pid) = (&config.name, left.process.pid);
    match found {
        Ok(found) => {
            tracing::info!(%guest, pid, "going on with the copy that an agent before this one made");
            Some(found)
        }
        Err(error) => {
            tracing::warn!(%guest, pid, "the copy that an agent before this one made cannot be filled on: {}", chain(&error));
            None
        }
    }
}

/// A new process on the images of the old one: its memory begins with nothing, and its disks hold what was flushed.
fn keep_disks(opened: &mut dyn TargetGuest, spec: &GuestSpec, files: CopyFiles) -> Kept {
    for (region, incarnation) in spec.regions.iter().zip(&files.record.incarnations) {
        match region.kind {
            RegionKind::Disk => opened.keep_incarnation(region.id, *incarnation),
            RegionKind::Memory => {}
        }
    }
    Kept {
        resume: files.applied.resume_point(false),
        files,
    }
}

async fn load(
    guest: Option<&mut (dyn TargetGuest + 'static)>,
    received: &Received,
    began: Instant,
) -> Result<PrepareTiming, WireError> {
    let guest = guest.ok_or_else(|| missing("copy of the guest"))?;
    let flushed = guest.flush().await;
    flushed.map_err(|error| guest_to_wire(&error, "the disks cannot be flushed"))?;
    let flush_us = micros(began);
    let began = Instant::now();
    let loaded = guest.load_device_state(&received.state).await;
    loaded.map_err(|error| guest_to_wire(&error, "the device state cannot be loaded"))?;
    Ok(PrepareTiming {
        flush_us,
        load_us: micros(began),
        ..received.timing
    })
}

/// Microseconds that the start took.
async fn start(
    tools: &Tools,
    guest: &mut Guest,
    permit: RunPermit,
    to: RunState,
) -> Result<u64, NotStarted> {
    let began = Instant::now();
    let uncertain = |reason| NotStarted {
        never_ran: false,
        reason,
    };
    let guest = match guest {
        Some(guest) => guest,
        // An agent before this one had the copy: whether it sent the start is not known.
        None => guest.insert(reopen_to_start(tools).await.map_err(uncertain)?),
    };
    let doing = "the guest cannot be started";
    match guest.start(permit, to).await {
        Ok(()) => Ok(micros(began)),
        Err(StartError::NeverRan(error)) => Err(NotStarted {
            never_ran: true,
            reason: guest_to_wire(&error, doing),
        }),
        Err(StartError::MayHaveRun(error)) => Err(NotStarted {
            never_ran: false,
            reason: guest_to_wire(&error, doing),
        }),
    }
}

/// The loaded guest that an agent before this one left.
async fn reopen_to_start(tools: &Tools) -> Result<Box<dyn TargetGuest>, WireError> {
    let Tools {
        config, options, ..
    } = tools;
    let process = tools
        .leftover
        .as_ref()
        .ok_or_else(|| missing("copy of the guest"))?;
    let files = CopyFiles::find(&tools.folder, tools.migration).map_err(|error| {
        WireError::new(
            ErrorCode::Journal,
            format!(
                "the guest in process {} cannot be taken in hand: {}",
                process.pid,
                chain(&error)
            ),
        )
    })?;
    let left = CopyLeft {
        process: process.clone().into(),
        incarnations: files.record.incarnations,
        purpose: Reopening::Start,
    };
    let found = tools
        .hypervisors
        .reopen_target(config, &files.record.spec, options, &left)
        .await;
    found.map_err(|error| {
        if tools.hypervisors.is_alive(&left.process) {
            return guest_to_wire(&error, "the loaded guest cannot be taken in hand");
        }
        let detail = format!(
            "process {}, which held the guest, has ended: an ordinary crash of that guest, whose images are here and flushed; boot it from them",
            process.pid
        );
        WireError::new(ErrorCode::Hypervisor, detail)
    })
}

async fn discard(tools: &Tools, guest: &mut Guest) -> Result<(), WireError> {
    let failed = |error: GuestError| guest_to_wire(&error, "the guest's copy cannot be removed");
    match guest.as_mut() {
        Some(copy) => copy.discard().await.map_err(failed)?,
        None => end_leftover(tools).await.map_err(failed)?,
    }
    *guest = None;
    remove_stale_sockets(tools);
    let Folder { storage, path } = &tools.folder;
    storage.remove_folder(path).map_err(|source| {
        failed(GuestError::Io {
            what: format!("cannot remove {}", path.display()),
            source,
        })
    })
}

/// Ends the process of a copy that an earlier agent launched. One that the administrator started is left to him.
async fn end_leftover(tools: &Tools) -> Result<(), GuestError> {
    let Some(process) = tools
        .leftover
        .clone()
        .filter(|_| tools.config.launch.is_some())
    else {
        return Ok(());
    };
    tools.hypervisors.end(&process.into()).await?;
    remove_stale_sockets(tools);
    Ok(())
}

/// Removes the sockets of a launched copy that has ended. One that somebody listens on is another guest's.
fn remove_stale_sockets(tools: &Tools) {
    if tools.config.launch.is_none() {
        return;
    }
    for socket in [&tools.config.qmp, &tools.config.socket]
        .into_iter()
        .flatten()
    {
        let tried = std::os::unix::net::UnixStream::connect(socket);
        if tried.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
            && let Err(error) = std::fs::remove_file(socket)
        {
            tracing::warn!(socket = %socket.display(), %error, "a stale socket is left");
        }
    }
}

fn missing(what: &str) -> WireError {
    WireError::new(ErrorCode::Internal, format!("there is no {what} here"))
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
