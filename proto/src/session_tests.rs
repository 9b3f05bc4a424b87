//! Both session machines against each other, and each against a peer that breaks the order.

use crate::error::{ErrorCode, WireError};
use crate::geometry::WindowIndex;
use crate::handover::{DestinationEvent, SourceEvent};
use crate::ids::{
    Attempt, FrameSeq, Generation, Incarnation, Lane, MigrationId, RegisterId, SessionNumber,
};
use crate::message::{
    AttemptKey, Compared, Final, Hello, LaneProgress, Offer, Outcome, PrepareTiming, Prepared,
    Ready, ResumePoint, ToDestination, ToSource, Verdict, Welcome, WindowDigest, WindowRange,
};
use crate::session::agree;
use crate::session_destination::{DestinationSession, DestinationSessionEvent};
use crate::session_source::{SourceSession, SourceSessionEvent};
use crate::spec::{GuestSpec, RegionKind, RegionSpec, RunState};
use crate::version::{Features, ProtocolVersion, SUPPORTED, VersionRange};

const ONE: Attempt = Attempt(1);
const KEY: AttemptKey = AttemptKey {
    migration: MigrationId::from_bytes([1; 16]),
    attempt: ONE,
    register: RegisterId::from_bytes([2; 16]),
};

fn hello() -> Hello {
    Hello {
        versions: SUPPORTED,
        features: Features::supported(),
        guest: "web".parse().unwrap(),
        migration: KEY.migration,
        generation: Generation(1),
        session: SessionNumber(3),
        lanes: 2,
        connections: 1,
        connection: 0,
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: ProtocolVersion(1),
        features: Features::supported(),
        register: KEY.register,
        session: SessionNumber(3),
        agent: "test".to_owned(),
    }
}

fn offer() -> Offer {
    Offer {
        populated: Vec::new(),
        spec: GuestSpec {
            name: "web".parse().unwrap(),
            uuid: None,
            driver: "sim".to_owned(),
            hypervisor_version: "1".to_owned(),
            machine: "m".to_owned(),
            cpu_model: "c".to_owned(),
            vcpus: 1,
            run_state: RunState::Running,
            regions: vec![RegionSpec {
                id: crate::ids::RegionId(0),
                name: "ram".to_owned(),
                kind: RegionKind::Memory,
                len: crate::geometry::RegionLen(4096),
            }],
            shared_disks: Vec::new(),
            devices: Vec::new(),
        },
    }
}

fn ready() -> Ready {
    Ready {
        incarnations: vec![Incarnation::from_bytes([4; 16])],
        resume: None,
    }
}

fn last(attempt: Attempt) -> Final {
    Final {
        attempt,
        lanes: vec![FrameSeq(0); 2],
        verify: Vec::new(),
        run_state: RunState::Running,
    }
}

fn state(attempt: Attempt) -> ToDestination {
    ToDestination::DeviceState {
        attempt,
        len: 1,
        digest: 1,
    }
}

fn prepared() -> ToSource {
    ToSource::Prepared(Prepared {
        key: KEY,
        timing: PrepareTiming::default(),
    })
}

fn outcome(verdict: Verdict) -> ToSource {
    ToSource::Outcome(Outcome { key: KEY, verdict })
}

fn why() -> WireError {
    WireError::new(ErrorCode::Internal, "why")
}

fn abort() -> ToDestination {
    ToDestination::Abort {
        attempt: ONE,
        reason: why(),
    }
}

/// Both ends of one session.
struct Pair {
    source: SourceSession,
    destination: DestinationSession,
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            source: SourceSession::new(&hello(), Attempt(0)),
            destination: DestinationSession::new(),
        };
        pair.say(ToDestination::Hello(hello()));
        pair.answer(ToSource::Welcome(welcome()));
        pair
    }

    fn copying() -> Self {
        let mut pair = Self::new();
        pair.say(ToDestination::Offer(offer()));
        pair.answer(ToSource::Ready(ready()));
        pair
    }

    fn opened() -> Self {
        let mut pair = Self::copying();
        pair.say(ToDestination::OpenAttempt { attempt: ONE });
        pair.answer(ToSource::AttemptOpened { attempt: ONE });
        pair
    }

    fn say(&mut self, message: ToDestination) -> DestinationSessionEvent {
        self.source.on_sent(&message);
        self.destination.on_message(message).unwrap()
    }

    fn answer(&mut self, message: ToSource) -> SourceSessionEvent {
        self.destination.on_sent(&message);
        self.source.on_message(message).unwrap()
    }
}

