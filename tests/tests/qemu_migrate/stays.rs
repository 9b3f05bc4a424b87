//! Guests that stay where they are: cancelled ones, and ones that are busier than the link.

use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::qemu::{committed, ended, wait_phase};
use vmferry_tests::harness::role::Role;
use vmferry_tests::lab::{JudgeParams, Lab};

use super::guests::{MIB, VERIFIED, pair, small, working_a_little};

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn a_guest_busier_than_the_link_is_recognised_early_stays_by_default_and_is_moved_by_force() {
    let Some(lab) = Lab::get() else { return };
    let judge = JudgeParams {
        memory: 32 * MIB,
        working_set: 24 * MIB,
        dirty: 96 * MIB,
        verify: 8 * MIB,
        disk: 0,
        ..working_a_little()
    };
    let pair = pair(small(lab, "too-busy").judge(judge).build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let name = pair.guest.name();
    let narrow = ["--max-bandwidth", "12MiB/s"];

    let done = pair.alpha.host.migrate(name, agent.port, &narrow).unwrap();
    let report = ended(&done, 1, "failed").unwrap();
    let rounds = report["rounds"].as_array().unwrap();
    assert!((2..=3).contains(&rounds.len()), "{report}");
    assert_eq!(report["error"]["code"], "not-converging", "{report}");
    assert!(report["downtime_ms"].is_null(), "{report}");
    pair.stayed(source.pid(), &pair.beta).unwrap();
    pair.unbroken(1).unwrap();

    let forced = ["--max-bandwidth", "12MiB/s", "--on-stall", "force"];
    let moved = pair
        .move_guest((&pair.alpha, &pair.beta), &agent, &forced)
        .unwrap();
    let rounds = moved.report["rounds"].as_array().unwrap();
    assert!(rounds.len() <= 4, "{}", moved.report);
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);
}

#[test]
fn a_cancelled_guest_runs_on_leaves_nothing_behind_and_moves_the_next_time() {
    let Some(lab) = Lab::get() else { return };
    let pair = pair(small(lab, "cancelled").build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let name = pair.guest.name();
    let start = |more: &[&str]| {
        pair.alpha
            .host
            .start_migrate(name, agent.port, more)
            .unwrap()
    };
    let cancel = || {
        let said = pair.alpha.host.ask(Role::Source, "cancel", name, &[]);
        println!("{}", said.unwrap().stderr);
    };

    // In negotiation.
    let held = pair.beta.hold_at("prepare").unwrap();
    let mut migration = start(&[]);
    held.wait_reached(&mut migration).unwrap();
    migration.signal(Signal::INT).unwrap();
    held.release().unwrap();
    ended(&migration.wait(LIMIT).unwrap(), 4, "cancelled").unwrap();
    pair.stayed(source.pid(), &pair.beta).unwrap();

    // In the copy.
    let mut migration = start(&["--max-bandwidth", "10MiB/s"]);
    wait_phase(&mut migration, "copy").unwrap();
    migration.signal(Signal::INT).unwrap();
    ended(&migration.wait(LIMIT).unwrap(), 4, "cancelled").unwrap();
    pair.stayed(source.pid(), &pair.beta).unwrap();

    // Converged, waiting for the trigger.
    let mut migration = start(&["--cutover", "manual", "--max-downtime", "10s"]);
    wait_phase(&mut migration, "converged").unwrap();
    cancel();
    ended(&migration.wait(LIMIT).unwrap(), 4, "cancelled").unwrap();
    pair.stayed(source.pid(), &pair.beta).unwrap();

    // Paused, before the last blocks.
    let held = pair.alpha.hold_at("final").unwrap();
    let mut migration = start(&["--max-downtime", "10s"]);
    held.wait_reached(&mut migration).unwrap();
    assert_eq!(source.qmp().status().unwrap(), "paused");
    migration.signal(Signal::INT).unwrap();
    held.release().unwrap();
    ended(&migration.wait(LIMIT).unwrap(), 4, "cancelled").unwrap();
    pair.stayed(source.pid(), &pair.beta).unwrap();
    pair.guest.verify_now().unwrap();
    pair.unbroken(1).unwrap();

    let mut migration = start(&VERIFIED);
    wait_phase(&mut migration, "copy").unwrap();
    let done = migration.wait(LIMIT).unwrap();
    let report = committed(&done, &agent).unwrap();
    pair.arrived(source.pid(), &pair.beta, &done, report)
        .unwrap();
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);
}
