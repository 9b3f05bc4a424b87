//! Guests that are not simply running: paused ones, and ones that reboot or shut down on the way.

use std::time::Duration;

use serde_json::json;
use vmferry_tests::harness::qemu::{committed, ended, wait_gone, wait_phase};
use vmferry_tests::harness::role::Role;
use vmferry_tests::lab::Lab;

use super::guests::{pair, small};

const LIMIT: Duration = Duration::from_secs(180);

#[test]
fn a_guest_arrives_paused_or_rebooting_as_it_is_and_one_that_shuts_down_ends_the_migration() {
    let Some(lab) = Lab::get() else { return };
    let pair = pair(small(lab, "states").build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let at_beta = pair.beta.host.serve(&[]).unwrap();
    let at_alpha = pair.alpha.host.serve(&[]).unwrap();
    let (alpha, beta) = (&pair.alpha, &pair.beta);
    let name = pair.guest.name();

    // Paused.
    source.qmp().execute("stop", json!({})).unwrap();
    let before = pair.guest.beats().count();
    let done = alpha
        .host
        .migrate(name, at_beta.port, &["--verify", "full"])
        .unwrap();
    committed(&done, &at_beta).unwrap();
    let arrived = beta.place.adopt().unwrap();
    assert_eq!(arrived.qmp().status().unwrap(), "paused");
    assert_eq!(pair.guest.beats().count_from(arrived.pid()), 0);
    assert_eq!(pair.guest.beats().count(), before);
    assert!(!source.is_alive());
    arrived.qmp().execute("cont", json!({})).unwrap();
    pair.guest
        .beats()
        .wait_for_from(arrived.pid(), 100, LIMIT)
        .unwrap();
    pair.guest.verify_now().unwrap();
    pair.unbroken(1).unwrap();

    // Rebooting: the copy is as good as done when the guest resets, and is cut over while it boots.
    let more = ["--cutover", "manual", "--max-downtime", "10s"];
    let mut migration = beta.host.start_migrate(name, at_alpha.port, &more).unwrap();
    wait_phase(&mut migration, "converged").unwrap();
    pair.guest.tell("reboot").unwrap();
    arrived.qmp().wait_event("RESET").unwrap();
    let cutover = beta.host.ask(Role::Source, "cutover", name, &[]).unwrap();
    assert_eq!(cutover.code(), 0, "{}", cutover.stderr);
    let done = migration.wait(LIMIT).unwrap();
    committed(&done, &at_alpha).unwrap();
    pair.guest.wait_ready_again(2).unwrap();
    let rebooted = alpha.place.adopt().unwrap();
    assert_eq!(pair.guest.running_pid().unwrap(), rebooted.pid());
    assert!(!arrived.is_alive());
    pair.guest.verify_now().unwrap();
    pair.unbroken(2).unwrap();

    // Shutting down.
    let mut migration = alpha.host.start_migrate(name, at_beta.port, &more).unwrap();
    wait_phase(&mut migration, "converged").unwrap();
    pair.guest.tell("shutdown").unwrap();
    wait_gone(rebooted.pid()).unwrap();
    let done = migration.wait(LIMIT).unwrap();
    let report = ended(&done, 1, "failed").unwrap();
    let error = report["error"].to_string();
    assert!(error.contains("shut"), "{error}");
    pair.nothing_at(beta).unwrap();
    pair.guest.check_no_corrupt().unwrap();
}
