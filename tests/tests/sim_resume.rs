//! Agents that are killed in the copy and come back: the same command goes on with what is left, and sends nothing again that was
//! applied and is still clean.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use vmferry_simguest::protocol::State;
use vmferry_tests::harness::doubt::write_owned;
use vmferry_tests::harness::process::{Finished, Running, descriptors};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(180);
const VERIFY: [&str; 4] = ["--max-downtime", "20s", "--verify", "full"];
/// Slow enough that a test can act in the middle of the copy; one lane, so that little is on its way at any moment.
const SLOW: [&str; 6] = [
    "--max-bandwidth",
    "8MiB/s",
    "--compress",
    "off",
    "--lanes",
    "1",
];
/// What one lane may hold and send ahead of what is applied: its queue of frames, and what the transport takes.
const ON_ITS_WAY: u64 = 12 << 20;

const RAM: u64 = 64 << 20;
const DISK: u64 = 32 << 20;

/// A guest that stands at its work: whatever is sent twice is sent twice for nothing.
fn idle() -> SimSpec {
    SimSpec {
        ram: RAM,
        disk: DISK,
        dirty_rate: 0,
        disk_rate: 0,
        content: "random",
        fill: 100,
        ..SimSpec::small("web")
    }
}

fn busy() -> SimSpec {
    SimSpec {
        dirty_rate: 2 << 20,
        working_set: 2 << 20,
        disk_rate: 1 << 20,
        ..idle()
    }
}

fn slow_and_verified() -> Vec<&'static str> {
    [&SLOW[..], &VERIFY].concat()
}

fn bytes_done(stage: &Stage) -> Option<u64> {
    let status = stage.alpha.ask(Role::Source, "status", "web", &["--json"]);
    status.ok()?.json().ok()?["bytes_done"].as_u64()
}

/// Until so many bytes are sent; returns how many it then were.
fn wait_for_bytes(stage: &Stage, running: &mut Running, bytes: u64) -> u64 {
    let seen = running.wait_for("the middle of the copy", END, |_, _| {
        bytes_done(stage).filter(|done| *done > bytes)
    });
    seen.unwrap()
}

fn kill(running: Running) {
    running.signal(Signal::KILL).unwrap();
    running.wait(END).unwrap();
}

/// Kills the destination's agent and starts another one on the same port.
fn replace_destination(stage: &mut Stage) {
    let port = stage.agent.port;
    stage.agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| stage.agent.process.has_ended().unwrap()));
    stage.agent = stage.beta.serve_at(port, &[]).unwrap();
}

fn file(stage: &Stage, name: &str) -> PathBuf {
    stage.alpha.path(&format!("state/run/{name}"))
}

fn report(stage: &Stage, done: &Finished) -> Value {
    println!("{}", done.stderr);
    stage.expect_code(done, 0);
    let report = done.json().unwrap();
    assert_eq!(report["verified"]["mode"], "full", "{report}");
    report
}

/// Prints what went over the wire twice, of `sent_before` bytes that an agent before this one had sent.
fn resent(what: &str, report: &Value) -> u64 {
    let again = report["resent_blocks"].as_u64().unwrap() * 4096;
    let content = RAM + DISK;
    println!(
        "{what}: {again} of {content} bytes sent again ({:.3}); {} accounted for by this agent",
        again as f64 / content as f64,
        report["raw_bytes"]
    );
    again
}

fn moved(stage: &Stage, guest: &SimGuest) {
    stage.expect_moved(guest);
    for left in ["web.source.ledger", "web.source.tracking"] {
        assert!(!file(stage, left).exists(), "{left} is left");
    }
}

fn source_killed_at(bytes: u64) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    let mut running = stage.begin(&guest, &slow_and_verified());
    let done = wait_for_bytes(&stage, &mut running, bytes);
    kill(running);
    guest.wait_for_beats(20).unwrap();
    assert!(
        !descriptors(guest.first_pid()).is_empty(),
        "the guest is gone"
    );
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains("going on with what it left"));
    let again = resent(&format!("source killed after {done} bytes"), &report);
    assert!(again <= ON_ITS_WAY, "{again} bytes were sent again");
    let raw = report["raw_bytes"].as_u64().unwrap();
    assert!(raw <= RAM + DISK - done + ON_ITS_WAY, "{raw}");
    moved(&stage, &guest);
}

