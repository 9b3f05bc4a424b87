//! The link between the hosts: QUIC's own packets over sockets in memory.
//!
//! Owns what becomes of each packet: lost, late, twice, or held up by a cut. Everything above is quinn and the agents' real
//! code. A socket of a dead agent sends nothing and hears nothing. Packets are told apart by their number only, never by their
//! bytes, which TLS makes different in every run.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use async_trait::async_trait;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Connection, Endpoint, EndpointConfig, ServerConfig, UdpPoller};
use tokio::time::{Instant, Sleep, sleep_until};
use vmferry_common::endpoint::{
    self, ConnectError, Connector, EndpointError, HostPort, MAX_MTU, TransportTuning,
};
use vmferry_common::identity::Identity;
use vmferry_common::link::LinkError;

use super::dice::Dice;
use super::facts::HostId;
use super::world::Node;

/// Port of the destination's agent.
pub(super) const PORT: u16 = 4747;
/// Packets that wait at a socket; more are dropped, as a kernel does.
const QUEUE: usize = 4096;

/// All sockets of a run.
#[derive(Debug)]
pub(super) struct Network {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    sockets: BTreeMap<SocketAddr, Arc<Socket>>,
    dice: Dice,
    ports: u16,
}

/// A packet on its way, ordered by when it arrives.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Packet {
    at: Instant,
    number: u64,
    from: SocketAddr,
    bytes: Vec<u8>,
}

/// A socket of one life of an agent.
struct Socket {
    network: Arc<Network>,
    node: Node,
    address: SocketAddr,
    inbox: Mutex<Inbox>,
}

#[derive(Default)]
struct Inbox {
    packets: BinaryHeap<Reverse<Packet>>,
    numbers: u64,
    alarm: Option<Pin<Box<Sleep>>>,
    reader: Option<Waker>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Socket({})", self.address)
    }
}

fn address(host: HostId, port: u16) -> SocketAddr {
    let last = match host {
        HostId::Alpha => 1,
        HostId::Beta => 2,
    };
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, last), port))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Network {
    /// No sockets yet.
    pub(super) fn new(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::new(Inner {
                sockets: BTreeMap::new(),
                dice: Dice::new(seed, 8),
                ports: 30_000,
            }),
        })
    }

    /// The run is over.
    pub(super) fn close(&self) {
        lock(&self.inner).sockets.clear();
    }

    /// The endpoint at which the destination's agent listens.
    pub(super) fn listen(
        self: &Arc<Self>,
        node: &Node,
        identity: &Identity,
        tuning: &TransportTuning,
    ) -> Result<Endpoint, EndpointError> {
        let config = endpoint::server_config(identity, tuning)?;
        self.endpoint(node, Some(PORT), Some(config))
            .map_err(EndpointError::Socket)
    }

    fn endpoint(
        self: &Arc<Self>,
        node: &Node,
        port: Option<u16>,
        server: Option<ServerConfig>,
    ) -> io::Result<Endpoint> {
        let (socket, seed) = {
            let mut inner = lock(&self.inner);
            inner.ports += 1;
            let address = address(node.host, port.unwrap_or(inner.ports));
            let socket = Arc::new(Socket {
                network: self.clone(),
                node: node.clone(),
                address,
                inbox: Mutex::default(),
            });
            inner.sockets.insert(address, socket.clone());
            let mut seed = [0; 32];
            for eight in seed.chunks_mut(8) {
                eight.copy_from_slice(&inner.dice.roll().to_le_bytes());
            }
            (socket, seed)
        };
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(MAX_MTU)
            .map_err(io::Error::other)?
            .rng_seed(Some(seed));
        Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(quinn::TokioRuntime))
    }

    /// What becomes of a packet.
    fn send(&self, from: &Socket, to: SocketAddr, bytes: &[u8]) {
        let (cut, link) = {
            let state = from.node.world.state();
            (state.now() < state.cut_until, state.link())
        };
        if cut {
            return;
        }
        let mut inner = lock(&self.inner);
        let copies = if inner.dice.chance(link.loss) {
            0
        } else {
            1 + u32::from(inner.dice.chance(link.twice))
        };
        let Some(socket) = inner.sockets.get(&to).cloned() else {
            return;
        };
        for _ in 0..copies {
            let late = link.delay_ms + inner.dice.below(link.jitter_ms + 1);
            socket.deliver(Duration::from_millis(late), from.address, bytes);
        }
    }
}

impl Socket {
    fn deliver(&self, late: Duration, from: SocketAddr, bytes: &[u8]) {
        let mut inbox = lock(&self.inbox);
        if inbox.packets.len() >= QUEUE {
            return;
        }
        inbox.numbers += 1;
        let packet = Packet {
            at: Instant::now() + late,
            number: inbox.numbers,
            from,
            bytes: bytes.to_vec(),
        };
        inbox.packets.push(Reverse(packet));
        if let Some(reader) = inbox.reader.take() {
            reader.wake();
        }
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.node.is_alive() {
            self.network
                .send(self, transmit.destination, transmit.contents);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let alive = self.node.is_alive();
        let mut inbox = lock(&self.inbox);
        if !alive {
            // Nobody reads any more.
            inbox.packets.clear();
            return Poll::Pending;
        }
        let mut count = 0;
        while let (Some(buf), Some(meta)) = (bufs.get_mut(count), meta.get_mut(count)) {
            let due = inbox
                .packets
                .peek()
                .is_some_and(|Reverse(next)| next.at <= Instant::now());
            let Some(Reverse(packet)) = due.then(|| inbox.packets.pop()).flatten() else {
                break;
            };
            let len = packet.bytes.len().min(buf.len());
            buf[..len].copy_from_slice(&packet.bytes[..len]);
            *meta = RecvMeta {
                addr: packet.from,
                len,
                stride: len,
                ecn: None,
                dst_ip: Some(self.address.ip()),
            };
            count += 1;
        }
        if count > 0 {
            return Poll::Ready(Ok(count));
        }
        inbox.wait(cx);
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

impl Inbox {
    /// Wakes the reader when the next packet arrives, or one is sent.
    fn wait(&mut self, cx: &mut Context<'_>) {
        self.reader = Some(cx.waker().clone());
        let Some(Reverse(next)) = self.packets.peek() else {
            self.alarm = None;
            return;
        };
        let mut alarm = Box::pin(sleep_until(next.at));
        if alarm.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
        self.alarm = Some(alarm);
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The simulated network, in the hands of the source's agent.
#[derive(Debug)]
pub(super) struct SimConnector {
    pub(super) network: Arc<Network>,
    pub(super) node: Node,
}

#[async_trait]
impl Connector for SimConnector {
    async fn connect(
        &self,
        to: &HostPort,
        identity: &Identity,
        tuning: &TransportTuning,
    ) -> Result<(Endpoint, Connection), ConnectError> {
        let no_answer = || ConnectError::NoAnswer { to: to.clone() };
        let config = endpoint::client_config(identity, tuning, tuning.max_mtu)?;
        let endpoint = self
            .network
            .endpoint(&self.node, None, None)
            .map_err(EndpointError::Socket)?;
        let connecting = endpoint
            .connect_with(config, address(HostId::Beta, to.port), &to.host)
            .map_err(|source| ConnectError::Begin {
                to: to.clone(),
                source,
            })?;
        match tokio::time::timeout(tuning.connect_timeout, connecting).await {
            Ok(Ok(connection)) => Ok((endpoint, connection)),
            Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_) => Err(no_answer()),
            Ok(Err(error)) => Err(ConnectError::Link {
                to: to.clone(),
                source: LinkError::of(&error, &to.to_string()),
            }),
        }
    }
}
