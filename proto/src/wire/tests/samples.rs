//! One fixed sample of every message, and strategies for any valid one.

use proptest::prelude::*;
use proptest::sample::Index;

use crate::error::{ErrorCode, WireError};
use crate::geometry::{RegionLen, WindowIndex};
use crate::ids::{
    Attempt, FrameSeq, Generation, GuestName, Incarnation, Lane, MigrationId, RegionId, RegisterId,
    SessionNumber,
};
use crate::limits;
use crate::message::{
    AttemptKey, Compared, Digests, Final, Hello, LaneProgress, Offer, Outcome, PopulatedWindows,
    PrepareTiming, Prepared, Ready, ResumePoint, ToDestination, ToSource, Verdict, VerifyWindows,
    Welcome, WindowDigest, WindowRange,
};
use crate::spec::{DeviceSpec, GuestSpec, RegionKind, RegionSpec, RunState};
use crate::version::{Features, ProtocolVersion, VersionRange};

fn guest() -> GuestName {
    "web-1".parse().unwrap()
}

fn features() -> Features {
    Features(["new", "zstd"].map(str::to_owned).into())
}

fn key() -> AttemptKey {
    AttemptKey {
        migration: MigrationId::from_bytes([0x11; 16]),
        attempt: Attempt(3),
        register: RegisterId::from_bytes([0x22; 16]),
    }
}

fn reason() -> WireError {
    WireError::new(ErrorCode::Cancelled, "cancelled by root")
}

fn lane(lane: u8, applied: u64, flushed: u64) -> LaneProgress {
    LaneProgress {
        lane: Lane(lane),
        applied: FrameSeq(applied),
        flushed: FrameSeq(flushed),
    }
}

pub(super) fn window_digest(region: u16, window: u32) -> WindowDigest {
    WindowDigest {
        region: RegionId(region),
        window: WindowIndex(window),
        digest: [0x33; 16],
    }
}

pub(super) fn offer() -> Offer {
    let region = |id: u16, name: &str, kind, len| RegionSpec {
        id: RegionId(id),
        name: name.into(),
        kind,
        len: RegionLen(len),
    };
    Offer {
        populated: Vec::new(),
        spec: GuestSpec {
            name: guest(),
            uuid: Some([0x44; 16]),
            driver: "qemu".into(),
            hypervisor_version: "10.0.2".into(),
            machine: "pc-q35-10.0".into(),
            cpu_model: "qemu64-x86_64-cpu".into(),
            vcpus: 2,
            run_state: RunState::Running,
            regions: vec![
                region(0, "pc.ram", RegionKind::Memory, 512 << 20),
                region(1, "d0", RegionKind::Disk, 1 << 30),
            ],
            shared_disks: vec!["d1".into()],
            devices: vec![DeviceSpec {
                path: "/machine/peripheral/d0".into(),
                kind: "virtio-blk-pci".into(),
            }],
        },
    }
}

pub(super) fn offer_populated() -> Offer {
    Offer {
        populated: vec![PopulatedWindows {
            region: RegionId(0),
            windows: 3..256,
        }],
        ..offer()
    }
}

pub(super) fn to_destination() -> Vec<(&'static str, ToDestination)> {
    let attempt = Attempt(3);
    let hello = Hello {
        versions: VersionRange {
            min: ProtocolVersion(1),
            max: ProtocolVersion(2),
        },
        features: features(),
        guest: guest(),
        migration: key().migration,
        generation: Generation(4),
        session: SessionNumber(5),
        lanes: 16,
        connections: 2,
        connection: 1,
    };
    let last = Final {
        attempt,
        lanes: vec![FrameSeq(300), FrameSeq(0)],
        verify: vec![VerifyWindows {
            region: RegionId(1),
            first: WindowIndex(2),
            stride: 7,
        }],
        run_state: RunState::Paused,
    };
    let compare = WindowRange {
        region: RegionId(1),
        first: WindowIndex(512),
        count: 256,
    };
    let device_state = ToDestination::DeviceState {
        attempt,
        len: 32_768,
        digest: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
    };
    vec![
        ("hello", ToDestination::Hello(hello)),
        ("offer", ToDestination::Offer(offer())),
        ("offer_populated", ToDestination::Offer(offer_populated())),
        ("converged", ToDestination::Converged),
        ("compare", ToDestination::Compare(compare)),
        ("open_attempt", ToDestination::OpenAttempt { attempt }),
        ("final", ToDestination::Final(last)),
        ("device_state", device_state),
        ("commit", ToDestination::Commit(key())),
        ("query", ToDestination::Query(key())),
        (
            "abort",
            ToDestination::Abort {
                attempt,
                reason: reason(),
            },
        ),
        ("cancel", ToDestination::Cancel { reason: reason() }),
        ("goodbye", ToDestination::Goodbye),
        ("error", ToDestination::Error(reason())),
    ]
}

