//! One session with the destination: connection, control stream, lanes.
//!
//! Owns how a session is made (Hello, Welcome; Offer, Ready; lanes) and what of it can break. Does not own what is
//! said on it afterwards: the migration does. A session counts as open only after `Welcome`, since a TLS 1.3
//! client learns late that its certificate was refused.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::select_all;
use quinn::{Connection, Endpoint};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use vmferry_common::control::{self, ControlError, ControlReceiver, ControlSender};
use vmferry_common::endpoint::{Connector, HostPort, TransportTuning};
use vmferry_common::identity::Identity;
use vmferry_common::lanes::{LaneSender, send_device_state};
use vmferry_common::link::LinkError as QuicLinkError;
use vmferry_common::pace::Pacer;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{StreamHeader, StreamKind};
use vmferry_proto::ids::{
    Attempt, Generation, GuestName, Lane, MigrationId, RegisterId, SessionNumber,
};
use vmferry_proto::message::{Hello, Offer, ToDestination, ToSource, Welcome};
use vmferry_proto::session_source::{SourceSession, SourceSessionEvent};
use vmferry_proto::version::{COMPARE, Features, SUPPORTED};

use crate::error::{LinkError, MigrateError};
use crate::lanes::{LaneCounters, LaneError, LaneFailed, Lanes};

/// What every session of a migration has in common.
#[derive(Debug, Clone)]
pub struct Dialer {
    /// What carries the connections.
    pub connector: Arc<dyn Connector>,
    /// The destination.
    pub to: HostPort,
    /// Who this host is.
    pub identity: Arc<Identity>,
    /// Settings of the transport.
    pub tuning: TransportTuning,
    /// The guest.
    pub guest: GuestName,
    /// The migration.
    pub migration: MigrationId,
    /// Its generation.
    pub generation: Generation,
    /// Lanes of each session.
    pub lanes: u8,
    /// Connections of each session: more than one fills a long line with random loss better.
    pub connections: u8,
}

/// A connection of a session, with the control stream that it began with.
#[derive(Debug)]
struct Link {
    /// Kept alive: the connection's packets go through it.
    endpoint: Endpoint,
    connection: Connection,
    sender: ControlSender<ToDestination>,
    receiver: ControlReceiver<ToSource>,
    order: SourceSession,
}

/// An open session.
#[derive(Debug)]
pub struct Session {
    endpoint: Endpoint,
    connection: Connection,
    /// Connections 1 and up: they carry lanes only, and their control streams stay silent (`[WIRE-13]`).
    further: Vec<Link>,
    sender: ControlSender<ToDestination>,
    receiver: ControlReceiver<ToSource>,
    /// Which of the destination's messages are due.
    order: SourceSession,
    welcome: Welcome,
    header: StreamHeader,
    peer: String,
    lanes: Option<Lanes>,
    failed: mpsc::UnboundedReceiver<LaneFailed>,
    failures: mpsc::UnboundedSender<LaneFailed>,
    /// The first lane that failed, and until when its cause may still be told on the control stream.
    broken: Option<(LaneError, Instant)>,
}