#[test]
fn a_whole_migration_passes_both_ends() {
    let mut pair = Pair::opened();
    pair.say(ToDestination::Final(last(ONE)));
    let complete = pair.answer(ToSource::Complete { attempt: ONE });
    assert_eq!(complete, SourceSessionEvent::Complete { attempt: ONE });
    pair.say(state(ONE));
    assert!(matches!(
        pair.answer(prepared()),
        SourceSessionEvent::Prepared(_)
    ));
    let commit = pair.say(ToDestination::Commit(KEY));
    assert_eq!(
        commit,
        DestinationSessionEvent::Handover(DestinationEvent::Commit(KEY))
    );
    let committed = Verdict::Committed {
        record_us: 1,
        start_us: 1,
    };
    assert!(matches!(
        pair.answer(outcome(committed)),
        SourceSessionEvent::Handover(SourceEvent::Outcome(_))
    ));
    assert_eq!(
        pair.say(ToDestination::Goodbye),
        DestinationSessionEvent::Goodbye
    );
}

#[test]
fn a_session_in_doubt_asks_without_an_offer_and_then_takes_none() {
    let mut pair = Pair::new();
    pair.say(ToDestination::Commit(KEY));
    pair.say(ToDestination::Query(KEY));
    assert!(
        pair.destination
            .on_message(ToDestination::Offer(offer()))
            .is_err()
    );
    pair.answer(outcome(Verdict::Unknown));
    assert!(pair.source.on_message(ToSource::Ready(ready())).is_err());
}

#[test]
fn nothing_is_legal_for_the_source_before_its_time() {
    let early = |pair: fn() -> Pair, messages: Vec<ToDestination>| {
        for message in messages {
            let mut pair = pair();
            let before = pair.destination.clone();
            let error = pair.destination.on_message(message.clone());
            assert!(error.is_err(), "{message:?} was taken");
            assert_eq!(
                pair.destination, before,
                "an illegal message changed something"
            );
        }
    };
    let attempt = ToDestination::OpenAttempt { attempt: ONE };
    early(
        Pair::new,
        vec![
            ToDestination::Hello(hello()),
            ToDestination::Converged,
            attempt,
            ToDestination::Final(last(ONE)),
            state(ONE),
            abort(),
        ],
    );
    early(
        Pair::copying,
        vec![
            ToDestination::Offer(offer()),
            ToDestination::Final(last(ONE)),
            state(ONE),
            ToDestination::Commit(KEY),
            ToDestination::Query(KEY),
            abort(),
        ],
    );
    let short = Final {
        lanes: vec![FrameSeq(0)],
        ..last(ONE)
    };
    early(
        Pair::opened,
        vec![
            ToDestination::OpenAttempt { attempt: ONE },
            ToDestination::Final(short),
            ToDestination::Final(last(Attempt(2))),
            state(ONE),
            ToDestination::Commit(KEY),
        ],
    );
    let mut stranger = DestinationSession::new();
    assert!(stranger.on_message(ToDestination::Commit(KEY)).is_err());
    stranger.on_message(ToDestination::Hello(hello())).unwrap();
    assert!(
        stranger.on_message(ToDestination::Offer(offer())).is_err(),
        "before Welcome"
    );
}

#[test]
fn nothing_is_legal_for_the_destination_that_was_not_asked_for() {
    let messages = [
        ToSource::Welcome(welcome()),
        ToSource::Ready(ready()),
        ToSource::AttemptOpened { attempt: ONE },
        compared(&[]),
        ToSource::Complete { attempt: ONE },
        prepared(),
        outcome(Verdict::Aborted(why())),
        ToSource::Cancelled,
    ];
    for message in messages {
        let mut pair = Pair::copying();
        let error = pair
            .source
            .on_message(message.clone())
            .expect_err("was taken");
        assert_eq!(
            error.to_wire().code,
            ErrorCode::ProtocolViolation,
            "{message:?}"
        );
    }
    let mut pair = Pair::copying();
    let progress = |lane| {
        ToSource::Progress(vec![LaneProgress {
            lane: Lane(lane),
            applied: FrameSeq(1),
            flushed: FrameSeq(0),
        }])
    };
    assert!(pair.source.on_message(progress(1)).is_ok());
    assert!(
        pair.source.on_message(progress(2)).is_err(),
        "a lane that was not opened"
    );
    let mut pair = Pair::opened();
    pair.say(ToDestination::Final(last(ONE)));
    assert!(
        pair.source.on_message(prepared()).is_err(),
        "before the device state"
    );
}

