//! The waiting agent: accepts connections, lets them in, and hands each to the migration of its guest.
//!
//! Owns the endpoint, the table of migrations and the graceful stop; what an earlier agent left is taken up by `recovery`. Invariant: a
//! guest name has one migration at a time; a second one begins only when the first has ended and let go of the name.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming};
use tokio::sync::{Mutex, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vmferry_common::causes::chain;
use vmferry_common::control;
use vmferry_common::endpoint::{self, TransportTuning};
use vmferry_common::identity::PeerName;
use vmferry_common::state::GuestLock;
use vmferry_hypervisor::config::TargetConfig;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    Admission, CopyFound, DestinationAction, DestinationFacts, DestinationHandover,
    DestinationRecord, ProcessRecord, admit,
};
use vmferry_proto::ids::GuestName;
use vmferry_proto::message::Hello;
use vmferry_proto::session_destination::{DestinationSession, DestinationSessionEvent};

use crate::admission;
use crate::earlier;
use crate::hooks::Hooks;
use crate::host::Host;
use crate::migration::{self, MigrationHandle, Parts, Request};
use crate::session::{Opening, Outgoing};
use crate::status::{MigrationStatus, Tracker};

mod recovery;

use recovery::Recovery;

/// How long a peer may take to say `Hello`: it is the first thing that a source does.
const HELLO_TIME: Duration = Duration::from_secs(10);
/// How long a new migration waits for an ended one of the same guest to let go.
const MAKE_WAY_TIME: Duration = Duration::from_secs(30);
/// How long a stopping agent waits for its migrations to end.
const STOP_TIME: Duration = Duration::from_secs(60);
/// How long the last packets may take to leave.
const IDLE_TIME: Duration = Duration::from_secs(5);

/// A guest's place in the table: locked while a session of it is being let in.
type Slot = Arc<Mutex<Option<MigrationHandle>>>;

/// A migration that is about to have its task.
struct Begun {
    config: TargetConfig,
    lock: GuestLock,
    handover: DestinationHandover,
    leftover: Option<ProcessRecord>,
    awaited: bool,
}

