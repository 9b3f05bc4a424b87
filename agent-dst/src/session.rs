//! One session with a source: its control stream, its connections and its lanes.
//!
//! Owns the tasks behind them and how a session is halted and parted with. Does not own what a message means: the
//! migration does. Invariant: once [`Session::halt`] has returned, nothing of the session will be written to the guest
//! any more, and the positions that it returns are final (the resume point rests on it).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmferry_common::causes::chain;
use vmferry_common::control::{ControlReceiver, ControlSender};
use vmferry_common::digest::WindowHasher;
use vmferry_common::identity::PeerName;
use vmferry_common::lanes::IncomingStream;
use vmferry_hypervisor::GuestError;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::StreamKind;
use vmferry_proto::geometry::RegionLen;
use vmferry_proto::ids::{Lane, SessionNumber};
use vmferry_proto::message::{Hello, LaneProgress, ToDestination, ToSource, WindowRange};
use vmferry_proto::session_destination::{DestinationSession, DestinationSessionEvent};

use crate::apply::{self, LaneContext, LaneFailed};
use crate::board::Board;
use crate::compare::Comparer;
use crate::flusher;
use crate::meter::Meter;
use crate::sink::Sink;
use crate::streams::{self, Arrival, StreamContext};

/// Messages that may wait for the control stream. A source that lets so many pile up is gone or stuck.
const OUTGOING: usize = 64;
/// Streams accepted ahead of the migration.
const ARRIVALS: usize = 8;
/// Shortest time between two `Progress` messages: more of them would be noise, fewer would make the source keep more.
const PROGRESS_EVERY: Duration = Duration::from_millis(10);
/// How long a peer may take to read the last message before its connection is closed: closing drops what it has not read.
const FAREWELL: Duration = Duration::from_secs(3);

/// A connection whose `Hello` was read, and nothing was answered yet.
#[derive(Debug)]
pub(crate) struct Opening {
    /// What it said.
    pub(crate) hello: Hello,
    /// Who says so: the name in the certificate.
    pub(crate) peer: PeerName,
    /// The connection.
    pub(crate) connection: Connection,
    /// The control stream, this side's half.
    pub(crate) outgoing: Outgoing,
    /// The control stream, the peer's half.
    pub(crate) messages: ControlReceiver<ToDestination>,
}

impl Opening {
    /// Says why not, as the only answer, and parts.
    pub(crate) fn refuse(self, error: &WireError) {
        tracing::warn!(peer = %self.peer, guest = %self.hello.guest, code = %error.code, "refused: {}", error.detail);
        refuse(self.outgoing, vec![self.connection], error);
    }
}

/// The way to the peer: messages are written in order by a task of their own.
///
/// What is sent and what is heard pass the session's rules here: they are shared, since an attempt's script sends too.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing {
    queue: mpsc::Sender<ToSource>,
    order: Arc<Mutex<DestinationSession>>,
}

impl Outgoing {
    /// Starts the writer of `stream`. It ends, and finishes the stream, when the last handle is dropped.
    pub(crate) fn start(mut stream: ControlSender<ToSource>, order: DestinationSession) -> Self {
        let (queue, mut messages) = mpsc::channel::<ToSource>(OUTGOING);
        tokio::spawn(async move {
            while let Some(message) = messages.recv().await {
                if let Err(error) = stream.send(&message).await {
                    // Whoever reads the other half learns that the connection is gone.
                    tracing::debug!("control stream: {}", chain(&error));
                    return;
                }
            }
            stream.finish();
        });
        Self {
            queue,
            order: Arc::new(Mutex::new(order)),
        }
    }

    /// Whether `message` is due, and what it is.
    pub(crate) fn heard(
        &self,
        message: ToDestination,
    ) -> Result<DestinationSessionEvent, WireError> {
        self.order()
            .on_message(message)
            .map_err(|violation| violation.to_wire())
    }

    fn order(&self) -> MutexGuard<'_, DestinationSession> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `message`; false if the peer has not read for so long that there is no room, or is gone.
    pub(crate) fn send(&self, message: ToSource) -> bool {
        self.order().on_sent(&message);
        self.queue.try_send(message).is_ok()
    }

    /// Queues how far `board` is, as soon as there is room; false if the peer is gone. The positions are read when nobody else can
    /// queue any more, so that of two who tell them at once neither tells older ones later. Cancel safe.
    pub(crate) async fn send_progress(&self, board: &Board) -> bool {
        let Ok(room) = self.queue.reserve().await else {
            return false;
        };
        let mut order = self.order();
        let message = ToSource::Progress(board.positions());
        order.on_sent(&message);
        room.send(message);
        true
    }

