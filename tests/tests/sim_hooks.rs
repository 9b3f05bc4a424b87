//! Hook scripts on both sides: told of every phase, and able to refuse until the decision.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use vmferry_tests::harness::{SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const PATIENT: [&str; 2] = ["--max-downtime", "5s"];

const PHASES: [&str; 10] = [
    "negotiate",
    "prepare",
    "copy",
    "converged",
    "pause",
    "final",
    "load",
    "commit",
    "start",
    "release",
];
/// Those in which a script may refuse.
const BEFORE: usize = 7;

fn small() -> SimSpec {
    SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        ..SimSpec::small("web")
    }
}

#[test]
fn every_phase_is_told_in_order_on_both_sides() {
    let stage = Stage::set(PROGRAMS);
    stage.alpha.record_hooks(&PHASES).unwrap();
    stage.beta.record_hooks(&PHASES).unwrap();
    let guest = stage.guest(small());
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    let report = done.json().unwrap();
    for (host, side) in [("alpha", "source"), ("beta", "destination")] {
        let mut told = Vec::new();
        // The destination tells of its release when its source has parted.
        assert!(vmferry_tests::harness::stage::soon(|| {
            told = stage.alpha.hook_calls().unwrap();
            told.retain(|call| call.host == host);
            told.len() >= PHASES.len()
        }));
        let phases: Vec<_> = told.iter().map(|call| call.phase.as_str()).collect();
        assert_eq!(phases, PHASES, "{host}");
        for call in &told {
            assert_eq!(call.guest, "web");
            assert_eq!(call.facts["guest"], "web");
            assert_eq!(call.facts["phase"], call.phase.as_str());
            assert_eq!(call.facts["side"], side);
            assert_eq!(call.facts["generation"], 1);
            assert_eq!(call.facts["migration_id"], report["migration_id"]);
            println!("{host}: {}", call.facts);
        }
    }
}

#[test]
fn a_script_of_the_source_can_refuse_until_the_decision() {
    refuse_in_every_phase(true);
}

#[test]
fn a_script_of_the_destination_can_refuse_until_the_decision() {
    refuse_in_every_phase(false);
}

fn refuse_in_every_phase(source: bool) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let host = if source { &stage.alpha } else { &stage.beta };
    for phase in &PHASES[..BEFORE] {
        let name = format!("{phase}.d/10-no");
        let body = "echo \"not on a $2 of $1 today\" >&2; exit 3";
        let script = host.hook(&name, body).unwrap();
        let done = stage.migrate(&guest, &PATIENT);
        println!("{phase}: {}", done.stderr);
        stage.expect_code(&done, 1);
        let report = done.json().unwrap();
        assert_eq!(report["error"]["code"], "hook-veto", "{report}");
        assert_eq!(report["guest_now"], "runs-at-source");
        let paused = matches!(*phase, "final" | "load");
        let outcome = if paused { "rolled-back" } else { "failed" };
        assert_eq!(report["outcome"], outcome, "{phase}");
        let detail = report["error"]["detail"].as_str().unwrap();
        let words = format!("not on a {phase} of web today");
        for word in [script.to_str().unwrap(), &words, phase] {
            assert!(detail.contains(word), "{phase}: {detail}");
        }
        stage.expect_stayed(&guest);
        std::fs::remove_file(script).unwrap();
    }
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn after_the_decision_a_failure_is_only_logged() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    for host in [&stage.alpha, &stage.beta] {
        for phase in &PHASES[BEFORE..] {
            host.hook(phase, "echo too late; exit 1").unwrap();
        }
    }
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    for phase in &PHASES[BEFORE..] {
        let words = format!("refused phase {phase}");
        assert!(done.stderr.contains(&words), "{}", done.stderr);
        let told = vmferry_tests::harness::stage::soon(|| stage.agent_log().contains(&words));
        assert!(told, "{}", stage.agent_log());
    }
}

#[test]
fn slow_scripts_after_the_decision_hold_up_no_guest() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let gates = [
        stage.alpha.gate("commit").unwrap(),
        stage.beta.gate("commit").unwrap(),
    ];
    let mut running = stage.begin(&guest, &PATIENT);
    for gate in &gates {
        gate.wait_reached(&mut running).unwrap();
    }
    // Both scripts stand; the guest runs there and is gone here.
    assert!(vmferry_tests::harness::stage::soon(|| guest
        .is_on(&stage.beta)
        && !guest.is_on(&stage.alpha)));
    stage.expect_moved(&guest);
    for gate in &gates {
        gate.open().unwrap();
    }
    let done = running.wait(std::time::Duration::from_secs(60)).unwrap();
    stage.expect_code(&done, 0);
}