/// A destination that gives up resets its lanes and says why on the control stream: the reason may come this much later.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Dialer {
    /// Makes a session, up to `Welcome`. `last` is the highest attempt so far: the destination may have to answer for it.
    ///
    /// # Errors
    /// No connection, refused by either side, or no version in common.
    pub async fn dial(
        &self,
        number: SessionNumber,
        last: Attempt,
    ) -> Result<Session, MigrateError> {
        let (first, welcome) = self.link(number, last, 0).await?;
        let mut further = Vec::new();
        for position in 1..self.connections {
            let (link, again) = self.link(number, last, position).await?;
            if again.register != welcome.register {
                return Err(violation(
                    "the connections of one session reach different destinations",
                ));
            }
            further.push(link);
        }
        tracing::debug!(agent = %welcome.agent, register = %welcome.register, session = %number, connections = self.connections, "connected");
        let (failures, failed) = mpsc::unbounded_channel();
        Ok(Session {
            endpoint: first.endpoint,
            connection: first.connection,
            further,
            sender: first.sender,
            receiver: first.receiver,
            order: first.order,
            welcome,
            header: StreamHeader {
                kind: StreamKind::Lane { lane: Lane(0) },
                session: number,
                migration: self.migration,
            },
            peer: self.to.to_string(),
            lanes: None,
            failed,
            failures,
            broken: None,
        })
    }

    /// Connection number `position` of the session, up to its `Welcome`.
    async fn link(
        &self,
        number: SessionNumber,
        last: Attempt,
        position: u8,
    ) -> Result<(Link, Welcome), MigrateError> {
        let (endpoint, connection) = self
            .connector
            .connect(&self.to, &self.identity, &self.tuning)
            .await
            .map_err(MigrateError::Connect)?;
        let greeting = self.greet(endpoint, connection, self.hello(number, position), last);
        let greeted = tokio::time::timeout(self.tuning.connect_timeout, greeting).await;
        greeted.map_err(|_elapsed| MigrateError::SessionLost(LinkError::NoWelcome))?
    }

    /// Says `Hello` and hears `Welcome`.
    async fn greet(
        &self,
        endpoint: Endpoint,
        connection: Connection,
        hello: Hello,
        last: Attempt,
    ) -> Result<(Link, Welcome), MigrateError> {
        let peer = self.to.to_string();
        let (mut sender, mut receiver) = control::open(&connection, &peer).await.map_err(failed)?;
        let mut order = SourceSession::new(&hello, last);
        let hello = ToDestination::Hello(hello);
        sender.send(&hello).await.map_err(failed)?;
        let Some(answer) = receiver.recv().await.map_err(failed)? else {
            return Err(MigrateError::SessionLost(LinkError::Closed));
        };
        let welcome = match due(&mut order, answer) {
            Ok(Some(ToSource::Welcome(welcome))) => welcome,
            Ok(Some(ToSource::Error(error))) => return Err(MigrateError::Peer(error)),
            Ok(_) => return Err(violation("another message came where Welcome was expected")),
            Err(error) => return Err(MigrateError::Protocol(error)),
        };
        let link = Link {
            endpoint,
            connection,
            sender,
            receiver,
            order,
        };
        Ok((link, welcome))
    }

    fn hello(&self, session: SessionNumber, connection: u8) -> Hello {
        Hello {
            versions: SUPPORTED,
            features: Features::supported(),
            guest: self.guest.clone(),
            migration: self.migration,
            generation: self.generation,
            session,
            lanes: self.lanes,
            connections: self.connections,
            connection,
        }
    }
}

impl Session {
    /// Register of the destination's state folder.
    #[must_use]
    pub const fn register(&self) -> RegisterId {
        self.welcome.register
    }

    /// Name and version of the destination's program.
    #[must_use]
    pub fn agent(&self) -> &str {
        &self.welcome.agent
    }

    /// Whether the destination can say what it has.
    #[must_use]
    pub fn can_compare(&self) -> bool {
        self.welcome.features.has(COMPARE)
    }

    /// Round-trip time as the transport sees it.
    #[must_use]
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// Offers the guest. The answer, `Ready`, is read with [`next`](Self::next).
    ///
    /// # Errors
    /// The link.
    pub async fn offer(&mut self, offer: Offer) -> Result<(), LinkError> {
        self.send(&ToDestination::Offer(offer)).await
    }

    /// Opens the lanes, after `Ready`, for a guest of so many `blocks`.
    ///
    /// # Errors
    /// The link.
    pub async fn open_lanes(
        &mut self,
        count: u8,
        pacer: &Pacer,
        counters: &Arc<LaneCounters>,
        blocks: u64,
    ) -> Result<(), LinkError> {
        let mut senders = Vec::new();
        for lane in (0..count).map(Lane) {
            let connection = self.connection_of(lane);
            let opened = LaneSender::open(connection, self.header, lane, &self.peer).await;
            senders.push(opened.map_err(|error| LinkError::Lane(error.into()))?);
        }
        counters.open(self.rtt());
        let features = &self.welcome.features;
        let lanes = Lanes::start(senders, pacer, counters, features, blocks, &self.failures);
        self.lanes = Some(lanes);
        Ok(())
    }

