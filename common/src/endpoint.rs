//! QUIC endpoints: sockets, transport settings, connecting and accepting.
//!
//! Owns every transport figure with its reason. Invariant: no stream window above 2 MB, since quinn closes a
//! connection whose stream has more than 1,024 gaps; width comes from many lanes. It knows nothing of messages.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, Incoming, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls_pki_types::{CertificateDer, ServerName};

use crate::congestion::Congestion;
use crate::identity::{CertificateNameError, Identity, IdentityError, PeerName};
use crate::link::LinkError;
use crate::socket::{self, BufferShortage};

/// Cap of a stream's window: 2 MB in packets of 1,200 bytes, every second one lost, make 833 gaps of the 1,024 allowed.
pub const MAX_STREAM_WINDOW: u32 = 2_000_000;
/// Largest packet: quinn sends ten at once, and batches above 64 kB vanish silently.
pub const MAX_MTU: u16 = 6400;
/// Unidirectional streams that a peer may have open: the most lanes, and device states of a few attempts.
const MAX_UNI_STREAMS: u32 = 64 + 8;
/// Bidirectional streams: the control stream, and one that is being replaced.
const MAX_BIDI_STREAMS: u32 = 2;
/// Handshakes that may be under way at once; each holds some KiB.
const MAX_INCOMING: usize = 64;

/// What the key of stateless resets is derived for.
const RESETS: &str = "vmferry 2026-11-29 stateless resets of a listening endpoint";

/// Settings of the transport that may differ from link to link.
#[derive(Debug, Clone)]
pub struct TransportTuning {
    /// After this long without a packet the connection is lost.
    pub idle_timeout: Duration,
    /// How long connecting may take, over all addresses of the host.
    pub connect_timeout: Duration,
    /// Window of each stream, at most [`MAX_STREAM_WINDOW`].
    pub stream_window: u32,
    /// Bytes of all streams that may wait at the receiver: its memory bound.
    pub receive_window: u32,
    /// Bytes that the sender keeps until they are acknowledged: its memory bound, and the rate times round trip
    /// that it can fill: 32 MiB are 1 Gbit/s at 250 ms.
    pub send_window: u64,
    /// Socket buffers asked for, in bytes; the system's default loses packets even at 0.2 ms.
    pub socket_buffer: usize,
    /// Upper bound of the packet size, at most [`MAX_MTU`]; the path may allow less.
    pub max_mtu: u16,
    /// Whether the kernel may cut up batches of packets (segmentation offload): a third of the throughput without it.
    pub segmentation_offload: bool,
    /// How the sender finds out how much may be under way.
    pub congestion: Congestion,
}

impl Default for TransportTuning {
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            stream_window: MAX_STREAM_WINDOW,
            receive_window: 64 << 20,
            send_window: 32 << 20,
            socket_buffer: 8 << 20,
            max_mtu: MAX_MTU,
            segmentation_offload: true,
            congestion: Congestion::default(),
        }
    }
}

impl TransportTuning {
    pub(crate) fn transport(&self, mtu: u16) -> Result<TransportConfig, EndpointError> {
        let idle = self
            .idle_timeout
            .try_into()
            .map_err(|_| EndpointError::IdleTimeout(self.idle_timeout))?;
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(mtu.min(MAX_MTU));
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_uni_streams(MAX_UNI_STREAMS.into())
            .max_concurrent_bidi_streams(MAX_BIDI_STREAMS.into())
            .stream_receive_window(self.stream_window.min(MAX_STREAM_WINDOW).into())
            .receive_window(VarInt::from_u32(self.receive_window))
            .send_window(self.send_window)
            .max_idle_timeout(Some(idle))
            // Four tries within the idle time, so that single losses do not end an idle session.
            .keep_alive_interval(Some(self.idle_timeout / 4))
            // The default of 333 ms makes the first repeat of a lost handshake packet needlessly late.
            .initial_rtt(Duration::from_millis(100))
            .mtu_discovery_config(Some(discovery))
            // Lanes have one priority; turns between them would only cut their frames into more pieces.
            .send_fairness(false)
            .congestion_controller_factory(self.congestion.factory())
            .enable_segmentation_offload(self.segmentation_offload)
            .datagram_receive_buffer_size(None);
        Ok(transport)
    }
}

