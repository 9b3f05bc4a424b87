//! The door: golden bytes of every message, round trips, caps, and whatever bytes a hostile peer may think of.

mod samples;

use proptest::prelude::*;

use super::*;
use crate::error::ErrorCode;
use crate::ids::{Attempt, FrameSeq};
use crate::limits;
use crate::message::{Digests, Final};
use crate::spec::RunState;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Name of the message and its framed bytes, as the protocol has them for ever: a change here is a change of the wire.
#[test]
fn every_message_has_its_golden_bytes() {
    let to_destination = samples::to_destination()
        .into_iter()
        .map(|(name, message)| format!("> {name} {}", hex(&encode(&message).unwrap())));
    let to_source = samples::to_source()
        .into_iter()
        .map(|(name, message)| format!("< {name} {}", hex(&encode(&message).unwrap())));
    let actual: Vec<_> = to_destination.chain(to_source).collect();
    let golden: Vec<_> = include_str!("golden.txt").lines().collect();
    assert_eq!(actual, golden, "now:\n{}", actual.join("\n"));
}

#[test]
fn golden_bytes_decode_to_their_messages() {
    for (name, message) in samples::to_destination() {
        let bytes = encode(&message).unwrap();
        assert_eq!(decode_body(&bytes[4..]), Ok(message), "{name}");
    }
    for (name, message) in samples::to_source() {
        let bytes = encode(&message).unwrap();
        assert_eq!(decode_body(&bytes[4..]), Ok(message), "{name}");
    }
}

#[test]
fn the_length_is_four_bytes_little_endian_in_front() {
    let bytes = encode_to_source(&ToSource::Cancelled).unwrap();
    assert_eq!(bytes[..4], [2, 0, 0, 0]);
    assert_eq!(bytes.len(), 6);
    assert_eq!(
        encode_to_destination(&ToDestination::Goodbye).unwrap()[..4],
        [2, 0, 0, 0]
    );
}

/// `[WIRE-7]`: a length above the cap is refused when only the length is there.
#[test]
fn an_oversized_length_is_refused_before_the_message_comes() {
    let cap = u32::try_from(MAX_CONTROL_MESSAGE).unwrap();
    assert_eq!(body_len(cap.to_le_bytes()), Ok(MAX_CONTROL_MESSAGE));
    for len in [cap + 1, 1 << 31, u32::MAX] {
        let refused = WireDecodeError::TooLong {
            len: u64::from(len),
        };
        assert_eq!(body_len(len.to_le_bytes()), Err(refused.clone()));
        let mut decoder = Decoder::<ToSource>::new();
        let prefix = len.to_le_bytes();
        assert_eq!(decoder.next_message(&mut &prefix[..3]), Ok(None));
        assert_eq!(decoder.next_message(&mut &prefix[3..]), Err(refused));
        assert_eq!(
            decoder.next_message(&mut &[0u8; 10][..]),
            Err(WireDecodeError::AfterRefusal)
        );
        assert_eq!(decoder.finish(), Err(WireDecodeError::AfterRefusal));
    }
}

/// The largest announced length costs nothing until its bytes are there.
#[test]
fn the_decoder_holds_no_more_than_has_come() {
    let mut decoder = Decoder::<ToSource>::new();
    let prefix = u32::try_from(MAX_CONTROL_MESSAGE).unwrap().to_le_bytes();
    assert_eq!(decoder.next_message(&mut &prefix[..]), Ok(None));
    assert_eq!(decoder.next_message(&mut &[0u8; 100][..]), Ok(None));
    let State::Body { have, len } = &decoder.state else {
        panic!("not within a message");
    };
    assert_eq!((have.len(), *len), (100, MAX_CONTROL_MESSAGE));
    assert!(have.capacity() <= 256, "allocated {}", have.capacity());
    assert_eq!(decoder.finish(), Err(WireDecodeError::Truncated));
}

