//! Two ends over loopback: who is let in, what both sides say of a refusal, and what travels on the streams.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, Endpoint};
use tokio::task::JoinHandle;
use vmferry_certs::{CertificateAuthority, HostRequest, SubjectName, Validity};
use vmferry_common::causes::chain;
use vmferry_common::codec::{Blocks, Decoder, Encoder, check_raw};
use vmferry_common::control::{self, ControlError};
use vmferry_common::digest;
use vmferry_common::endpoint::{self, ConnectError, HostPort, TransportTuning};
use vmferry_common::identity::{Identity, IdentityError, PeerName};
use vmferry_common::lanes::{self, LaneError, LaneSender, Payload};
use vmferry_common::link::LinkError;
use vmferry_common::pace::Pacer;
use vmferry_common::units::Rate;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{FrameHeader, StreamHeader, StreamKind};
use vmferry_proto::geometry::{RegionLen, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::{Attempt, FrameSeq, Lane, MigrationId, RegionId, SessionNumber};
use vmferry_proto::message::{ToDestination, ToSource};

/// A folder with a CA and identities.
struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        CertificateAuthority::create(&dir.path().join("ca"), Validity::days(10).unwrap()).unwrap();
        Self { dir }
    }

    fn issue(&self, name: &str, addresses: &[&str], validity: Validity) -> PathBuf {
        let out = self.dir.path().join(name);
        let request = HostRequest {
            name: name.to_owned(),
            addresses: addresses
                .iter()
                .map(|a| a.parse::<SubjectName>().unwrap())
                .collect(),
            validity,
        };
        CertificateAuthority::load(&self.dir.path().join("ca"))
            .unwrap()
            .issue(&request, &out)
            .unwrap();
        out
    }

    fn identity(&self, name: &str, addresses: &[&str]) -> Identity {
        Identity::load(&self.issue(name, addresses, Validity::days(5).unwrap())).unwrap()
    }
}

fn tuning() -> TransportTuning {
    TransportTuning {
        idle_timeout: Duration::from_secs(20),
        connect_timeout: Duration::from_secs(20),
        ..TransportTuning::default()
    }
}

type Accepted = Result<(Connection, PeerName), LinkError>;

/// A server that accepts one connection and tells what became of it.
fn serve(identity: &Identity) -> (Endpoint, HostPort, JoinHandle<Accepted>) {
    let listen: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let endpoint = endpoint::bind_server(listen, identity, &tuning()).unwrap();
    let port = endpoint.local_addr().unwrap().port();
    let accepting = tokio::spawn({
        let endpoint = endpoint.clone();
        async move {
            let incoming = endpoint.accept().await.unwrap();
            endpoint::accept(incoming, &tuning()).await
        }
    });
    let to = HostPort {
        host: "127.0.0.1".to_owned(),
        port,
    };
    (endpoint, to, accepting)
}

/// Connects, and reads as the agents do: a refusal may only show at the first message.
async fn first_answer(to: &HostPort, identity: &Identity) -> Result<Option<ToSource>, String> {
    let (_endpoint, connection) = endpoint::connect(to, identity, &tuning())
        .await
        .map_err(|error| chain(&error))?;
    let talk = async {
        let (mut send, mut recv) = control::open(&connection, "beta").await?;
        send.send(&ToDestination::Goodbye).await?;
        recv.recv().await
    };
    talk.await.map_err(|error: ControlError| chain(&error))
}

/// Both sides' words about a refused connection.
async fn refused(server: &Identity, client: &Identity) -> (String, String) {
    let (_endpoint, to, accepting) = serve(server);
    let here = first_answer(&to, client).await.unwrap_err();
    let there = chain(&accepting.await.unwrap().unwrap_err());
    (here, there)
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
}

#[tokio::test]
async fn the_right_certificates_are_accepted_and_name_both_hosts() {
    let pki = Pki::new();
    let (alpha, beta) = (
        pki.identity("Alpha", &[]),
        pki.identity("beta", &["127.0.0.1"]),
    );
    let (_endpoint, to, accepting) = serve(&beta);
    let (_client, connection) = endpoint::connect(&to, &alpha, &tuning()).await.unwrap();
    let (accepted, name) = accepting.await.unwrap().unwrap();
    assert_eq!((name.as_str(), alpha.name().as_str()), ("alpha", "alpha"));
    assert!(name.is("ALPHA") && !name.is("beta"));
    assert_eq!(endpoint::peer_name(&connection).unwrap().as_str(), "beta");

    let (mut send, mut recv) = control::open(&connection, "beta").await.unwrap();
    send.send(&ToDestination::Goodbye).await.unwrap();
    let (mut answer, mut asked) = control::accept(&accepted, "alpha").await.unwrap();
    assert_eq!(asked.recv().await.unwrap(), Some(ToDestination::Goodbye));
    let error = WireError::new(ErrorCode::UnknownGuest, "no guest web");
    answer.send(&ToSource::Error(error.clone())).await.unwrap();
    answer.finish();
    assert_eq!(recv.recv().await.unwrap(), Some(ToSource::Error(error)));
    assert_eq!(recv.recv().await.unwrap(), None);
}

