//! A hostile source against the real agent: whatever it sends is answered with one coded error, writes nothing, leaves
//! nothing behind, and the next source is served.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod support;

use bytes::Bytes;
use support::{Client, DISK, LANES, RAM, Site, hello, spec};
use vmferry_common::digest;
use vmferry_proto::error::ErrorCode;
use vmferry_proto::frame::{Bases, Encoding, FrameHeader, StreamKind};
use vmferry_proto::geometry::{WindowBits, WindowIndex};
use vmferry_proto::ids::{Attempt, FrameSeq, Lane, RegionId, SessionNumber};
use vmferry_proto::limits::MAX_COMPARES;
use vmferry_proto::message::{Hello, Offer, ToDestination, WindowRange};
use vmferry_proto::version::{ProtocolVersion, VersionRange};

/// Writes these bytes to the control stream of a fresh connection, ends it if asked to, and hears the error.
async fn say_bytes(site: &Site, bytes: &[u8], finish: bool) -> ErrorCode {
    let (_endpoint, connection) = support::connect(site, "alpha").await;
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(bytes).await.unwrap();
    if finish {
        send.finish().unwrap();
    }
    let answer = tokio::time::timeout(support::PATIENCE, recv.read_to_end(1 << 20)).await;
    let answer = answer.expect("an answer in time").expect("an answer");
    let body = answer.get(4..).expect("a framed message");
    match vmferry_proto::wire::decode_body(body).unwrap() {
        vmferry_proto::message::ToSource::Error(error) => error.code,
        other => panic!("not an error: {other:?}"),
    }
}

/// Bytes without sense, the same in each run.
struct Noise(u64);

impl Noise {
    const fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut next = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.to_le_bytes()[3]
        };
        (0..count).map(|_| next()).collect()
    }
}

#[tokio::test]
async fn bytes_that_are_no_frame_are_refused() {
    let site = Site::new();
    let mut noise = Noise::new();
    for number in 1..=12 {
        let mut client = Client::ready(&site, number).await;
        let mut bytes = client
            .stream_header(StreamKind::Lane { lane: Lane(0) })
            .encode()
            .to_vec();
        // In every second round after a good frame.
        if number % 2 == 0 {
            let (header, payload) = client.frame(0, 0, WindowBits::first(2), 0x5a);
            bytes.extend(header.encode());
            bytes.extend(&payload);
        }
        bytes.extend(noise.bytes(4096));
        let _lane = client.open_raw(&bytes).await;
        client.expect_error(ErrorCode::BadFrame).await;
        site.is_clean().await;
    }
    site.still_serves().await;
}

#[tokio::test]
async fn bytes_that_are_no_message_are_refused() {
    let site = Site::new();
    let mut noise = Noise::new();
    for round in 0..24 {
        // A length that fits, so that the body is looked at, and then anything.
        let mut bytes = 40u32.to_le_bytes().to_vec();
        bytes.extend(noise.bytes(40));
        assert_eq!(
            say_bytes(&site, &bytes, false).await,
            ErrorCode::ProtocolViolation,
            "round {round}"
        );
    }
    assert_eq!(
        say_bytes(&site, &[0xff; 64], false).await,
        ErrorCode::ProtocolViolation
    );
    assert_eq!(
        say_bytes(&site, &[9, 0, 0, 0, 1], true).await,
        ErrorCode::ProtocolViolation
    );
    assert_eq!(
        say_bytes(&site, &[0, 0, 0, 0], false).await,
        ErrorCode::ProtocolViolation
    );
    site.still_serves().await;
}

fn compare(region: u16) -> ToDestination {
    ToDestination::Compare(WindowRange {
        region: RegionId(region),
        first: WindowIndex(0),
        count: 256,
    })
}

/// `[WIRE-49]`
#[tokio::test]
async fn questions_about_no_region_or_too_many_at_once_end_the_session() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    client.say(compare(7)).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    let mut client = Client::ready(&site, 2).await;
    let attempt = client.open_attempt(1).await;
    client.say(compare(0)).await;
    let error = client.expect_error(ErrorCode::ProtocolViolation).await;
    assert!(error.detail.contains("Compare"), "{attempt}: {error}");
    let mut client = Client::ready(&site, 3).await;
    client.send_all(0x11).await;
    // In one piece, so that none is answered between them.
    let one = vmferry_proto::wire::encode(&compare(0)).unwrap();
    client.say_raw(&one.repeat(64 * MAX_COMPARES)).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    site.still_serves().await;
}

