//! Both agents' own drive loops in a simulated world: many seeds, and broken parts that the checkers must find.
//!
//! `vmferry-simulate --replay SEED` prints the log of a seed that fails here.

use std::sync::{Arc, OnceLock};

use vmferry_tests::simulation::{Flaw, Ground, Rule, command, run};

/// Runs in a test run: they take most of a minute of two cores.
const RUNS: u64 = 2_000;
/// Seeds within which each flaw must be found.
const ENOUGH: u64 = 400;

fn ground() -> &'static Arc<Ground> {
    static GROUND: OnceLock<Arc<Ground>> = OnceLock::new();
    GROUND.get_or_init(|| Arc::new(Ground::new().expect("certificates in a temporary folder")))
}

#[test]
fn every_rule_is_kept_in_a_few_thousand_runs() {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let tally = command::runs(1, RUNS, threads, ground());
    println!("{tally}");
    assert!(
        tally.broken.is_empty(),
        "see `vmferry-simulate --replay SEED`: {:?}",
        tally.broken
    );
    assert_eq!(tally.runs, RUNS);
    // What never happened was not tested.
    for end in ["committed", "rolled-back", "cancelled", "failed"] {
        assert!(tally.ends.contains_key(end), "no run ended {end}");
    }
    for met in [
        "source agent killed",
        "destination agent killed",
        "both agents killed",
        "hypervisor died",
        "power cut",
        "link cut",
        "an order or a disk failed",
        "restarted in doubt",
        "restarted while paused",
        "left in doubt",
        "destination lost for good",
        "booted by `owner`'s word",
        "agent and hypervisor killed",
        "launched, and its agent killed before it was recorded",
        "gone on with the source's ledger",
        "gone on with the destination's copy",
        "gone on with the disks that the destination flushed",
        "started by a later agent",
        "source agent killed, its ledger lost",
        "found equal at the destination, the ledger lost",
        "sent as references to other blocks",
        "reset in the pause",
    ] {
        assert!(tally.seen.contains_key(met), "no run met: {met}");
    }
}

#[test]
fn a_seed_replays_to_the_same_log() {
    for seed in 1..=40 {
        let [first, second] = [(); 2].map(|()| {
            let facts = run(seed, None, ground()).facts;
            facts.iter().map(ToString::to_string).collect::<Vec<_>>()
        });
        let differs = first.iter().zip(&second).find(|(a, b)| a != b);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(first.len(), second.len(), "seed {seed}");
    }
}

/// The first rule that is broken with this flaw.
fn found(flaw: Flaw) -> Rule {
    for seed in 1..=ENOUGH {
        if let Err(broken) = run(seed, Some(flaw), ground()).verdict {
            println!("{flaw:?}, seed {seed}: {broken}");
            return broken.rule;
        }
    }
    panic!("{flaw:?} was not found in {ENOUGH} runs");
}

#[test]
fn a_lost_dirty_mark_is_found() {
    assert_eq!(found(Flaw::LosesMarks), Rule::NoMarkLost);
}

#[test]
fn a_skipped_barrier_is_found() {
    assert_eq!(found(Flaw::SkipsBarrier), Rule::NoMarkLost);
}

#[test]
fn a_lost_write_is_found() {
    assert_eq!(found(Flaw::LosesWrites), Rule::NoMarkLost);
}

#[test]
fn a_copy_that_starts_by_itself_is_found() {
    assert_eq!(found(Flaw::StartsByItself), Rule::Recorded);
}

#[test]
fn a_guest_that_is_resumed_without_a_permit_is_found() {
    assert!(matches!(
        found(Flaw::ResumesAtAttach),
        Rule::Recorded | Rule::OneRunner
    ));
}

#[test]
fn a_disk_that_lies_about_its_syncs_is_found() {
    assert_eq!(found(Flaw::LyingSync), Rule::Recorded);
}

#[test]
fn a_scan_that_is_told_too_late_is_found() {
    assert_eq!(found(Flaw::ForgetsScan), Rule::NoMarkLost);
}

#[test]
fn a_bitmap_that_goes_before_it_was_told_is_found() {
    assert_eq!(found(Flaw::ForgetsBitmap), Rule::NoMarkLost);
}

#[test]
fn a_flush_that_was_none_is_found() {
    assert_eq!(found(Flaw::ClaimsFlushed), Rule::NoMarkLost);
}

#[test]
fn a_hypervisor_that_nobody_knows_is_found() {
    assert_eq!(found(Flaw::BeginsUnrecorded), Rule::Settled);
}
