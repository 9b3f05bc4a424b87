//! Certificates that are not right, shown to the real agents: none, of another CA, expired, for the other role, of another name.
//! Each is judged by the agent that it is shown to, says why on both sides, and leaves the guest alone.
//!
//! An agent refuses an identity of its own that the other side would refuse, before it connects. So that the other side has to
//! judge it too, these tests speak for the bad host themselves, through the library and without that check.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use rcgen::ExtendedKeyUsagePurpose::{self, ClientAuth, ServerAuth};
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use time::{Duration as Days, OffsetDateTime};
use tokio::runtime::Runtime;
use vmferry_certs::{HostRequest, Validity};
use vmferry_common::causes::chain;
use vmferry_common::control::{self, ControlError};
use vmferry_common::endpoint::{self, HostPort, TransportTuning};
use vmferry_common::identity::{ALPN, Identity};
use vmferry_common::link::LinkError;
use vmferry_proto::message::ToDestination;
use vmferry_tests::harness::process::Finished;
use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Hosts, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(60);

fn guest(stage: &Stage) -> SimGuest {
    stage.guest(SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        ..SimSpec::small("web")
    })
}

fn past() -> Validity {
    let now = OffsetDateTime::now_utc();
    Validity {
        not_before: now - Days::days(9),
        not_after: now - Days::days(2),
    }
}

/// An identity `name` of the stage's CA.
fn issue(stage: &Stage, name: &str, addresses: &[&str], validity: Validity) -> PathBuf {
    let folder = stage.hosts.dir().join(format!("issued-{name}"));
    let request = HostRequest {
        name: name.to_owned(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        validity,
    };
    stage.hosts.authority().issue(&request, &folder).unwrap();
    folder
}

/// An identity of the stage's CA whose certificate allows one role only.
fn one_role(stage: &Stage, name: &str, role: ExtendedKeyUsagePurpose) -> PathBuf {
    let folder = issue(stage, name, &[], Validity::days(5).unwrap());
    let ca = stage.hosts.dir().join("ca");
    let read = |name: &str| fs::read_to_string(ca.join(name)).unwrap();
    let issuer =
        Issuer::from_ca_cert_pem(&read("ca.pem"), KeyPair::from_pem(&read("ca.key")).unwrap())
            .unwrap();
    let names = vec![name.to_owned(), "127.0.0.1".to_owned()];
    let mut params = CertificateParams::new(names).unwrap();
    params.extended_key_usages = vec![role];
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    fs::write(folder.join("cert.pem"), certificate.pem()).unwrap();
    fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
    folder
}

/// An identity `name` of another CA, which trusts the stage's one besides its own.
fn stranger(stage: &Stage, name: &str) -> (Hosts, PathBuf) {
    let others = Hosts::new(Programs::played_by(PROGRAMS.as_ref())).unwrap();
    let folder = others.host(name).unwrap().path("identity");
    let own = fs::read_to_string(folder.join("ca.pem")).unwrap();
    let trusted = fs::read_to_string(stage.hosts.dir().join("ca/ca.pem")).unwrap();
    fs::write(folder.join("ca.pem"), own + &trusted).unwrap();
    (others, folder)
}

fn has(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
}

/// The agent of beta says all of `words`; nothing else happened.
fn beta_says(stage: &Stage, guest: &SimGuest, words: &[&str]) {
    let said = soon(|| {
        let log = stage.agent_log();
        words.iter().all(|word| log.contains(word))
    });
    println!("--- beta says\n{}", stage.agent_log());
    assert!(said, "{words:?} are not in\n{}", stage.agent_log());
    assert!(!stage.agent_log().contains("panicked"));
    stage.expect_stayed(guest);
}

/// What a host that shows `identity` hears of the real destination agent: a refusal may come late, with the first answer.
fn knock(port: u16, identity: &Path) -> String {
    let identity = Identity::read(identity).unwrap();
    Runtime::new().unwrap().block_on(async {
        let to: HostPort = format!("127.0.0.1:{port}").parse().unwrap();
        let tuning = TransportTuning::default();
        let (_endpoint, connection) = match endpoint::connect(&to, &identity, &tuning).await {
            Ok(connected) => connected,
            Err(error) => return chain(&error),
        };
        let talk = async {
            let (mut send, mut recv) = control::open(&connection, "beta").await?;
            send.send(&ToDestination::Goodbye).await?;
            recv.recv().await
        };
        let answer: Result<_, ControlError> = talk.await;
        chain(&answer.expect_err("it was let in"))
    })
}

/// The same for a client without any certificate.
fn knock_without(port: u16, ca: &Path) -> String {
    Runtime::new().unwrap().block_on(async {
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(ca).unwrap())
            .unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let to = format!("127.0.0.1:{port}").parse().unwrap();
        let error = match endpoint
            .connect_with(config, to, "127.0.0.1")
            .unwrap()
            .await
        {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        };
        chain(&LinkError::of(&error, "beta"))
    })
}

#[test]
fn the_destination_refuses_a_source_without_a_certificate() {
    let stage = Stage::set(PROGRAMS);
    let guest = guest(&stage);
    let heard = knock_without(stage.agent.port, &stage.hosts.dir().join("ca/ca.pem"));
    println!("--- the source hears\n{heard}");
    has(
        &heard,
        &["refused this host's certificate", "none was shown"],
    );
    beta_says(&stage, &guest, &["connection refused", "it showed none"]);
}