#[tokio::test]
async fn a_message_that_is_not_due_ends_the_session() {
    let site = Site::new();
    let attempt = Attempt(1);
    let messages = [
        ToDestination::Hello(hello(9)),
        ToDestination::OpenAttempt { attempt },
        ToDestination::Converged,
        compare(0),
        ToDestination::DeviceState {
            attempt,
            len: 1,
            digest: 0,
        },
        ToDestination::Abort {
            attempt,
            reason: support::cancelled(),
        },
    ];
    for (number, message) in (1u8..).zip(messages) {
        let mut client = Client::welcome(&site, hello(number)).await;
        client.say(message).await;
        client.expect_error(ErrorCode::ProtocolViolation).await;
    }
    let mut client = Client::greet(&site, "alpha", hello(20)).await;
    client.expect_welcome().await;
    client.offer().await;
    client
        .say(ToDestination::Offer(Offer {
            spec: spec(),
            populated: Vec::new(),
        }))
        .await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    let mut client = Client::silent(&site, "alpha", hello(21)).await;
    client
        .say(ToDestination::Offer(Offer {
            spec: spec(),
            populated: Vec::new(),
        }))
        .await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    site.still_serves().await;
}

#[tokio::test]
async fn who_may_not_send_is_told_why() {
    let site = Site::new();
    let mut unknown = hello(1);
    unknown.guest = "db-1".parse().unwrap();
    let mut client = Client::greet(&site, "alpha", unknown).await;
    let error = client.expect_error(ErrorCode::UnknownGuest).await;
    assert!(error.detail.contains("db-1"), "{error}");

    let mut client = Client::greet(&site, "mallory", hello(2)).await;
    let error = client.expect_error(ErrorCode::NotAuthorized).await;
    assert!(error.detail.contains("mallory"), "{error}");

    let mut future = hello(3);
    future.versions = VersionRange {
        min: ProtocolVersion(90),
        max: ProtocolVersion(91),
    };
    let mut client = Client::greet(&site, "alpha", future).await;
    client.expect_error(ErrorCode::VersionMismatch).await;

    site.write_guest("from = []");
    let mut client = Client::greet(&site, "alpha", hello(4)).await;
    client.expect_error(ErrorCode::NotAuthorized).await;
    site.write_guest("from = ['alpha']");
    site.still_serves().await;
}

#[tokio::test]
async fn sessions_and_migrations_do_not_mix() {
    let site = Site::new();
    let mut second = hello(1);
    second.session = SessionNumber(5);
    let mut first = Client::welcome(&site, second.clone()).await;

    let mut stale = Client::greet(&site, "alpha", second.clone()).await;
    stale.expect_error(ErrorCode::StaleSession).await;
    second.session = SessionNumber(6);
    let mut thief = Client::greet(&site, "gamma", second.clone()).await;
    thief.expect_error(ErrorCode::NotAuthorized).await;
    let mut other = Client::greet(&site, "gamma", hello(2)).await;
    other.expect_error(ErrorCode::GuestBusy).await;

    let mut newer = Client::welcome(&site, second).await;
    first.expect_error(ErrorCode::StaleSession).await;
    newer.offer().await;
    newer.cancel().await;
    site.still_serves().await;
}

/// What is done to a good frame.
type Spoil = fn(&mut FrameHeader, &mut Bytes);

#[tokio::test]
async fn a_bad_frame_is_refused_and_writes_nothing() {
    let site = Site::new();
    let spoils: [(&str, Spoil); 12] = [
        ("a window past the end", |header, _| {
            header.window = WindowIndex(1 << 20);
        }),
        ("a region that is not there", |header, _| {
            header.region = RegionId(7);
        }),
        ("another lane's window", |header, _| {
            header.window = WindowIndex(1);
        }),
        ("a gap in the numbers", |header, _| header.seq = FrameSeq(3)),
        ("a repeated number", |header, _| header.seq = FrameSeq(0)),
        ("no block", |header, _| header.present = WindowBits::EMPTY),
        ("too many blocks", |header, _| {
            header.present = WindowBits::FULL;
        }),
        ("zero blocks that are not there", |header, _| {
            header.zero = WindowBits::span(40, 41);
        }),
        ("a decoded length of its own", |header, _| {
            header.raw_len += 1;
        }),
        ("another layout", |header, _| header.version = 9),
        ("a wrong digest", |header, _| header.digest ^= 1),
        ("bytes that are no zstd", |header, _| {
            header.encoding = Encoding::Zstd;
        }),
    ];
    for (number, (what, spoil)) in (1u8..).zip(spoils) {
        let mut client = Client::ready(&site, number).await;
        let (mut header, mut payload) = client.frame(0, 0, WindowBits::first(2), 0x5a);
        spoil(&mut header, &mut payload);
        client.send_raw(Lane(0), &header, &payload).await;
        let error = client.expect_error(ErrorCode::BadFrame).await;
        assert!(!error.detail.is_empty(), "{what}");
        site.is_clean().await;
    }
    site.still_serves().await;
}

