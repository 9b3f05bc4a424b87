//! The source's transitions, each against the rule that it holds.

use super::testing::{KEY, OTHER_KEY, source, why};
use super::{
    SourceAction as A, SourceEnd, SourceEvent as E, SourceHandover, SourceReport, SourceState,
    Timer, back_off,
};
use crate::ids::{Attempt, SessionNumber};
use crate::message::{Outcome, ToDestination, Verdict};
use crate::spec::RunState;

const ONE: Attempt = Attempt(1);
const COMMITTED: Verdict = Verdict::Committed {
    record_us: 1,
    start_us: 2,
};

fn feed(machine: &mut SourceHandover, events: impl IntoIterator<Item = E>) -> Vec<A> {
    let mut last = Vec::new();
    for event in events {
        let text = format!("{event:?} in {}", machine.state_name());
        last = machine
            .handle(event)
            .unwrap_or_else(|error| panic!("{text}: {error}"));
    }
    last
}

fn connect() -> [E; 3] {
    [
        E::ConnectWanted,
        E::Recorded,
        E::Connected {
            register: KEY.register,
        },
    ]
}

fn to_streaming() -> Vec<E> {
    let mut events = connect().to_vec();
    events.extend([
        E::BeginCutover {
            run_state: RunState::Running,
        },
        E::AttemptOpened { attempt: ONE },
        E::Recorded,
        E::GuestPaused {
            before: RunState::Running,
        },
    ]);
    events
}

fn to_committing() -> Vec<E> {
    let mut events = to_streaming();
    events.extend([
        E::FinalSent { attempt: ONE },
        E::Prepared { key: KEY },
        E::StillPaused { attempt: ONE },
    ]);
    events
}

fn to_doubt() -> Vec<E> {
    let mut events = to_committing();
    events.push(E::Recorded);
    events
}

fn at(shared: bool, events: Vec<E>) -> SourceHandover {
    let mut machine = source(shared);
    feed(&mut machine, events);
    machine
}

fn recorded(actions: &[A]) -> Option<&SourceState> {
    actions.iter().find_map(|action| {
        if let A::Record(record) = action {
            Some(&record.state)
        } else {
            None
        }
    })
}

fn resumes(actions: &[A]) -> bool {
    actions
        .iter()
        .any(|action| matches!(action, A::Resume { .. }))
}

fn sent(actions: &[A]) -> Vec<&ToDestination> {
    actions
        .iter()
        .filter_map(|action| {
            if let A::Send(message) = action {
                Some(message)
            } else {
                None
            }
        })
        .collect()
}

#[test]
fn hand_3_the_good_case_records_before_it_acts() {
    let mut machine = source(false);
    let wanted = feed(&mut machine, [E::ConnectWanted]);
    assert_eq!(
        recorded(&wanted),
        Some(&SourceState::Copying { last: Attempt(0) })
    );
    assert_eq!(
        feed(&mut machine, [E::Recorded]),
        [A::Connect {
            session: SessionNumber(1)
        }]
    );
    let mut machine = at(false, connect().to_vec());
    let begun = feed(
        &mut machine,
        [E::BeginCutover {
            run_state: RunState::Running,
        }],
    );
    assert_eq!(sent(&begun), [&ToDestination::OpenAttempt { attempt: ONE }]);
    let opened = feed(&mut machine, [E::AttemptOpened { attempt: ONE }]);
    assert_eq!(
        recorded(&opened),
        Some(&SourceState::Pausing { attempt: ONE })
    );
    assert_eq!(
        opened.len(),
        1,
        "nothing is paused before PAUSING is durable"
    );
    let pause = feed(&mut machine, [E::Recorded]);
    assert!(pause.contains(&A::PauseGuest { attempt: ONE }));

    let mut machine = at(false, to_committing());
    assert!(
        machine.is_in_doubt(),
        "from the moment COMMITTING is handed to the journal"
    );
    let commit = feed(&mut machine, [E::Recorded]);
    assert_eq!(sent(&commit), [&ToDestination::Commit(KEY)]);
    let released = feed(
        &mut machine,
        [E::Outcome(Outcome {
            key: KEY,
            verdict: COMMITTED,
        })],
    );
    assert_eq!(
        recorded(&released),
        Some(&SourceState::Released { key: KEY })
    );
    assert!(
        !released.contains(&A::Release),
        "the copy stays until RELEASED is durable"
    );
    assert!(feed(&mut machine, [E::Recorded]).contains(&A::Release));
    assert!(feed(&mut machine, [E::Released]).contains(&A::Done(SourceEnd::Committed)));
}

