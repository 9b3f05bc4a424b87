//! Links that break and agents that are killed: the guest runs on exactly one side or waits in doubt and says so, nothing is left
//! behind, and the next migration succeeds.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::process::{Finished, Running, descriptors};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Host, Proxy, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const PATIENT: [&str; 2] = ["--max-downtime", "10s"];
const END: Duration = Duration::from_secs(120);
/// Slow enough that a test can act in the middle of the copy.
const SLOW: [&str; 4] = ["--max-bandwidth", "6MiB/s", "--compress", "off"];

fn small() -> SimSpec {
    SimSpec {
        ram: 32 << 20,
        disk: 8 << 20,
        dirty_rate: 1 << 20,
        working_set: 1 << 20,
        ..SimSpec::small("web")
    }
}

fn status(host: &Host) -> Option<serde_json::Value> {
    let status = host.ask(Role::Source, "status", "web", &["--json"]).ok()?;
    status.json().ok()
}

/// Until so many bytes are accounted for at the destination.
fn wait_for_bytes(stage: &Stage, running: &mut Running, bytes: u64) {
    let seen = running.wait_for("the middle of the copy", END, |_, _| {
        (status(&stage.alpha)?["bytes_done"].as_u64()? > bytes).then_some(())
    });
    seen.unwrap();
}

fn wait_in_copy(stage: &Stage, running: &mut Running) {
    wait_for_bytes(stage, running, 4 << 20);
}

fn owner(host: &Host, role: Role) -> Finished {
    let owner = host.ask(role, "owner", "web", &[]).unwrap();
    println!(
        "{} owner, {}: {} ({})",
        role.name(),
        host.name(),
        owner.stdout.trim_end(),
        owner.code()
    );
    owner
}

fn recover(host: &Host) -> Finished {
    let done = host
        .ask(Role::Source, "recover", "web", &["--json"])
        .unwrap();
    println!("recover: {}{}", done.stdout, done.stderr);
    done
}

/// Ends the source agent as a crash would.
fn kill(running: Running) {
    running.signal(Signal::KILL).unwrap();
    running.wait(END).unwrap();
}

fn runs(guest: &SimGuest, host: &Host) -> bool {
    guest
        .client(host)
        .and_then(|mut client| Ok(client.status()?))
        .is_ok_and(|status| status.state == vmferry_simguest::protocol::State::Running)
}

fn paused(guest: &SimGuest, host: &Host) -> bool {
    guest
        .client(host)
        .and_then(|mut client| Ok(client.status()?))
        .is_ok_and(|status| status.state == vmferry_simguest::protocol::State::Paused)
}

fn expect_traceless(guest: &SimGuest, before: &[String]) {
    let mut now = Vec::new();
    let as_before = soon(|| {
        now = descriptors(guest.first_pid());
        now == before
    });
    assert!(as_before, "descriptors {before:?} became {now:?}");
}

#[test]
fn a_link_that_is_lost_in_the_copy_comes_back() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let mut running = stage
        .alpha
        .start_migrate(
            "web",
            proxy.port(),
            &[&SLOW[..], &PATIENT, &["--lanes", "2"]].concat(),
        )
        .unwrap();
    wait_for_bytes(&stage, &mut running, 24 << 20);
    proxy.cut();
    let noticed = running.wait_for("the loss", END, |_, said| {
        said.contains("connecting again").then_some(())
    });
    noticed.unwrap();
    guest.wait_for_beats(20).unwrap();
    let there = stage
        .beta
        .ask(Role::Destination, "status", "web", &[])
        .unwrap();
    println!("while cut: {}", there.stdout);
    proxy.restore();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert!(report["sessions"].as_u64().unwrap() >= 2, "{report}");
    let (content, raw, again) = (
        small().ram + small().disk,
        report["raw_bytes"].as_u64().unwrap(),
        report["resent_blocks"].as_u64().unwrap() * 4096,
    );
    println!(
        "{content} bytes of guest, {raw} accounted for, {again} of them again ({:.2})",
        again as f64 / content as f64
    );
    // What was applied before the cut was not sent again.
    assert!(again < content / 2, "{again} of {content}");
    let longest = guest.beats().unwrap().longest_within();
    println!("longest time between two beats of one process {longest:?}");
    stage.expect_moved(&guest);
}

#[test]
fn a_destination_agent_that_is_killed_in_the_copy_and_comes_back_is_gone_on_with() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let mut running = stage.begin(&guest, &[&SLOW[..], &PATIENT].concat());
    wait_in_copy(&stage, &mut running);
    let port = stage.agent.port;
    stage.agent.process.signal(Signal::KILL).unwrap();
    guest.wait_for_beats(20).unwrap();
    assert!(soon(|| stage.agent.process.has_ended().unwrap()));
    stage.agent = stage.beta.serve_at(port, &[]).unwrap();
    let done = running.wait(END).unwrap();
    println!("{}\n--- beta\n{}", done.stderr, stage.agent_log());
    if done.code() != 0 {
        stage.expect_code(&done, 1);
        stage.expect_stayed(&guest);
        expect_traceless(&guest, &before);
        let done = stage.migrate(&guest, &PATIENT);
        stage.expect_code(&done, 0);
    }
    stage.expect_moved(&guest);
}