/// An endpoint could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The identity cannot be used.
    #[error("no QUIC endpoint without an identity")]
    Identity(#[from] IdentityError),
    /// The address cannot be bound.
    #[error(
        "cannot listen on UDP {listen}: is another agent using the port, and is the address this host's?"
    )]
    Bind {
        /// The address.
        listen: SocketAddr,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// An outgoing socket cannot be made.
    #[error("cannot open a UDP socket")]
    Socket(#[source] io::Error),
    /// The idle time-out is out of range.
    #[error("an idle time-out of {0:?} is out of range: use 1s to 1h")]
    IdleTimeout(Duration),
    /// The TLS configuration cannot be used for QUIC; a bug here.
    #[error("the TLS configuration does not fit QUIC")]
    Tls(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// A connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The endpoint could not be set up.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The host's name has no address.
    #[error("{host} cannot be found: check the name, or use an IP address")]
    Resolve {
        /// The host.
        host: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The host's name cannot stand in a certificate.
    #[error("{host:?} is neither a DNS name nor an IP address")]
    BadHost {
        /// The host.
        host: String,
    },
    /// Nobody answered.
    #[error("{to} does not answer: is `vmferry-dst serve` running there, and is UDP port {port} open in between?", port = to.port)]
    NoAnswer {
        /// Where to.
        to: HostPort,
    },
    /// The other side was reached and the connection was refused or lost.
    #[error("cannot connect to {to}")]
    Link {
        /// Where to.
        to: HostPort,
        /// Why not.
        #[source]
        source: LinkError,
    },
    /// quinn refused to begin.
    #[error("cannot begin a connection to {to}")]
    Begin {
        /// Where to.
        to: HostPort,
        /// Why not.
        #[source]
        source: quinn::ConnectError,
    },
}

impl ConnectError {
    /// Whether a certificate was refused, on either side.
    #[must_use]
    pub const fn is_refusal(&self) -> bool {
        matches!(self, Self::Link { source, .. } if source.is_refusal())
    }

    /// Whether another try can go better without anybody doing anything.
    #[must_use]
    pub const fn is_lost_link(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Link { source, .. } => source.is_lost_link(),
            Self::Endpoint(_)
            | Self::Resolve { .. }
            | Self::BadHost { .. }
            | Self::Begin { .. } => false,
        }
    }
}

/// `HOST:PORT`, as in `--to`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// DNS name or IP address, without brackets.
    pub host: String,
    /// UDP port.
    pub port: u16,
}

/// Text that is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not HOST:PORT: write it as in beta:7447, 192.0.2.7:7447 or [2001:db8::7]:7447")]
pub struct HostPortError(String);

impl FromStr for HostPort {
    type Err = HostPortError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_host_port(text).ok_or_else(|| HostPortError(text.chars().take(80).collect()))
    }
}

fn parse_host_port(text: &str) -> Option<HostPort> {
    let (host, port) = text.rsplit_once(':')?;
    // `u16::from_str` takes a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match bracketed {
        Some(address) => address.parse::<Ipv6Addr>().ok()?.to_string(),
        None => {
            let plain = !host.contains(':') && ServerName::try_from(host).is_ok();
            plain.then(|| host.to_owned())?
        }
    };
    Some(HostPort { host, port })
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Configuration of the listening side; also for replacing the identity of a running endpoint.
pub fn server_config(
    identity: &Identity,
    tuning: &TransportTuning,
) -> Result<ServerConfig, EndpointError> {
    let tls = QuicServerConfig::try_from(identity.tls_server()?).map_err(EndpointError::Tls)?;
    let mut config = ServerConfig::with_crypto(Arc::new(tls));
    config.transport_config(Arc::new(tuning.transport(tuning.max_mtu)?));
    config.max_incoming(MAX_INCOMING);
    Ok(config)
}

/// Configuration of the connecting side for a path of this packet size.
pub fn client_config(
    identity: &Identity,
    tuning: &TransportTuning,
    mtu: u16,
) -> Result<ClientConfig, EndpointError> {
    let tls = QuicClientConfig::try_from(identity.tls_client()?).map_err(EndpointError::Tls)?;
    let mut config = ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(tuning.transport(mtu)?));
    Ok(config)
}

