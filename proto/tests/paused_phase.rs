//! The messages of the paused phase, exchanged between the session machines of both ends in the orders that
//! PROTOCOL.md allows.

use vmferry_proto::geometry::RegionLen;
use vmferry_proto::ids::{
    Attempt, FrameSeq, Generation, Incarnation, MigrationId, RegionId, RegisterId, SessionNumber,
};
use vmferry_proto::message::{
    AttemptKey, Digests, Final, Hello, Offer, PrepareTiming, Prepared, Ready, ToDestination,
    ToSource, Welcome,
};
use vmferry_proto::session_destination::DestinationSession;
use vmferry_proto::session_source::SourceSession;
use vmferry_proto::spec::{GuestSpec, RegionKind, RegionSpec, RunState};
use vmferry_proto::version::{Features, SUPPORTED};

const ATTEMPT: Attempt = Attempt(1);

struct Pair {
    source: SourceSession,
    destination: DestinationSession,
}

impl Pair {
    /// The source says it; whether the destination takes it.
    fn ask(&mut self, message: ToDestination) -> bool {
        self.source.on_sent(&message);
        self.destination.on_message(message).is_ok()
    }

    /// The destination says it; whether the source takes it.
    fn answer(&mut self, message: ToSource) -> bool {
        self.destination.on_sent(&message);
        self.source.on_message(message).is_ok()
    }

    /// Both in an open attempt of a guest with one region, two lanes.
    fn paused() -> Self {
        let migration = MigrationId::from_bytes([1; 16]);
        let hello = Hello {
            versions: SUPPORTED,
            features: Features::supported(),
            guest: "web-1".parse().expect("a guest name"),
            migration,
            generation: Generation(1),
            session: SessionNumber(1),
            lanes: 2,
            connections: 1,
            connection: 0,
        };
        let welcome = Welcome {
            version: SUPPORTED.max,
            features: Features::supported(),
            register: RegisterId::from_bytes([2; 16]),
            session: hello.session,
            agent: String::new(),
        };
        let spec = GuestSpec {
            name: hello.guest.clone(),
            uuid: None,
            driver: "sim".into(),
            hypervisor_version: String::new(),
            machine: String::new(),
            cpu_model: String::new(),
            vcpus: 1,
            run_state: RunState::Running,
            regions: vec![RegionSpec {
                id: RegionId(0),
                name: "ram".into(),
                kind: RegionKind::Memory,
                len: RegionLen(4096),
            }],
            shared_disks: Vec::new(),
            devices: Vec::new(),
        };
        let ready = Ready {
            incarnations: vec![Incarnation::from_bytes([3; 16])],
            resume: None,
        };
        let mut pair = Self {
            source: SourceSession::new(&hello, Attempt(0)),
            destination: DestinationSession::new(),
        };
        assert!(pair.ask(ToDestination::Hello(hello)));
        assert!(pair.answer(ToSource::Welcome(welcome)));
        assert!(pair.ask(ToDestination::Offer(Offer {
            spec,
            populated: Vec::new()
        })));
        assert!(pair.answer(ToSource::Ready(ready)));
        assert!(pair.ask(ToDestination::Converged));
        assert!(pair.ask(ToDestination::OpenAttempt { attempt: ATTEMPT }));
        assert!(pair.answer(ToSource::AttemptOpened { attempt: ATTEMPT }));
        pair
    }
}

fn last(seq: u64) -> ToDestination {
    ToDestination::Final(Final {
        attempt: ATTEMPT,
        lanes: vec![FrameSeq(seq), FrameSeq(0)],
        verify: Vec::new(),
        run_state: RunState::Running,
    })
}

fn digests() -> ToSource {
    ToSource::Digests(Digests {
        attempt: ATTEMPT,
        windows: Vec::new(),
        last: true,
    })
}

fn device_state() -> ToDestination {
    ToDestination::DeviceState {
        attempt: ATTEMPT,
        len: 1,
        digest: 0,
    }
}

fn prepared() -> ToSource {
    ToSource::Prepared(Prepared {
        key: AttemptKey {
            migration: MigrationId::from_bytes([1; 16]),
            attempt: ATTEMPT,
            register: RegisterId::from_bytes([2; 16]),
        },
        timing: PrepareTiming::default(),
    })
}

const COMPLETE: ToSource = ToSource::Complete { attempt: ATTEMPT };

#[test]
fn the_device_state_may_follow_complete() {
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(pair.answer(COMPLETE));
    assert!(pair.ask(device_state()));
    assert!(pair.answer(prepared()));
}

#[test]
fn the_device_state_need_not_wait_for_complete() {
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(pair.ask(device_state()));
    assert!(pair.answer(COMPLETE));
    assert!(pair.answer(prepared()));
}

#[test]
fn final_comes_again_for_what_differed() {
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(pair.answer(digests()));
    assert!(pair.answer(COMPLETE));
    assert!(pair.ask(last(6)));
    assert!(pair.answer(digests()));
    assert!(pair.answer(COMPLETE));
    assert!(pair.ask(device_state()));
    assert!(pair.answer(prepared()));
}

#[test]
fn other_orders_are_violations() {
    let mut pair = Pair::paused();
    assert!(!pair.ask(device_state()), "device state before Final");
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(pair.ask(device_state()));
    assert!(!pair.ask(last(6)), "Final after the device state");
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(
        !pair.ask(last(6)),
        "Final before Complete of the one before"
    );
    let mut pair = Pair::paused();
    assert!(!pair.answer(COMPLETE), "Complete before Final");
    let mut pair = Pair::paused();
    assert!(pair.ask(last(5)));
    assert!(!pair.answer(prepared()), "Prepared before the device state");
}
