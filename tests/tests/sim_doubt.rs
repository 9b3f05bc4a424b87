//! A source in doubt: it asks again by itself, hears the outcome however late, and says so when it must leave without it.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::time::{Duration, Instant};

use rustix::process::Signal;
use vmferry_tests::harness::doubt::{answer_held_back, commit_into_the_void, kill};
use vmferry_tests::harness::process;
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Host, Proxy, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(120);

fn owner(host: &Host, role: Role) -> i32 {
    let owner = host.ask(role, "owner", "web", &[]).unwrap();
    println!("{} owner, {}: {}", role.name(), host.name(), owner.stdout);
    owner.code()
}

fn expect_one_owner(of: &Host, not: &Host) {
    for role in [Role::Source, Role::Destination] {
        assert_eq!(owner(of, role), 0);
        assert_eq!(owner(not, role), 1);
    }
}

#[test]
fn a_source_that_lost_the_answer_connects_again_by_itself_and_hears_it() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let mut running = answer_held_back(&stage, &guest, &proxy);
    proxy.cut();
    let told = running.wait_for("the doubt", END, |_, said| {
        said.contains("in doubt").then_some(())
    });
    told.unwrap();
    assert!(guest.is_paused_on(&stage.alpha) && guest.runs_on(&stage.beta));
    assert_eq!(owner(&stage.alpha, Role::Source), 1);
    proxy.restore();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "committed");
    assert!(report["sessions"].as_u64().unwrap() >= 1, "{report}");
    stage.expect_moved(&guest);
    expect_one_owner(&stage.beta, &stage.alpha);
}

#[test]
fn a_source_that_is_told_to_stop_once_in_doubt_leaves_with_exit_code_3_and_goes_on_later() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let running = commit_into_the_void(&stage, &proxy);
    proxy.cut();
    // As a service manager stops it: once.
    running.signal(Signal::TERM).unwrap();
    let told = Instant::now();
    let done = running.wait(END).unwrap();
    println!("left after {:.1?}\n{}", told.elapsed(), done.stderr);
    stage.expect_code(&done, 3);
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "in-doubt");
    assert_eq!(report["guest_now"], "in-doubt");
    assert_eq!(report["exit_code"], 3);
    let what_to_do = report["what_to_do"].as_str().unwrap();
    assert!(what_to_do.contains("vmferry-src recover web"), "{report}");
    assert!(guest.is_paused_on(&stage.alpha) && !guest.runs_on(&stage.beta));
    proxy.restore();
    let done = stage
        .alpha
        .ask(Role::Source, "recover", "web", &["--json"])
        .unwrap();
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    expect_one_owner(&stage.beta, &stage.alpha);
}

#[test]
fn a_source_in_doubt_hears_the_outcome_though_its_guest_has_moved_on_and_come_back() {
    let stage = Stage::set(PROGRAMS);
    let gamma = stage.hosts.host("gamma").unwrap();
    let guest = stage.guest(SimSpec::quiet("web"));
    guest.expect_at(&stage.beta, &["alpha", "gamma"]).unwrap();
    guest.expect_at(&gamma, &["beta"]).unwrap();
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let running = answer_held_back(&stage, &guest, &proxy);
    proxy.cut();
    kill(running);
    move_on(&guest, &stage.beta, &gamma, None);
    move_on(&guest, &gamma, &stage.beta, Some(stage.agent.port));
    assert!(guest.is_paused_on(&stage.alpha));
    assert_eq!(owner(&stage.alpha, Role::Source), 1);
    proxy.restore();
    let done = stage
        .alpha
        .ask(Role::Source, "recover", "web", &["--json"])
        .unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    assert_eq!(done.json().unwrap()["outcome"], "committed");
    stage.expect_moved(&guest);
    expect_one_owner(&stage.beta, &stage.alpha);
}

/// Moves the guest; to the agent that listens on `port`, or to a new one.
fn move_on(guest: &SimGuest, from: &Host, to: &Host, port: Option<u16>) {
    let agent = port.is_none().then(|| to.serve(&[]).unwrap());
    let port = port.or(agent.as_ref().map(|agent| agent.port)).unwrap();
    let done = from
        .migrate("web", port, &["--max-downtime", "10s"])
        .unwrap();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    assert!(soon(|| guest.runs_on(to)));
    guest.wait_for_beats(20).unwrap();
}

/// The guest's process ends although it is paused and in doubt: the host of the source was restarted, say.
fn lose_guest(stage: &Stage, guest: &SimGuest) {
    process::kill(guest.first_pid());
    assert!(soon(|| !guest.is_on(&stage.alpha)));
    assert_eq!(owner(&stage.alpha, Role::Source), 1);
}

fn recover(stage: &Stage) -> process::Finished {
    let words = ["--json"];
    let done = stage.alpha.ask(Role::Source, "recover", "web", &words);
    let done = done.unwrap();
    println!("{}{}", done.stdout, done.stderr);
    done
}

#[test]
fn a_doubt_whose_guest_is_gone_is_settled_as_committed() {
    for verb in ["recover", "migrate"] {
        let stage = Stage::set(PROGRAMS);
        let guest = stage.guest(SimSpec::quiet("web"));
        let proxy = Proxy::to(stage.agent.port).unwrap();
        let running = answer_held_back(&stage, &guest, &proxy);
        proxy.cut();
        kill(running);
        lose_guest(&stage, &guest);
        proxy.restore();
        let done = match verb {
            "recover" => recover(&stage),
            _ => stage.alpha.migrate("web", proxy.port(), &[]).unwrap(),
        };
        stage.expect_code(&done, 0);
        assert_eq!(done.json().unwrap()["outcome"], "committed");
        assert!(done.stderr.contains("is gone"), "{}", done.stderr);
        stage.expect_moved(&guest);
        expect_one_owner(&stage.beta, &stage.alpha);
    }
}

#[test]
fn a_doubt_whose_guest_is_gone_is_settled_as_aborted_and_the_guest_may_be_booted_here() {
    let mut stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    kill(commit_into_the_void(&stage, &proxy));
    lose_guest(&stage, &guest);
    // An agent that is restarted before it hears Commit records the attempt as aborted.
    let port = stage.agent.port;
    stage.agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| stage.agent.process.has_ended().unwrap()));
    stage.agent = stage.beta.serve_at(port, &[]).unwrap();
    proxy.restore();
    let done = recover(&stage);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["guest_now"], "ended", "{report}");
    let now = report["what_is_true_now"].as_str().unwrap();
    assert!(now.contains("may be booted afresh here"), "{now}");
    expect_one_owner(&stage.alpha, &stage.beta);
    stage.expect_clean(&guest);
    // It is, begins a new life, and moves.
    std::fs::remove_file(stage.alpha.path("web.beats")).unwrap();
    let again = stage.guest(SimSpec::quiet("web"));
    stage.expect_moves(&again, &["--max-downtime", "10s"]);
}

#[test]
fn a_guest_that_is_gone_before_the_decision_is_this_hosts_to_boot() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let gate = stage.beta.gate("final").unwrap();
    let mut running = stage.begin(&guest, &["--max-downtime", "10s"]);
    gate.wait_reached(&mut running).unwrap();
    kill(running);
    lose_guest(&stage, &guest);
    gate.remove().unwrap();
    let done = recover(&stage);
    stage.expect_code(&done, 1);
    assert_eq!(done.json().unwrap()["guest_now"], "ended");
    expect_one_owner(&stage.alpha, &stage.beta);
    stage.expect_clean(&guest);
}