#[tokio::test]
async fn certificates_of_another_ca_are_refused_on_either_side() {
    let (pki, other) = (Pki::new(), Pki::new());
    let beta = pki.identity("beta", &["127.0.0.1"]);
    let stranger = other.identity("alpha", &[]);
    let (here, there) = refused(&beta, &stranger).await;
    has(
        &here,
        &["certificate of 127.0.0.1", "was refused here", "another CA"],
    );
    has(
        &there,
        &["refused this host's certificate", "certificates of one CA"],
    );

    // The server's refusal alone: the stranger trusts both CAs.
    let both = pki.dir.path().join("both");
    copy_identity(stranger.dir(), &both);
    let mut roots = std::fs::read_to_string(both.join("ca.pem")).unwrap();
    roots += &std::fs::read_to_string(pki.dir.path().join("ca/ca.pem")).unwrap();
    std::fs::write(both.join("ca.pem"), roots).unwrap();
    let (here, there) = refused(&beta, &Identity::load(&both).unwrap()).await;
    has(
        &here,
        &["refused this host's certificate", "certificates of one CA"],
    );
    has(&there, &["was refused here", "another CA"]);
}

fn copy_identity(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in ["cert.pem", "key.pem", "ca.pem"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

fn expired() -> Validity {
    let now = Validity::days(1).unwrap().not_before;
    Validity {
        not_before: now - Duration::from_secs(7200),
        not_after: now - Duration::from_secs(3600),
    }
}

#[tokio::test]
async fn an_expired_client_is_refused_by_itself_and_by_the_server() {
    let pki = Pki::new();
    let beta = pki.identity("beta", &["127.0.0.1"]);
    let dir = pki.issue("alpha", &[], expired());
    let own = Identity::load(&dir).unwrap_err();
    assert!(matches!(own, IdentityError::NotValidNow { .. }));
    has(&chain(&own), &["cert.pem is valid from", "issue a new one"]);
    let (here, there) = refused(&beta, &Identity::read(&dir).unwrap()).await;
    has(&here, &["refused this host's certificate", "has expired"]);
    has(
        &there,
        &["was refused here", "expired", "issue it a new identity"],
    );
}

#[tokio::test]
async fn an_expired_server_is_refused_by_the_client() {
    let pki = Pki::new();
    let beta = Identity::read(&pki.issue("beta", &["127.0.0.1"], expired())).unwrap();
    let (here, there) = refused(&beta, &pki.identity("alpha", &[])).await;
    has(
        &here,
        &["was refused here", "expired", "issue it a new identity"],
    );
    has(&there, &["refused this host's certificate", "has expired"]);
}

#[tokio::test]
async fn a_server_of_another_name_is_refused() {
    let pki = Pki::new();
    let beta = pki.identity("beta", &["192.0.2.7"]);
    let (here, there) = refused(&beta, &pki.identity("alpha", &[])).await;
    has(&here, &["was refused here", "127.0.0.1", "--address"]);
    has(&there, &["refused this host's certificate"]);
}

/// An identity whose certificate allows one role only.
fn one_role(pki: &Pki, name: &str, role: rcgen::ExtendedKeyUsagePurpose) -> Identity {
    use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};
    let ca = pki.dir.path().join("ca");
    let ca_key = KeyPair::from_pem(&std::fs::read_to_string(ca.join("ca.key")).unwrap()).unwrap();
    let ca_pem = std::fs::read_to_string(ca.join("ca.pem")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&ca_pem, ca_key).unwrap();
    let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let loopback = SanType::IpAddress("127.0.0.1".parse().unwrap());
    params.subject_alt_names.push(loopback);
    params.extended_key_usages = vec![role];
    let key = KeyPair::generate().unwrap();
    let dir = pki.issue(name, &[], Validity::days(5).unwrap());
    std::fs::write(
        dir.join("cert.pem"),
        params.signed_by(&key, &issuer).unwrap().pem(),
    )
    .unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    Identity::read(&dir).unwrap()
}

#[tokio::test]
async fn a_certificate_for_the_other_role_is_refused() {
    use rcgen::ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let pki = Pki::new();
    let (alpha, beta) = (
        pki.identity("alpha", &[]),
        pki.identity("beta", &["127.0.0.1"]),
    );
    let client_only = one_role(&pki, "gamma", ClientAuth);
    let (here, there) = refused(&client_only, &alpha).await;
    has(&here, &["was refused here", "not meant for this role"]);
    has(&there, &["refused this host's certificate"]);
    let server_only = one_role(&pki, "delta", ServerAuth);
    let (here, there) = refused(&beta, &server_only).await;
    has(&here, &["refused this host's certificate"]);
    has(&there, &["was refused here", "not meant for this role"]);
    assert!(
        Identity::load(server_only.dir()).is_err(),
        "told before connecting, too"
    );
}

#[tokio::test]
async fn a_port_in_use_is_told() {
    let pki = Pki::new();
    let beta = pki.identity("beta", &[]);
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = endpoint::bind_server(taken.local_addr().unwrap(), &beta, &tuning()).unwrap_err();
    has(
        &chain(&error),
        &["cannot listen on UDP 127.0.0.1", "another agent"],
    );
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let pki = Pki::new();
    let beta = pki.identity("beta", &["127.0.0.1"]);
    let (_endpoint, to, accepting) = serve(&beta);
    let error = anonymous(&to, &pki.dir.path().join("ca/ca.pem"), b"vmferry/1").await;
    let link = LinkError::of(&error, "beta");
    assert!(matches!(link, LinkError::RefusedByPeer { .. }), "{link}");
    has(&link.to_string(), &["a certificate is required"]);
    let there = accepting.await.unwrap().unwrap_err();
    has(&there.to_string(), &["was refused here", "showed none"]);
}

#[tokio::test]
async fn another_protocol_is_told_as_such() {
    let pki = Pki::new();
    let beta = pki.identity("beta", &["127.0.0.1"]);
    let (_endpoint, to, accepting) = serve(&beta);
    let error = anonymous(&to, &pki.dir.path().join("ca/ca.pem"), b"h3").await;
    assert!(
        matches!(LinkError::of(&error, "beta"), LinkError::NotVmferry { .. }),
        "{error}"
    );
    let there = accepting.await.unwrap().unwrap_err();
    assert!(matches!(there, LinkError::NotVmferry { .. }), "{there}");
}

/// Connects without a certificate and returns why the connection ended.
async fn anonymous(to: &HostPort, ca: &Path, protocol: &[u8]) -> quinn::ConnectionError {
    use rustls_pki_types::pem::PemObject;
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(rustls_pki_types::CertificateDer::from_pem_file(ca).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![protocol.to_vec()];
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let address = format!("127.0.0.1:{}", to.port).parse().unwrap();
    match endpoint
        .connect_with(config, address, "127.0.0.1")
        .unwrap()
        .await
    {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

#[tokio::test]
async fn nobody_there_is_told_with_the_port() {
    let pki = Pki::new();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = HostPort {
        host: "127.0.0.1".to_owned(),
        port: silent.local_addr().unwrap().port(),
    };
    let short = TransportTuning {
        connect_timeout: Duration::from_millis(300),
        ..tuning()
    };
    let error = endpoint::connect(&to, &pki.identity("alpha", &[]), &short)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::NoAnswer { .. }) && error.is_lost_link());
    has(
        &chain(&error),
        &["does not answer", "vmferry-dst serve", &to.port.to_string()],
    );
    let unknown = HostPort {
        host: "no-such-host.invalid".to_owned(),
        port: 1,
    };
    let error = endpoint::connect(&unknown, &pki.identity("gamma", &[]), &tuning())
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Resolve { .. }), "{error}");
}