#[tokio::test]
async fn blocks_past_the_end_of_a_disk_are_not_written() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    // The disk's second window has 257 blocks; the frame claims the one behind them.
    let region = vmferry_proto::geometry::RegionLen(4 << 20);
    let behind = WindowBits::span(257, 258);
    let (header, payload) =
        client.frame_of(1, region, WindowIndex(1), behind, &support::block(0x5a));
    client.send_frame((header, payload)).await;
    client.expect_error(ErrorCode::BadFrame).await;
    site.is_clean().await;
    let image = std::fs::read(site.disk()).unwrap();
    assert_eq!(image.len() as u64, DISK);
    assert!(image.iter().all(|byte| *byte == 0), "something was written");
    site.still_serves().await;
}

/// Makes the good raw frame one of differences: of `blocks` to bytes with this digest, the rest as it was.
fn as_differences(
    frame: (FrameHeader, Bytes),
    blocks: WindowBits,
    digest: u128,
) -> (FrameHeader, Bytes) {
    let (mut header, raw) = frame;
    let packed = zstd::bulk::compress(&raw, 1).unwrap();
    let payload = [&Bases { blocks, digest }.encode()[..], &packed].concat();
    header.encoding = Encoding::Difference;
    header.payload_len = u32::try_from(payload.len()).unwrap();
    (header, payload.into())
}

/// `[WIRE-52]`: whatever is named as a base, nothing is written that is not what the frame's digest says.
#[tokio::test]
async fn differences_to_what_cannot_be_are_refused() {
    let site = Site::new();
    let zeros = digest::plain(&[0; 2 * 4096]);
    let two = WindowBits::first(2);
    type Make = fn(&mut Client, u128) -> (FrameHeader, Bytes);
    let cases: [(&str, Make); 5] = [
        ("to no block", |client, zeros| {
            as_differences(
                client.frame(0, 0, WindowBits::first(2), 0x5a),
                WindowBits::EMPTY,
                zeros,
            )
        }),
        ("to a block that is not in the frame", |client, zeros| {
            as_differences(
                client.frame(0, 0, WindowBits::first(2), 0x5a),
                WindowBits::FULL,
                zeros,
            )
        }),
        ("to a disk", |client, zeros| {
            as_differences(
                client.frame(1, 0, WindowBits::first(2), 0x5a),
                WindowBits::first(2),
                zeros,
            )
        }),
        ("with another result", |client, zeros| {
            let mut frame = client.frame(0, 0, WindowBits::first(2), 0x5a);
            frame.0.digest ^= 1;
            as_differences(frame, WindowBits::first(2), zeros)
        }),
        ("that are not zstd", |client, zeros| {
            let frame = client.frame(0, 0, WindowBits::first(2), 0x5a);
            let (header, payload) = as_differences(frame, WindowBits::first(2), zeros);
            (
                header,
                [&payload[..Bases::ENCODED_LEN], &[0xff; 4096]]
                    .concat()
                    .into(),
            )
        }),
    ];
    for (number, (what, make)) in (1u8..).zip(cases) {
        let mut client = Client::ready(&site, number).await;
        let (mut header, payload) = make(&mut client, zeros);
        header.payload_len = u32::try_from(payload.len()).unwrap();
        client.send_raw(Lane(0), &header, &payload).await;
        let error = client.expect_error(ErrorCode::BadFrame).await;
        assert!(!error.detail.is_empty(), "{what}");
        site.is_clean().await;
    }
    // A good one, to the zeros that a fresh copy has, and then the same once more, to what is no longer there.
    let mut client = Client::ready(&site, 20).await;
    let good = client.frame(0, 0, two, 0x5a);
    client.send_frame(as_differences(good, two, zeros)).await;
    client.expect_progress(Lane(0)).await;
    let stale = client.frame(0, 0, two, 0x5a);
    client.send_frame(as_differences(stale, two, zeros)).await;
    // `[WIRE-53]`: the session ends, and the next one goes on where it was.
    client.expect_error(ErrorCode::LinkLost).await;
    let again = Hello {
        session: SessionNumber(2),
        ..hello(20)
    };
    let mut client = Client::welcome(&site, again).await;
    let resume = client
        .offer()
        .await
        .resume
        .expect("the copy is still there");
    assert_eq!(resume.lanes[0].applied, FrameSeq(1));
    client.cancel().await;
    site.is_clean().await;
    site.still_serves_with(30).await;
}