#[test]
fn a_source_agent_that_is_killed_early_is_gone_on_with() {
    source_killed_at(4 << 20);
}

#[test]
fn a_source_agent_that_is_killed_late_is_gone_on_with() {
    source_killed_at(60 << 20);
}

#[test]
fn a_source_agent_that_is_killed_again_and_again_is_gone_on_with() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(busy());
    for step in 1..4 {
        let mut running = stage.begin(&guest, &slow_and_verified());
        wait_for_bytes(&stage, &mut running, step * (20 << 20));
        kill(running);
    }
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains("going on with what it left"));
    resent("killed three times, busy guest", &report);
    moved(&stage, &guest);
}

#[test]
fn a_source_agent_that_is_killed_while_it_waits_for_the_trigger_is_gone_on_with() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(busy());
    let manual = [&["--cutover", "manual"][..], &VERIFY].concat();
    let mut running = stage.begin(&guest, &manual);
    let seen = running.wait_for("converged", END, |_, _| {
        let status = stage
            .alpha
            .ask(Role::Source, "status", "web", &["--json"])
            .ok()?;
        (status.json().ok()?["phase"] == "converged").then_some(())
    });
    seen.unwrap();
    kill(running);
    guest.wait_for_beats(20).unwrap();
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains("going on with what it left"));
    let raw = report["raw_bytes"].as_u64().unwrap();
    println!("{raw} of {} bytes accounted for again", RAM + DISK);
    assert!(raw < (RAM + DISK) / 2, "{raw}");
    moved(&stage, &guest);
}

#[test]
fn recover_removes_the_ledger_with_every_other_trace() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(busy());
    let before = descriptors(guest.first_pid());
    let mut running = stage.begin(&guest, &SLOW);
    wait_for_bytes(&stage, &mut running, 24 << 20);
    kill(running);
    assert!(file(&stage, "web.source.ledger").exists());
    let asked = stage
        .alpha
        .ask(Role::Source, "recover", "web", &["--json"])
        .unwrap();
    assert_eq!(asked.json().unwrap()["guest_now"], "runs-at-source");
    assert!(soon(|| descriptors(guest.first_pid()) == before));
    for left in ["web.source.ledger", "web.source.tracking"] {
        assert!(!file(&stage, left).exists(), "{left} is left");
    }
    stage.expect_stayed(&guest);
}

/// What was left is of no use for the reason that `spoil` makes: it is named, and both sides compare what they have.
fn is_compared(why: &str, spoil: impl FnOnce(&Stage)) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    let mut running = stage.begin(&guest, &slow_and_verified());
    let done = wait_for_bytes(&stage, &mut running, 40 << 20);
    kill(running);
    spoil(&stage);
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains(why), "{why:?} was not said");
    expect_only_the_rest(why, &report, done);
    moved(&stage, &guest);
}

/// What an agent before this one had sent up to `done` was compared and not sent again.
fn expect_only_the_rest(what: &str, report: &Value, done: u64) {
    let (kept, raw) = (&report["kept_bytes"], &report["raw_bytes"]);
    let (kept, raw) = (kept.as_u64().unwrap(), raw.as_u64().unwrap());
    let content = RAM + DISK;
    println!(
        "{what}: {done} of {content} bytes were sent before, {kept} found equal ({:.3}), {raw} sent",
        kept as f64 / done as f64
    );
    assert!(kept + ON_ITS_WAY >= done, "{kept} of {done} were kept");
    assert!(kept + raw <= content + (2 << 20), "{kept} + {raw}");
}

#[test]
fn a_lost_ledger_is_done_without() {
    is_compared("No such file", |stage| {
        std::fs::remove_file(file(stage, "web.source.ledger")).unwrap();
    });
}

#[test]
fn a_lost_record_is_done_without() {
    is_compared("it left no ledger", |stage| {
        std::fs::remove_file(file(stage, "web.source.tracking")).unwrap();
    });
}