pub(super) fn to_source() -> Vec<(&'static str, ToSource)> {
    let attempt = Attempt(3);
    let welcome = Welcome {
        version: ProtocolVersion(1),
        features: features(),
        register: key().register,
        session: SessionNumber(5),
        agent: "vmferry-dst 0.1.0".into(),
    };
    let ready = Ready {
        incarnations: [0x55, 0x66]
            .map(|byte| Incarnation::from_bytes([byte; 16]))
            .into(),
        resume: Some(ResumePoint {
            session: SessionNumber(4),
            lanes: vec![lane(0, 9, 0), lane(3, 300, 299)],
        }),
    };
    let digests = Digests {
        attempt,
        windows: vec![window_digest(1, 2)],
        last: true,
    };
    let compared = Compared {
        windows: vec![window_digest(1, 512), window_digest(1, 514)],
    };
    let prepared = Prepared {
        key: key(),
        timing: PrepareTiming {
            apply_us: 1,
            verify_us: 0,
            flush_us: 1000,
            load_us: 6000,
        },
    };
    let outcome = |verdict| {
        ToSource::Outcome(Outcome {
            key: key(),
            verdict,
        })
    };
    let committed = Verdict::Committed {
        record_us: 200,
        start_us: 3000,
    };
    let progress = vec![lane(0, 10, 10), lane(1, 7, 2)];
    vec![
        ("welcome", ToSource::Welcome(welcome)),
        ("ready", ToSource::Ready(ready)),
        ("progress", ToSource::Progress(progress)),
        ("compared", ToSource::Compared(compared)),
        ("attempt_opened", ToSource::AttemptOpened { attempt }),
        ("digests", ToSource::Digests(digests)),
        ("complete", ToSource::Complete { attempt }),
        ("prepared", ToSource::Prepared(prepared)),
        ("outcome_committed", outcome(committed)),
        ("outcome_aborted", outcome(Verdict::Aborted(reason()))),
        ("outcome_unknown", outcome(Verdict::Unknown)),
        ("cancelled", ToSource::Cancelled),
        ("error", ToSource::Error(reason())),
    ]
}

// Any valid message.

fn any_id() -> impl Strategy<Value = [u8; 16]> {
    any::<[u8; 16]>()
}

fn any_attempt() -> impl Strategy<Value = Attempt> {
    (1..=u32::MAX).prop_map(Attempt)
}

fn any_session() -> impl Strategy<Value = SessionNumber> {
    (1..=u64::MAX).prop_map(SessionNumber)
}

fn any_key() -> impl Strategy<Value = AttemptKey> {
    (any_id(), any_attempt(), any_id()).prop_map(|(migration, attempt, register)| AttemptKey {
        migration: MigrationId::from_bytes(migration),
        attempt,
        register: RegisterId::from_bytes(register),
    })
}

fn any_error() -> impl Strategy<Value = WireError> {
    (prop::sample::select(ErrorCode::ALL), any::<String>())
        .prop_map(|(code, detail)| WireError::new(code, detail))
}

fn any_name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9/._ä-]{1,40}"
}

fn any_guest() -> impl Strategy<Value = GuestName> {
    "[A-Za-z0-9][A-Za-z0-9._-]{0,63}".prop_map(|name| name.parse().unwrap())
}

fn any_features() -> impl Strategy<Value = Features> {
    prop::collection::btree_set("[a-z-]{1,64}", 0..4).prop_map(Features)
}

