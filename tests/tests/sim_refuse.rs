//! What is refused before a byte is copied: senders that are not listed, guests that do not fit, names that are taken.
//! Each refusal says why on both sides and leaves the guest alone. Certificates have a file of their own.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::time::Duration;

use vmferry_tests::harness::process::Finished;
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{SimGuest, SimSpec, Stage};

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
    // It is over: who asks to recover it is told so.
    let recovered = stage
        .alpha
        .ask(Role::Source, "recover", "web", &[])
        .unwrap();
    println!("{}", recovered.stderr);
    stage.expect_code(&recovered, 2);
    let said = &recovered.stderr;
    assert!(said.contains("nothing to recover"), "{said}");
    assert!(said.contains("alpha may not send guest web"), "{said}");
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