/// An endpoint that listens on `listen`. Must be called within a tokio runtime.
pub fn bind_server(
    listen: SocketAddr,
    identity: &Identity,
    tuning: &TransportTuning,
) -> Result<Endpoint, EndpointError> {
    let server = server_config(identity, tuning)?;
    let bound = socket::bind(listen, tuning.socket_buffer);
    let (socket, shortage) = bound.map_err(|source| EndpointError::Bind { listen, source })?;
    tell_shortage(shortage);
    let bound = socket.local_addr().map_err(EndpointError::Socket)?;
    let config = lasting(&identity.secret_for(RESETS, bound.to_string().as_bytes()));
    endpoint(config, Some(server), socket).map_err(EndpointError::Socket)
}

/// The configuration of an endpoint that one before it had already, in a process that was killed: whoever goes on with a connection to
/// that one is told at once that it is gone (a stateless reset, RFC 9000, section 10.3), and need not wait for the idle time-out. The
/// address is a part of the secret, since two endpoints that listen at once must not have one key (section 10.3.2).
fn lasting(secret: &[u8; 32]) -> EndpointConfig {
    let mut config = EndpointConfig::new(Arc::new(hmac::Key::new(hmac::HMAC_SHA256, secret)));
    let (of_ids, _) = secret
        .split_first_chunk()
        .expect("32 bytes are more than 8");
    let of_ids = u64::from_le_bytes(*of_ids);
    // Connection ids of the one before must not be taken for rubbish.
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(of_ids)));
    config
}

/// An endpoint for one connection to `remote`: its own socket, and the packet size that the route allows.
/// Must be called within a tokio runtime.
pub fn client_endpoint(
    identity: &Identity,
    tuning: &TransportTuning,
    remote: SocketAddr,
) -> Result<Endpoint, EndpointError> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mtu = socket::path_mtu(remote)
        .unwrap_or(MAX_MTU)
        .min(tuning.max_mtu);
    let config = client_config(identity, tuning, mtu)?;
    let (socket, shortage) = socket::bind(SocketAddr::new(any, 0), tuning.socket_buffer)
        .map_err(EndpointError::Socket)?;
    tell_shortage(shortage);
    let mut endpoint =
        endpoint(EndpointConfig::default(), None, socket).map_err(EndpointError::Socket)?;
    endpoint.set_default_client_config(config);
    Ok(endpoint)
}

fn endpoint(
    mut config: EndpointConfig,
    server: Option<ServerConfig>,
    socket: std::net::UdpSocket,
) -> io::Result<Endpoint> {
    // Both ends must say so, else the peer keeps to packets of 1,472 bytes.
    config
        .max_udp_payload_size(MAX_MTU)
        .map_err(io::Error::other)?;
    Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime))
}

fn tell_shortage(shortage: Option<BufferShortage>) {
    if let Some(shortage) = shortage {
        tracing::warn!("{shortage}");
    }
}

/// What carries connections to a destination: the network of this host, or whatever stands for it.
#[async_trait]
pub trait Connector: Send + Sync + fmt::Debug {
    /// Connects to `to`. Cancel safe: a dropped call leaves nothing behind.
    async fn connect(
        &self,
        to: &HostPort,
        identity: &Identity,
        tuning: &TransportTuning,
    ) -> Result<(Endpoint, Connection), ConnectError>;
}

/// UDP sockets of this host.
#[derive(Debug, Clone, Copy, Default)]
pub struct Udp;

#[async_trait]
impl Connector for Udp {
    async fn connect(
        &self,
        to: &HostPort,
        identity: &Identity,
        tuning: &TransportTuning,
    ) -> Result<(Endpoint, Connection), ConnectError> {
        connect(to, identity, tuning).await
    }
}

