//! The transition tables of both machines, explored and compared with the committed text: a changed edge is a visible diff.
//!
//! Every state that a short list of events reaches (one attempt, two sessions, every event in every state) is visited; each edge that
//! changes the state's name or asks for something is a line. `VMFERRY_BLESS=1 cargo test -p vmferry-proto` rewrites the file.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::fmt::Debug;

use super::testing::{KEY, OTHER_KEY, destination, process, source, why};
use super::{DestinationEvent as D, DestinationHandover, SourceEvent as S, SourceHandover, Timer};
use crate::ids::{Attempt, SessionNumber};
use crate::message::{Outcome, PrepareTiming, Verdict};
use crate::spec::RunState;

const ONE: Attempt = Attempt(1);

fn source_events() -> Vec<S> {
    let outcome = |key, verdict| S::Outcome(Outcome { key, verdict });
    vec![
        S::ConnectWanted,
        S::Connected {
            register: KEY.register,
        },
        S::ConnectionLost { reason: why() },
        S::BeginCutover {
            run_state: RunState::Running,
        },
        S::AttemptOpened { attempt: ONE },
        S::GuestPaused {
            before: RunState::Running,
        },
        S::PauseFailed {
            before: None,
            reason: why(),
        },
        S::FinalSent { attempt: ONE },
        S::StreamFailed {
            attempt: ONE,
            reason: why(),
        },
        S::Prepared { key: KEY },
        S::StillPaused { attempt: ONE },
        S::GuestTouched { reason: why() },
        S::Recorded,
        S::RecordFailed {
            visible: false,
            reason: why(),
        },
        S::RecordFailed {
            visible: true,
            reason: why(),
        },
        outcome(
            KEY,
            Verdict::Committed {
                record_us: 0,
                start_us: 0,
            },
        ),
        outcome(KEY, Verdict::Aborted(why())),
        outcome(KEY, Verdict::Unknown),
        outcome(OTHER_KEY, Verdict::Aborted(why())),
        S::Resumed,
        S::GuestGone,
        S::ResumeFailed { reason: why() },
        S::Released,
        S::ReleaseFailed { reason: why() },
        S::GuestEnded,
        S::EndGuestFailed { reason: why() },
        S::Cancelled,
        S::TimedOut(Timer::Open(ONE)),
        S::TimedOut(Timer::Pause(ONE)),
        S::TimedOut(Timer::Doubt(ONE)),
        S::TimedOut(Timer::BackOff { failures: 1 }),
        S::TimedOut(Timer::Retry),
        S::TimedOut(Timer::Cancel),
        S::AbortAttempt { reason: why() },
        S::Cancel { reason: why() },
        S::ResolveDestinationFenced,
    ]
}

fn destination_events() -> Vec<D> {
    vec![
        D::SessionOpened {
            session: SessionNumber(1),
        },
        D::SessionOpened {
            session: SessionNumber(2),
        },
        D::ConnectionLost,
        D::Offered,
        D::CopyLaunched { process: process() },
        D::CopyMade { process: process() },
        D::MakeCopyFailed { reason: why() },
        D::CopyLost { reason: why() },
        D::OpenAttempt { attempt: ONE },
        D::OpenAttempt {
            attempt: Attempt(2),
        },
        D::StateReceived {
            attempt: ONE,
            to: RunState::Running,
        },
        D::StateLoaded {
            timing: PrepareTiming::default(),
        },
        D::LoadFailed { reason: why() },
        D::AttemptFailed { reason: why() },
        D::Commit(KEY),
        D::Query(KEY),
        D::Query(OTHER_KEY),
        D::Abort {
            attempt: ONE,
            reason: why(),
        },
        D::Cancel { reason: why() },
        D::Recorded,
        D::RecordFailed {
            visible: false,
            reason: why(),
        },
        D::RecordFailed {
            visible: true,
            reason: why(),
        },
        D::Started {
            record_us: 0,
            start_us: 0,
        },
        D::StartFailed {
            never_ran: true,
            reason: why(),
        },
        D::StartFailed {
            never_ran: false,
            reason: why(),
        },
        D::Discarded,
        D::DiscardFailed { reason: why() },
        D::GiveUp { reason: why() },
        D::Retry,
    ]
}

