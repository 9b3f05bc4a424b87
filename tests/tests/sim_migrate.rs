//! The embedded guest moves between real agents: the whole of the main job, on any Linux with a new enough kernel.

#![allow(clippy::unwrap_used, reason = "a test may unwrap")]

use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::sim::{SimGuest, SimSpec};
use vmferry_tests::harness::{Host, Hosts, hosts::Agent};

struct Pair {
    _hosts: Hosts,
    alpha: Host,
    beta: Host,
    agent: Agent,
}

fn pair() -> Pair {
    let programs = Programs::played_by(env!("CARGO_BIN_EXE_vmferry-demo").as_ref());
    let hosts = Hosts::new(programs).unwrap();
    let (alpha, beta) = (hosts.host("alpha").unwrap(), hosts.host("beta").unwrap());
    let agent = beta.serve(&[]).unwrap();
    Pair {
        _hosts: hosts,
        alpha,
        beta,
        agent,
    }
}

#[test]
fn a_busy_guest_moves_and_nothing_is_wrong() {
    let pair = pair();
    let guest = SimGuest::start(SimSpec::small("web"), &pair.alpha).unwrap();
    guest.expect_at(&pair.beta, &["alpha"]).unwrap();
    let done = pair
        .alpha
        .migrate(
            "web",
            pair.agent.port,
            &["--verify", "full", "--max-downtime", "2s"],
        )
        .unwrap();
    assert_eq!(
        done.code(),
        0,
        "{}\n{}",
        done.stderr,
        pair.agent.process.stderr()
    );
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "committed");
    guest.wait_for_beats(50).unwrap();
    guest.verify_on(&pair.beta).unwrap();
    assert!(!guest.is_on(&pair.alpha));
    let beats = guest.beats().unwrap();
    beats.check().unwrap();
    println!("{}\nhandover gap {:?}", done.stderr, beats.handovers());
    assert_eq!(beats.handovers().len(), 1);
    guest.end_on(&pair.beta);
}

#[test]
fn a_session_of_several_connections_moves_a_guest() {
    let pair = pair();
    let guest = SimGuest::start(SimSpec::small("web"), &pair.alpha).unwrap();
    guest.expect_at(&pair.beta, &["alpha"]).unwrap();
    let more = [
        "--connections",
        "3",
        "--lanes",
        "4",
        "--verify",
        "full",
        "--max-downtime",
        "2s",
    ];
    let done = pair.alpha.migrate("web", pair.agent.port, &more).unwrap();
    assert_eq!(
        done.code(),
        0,
        "{}\n{}",
        done.stderr,
        pair.agent.process.stderr()
    );
    guest.wait_for_beats(50).unwrap();
    guest.verify_on(&pair.beta).unwrap();
    guest.beats().unwrap().check().unwrap();
}