fn any_run_state() -> impl Strategy<Value = RunState> {
    prop_oneof![Just(RunState::Running), Just(RunState::Paused)]
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let counts = (
        1..=limits::MAX_LANES,
        1..=limits::MAX_CONNECTIONS,
        any::<u8>(),
    );
    let versions = (1..=u32::MAX, 0u32..5);
    let who = (any_guest(), any_id(), 1..=u64::MAX, any_session());
    (versions, any_features(), who, counts).prop_map(|(versions, features, who, counts)| Hello {
        versions: VersionRange {
            min: ProtocolVersion(versions.0),
            max: ProtocolVersion(versions.0.saturating_add(versions.1)),
        },
        features,
        guest: who.0,
        migration: MigrationId::from_bytes(who.1),
        generation: Generation(who.2),
        session: who.3,
        lanes: counts.0,
        connections: counts.1,
        connection: counts.2 % counts.1,
    })
}

/// With windows of the regions that are memory.
fn any_offer() -> impl Strategy<Value = Offer> {
    let places = prop::collection::vec((any::<Index>(), any::<Index>(), any::<Index>()), 0..4);
    (any_spec(), places).prop_map(|(spec, places)| {
        let memory = spec.regions.iter();
        let memory: Vec<_> = memory
            .filter(|region| region.kind == RegionKind::Memory)
            .collect();
        let windows = |(region, first, count): (Index, Index, Index)| {
            let region = memory.get(region.index(memory.len().max(1)))?;
            let all = region.len.windows();
            let first = u32::try_from(first.index(all as usize)).unwrap();
            let count = 1 + u32::try_from(count.index((all - first) as usize)).unwrap();
            Some(PopulatedWindows {
                region: region.id,
                windows: first..first + count,
            })
        };
        let populated = places.into_iter().filter_map(windows).collect();
        Offer { spec, populated }
    })
}

fn any_spec() -> impl Strategy<Value = GuestSpec> {
    let regions = prop::collection::btree_map(
        any_name(),
        (any::<bool>(), 1..=limits::MAX_REGION_LEN),
        1..5,
    )
    .prop_map(|regions| {
        (0u16..)
            .zip(regions)
            .map(|(id, (name, (disk, len)))| RegionSpec {
                id: RegionId(id),
                name,
                kind: if disk {
                    RegionKind::Disk
                } else {
                    RegionKind::Memory
                },
                len: RegionLen(len),
            })
            .collect()
    });
    let devices = prop::collection::vec(
        (any_name(), any_name()).prop_map(|(path, kind)| DeviceSpec { path, kind }),
        0..4,
    );
    let texts = (
        any_name(),
        "[a-z0-9.]{0,9}",
        "[a-z0-9.]{0,9}",
        "[a-z0-9.]{0,9}",
    );
    let rest = (
        1..=limits::MAX_VCPUS,
        any_run_state(),
        prop::option::of(any_id()),
    );
    let shared = prop::collection::vec(any_name(), 0..3);
    (any_guest(), texts, rest, regions, shared, devices).prop_map(
        |(name, texts, rest, regions, shared_disks, devices)| GuestSpec {
            name,
            uuid: rest.2,
            driver: texts.0,
            hypervisor_version: texts.1,
            machine: texts.2,
            cpu_model: texts.3,
            vcpus: rest.0,
            run_state: rest.1,
            regions,
            shared_disks,
            devices,
        },
    )
}

fn any_lanes() -> impl Strategy<Value = Vec<LaneProgress>> {
    prop::collection::btree_map(0..limits::MAX_LANES, any::<(u64, u64)>(), 0..6).prop_map(|lanes| {
        lanes
            .into_iter()
            .map(|(number, (a, b))| lane(number, a.max(b), a.min(b)))
            .collect()
    })
}

fn any_final() -> impl Strategy<Value = Final> {
    let verify = prop::collection::btree_map(0u16..1024, (any::<u32>(), 1..=u32::MAX), 0..4);
    let lanes = prop::collection::vec(any::<u64>().prop_map(FrameSeq), 1..64);
    (any_attempt(), lanes, verify, any_run_state()).prop_map(
        |(attempt, lanes, verify, run_state)| Final {
            attempt,
            lanes,
            verify: verify
                .into_iter()
                .map(|(region, (first, stride))| VerifyWindows {
                    region: RegionId(region),
                    first: WindowIndex(first),
                    stride,
                })
                .collect(),
            run_state,
        },
    )
}

