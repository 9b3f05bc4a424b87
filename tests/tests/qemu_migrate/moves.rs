//! Guests that arrive: whole, once, and without a beat too few or too many.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use vmferry_tests::harness::hosts::Agent;
use vmferry_tests::harness::qemu::{Moved, Pair, Side, allocated, committed, wait_phase};
use vmferry_tests::harness::role::Role;
use vmferry_tests::lab::{Disk, JudgeParams, Lab, Start};

use super::guests::{MIB, VERIFIED, busy, pair, shared_and_direct};

fn go(pair: &Pair, way: (&Side, &Side), agent: &Agent, more: &[&str]) -> Moved {
    pair.move_guest(way, agent, more).unwrap()
}

fn verified_everything(moved: &Moved) {
    let verified = &moved.report["verified"];
    let sizes = moved.report["memory_bytes"].as_u64().unwrap()
        + moved.report["disk_bytes"].as_u64().unwrap();
    assert_eq!(verified["mode"], "full", "{verified}");
    assert_eq!(verified["bytes"].as_u64(), Some(sizes), "{verified}");
}

/// What is a hole at the source takes no room at the destination, whatever its image held before.
fn sparse_stays_sparse(pair: &Pair, from: &Side, to: &Side) {
    for disk in 0..2 {
        let there = allocated(&from.place.image(disk)).unwrap();
        let here = allocated(&to.place.image(disk)).unwrap();
        println!(
            "{} disk {disk}: {} KiB allocated at {}, {} KiB at {}",
            pair.guest.name(),
            there >> 10,
            from.host.name(),
            here >> 10,
            to.host.name()
        );
        // It is written on here; a block of 4 KiB takes a cluster of 64.
        assert!(here <= there + 16 * MIB, "{here} bytes of disk {disk}");
    }
}

#[test]
fn a_busy_guest_goes_there_and_back_again() {
    let Some(lab) = Lab::get() else { return };
    let pair = busy(lab, "there-and-back");
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let at_beta = pair.beta.host.serve(&[]).unwrap();
    let at_alpha = pair.alpha.host.serve(&[]).unwrap();

    let there = go(&pair, (&pair.alpha, &pair.beta), &at_beta, &VERIFIED);
    verified_everything(&there);
    assert!(!source.is_alive());
    sparse_stays_sparse(&pair, &pair.alpha, &pair.beta);
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);

    // Its old images are there, and hold what it had when it left.
    let back = go(&pair, (&pair.beta, &pair.alpha), &at_alpha, &VERIFIED);
    verified_everything(&back);
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 2);

    pair.guest.set_dirty_rate(0).unwrap();
    pair.guest.set_disk_rate(0).unwrap();
    let idle = go(&pair, (&pair.alpha, &pair.beta), &at_beta, &[]);
    let gap = pair.unbroken(1).unwrap().handovers[2];
    println!(
        "idle guest: {gap}; downtime parts {}",
        idle.report["downtime_parts"]
    );
}

#[test]
fn a_guest_with_shared_memory_and_direct_disks_moves_to_a_waiting_qemu_that_never_runs_too_early() {
    let Some(lab) = Lab::get() else { return };
    let pair = shared_and_direct(lab, "waited-for");
    pair.expect_waiting().unwrap();
    let source = pair.boot().unwrap();
    let at_beta = pair.beta.host.serve(&[]).unwrap();
    let waiting = pair.beta.place.start(Start::Incoming).unwrap();
    let there = go(&pair, (&pair.alpha, &pair.beta), &at_beta, &VERIFIED);
    verified_everything(&there);
    assert_eq!(there.pid, waiting.pid());
    assert!(!source.is_alive());
    pair.unbroken(1).unwrap();

    // Back to a QEMU that was started without `-S`, and that somebody tells to go on before anything is there.
    let at_alpha = pair.alpha.host.serve(&[]).unwrap();
    let hasty = pair.alpha.place.start(Start::IncomingRunning).unwrap();
    hasty.qmp().execute("cont", json!({})).unwrap();
    let held = pair.alpha.hold_at("load").unwrap();
    let mut migration = pair
        .beta
        .host
        .start_migrate(pair.guest.name(), at_alpha.port, &VERIFIED)
        .unwrap();
    held.wait_reached(&mut migration).unwrap();
    assert_eq!(hasty.qmp().status().unwrap(), "inmigrate");
    // Everything is sent, and a source that does not answer cannot decide.
    migration.signal(Signal::STOP).unwrap();
    held.release().unwrap();
    while hasty.qmp().status().unwrap() == "inmigrate" {
        thread::sleep(Duration::from_millis(5));
    }
    // Time enough for a guest that could run to do so.
    thread::sleep(Duration::from_millis(500));
    assert_eq!(hasty.qmp().status().unwrap(), "paused");
    assert_eq!(waiting.qmp().status().unwrap(), "paused");
    assert_eq!(pair.guest.beats().count_from(hasty.pid()), 0);
    migration.signal(Signal::CONT).unwrap();
    let done = migration.wait(Duration::from_secs(120)).unwrap();
    let report = committed(&done, &at_alpha).unwrap();
    let back = pair
        .arrived(waiting.pid(), &pair.alpha, &done, report)
        .unwrap();
    verified_everything(&back);
    assert_eq!(back.pid, hasty.pid());
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 2);
}

