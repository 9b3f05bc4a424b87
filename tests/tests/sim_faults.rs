//! Links that break and agents that are killed: the guest runs on exactly one side or waits in doubt and says so, nothing is left
//! behind, and the next migration succeeds.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::doubt::{answer_held_back, commit_into_the_void, kill};
use vmferry_tests::harness::process::{Finished, Running, descriptors, with_words};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::{soon, wait_for_bytes};
use vmferry_tests::harness::{Host, Proxy, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const PATIENT: [&str; 2] = ["--max-downtime", "10s"];
const END: Duration = Duration::from_secs(120);
/// Slow enough that a test can act in the middle of the copy.
const SLOW: [&str; 4] = ["--max-bandwidth", "6MiB/s", "--compress", "off"];

fn wait_in_copy(stage: &Stage, running: &mut Running) {
    wait_for_bytes(&stage.alpha, "web", running, 4 << 20);
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

#[test]
fn a_link_that_is_lost_in_the_copy_comes_back() {
    let stage = Stage::set(PROGRAMS);
    let spec = SimSpec {
        // While the link is away it would write most of its disk once more, of which a part was sent.
        disk_rate: 0,
        ..SimSpec::quiet("web")
    };
    let content = spec.ram + spec.disk;
    let guest = stage.guest(spec);
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let mut running = stage
        .alpha
        .start_migrate(
            "web",
            proxy.port(),
            &[&SLOW[..], &PATIENT, &["--lanes", "2"]].concat(),
        )
        .unwrap();
    wait_for_bytes(&stage.alpha, "web", &mut running, 24 << 20);
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
    let (raw, again) = (
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
    let guest = stage.guest(SimSpec::quiet("web"));
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
        stage.expect_traceless(&guest, &before);
        stage.expect_moves(&guest, &PATIENT);
    }
    stage.expect_moved(&guest);
}

/// Where the next record of beta's agent is written before it is renamed.
fn next_record(stage: &Stage) -> std::path::PathBuf {
    stage.beta.path("state/guests/web.destination.new")
}

/// Puts something in the way of that record once the agent has been offered the guest: the next one names what it launches.
fn obstruct(stage: &Stage, with: &str) -> std::path::PathBuf {
    let body = format!("{with} '{}'", next_record(stage).display());
    stage.beta.hook("prepare", &body).unwrap()
}

#[test]
fn a_destination_agent_that_is_killed_before_the_journal_names_its_launch_leaves_nothing() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    // A write into a pipe that nobody reads from does not return.
    let hook = obstruct(&stage, "mkfifo");
    let running = stage.begin(&guest, &PATIENT);
    let words = stage.beta.path("web.sock").display().to_string();
    let mut launched = Vec::new();
    let staged = soon(|| {
        launched = with_words(&words);
        !launched.is_empty()
    });
    assert!(staged, "nothing was launched\n{}", stage.agent_log());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(with_words(&words), launched);
    let program = std::fs::read(format!("/proc/{}/cmdline", launched[0])).unwrap();
    assert!(program.starts_with(b"/bin/sh\0"), "it began");
    let port = stage.agent.port;
    stage.agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| with_words(&words).is_empty()), "{launched:?} lives");
    std::fs::remove_file(hook).unwrap();
    std::fs::remove_file(next_record(&stage)).unwrap();
    stage.agent = stage.beta.serve_at(port, &[]).unwrap();
    // Nothing was promised yet, so the source gives up; the next migration has the name and the folder to itself.
    let done = running.wait(END).unwrap();
    stage.expect_code(&done, 1);
    guest.verify_on(&stage.alpha).unwrap();
    stage.expect_moves(&guest, &PATIENT);
}

#[test]
fn what_the_journal_cannot_name_is_not_launched() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let hook = obstruct(&stage, "mkdir");
    let done = stage.migrate(&guest, &PATIENT);
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "journal", "{report}");
    let record = stage.beta.path("state/guests/web.destination");
    let named = done.stderr.contains(record.to_str().unwrap());
    assert!(named, "{}", done.stderr);
    assert_eq!(report["guest_now"], "runs-at-source");
    let words = stage.beta.path("web.sock").display().to_string();
    assert!(soon(|| with_words(&words).is_empty()));
    std::fs::remove_file(hook).unwrap();
    std::fs::remove_dir(next_record(&stage)).unwrap();
    stage.expect_stayed(&guest);
    // The agent looks for what it ended, and then says so.
    let said = soon(|| stage.agent_log().contains("ended before it began"));
    assert!(said, "{}", stage.agent_log());
    stage.expect_moves(&guest, &PATIENT);
}

#[test]
fn recover_removes_every_trace_of_a_killed_source_agent() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let before = descriptors(guest.first_pid());
    let mut running = stage.begin(&guest, &SLOW);
    wait_in_copy(&stage, &mut running);
    kill(running);
    guest.wait_for_beats(20).unwrap();
    let done = recover(&stage.alpha);
    assert_eq!(done.json().unwrap()["guest_now"], "runs-at-source");
    stage.expect_traceless(&guest, &before);
    stage.expect_stayed(&guest);
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    stage.expect_moves(&guest, &PATIENT);
}

#[test]
fn recover_resumes_a_guest_that_a_killed_agent_left_paused() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let before = descriptors(guest.first_pid());
    let gate = stage.beta.gate("final").unwrap();
    let mut running = stage.begin(&guest, &PATIENT);
    gate.wait_reached(&mut running).unwrap();
    kill(running);
    assert!(guest.is_paused_on(&stage.alpha));
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
    assert!(guest.runs_on(&stage.alpha));
    stage.expect_traceless(&guest, &before);
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    stage.expect_stayed(&guest);
    stage.expect_moves(&guest, &PATIENT);
}

#[test]
fn a_commit_that_was_lost_on_the_way_is_repeated() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let running = commit_into_the_void(&stage, &proxy);
    assert!(guest.is_paused_on(&stage.alpha));
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
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    kill(commit_into_the_void(&stage, &proxy));
    assert!(guest.is_paused_on(&stage.alpha));
    let said = owner(&stage.alpha, Role::Source);
    assert_eq!(said.code(), 1);
    assert!(said.stdout.contains("in doubt"), "{}", said.stdout);
    assert!(!guest.runs_on(&stage.beta));
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
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let running = answer_held_back(&stage, &guest, &proxy);
    proxy.cut();
    assert!(guest.is_paused_on(&stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 1);
    assert_eq!(owner(&stage.beta, Role::Destination).code(), 0);
    kill(running);
    assert!(guest.is_paused_on(&stage.alpha));
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
    let guest = stage.guest(SimSpec::quiet("web"));
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
    assert!(guest.is_paused_on(&stage.alpha));
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
    assert!(guest.runs_on(&stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source).code(), 0);
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&stage.alpha).unwrap();
}

#[test]
fn a_guest_that_is_shut_down_in_the_copy_ends_the_migration() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
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