#[test]
fn hand_3_every_failure_before_committing_rolls_back_and_resumes_only_behind_the_record() {
    let lost = || E::ConnectionLost { reason: why() };
    let mut awaiting = to_streaming();
    awaiting.push(E::FinalSent { attempt: ONE });
    let mut checking = awaiting.clone();
    checking.push(E::Prepared { key: KEY });
    let touched = E::GuestTouched { reason: why() };
    let overdue = E::TimedOut(Timer::Pause(ONE));
    let vetoed = E::AbortAttempt { reason: why() };
    let failed = E::StreamFailed {
        attempt: ONE,
        reason: why(),
    };
    for (until, end) in [
        (to_streaming(), lost()),
        (to_streaming(), failed),
        (to_streaming(), touched.clone()),
        (awaiting.clone(), lost()),
        (awaiting, overdue.clone()),
        (checking.clone(), touched),
        (checking.clone(), overdue),
        (checking, vetoed),
    ] {
        let mut machine = at(false, until);
        let name = machine.state_name();
        let actions = feed(&mut machine, [end.clone()]);
        let wish = recorded(&actions);
        assert!(
            matches!(wish, Some(SourceState::RolledBack { attempt: ONE, .. })),
            "{name} + {end:?} records {wish:?}"
        );
        assert!(
            !resumes(&actions),
            "{name} + {end:?} resumes before the record is durable"
        );
        assert!(actions.contains(&A::StopStream));
        assert!(resumes(&feed(&mut machine, [E::Recorded])));
        feed(&mut machine, [E::Resumed]);
        assert!(machine.is_copying());
    }
}

#[test]
fn hand_3_a_guest_that_cannot_be_rolled_back_durably_stays_paused_and_the_write_is_tried_again() {
    let mut machine = at(false, to_streaming());
    feed(&mut machine, [E::ConnectionLost { reason: why() }]);
    for visible in [false, true] {
        let actions = feed(
            &mut machine,
            [E::RecordFailed {
                visible,
                reason: why(),
            }],
        );
        assert!(!resumes(&actions));
        assert!(actions.contains(&A::StartTimer(Timer::Retry)));
        assert!(actions.contains(&A::Report(SourceReport::JournalFailed {
            guest_stays_paused: true,
            reason: why()
        })));
        let again = feed(&mut machine, [E::TimedOut(Timer::Retry)]);
        assert!(matches!(
            recorded(&again),
            Some(SourceState::RolledBack { .. })
        ));
    }
    assert!(resumes(&feed(&mut machine, [E::Recorded])));
}

#[test]
fn hand_3_a_failed_committing_before_the_rename_rolls_back_and_after_it_is_in_doubt() {
    let mut machine = at(false, to_committing());
    let before = feed(
        &mut machine,
        [E::RecordFailed {
            visible: false,
            reason: why(),
        }],
    );
    assert!(matches!(
        recorded(&before),
        Some(SourceState::RolledBack { .. })
    ));

    let mut machine = at(false, to_committing());
    let after = feed(
        &mut machine,
        [E::RecordFailed {
            visible: true,
            reason: why(),
        }],
    );
    assert!(machine.is_in_doubt() && recorded(&after).is_none() && !resumes(&after));
    assert_eq!(
        sent(&after),
        [&ToDestination::Query(KEY)],
        "Commit needs a durable COMMITTING"
    );
}