#[test]
fn an_identity_that_the_peer_would_refuse_is_refused_here_with_the_next_step() {
    use std::os::unix::fs::PermissionsExt;
    let pki = Pki::new();
    let missing = Identity::load(&pki.dir.path().join("nowhere")).unwrap_err();
    has(
        &chain(&missing),
        &["cert.pem is missing", "vmferry-certs issue"],
    );

    let dir = pki.issue("alpha", &[], Validity::days(5).unwrap());
    let key = dir.join("key.pem");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    has(
        &chain(&Identity::load(&dir).unwrap_err()),
        &["key.pem has mode 644", "chmod 600"],
    );
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    Identity::load(&dir).unwrap();

    // The key of another host.
    let other = pki.issue("beta", &[], Validity::days(5).unwrap());
    std::fs::copy(other.join("key.pem"), &key).unwrap();
    has(
        &chain(&Identity::load(&dir).unwrap_err()),
        &["does not hold together"],
    );
    // The CA of another installation.
    let stranger = Pki::new();
    std::fs::copy(stranger.dir.path().join("ca/ca.pem"), other.join("ca.pem")).unwrap();
    has(
        &chain(&Identity::load(&other).unwrap_err()),
        &["does not hold together", "UnknownIssuer"],
    );
    std::fs::write(other.join("ca.pem"), "rubbish").unwrap();
    has(
        &chain(&Identity::load(&other).unwrap_err()),
        &["ca.pem holds no certificate"],
    );
}