/// The waiting agent.
#[derive(Debug)]
pub struct Server {
    host: Arc<Host>,
    endpoint: Endpoint,
    tuning: TransportTuning,
    slots: std::sync::Mutex<HashMap<GuestName, Slot>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Serves `host` on `endpoint`, which listens. Nothing is accepted before [`run`](Self::run).
    #[must_use]
    pub fn new(host: Host, endpoint: Endpoint, tuning: TransportTuning) -> Self {
        Self {
            host: Arc::new(host),
            endpoint,
            tuning,
            slots: std::sync::Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Ends [`run`](Self::run) in good order.
    #[must_use]
    pub fn stopper(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Finishes what the journal says, then serves until stopped: migrations before their commit are told, those that
    /// are owned are seen through.
    pub async fn run(self: Arc<Self>) {
        let mut recovery = Recovery::default();
        if !recovery.take_up_all(&self).await {
            self.tasks.spawn(recovery.finish(self.clone()));
        }
        loop {
            let incoming = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                incoming = self.endpoint.accept() => incoming,
            };
            let Some(incoming) = incoming else {
                break;
            };
            let server = self.clone();
            self.tasks
                .spawn(async move { server.let_in(incoming).await });
        }
        self.wind_up().await;
    }

    /// All migrations that are under way, or have just ended, by name.
    pub(crate) async fn statuses(&self) -> Vec<MigrationStatus> {
        let mut slots: Vec<_> = {
            let slots = self
                .slots
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            slots
                .iter()
                .map(|(name, slot)| (name.clone(), slot.clone()))
                .collect()
        };
        slots.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut statuses = Vec::new();
        for (_, slot) in slots {
            if let Some(handle) = &*slot.lock().await {
                statuses.push(handle.tracker.status());
            }
        }
        statuses
    }

    async fn let_in(&self, incoming: Incoming) {
        let address = incoming.remote_address();
        let (connection, peer) = match endpoint::accept(incoming, &self.tuning).await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%address, "connection refused: {}", chain(&error));
                return;
            }
        };
        match tokio::time::timeout(HELLO_TIME, read_hello(&connection, &peer)).await {
            Ok(Ok(opening)) => self.admit(opening).await,
            Ok(Err(why)) => {
                tracing::warn!(%address, %peer, "no session: {why}");
            }
            Err(_) => {
                tracing::warn!(%address, %peer, "no Hello within {} s", HELLO_TIME.as_secs());
                let error = WireError::new(ErrorCode::TimedOut, "no Hello came in time");
                control::close(&connection, &error);
            }
        }
    }

    async fn admit(&self, opening: Opening) {
        let config = match admission::check(&opening.hello, &opening.peer, &self.host.guests) {
            Ok(config) => config,
            Err(error) => return opening.refuse(&error),
        };
        if let Some(record) = self.replaced(&opening) {
            let answering = earlier::answer(opening, record, self.host.register);
            self.tasks.spawn(answering);
            return;
        }
        let slot = self.slot(&opening.hello.guest);
        let mut slot = slot.lock().await;
        if self.stop.is_cancelled() {
            let error =
                WireError::new(ErrorCode::ShuttingDown, "the destination agent is stopping");
            return opening.refuse(&error);
        }
        let Some(opening) = pass_on(&mut slot, Box::new(opening)).await else {
            return;
        };
        match self.begin(&opening.hello, &opening.peer, config) {
            Ok(handle) => *slot = Some(handle),
            Err(error) => return opening.refuse(&error),
        }
        if let Some(opening) = pass_on(&mut slot, opening).await {
            let error = WireError::new(
                ErrorCode::GuestBusy,
                "the migration has just ended: try again",
            );
            opening.refuse(&error);
        }
    }

    /// The record that answers for a migration which a newer one has replaced. What cannot be read is refused further on.
    fn replaced(&self, opening: &Opening) -> Option<DestinationRecord> {
        let hello = &opening.hello;
        let record = self.host.store.destination(&hello.guest).ok()??;
        let admission = admit(hello, opening.peer.as_str(), None, Some(&record));
        matches!(admission, Ok(Admission::Replaced)).then_some(record)
    }

    fn slot(&self, guest: &GuestName) -> Slot {
        let mut slots = self
            .slots
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        slots.entry(guest.clone()).or_default().clone()
    }

    /// Begins the migration that `hello` speaks of, or goes on with it from the journal.
    fn begin(
        &self,
        hello: &Hello,
        peer: &PeerName,
        config: TargetConfig,
    ) -> Result<MigrationHandle, WireError> {
        if hello.connection != 0 {
            return Err(WireError::new(
                ErrorCode::ProtocolViolation,
                "there is no session that this connection could belong to",
            ));
        }
        // The name is held before the records are read, so that nobody changes them in between.
        let lock = self.host.store.lock(&hello.guest);
        let lock = lock.map_err(|error| WireError::new(ErrorCode::GuestBusy, chain(&error)))?;
        let record = self.host.store.destination(&hello.guest)?;
        let source = self.host.store.source(&hello.guest)?;
        let admission = admit(hello, peer.as_str(), source.as_ref(), record.as_ref())?;
        match (admission, record) {
            (Admission::Known, Some(record)) => Ok(self.resume(record, config, lock, true)),
            (Admission::Replaced, _) => Err(WireError::new(
                ErrorCode::GuestBusy,
                "a newer migration has just replaced this one: try again",
            )),
            (Admission::Known | Admission::New, record) => {
                let facts = DestinationFacts {
                    guest: hello.guest.clone(),
                    migration: hello.migration,
                    generation: hello.generation,
                    sender: peer.as_str().to_owned(),
                    register: self.host.register,
                    earlier: record.map_or_else(Vec::new, |record| record.outcomes()),
                };
                let handover = DestinationHandover::new(facts.clone());
                let begun = Begun {
                    config,
                    lock,
                    handover,
                    leftover: None,
                    awaited: true,
                };
                Ok(self.spawn(&facts, begun, Vec::new()))
            }
        }
    }

    /// Goes on with a migration from its record (`[HAND-7]`).
    fn resume(
        &self,
        record: DestinationRecord,
        config: TargetConfig,
        lock: GuestLock,
        awaited: bool,
    ) -> MigrationHandle {
        let facts = DestinationFacts {
            guest: record.guest.clone(),
            migration: record.migration,
            generation: record.generation,
            sender: record.sender.clone(),
            register: record.register,
            earlier: record.earlier.clone(),
        };
        let leftover = record.process.clone();
        // Its memory cannot be taken in hand again, so whatever is there is replaced by a fresh copy.
        let found = if leftover.is_some() {
            CopyFound::Used
        } else {
            CopyFound::Missing
        };
        let (handover, actions) = DestinationHandover::recover(record, found);
        self.spawn(
            &facts,
            Begun {
                config,
                lock,
                handover,
                leftover,
                awaited,
            },
            actions,
        )
    }

    fn spawn(
        &self,
        facts: &DestinationFacts,
        begun: Begun,
        actions: Vec<DestinationAction>,
    ) -> MigrationHandle {
        let (hooks, teller) = Hooks::new(self.host.hooks.clone(), facts);
        let Begun {
            config,
            lock,
            handover,
            leftover,
            awaited,
        } = begun;
        let parts = Parts {
            host: self.host.clone(),
            config,
            lock,
            hooks,
            teller,
            tracker: Arc::new(Tracker::new(MigrationStatus::begun(facts))),
            handover,
            leftover,
            awaited,
        };
        migration::spawn(parts, actions)
    }

    /// Ends every migration that can be ended, waits for all, and closes the endpoint.
    async fn wind_up(&self) {
        tracing::info!("stopping: new sessions are refused");
        self.endpoint.set_server_config(None);
        let slots: Vec<Slot> = {
            let slots = self
                .slots
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            slots.values().cloned().collect()
        };
        for slot in slots {
            let handle = slot.lock().await.take();
            if let Some(handle) = handle {
                // A migration that has ended already needs not be told.
                let _ = handle.requests.send(Request::ShutDown).await;
                self.tasks.spawn(async move {
                    log_join(handle.task.await);
                });
            }
        }
        self.tasks.close();
        if tokio::time::timeout(STOP_TIME, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                "some migrations did not end within {} s",
                STOP_TIME.as_secs()
            );
        }
        // Each connection is closed by whoever said the last word on it, once that was read.
        let _ = tokio::time::timeout(IDLE_TIME, self.endpoint.wait_idle()).await;
        self.endpoint
            .close(0u32.into(), b"the destination agent has stopped");
        self.endpoint.wait_idle().await;
    }
}

