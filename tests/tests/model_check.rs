//! The handover's machines, checked exhaustively within bounds, and proof that the check bites.
//!
//! Owns the bounds and the pinned counts. A changed count means that the machines or the model behave differently: look at why before pinning
//! it anew. `cargo test -p vmferry-tests --test model_check -- --nocapture` prints every run.

use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};
use vmferry_tests::model::{Bounds, HandoverModel, Mutation, World};

/// One attempt in one session, no fault but an unreliable network and timers that fire at any time.
const CALM: Bounds = Bounds {
    attempts: 1,
    sessions: 1,
    crashes: 0,
    write_failures: 0,
    guest_failures: 0,
    touches: 0,
    cancels: 0,
    give_ups: 0,
    folder_switches: 0,
    newer_migrations: 0,
    fencing: false,
};

const DOUBT: &[&str] = &["in doubt, then committed", "in doubt, then aborted"];
/// Beginnings of the properties that say what must never happen.
const SAFETY: &[&str] = &["[HAND", "nothing"];
const DEAD: &[&str] = &[
    "dead in doubt, then committed",
    "dead in doubt, then bootable here",
];
const CRASH: &[&str] = &[
    "crash in COMMITTING, then committed",
    "crash in COMMITTING, then rolled back",
];

/// Checks every state within `bounds` and that all of `sometimes` was reached.
fn check(name: &str, model: HandoverModel, sometimes: &[&[&str]], pinned: usize) {
    let begun = Instant::now();
    let bounds = model.bounds;
    let checker = model.checker().threads(2).spawn_bfs().join();
    let states = checker.unique_state_count();
    println!(
        "{name}: {states} states, {} transitions, {:.1} s, {bounds:?}",
        checker.state_count(),
        begun.elapsed().as_secs_f32()
    );
    assert!(checker.is_done());
    let found = checker.discoveries();
    for (property, path) in &found {
        let always = property.starts_with("[HAND")
            || property.starts_with("nothing")
            || property.starts_with("without");
        assert!(
            !always,
            "{name}: broken: {property}\n{:#?}\n{:#?}",
            path.last_state(),
            path.clone().into_actions()
        );
    }
    for wanted in [&["committed", "rolled back"][..]]
        .iter()
        .chain(sometimes)
        .copied()
        .flatten()
    {
        assert!(found.contains_key(wanted), "{name}: never {wanted}");
    }
    assert_eq!(states, pinned, "{name}: the number of states has changed");
}

#[test]
fn two_attempts_over_two_sessions() {
    let bounds = Bounds {
        attempts: 2,
        sessions: 2,
        ..CALM
    };
    check("two attempts", HandoverModel::new(bounds), &[DOUBT], 74_906);
}

#[test]
fn either_agent_crashes_twice_at_any_step() {
    let bounds = Bounds {
        sessions: 2,
        crashes: 2,
        ..CALM
    };
    check(
        "crashes",
        HandoverModel::new(bounds),
        &[DOUBT, CRASH],
        190_913,
    );
}

#[test]
fn a_crash_a_failed_write_and_a_failing_guest() {
    let bounds = Bounds {
        crashes: 1,
        write_failures: 1,
        guest_failures: 1,
        ..CALM
    };
    check(
        "crash, write, guest",
        HandoverModel::new(bounds),
        &[DOUBT, CRASH, DEAD],
        114_381,
    );
}

#[test]
fn people_cancel_touch_give_up_and_fence_while_the_journal_fails() {
    let bounds = Bounds {
        write_failures: 1,
        touches: 1,
        cancels: 1,
        give_ups: 1,
        fencing: true,
        ..CALM
    };
    check("people", HandoverModel::new(bounds), &[DOUBT], 92_467);
}

#[test]
fn people_cancel_and_fence_while_agents_crash() {
    let bounds = Bounds {
        crashes: 1,
        cancels: 1,
        fencing: true,
        ..CALM
    };
    let model = HandoverModel::new(bounds);
    check("people and crashes", model, &[DOUBT, CRASH], 24_489);
}

#[test]
fn the_destination_comes_back_with_another_state_folder() {
    let bounds = Bounds {
        crashes: 1,
        folder_switches: 1,
        ..CALM
    };
    let model = HandoverModel::new(bounds).begun_at(World::with_an_abort_in_the_other_folder());
    check("folders", model, &[DOUBT, CRASH], 10_102);
}

#[test]
fn the_guest_moves_on_and_comes_back_while_its_first_source_is_in_doubt() {
    let model = HandoverModel::new(REPLACED);
    check("replaced", model, &[DOUBT, CRASH], 28_184);
}

/// A newer migration takes the place of the checked one at the destination.
const REPLACED: Bounds = Bounds {
    crashes: 1,
    give_ups: 1,
    newer_migrations: 1,
    ..CALM
};

#[test]
fn a_register_that_forgets_leaves_a_source_in_doubt_for_ever() {
    let mut model = HandoverModel::broken(REPLACED, Mutation::ForgetsEarlier);
    model.check_ending = true;
    bites(model, &["without more faults"]);
}

/// With one rule broken around the real machines there must be a counter-example to a property that begins like this.
fn bites(model: HandoverModel, properties: &[&str]) {
    let mutation = model.mutation;
    let checker = model
        .checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let found = checker
        .discoveries()
        .into_iter()
        .find(|(property, _)| properties.iter().any(|begin| property.starts_with(begin)));
    let Some((property, path)) = found else {
        panic!(
            "{mutation:?} was not noticed in {} states",
            checker.unique_state_count()
        );
    };
    println!(
        "{mutation:?}: against \"{property}\" in {} steps ({:?})",
        path.clone().into_actions().len(),
        path.last_state().bad
    );
}

#[test]
fn each_broken_rule_has_a_counter_example() {
    let failing = Bounds {
        write_failures: 1,
        ..CALM
    };
    for mutation in [
        Mutation::ResumeInDoubt,
        Mutation::ResumeBeforeRolledBack,
        Mutation::FailedCommittingIsNone,
        Mutation::StartBeforeOwned,
        Mutation::StartsByItself,
        Mutation::LetGoUnnamed,
    ] {
        bites(HandoverModel::broken(failing, mutation), SAFETY);
    }
    let switching = Bounds {
        crashes: 1,
        folder_switches: 1,
        ..CALM
    };
    bites(
        HandoverModel::broken(switching, Mutation::UnknownIsAborted),
        SAFETY,
    );
    bites(
        HandoverModel::broken(switching, Mutation::BelieveOtherRegister)
            .begun_at(World::with_an_abort_in_the_other_folder()),
        SAFETY,
    );
}