#[test]
fn hand_4_in_doubt_nothing_but_the_registers_own_answer_resumes() {
    let events = [
        E::ConnectionLost { reason: why() },
        E::TimedOut(Timer::Pause(ONE)),
        E::TimedOut(Timer::Doubt(ONE)),
        E::TimedOut(Timer::Retry),
        E::GuestTouched { reason: why() },
        E::Cancel { reason: why() },
        E::AbortAttempt { reason: why() },
        E::Outcome(Outcome {
            key: KEY,
            verdict: Verdict::Unknown,
        }),
        E::Outcome(Outcome {
            key: OTHER_KEY,
            verdict: Verdict::Aborted(why()),
        }),
    ];
    for event in events {
        let mut machine = at(false, to_doubt());
        let actions = feed(&mut machine, [event.clone()]);
        assert!(machine.is_in_doubt(), "{event:?} left the doubt");
        assert!(
            recorded(&actions).is_none() && !resumes(&actions),
            "{event:?}"
        );
    }
    let mut machine = at(false, to_doubt());
    let aborted = feed(
        &mut machine,
        [E::Outcome(Outcome {
            key: KEY,
            verdict: Verdict::Aborted(why()),
        })],
    );
    assert!(matches!(
        recorded(&aborted),
        Some(SourceState::RolledBack { .. })
    ));
    assert!(resumes(&feed(&mut machine, [E::Recorded])));
}

#[test]
fn hand_4_a_lost_answer_is_asked_for_again_on_a_new_session_and_query_replaces_commit_for_good() {
    let mut machine = at(false, to_doubt());
    let lost = feed(&mut machine, [E::ConnectionLost { reason: why() }]);
    assert!(lost.contains(&A::StartTimer(Timer::BackOff { failures: 1 })));
    let number = feed(&mut machine, [E::TimedOut(Timer::BackOff { failures: 1 })]);
    assert_eq!(
        recorded(&number),
        Some(&SourceState::Committing { key: KEY })
    );
    let connect = feed(&mut machine, [E::Recorded]);
    assert_eq!(
        connect,
        [A::Connect {
            session: SessionNumber(2)
        }]
    );
    let up = E::Connected {
        register: KEY.register,
    };
    assert_eq!(
        sent(&feed(&mut machine, [up.clone()])),
        [&ToDestination::Commit(KEY)]
    );
    let asked = feed(&mut machine, [E::Cancel { reason: why() }]);
    assert_eq!(sent(&asked), [&ToDestination::Query(KEY)]);
    feed(
        &mut machine,
        [
            E::ConnectionLost { reason: why() },
            E::ConnectWanted,
            E::Recorded,
        ],
    );
    assert_eq!(
        sent(&feed(&mut machine, [up])),
        [&ToDestination::Query(KEY)]
    );
}

#[test]
fn hand_7_a_restart_writes_what_it_found_again_and_then_finishes_it() {
    let found = |state| super::SourceRecord {
        state,
        run_state_before: RunState::Paused,
        ..at(false, to_doubt()).record()
    };
    let (mut machine, actions) =
        SourceHandover::recover(found(SourceState::Pausing { attempt: ONE }));
    assert!(matches!(
        recorded(&actions),
        Some(SourceState::RolledBack { attempt: ONE, .. })
    ));
    let resumed = feed(&mut machine, [E::Recorded]);
    assert!(
        resumed.iter().any(|action| matches!(
            action,
            A::Resume {
                to: RunState::Paused,
                ..
            }
        )),
        "a guest that was paused before is rolled back paused"
    );

    let rolled_back = SourceState::RolledBack {
        attempt: ONE,
        reason: why(),
    };
    let (mut machine, actions) = SourceHandover::recover(found(rolled_back.clone()));
    assert_eq!(recorded(&actions), Some(&rolled_back));
    assert!(resumes(&feed(&mut machine, [E::Recorded])));

    let (mut machine, actions) =
        SourceHandover::recover(found(SourceState::Committing { key: KEY }));
    assert!(machine.is_in_doubt() && !resumes(&actions));
    assert_eq!(
        recorded(&actions),
        Some(&SourceState::Committing { key: KEY })
    );
    let connect = feed(&mut machine, [E::Recorded]);
    assert_eq!(
        connect,
        [A::Connect {
            session: SessionNumber(2)
        }]
    );

    let (mut machine, actions) = SourceHandover::recover(found(SourceState::Released { key: KEY }));
    assert!(!actions.contains(&A::Release));
    assert!(feed(&mut machine, [E::Recorded]).contains(&A::Release));

    let copying = SourceState::Copying { last: ONE };
    let (machine, actions) = SourceHandover::recover(found(copying));
    assert!(machine.is_copying() && !resumes(&actions));
}