    /// Bytes that its connections have sent.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        let sent = |connection: &Connection| connection.stats().udp_tx.bytes;
        self.connections().map(sent).sum()
    }

    /// All connections, the one with the control stream last.
    fn connections(&self) -> impl Iterator<Item = &Connection> {
        let further = self.further.iter().map(|link| &link.connection);
        further.chain(std::iter::once(&self.connection))
    }

    /// Lane `l` is on connection `l mod connections` (`[WIRE-13]`).
    fn connection_of(&self, lane: Lane) -> &Connection {
        let position = usize::from(lane.0) % (self.further.len() + 1);
        match position
            .checked_sub(1)
            .and_then(|further| self.further.get(further))
        {
            Some(link) => &link.connection,
            None => &self.connection,
        }
    }

    /// The lanes, once they are open.
    #[must_use]
    pub const fn lanes(&self) -> Option<&Lanes> {
        self.lanes.as_ref()
    }

    /// Sends a control message. Not cancel safe.
    ///
    /// # Errors
    /// The link.
    pub async fn send(&mut self, message: &ToDestination) -> Result<(), LinkError> {
        self.order.on_sent(message);
        self.sender.send(message).await.map_err(LinkError::Control)
    }

    /// Sends the device state on a stream of its own.
    ///
    /// # Errors
    /// The link.
    pub async fn send_device_state(
        &mut self,
        attempt: Attempt,
        state: Bytes,
    ) -> Result<(), LinkError> {
        send_device_state(&self.connection, self.header, attempt, state, &self.peer)
            .await
            .map_err(|error| LinkError::Lane(error.into()))
    }

    /// What comes next on `session`: a message, or why there will be none. Waits for ever without a session. Cancel safe.
    ///
    /// # Errors
    /// The link, a lane, or a peer that broke the protocol.
    pub async fn next(session: Option<&mut Self>) -> Result<ToSource, LinkError> {
        let Some(session) = session else {
            return std::future::pending().await;
        };
        let Self {
            receiver,
            order,
            failed,
            further,
            broken,
            ..
        } = session;
        loop {
            let until = broken.as_ref().map(|(_, until)| *until);
            tokio::select! {
                biased;
                // The sending half is in the session, so there is always another one to wait for.
                Some(LaneFailed { error, .. }) = failed.recv() => {
                    if error.is_guest() {
                        return Err(LinkError::Lane(error));
                    }
                    broken.get_or_insert((error, Instant::now() + LAST_WORDS));
                    continue;
                }
                // Before what ends the session: it may be the peer's last words.
                message = receiver.recv() => {
                    match due(order, said(message)?).map_err(LinkError::Protocol)? {
                        Some(message) => return Ok(message),
                        None => continue,
                    }
                }
                () = any_closed(further) => return Err(LinkError::Closed),
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
            }
            if let Some((error, _)) = broken.take() {
                return Err(LinkError::Lane(error));
            }
        }
    }

    /// Closes in good order: what was sent is delivered first, for a bounded time.
    pub async fn close(mut self) {
        self.lanes = None;
        self.sender.finish();
        // The peer ends its side once it has read everything; a peer that does not is not waited for.
        let drained = async { while let Ok(Some(_late)) = self.receiver.recv().await {} };
        let _ = tokio::time::timeout(Duration::from_millis(500), drained).await;
        for connection in self.connections() {
            connection.close(0u32.into(), b"done");
        }
        // Time for the word to leave; the destination does without if it is lost, and nobody here has to answer it again.
        let idle = self.endpoint.wait_idle();
        let _ = tokio::time::timeout(Duration::from_millis(2), idle).await;
    }
}

/// `message`, if the destination may say it now; nothing, if it is an answer that is not waited for any more.
fn due(order: &mut SourceSession, message: ToSource) -> Result<Option<ToSource>, WireError> {
    let event = order
        .on_message(message.clone())
        .map_err(|violation| violation.to_wire())?;
    Ok((event != SourceSessionEvent::Late).then_some(message))
}

/// Why a control stream failed: the link, or a peer that sent what is no message.
fn failed(error: ControlError) -> MigrateError {
    match error.to_wire() {
        Some(error) => MigrateError::Protocol(error),
        None => MigrateError::SessionLost(LinkError::Control(error)),
    }
}

/// What the control stream came to: a message, the reason for which the peer closed the connection, or a lost link.
fn said(message: Result<Option<ToSource>, ControlError>) -> Result<ToSource, LinkError> {
    let error = match message {
        Ok(Some(message)) => return Ok(message),
        Ok(None) => return Err(LinkError::Closed),
        Err(error) => error,
    };
    if let ControlError::Link(QuicLinkError::ClosedByPeer { code, reason, .. }) = &error
        && let Some(code) = u32::try_from(*code).ok().and_then(ErrorCode::from_number)
    {
        return Ok(ToSource::Error(WireError::new(code, reason.clone())));
    }
    match error.to_wire() {
        Some(error) => Err(LinkError::Protocol(error)),
        None => Err(LinkError::Control(error)),
    }
}

/// Returns when one of the connections is gone; never without any. Cancel safe.
async fn any_closed(links: &[Link]) {
    if links.is_empty() {
        return std::future::pending().await;
    }
    let closed = links.iter().map(|link| Box::pin(link.connection.closed()));
    select_all(closed).await;
}

fn violation(detail: &str) -> MigrateError {
    MigrateError::Protocol(WireError::new(ErrorCode::ProtocolViolation, detail))
}