/// Two connected ends; the endpoints are kept alive with them.
struct Pair {
    source: Connection,
    destination: Connection,
    _endpoints: (Endpoint, Endpoint),
}

async fn pair() -> Pair {
    let pki = Pki::new();
    let (alpha, beta) = (
        pki.identity("alpha", &[]),
        pki.identity("beta", &["127.0.0.1"]),
    );
    let (server, to, accepting) = serve(&beta);
    let (client, source) = endpoint::connect(&to, &alpha, &tuning()).await.unwrap();
    let (destination, _) = accepting.await.unwrap().unwrap();
    Pair {
        source,
        destination,
        _endpoints: (server, client),
    }
}

const HEADER: StreamHeader = StreamHeader {
    kind: StreamKind::Lane { lane: Lane(0) },
    session: SessionNumber(1),
    migration: MigrationId::from_bytes([7; 16]),
};
const REGION: RegionLen = RegionLen(4 * 2_097_152);

fn frame(seq: u64, window: u32, fill: u8) -> (FrameHeader, Bytes) {
    let bytes = vec![fill; 3 * 4096];
    let blocks = Blocks {
        window: WindowRef {
            region: RegionId(0),
            window: WindowIndex(window),
        },
        region: REGION,
        read: WindowBits::first(3),
        known_zero: WindowBits::span(3, 10),
        bytes: &bytes,
    };
    let encoded = Encoder::new()
        .encode(&blocks, fill.is_multiple_of(2).then_some(1))
        .unwrap();
    (encoded.header(FrameSeq(seq)), encoded.payload)
}

/// The content of a frame: zero for frame 256.
fn low(seq: u64) -> u8 {
    seq.to_le_bytes()[0]
}

#[tokio::test]
async fn frames_arrive_in_order_with_their_bytes() {
    let pair = pair().await;
    let sending = tokio::spawn({
        let connection = pair.source.clone();
        async move {
            let mut lane = LaneSender::open(&connection, HEADER, Lane(2), "beta")
                .await
                .unwrap();
            let pacer = Pacer::new(Some(Rate(50_000_000)));
            for seq in 1..=300 {
                let (header, payload) = frame(seq, 2, low(seq));
                if seq % 2 == 0 {
                    lane.send(&header, payload).await.unwrap();
                } else {
                    lane.send_paced(&header, payload, &pacer).await.unwrap();
                }
            }
            lane.finish();
            lane
        }
    });
    let incoming = lanes::accept(&pair.destination, "alpha").await.unwrap();
    incoming
        .header
        .check(HEADER.migration, HEADER.session, 16)
        .unwrap();
    let mut lane = incoming.into_lane(Arc::from([REGION]), 16).unwrap();
    assert_eq!(lane.lane(), Lane(2));
    let mut decoder = Decoder::new();
    let mut seq = 0;
    while let Some((header, payload)) = lane.next().await.unwrap() {
        seq += 1;
        assert_eq!(header.seq, FrameSeq(seq));
        let raw = match payload {
            Payload::Raw(pieces) => {
                check_raw(&header, &pieces).unwrap();
                pieces.concat()
            }
            Payload::Encoded(payload) => decoder.decode(&header, &payload).unwrap().to_vec(),
        };
        if low(seq) == 0 {
            assert!(raw.is_empty());
        } else {
            assert_eq!(raw, vec![low(seq); 3 * 4096]);
        }
    }
    assert_eq!((seq, lane.last()), (300, FrameSeq(300)));
    drop(sending.await.unwrap());
}