    /// Queues `message` as soon as there is room; false if the peer is gone. Cancel safe.
    pub(crate) async fn send_when_free(&self, message: ToSource) -> bool {
        self.order().on_sent(&message);
        self.queue.send(message).await.is_ok()
    }
}

/// Says `error` as the last word, gives the peer time to read it, and closes `connections`.
pub(crate) fn refuse(outgoing: Outgoing, connections: Vec<Connection>, error: &WireError) {
    outgoing.send(ToSource::Error(error.clone()));
    part(
        outgoing,
        connections,
        error.code.number(),
        error.code.name(),
    );
}

/// Closes `connections` once the peer has closed its end or has had its time to read what was sent.
pub(crate) fn part(
    outgoing: Outgoing,
    connections: Vec<Connection>,
    code: u32,
    reason: &'static str,
) {
    // Without a handle left the writer finishes the stream behind the last message.
    drop(outgoing);
    tokio::spawn(async move {
        if let Some(first) = connections.first() {
            // Either end of the wait is right; a peer that is slow to close loses nothing it has not had time for.
            let _ = tokio::time::timeout(FAREWELL, first.closed()).await;
        }
        for connection in connections {
            connection.close(code.into(), reason.as_bytes());
        }
    });
}

/// What a session brings.
#[derive(Debug)]
pub(crate) enum SessionEvent {
    /// A control message that is due.
    Message(Box<DestinationSessionEvent>),
    /// The device state's stream.
    DeviceState(IncomingStream),
    /// The peer broke the protocol.
    Violation(WireError),
    /// The guest cannot be read, written or flushed: this side's trouble.
    GuestFailed(WireError),
    /// Nobody is to blame, and only a new session goes on.
    GivenUp(WireError),
    /// The connection is gone.
    Lost(String),
}

/// A session that was let in.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) hello: Hello,
    pub(crate) peer: PeerName,
    pub(crate) outgoing: Outgoing,
    messages: ControlReceiver<ToDestination>,
    connections: Vec<Option<Connection>>,
    arrivals: (mpsc::Sender<Arrival>, mpsc::Receiver<Arrival>),
    failures: (
        mpsc::UnboundedSender<LaneFailed>,
        mpsc::UnboundedReceiver<LaneFailed>,
    ),
    /// Ends the tasks that accept streams.
    stop: CancellationToken,
    flow: Option<Flow>,
}

/// The data of a session, from `Ready` until it is halted.
#[derive(Debug)]
struct Flow {
    context: LaneContext,
    comparer: Comparer,
    geometry: Arc<[RegionLen]>,
    lanes: Vec<Option<JoinHandle<()>>>,
    flusher: JoinHandle<Result<(), GuestError>>,
    /// Ends the flusher, after the lanes: its last flush covers their last frames.
    stop_flusher: CancellationToken,
    flush_failed: bool,
}

impl Session {
    /// Lets `opening` in and begins to accept its streams.
    pub(crate) fn new(opening: Opening) -> Self {
        let Opening {
            hello,
            peer,
            connection,
            outgoing,
            messages,
        } = opening;
        let connections = (0..hello.connections.max(1)).map(|_| None).collect();
        let mut session = Self {
            hello,
            peer,
            outgoing,
            messages,
            connections,
            arrivals: mpsc::channel(ARRIVALS),
            failures: mpsc::unbounded_channel(),
            stop: CancellationToken::new(),
            flow: None,
        };
        session.accept_on(connection, 0);
        session
    }

    /// Its number.
    pub(crate) const fn number(&self) -> SessionNumber {
        self.hello.session
    }

    /// Binds a further connection to this session.
    pub(crate) fn bind(&mut self, opening: &Opening) -> Result<(), WireError> {
        let hello = &opening.hello;
        let fits = hello.migration == self.hello.migration
            && hello.session == self.hello.session
            && hello.connections == self.hello.connections
            && hello.lanes == self.hello.lanes
            && opening.peer == self.peer;
        let free = self.connections.get(usize::from(hello.connection));
        if !fits || !matches!(free, Some(None)) {
            return Err(WireError::new(
                ErrorCode::ProtocolViolation,
                format!(
                    "connection {} of session {} does not belong to the session that is open",
                    hello.connection, hello.session
                ),
            ));
        }
        self.accept_on(opening.connection.clone(), hello.connection);
        Ok(())
    }

