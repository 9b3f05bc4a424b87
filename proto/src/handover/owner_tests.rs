//! Who may run the guest, and who is let in, by the journals alone (`[HAND-11]`).

use super::testing::{KEY, OTHER_KEY, destination, source, why};
use super::{
    Admission, DestinationRecord, DestinationState, MAX_EARLIER, OwnershipClaim, RegisterAnswer,
    SourceRecord, SourceState, admit, owner_of_host,
};
use crate::error::ErrorCode;
use crate::ids::{Attempt, Generation, MigrationId, SessionNumber};
use crate::message::{AttemptKey, Hello, Verdict};
use crate::spec::RunState;
use crate::version::{Features, SUPPORTED};

fn src(generation: u64, state: SourceState) -> SourceRecord {
    SourceRecord {
        generation: Generation(generation),
        migration: MigrationId::from_bytes([9; 16]),
        state,
        ..source(false).record()
    }
}

fn dst(generation: u64, state: DestinationState) -> DestinationRecord {
    DestinationRecord {
        generation: Generation(generation),
        session: SessionNumber(3),
        state,
        ..destination().record()
    }
}

const OWNED: DestinationState = DestinationState::Owned {
    attempt: Attempt(1),
    to: RunState::Running,
    started: true,
};
const RELEASED: SourceState = SourceState::Released { key: KEY };

fn hello(generation: u64, session: u64) -> Hello {
    Hello {
        versions: SUPPORTED,
        features: Features::default(),
        guest: "web".parse().unwrap(),
        migration: KEY.migration,
        generation: Generation(generation),
        session: SessionNumber(session),
        lanes: 1,
        connections: 1,
        connection: 0,
    }
}

#[test]
fn after_there_and_back_the_highest_generation_counts() {
    let claim = |s: Option<&SourceRecord>, d: Option<&DestinationRecord>| {
        owner_of_host(s, d).map(|owner| owner.claim)
    };
    assert_eq!(claim(None, None), None);
    let (left, back) = (src(1, RELEASED), dst(2, OWNED));
    assert_eq!(claim(Some(&left), None), Some(OwnershipClaim::Elsewhere));
    assert_eq!(claim(Some(&left), Some(&back)), Some(OwnershipClaim::Here));
    let (came, gone) = (dst(1, OWNED), src(2, RELEASED));
    assert_eq!(
        claim(Some(&gone), Some(&came)),
        Some(OwnershipClaim::Elsewhere)
    );
    let doubt = src(2, SourceState::Committing { key: KEY });
    assert_eq!(
        claim(Some(&doubt), Some(&came)),
        Some(OwnershipClaim::InDoubt)
    );
    let attempt = Attempt(1);
    let pausing = src(2, SourceState::Pausing { attempt });
    assert_eq!(
        claim(Some(&pausing), Some(&came)),
        Some(OwnershipClaim::NotYet)
    );
    // Both ends within one host.
    let opened = dst(2, DestinationState::Opened { attempt });
    assert_eq!(
        claim(Some(&pausing), Some(&opened)),
        Some(OwnershipClaim::NotYet)
    );
}

#[test]
fn a_known_migration_is_let_in_only_by_its_opener_with_a_new_session_number() {
    let known = dst(4, DestinationState::Receiving);
    let code = |hello: &Hello, sender: &str| {
        admit(hello, sender, None, Some(&known)).map_err(|error| error.code)
    };
    assert_eq!(code(&hello(4, 4), "alpha"), Ok(Admission::Known));
    assert_eq!(code(&hello(4, 3), "alpha"), Err(ErrorCode::StaleSession));
    assert_eq!(code(&hello(4, 4), "mallory"), Err(ErrorCode::NotAuthorized));
    assert_eq!(
        code(&hello(5, 4), "alpha"),
        Err(ErrorCode::ProtocolViolation)
    );
}