#[tokio::test]
async fn a_zstd_bomb_does_not_go_off() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    let (mut header, _) = client.frame(0, 0, WindowBits::first(2), 0x5a);
    let bomb = zstd::bulk::compress(&vec![0x5a; 256 << 20], 1).unwrap();
    let bomb = bomb.get(..8192.min(bomb.len())).unwrap();
    header.encoding = Encoding::Zstd;
    header.payload_len = u32::try_from(bomb.len()).unwrap();
    client.send_raw(Lane(0), &header, bomb).await;
    client.expect_error(ErrorCode::BadFrame).await;
    site.still_serves().await;
}

#[tokio::test]
async fn lanes_that_do_not_belong_are_refused() {
    let site = Site::new();
    // Before Ready.
    let mut client = Client::welcome(&site, hello(1)).await;
    let header = client
        .stream_header(StreamKind::Lane { lane: Lane(0) })
        .encode();
    let _early = client.open_raw(&header).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    // One too many, one twice, one of another session, and no header at all.
    let mut client = Client::ready(&site, 2).await;
    let header = client
        .stream_header(StreamKind::Lane { lane: Lane(LANES) })
        .encode();
    let _surplus = client.open_raw(&header).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;

    let mut client = Client::ready(&site, 3).await;
    let header = client
        .stream_header(StreamKind::Lane { lane: Lane(1) })
        .encode();
    let _first = client.open_raw(&header).await;
    let _second = client.open_raw(&header).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;

    let mut client = Client::ready(&site, 4).await;
    let mut header = client.stream_header(StreamKind::Lane { lane: Lane(0) });
    header.session = SessionNumber(77);
    let _foreign = client.open_raw(&header.encode()).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;

    let mut client = Client::ready(&site, 5).await;
    let _rubbish = client.open_raw(&[0xee; 64]).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    site.still_serves().await;
}

#[tokio::test]
async fn a_device_state_that_lies_is_not_loaded() {
    let site = Site::new();
    let state = b"not what was announced".as_slice();
    let digest = digest::plain(state);
    let len = state.len() as u64;
    let lies = [
        (len, digest ^ 1, ErrorCode::BadFrame),
        (len - 1, digest, ErrorCode::BadFrame),
        (len + 1, digest, ErrorCode::BadFrame),
    ];
    for (number, (len, digest, code)) in (1u8..).zip(lies) {
        let mut client = Client::ready(&site, number).await;
        client.send_all(0x11).await;
        let attempt = client.open_attempt(1).await;
        client.say(ToDestination::Final(client.last(attempt))).await;
        client
            .say(ToDestination::DeviceState {
                attempt,
                len,
                digest,
            })
            .await;
        let header = client
            .stream_header(StreamKind::DeviceState { attempt })
            .encode();
        let mut stream = client.open_raw(&header).await;
        let _ = stream.write_all(state).await;
        let _ = stream.finish();
        client.expect_error(code).await;
        site.is_clean().await;
    }
    // More than any guest has: refused by its message, before a byte of it comes.
    let mut client = Client::ready(&site, 9).await;
    client.send_all(0x11).await;
    let attempt = client.open_attempt(1).await;
    client.say(ToDestination::Final(client.last(attempt))).await;
    let body = [
        0x2a, 0x0c, 0x08, 0x01, 0x10, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ];
    let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(body);
    client.say_raw(&bytes).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    site.still_serves().await;
}

#[tokio::test]
async fn an_announced_end_that_is_not_kept_to_is_refused() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    client.send_all(0x11).await;
    let attempt = client.open_attempt(1).await;
    let mut last = client.last(attempt);
    last.lanes.pop();
    client.say(ToDestination::Final(last)).await;
    client.expect_error(ErrorCode::ProtocolViolation).await;

    let mut client = Client::ready(&site, 2).await;
    client.send_all(0x11).await;
    let attempt = client.open_attempt(1).await;
    let last = client.last(attempt);
    client.say(ToDestination::Final(last)).await;
    client.expect_complete().await;
    let frame = client.frame(0, 0, WindowBits::first(1), 0x77);
    client.send_frame(frame).await;
    // The frame is applied before the state is looked at: its progress says so.
    client.expect_progress(Lane(0)).await;
    client
        .say(ToDestination::DeviceState {
            attempt,
            len: 1,
            digest: 0,
        })
        .await;
    client.expect_error(ErrorCode::ProtocolViolation).await;
    site.still_serves().await;
}

#[tokio::test]
async fn regions_of_another_size_are_refused_before_anything_is_copied() {
    let site = Site::new();
    let mut client = Client::welcome(&site, hello(1)).await;
    let mut spec = spec();
    spec.regions[0].len.0 = RAM * 2;
    client
        .say(ToDestination::Offer(Offer {
            spec,
            populated: Vec::new(),
        }))
        .await;
    let error = client.expect_error(ErrorCode::Incompatible).await;
    assert!(error.detail.contains("ram"), "{error}");
    site.still_serves().await;
}
