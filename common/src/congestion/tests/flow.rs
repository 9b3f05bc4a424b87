//! One transfer: quinn's own state machines at both ends, driven in simulated time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig, Event, StreamEvent,
    StreamId,
};

use super::super::Congestion;
use crate::endpoint::{MAX_MTU, TransportTuning};

/// Streams of a transfer, as many as a migration has lanes.
const LANES: usize = 16;
/// Datagrams that quinn gives the socket at once.
const BATCH: usize = 10;
/// What tokio's timers round up to.
const TIMER_GRAIN: Duration = Duration::from_millis(1);
const PIECE: usize = 64 << 10;

/// A packet for the other end.
pub(super) type Datagram = Vec<u8>;

/// One end.
pub(super) struct Peer {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    remote: SocketAddr,
    lanes: Vec<(StreamId, bool)>,
    /// Bytes that the application still has to send.
    pub(super) backlog: u64,
    /// Bytes that the application has read.
    pub(super) received: u64,
    start: Instant,
}

/// Both ends of a transfer, the sender first.
pub(super) fn pair(congestion: Congestion, mtu: u16, seed: u8, now: Instant) -> [Peer; 2] {
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let certificate = rcgen::CertificateParams::new(vec!["sim".to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let tuning = TransportTuning {
        congestion,
        ..TransportTuning::default()
    };
    let transport = Arc::new(tuning.transport(mtu).unwrap());

    let chain = vec![certificate.der().clone()];
    let mut server =
        quinn_proto::ServerConfig::with_single_cert(chain, key.serialize_der().try_into().unwrap())
            .unwrap();
    server.transport_config(transport.clone());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).unwrap();
    let mut client = quinn_proto::ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    client.transport_config(transport);

    let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
    let endpoint = |server, seed| {
        let mut config = EndpointConfig::default();
        config
            .max_udp_payload_size(MAX_MTU)
            .unwrap()
            .rng_seed(Some([seed; 32]));
        Endpoint::new(Arc::new(config), server, true, None)
    };
    let peer = |endpoint, remote| Peer {
        endpoint,
        connection: None,
        remote,
        lanes: Vec::new(),
        backlog: 0,
        received: 0,
        start: now,
    };
    let mut sender = peer(endpoint(None, seed), address(2));
    let receiver = peer(
        endpoint(Some(Arc::new(server)), seed.wrapping_add(100)),
        address(1),
    );
    let begun = sender.endpoint.connect(now, client, sender.remote, "sim");
    sender.connection = Some(begun.unwrap());
    [sender, receiver]
}

impl Peer {
    /// Takes a datagram in.
    pub(super) fn handle(&mut self, now: Instant, datagram: &[u8]) {
        let mut out = Vec::new();
        let data = BytesMut::from(datagram);
        match self
            .endpoint
            .handle(now, self.remote, None, None, data, &mut out)
        {
            Some(DatagramEvent::NewConnection(incoming)) => {
                let accepted = self.endpoint.accept(incoming, now, &mut out, None);
                self.connection = accepted.ok();
            }
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                if let Some((_, connection)) = &mut self.connection {
                    connection.handle_event(event);
                }
            }
            Some(DatagramEvent::Response(_)) | None => {}
        }
    }

    /// When it wants to be driven without a datagram.
    pub(super) fn wakes_at(&mut self) -> Option<Instant> {
        let (_, connection) = self.connection.as_mut()?;
        let at = connection.poll_timeout()? - self.start;
        let grains = at.as_nanos().div_ceil(TIMER_GRAIN.as_nanos());
        Some(self.start + TIMER_GRAIN * u32::try_from(grains).unwrap())
    }

    /// Lets it do all it can, and gives `send` its datagrams.
    pub(super) fn drive(&mut self, now: Instant, mut send: impl FnMut(Datagram)) {
        if self.connection.is_none() {
            return;
        }
        let (handle, connection) = self.connection.as_mut().unwrap();
        if connection.poll_timeout().is_some_and(|at| at <= now) {
            connection.handle_timeout(now);
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        self.app();
        let (_, connection) = self.connection.as_mut().unwrap();
        let mut buffer = Vec::new();
        while let Some(transmit) = connection.poll_transmit(now, BATCH, &mut buffer) {
            let segment = transmit.segment_size.unwrap_or(transmit.size);
            for datagram in buffer[..transmit.size].chunks(segment) {
                send(datagram.to_vec());
            }
            buffer.clear();
        }
    }

    fn app(&mut self) {
        let (_, connection) = self.connection.as_mut().unwrap();
        while let Some(event) = connection.poll() {
            match event {
                Event::Connected if connection.side().is_client() => {
                    let streams = std::iter::from_fn(|| connection.streams().open(Dir::Uni));
                    self.lanes = streams.take(LANES).map(|id| (id, true)).collect();
                }
                Event::Stream(StreamEvent::Writable { id }) => {
                    self.lanes
                        .iter_mut()
                        .filter(|lane| lane.0 == id)
                        .for_each(|lane| lane.1 = true);
                }
                Event::Stream(StreamEvent::Opened { .. }) => {
                    while let Some(id) = connection.streams().accept(Dir::Uni) {
                        self.received += read(connection, id);
                    }
                }
                Event::Stream(StreamEvent::Readable { id }) => {
                    self.received += read(connection, id);
                }
                Event::ConnectionLost { reason } => panic!("connection lost: {reason}"),
                _ => {}
            }
        }
        self.write();
    }

    fn write(&mut self) {
        let (_, connection) = self.connection.as_mut().unwrap();
        while self.backlog > 0 && self.lanes.iter().any(|lane| lane.1) {
            for (id, free) in self.lanes.iter_mut().filter(|lane| lane.1) {
                let most = usize::try_from(self.backlog).unwrap_or(PIECE).min(PIECE);
                let mut piece = [Bytes::from_static(&[7; PIECE]).slice(..most)];
                match connection.send_stream(*id).write_chunks(&mut piece) {
                    Ok(written) => self.backlog -= written.bytes as u64,
                    Err(_) => *free = false,
                }
            }
        }
    }

    pub(super) fn packets_sent(&self) -> u64 {
        let connection = self.connection.as_ref();
        connection.map_or(0, |(_, connection)| connection.stats().path.sent_packets)
    }
}

fn read(connection: &mut Connection, id: StreamId) -> u64 {
    let mut total = 0;
    let mut stream = connection.recv_stream(id);
    let Ok(mut chunks) = stream.read(false) else {
        return 0;
    };
    while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
        total += chunk.bytes.len() as u64;
    }
    let _ = chunks.finalize();
    total
}
