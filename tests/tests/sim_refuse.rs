//! What is refused before a byte is copied: certificates that are not right, guests that do not fit, names that are taken.
//! Each refusal says why on both sides and leaves the guest alone.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use time::{Duration as Days, OffsetDateTime};
use vmferry_certs::{HostRequest, Validity};
use vmferry_tests::harness::process::Finished;
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Hosts, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(60);

fn small() -> SimSpec {
    SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        ..SimSpec::small("web")
    }
}

/// Refused with `code`; the source says all of `here`, the destination's log all of `there`.
fn expect_refused(
    stage: &Stage,
    guest: &SimGuest,
    done: &Finished,
    code: &str,
    here: &[&str],
    there: &[&str],
) {
    let log = stage.agent_log();
    println!("--- alpha says\n{}\n--- beta says\n{log}", done.stderr);
    stage.expect_code(done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], code, "{report}");
    let detail = report["error"]["detail"].as_str().unwrap();
    for words in here {
        assert!(detail.contains(words), "{words:?} is not in {detail:?}");
    }
    let said = soon(|| {
        let log = stage.agent_log();
        there.iter().all(|words| log.contains(words))
    });
    assert!(said, "{there:?} are not in\n{}", stage.agent_log());
    assert!(!stage.agent_log().contains("panicked"));
    stage.expect_stayed(guest);
}

fn host(name: &str, addresses: &[&str], validity: Validity) -> HostRequest {
    HostRequest {
        name: name.to_owned(),
        addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
        validity,
    }
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let others = Hosts::new(Programs::played_by(PROGRAMS.as_ref())).unwrap();
    let stranger = others.host("alpha").unwrap();
    // All of the stranger's: it does not trust beta either, and says so.
    stage
        .alpha
        .take_identity(&stranger.path("identity"))
        .unwrap();
    let done = stage.migrate(&guest, &[]);
    expect_refused(
        &stage,
        &guest,
        &done,
        "link-lost",
        &["certificate"],
        &["connection refused"],
    );
    // Only the certificate is the stranger's: beta does not trust it.
    let ca = stage.hosts.dir().join("ca/ca.pem");
    fs::copy(ca, stage.alpha.path("identity/ca.pem")).unwrap();
    let done = stage.migrate(&guest, &[]);
    println!("--- alpha says\n{}", done.stderr);
    assert_ne!(done.code(), 0);
    assert!(done.stderr.contains("certificate"), "{}", done.stderr);
    stage.expect_stayed(&guest);
}

#[test]
fn an_expired_certificate_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let now = OffsetDateTime::now_utc();
    let past = Validity {
        not_before: now - Days::days(9),
        not_after: now - Days::days(2),
    };
    let expired: PathBuf = stage.hosts.dir().join("expired");
    let request = host("alpha", &["127.0.0.1"], past);
    stage.hosts.authority().issue(&request, &expired).unwrap();
    stage.alpha.take_identity(&expired).unwrap();
    let done = stage.migrate(&guest, &[]);
    println!(
        "--- alpha says\n{}\n--- beta says\n{}",
        done.stderr,
        stage.agent_log()
    );
    assert!(matches!(done.code(), 1 | 2), "{}", done.code());
    assert!(done.stderr.contains("expired"), "{}", done.stderr);
    stage.expect_stayed(&guest);
}

#[test]
fn a_destination_that_is_not_the_one_asked_for_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let narrow: PathBuf = stage.hosts.dir().join("narrow");
    let request = host("beta", &["127.0.0.1"], Validity::days(365).unwrap());
    stage.hosts.authority().issue(&request, &narrow).unwrap();
    stage.beta.take_identity(&narrow).unwrap();
    // A second agent of beta's host, with a state of its own, knows only the new identity.
    let agent = stage
        .hosts
        .host("gamma")
        .and_then(|gamma| {
            gamma.take_identity(&narrow)?;
            gamma.serve(&[])
        })
        .unwrap();
    let to = format!("localhost:{}", agent.port);
    let running = stage.alpha.start_migrate_to("web", &to, &[]).unwrap();
    let done = running.wait(END).unwrap();
    println!(
        "--- alpha says\n{}\n--- the other says\n{}",
        done.stderr,
        agent.process.stderr()
    );
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    let detail = report["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("localhost"), "{detail}");
    assert!(soon(|| agent
        .process
        .stderr()
        .contains("connection refused")));
    stage.expect_stayed(&guest);
}