    fn accept_on(&mut self, connection: Connection, position: u8) {
        let context = StreamContext {
            peer: self.peer.to_string(),
            migration: self.hello.migration,
            session: self.hello.session,
            lanes: self.hello.lanes,
            connections: self.hello.connections,
        };
        let arrivals = self.arrivals.0.clone();
        streams::spawn(
            connection.clone(),
            position,
            context,
            arrivals,
            self.stop.clone(),
        );
        if let Some(slot) = self.connections.get_mut(usize::from(position)) {
            *slot = Some(connection);
        }
    }

    /// Begins to take frames for `sink`.
    pub(crate) fn begin_flow(&mut self, sink: Arc<Sink>, meter: Arc<Meter>) -> Arc<Board> {
        let kept = sink.coverage().noted_in();
        let board = Arc::new(Board::kept(self.number(), self.hello.lanes, kept));
        let stop = CancellationToken::new();
        let geometry = sink
            .spec()
            .regions
            .iter()
            .map(|region| region.len)
            .collect();
        let stop_flusher = CancellationToken::new();
        let flusher = flusher::run(sink.clone(), board.clone(), stop_flusher.clone());
        let flusher = tokio::spawn(flusher);
        tokio::spawn(report(
            board.clone(),
            meter.clone(),
            self.outgoing.clone(),
            stop.clone(),
        ));
        let comparer = Comparer::start(
            sink.clone(),
            WindowHasher::new(self.hello.migration),
            self.outgoing.clone(),
            stop.clone(),
        );
        self.flow = Some(Flow {
            comparer,
            context: LaneContext {
                sink,
                board: board.clone(),
                meter,
                stop,
                failures: self.failures.0.clone(),
            },
            geometry,
            lanes: (0..self.hello.lanes).map(|_| None).collect(),
            flusher,
            stop_flusher,
            flush_failed: false,
        });
        board
    }

    /// Answers for what the copy has of these windows.
    pub(crate) fn compare(&self, range: WindowRange) -> Result<(), WireError> {
        if let Some(flow) = &self.flow
            && flow.comparer.ask(range)
        {
            return Ok(());
        }
        let region = range.region;
        Err(WireError::new(
            ErrorCode::ProtocolViolation,
            format!(
                "region {region} cannot be compared: it does not exist, or its lanes have ended"
            ),
        ))
    }

    /// The next thing that happens. Cancel safe.
    pub(crate) async fn next(&mut self) -> SessionEvent {
        loop {
            let arrival = tokio::select! {
                biased;
                message = self.messages.recv() => return match message {
                    Ok(Some(message)) => match self.outgoing.heard(message) {
                        Ok(event) => SessionEvent::Message(Box::new(event)),
                        Err(violation) => SessionEvent::Violation(violation),
                    },
                    Ok(None) => SessionEvent::Lost("the source closed the control stream".to_owned()),
                    Err(error) => match error.to_wire() {
                        Some(wire) => SessionEvent::Violation(wire),
                        None => SessionEvent::Lost(chain(&error)),
                    },
                },
                Some(failed) = self.failures.1.recv() => match failed.event() {
                    Some(event) => return event,
                    None => continue,
                },
                error = flush_failure(&mut self.flow) => return SessionEvent::GuestFailed(error),
                Some(arrival) = self.arrivals.1.recv() => arrival,
            };
            if let Some(event) = self.on_arrival(arrival) {
                return event;
            }
        }
    }

    fn on_arrival(&mut self, arrival: Arrival) -> Option<SessionEvent> {
        match arrival {
            Arrival::Violation(error) => Some(SessionEvent::Violation(error)),
            Arrival::Lost(why) => Some(SessionEvent::Lost(why)),
            Arrival::Stream(stream) => match stream.header.kind {
                StreamKind::DeviceState { .. } => Some(SessionEvent::DeviceState(stream)),
                StreamKind::Lane { lane } => self
                    .begin_lane(lane, stream)
                    .err()
                    .map(SessionEvent::Violation),
            },
        }
    }

    fn begin_lane(&mut self, lane: Lane, stream: IncomingStream) -> Result<(), WireError> {
        let violation = |text: String| WireError::new(ErrorCode::ProtocolViolation, text);
        let early = || {
            violation(format!(
                "lane {lane} was opened before Ready or after its end"
            ))
        };
        let flow = self.flow.as_mut().ok_or_else(early)?;
        let slot = flow.lanes.get_mut(usize::from(lane.0)).ok_or_else(early)?;
        if slot.is_some() {
            return Err(violation(format!("lane {lane} was opened twice")));
        }
        let lanes = self.hello.lanes;
        let receiver = stream
            .into_lane(flow.geometry.clone(), lanes)
            .ok_or_else(early)?;
        *slot = Some(apply::spawn(receiver, flow.context.clone()));
        Ok(())
    }

