//! Agents that are killed in the copy of a real guest: the next one goes on, with the guest's marks in the kernel and in QEMU's
//! bitmaps, and what arrives is compared whole.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use vmferry_tests::harness::process::Running;
use vmferry_tests::harness::qemu::{Pair, Side, committed, wait_phase};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::lab::Lab;

use super::guests::{MIB, VERIFIED, busy};

const LIMIT: Duration = Duration::from_secs(240);
const SLOW: [&str; 6] = [
    "--max-bandwidth",
    "48MiB/s",
    "--compress",
    "off",
    "--lanes",
    "1",
];

fn wait_for_bytes(pair: &Pair, side: &Side, running: &mut Running, bytes: u64) -> u64 {
    let done = || {
        let status = side
            .host
            .ask(Role::Source, "status", pair.guest.name(), &["--json"]);
        status.ok()?.json().ok()?["bytes_done"].as_u64()
    };
    let seen = running.wait_for("the middle of the copy", LIMIT, |_, _| {
        done().filter(|done| *done > bytes)
    });
    seen.unwrap()
}

fn kill(running: Running) {
    running.signal(Signal::KILL).unwrap();
    running.wait(LIMIT).unwrap();
}

fn content(report: &Value) -> u64 {
    report["memory_bytes"].as_u64().unwrap() + report["disk_bytes"].as_u64().unwrap()
}

#[test]
fn agents_that_are_killed_in_the_copy_of_a_busy_guest_are_gone_on_with() {
    let Some(lab) = Lab::get() else { return };
    let pair = busy(lab, "gone-on-with");
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let name = pair.guest.name();
    let mut agent = pair.beta.host.serve(&[]).unwrap();
    let start = |port, more: &[&str]| {
        let more = [&SLOW[..], more].concat();
        pair.alpha.host.start_migrate(name, port, &more).unwrap()
    };

    // In the first pass.
    let mut migration = start(agent.port, &VERIFIED);
    let before = wait_for_bytes(&pair, &pair.alpha, &mut migration, 400 * MIB);
    kill(migration);
    assert!(source.is_alive());

    // Converged: bitmaps were rotated and removed by then.
    let manual = [&VERIFIED[..], &["--cutover", "manual"]].concat();
    let mut migration = start(agent.port, &manual);
    wait_phase(&mut migration, "converged").unwrap();
    std::thread::sleep(Duration::from_secs(2));
    kill(migration);
    assert!(source.is_alive());

    // Then the destination's, while the third one copies.
    let mut migration = start(agent.port, &manual);
    wait_phase(&mut migration, "converged").unwrap();
    agent.process.signal(Signal::KILL).unwrap();
    assert!(soon(|| agent.process.has_ended().unwrap()));
    agent = pair.beta.host.serve_at(agent.port, &[]).unwrap();
    let again = migration.wait_for("the next session", LIMIT, |_, said| {
        said.contains("connected again").then_some(())
    });
    again.unwrap();
    let cut = pair.alpha.host.ask(Role::Source, "cutover", name, &[]);
    println!("{}", cut.unwrap().stderr);
    let done = migration.wait(LIMIT).unwrap();
    println!("{}", done.stderr);
    let report = committed(&done, &agent).unwrap();
    assert!(done.stderr.contains("going on with what it left"));
    let log = agent.process.stderr();
    assert!(log.contains("going on with the copy"), "{log}");
    let (all, raw) = (content(&report), report["raw_bytes"].as_u64().unwrap());
    println!(
        "{name}: killed after {before} bytes, when converged, and at the destination; the last agent accounted for {raw} of {all} bytes ({:.2})",
        raw as f64 / all as f64
    );
    assert!(raw < all / 2, "{raw} of {all}");
    assert_eq!(report["verified"]["bytes"].as_u64(), Some(all), "{report}");
    pair.arrived(source.pid(), &pair.beta, &done, report)
        .unwrap();
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);
}

/// What is left of the killed agent is of no use: the destination's QEMU has its copy, and both sides compare.
#[test]
fn a_real_guest_whose_ledger_is_lost_is_compared() {
    let Some(lab) = Lab::get() else { return };
    let pair = busy(lab, "compared");
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let name = pair.guest.name();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let host = &pair.alpha.host;
    let mut migration = host.start_migrate(name, agent.port, &SLOW).unwrap();
    let before = wait_for_bytes(&pair, &pair.alpha, &mut migration, 400 * MIB);
    kill(migration);
    let ledger = host.path(&format!("state/run/{name}.source.ledger"));
    std::fs::remove_file(ledger).unwrap();
    let migration = host.start_migrate(name, agent.port, &VERIFIED).unwrap();
    let done = migration.wait(LIMIT).unwrap();
    println!("{}", done.stderr);
    let report = committed(&done, &agent).unwrap();
    let (all, kept) = (content(&report), report["kept_bytes"].as_u64().unwrap());
    println!(
        "{name}: killed after {before} bytes, {kept} found equal, {} of {all} accounted for",
        report["raw_bytes"]
    );
    assert!(kept > before / 2, "{kept} of {before}");
    assert_eq!(report["verified"]["bytes"].as_u64(), Some(all), "{report}");
    pair.arrived(source.pid(), &pair.beta, &done, report)
        .unwrap();
}