#[test]
fn the_destination_refuses_a_source_of_another_authority() {
    let stage = Stage::set(PROGRAMS);
    let guest = guest(&stage);
    let (_others, folder) = stranger(&stage, "alpha");
    // The real agent: since it trusts both authorities, it finds no fault with itself nor with beta.
    stage.alpha.take_identity(&folder).unwrap();
    let done = stage.migrate(&guest, &[]);
    println!("--- alpha says\n{}", done.stderr);
    stage.expect_code(&done, 1);
    assert_eq!(done.json().unwrap()["error"]["code"], "not-authorized");
    has(
        &done.stderr,
        &["refused this host's certificate", "certificates of one CA"],
    );
    beta_says(&stage, &guest, &["connection refused", "another CA"]);
}

#[test]
fn the_destination_refuses_a_source_that_has_expired() {
    let stage = Stage::set(PROGRAMS);
    let guest = guest(&stage);
    let folder = issue(&stage, "alpha", &["127.0.0.1"], past());
    let heard = knock(stage.agent.port, &folder);
    println!("--- the source hears\n{heard}");
    has(&heard, &["refused this host's certificate", "has expired"]);
    beta_says(&stage, &guest, &["connection refused", "expired"]);
    // The real source agent says so itself, and does not try.
    stage.alpha.take_identity(&folder).unwrap();
    let done = stage.migrate(&guest, &[]);
    stage.expect_code(&done, 2);
    has(&done.stderr, &["has expired", "vmferry-certs issue"]);
}

#[test]
fn the_destination_refuses_a_source_that_may_only_listen() {
    let stage = Stage::set(PROGRAMS);
    let guest = guest(&stage);
    let folder = one_role(&stage, "alpha", ServerAuth);
    let heard = knock(stage.agent.port, &folder);
    println!("--- the source hears\n{heard}");
    has(&heard, &["refused this host's certificate"]);
    beta_says(
        &stage,
        &guest,
        &["connection refused", "not meant for this role"],
    );
    stage.alpha.take_identity(&folder).unwrap();
    let done = stage.migrate(&guest, &[]);
    stage.expect_code(&done, 2);
    has(&done.stderr, &["does not hold together"]);
}

/// Lets the real source agent connect to a host that shows `identity`. Returns how it ended, and what that host hears.
fn call(stage: &Stage, to: &str, identity: &Path) -> (Finished, String) {
    let identity = Identity::read(identity).unwrap();
    let runtime = Runtime::new().unwrap();
    let _within = runtime.enter();
    let tuning = TransportTuning::default();
    let listen = "127.0.0.1:0".parse().unwrap();
    let endpoint = endpoint::bind_server(listen, &identity, &tuning).unwrap();
    let to = format!("{to}:{}", endpoint.local_addr().unwrap().port());
    let accepting = runtime.spawn(async move {
        let incoming = endpoint.accept().await.unwrap();
        match endpoint::accept(incoming, &tuning).await {
            Ok((connection, _)) => LinkError::of(&connection.closed().await, "alpha"),
            Err(error) => error,
        }
    });
    let running = stage.alpha.start_migrate_to("web", &to, &[]).unwrap();
    let done = running.wait(END).unwrap();
    let heard = runtime.block_on(accepting).unwrap();
    println!(
        "--- alpha says\n{}\n--- the destination hears\n{heard}",
        done.stderr
    );
    (done, chain(&heard))
}

/// The source agent refuses a destination that shows `identity`, with `words`; that one hears `hears`.
fn source_refuses(stage: &Stage, to: &str, identity: &Path, words: &[&str], hears: &[&str]) {
    let guest = guest(stage);
    let (done, heard) = call(stage, to, identity);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "not-authorized", "{report}");
    has(report["error"]["detail"].as_str().unwrap(), words);
    has(&done.stderr, words);
    has(&heard, &["refused this host's certificate"]);
    has(&heard, hears);
    stage.expect_stayed(&guest);
}

#[test]
fn the_source_refuses_a_destination_of_another_authority() {
    let stage = Stage::set(PROGRAMS);
    let (_others, folder) = stranger(&stage, "beta");
    let words = ["certificate of 127.0.0.1", "was refused here", "another CA"];
    let hears = ["certificates of one CA"];
    source_refuses(&stage, "127.0.0.1", &folder, &words, &hears);
}

#[test]
fn the_source_refuses_a_destination_that_has_expired() {
    let stage = Stage::set(PROGRAMS);
    let folder = issue(&stage, "beta", &["127.0.0.1"], past());
    let words = ["was refused here", "expired", "vmferry-certs issue"];
    source_refuses(&stage, "127.0.0.1", &folder, &words, &["has expired"]);
}

#[test]
fn the_source_refuses_a_destination_that_may_only_connect() {
    let stage = Stage::set(PROGRAMS);
    let folder = one_role(&stage, "beta", ClientAuth);
    let words = ["was refused here", "not meant for this role"];
    source_refuses(&stage, "127.0.0.1", &folder, &words, &[]);
}

#[test]
fn the_source_refuses_a_destination_that_is_not_the_one_asked_for() {
    let stage = Stage::set(PROGRAMS);
    let valid = Validity::days(5).unwrap();
    let folder = issue(&stage, "beta", &["127.0.0.1"], valid);
    let words = ["was refused here", "localhost", "--address"];
    source_refuses(&stage, "localhost", &folder, &words, &[]);
}

#[test]
fn a_source_that_trusts_another_authority_does_not_take_the_destination_for_its_own() {
    let stage = Stage::set(PROGRAMS);
    let guest = guest(&stage);
    let others = Hosts::new(Programs::played_by(PROGRAMS.as_ref())).unwrap();
    let alien = others.host("alpha").unwrap().path("identity");
    stage.alpha.take_identity(&alien).unwrap();
    let done = stage.migrate(&guest, &[]);
    println!("--- alpha says\n{}", done.stderr);
    stage.expect_code(&done, 1);
    has(&done.stderr, &["was refused here", "another CA"]);
    beta_says(
        &stage,
        &guest,
        &["connection refused", "refused this host's certificate"],
    );
}