/// The words of a value that name what it is: variants and flags, no data that only people read.
fn label(value: &impl Debug) -> String {
    let text = format!("{value:?}")
        .replace("shared_disks: true", "")
        .replace("shared_disks: false", "");
    let mut words = Vec::new();
    for word in text.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ':') {
        let named = word.starts_with(|c: char| c.is_ascii_uppercase())
            && !matches!(
                word,
                "WireError"
                    | "Internal"
                    | "Attempt"
                    | "AttemptKey"
                    | "MigrationId"
                    | "RegisterId"
                    | "SourceRecord"
                    | "DestinationRecord"
                    | "GuestName"
                    | "Generation"
                    | "SessionNumber"
                    | "Peer"
                    | "ProcessRecord"
                    | "RunPermit"
                    | "PrepareTiming"
                    | "Running"
                    | "Some"
                    | "None"
                    | "Cancelled"
                    | "TimedOut"
                    | "GuestChanged"
                    | "ShuttingDown"
                    | "GuestBusy"
                    | "StaleSession"
            );
        if named || matches!(word, "true" | "false") {
            words.push(word.to_owned());
        }
    }
    words.dedup();
    words.join(" ")
}

/// The label of an event; two of them are told apart by data.
fn event_label(event: &impl Debug) -> String {
    let text = format!("{event:?}");
    let mut name = label(event);
    if text.starts_with("Cancelled") {
        "Cancelled".clone_into(&mut name);
    }
    if text.starts_with("TimedOut") {
        name = format!("TimedOut {name}");
    }
    if text.contains(&format!("{:?}", OTHER_KEY.register)) {
        name.push_str(" (other register)");
    }
    for number in ["SessionNumber(2)", "attempt: Attempt(2)"] {
        if text.contains(number) {
            name.push_str(" 2");
        }
    }
    name
}

fn explore<M: Clone + Eq + std::hash::Hash, E: Clone + Debug, A: Debug>(
    begin: Vec<M>,
    events: &[E],
    name: impl Fn(&M) -> &'static str,
    handle: impl Fn(&mut M, E) -> Option<Vec<A>>,
    keep: impl Fn(&M) -> bool,
) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let mut seen: HashSet<M> = begin.iter().cloned().collect();
    let mut queue: VecDeque<M> = begin.into();
    while let Some(machine) = queue.pop_front() {
        for event in events {
            let mut next = machine.clone();
            let Some(actions) = handle(&mut next, event.clone()) else {
                assert!(next == machine, "an unexpected event changed the machine");
                continue;
            };
            if name(&next) != name(&machine) || !actions.is_empty() {
                let wanted: Vec<String> = actions.iter().map(label).collect();
                lines.insert(format!(
                    "{} + {} -> {}: {}",
                    name(&machine),
                    event_label(event),
                    name(&next),
                    wanted.join(", ")
                ));
            }
            if keep(&next) && seen.insert(next.clone()) {
                queue.push_back(next);
            }
        }
    }
    lines
}

fn table() -> String {
    let source = explore(
        vec![source(false), source(true)],
        &source_events(),
        SourceHandover::state_name,
        |machine, event| machine.handle(event).ok(),
        |machine| machine.session() <= SessionNumber(2) && machine.attempt() <= ONE,
    );
    let destination = explore(
        vec![destination()],
        &destination_events(),
        DestinationHandover::state_name,
        |machine, event| machine.handle(event).ok(),
        |machine| machine.attempt() <= ONE,
    );
    let mut text = String::from("source\n");
    for line in source {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text.push_str("\ndestination\n");
    for line in destination {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[test]
fn the_transition_tables_are_the_committed_ones() {
    let now = table();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/handover/transitions.txt");
    if std::env::var_os("VMFERRY_BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap();
    let (old, new): (BTreeSet<&str>, BTreeSet<&str>) =
        (committed.lines().collect(), now.lines().collect());
    let gone: Vec<_> = old.difference(&new).collect();
    let come: Vec<_> = new.difference(&old).collect();
    assert!(
        gone.is_empty() && come.is_empty(),
        "edges gone: {gone:#?}\nedges new: {come:#?}\nif this is meant: VMFERRY_BLESS=1 cargo test -p vmferry-proto"
    );
}
