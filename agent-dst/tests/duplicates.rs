//! Frames of duplicates against the real agent: what is elsewhere in the guest is copied from there, and from nowhere else.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod support;

use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use support::{Client, Site, hello};
use vmferry_common::digest;
use vmferry_proto::error::ErrorCode;
use vmferry_proto::frame::{BlockRef, Encoding, FrameHeader, Origins};
use vmferry_proto::geometry::{WindowBits, WindowIndex};
use vmferry_proto::ids::{FrameSeq, Lane, RegionId, SessionNumber};
use vmferry_proto::message::Hello;

/// The first two blocks of a frame.
const TWO: WindowBits = WindowBits([3, 0, 0, 0, 0, 0, 0, 0]);

fn at(region: u16, window: u32, block: u16) -> BlockRef {
    BlockRef {
        region: RegionId(region),
        block,
        window: WindowIndex(window),
    }
}

/// Makes the first blocks of a good raw frame duplicates of what is at `places`, which has this digest; the others stay.
fn as_duplicates(
    frame: (FrameHeader, Bytes),
    places: &[BlockRef],
    digest: u128,
) -> (FrameHeader, Bytes) {
    let (mut header, raw) = frame;
    let origins = Origins {
        blocks: WindowBits::first(u32::try_from(places.len()).unwrap()),
        digest,
        places: places.to_vec(),
        rest: &raw[places.len() * 4096..],
    };
    let payload = [&origins.encode_head()[..], origins.rest].concat();
    header.encoding = Encoding::Duplicate;
    header.payload_len = u32::try_from(payload.len()).unwrap();
    (header, payload.into())
}

/// Digest of so many blocks of this byte.
fn digest_of(blocks: usize, fill: u8) -> u128 {
    digest::plain(&vec![fill; blocks * 4096])
}

/// `[WIRE-54]`
#[tokio::test]
async fn duplicates_of_what_cannot_be_are_refused() {
    let site = Site::new();
    let cases = [
        ("of another region", at(2, 0, 0)),
        ("of a window past the end", at(0, 4, 0)),
        ("of a block past the end", at(1, 1, 257)),
        ("of a block that no window has", at(0, 0, 512)),
        ("of a block that was not received", at(0, 0, 2)),
        ("of itself", at(1, 0, 1)),
    ];
    for (number, (what, place)) in (1u8..).zip(cases) {
        let mut client = Client::ready(&site, number).await;
        let first = client.frame(0, 0, TWO, 0x5a);
        client.send_frame(first).await;
        let frame = client.frame(1, 0, TWO, 0x5a);
        let frame = as_duplicates(frame, &[at(0, 0, 0), place], digest_of(2, 0x5a));
        client.send_frame(frame).await;
        let error = client.expect_error(ErrorCode::BadFrame).await;
        assert!(!error.detail.is_empty(), "{what}");
        site.is_clean().await;
    }
    let mut client = Client::ready(&site, 20).await;
    let first = client.frame(0, 0, TWO, 0x5a);
    client.send_frame(first).await;
    let frame = client.frame(0, 0, TWO, 0x5b);
    // The digest of the frame is that of other bytes than those that come of it.
    let frame = as_duplicates(frame, &[at(0, 0, 0)], digest_of(1, 0x5a));
    client.send_frame(frame).await;
    client.expect_error(ErrorCode::BadFrame).await;
    site.still_serves().await;
}

/// `[WIRE-54]` `[WIRE-56]`
#[tokio::test]
async fn duplicates_are_copied_from_where_they_are_as_long_as_they_are_there() {
    let site = Site::new();
    let mut client = Client::ready(&site, 1).await;
    for (region, fill) in [(0, 0x5a), (1, 0xa5)] {
        let frame = client.frame(region, 0, TWO, fill);
        client.send_frame(frame).await;
    }
    client.expect_progress_of(Lane(0), FrameSeq(2)).await;
    // Another lane: of memory, onto a disk, once whole and once with a block of its own.
    for blocks in [2, 3] {
        let frame = client.frame(1, 1, WindowBits::first(blocks), 0x5a);
        let places = [at(0, 0, 1), at(0, 0, 0)];
        client
            .send_frame(as_duplicates(frame, &places, digest_of(2, 0x5a)))
            .await;
    }
    client.expect_progress_of(Lane(1), FrameSeq(2)).await;
    let mut content = vec![0; 4 * 4096];
    let disk = std::fs::File::open(site.disk()).unwrap();
    disk.read_exact_at(&mut content, 2 << 20).unwrap();
    let expected = [vec![0x5a; 3 * 4096], vec![0; 4096]].concat();
    assert!(content == expected, "the disk holds something else");
    // Of a disk, which has something else by now.
    let frame = client.frame(0, 1, TWO, 0x5a);
    let places = [at(0, 0, 0), at(1, 0, 0)];
    client
        .send_frame(as_duplicates(frame, &places, digest_of(2, 0x5a)))
        .await;
    client.expect_error(ErrorCode::LinkLost).await;
    let again = Hello {
        session: SessionNumber(2),
        ..hello(1)
    };
    let mut client = Client::welcome(&site, again).await;
    let resume = client.offer().await.resume;
    let lanes = resume.expect("the copy is still there").lanes;
    assert_eq!([lanes[0].applied, lanes[1].applied], [FrameSeq(2); 2]);
    // Received in the session before.
    let frame = client.frame(0, 1, TWO, 0xa5);
    let places = [at(1, 0, 0), at(1, 0, 1)];
    client
        .send_frame(as_duplicates(frame, &places, digest_of(2, 0xa5)))
        .await;
    client.expect_progress_of(Lane(1), FrameSeq(1)).await;
    client.cancel().await;
    site.still_serves_with(30).await;
}