/// Connects to `to`, trying its addresses in turn.
///
/// A returned connection is not yet accepted: under TLS 1.3 the server judges this side's certificate after
/// this returns. The caller counts as connected only after the peer's first message, and reads an error before
/// it through [`LinkError`]. Cancel safe: a dropped call leaves nothing behind.
pub async fn connect(
    to: &HostPort,
    identity: &Identity,
    tuning: &TransportTuning,
) -> Result<(Endpoint, Connection), ConnectError> {
    if ServerName::try_from(to.host.as_str()).is_err() {
        return Err(ConnectError::BadHost {
            host: to.host.clone(),
        });
    }
    let no_answer = || ConnectError::NoAnswer { to: to.clone() };
    match tokio::time::timeout(tuning.connect_timeout, try_addresses(to, identity, tuning)).await {
        Ok(result) => result,
        Err(_) => Err(no_answer()),
    }
}

async fn try_addresses(
    to: &HostPort,
    identity: &Identity,
    tuning: &TransportTuning,
) -> Result<(Endpoint, Connection), ConnectError> {
    let resolved = tokio::net::lookup_host((to.host.as_str(), to.port)).await;
    let addresses: Vec<_> = resolved
        .map_err(|source| ConnectError::Resolve {
            host: to.host.clone(),
            source,
        })?
        .collect();
    // Each address gets its share, so that a dead one does not use up the time of the others.
    let share = tuning.connect_timeout / u32::try_from(addresses.len().max(1)).unwrap_or(1);
    let mut last = ConnectError::NoAnswer { to: to.clone() };
    for address in addresses {
        match tokio::time::timeout(share, connect_one(to, address, identity, tuning)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => last = error,
            Err(_) => tracing::debug!(%address, "no answer"),
        }
    }
    Err(last)
}

async fn connect_one(
    to: &HostPort,
    address: SocketAddr,
    identity: &Identity,
    tuning: &TransportTuning,
) -> Result<(Endpoint, Connection), ConnectError> {
    let endpoint = client_endpoint(identity, tuning, address)?;
    let connecting = endpoint
        .connect(address, &to.host)
        .map_err(|source| ConnectError::Begin {
            to: to.clone(),
            source,
        })?;
    match connecting.await {
        Ok(connection) => Ok((endpoint, connection)),
        Err(quinn::ConnectionError::TimedOut) => Err(ConnectError::NoAnswer { to: to.clone() }),
        Err(error) => Err(ConnectError::Link {
            to: to.clone(),
            source: LinkError::of(&error, &to.to_string()),
        }),
    }
}

/// Completes an incoming connection: its peer has shown a certificate of the CA and has a name.
/// A peer that stalls is given up after `tuning.connect_timeout`.
pub async fn accept(
    incoming: Incoming,
    tuning: &TransportTuning,
) -> Result<(Connection, PeerName), LinkError> {
    let address = incoming.remote_address().to_string();
    let handshake = async { incoming.accept()?.await };
    let connection = match tokio::time::timeout(tuning.connect_timeout, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Err(LinkError::of(&error, &address)),
        Err(_) => return Err(LinkError::TimedOut { peer: address }),
    };
    match peer_name(&connection) {
        Ok(name) => Ok((connection, name)),
        Err(error) => {
            connection.close(VarInt::from_u32(0), error.to_string().as_bytes());
            Err(LinkError::PeerRefused {
                peer: address,
                reason: error.to_string(),
            })
        }
    }
}

/// Name in the certificate that the peer of this connection showed.
pub fn peer_name(connection: &Connection) -> Result<PeerName, CertificateNameError> {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .ok_or(CertificateNameError::Unreadable)?;
    let own = chain.first().ok_or(CertificateNameError::Unreadable)?;
    PeerName::of_certificate(own)
}

#[cfg(test)]
mod tests {
    use super::HostPort;

    #[test]
    fn host_and_port_are_both_needed() {
        for (text, host, port) in [
            ("beta:4747", "beta", 4747),
            ("192.0.2.7:1", "192.0.2.7", 1),
            ("[2001:db8::7]:4747", "2001:db8::7", 4747),
            ("beta.example.net:65535", "beta.example.net", 65535),
        ] {
            let parsed: HostPort = text.parse().unwrap();
            assert_eq!((parsed.host.as_str(), parsed.port), (host, port));
            assert_eq!(parsed.to_string(), text);
        }
        for bad in [
            "",
            "beta",
            "beta:",
            ":4747",
            "beta:0",
            "beta:65536",
            "2001:db8::7:4747",
            "[beta]:1",
            "be ta:1",
            "be/ta:1",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad:?} was accepted");
        }
    }
}