#[tokio::test]
async fn a_lying_frame_is_named_and_nothing_of_it_is_returned() {
    let pair = pair().await;
    let (good, payload) = frame(1, 2, 5);
    let wrong: Vec<FrameHeader> = vec![
        FrameHeader {
            seq: FrameSeq(2),
            ..good.clone()
        },
        FrameHeader {
            window: WindowIndex(3),
            ..good.clone()
        },
        FrameHeader {
            window: WindowIndex(18),
            ..good.clone()
        },
        FrameHeader {
            region: RegionId(1),
            ..good.clone()
        },
        FrameHeader {
            raw_len: u32::MAX,
            ..good.clone()
        },
        FrameHeader {
            payload_len: u32::MAX,
            ..good.clone()
        },
        FrameHeader {
            present: WindowBits::FULL,
            ..good.clone()
        },
        FrameHeader {
            zero: WindowBits::FULL,
            ..good.clone()
        },
        FrameHeader {
            version: 9,
            ..good.clone()
        },
    ];
    for header in wrong {
        let mut stream = pair.source.open_uni().await.unwrap();
        let kind = StreamKind::Lane { lane: Lane(2) };
        stream
            .write_all(&StreamHeader { kind, ..HEADER }.encode())
            .await
            .unwrap();
        stream.write_all(&header.encode()).await.unwrap();
        stream.write_all(&payload).await.unwrap();
        let incoming = lanes::accept(&pair.destination, "alpha").await.unwrap();
        let mut lane = incoming.into_lane(Arc::from([REGION]), 16).unwrap();
        let error = lane.next().await.unwrap_err();
        assert!(
            matches!(error, LaneError::Frame { .. }),
            "{header:?}: {error}"
        );
        assert_eq!(error.to_wire().unwrap().code, ErrorCode::BadFrame);
        assert_eq!(lane.last(), FrameSeq(0));
    }
}

#[tokio::test]
async fn a_lane_that_ends_within_a_frame_is_told_from_one_that_ends() {
    let pair = pair().await;
    let (header, payload) = frame(1, 0, 5);
    let whole = [header.encode().as_slice(), &payload].concat();
    for len in [0, 1, FrameHeader::ENCODED_LEN, whole.len() - 1, whole.len()] {
        let mut stream = pair.source.open_uni().await.unwrap();
        stream.write_all(&HEADER.encode()).await.unwrap();
        stream.write_all(&whole[..len]).await.unwrap();
        stream.finish().unwrap();
        let incoming = lanes::accept(&pair.destination, "alpha").await.unwrap();
        let mut lane = incoming.into_lane(Arc::from([REGION]), 16).unwrap();
        match lane.next().await {
            Ok(None) => assert_eq!(len, 0),
            Ok(Some(_)) => assert_eq!(len, whole.len()),
            Err(error) => {
                assert!(
                    matches!(error, LaneError::Truncated { .. }),
                    "{len}: {error}"
                );
                assert!(len > 0 && len < whole.len());
            }
        }
    }
    // A header that never becomes whole.
    let mut stream = pair.source.open_uni().await.unwrap();
    stream.write_all(&HEADER.encode()[..5]).await.unwrap();
    stream.finish().unwrap();
    let error = lanes::accept(&pair.destination, "alpha").await.unwrap_err();
    assert!(matches!(error, LaneError::Truncated { .. }), "{error}");
}

#[tokio::test]
async fn the_device_state_is_exactly_what_was_announced() {
    let pair = pair().await;
    let state = Bytes::from(
        (0..300_000u32)
            .map(|at| (at % 251) as u8)
            .collect::<Vec<_>>(),
    );
    let digest = digest::plain(&state);
    let len = state.len() as u64;
    for (len, digest, fits) in [
        (len, digest, true),
        (len - 1, digest, false),
        (len + 1, digest, false),
        (len, digest ^ 1, false),
        (u64::MAX, digest, false),
    ] {
        lanes::send_device_state(&pair.source, HEADER, Attempt(3), state.clone(), "beta")
            .await
            .unwrap();
        let incoming = lanes::accept(&pair.destination, "alpha").await.unwrap();
        assert_eq!(incoming.device_state_of(), Some(Attempt(3)));
        match incoming.read_device_state(len, digest).await {
            Ok(read) => assert!(fits && read == state),
            Err(error) => {
                assert!(!fits, "{error}");
                assert!(matches!(error, LaneError::DeviceState { .. }), "{error}");
            }
        }
    }
}

