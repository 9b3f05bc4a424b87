//! What a migration does that takes time: hooks, and everything that the driver does with the guest.
//!
//! Owns the work itself, one piece after the other, since each may need the guest; the guest travels into the work and
//! back. Does not own what follows: the result is fed to the machine. A piece is never dropped half way but for the end of the
//! agent itself; only hooks are, which never have the guest in hand.

use std::sync::Arc;

use tokio::time::Instant;
use vmferry_common::phase::Phase;
use vmferry_hypervisor::config::TargetConfig;
use vmferry_hypervisor::open::{Hypervisors, TargetOptions};
use vmferry_hypervisor::{GuestError, StartError, TargetGuest};
use vmferry_proto::error::WireError;
use vmferry_proto::handover::{ProcessRecord, RunPermit};
use vmferry_proto::ids::{Attempt, SessionNumber};
use vmferry_proto::message::PrepareTiming;
use vmferry_proto::spec::{GuestSpec, RunState};

use crate::board::Board;
use crate::error::{chain, guest_to_wire};
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
    CopyMade(Result<(), WireError>),
    Loaded(Result<PrepareTiming, WireError>),
    Started(Result<u64, NotStarted>),
    Discarded(Result<(), WireError>),
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
    pub(super) hooks: Hooks,
    pub(super) spec: Option<Arc<GuestSpec>>,
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
        Job::Start { permit, to } => {
            Outcome::Started(start(guest.as_deref_mut(), permit, to).await)
        }
        Job::Discard => Outcome::Discarded(discard(&tools, &mut guest).await),
    };
    JobDone { guest, outcome }
}

async fn make_copy(tools: &Tools, guest: &mut Guest, renew: bool) -> Result<(), WireError> {
    let failed = |error: GuestError| guest_to_wire(&error, "the guest's copy cannot be prepared");
    if let Some(used) = guest.as_mut() {
        return if renew {
            used.renew().await.map_err(failed)
        } else {
            Ok(())
        };
    }
    end_leftover(tools).await.map_err(failed)?;
    let folder = &tools.options.run_dir;
    std::fs::create_dir_all(folder).map_err(|source| {
        failed(GuestError::Io {
            what: format!("cannot make {}", folder.display()),
            source,
        })
    })?;
    let spec = tools
        .spec
        .as_ref()
        .ok_or_else(|| missing("description of the guest"))?;
    let opened = tools
        .hypervisors
        .open_target(&tools.config, spec, &tools.options)
        .await
        .map_err(failed)?;
    *guest = Some(opened);
    Ok(())
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
    guest: Option<&mut (dyn TargetGuest + 'static)>,
    permit: RunPermit,
    to: RunState,
) -> Result<u64, NotStarted> {
    let began = Instant::now();
    let Some(guest) = guest else {
        // An agent before this one had the copy: whether it sent the start is not known.
        return Err(NotStarted {
            never_ran: false,
            reason: missing("copy of the guest, which an agent before this one held"),
        });
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

async fn discard(tools: &Tools, guest: &mut Guest) -> Result<(), WireError> {
    let failed = |error: GuestError| guest_to_wire(&error, "the guest's copy cannot be removed");
    match guest.as_mut() {
        Some(copy) => copy.discard().await.map_err(failed)?,
        None => end_leftover(tools).await.map_err(failed)?,
    }
    *guest = None;
    remove_stale_sockets(tools);
    let folder = &tools.options.run_dir;
    match std::fs::remove_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed(GuestError::Io {
            what: format!("cannot remove {}", folder.display()),
            source,
        })),
    }
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
    let process = crate::process::identity(&process);
    tools.hypervisors.end(&process).await?;
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
    WireError::new(
        vmferry_proto::error::ErrorCode::Internal,
        format!("there is no {what} here"),
    )
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