/// Hands `opening` to the migration in `slot`. It comes back if there is none, or if that one has gone away for it.
async fn pass_on(
    slot: &mut Option<MigrationHandle>,
    opening: Box<Opening>,
) -> Option<Box<Opening>> {
    let Some(handle) = slot.as_mut() else {
        return Some(opening);
    };
    let (answer, answered) = oneshot::channel();
    let back = match handle
        .requests
        .send(Request::Open { opening, answer })
        .await
    {
        // A task that ended badly answers nothing, and its connection is closed with it.
        Ok(()) => answered.await.ok().flatten(),
        Err(unsent) => match unsent.0 {
            Request::Open { opening, .. } => Some(opening),
            Request::ShutDown => None,
        },
    }?;
    match tokio::time::timeout(MAKE_WAY_TIME, &mut handle.task).await {
        Ok(joined) => {
            log_join(joined);
            *slot = None;
            Some(back)
        }
        Err(_) => {
            back.refuse(&WireError::new(
                ErrorCode::GuestBusy,
                "the migration before this one is still being cleaned up: try again",
            ));
            None
        }
    }
}

fn log_join(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a migration's task ended badly");
    }
}

/// Reads the first message, which must be `Hello`.
async fn read_hello(connection: &Connection, peer: &PeerName) -> Result<Opening, String> {
    let accepted = control::accept(connection, peer.as_str()).await;
    let (sender, mut messages) = accepted.map_err(|error| chain(&error))?;
    let mut order = DestinationSession::new();
    let first = match messages.recv().await {
        Ok(Some(message)) => order
            .on_message(message)
            .map_err(|violation| violation.to_wire()),
        Ok(None) => return Err("the peer said nothing".to_owned()),
        Err(error) => Err(match error.to_wire() {
            Some(wire) => wire,
            None => return Err(chain(&error)),
        }),
    };
    let outgoing = Outgoing::start(sender, order);
    let refusal = match first {
        Ok(DestinationSessionEvent::Hello(hello)) => {
            let (peer, connection) = (peer.clone(), connection.clone());
            return Ok(Opening {
                hello,
                peer,
                connection,
                outgoing,
                messages,
            });
        }
        Ok(_) => WireError::new(ErrorCode::ProtocolViolation, "Hello must come first"),
        Err(error) => error,
    };
    let why = refusal.to_string();
    crate::session::refuse(outgoing, vec![connection.clone()], &refusal);
    Err(why)
}