#[test]
fn hand_9_an_operator_resolves_only_doubt_and_never_resumes_with_shared_disks() {
    let mut machine = at(false, to_streaming());
    assert!(machine.handle(E::ResolveDestinationFenced).is_err());
    for shared in [false, true] {
        let mut machine = at(shared, to_doubt());
        let fenced = feed(&mut machine, [E::ResolveDestinationFenced]);
        assert_eq!(recorded(&fenced), Some(&SourceState::Fenced { key: KEY }));
        let done = feed(&mut machine, [E::Recorded]);
        assert_eq!(resumes(&done), !shared);
        assert_eq!(done.contains(&A::EndGuest), shared);
    }
    // The register's own word, before FENCED is durable, overrules the operator.
    let mut machine = at(false, to_doubt());
    let outcome = E::Outcome(Outcome {
        key: KEY,
        verdict: COMMITTED,
    });
    feed(&mut machine, [E::ResolveDestinationFenced, outcome]);
    let after = feed(&mut machine, [E::Recorded]);
    assert_eq!(recorded(&after), Some(&SourceState::Released { key: KEY }));
    assert!(!resumes(&after));
}

#[test]
fn hand_4_a_doubt_whose_guest_is_gone_is_settled_by_the_register_alone() {
    let lost = E::ConnectionLost { reason: why() };
    let found = at(false, to_doubt()).record();
    for (verdict, wanted) in [
        (COMMITTED, "RELEASED"),
        (Verdict::Aborted(why()), "ROLLED_BACK"),
    ] {
        let (mut machine, _) = SourceHandover::recover(found.clone());
        // The guest's end settles nothing.
        feed(&mut machine, [E::GuestTouched { reason: why() }]);
        assert!(machine.is_in_doubt());
        feed(
            &mut machine,
            [
                E::Recorded,
                E::Connected {
                    register: KEY.register,
                },
            ],
        );
        let answer = E::Outcome(Outcome { key: KEY, verdict });
        let settled = feed(&mut machine, [answer]);
        assert_eq!(recorded(&settled).map(SourceState::name), Some(wanted));
        let done = feed(&mut machine, [E::Recorded]);
        if resumes(&done) {
            feed(&mut machine, [E::GuestGone]);
            assert!(machine.is_copying());
            feed(
                &mut machine,
                [
                    lost.clone(),
                    E::Recorded,
                    E::Cancel { reason: why() },
                    E::Recorded,
                ],
            );
            let end = machine.end();
            assert!(matches!(end, Some(SourceEnd::NotCommitted { .. })));
        } else {
            assert!(done.contains(&A::Release));
        }
    }
    let mut machine = at(false, to_doubt());
    feed(
        &mut machine,
        [E::ResolveDestinationFenced, E::Recorded, E::GuestGone],
    );
    assert_eq!(machine.end(), Some(&SourceEnd::EndedByOperator));
    let early = at(false, to_doubt()).handle(E::GuestGone);
    assert!(early.is_err(), "nobody was to be resumed");
}

#[test]
fn hand_9_a_fenced_that_a_restart_found_is_not_overruled_since_the_guest_may_run_already() {
    let found = super::SourceRecord {
        state: SourceState::Fenced { key: KEY },
        ..at(false, to_doubt()).record()
    };
    let (mut machine, _) = SourceHandover::recover(found);
    let outcome = E::Outcome(Outcome {
        key: KEY,
        verdict: COMMITTED,
    });
    let after = feed(&mut machine, [outcome, E::Recorded]);
    assert!(resumes(&after));
}