/// `[WIRE-40]`: a list above its cap is refused on the bytes, before its entries are made.
#[test]
fn lists_are_counted_before_they_are_decoded() {
    let many = |field: u8, count: usize| [field << 3 | 2, 0].repeat(count);
    let within = |field: u8, inner: Vec<u8>| {
        let mut bytes = vec![field << 3 | 2];
        prost::encoding::encode_varint(inner.len() as u64, &mut bytes);
        bytes.extend(inner);
        bytes
    };
    let entries = MAX_CONTROL_MESSAGE / 2 - 16;
    for (body, field, fields) in [
        (
            within(5, many(2, entries)),
            "digests.windows",
            lists::TO_SOURCE,
        ),
        (
            within(2, many(1, entries)),
            "ready.incarnations",
            lists::TO_SOURCE,
        ),
        (
            within(2, within(2, many(2, entries))),
            "resume.lanes",
            lists::TO_SOURCE,
        ),
        (
            within(3, many(1, entries)),
            "progress.lanes",
            lists::TO_SOURCE,
        ),
        (within(1, many(3, entries)), "features", lists::TO_SOURCE),
        (
            within(2, within(1, many(9, entries))),
            "spec.regions",
            lists::TO_DESTINATION,
        ),
        (
            within(2, within(1, many(10, entries))),
            "spec.shared_disks",
            lists::TO_DESTINATION,
        ),
        (
            within(2, within(1, many(11, entries))),
            "spec.devices",
            lists::TO_DESTINATION,
        ),
        (
            within(4, many(3, entries)),
            "final.verify",
            lists::TO_DESTINATION,
        ),
        (
            within(1, many(3, entries)),
            "features",
            lists::TO_DESTINATION,
        ),
        (
            within(2, many(2, entries)),
            "offer.populated",
            lists::TO_DESTINATION,
        ),
        (many(2, entries), "offer", lists::TO_DESTINATION),
        (
            [within(5, Vec::new()), within(5, Vec::new())].concat(),
            "digests",
            lists::TO_SOURCE,
        ),
    ] {
        let refused = lists::check(&body, fields);
        assert!(
            matches!(refused, Err(Length { field: name, .. }) if name == field),
            "{field}: {refused:?}"
        );
    }
}

#[test]
fn an_empty_message_is_refused() {
    let missing = Missing { field: "message" };
    assert_eq!(decode_body::<ToSource>(&[]), Err(missing.clone()));
    assert_eq!(decode_body::<ToDestination>(&[]), Err(missing.clone()));
    // Member 100 of the oneof, which this version does not know.
    assert_eq!(
        decode_body::<ToDestination>(&[0xa2, 0x06, 0x00]),
        Err(missing)
    );
}

#[test]
fn a_refusal_is_a_protocol_violation_that_names_the_field() {
    let error = decode_body::<ToDestination>(&[0x1a, 0x00]).unwrap_err();
    let wire = WireError::from(error);
    assert_eq!(wire.code, ErrorCode::ProtocolViolation);
    assert!(wire.detail.contains("open_attempt.attempt"), "{wire}");
}

/// Changes one thing of a message on its way through the schema and says what the door answers.
fn broken<M: ControlMessage>(
    message: &M,
    change: impl FnOnce(&mut M::Schema),
) -> Result<M, WireDecodeError> {
    let mut schema = message.to_schema();
    change(&mut schema);
    decode_body(&schema.encode_to_vec())
}

macro_rules! refused {
    ($name:literal, $direction:ident, $member:ident, |$it:ident| $change:expr, $expected:pat) => {{
        let message = samples::$direction()
            .into_iter()
            .find(|(name, _)| *name == $name)
            .unwrap()
            .1;
        let answer = broken(&message, |schema| {
            let Some(schema::$direction::Message::$member($it)) = &mut schema.message else {
                panic!("sample {} is no {}", $name, stringify!($member));
            };
            $change;
        });
        assert!(
            matches!(answer, Err($expected)),
            "{}: {}: {answer:?}",
            $name,
            stringify!($change)
        );
    }};
}

use WireDecodeError::{Length, Missing, Order, OutOfRange, Text, UnknownValue};