#[test]
fn a_new_migration_needs_a_higher_generation_and_a_guest_that_is_free_here() {
    let other = Hello {
        migration: MigrationId::from_bytes([7; 16]),
        ..hello(5, 1)
    };
    let code = |s: Option<&SourceRecord>, d: Option<&DestinationRecord>| {
        admit(&other, "gamma", s, d).map_err(|error| error.code)
    };
    assert_eq!(code(None, None), Ok(Admission::New));
    assert_eq!(code(Some(&src(4, RELEASED)), None), Ok(Admission::New));
    assert_eq!(
        code(Some(&src(4, RELEASED)), Some(&dst(3, OWNED))),
        Ok(Admission::New)
    );
    assert_eq!(
        code(Some(&src(5, RELEASED)), None),
        Err(ErrorCode::StaleSession)
    );
    assert_eq!(code(None, Some(&dst(4, OWNED))), Err(ErrorCode::GuestBusy));
    let copying = src(4, SourceState::Copying { last: Attempt(0) });
    assert_eq!(code(Some(&copying), None), Err(ErrorCode::GuestBusy));
    let undecided = dst(
        4,
        DestinationState::Opened {
            attempt: Attempt(1),
        },
    );
    assert_eq!(code(None, Some(&undecided)), Err(ErrorCode::GuestBusy));
    let ended = dst(
        4,
        DestinationState::Ended {
            last: Attempt(1),
            reason: why(),
        },
    );
    assert_eq!(code(None, Some(&ended)), Ok(Admission::New));
}

/// The record of a newer migration that replaced one which ended like this.
fn replaced(state: DestinationState) -> DestinationRecord {
    let earlier = dst(4, state).outcomes();
    DestinationRecord {
        migration: MigrationId::from_bytes([7; 16]),
        sender: "gamma".to_owned(),
        earlier,
        ..dst(6, DestinationState::Receiving)
    }
}

#[test]
fn hand_16_a_replaced_migration_is_answered_for_ever() {
    let verdict = |state, key: &AttemptKey| match replaced(state).answer(key) {
        RegisterAnswer::Settled(verdict) => verdict,
        RegisterAnswer::Undecided => panic!("undecided"),
    };
    assert!(matches!(verdict(OWNED, &KEY), Verdict::Committed { .. }));
    let lost = DestinationState::Ended {
        last: Attempt(2),
        reason: why(),
    };
    assert!(matches!(verdict(lost.clone(), &KEY), Verdict::Aborted(_)));
    // Of two attempts the first was aborted, though the second was committed.
    let second = DestinationState::Owned {
        attempt: Attempt(2),
        to: RunState::Running,
        started: true,
    };
    assert!(matches!(verdict(second, &KEY), Verdict::Aborted(_)));
    let later = AttemptKey {
        attempt: Attempt(3),
        ..KEY
    };
    assert_eq!(verdict(lost.clone(), &later), Verdict::Unknown);
    assert_eq!(verdict(lost, &OTHER_KEY), Verdict::Unknown);
    // Nobody is in doubt about a migration without an attempt.
    assert_eq!(verdict(DestinationState::Receiving, &KEY), Verdict::Unknown);
}

#[test]
fn hand_16_only_the_sender_of_a_replaced_migration_may_ask_about_it() {
    let record = replaced(OWNED);
    let admission = |sender| admit(&hello(4, 9), sender, None, Some(&record));
    assert_eq!(admission("alpha"), Ok(Admission::Replaced));
    assert_eq!(
        admission("gamma").unwrap_err().code,
        ErrorCode::NotAuthorized
    );
}

#[test]
fn hand_16_the_oldest_outcomes_are_forgotten_first() {
    let mut record = dst(1, OWNED);
    for generation in 2..100u8 {
        record = DestinationRecord {
            migration: MigrationId::from_bytes([generation; 16]),
            earlier: record.outcomes(),
            ..dst(u64::from(generation), OWNED)
        };
    }
    assert_eq!(record.earlier.len(), MAX_EARLIER);
    let newest = record.earlier.last().unwrap().migration;
    assert_eq!(newest, MigrationId::from_bytes([98; 16]));
}
