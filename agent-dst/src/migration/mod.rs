//! One migration at the destination, from its first `Hello` until nobody needs it any more.
//!
//! Owns the copy of the guest, the handover machine, the guest's lock and, one after the other, the sessions. It is one task
//! that takes the next event, feeds the machine and carries out its actions: no state is shared. It outlives the loss
//! of a session: the copy is kept for a while so that the source can go on where it was (`keep`). What may run, and when, is
//! decided by the machine alone (`[HAND-1]` to `[HAND-11]`).

mod actions;
mod copy;
mod events;
mod jobs;
mod launched;

pub(crate) use actions::AGENT;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use vmferry_common::state::GuestLock;
use vmferry_hypervisor::config::TargetConfig;
use vmferry_hypervisor::{GuestLife, TargetGuest};
use vmferry_proto::error::WireError;
use vmferry_proto::handover::{DestinationHandover, DestinationState, ProcessRecord};
use vmferry_proto::ids::Incarnation;
use vmferry_proto::message::{PopulatedWindows, ResumePoint};
use vmferry_proto::spec::GuestSpec;

use crate::board::Board;
use crate::coverage::Coverage;
use crate::durable::CopyFiles;
use crate::hooks::{Hooks, Teller};
use crate::host::Host;
use crate::receipt::{ReceiptError, ReceiptHandle, Received};
use crate::session::{Opening, Session, SessionEvent};
use crate::sink::Sink;
use crate::status::Tracker;
use jobs::{Job, JobDone, Then};
use launched::{Launched, Namer};

/// After this time something that failed here (a record, a start, a discard) is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// How long a source may keep the session of a settled migration open: it has its own copy to let go first.
const LINGER: Duration = Duration::from_secs(60);
/// Requests that may wait for a migration: a session and its further connections.
const REQUESTS: usize = 32;

/// What the server asks of a migration.
#[derive(Debug)]
pub(crate) enum Request {
    /// A session wants in, or a further connection of one.
    Open {
        /// Its beginning.
        opening: Box<Opening>,
        /// Told that it was dealt with; given back what belongs to the migration after this one, which goes away.
        answer: oneshot::Sender<Option<Box<Opening>>>,
    },
    /// The agent is told to stop.
    ShutDown,
}

/// The way to a running migration.
#[derive(Debug)]
pub(crate) struct MigrationHandle {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) task: tokio::task::JoinHandle<()>,
}

/// What a migration is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) host: Arc<Host>,
    pub(crate) config: TargetConfig,
    pub(crate) lock: GuestLock,
    pub(crate) hooks: Hooks,
    pub(crate) teller: Teller,
    pub(crate) tracker: Arc<Tracker>,
    pub(crate) handover: DestinationHandover,
    /// Whether a session of it is on its way.
    pub(crate) awaited: bool,
    /// A process that an earlier agent left behind.
    pub(crate) leftover: Option<ProcessRecord>,
}

type Doing<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// One migration.
struct Migration {
    host: Arc<Host>,
    config: TargetConfig,
    lock: Option<GuestLock>,
    hooks: Hooks,
    teller: Teller,
    tracker: Arc<Tracker>,
    handover: DestinationHandover,
    leftover: Option<ProcessRecord>,
    /// What is noted of the copy for a later agent.
    files: Option<CopyFiles>,
    /// Whether a later agent would find it.
    noted: bool,
    requests: mpsc::Receiver<Request>,
    spec: Option<Arc<GuestSpec>>,
    /// Memory that a new copy may touch ahead of the data, by the last offer.
    populated: Arc<[PopulatedWindows]>,
    copy: Option<Copied>,
    session: Option<Session>,
    /// Positions of the last session that carried data.
    resume: Option<ResumePoint>,
    receipt: Option<ReceiptHandle>,
    receiving: Option<Doing<Result<Received, ReceiptError>>>,
    received: Option<Received>,
    /// Done one after the other: each may need the guest.
    jobs: VecDeque<Job>,
    job: Option<Doing<JobDone>>,
    /// Given to the work, which launches processes.
    namer: Arc<Namer>,
    launches: mpsc::Receiver<Launched>,
    /// What follows the hook that is being asked, if that is what the job does.
    asking: Option<Then>,
    /// The migration was cancelled or given up: no attempt is opened any more.
    ending: bool,
    commit_began: Option<Instant>,
    keep_until: Option<Instant>,
    retry_at: Option<Instant>,
    phase_hooks: PhasesAsked,
    /// A session is on its way here: it is answered even if all is settled.
    awaited: bool,
    over: bool,
    shutting_down: bool,
}

/// The prepared copy of the guest.
#[derive(Debug)]
struct Copied {
    /// Taken out while a job works with it.
    guest: Option<Box<dyn TargetGuest>>,
    sink: Arc<Sink>,
    coverage: Arc<Coverage>,
    board: Option<Arc<Board>>,
    incarnations: Vec<Incarnation>,
    life: watch::Receiver<GuestLife>,
    /// Its end was told already, or is of no interest any more.
    life_told: bool,
}

/// Hooks that are asked once in a migration, not once in a session.
#[derive(Debug, Default)]
struct PhasesAsked {
    negotiate: bool,
    copy: bool,
}