#[test]
fn a_foreign_ledger_is_not_believed() {
    is_compared("no ledger of this version", |stage| {
        let path = file(stage, "web.source.ledger");
        let len = std::fs::metadata(&path).unwrap().len();
        std::fs::write(&path, vec![0x55; usize::try_from(len).unwrap()]).unwrap();
    });
}

#[test]
fn a_torn_record_is_not_believed() {
    is_compared("is damaged", |stage| {
        let path = file(stage, "web.source.tracking");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
}

/// The guest writes while it is compared, and before: what differs is sent.
#[test]
fn a_busy_guest_whose_ledger_is_lost_is_compared() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(busy());
    let mut running = stage.begin(&guest, &slow_and_verified());
    let done = wait_for_bytes(&stage, &mut running, 40 << 20);
    kill(running);
    std::fs::remove_file(file(&stage, "web.source.ledger")).unwrap();
    guest.wait_for_beats(20).unwrap();
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    let (kept, raw) = (&report["kept_bytes"], &report["raw_bytes"]);
    println!("busy guest: {done} bytes were sent before, {kept} found equal, {raw} sent");
    let (kept, raw) = (kept.as_u64().unwrap(), raw.as_u64().unwrap());
    // What it writes meanwhile lies in a few windows.
    assert!(kept + ON_ITS_WAY + (12 << 20) >= done, "{report}");
    assert!(raw < RAM + DISK - kept + (8 << 20), "{report}");
    moved(&stage, &guest);
}

/// Its memory is another one, but for what a guest always has, and its disk is the same.
#[test]
fn a_guest_that_was_booted_again_is_compared_with_the_copy_of_the_one_before() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    let mut running = stage.begin(&guest, &slow_and_verified());
    let done = wait_for_bytes(&stage, &mut running, 40 << 20);
    kill(running);
    vmferry_tests::harness::process::kill(guest.first_pid());
    // The copy writes to this very file when it runs.
    std::fs::write(stage.alpha.path("web.beats"), "").unwrap();
    let again = stage.guest(idle());
    let finished = stage.migrate(&again, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains("comparing with"), "{report}");
    let (kept, raw) = (&report["kept_bytes"], &report["raw_bytes"]);
    println!("booted again: {done} bytes were sent before, {kept} found equal, {raw} sent");
    let (kept, raw) = (kept.as_u64().unwrap(), raw.as_u64().unwrap());
    assert!(kept + raw >= RAM + DISK, "{report}");
    moved(&stage, &again);
}

#[test]
fn both_agents_that_are_killed_and_a_lost_ledger_are_compared() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    let mut running = stage.begin(&guest, &slow_and_verified());
    let done = wait_for_bytes(&stage, &mut running, 40 << 20);
    kill(running);
    replace_destination(&mut stage);
    std::fs::remove_file(file(&stage, "web.source.ledger")).unwrap();
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    expect_only_the_rest("both killed, ledger lost", &report, done);
    moved(&stage, &guest);
}

#[test]
fn both_agents_that_are_killed_are_gone_on_with() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(busy());
    let mut running = stage.begin(&guest, &slow_and_verified());
    wait_for_bytes(&stage, &mut running, 40 << 20);
    stage.agent.process.signal(Signal::KILL).unwrap();
    kill(running);
    replace_destination(&mut stage);
    let finished = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &finished);
    assert!(finished.stderr.contains("going on with what it left"));
    resent("both killed, busy guest", &report);
    moved(&stage, &guest);
}

#[test]
fn a_destination_agent_that_is_killed_is_gone_on_with() {
    for bytes in [8 << 20, 60 << 20] {
        let mut stage = Stage::set(PROGRAMS);
        let guest = stage.guest(idle());
        let mut running = stage.begin(&guest, &slow_and_verified());
        wait_for_bytes(&stage, &mut running, bytes);
        replace_destination(&mut stage);
        let done = running.wait(END).unwrap();
        let report = report(&stage, &done);
        assert!(report["sessions"].as_u64().unwrap() >= 2, "{report}");
        let log = stage.agent_log();
        assert!(log.contains("going on with the copy"), "{log}");
        let again = resent("destination agent killed", &report);
        assert!(again <= ON_ITS_WAY, "{again} bytes were sent again");
        moved(&stage, &guest);
    }
}

