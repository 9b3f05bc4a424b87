//! The destination's transitions, each against the rule that it holds.

use super::testing::{KEY, OTHER_KEY, destination, process, why};
use super::{
    CopyFound, DestinationAction as A, DestinationEvent as E, DestinationHandover,
    DestinationRecord, DestinationState, RegisterAnswer,
};
use crate::ids::{Attempt, SessionNumber};
use crate::message::{AttemptKey, Outcome, PrepareTiming, ToSource, Verdict};
use crate::spec::RunState;

const ONE: Attempt = Attempt(1);
const TO: RunState = RunState::Running;

fn feed(machine: &mut DestinationHandover, events: impl IntoIterator<Item = E>) -> Vec<A> {
    let mut last = Vec::new();
    for event in events {
        let text = format!("{event:?} in {}", machine.state_name());
        last = machine
            .handle(event)
            .unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    last
}

fn session(number: u64) -> E {
    E::SessionOpened {
        session: SessionNumber(number),
    }
}

fn to_ready() -> Vec<E> {
    vec![
        session(1),
        E::Recorded,
        E::Offered,
        E::CopyMade { process: process() },
        E::Recorded,
    ]
}

fn to_opened() -> Vec<E> {
    let mut events = to_ready();
    events.extend([E::OpenAttempt { attempt: ONE }, E::Recorded]);
    events
}

fn to_prepared() -> Vec<E> {
    let mut events = to_opened();
    events.extend([
        E::StateReceived {
            attempt: ONE,
            to: TO,
        },
        E::StateLoaded {
            timing: PrepareTiming::default(),
        },
    ]);
    events
}

fn to_starting() -> Vec<E> {
    let mut events = to_prepared();
    events.extend([E::Commit(KEY), E::Recorded]);
    events
}

fn at(events: Vec<E>) -> DestinationHandover {
    let mut machine = destination();
    feed(&mut machine, events);
    machine
}

fn recorded(actions: &[A]) -> Option<&DestinationState> {
    actions.iter().find_map(|action| {
        if let A::Record(record) = action {
            Some(&record.state)
        } else {
            None
        }
    })
}

fn starts(actions: &[A]) -> bool {
    actions
        .iter()
        .any(|action| matches!(action, A::Start { .. }))
}

fn verdict(actions: &[A]) -> Option<&Verdict> {
    actions.iter().find_map(|action| {
        if let A::Send(ToSource::Outcome(Outcome { verdict, .. })) = action {
            Some(verdict)
        } else {
            None
        }
    })
}

#[test]
fn hand_3_the_good_case_starts_behind_owned_and_answers_behind_the_start() {
    let mut machine = at(to_prepared());
    let commit = feed(&mut machine, [E::Commit(KEY)]);
    assert!(matches!(
        recorded(&commit),
        Some(DestinationState::Owned { started: false, .. })
    ));
    assert!(!starts(&commit) && verdict(&commit).is_none());
    let owned = feed(&mut machine, [E::Recorded]);
    assert!(starts(&owned) && verdict(&owned).is_none());
    let started = feed(
        &mut machine,
        [E::Started {
            record_us: 5,
            start_us: 6,
        }],
    );
    assert_eq!(
        verdict(&started),
        Some(&Verdict::Committed {
            record_us: 5,
            start_us: 6
        })
    );
    assert!(matches!(
        recorded(&started),
        Some(DestinationState::Owned { started: true, .. })
    ));
}

#[test]
fn hand_2_an_attempt_is_opened_durably_before_it_is_answered() {
    let mut machine = at(to_ready());
    let open = feed(&mut machine, [E::OpenAttempt { attempt: ONE }]);
    assert_eq!(
        recorded(&open),
        Some(&DestinationState::Opened { attempt: ONE })
    );
    assert_eq!(open.len(), 1);
    let answered = feed(&mut machine, [E::Recorded]);
    assert_eq!(
        answered,
        [A::Send(ToSource::AttemptOpened { attempt: ONE })]
    );
}

#[test]
fn hand_5_commit_repeated_is_answered_the_same() {
    let mut machine = at(to_starting());
    feed(
        &mut machine,
        [E::Started {
            record_us: 5,
            start_us: 6,
        }],
    );
    for question in [E::Commit(KEY), E::Query(KEY)] {
        let again = feed(&mut machine, [question]);
        assert!(matches!(verdict(&again), Some(Verdict::Committed { .. })));
        assert!(!starts(&again), "the guest is started once");
    }
}

#[test]
fn hand_5_a_query_while_undecided_records_aborted_and_then_answers_it() {
    for until in [to_opened(), to_prepared()] {
        let mut machine = at(until);
        let asked = feed(&mut machine, [E::Query(KEY)]);
        assert!(matches!(
            recorded(&asked),
            Some(DestinationState::Aborted { attempt: ONE, .. })
        ));
        assert!(
            verdict(&asked).is_none(),
            "nothing is answered that is not durable"
        );
        let settled = feed(&mut machine, [E::Recorded]);
        assert!(matches!(verdict(&settled), Some(Verdict::Aborted(_))));
        let late = feed(&mut machine, [E::Commit(KEY)]);
        assert!(
            matches!(verdict(&late), Some(Verdict::Aborted(_))),
            "the first record stays"
        );
        assert!(!starts(&late));
    }
}

#[test]
fn hand_2_what_the_register_does_not_know_is_unknown_and_changes_nothing() {
    let higher = AttemptKey {
        attempt: Attempt(2),
        ..KEY
    };
    let zero = AttemptKey {
        attempt: Attempt(0),
        ..KEY
    };
    for key in [OTHER_KEY, higher, zero] {
        let mut machine = at(to_prepared());
        for question in [E::Commit(key), E::Query(key)] {
            let answer = feed(&mut machine, [question]);
            assert_eq!(verdict(&answer), Some(&Verdict::Unknown), "{key:?}");
            assert!(recorded(&answer).is_none());
        }
        assert_eq!(machine.state_name(), "PREPARED");
        assert_eq!(
            machine.record().answer(&key),
            RegisterAnswer::Settled(Verdict::Unknown)
        );
    }
}

#[test]
fn hand_2_a_lower_attempt_is_aborted_and_the_next_one_waits_for_it_to_be_settled() {
    let mut machine = at(to_opened());
    let two = Attempt(2);
    let settle = feed(&mut machine, [E::OpenAttempt { attempt: two }]);
    assert!(matches!(
        recorded(&settle),
        Some(DestinationState::Aborted { attempt: ONE, .. })
    ));
    let open = feed(&mut machine, [E::Recorded]);
    assert_eq!(
        recorded(&open),
        Some(&DestinationState::Opened { attempt: two })
    );
    feed(&mut machine, [E::Recorded]);
    let asked = feed(&mut machine, [E::Query(KEY)]);
    assert!(matches!(verdict(&asked), Some(Verdict::Aborted(_))));
    assert_eq!(machine.state_name(), "OPENED");
}

#[test]
fn hand_3_a_failed_owned_before_the_rename_aborts_and_after_it_is_repeated() {
    let fail = |visible| E::RecordFailed {
        visible,
        reason: why(),
    };
    let mut machine = at(to_prepared());
    let before = feed(&mut machine, [E::Commit(KEY), fail(false)]);
    assert!(matches!(
        recorded(&before),
        Some(DestinationState::Aborted { .. })
    ));

    let mut machine = at(to_prepared());
    let after = feed(&mut machine, [E::Commit(KEY), fail(true)]);
    assert!(recorded(&after).is_none() && after.contains(&A::RetryLater));
    let again = feed(&mut machine, [E::Commit(KEY)]);
    assert!(matches!(
        recorded(&again),
        Some(DestinationState::Owned { .. })
    ));
    // The second write fails before its rename: what the first one left may still be found.
    let again = feed(&mut machine, [fail(false)]);
    assert!(
        recorded(&again).is_none(),
        "OWNED may be visible: ABORTED must not replace it"
    );
    let again = feed(&mut machine, [E::Retry]);
    assert!(matches!(
        recorded(&again),
        Some(DestinationState::Owned { .. })
    ));
    assert!(starts(&feed(&mut machine, [E::Recorded])));
}

#[test]
fn hand_6_a_guest_that_never_ran_is_given_back_and_one_that_may_have_run_is_kept() {
    let failed = |never_ran| E::StartFailed {
        never_ran,
        reason: why(),
    };
    let mut machine = at(to_starting());
    let never = feed(&mut machine, [failed(true)]);
    assert!(matches!(
        recorded(&never),
        Some(DestinationState::Relinquished { .. })
    ));
    assert!(verdict(&never).is_none());
    let settled = feed(&mut machine, [E::Recorded]);
    assert!(matches!(verdict(&settled), Some(Verdict::Aborted(_))));
    assert!(!starts(&feed(&mut machine, [E::Retry])));

    let mut machine = at(to_starting());
    let maybe = feed(&mut machine, [failed(false)]);
    assert!(matches!(verdict(&maybe), Some(Verdict::Committed { .. })));
    assert!(machine.is_owned());
}

#[test]
fn hand_7_a_restart_settles_what_is_undecided_and_starts_what_is_owned() {
    let found = |state| DestinationRecord {
        state,
        ..at(to_prepared()).record()
    };
    let opened = found(DestinationState::Opened { attempt: ONE });
    let (_, actions) = DestinationHandover::recover(opened, CopyFound::Used);
    assert!(matches!(
        recorded(&actions),
        Some(DestinationState::Aborted { .. })
    ));

    let owned = |started| {
        found(DestinationState::Owned {
            attempt: ONE,
            to: TO,
            started,
        })
    };
    let (mut machine, actions) = DestinationHandover::recover(owned(false), CopyFound::Used);
    assert!(!starts(&actions), "what was read is made durable first");
    assert!(starts(&feed(&mut machine, [E::Recorded])));
    // An earlier process may have sent the start: "never ran" cannot be proven any more (`[HAND-6]`).
    feed(
        &mut machine,
        [E::StartFailed {
            never_ran: true,
            reason: why(),
        }],
    );
    assert!(machine.is_owned());

    let (mut machine, _) = DestinationHandover::recover(owned(true), CopyFound::Used);
    assert!(
        !starts(&feed(&mut machine, [E::Recorded])),
        "its users may have paused it"
    );
}

#[test]
fn hand_12_an_offer_settles_what_is_undecided_and_renews_a_used_copy_before_ready() {
    let mut machine = at(to_prepared());
    feed(&mut machine, [E::ConnectionLost, session(2), E::Recorded]);
    let offered = feed(&mut machine, [E::Offered]);
    assert!(matches!(
        recorded(&offered),
        Some(DestinationState::Aborted { .. })
    ));
    assert!(!offered.contains(&A::Ready));
    let settled = feed(&mut machine, [E::Recorded]);
    assert!(settled.contains(&A::MakeCopy { renew: true }));
    let made = feed(
        &mut machine,
        [E::CopyMade {
            process: super::ProcessRecord {
                pid: 9,
                ..process()
            },
        }],
    );
    assert!(recorded(&made).is_some() && !made.contains(&A::Ready));
    assert_eq!(feed(&mut machine, [E::Recorded]), [A::Ready]);
}

#[test]
fn hand_15_a_session_is_welcomed_when_its_number_is_durable_and_an_old_number_is_refused() {
    let mut machine = at(to_ready());
    let stale = feed(&mut machine, [session(1)]);
    assert!(matches!(stale.as_slice(), [A::Refuse(_)]));
    let new = feed(&mut machine, [session(2)]);
    assert!(matches!(new.as_slice(), [A::Record(_)]));
    let welcome = feed(&mut machine, [E::Recorded]);
    assert_eq!(
        welcome,
        [A::Welcome {
            session: SessionNumber(2)
        }]
    );
}

#[test]
fn an_owned_guest_cannot_be_given_up_and_an_ended_migration_is_aborted() {
    for until in [to_starting(), {
        let mut events = to_prepared();
        events.push(E::Commit(KEY));
        events
    }] {
        let mut machine = at(until);
        feed(&mut machine, [E::GiveUp { reason: why() }]);
        assert!(machine.is_owned());
    }
    let mut machine = at(to_prepared());
    let end = feed(&mut machine, [E::Cancel { reason: why() }]);
    assert!(matches!(
        recorded(&end),
        Some(DestinationState::Ended { last: ONE, .. })
    ));
    assert!(
        !end.contains(&A::Discard),
        "nothing is removed before it is durable"
    );
    assert!(feed(&mut machine, [E::Recorded]).contains(&A::Discard));
    let gone = feed(&mut machine, [E::Discarded]);
    assert!(gone.contains(&A::Send(ToSource::Cancelled)));
    let asked = feed(&mut machine, [E::Commit(KEY)]);
    assert!(matches!(verdict(&asked), Some(Verdict::Aborted(_))));
}

#[test]
fn a_cancel_while_the_copy_is_made_is_answered_by_cancelled_and_by_no_refusal() {
    let mut machine = at(vec![session(1), E::Recorded, E::Offered]);
    feed(&mut machine, [E::Cancel { reason: why() }, E::Recorded]);
    let made = feed(&mut machine, [E::CopyMade { process: process() }]);
    assert!(made.contains(&A::Discard), "{made:?}");
    assert!(!made.iter().any(|a| matches!(a, A::Refuse(_))), "{made:?}");
    let gone = feed(&mut machine, [E::Discarded]);
    assert!(gone.contains(&A::Send(ToSource::Cancelled)), "{gone:?}");
}

#[test]
fn between_the_opened_attempt_and_the_start_lies_one_record() {
    let mut machine = at(to_opened());
    let mut records = 0;
    let mut started = false;
    for event in to_starting().split_off(to_opened().len()) {
        for action in machine.handle(event).unwrap() {
            records += usize::from(matches!(action, A::Record(_)));
            started |= matches!(action, A::Start { .. });
        }
    }
    assert!(started);
    assert_eq!(records, 1);
}

#[test]
fn hand_12_a_launched_copy_is_named_durably_before_it_begins() {
    let mut machine = at(vec![session(1), E::Recorded, E::Offered]);
    let launched = feed(&mut machine, [E::CopyLaunched { process: process() }]);
    assert!(recorded(&launched).is_some() && !machine.names(&process()));
    let mut failing = machine.clone();
    feed(&mut machine, [E::Recorded]);
    assert!(machine.names(&process()));
    // It is the process that was named, so nothing stands between it and `Ready`.
    let made = feed(&mut machine, [E::CopyMade { process: process() }]);
    assert_eq!(made, [A::Ready]);
    for visible in [false, true] {
        let mut failing = failing.clone();
        let reason = why();
        let failed = feed(&mut failing, [E::RecordFailed { visible, reason }]);
        assert!(failed.contains(&A::Refuse(why())) && !failing.names(&process()));
    }
    feed(&mut failing, [E::Recorded]);
    let late = E::CopyLaunched { process: process() };
    assert!(
        at(to_ready()).handle(late).is_err(),
        "no copy is being made"
    );
}