#[test]
fn a_bad_hello_or_welcome_is_refused() {
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.version_min = 0,
        OutOfRange {
            field: "hello.version_min",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.version_min = 9,
        OutOfRange {
            field: "hello.version_min",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.guest = "../x".into(),
        Text {
            field: "hello.guest"
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.guest = "x".repeat(1000),
        Text {
            field: "hello.guest"
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.migration.truncate(15),
        Length {
            field: "hello.migration",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.generation = 0,
        OutOfRange {
            field: "hello.generation",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.session = 0,
        OutOfRange {
            field: "hello.session",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.lanes = 0,
        OutOfRange {
            field: "hello.lanes",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.lanes = 65,
        OutOfRange {
            field: "hello.lanes",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.lanes = 256 + 4,
        OutOfRange {
            field: "hello.lanes",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.connections = 0,
        OutOfRange {
            field: "hello.connections",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.connections = 17,
        OutOfRange {
            field: "hello.connections",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.connection = it.connections,
        OutOfRange {
            field: "hello.connection",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.features = vec!["zstd".into(); 2],
        Order { field: "features" }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.features = vec![String::new()],
        Length {
            field: "features",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.features = vec!["x".repeat(65)],
        Length {
            field: "features",
            ..
        }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.features = vec!["a\nb".into()],
        Text { field: "features" }
    );
    refused!(
        "hello",
        to_destination,
        Hello,
        |it| it.features = (0..65).map(|n| format!("f{n:02}")).collect(),
        Length {
            field: "features",
            len: 65,
            ..
        }
    );
    refused!(
        "welcome",
        to_source,
        Welcome,
        |it| it.version = 0,
        OutOfRange {
            field: "welcome.version",
            ..
        }
    );
    refused!(
        "welcome",
        to_source,
        Welcome,
        |it| it.register.push(0),
        Length {
            field: "welcome.register",
            len: 17,
            ..
        }
    );
    refused!(
        "welcome",
        to_source,
        Welcome,
        |it| it.session = 0,
        OutOfRange {
            field: "welcome.session",
            ..
        }
    );
    refused!(
        "welcome",
        to_source,
        Welcome,
        |it| it.agent = "\u{1b}[2J".into(),
        Text {
            field: "welcome.agent"
        }
    );
    refused!(
        "welcome",
        to_source,
        Welcome,
        |it| it.agent = "x".repeat(129),
        Length {
            field: "welcome.agent",
            ..
        }
    );
}

#[test]
fn populated_windows_outside_a_memory_region_are_refused() {
    // Region 1 is a disk, and there is no region 2.
    for region in [1, 2] {
        refused!(
            "offer_populated",
            to_destination,
            Offer,
            |it| it.populated[0].region = region,
            UnknownValue {
                field: "offer.populated.region",
                ..
            }
        );
    }
    // The region has 256 windows.
    refused!(
        "offer_populated",
        to_destination,
        Offer,
        |it| it.populated[0].first = 256,
        OutOfRange {
            field: "offer.populated.first",
            ..
        }
    );
    refused!(
        "offer_populated",
        to_destination,
        Offer,
        |it| it.populated[0].count = 254,
        OutOfRange {
            field: "offer.populated.count",
            max: 253,
            ..
        }
    );
    refused!(
        "offer_populated",
        to_destination,
        Offer,
        |it| it.populated[0].count = 0,
        OutOfRange {
            field: "offer.populated.count",
            ..
        }
    );
    refused!(
        "offer_populated",
        to_destination,
        Offer,
        |it| it.populated = vec![it.populated[0]; limits::MAX_POPULATED + 1],
        Length {
            field: "offer.populated",
            ..
        }
    );
}

fn spec(offer: &mut schema::Offer) -> &mut schema::GuestSpec {
    offer.spec.as_mut().unwrap()
}

#[test]
fn a_bad_offer_is_refused() {
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| it.spec = None,
        Missing {
            field: "offer.spec"
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).name = ".x".into(),
        Text { field: "spec.name" }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).uuid = Some(vec![1]),
        Length {
            field: "spec.uuid",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).driver = String::new(),
        Length {
            field: "spec.driver",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).machine = "x".repeat(513),
        Length {
            field: "spec.machine",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).cpu_model = "a\0".into(),
        Text {
            field: "spec.cpu_model"
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).vcpus = 0,
        OutOfRange {
            field: "spec.vcpus",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).vcpus = 4097,
        OutOfRange {
            field: "spec.vcpus",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).run_state = 0,
        UnknownValue {
            field: "spec.run_state",
            value: 0
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).run_state = 7,
        UnknownValue {
            field: "spec.run_state",
            value: 7
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions.clear(),
        Length {
            field: "spec.regions",
            len: 0,
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions[0].kind = 3,
        UnknownValue {
            field: "spec.regions.kind",
            value: 3
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions[0].len = 0,
        OutOfRange {
            field: "spec.regions.len",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions[0].len = limits::MAX_REGION_LEN + 1,
        OutOfRange {
            field: "spec.regions.len",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions[0].name = String::new(),
        Length {
            field: "spec.regions.name",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions[1] = spec(it).regions[0].clone(),
        Order {
            field: "spec.regions.name"
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).regions = vec![schema::RegionSpec::default(); limits::MAX_REGIONS + 1],
        Length {
            field: "spec.regions",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).devices = vec![schema::DeviceSpec::default(); limits::MAX_DEVICES + 1],
        Length {
            field: "spec.devices",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).devices[0].path = "x".repeat(513),
        Length {
            field: "spec.devices.path",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).devices[0].kind = String::new(),
        Length {
            field: "spec.devices.kind",
            ..
        }
    );
    refused!(
        "offer",
        to_destination,
        Offer,
        |it| spec(it).shared_disks = vec!["d".into(); limits::MAX_SHARED_DISKS + 1],
        Length {
            field: "spec.shared_disks",
            ..
        }
    );
}

#[test]
fn bad_progress_is_refused() {
    refused!(
        "ready",
        to_source,
        Ready,
        |it| it.incarnations.clear(),
        Length {
            field: "ready.incarnations",
            ..
        }
    );
    refused!(
        "ready",
        to_source,
        Ready,
        |it| it.incarnations[0].clear(),
        Length {
            field: "ready.incarnations",
            len: 0,
            ..
        }
    );
    refused!(
        "ready",
        to_source,
        Ready,
        |it| it.incarnations = vec![vec![0; 16]; limits::MAX_REGIONS + 1],
        Length {
            field: "ready.incarnations",
            ..
        }
    );
    refused!(
        "ready",
        to_source,
        Ready,
        |it| it.resume.as_mut().unwrap().session = 0,
        OutOfRange {
            field: "resume.session",
            ..
        }
    );
    refused!(
        "ready",
        to_source,
        Ready,
        |it| it.resume.as_mut().unwrap().lanes[0].flushed = 99,
        OutOfRange {
            field: "resume.lanes",
            ..
        }
    );
    refused!(
        "progress",
        to_source,
        Progress,
        |it| it.lanes[0].flushed = it.lanes[0].applied + 1,
        OutOfRange {
            field: "progress.lanes",
            ..
        }
    );
    refused!(
        "progress",
        to_source,
        Progress,
        |it| it.lanes[1].lane = it.lanes[0].lane,
        Order {
            field: "progress.lanes"
        }
    );
    refused!(
        "progress",
        to_source,
        Progress,
        |it| it.lanes[1].lane = 64,
        OutOfRange {
            field: "progress.lanes",
            ..
        }
    );
    refused!(
        "progress",
        to_source,
        Progress,
        |it| it.lanes[1].lane = 256 + 1,
        OutOfRange {
            field: "progress.lanes",
            ..
        }
    );
    refused!(
        "progress",
        to_source,
        Progress,
        |it| it.lanes = vec![schema::LaneProgress::default(); 65],
        Length {
            field: "progress.lanes",
            ..
        }
    );
}

#[test]
fn a_bad_attempt_is_refused() {
    refused!(
        "open_attempt",
        to_destination,
        OpenAttempt,
        |it| it.attempt = 0,
        OutOfRange {
            field: "open_attempt.attempt",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.attempt = 0,
        OutOfRange {
            field: "final.attempt",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.run_state = 0,
        UnknownValue {
            field: "final.run_state",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.lanes.clear(),
        Length {
            field: "final.lanes",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.lanes = vec![0; 65],
        Length {
            field: "final.lanes",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.verify[0].stride = 0,
        OutOfRange {
            field: "final.verify.stride",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.verify[0].region = 1024,
        OutOfRange {
            field: "final.verify.region",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.verify[0].region = 65_537,
        OutOfRange {
            field: "final.verify.region",
            ..
        }
    );
    refused!(
        "final",
        to_destination,
        Final,
        |it| it.verify = vec![it.verify[0]; 2],
        Order {
            field: "final.verify"
        }
    );
    refused!(
        "device_state",
        to_destination,
        DeviceState,
        |it| it.len = 0,
        OutOfRange {
            field: "device_state.len",
            ..
        }
    );
    refused!(
        "device_state",
        to_destination,
        DeviceState,
        |it| it.len = u64::MAX,
        OutOfRange {
            field: "device_state.len",
            ..
        }
    );
    refused!(
        "device_state",
        to_destination,
        DeviceState,
        |it| it.digest.clear(),
        Length {
            field: "device_state.digest",
            ..
        }
    );
    refused!(
        "commit",
        to_destination,
        Commit,
        |it| it.register.clear(),
        Length {
            field: "attempt_key.register",
            ..
        }
    );
    refused!(
        "query",
        to_destination,
        Query,
        |it| it.migration.clear(),
        Length {
            field: "attempt_key.migration",
            ..
        }
    );
    refused!(
        "query",
        to_destination,
        Query,
        |it| it.attempt = 0,
        OutOfRange {
            field: "attempt_key.attempt",
            ..
        }
    );
    refused!(
        "abort",
        to_destination,
        Abort,
        |it| it.reason = None,
        Missing {
            field: "abort.reason"
        }
    );
    refused!(
        "digests",
        to_source,
        Digests,
        |it| it.windows[0].digest.clear(),
        Length {
            field: "digests.windows.digest",
            ..
        }
    );
    refused!(
        "digests",
        to_source,
        Digests,
        |it| it.windows = vec![schema::WindowDigest::default(); limits::MAX_DIGESTS + 1],
        Length {
            field: "digests.windows",
            ..
        }
    );
    for count in [0, limits::MAX_COMPARE_WINDOWS + 1] {
        refused!(
            "compare",
            to_destination,
            Compare,
            |it| it.count = count,
            OutOfRange {
                field: "compare.count",
                ..
            }
        );
    }
    refused!(
        "compare",
        to_destination,
        Compare,
        |it| it.region = 1024,
        OutOfRange {
            field: "compare.region",
            ..
        }
    );
    refused!(
        "compared",
        to_source,
        Compared,
        |it| it.windows[1] = it.windows[0].clone(),
        Order {
            field: "compared.windows"
        }
    );
    refused!(
        "compared",
        to_source,
        Compared,
        |it| it.windows =
            vec![schema::WindowDigest::default(); limits::MAX_COMPARE_WINDOWS as usize + 1],
        Length {
            field: "compared.windows",
            ..
        }
    );
    refused!(
        "prepared",
        to_source,
        Prepared,
        |it| it.key = None,
        Missing {
            field: "prepared.key"
        }
    );
    refused!(
        "prepared",
        to_source,
        Prepared,
        |it| it.timing = None,
        Missing {
            field: "prepared.timing"
        }
    );
    refused!(
        "outcome_committed",
        to_source,
        Outcome,
        |it| it.verdict = None,
        Missing {
            field: "outcome.verdict"
        }
    );
    refused!(
        "outcome_unknown",
        to_source,
        Outcome,
        |it| it.key = None,
        Missing {
            field: "outcome.key"
        }
    );
}

#[test]
fn a_bad_error_is_refused() {
    refused!(
        "cancel",
        to_destination,
        Cancel,
        |it| it.code = 0,
        UnknownValue {
            field: "error.code",
            value: 0
        }
    );
    refused!(
        "error",
        to_destination,
        Error,
        |it| it.code = 9999,
        UnknownValue {
            field: "error.code",
            value: 9999
        }
    );
    refused!(
        "error",
        to_source,
        Error,
        |it| it.detail = "x".repeat(limits::MAX_DETAIL + 1),
        Length {
            field: "error.detail",
            ..
        }
    );
}

#[test]
fn every_error_code_travels_and_keeps_its_number() {
    for code in ErrorCode::ALL {
        assert_eq!(ErrorCode::from_number(code.number()), Some(*code));
        let message = ToSource::Error(WireError::new(*code, "detail"));
        let bytes = encode(&message).unwrap();
        assert_eq!(decode_body(&bytes[CONTROL_PREFIX..]), Ok(message));
    }
    assert_eq!(ErrorCode::from_number(0), None);
}

#[test]
fn an_error_can_always_be_sent() {
    let detail = "\u{1b}[31m".to_owned() + &"ä".repeat(limits::MAX_DETAIL);
    let message = ToSource::Error(WireError {
        code: ErrorCode::Internal,
        detail,
    });
    let bytes = encode(&message).unwrap();
    let Ok(ToSource::Error(error)) = decode_body(&bytes[CONTROL_PREFIX..]) else {
        panic!("not an error");
    };
    assert!(error.detail.len() <= limits::MAX_DETAIL);
    assert!(error.detail.starts_with(" [31mä"));
}

#[test]
fn what_the_peer_would_refuse_is_not_sent() {
    let no_lanes = ToDestination::Final(Final {
        attempt: Attempt(1),
        lanes: Vec::new(),
        verify: Vec::new(),
        run_state: RunState::Running,
    });
    let WireEncodeError(reason) = encode(&no_lanes).unwrap_err();
    assert!(matches!(
        reason,
        Length {
            field: "final.lanes",
            ..
        }
    ));
    let windows = vec![samples::window_digest(1, 2); limits::MAX_DIGESTS];
    let mut digests = Digests {
        attempt: Attempt(1),
        windows,
        last: false,
    };
    let largest = encode(&ToSource::Digests(digests.clone())).unwrap();
    assert!(largest.len() < MAX_CONTROL_MESSAGE);
    digests.windows.push(samples::window_digest(1, 2));
    assert!(encode(&ToSource::Digests(digests)).is_err());
    let mut offer = samples::offer();
    offer.spec.devices = (0..limits::MAX_DEVICES)
        .map(|_| crate::spec::DeviceSpec {
            path: "p".repeat(512),
            kind: "k".repeat(512),
        })
        .collect();
    let WireEncodeError(reason) = encode(&ToDestination::Offer(offer)).unwrap_err();
    assert!(matches!(reason, WireDecodeError::TooLong { .. }));
}

fn feed<M: ControlMessage>(stream: &[u8], piece: usize) -> (Vec<M>, Result<(), WireDecodeError>) {
    let mut decoder = Decoder::new();
    let mut messages = Vec::new();
    for mut input in stream.chunks(piece.max(1)) {
        while !input.is_empty() {
            match decoder.next_message(&mut input) {
                Ok(message) => messages.extend(message),
                Err(error) => return (messages, Err(error)),
            }
        }
    }
    let end = decoder.finish();
    (messages, end)
}

proptest! {
    #[test]
    fn messages_to_the_destination_round_trip(messages in prop::collection::vec(samples::any_to_destination(), 1..4), piece in 1usize..300) {
        let stream: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        prop_assert_eq!(feed(&stream, piece), (messages, Ok(())));
    }

    #[test]
    fn messages_to_the_source_round_trip(messages in prop::collection::vec(samples::any_to_source(), 1..4), piece in 1usize..300) {
        let stream: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        prop_assert_eq!(feed(&stream, piece), (messages, Ok(())));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), piece in 1usize..64) {
        let _any = decode_body::<ToDestination>(&bytes);
        let _any = decode_body::<ToSource>(&bytes);
        let _any = feed::<ToDestination>(&bytes, piece);
    }

    /// What a changed message decodes to is a message within the caps: it can be sent, and comes back the same.
    #[test]
    fn changed_messages_never_panic_and_what_passes_is_within_the_caps(
        message in samples::any_to_destination(),
        answer in samples::any_to_source(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        cut_it: bool,
    ) {
        let mut bodies = [encode(&message).unwrap(), encode(&answer).unwrap()].map(|framed| framed[CONTROL_PREFIX..].to_vec());
        for body in &mut bodies {
            for (at, value) in &changes {
                let at = at.index(body.len());
                body[at] = *value;
            }
            if cut_it {
                body.truncate(cut.index(body.len()));
            }
        }
        if let Ok(decoded) = decode_body::<ToDestination>(&bodies[0]) {
            let again = encode(&decoded).unwrap();
            prop_assert_eq!(decode_body(&again[CONTROL_PREFIX..]), Ok(decoded));
        }
        if let Ok(decoded) = decode_body::<ToSource>(&bodies[1]) {
            let again = encode(&decoded).unwrap();
            prop_assert_eq!(decode_body(&again[CONTROL_PREFIX..]), Ok(decoded));
        }
    }

    #[test]
    fn a_stream_cut_anywhere_is_truncated_not_misread(messages in prop::collection::vec(samples::any_to_source(), 1..4), cut in any::<prop::sample::Index>(), piece in 1usize..64) {
        let framed: Vec<_> = messages.iter().map(|message| encode(message).unwrap()).collect();
        let stream = framed.concat();
        let cut = cut.index(stream.len());
        let (decoded, end) = feed::<ToSource>(&stream[..cut], piece);
        let mut whole = 0;
        let mut at = 0;
        while whole < framed.len() && at + framed[whole].len() <= cut {
            at += framed[whole].len();
            whole += 1;
        }
        prop_assert_eq!(&decoded[..], &messages[..whole]);
        prop_assert_eq!(end, if at == cut { Ok(()) } else { Err(WireDecodeError::Truncated) });
    }
}

#[test]
fn sequence_zero_means_none_yet_and_travels() {
    let message = ToDestination::Final(Final {
        attempt: Attempt(1),
        lanes: vec![FrameSeq(0), FrameSeq(u64::MAX)],
        verify: Vec::new(),
        run_state: RunState::Paused,
    });
    let bytes = encode(&message).unwrap();
    assert_eq!(decode_body(&bytes[CONTROL_PREFIX..]), Ok(message));
}