#[test]
fn what_failed_with_the_guest_is_tried_again_after_a_while() {
    let again = A::StartTimer(Timer::Retry);
    let lost = E::ConnectionLost { reason: why() };
    let mut resuming = at(false, to_streaming());
    feed(&mut resuming, [lost, E::Recorded]);
    let failed = feed(&mut resuming, [E::ResumeFailed { reason: why() }]);
    assert!(failed.contains(&again));
    assert!(resumes(&feed(&mut resuming, [E::TimedOut(Timer::Retry)])));
    let committed = E::Outcome(Outcome {
        key: KEY,
        verdict: COMMITTED,
    });
    let mut releasing = at(false, to_doubt());
    feed(&mut releasing, [committed, E::Recorded]);
    let failed = feed(&mut releasing, [E::ReleaseFailed { reason: why() }]);
    assert!(failed.contains(&again));
    let released = feed(&mut releasing, [E::TimedOut(Timer::Retry)]);
    assert!(released.contains(&A::Release));
}

#[test]
fn hand_10_another_run_state_at_the_pause_aborts_and_is_what_the_rollback_restores() {
    let mut events = to_streaming();
    events.pop();
    let mut machine = at(false, events);
    let actions = feed(
        &mut machine,
        [E::GuestPaused {
            before: RunState::Paused,
        }],
    );
    assert!(matches!(
        recorded(&actions),
        Some(SourceState::RolledBack { .. })
    ));
    let resumed = feed(&mut machine, [E::Recorded]);
    assert!(resumed.iter().any(|action| matches!(
        action,
        A::Resume {
            to: RunState::Paused,
            ..
        }
    )));
}

#[test]
fn hand_10_a_touch_while_committing_is_written_turns_commit_into_query() {
    let mut machine = at(false, to_committing());
    feed(&mut machine, [E::GuestTouched { reason: why() }]);
    assert_eq!(
        sent(&feed(&mut machine, [E::Recorded])),
        [&ToDestination::Query(KEY)]
    );
}

#[test]
fn prepared_counts_only_after_everything_was_sent_and_from_the_register_that_welcomed() {
    let mut machine = at(false, to_streaming());
    assert!(
        machine.handle(E::Prepared { key: KEY }).is_err(),
        "too early"
    );
    feed(&mut machine, [E::FinalSent { attempt: ONE }]);
    assert!(machine.handle(E::Prepared { key: OTHER_KEY }).is_err());
    feed(&mut machine, [E::Prepared { key: KEY }]);
}

#[test]
fn a_cancel_waits_for_a_pause_under_way_and_ends_the_migration_after_the_rollback() {
    let mut events = to_streaming();
    events.pop();
    let mut machine = at(false, events);
    let cancelled = feed(&mut machine, [E::Cancel { reason: why() }]);
    assert!(
        recorded(&cancelled).is_none(),
        "the pause has not been answered"
    );
    let paused = feed(
        &mut machine,
        [E::GuestPaused {
            before: RunState::Running,
        }],
    );
    assert!(matches!(
        recorded(&paused),
        Some(SourceState::RolledBack { .. })
    ));
    assert!(resumes(&feed(&mut machine, [E::Recorded])));
    let ended = feed(&mut machine, [E::Resumed]);
    assert!(matches!(
        recorded(&ended),
        Some(SourceState::Ended { last: ONE, .. })
    ));
    let told = feed(&mut machine, [E::Recorded]);
    assert_eq!(sent(&told), [&ToDestination::Cancel { reason: why() }]);
    let done = feed(&mut machine, [E::Cancelled]);
    assert!(done.contains(&A::Done(SourceEnd::NotCommitted {
        reason: why(),
        peer_told: true
    })));
}

#[test]
fn back_off_grows_to_five_seconds() {
    let millis: Vec<u128> = (0..9).map(|n| back_off(n).as_millis()).collect();
    assert_eq!(millis, [100, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
}

#[test]
fn between_pause_and_commit_lies_one_record() {
    let mut machine = source(false);
    let mut records = None;
    for event in to_doubt() {
        let actions = machine.handle(event).unwrap();
        for action in actions {
            if matches!(action, A::PauseGuest { .. }) {
                records = Some(0);
            }
            if matches!(action, A::Record(_)) {
                records = records.map(|count| count + 1);
            }
        }
    }
    assert_eq!(machine.state_name(), "IN-DOUBT");
    assert_eq!(records, Some(1));
}