/// What a migration reacts to.
#[derive(Debug)]
enum Event {
    Request(Option<Request>),
    Session(SessionEvent),
    Received(Result<Received, ReceiptError>),
    JobDone(JobDone),
    Launched(Launched),
    CopyGone(WireError),
    KeepOver,
    Retry,
}

/// Starts the task of a migration. `recovery` is what its machine wanted done at once after a restart.
pub(crate) fn spawn(
    parts: Parts,
    recovery: Vec<vmferry_proto::handover::DestinationAction>,
) -> MigrationHandle {
    let (requests, inbox) = mpsc::channel(REQUESTS);
    let tracker = parts.tracker.clone();
    let migration = Migration::new(parts, inbox);
    let task = tokio::spawn(migration.run(recovery));
    MigrationHandle {
        requests,
        tracker,
        task,
    }
}

impl Migration {
    fn new(parts: Parts, requests: mpsc::Receiver<Request>) -> Self {
        let keep_until = Some(Instant::now() + parts.host.keep);
        let (namer, launches) = Namer::new();
        Self {
            host: parts.host,
            config: parts.config,
            lock: Some(parts.lock),
            hooks: parts.hooks,
            teller: parts.teller,
            tracker: parts.tracker,
            handover: parts.handover,
            leftover: parts.leftover,
            files: None,
            noted: false,
            requests,
            spec: None,
            populated: Arc::default(),
            copy: None,
            session: None,
            resume: None,
            receipt: None,
            receiving: None,
            received: None,
            jobs: VecDeque::new(),
            job: None,
            namer,
            launches,
            asking: None,
            ending: false,
            commit_began: None,
            keep_until,
            retry_at: None,
            phase_hooks: PhasesAsked::default(),
            awaited: parts.awaited,
            over: false,
            shutting_down: false,
        }
    }

    async fn run(mut self, recovery: Vec<vmferry_proto::handover::DestinationAction>) {
        self.carry_out(recovery).await;
        if let DestinationState::Owned { started: true, .. } = self.handover.record().state {
            self.settle();
        }
        self.begin_next_job();
        while !self.is_finished() {
            let event = self.next().await;
            self.on(event).await;
            self.begin_next_job();
        }
        self.requests.close();
        while let Ok(request) = self.requests.try_recv() {
            if let Request::Open { opening, answer } = request {
                // A server that no longer waits has closed the connection.
                let _ = answer.send(Some(opening));
            }
        }
        let Self {
            hooks,
            teller,
            lock,
            ..
        } = self;
        // The name is free before the last scripts have run: they only tell.
        drop((hooks, lock));
        teller.finish().await;
    }

    /// Settled, nobody connected, nothing being done: whoever asks later is answered from the journal.
    fn is_finished(&self) -> bool {
        let idle =
            !self.awaited && self.session.is_none() && self.job.is_none() && self.jobs.is_empty();
        idle && (self.over || (self.shutting_down && self.is_stuck()))
    }

    /// Whether all that is left needs another try: a stopping agent leaves that to its successor.
    const fn is_stuck(&self) -> bool {
        self.retry_at.is_some()
    }

    /// The next thing that happens. Cancel safe.
    async fn next(&mut self) -> Event {
        // A server that has let go of a migration that is told to stop says nothing any more.
        let may_hear =
            !(self.shutting_down && self.requests.is_closed() && self.requests.is_empty());
        tokio::select! {
            biased;
            done = poll(&mut self.job) => Event::JobDone(done),
            Some(launched) = self.launches.recv() => Event::Launched(launched),
            request = self.requests.recv(), if may_hear => Event::Request(request),
            received = poll(&mut self.receiving) => Event::Received(received),
            // While something is done with the copy, that tells of its end; and some of it ends the copy on purpose.
            gone = copy_gone(&mut self.copy), if self.job.is_none() => Event::CopyGone(gone),
            event = session_event(&mut self.session) => Event::Session(event),
            () = at(self.retry_at) => Event::Retry,
            () = at(self.keep_until) => Event::KeepOver,
        }
    }
}

/// Polls what is being done, if anything is, and clears it when it is done. Cancel safe.
async fn poll<T>(doing: &mut Option<Doing<T>>) -> T {
    match doing.as_mut() {
        None => std::future::pending().await,
        Some(running) => {
            let done = running.await;
            *doing = None;
            done
        }
    }
}

async fn session_event(session: &mut Option<Session>) -> SessionEvent {
    match session {
        None => std::future::pending().await,
        Some(session) => session.next().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        None => std::future::pending().await,
        Some(time) => tokio::time::sleep_until(time).await,
    }
}

/// Returns once, when the process of the copy is gone. Cancel safe.
async fn copy_gone(copy: &mut Option<Copied>) -> WireError {
    let Some(copy) = copy.as_mut().filter(|copy| !copy.life_told) else {
        return std::future::pending().await;
    };
    loop {
        if let Some(error) = crate::error::life_to_wire(&copy.life.borrow_and_update()) {
            copy.life_told = true;
            return error;
        }
        if copy.life.changed().await.is_err() {
            // The driver no longer watches: whatever it does next will tell.
            copy.life_told = true;
            return std::future::pending().await;
        }
    }
}