#[test]
fn a_certificate_for_the_other_role_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let ca = stage.hosts.dir().join("ca");
    let read = |name: &str| fs::read_to_string(ca.join(name)).unwrap();
    let key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).unwrap();
    let mut params =
        CertificateParams::new(vec!["alpha".to_owned(), "127.0.0.1".to_owned()]).unwrap();
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let own = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&own, &issuer).unwrap();
    fs::write(stage.alpha.path("identity/cert.pem"), certificate.pem()).unwrap();
    fs::write(stage.alpha.path("identity/key.pem"), own.serialize_pem()).unwrap();
    let done = stage.migrate(&guest, &[]);
    println!(
        "--- alpha says\n{}\n--- beta says\n{}",
        done.stderr,
        stage.agent_log()
    );
    assert!(matches!(done.code(), 1 | 2), "{}", done.code());
    assert!(done.stderr.contains("certificate"), "{}", done.stderr);
    stage.expect_stayed(&guest);
}

#[test]
fn only_those_in_from_may_send_a_guest() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    for from in [&["gamma", "delta"][..], &[]] {
        guest.expect_at(&stage.beta, from).unwrap();
        let done = stage.migrate(&guest, &[]);
        let allowed = from.join(", ");
        let words = ["alpha may not send guest web", allowed.as_str()];
        expect_refused(&stage, &guest, &done, "not-authorized", &words, &words);
    }
}

#[test]
fn a_guest_that_the_destination_does_not_know_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = SimGuest::start(small(), &stage.alpha).unwrap();
    let done = stage.migrate(&guest, &[]);
    let words = ["no guest file for web"];
    expect_refused(&stage, &guest, &done, "unknown-guest", &words, &words);
}

#[test]
fn each_difference_of_the_guests_is_named() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let other_ram = SimSpec {
        ram: 32 << 20,
        ..small()
    };
    let other_disk = SimSpec {
        disk: 8 << 20,
        ..small()
    };
    let no_disk = SimSpec { disk: 0, ..small() };
    for (spec, words) in [
        (other_ram, &["16 MiB", "32 MiB"][..]),
        (other_disk, &["4 MiB", "8 MiB"]),
        (no_disk, &["disk"]),
    ] {
        guest.expect_as(&spec, &stage.beta, &["alpha"]).unwrap();
        // What an earlier launch made of the image is not what this one would.
        let _ = fs::remove_file(guest.disk_on(&stage.beta));
        let done = stage.migrate(&guest, &[]);
        expect_refused(&stage, &guest, &done, "incompatible", words, words);
    }
}

#[test]
fn a_guest_whose_hypervisor_cannot_be_launched_is_refused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let path = stage.beta.path("guests/web.toml");
    let mut table: toml::Table = fs::read_to_string(&path).unwrap().parse().unwrap();
    table.insert("launch".into(), vec!["/no/such/hypervisor"].into());
    fs::write(&path, table.to_string()).unwrap();
    let done = stage.migrate(&guest, &[]);
    expect_refused(
        &stage,
        &guest,
        &done,
        "hypervisor",
        &["/no/such/hypervisor"],
        &["/no/such/hypervisor"],
    );
    table.insert(
        "launch".into(),
        vec!["/bin/sh", "-c", "echo no space for it >&2; exit 7"].into(),
    );
    fs::write(&path, table.to_string()).unwrap();
    let done = stage.migrate(&guest, &[]);
    expect_refused(
        &stage,
        &guest,
        &done,
        "hypervisor",
        &["7", "no space for it"],
        &["no space for it"],
    );
}

#[test]
fn a_name_that_is_being_received_is_busy_for_others() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let gamma = stage.hosts.host("gamma").unwrap();
    let other = SimGuest::start(small(), &gamma).unwrap();
    guest.expect_at(&stage.beta, &["alpha", "gamma"]).unwrap();
    let manual = ["--cutover", "manual", "--max-downtime", "5s"];
    let running = stage.begin(&guest, &manual);
    let converged = || {
        let status = stage
            .alpha
            .ask(Role::Source, "status", "web", &["--json"])
            .ok()?;
        (status.json().ok()?["phase"] == "converged").then_some(())
    };
    assert!(soon(|| converged().is_some()));
    let done = gamma.migrate("web", stage.agent.port, &[]).unwrap();
    println!("--- gamma says\n{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "guest-busy");
    let detail = report["error"]["detail"].as_str().unwrap();
    assert!(detail.contains("from alpha holds guest web"), "{detail}");
    other.wait_for_beats(20).unwrap();
    other.verify_on(&gamma).unwrap();
    // A second command for the same guest on the same host is told so at once.
    let twice = stage.migrate(&guest, &[]);
    println!("--- alpha says\n{}", twice.stderr);
    stage.expect_code(&twice, 1);
    assert_eq!(twice.json().unwrap()["error"]["code"], "guest-busy");
    // The first one is not disturbed by any of it.
    let cutover = stage
        .alpha
        .ask(Role::Source, "cutover", "web", &["--json"])
        .unwrap();
    assert_eq!(cutover.code(), 0, "{}{}", cutover.stdout, cutover.stderr);
    assert_eq!(cutover.json().unwrap()["outcome"], "committed");
    let done = running.wait(END).unwrap();
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}