    /// Ends lanes and flusher at their next frame boundary; `None` if they never began. Control goes on. Idempotent:
    /// the second time there is nothing to say any more.
    pub(crate) async fn halt(&mut self) -> Option<Vec<LaneProgress>> {
        let flow = self.flow.take()?;
        flow.context.stop.cancel();
        for lane in flow.lanes.into_iter().flatten() {
            if let Err(error) = lane.await {
                tracing::error!(%error, "a lane's task ended badly");
            }
        }
        flow.stop_flusher.cancel();
        if !flow.flush_failed
            && let Ok(Err(error)) = flow.flusher.await
        {
            // What it had flushed before stays true; the positions say so.
            tracing::warn!("the last flush of the session failed: {}", chain(&error));
        }
        Some(flow.context.board.positions())
    }

    /// Ends the session. With an error it is the last word; the connection is closed once the peer has read it.
    /// [`halt`](Self::halt) comes first.
    pub(crate) fn close(mut self, error: Option<&WireError>) {
        let connections = std::mem::take(&mut self.connections)
            .into_iter()
            .flatten()
            .collect();
        let outgoing = self.outgoing.clone();
        drop(self);
        match error {
            Some(error) => refuse(outgoing, connections, error),
            None => part(outgoing, connections, 0, "done"),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(flow) = &self.flow {
            flow.context.stop.cancel();
            flow.stop_flusher.cancel();
        }
    }
}

/// Tells the source how far the lanes are, whenever that has changed, until `stop`.
async fn report(board: Arc<Board>, meter: Arc<Meter>, outgoing: Outgoing, stop: CancellationToken) {
    let mut changes = board.watch();
    let report_all = async {
        while changes.changed().await.is_ok() {
            meter.sample(std::time::Instant::now());
            if !outgoing.send_progress(&board).await {
                return;
            }
            tokio::time::sleep(PROGRESS_EVERY).await;
        }
    };
    tokio::select! {
        biased;
        () = stop.cancelled() => {}
        () = report_all => {}
    }
}

/// Returns when the flusher has failed; never, if it does not or there is none. Cancel safe.
async fn flush_failure(flow: &mut Option<Flow>) -> WireError {
    let Some(flow) = flow.as_mut().filter(|flow| !flow.flush_failed) else {
        return std::future::pending().await;
    };
    match (&mut flow.flusher).await {
        Ok(Err(error)) => {
            flow.flush_failed = true;
            crate::error::guest_to_wire(&error, "the disks cannot be flushed")
        }
        // It ends well only when it is stopped, which is done by `halt` alone.
        Ok(Ok(())) | Err(_) => {
            flow.flush_failed = true;
            std::future::pending().await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::sync::mpsc;
    use vmferry_proto::ids::{FrameSeq, Lane};
    use vmferry_proto::message::ToSource;
    use vmferry_proto::session_destination::DestinationSession;
    use vmferry_proto::spec::RegionKind;

    use super::Outgoing;
    use crate::board::Board;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn progress_that_two_tell_at_once_never_goes_back() {
        const EACH: usize = 20_000;
        let (queue, mut messages) = mpsc::channel(4);
        let outgoing = Outgoing {
            queue,
            order: Arc::new(Mutex::new(DestinationSession::new())),
        };
        let board = Arc::new(Board::new(1));
        let tell = |outgoing: Outgoing, board: Arc<Board>| async move {
            for _ in 0..EACH {
                assert!(outgoing.send_progress(&board).await);
            }
        };
        let tellers = [
            tokio::spawn(tell(outgoing.clone(), board.clone())),
            tokio::spawn(tell(outgoing, board.clone())),
        ];
        let mut last = FrameSeq(0);
        for told in 1..=2 * EACH as u64 {
            board.note_applied(Lane(0), FrameSeq(told), RegionKind::Memory, 1);
            let Some(ToSource::Progress(lanes)) = messages.recv().await else {
                panic!("no progress");
            };
            assert!(last <= lanes[0].applied, "{last} and then {lanes:?}");
            last = lanes[0].applied;
        }
        for teller in tellers {
            teller.await.unwrap();
        }
    }
}