/// `[WIRE-54]`
#[test]
fn what_a_guest_has_read_of_its_disk_goes_once() {
    const PREFILLED: u64 = 32 * MIB;
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("has-read")
        .memory_mib(192)
        .disk(Disk::raw(64 * MIB).prefilled(PREFILLED))
        .judge(JudgeParams {
            memory: 16 * MIB,
            dirty: 0,
            disk: 0,
            cached: true,
            ..JudgeParams::default()
        });
    let pair = pair(guest.build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let options = ["--compress", "1", "--max-bandwidth", "400Mbit"];
    let moved = go(
        &pair,
        (&pair.alpha, &pair.beta),
        &agent,
        &[&VERIFIED[..], &options].concat(),
    );
    verified_everything(&moved);
    let duplicates = moved.report["duplicate_blocks"].as_u64().unwrap();
    println!("{duplicates} blocks as duplicates: {}", moved.report);
    // Content of the disk does not repeat itself, so each is a page of the cache, or the block of one.
    assert!(duplicates > PREFILLED / 4096 * 3 / 4, "{}", moved.report);
    assert!(!source.is_alive());
    pair.unbroken(1).unwrap();
}

#[test]
fn what_a_guest_discards_while_it_is_copied_is_a_hole_at_the_destination() {
    const DISCARDED: u64 = 16 * MIB;
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("discards")
        .memory_mib(128)
        .disk(Disk::raw(32 * MIB).prefilled(24 * MIB))
        .disk(Disk::qcow2(32 * MIB).prefilled(24 * MIB))
        .judge(JudgeParams {
            memory: 32 * MIB,
            disk: 0,
            ..JudgeParams::default()
        });
    let pair = pair(guest.build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let manual = [&VERIFIED[..], &["--cutover", "manual"]].concat();
    let begun = pair
        .alpha
        .host
        .start_migrate("discards", agent.port, &manual);
    let mut migration = begun.unwrap();
    wait_phase(&mut migration, "converged").unwrap();
    let before = [0, 1].map(|disk| allocated(&pair.alpha.place.image(disk)).unwrap());
    let copied = [0, 1].map(|disk| allocated(&pair.beta.place.image(disk)).unwrap());
    pair.guest.discard(DISCARDED).unwrap();
    let cutover = pair
        .alpha
        .host
        .ask(Role::Source, "cutover", "discards", &[]);
    assert_eq!(cutover.unwrap().code(), 0);
    let done = migration.wait(Duration::from_secs(120)).unwrap();
    let report = committed(&done, &agent).unwrap();
    let moved = pair.arrived(source.pid(), &pair.beta, &done, report);
    verified_everything(&moved.unwrap());
    for (disk, (before, copied)) in before.into_iter().zip(copied).enumerate() {
        let left = allocated(&pair.alpha.place.image(disk)).unwrap();
        let here = allocated(&pair.beta.place.image(disk)).unwrap();
        println!(
            "disk {disk}: {before} bytes, {left} after the discard; {copied} there, then {here}"
        );
        assert!(left + DISCARDED / 4 < before && here + DISCARDED / 4 < copied);
        assert!(here <= left + MIB, "disk {disk}");
    }
    pair.unbroken(1).unwrap();
}