pub(super) fn any_to_destination() -> impl Strategy<Value = ToDestination> {
    prop_oneof![
        any_hello().prop_map(ToDestination::Hello),
        any_offer().prop_map(ToDestination::Offer),
        Just(ToDestination::Converged),
        (0u16..1024, any::<u32>(), 1..=limits::MAX_COMPARE_WINDOWS).prop_map(
            |(region, first, count)| {
                ToDestination::Compare(WindowRange {
                    region: RegionId(region),
                    first: WindowIndex(first),
                    count,
                })
            }
        ),
        any_attempt().prop_map(|attempt| ToDestination::OpenAttempt { attempt }),
        any_final().prop_map(ToDestination::Final),
        (any_attempt(), 1..=limits::MAX_DEVICE_STATE, any::<u128>()).prop_map(
            |(attempt, len, digest)| ToDestination::DeviceState {
                attempt,
                len,
                digest
            }
        ),
        any_key().prop_map(ToDestination::Commit),
        any_key().prop_map(ToDestination::Query),
        (any_attempt(), any_error())
            .prop_map(|(attempt, reason)| ToDestination::Abort { attempt, reason }),
        any_error().prop_map(|reason| ToDestination::Cancel { reason }),
        Just(ToDestination::Goodbye),
        any_error().prop_map(ToDestination::Error),
    ]
}

fn any_ready() -> impl Strategy<Value = Ready> {
    let point =
        (any_session(), any_lanes()).prop_map(|(session, lanes)| ResumePoint { session, lanes });
    let incarnations = prop::collection::vec(any_id().prop_map(Incarnation::from_bytes), 1..5);
    (incarnations, prop::option::of(point)).prop_map(|(incarnations, resume)| Ready {
        incarnations,
        resume,
    })
}

fn any_digests() -> impl Strategy<Value = Digests> {
    let window =
        (0u16..1024, any::<u32>(), any_id()).prop_map(|(region, window, digest)| WindowDigest {
            region: RegionId(region),
            window: WindowIndex(window),
            digest,
        });
    (
        any_attempt(),
        prop::collection::vec(window, 0..5),
        any::<bool>(),
    )
        .prop_map(|(attempt, windows, last)| Digests {
            attempt,
            windows,
            last,
        })
}

fn any_compared() -> impl Strategy<Value = Compared> {
    prop::collection::btree_map((0u16..1024, any::<u32>()), any_id(), 0..5).prop_map(|windows| {
        let windows = windows.into_iter();
        Compared {
            windows: windows
                .map(|((region, window), digest)| WindowDigest {
                    region: RegionId(region),
                    window: WindowIndex(window),
                    digest,
                })
                .collect(),
        }
    })
}

fn any_verdict() -> impl Strategy<Value = Verdict> {
    prop_oneof![
        any::<(u64, u64)>().prop_map(|(record_us, start_us)| Verdict::Committed {
            record_us,
            start_us
        }),
        any_error().prop_map(Verdict::Aborted),
        Just(Verdict::Unknown),
    ]
}

pub(super) fn any_to_source() -> impl Strategy<Value = ToSource> {
    let welcome = (
        1..=u32::MAX,
        any_features(),
        any_id(),
        any_session(),
        "[a-z 0-9.-]{0,128}",
    )
        .prop_map(|(version, features, register, session, agent)| Welcome {
            version: ProtocolVersion(version),
            features,
            register: RegisterId::from_bytes(register),
            session,
            agent,
        });
    let prepared = (any_key(), any::<[u64; 4]>()).prop_map(|(key, times)| Prepared {
        key,
        timing: PrepareTiming {
            apply_us: times[0],
            verify_us: times[1],
            flush_us: times[2],
            load_us: times[3],
        },
    });
    prop_oneof![
        welcome.prop_map(ToSource::Welcome),
        any_ready().prop_map(ToSource::Ready),
        any_lanes().prop_map(ToSource::Progress),
        any_attempt().prop_map(|attempt| ToSource::AttemptOpened { attempt }),
        any_compared().prop_map(ToSource::Compared),
        any_digests().prop_map(ToSource::Digests),
        any_attempt().prop_map(|attempt| ToSource::Complete { attempt }),
        prepared.prop_map(ToSource::Prepared),
        (any_key(), any_verdict())
            .prop_map(|(key, verdict)| ToSource::Outcome(Outcome { key, verdict })),
        Just(ToSource::Cancelled),
        any_error().prop_map(ToSource::Error),
    ]
}