/// The guest's process at the destination.
fn copies(stage: &Stage, guest: &SimGuest) -> Vec<u32> {
    let mark = stage.beta.path(&format!("{}.sock", guest.name()));
    vmferry_tests::harness::process::with_words(&mark.display().to_string())
}

#[test]
fn a_destination_that_lost_agent_and_guest_keeps_what_its_disk_has() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    let mut running = stage.begin(&guest, &slow_and_verified());
    // Memory goes first: by now some of the disk is there, and flushed a second later.
    wait_for_bytes(&stage, &mut running, RAM + (4 << 20));
    let port = stage.agent.port;
    stage.agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| stage.agent.process.has_ended().unwrap()));
    copies(&stage, &guest)
        .into_iter()
        .for_each(vmferry_tests::harness::process::kill);
    stage.agent = stage.beta.serve_at(port, &[]).unwrap();
    let done = running.wait(END).unwrap();
    let report = report(&stage, &done);
    let again = resent("destination agent and guest killed", &report);
    assert!(again <= RAM + DISK / 2, "{again} bytes were sent again");
    moved(&stage, &guest);
}

/// Brings a migration to where the destination is prepared, and kills both agents there.
fn killed_when_prepared(stage: &mut Stage, guest: &SimGuest) {
    let gate = stage.alpha.gate("load").unwrap();
    let mut running = stage.begin(guest, &VERIFY);
    gate.wait_reached(&mut running).unwrap();
    let loaded = soon(|| {
        guest
            .client(&stage.beta)
            .and_then(|mut client| Ok(client.status()?))
            .is_ok_and(|status| status.state == State::Paused)
    });
    assert!(loaded, "{}", stage.agent_log());
    kill(running);
    stage.agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| stage.agent.process.has_ended().unwrap()));
}

#[test]
fn a_destination_agent_that_dies_before_the_start_starts_the_guest_when_it_is_back() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    killed_when_prepared(&mut stage, &guest);
    write_owned(&stage.beta, guest.name());
    // The source's copy is fenced: it is the destination's half that is looked at.
    guest.end_on(&stage.alpha);
    stage.agent = stage.beta.serve_at(stage.agent.port, &[]).unwrap();
    let runs = soon(|| {
        guest
            .client(&stage.beta)
            .and_then(|mut client| Ok(client.status()?))
            .is_ok_and(|status| status.state == State::Running)
    });
    assert!(runs, "{}", stage.agent_log());
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&stage.beta).unwrap();
    let owner = stage.beta.ask(Role::Destination, "owner", "web", &[]);
    assert_eq!(owner.unwrap().code(), 0);
}

#[test]
fn a_destination_agent_that_finds_its_guest_gone_says_so() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    killed_when_prepared(&mut stage, &guest);
    write_owned(&stage.beta, guest.name());
    copies(&stage, &guest)
        .into_iter()
        .for_each(vmferry_tests::harness::process::kill);
    stage.agent = stage.beta.serve_at(stage.agent.port, &[]).unwrap();
    let said = soon(|| {
        stage
            .agent_log()
            .contains("an ordinary crash of that guest, whose images are here")
    });
    assert!(said, "{}", stage.agent_log());
}

#[test]
fn a_copy_that_was_loaded_is_not_filled_on() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(idle());
    killed_when_prepared(&mut stage, &guest);
    stage.agent = stage.beta.serve_at(stage.agent.port, &[]).unwrap();
    std::fs::remove_dir_all(stage.alpha.path("hooks")).unwrap();
    std::fs::create_dir(stage.alpha.path("hooks")).unwrap();
    // The attempt is rolled back, and the copy goes on with a fresh process there.
    let done = stage.migrate(&guest, &VERIFY);
    let report = report(&stage, &done);
    let log = stage.agent_log();
    assert!(log.contains("cannot be filled on"), "{log}");
    let again = resent("both killed when prepared", &report);
    assert!(again <= RAM + ON_ITS_WAY, "{again} bytes were sent again");
    moved(&stage, &guest);
}