#[test]
fn what_crossed_an_abort_is_late_and_not_wrong() {
    let mut pair = Pair::opened();
    pair.say(ToDestination::Final(last(ONE)));
    pair.say(abort());
    assert_eq!(
        pair.answer(ToSource::Complete { attempt: ONE }),
        SourceSessionEvent::Late
    );
    // The other way round: the destination settles it while the source goes on sending.
    let mut pair = Pair::opened();
    pair.destination.on_sent(&outcome(Verdict::Aborted(why())));
    assert_eq!(
        pair.say(ToDestination::Final(last(ONE))),
        DestinationSessionEvent::Late
    );
    assert_eq!(pair.say(state(ONE)), DestinationSessionEvent::Late);
    let next = ToDestination::OpenAttempt {
        attempt: Attempt(2),
    };
    assert!(matches!(
        pair.say(next),
        DestinationSessionEvent::Handover(_)
    ));
}

#[test]
fn a_welcome_or_ready_that_does_not_fit_what_was_asked_is_a_violation() {
    let strange = [
        Welcome {
            version: ProtocolVersion(2),
            ..welcome()
        },
        Welcome {
            session: SessionNumber(2),
            ..welcome()
        },
        Welcome {
            features: Features(["magic".to_owned()].into()),
            ..welcome()
        },
    ];
    for welcome in strange {
        let mut source = SourceSession::new(&hello(), Attempt(0));
        assert!(source.on_message(ToSource::Welcome(welcome)).is_err());
    }
    let strange = [
        Ready {
            incarnations: Vec::new(),
            resume: None,
        },
        Ready {
            resume: Some(ResumePoint {
                session: SessionNumber(3),
                lanes: Vec::new(),
            }),
            ..ready()
        },
    ];
    for ready in strange {
        let mut pair = Pair::new();
        pair.say(ToDestination::Offer(offer()));
        assert!(pair.source.on_message(ToSource::Ready(ready)).is_err());
    }
}

#[test]
fn versions_agree_on_the_newest_in_common_or_say_why_not() {
    let agreed = agree(&hello()).unwrap();
    assert_eq!(agreed.version, ProtocolVersion(1));
    let newer = Hello {
        versions: VersionRange {
            min: ProtocolVersion(2),
            max: ProtocolVersion(3),
        },
        ..hello()
    };
    assert_eq!(agree(&newer).unwrap_err().code, ErrorCode::VersionMismatch);
}

fn range(first: u32, count: u32) -> WindowRange {
    WindowRange {
        region: crate::ids::RegionId(0),
        first: WindowIndex(first),
        count,
    }
}

fn compared(windows: &[u32]) -> ToSource {
    let digest = |window: &u32| WindowDigest {
        region: crate::ids::RegionId(0),
        window: WindowIndex(*window),
        digest: [7; 16],
    };
    ToSource::Compared(Compared {
        windows: windows.iter().map(digest).collect(),
    })
}

/// `[WIRE-49]`
#[test]
fn what_is_compared_is_asked_between_ready_and_an_attempt_and_answered_in_order() {
    let mut pair = Pair::copying();
    for first in 0..4 {
        let asked = pair.say(ToDestination::Compare(range(first * 8, 8)));
        assert_eq!(asked, DestinationSessionEvent::Compare(range(first * 8, 8)));
    }
    let fifth = ToDestination::Compare(range(32, 8));
    assert!(pair.destination.on_message(fifth.clone()).is_err());
    assert!(
        pair.source.on_message(compared(&[8])).is_err(),
        "of the second question before the first is answered"
    );
    for answer in [compared(&[0, 7]), compared(&[]), compared(&[16, 17])] {
        let event = pair.answer(answer);
        assert!(matches!(event, SourceSessionEvent::Compared(_)));
    }
    pair.say(fifth);
    pair.answer(compared(&[24]));
    pair.answer(compared(&[39]));
    assert!(pair.source.on_message(compared(&[])).is_err());
    let mut pair = Pair::opened();
    let late = ToDestination::Compare(range(0, 1));
    assert!(pair.destination.on_message(late).is_err(), "in an attempt");
    let mut pair = Pair::new();
    let early = ToDestination::Compare(range(0, 1));
    assert!(
        pair.destination.on_message(early).is_err(),
        "before an offer"
    );
}

/// `[WIRE-46]`
#[test]
fn a_peer_without_the_feature_is_not_compared_with() {
    let mut destination = DestinationSession::new();
    let plain = Hello {
        features: Features(["zstd".to_owned()].into()),
        ..hello()
    };
    destination.on_message(ToDestination::Hello(plain)).unwrap();
    destination.on_sent(&ToSource::Welcome(welcome()));
    destination
        .on_message(ToDestination::Offer(offer()))
        .unwrap();
    destination.on_sent(&ToSource::Ready(ready()));
    let asked = destination.on_message(ToDestination::Compare(range(0, 1)));
    assert!(asked.unwrap_err().got.contains("feature"));
}