#[test]
fn recover_removes_every_trace_of_a_killed_source_agent() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let mut running = stage.begin(&guest, &SLOW);
    wait_in_copy(&stage, &mut running);
    kill(running);
    guest.wait_for_beats(20).unwrap();
    let done = recover(&stage.alpha);
    assert_eq!(done.json().unwrap()["guest_now"], "runs-at-source");
    expect_traceless(&guest, &before);
    stage.expect_stayed(&guest);
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn recover_resumes_a_guest_that_a_killed_agent_left_paused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let gate = stage.beta.gate("final").unwrap();
    let mut running = stage.begin(&guest, &PATIENT);
    gate.wait_reached(&mut running).unwrap();
    kill(running);
    assert!(paused(&guest, &stage.alpha));
    let said = owner(&stage.alpha, Role::Source);
    assert_eq!(said.code(), 1);
    assert!(
        said.stdout.contains("vmferry-src recover web"),
        "{}",
        said.stdout
    );
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 1);
    gate.remove().unwrap();
    let done = recover(&stage.alpha);
    assert_eq!(done.json().unwrap()["guest_now"], "runs-at-source");
    assert!(runs(&guest, &stage.alpha));
    expect_traceless(&guest, &before);
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    stage.expect_stayed(&guest);
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

/// Brings a migration to where COMMITTING is durable at the source and its `Commit` was lost on the way.
fn commit_into_the_void(stage: &Stage, proxy: &Proxy) -> Running {
    let gate = stage.beta.gate("load").unwrap();
    let mut running = stage
        .alpha
        .start_migrate("web", proxy.port(), &PATIENT)
        .unwrap();
    gate.wait_reached(&mut running).unwrap();
    proxy.cut_there();
    gate.remove().unwrap();
    let seen = running.wait_for("COMMITTING", END, |_, _| {
        let owner = stage
            .alpha
            .ask(Role::Source, "owner", "web", &["--json"])
            .ok()?;
        (owner.json().ok()?["state"] == "COMMITTING").then_some(())
    });
    seen.unwrap();
    running
}

#[test]
fn a_commit_that_was_lost_on_the_way_is_repeated() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let running = commit_into_the_void(&stage, &proxy);
    assert!(paused(&guest, &stage.alpha));
    let said = owner(&stage.alpha, Role::Source);
    assert_eq!(said.code(), 1);
    assert!(said.stdout.contains("in doubt"), "{}", said.stdout);
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 1);
    proxy.restore();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn recover_commits_what_a_killed_agent_left_in_doubt() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    kill(commit_into_the_void(&stage, &proxy));
    assert!(paused(&guest, &stage.alpha));
    let said = owner(&stage.alpha, Role::Source);
    assert_eq!(said.code(), 1);
    assert!(said.stdout.contains("in doubt"), "{}", said.stdout);
    assert!(!runs(&guest, &stage.beta));
    proxy.restore();
    let done = recover(&stage.alpha);
    assert_eq!(done.code(), 0, "{}", stage.agent_log());
    assert_eq!(done.json().unwrap()["outcome"], "committed");
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 1);
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 0);
    stage.expect_moved(&guest);
}

#[test]
fn an_answer_that_was_lost_leaves_one_runner_and_recover_learns_of_it() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let gate = stage.beta.gate("load").unwrap();
    let mut running = stage
        .alpha
        .start_migrate("web", proxy.port(), &PATIENT)
        .unwrap();
    gate.wait_reached(&mut running).unwrap();
    // Commit gets there; its answer is on the way for so long that the link is cut before it arrives.
    proxy.delay_back(Duration::from_secs(2));
    gate.remove().unwrap();
    assert!(soon(|| runs(&guest, &stage.beta)), "{}", stage.agent_log());
    proxy.cut();
    assert!(paused(&guest, &stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 1);
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 0);
    kill(running);
    assert!(paused(&guest, &stage.alpha));
    proxy.restore();
    let done = recover(&stage.alpha);
    assert_eq!(done.code(), 0, "{}", stage.agent_log());
    stage.expect_moved(&guest);
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 1);
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 0);
}

#[test]
fn a_source_that_stays_in_doubt_says_so_when_it_is_told_to_leave() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let mut running = commit_into_the_void(&stage, &proxy);
    proxy.cut();
    let told = running.wait_for("the doubt", END, |_, said| {
        said.contains("in doubt").then_some(())
    });
    told.unwrap();
    // The first signal asks the destination to settle it as aborted, the second one ends the agent.
    running.signal(Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    running.signal(Signal::INT).unwrap();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 3);
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "in-doubt");
    assert_eq!(report["guest_now"], "in-doubt");
    assert!(paused(&guest, &stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 1);
    // The destination host is lost for good: only the operator can say so.
    let resolved = stage
        .alpha
        .ask(
            Role::Source,
            "resolve",
            "web",
            &["--destination-is-fenced", "--json"],
        )
        .unwrap();
    println!("resolve: {}{}", resolved.stdout, resolved.stderr);
    assert!(runs(&guest, &stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&stage.alpha).unwrap();
}

#[test]
fn a_guest_that_is_shut_down_in_the_copy_ends_the_migration() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let mut running = stage.begin(&guest, &SLOW);
    wait_in_copy(&stage, &mut running);
    guest.client(&stage.alpha).unwrap().shutdown().unwrap();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "guest-changed");
    assert_eq!(report["guest_now"], "ended");
    stage.expect_clean(&guest);
}