#[tokio::test]
async fn receiving_control_messages_is_cancel_safe() {
    let pair = pair().await;
    let (mut raw, _) = pair.source.open_bi().await.unwrap();
    let message = ToDestination::OpenAttempt {
        attempt: Attempt(9),
    };
    let mut bytes = vmferry_proto::wire::encode(&message).unwrap();
    bytes.extend(vmferry_proto::wire::encode(&ToDestination::Goodbye).unwrap());
    raw.write_all(&bytes[..1]).await.unwrap();
    let (_answer, mut recv) = control::accept(&pair.destination, "alpha").await.unwrap();
    let writing = tokio::spawn(async move {
        for byte in &bytes[1..] {
            raw.write_all(&[*byte]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        raw
    });
    let mut got = Vec::new();
    while got.len() < 2 {
        // Dropped again and again in the middle of a message.
        if let Ok(message) = tokio::time::timeout(Duration::from_micros(500), recv.recv()).await {
            got.push(message.unwrap().unwrap());
        }
    }
    assert_eq!(got, [message, ToDestination::Goodbye]);
    drop(writing.await.unwrap());
}

#[tokio::test]
async fn garbage_on_the_control_stream_is_a_coded_error() {
    let pair = pair().await;
    for garbage in [
        [0xff; 64].as_slice(),
        &[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
        &[0, 0, 0, 0],
        &[9, 0],
    ] {
        let (mut raw, _) = pair.source.open_bi().await.unwrap();
        raw.write_all(garbage).await.unwrap();
        raw.finish().unwrap();
        let (_answer, mut recv) = control::accept(&pair.destination, "alpha").await.unwrap();
        let error = recv.recv().await.unwrap_err();
        assert_eq!(
            error.to_wire().unwrap().code,
            ErrorCode::ProtocolViolation,
            "{error}"
        );
        assert!(!error.is_lost_link());
        assert!(
            recv.recv().await.is_err(),
            "what follows a broken message is not looked at"
        );
    }
}

#[tokio::test]
async fn a_coded_close_is_read_by_the_peer() {
    let pair = pair().await;
    let (_send, mut recv) = control::open(&pair.source, "beta").await.unwrap();
    let long = WireError::new(ErrorCode::BadFrame, "ä".repeat(2000));
    control::close(&pair.destination, &long);
    match recv.recv().await.unwrap_err() {
        ControlError::Link(LinkError::ClosedByPeer { code, reason, .. }) => {
            assert_eq!(code, u64::from(ErrorCode::BadFrame.number()));
            assert!(reason.starts_with("ää"), "{reason}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn loopback_gets_large_packets() {
    let pair = pair().await;
    let mut lane = LaneSender::open(&pair.source, HEADER, Lane(0), "beta")
        .await
        .unwrap();
    let incoming = lanes::accept(&pair.destination, "alpha").await.unwrap();
    let mut receiver = incoming.into_lane(Arc::from([REGION]), 16).unwrap();
    let mut seq = 0;
    // Discovery goes on with the traffic; the test runner bounds the time.
    while pair.source.stats().path.current_mtu < 6300 {
        seq += 1;
        let (header, payload) = frame(seq, 0, 5);
        lane.send(&header, payload).await.unwrap();
        receiver.next().await.unwrap().unwrap();
    }
    assert!(pair.source.stats().path.current_mtu <= endpoint::MAX_MTU);
}

/// A killed agent says no farewell; the next one at its address does, to the first packet that comes.
#[tokio::test]
async fn the_peer_of_a_killed_endpoint_hears_of_it_from_the_next_one() {
    let pki = Pki::new();
    let alpha = pki.identity("alpha", &[]);
    let beta = pki.identity("beta", &["127.0.0.1"]);
    let doomed = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (endpoint, to, accepting) = {
        let _inside = doomed.enter();
        serve(&beta)
    };
    let (_endpoint, connection) = endpoint::connect(&to, &alpha, &tuning()).await.unwrap();
    let accepted = accepting.await.unwrap().unwrap();
    let address = endpoint.local_addr().unwrap();
    // Its tasks end where they stand, as those of a killed process.
    doomed.shutdown_background();
    drop((endpoint, accepted));
    let _next = loop {
        match endpoint::bind_server(address, &beta, &tuning()) {
            Ok(next) => break next,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    let mut stream = connection.open_uni().await.unwrap();
    stream.write_all(b"are you there?").await.unwrap();
    assert_eq!(connection.closed().await, quinn::ConnectionError::Reset);
}
