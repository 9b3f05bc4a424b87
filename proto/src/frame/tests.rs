//! Golden bytes, round trips, and every rule of a frame header broken once.

use proptest::prelude::*;

use super::*;
use crate::geometry::WINDOW_BLOCKS;
use crate::ids::{Attempt, MigrationId, SessionNumber};

const LANES: u8 = 4;

/// Regions: three windows of which the last has two blocks, the second of them 100 bytes long; and one block.
fn geometry() -> [RegionLen; 2] {
    [RegionLen(2 * (2 << 20) + 4096 + 100), RegionLen(512)]
}

/// Blocks 0 and 1 of window 2 of region 0 (the second is short), neither zero.
fn header() -> FrameHeader {
    FrameHeader {
        version: LAYOUT_VERSION,
        seq: FrameSeq(7),
        region: RegionId(0),
        window: WindowIndex(2),
        present: WindowBits::first(2),
        zero: WindowBits::EMPTY,
        encoding: Encoding::Raw,
        raw_len: 4196,
        payload_len: 4196,
        digest: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
    }
}

fn check(header: &FrameHeader) -> Result<(), FrameError> {
    header.check(&geometry(), Lane(2), LANES, FrameSeq(7))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_frame_header_has_these_bytes() {
    let mut header = header();
    header.present = WindowBits([0x11, 0, 0, 0, 0, 0, 0, 1 << 63]);
    header.zero = WindowBits([0x10, 0, 0, 0, 0, 0, 0, 0]);
    header.encoding = Encoding::Zstd;
    header.payload_len = 0x0a0b;
    let golden = concat!(
        "01",                               // version
        "01",                               // encoding
        "0000",                             // region
        "02000000",                         // window
        "0700000000000000",                 // seq
        "64100000",                         // raw_len
        "0b0a0000",                         // payload_len
        "100f0e0d0c0b0a090807060504030201", // digest
        "1100000000000000",                 // present
        "000000000000000000000000000000000000000000000000",
        "000000000000000000000000000000000000000000000000",
        "0000000000000080",
        "1000000000000000", // zero
        "000000000000000000000000000000000000000000000000",
        "000000000000000000000000000000000000000000000000",
        "0000000000000000",
    );
    assert_eq!(hex(&header.encode()), golden);
    assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
}

/// `[WIRE-52]`
#[test]
fn differences_begin_with_their_bases() {
    let header = header();
    let bases = Bases {
        blocks: WindowBits::first(1),
        digest: header.digest,
    };
    let golden = concat!(
        "100f0e0d0c0b0a090807060504030201", // digest
        "0100000000000000",                 // blocks
        "000000000000000000000000000000000000000000000000",
        "000000000000000000000000000000000000000000000000",
        "0000000000000000",
    );
    assert_eq!(hex(&bases.encode()), golden);
    let payload = [&bases.encode()[..], b"rest"].concat();
    assert_eq!(Bases::split(&header, &payload), Ok((bases, &b"rest"[..])));
    let refused = |blocks: WindowBits, header: &FrameHeader| {
        let payload = Bases { blocks, ..bases }.encode();
        assert_eq!(Bases::split(header, &payload), Err(FrameError::Bases));
    };
    refused(WindowBits::EMPTY, &header);
    refused(WindowBits::first(3), &header);
    let zero = WindowBits::first(1);
    refused(
        zero,
        &FrameHeader {
            zero,
            ..header.clone()
        },
    );
    assert_eq!(
        Bases::split(&header, &payload[..79]),
        Err(FrameError::Bases)
    );
}

#[test]
fn the_stream_headers_have_these_bytes() {
    let mut header = StreamHeader {
        kind: StreamKind::Lane { lane: Lane(5) },
        session: SessionNumber(3),
        migration: MigrationId::from_bytes([0xab; 16]),
    };
    let rest = concat!("0300000000000000", "abababababababababababababababab");
    assert_eq!(hex(&header.encode()), format!("0100000005000000{rest}"));
    assert_eq!(StreamHeader::decode(&header.encode()), Ok(header));
    header.kind = StreamKind::DeviceState {
        attempt: Attempt(0x0102_0304),
    };
    assert_eq!(hex(&header.encode()), format!("0101000004030201{rest}"));
    assert_eq!(StreamHeader::decode(&header.encode()), Ok(header));
}

#[test]
fn a_right_header_passes() {
    assert_eq!(check(&header()), Ok(()));
    let mut all_zero = header();
    all_zero.zero = all_zero.present;
    (all_zero.raw_len, all_zero.payload_len) = (0, 0);
    assert_eq!(check(&all_zero), Ok(()));
    let mut compressed = header();
    compressed.encoding = Encoding::Zstd;
    compressed.payload_len = 20;
    assert_eq!(check(&compressed), Ok(()));
    assert_eq!(header().data_runs(geometry()[0])[0].len, 4196);
    assert_eq!(all_zero.zero_runs(geometry()[0])[0].len, 4196);
    assert!(all_zero.data_runs(geometry()[0]).is_empty());
}

/// `[WIRE-22]`: each rule, broken alone.
#[test]
fn every_broken_rule_is_named() {
    type Break = fn(&mut FrameHeader);
    type Named = fn(&FrameError) -> bool;
    let cases: &[(&str, Break, Named)] = &[
        (
            "version",
            |h| h.version = 2,
            |e| matches!(e, FrameError::Version { got: 2 }),
        ),
        (
            "gap",
            |h| h.seq = FrameSeq(8),
            |e| matches!(e, FrameError::Sequence { .. }),
        ),
        (
            "repeat",
            |h| h.seq = FrameSeq(6),
            |e| matches!(e, FrameError::Sequence { .. }),
        ),
        (
            "lane",
            |h| h.window = WindowIndex(1),
            |e| matches!(e, FrameError::Lane { .. }),
        ),
        (
            "region",
            |h| h.region = RegionId(2),
            |e| matches!(e, FrameError::Region { .. }),
        ),
        (
            "last region",
            |h| h.region = RegionId(u16::MAX),
            |e| matches!(e, FrameError::Region { .. }),
        ),
        (
            "window",
            |h| h.window = WindowIndex(6),
            |e| matches!(e, FrameError::Window { .. }),
        ),
        (
            "last window",
            |h| h.window = WindowIndex(u32::MAX - 1),
            |e| matches!(e, FrameError::Window { .. }),
        ),
        (
            "block past the end",
            |h| h.present.insert(2),
            |e| matches!(e, FrameError::Block { .. }),
        ),
        (
            "last block",
            |h| h.present.insert(511),
            |e| matches!(e, FrameError::Block { .. }),
        ),
        (
            "no block, but bytes",
            |h| h.present = WindowBits::EMPTY,
            |e| matches!(e, FrameError::RawLen { expected: 0, .. }),
        ),
        (
            "zero not present",
            |h| {
                h.present = WindowBits::first(1);
                h.zero = WindowBits::span(1, 2);
            },
            |e| matches!(e, FrameError::Zero),
        ),
        (
            "full last block",
            |h| h.raw_len = 8192,
            |e| matches!(e, FrameError::RawLen { expected: 4196, .. }),
        ),
        (
            "zero with bytes",
            |h| h.zero = h.present,
            |e| matches!(e, FrameError::RawLen { expected: 0, .. }),
        ),
        (
            "short raw",
            |h| h.payload_len = 4195,
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "long raw",
            |h| h.payload_len = u32::MAX,
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "empty zstd",
            |h| {
                h.encoding = Encoding::Zstd;
                h.payload_len = 0;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "grown zstd",
            |h| {
                h.encoding = Encoding::Zstd;
                h.payload_len = 4197;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "differences without bases",
            |h| {
                h.encoding = Encoding::Difference;
                h.payload_len = 80;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "grown differences",
            |h| {
                h.encoding = Encoding::Difference;
                h.payload_len = 4197;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "duplicates without origins",
            |h| {
                h.encoding = Encoding::Duplicate;
                h.payload_len = 87;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "grown duplicates",
            |h| {
                h.encoding = Encoding::Duplicate;
                h.payload_len = 4197;
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
        (
            "zstd of nothing",
            |h| {
                h.encoding = Encoding::Zstd;
                h.zero = h.present;
                (h.raw_len, h.payload_len) = (0, 0);
            },
            |e| matches!(e, FrameError::PayloadLen { .. }),
        ),
    ];
    for (name, break_it, named) in cases {
        let mut header = header();
        break_it(&mut header);
        let error = check(&header).expect_err(name);
        assert!(named(&error), "{name}: {error}");
        let wire: WireError = error.into();
        assert_eq!(wire.code, ErrorCode::BadFrame);
    }
}

#[test]
fn a_frame_holds_no_more_blocks_than_the_cap() {
    let geometry = [RegionLen(2 << 20)];
    let mut header = FrameHeader {
        window: WindowIndex(0),
        present: WindowBits::first(limits::MAX_FRAME_BLOCKS),
        raw_len: limits::MAX_FRAME_PAYLOAD,
        payload_len: limits::MAX_FRAME_PAYLOAD,
        ..header()
    };
    let check = |header: &FrameHeader| header.check(&geometry, Lane(0), LANES, FrameSeq(7));
    assert_eq!(check(&header), Ok(()));
    header.present.insert(limits::MAX_FRAME_BLOCKS);
    header.zero.insert(limits::MAX_FRAME_BLOCKS);
    assert_eq!(
        check(&header),
        Err(FrameError::BlockCount {
            got: limits::MAX_FRAME_BLOCKS + 1
        })
    );
}

#[test]
fn unknown_versions_encodings_and_kinds_do_not_decode() {
    let mut bytes = header().encode();
    bytes[1] = 4;
    assert_eq!(
        FrameHeader::decode(&bytes),
        Err(FrameError::Encoding { got: 4 })
    );
    bytes[0] = 0;
    assert_eq!(
        FrameHeader::decode(&bytes),
        Err(FrameError::Version { got: 0 })
    );
    let stream = |at: usize, value: u8| {
        let mut bytes = StreamHeader {
            kind: StreamKind::Lane { lane: Lane(5) },
            session: SessionNumber(3),
            migration: MigrationId::from_bytes([0xab; 16]),
        }
        .encode();
        bytes[at] = value;
        StreamHeader::decode(&bytes)
    };
    assert_eq!(stream(0, 9), Err(StreamHeaderError::Version { got: 9 }));
    assert_eq!(stream(1, 2), Err(StreamHeaderError::Kind { got: 2 }));
    assert_eq!(stream(2, 1), Err(StreamHeaderError::Reserved));
    assert_eq!(
        stream(4, 64),
        Err(StreamHeaderError::Lane { got: 64, lanes: 64 })
    );
    assert_eq!(
        stream(7, 1),
        Err(StreamHeaderError::Lane {
            got: 5 + (1 << 24),
            lanes: 64
        })
    );
}

#[test]
fn a_stream_of_another_session_is_refused() {
    let header = StreamHeader {
        kind: StreamKind::Lane { lane: Lane(5) },
        session: SessionNumber(3),
        migration: MigrationId::from_bytes([1; 16]),
    };
    let (mine, other) = (header.migration, MigrationId::from_bytes([2; 16]));
    assert_eq!(header.check(mine, SessionNumber(3), 6), Ok(()));
    assert!(matches!(
        header.check(mine, SessionNumber(4), 6),
        Err(StreamHeaderError::Session { .. })
    ));
    assert!(matches!(
        header.check(other, SessionNumber(3), 6),
        Err(StreamHeaderError::Migration { .. })
    ));
    assert_eq!(
        header.check(mine, SessionNumber(3), 5),
        Err(StreamHeaderError::Lane { got: 5, lanes: 5 })
    );
}

proptest! {
    #[test]
    fn frame_headers_round_trip(bytes in prop::collection::vec(any::<u8>(), FrameHeader::ENCODED_LEN), zstd: bool) {
        let mut bytes: [u8; FrameHeader::ENCODED_LEN] = bytes.try_into().unwrap();
        bytes[0] = LAYOUT_VERSION;
        bytes[1] = u8::from(zstd);
        let header = FrameHeader::decode(&bytes).unwrap();
        prop_assert_eq!(header.encode(), bytes, "every bit of the header means something");
    }

    #[test]
    fn stream_headers_round_trip_or_are_refused(bytes in prop::collection::vec(any::<u8>(), StreamHeader::ENCODED_LEN), kind in 0u8..3, reserved: bool, small: bool) {
        let mut bytes: [u8; StreamHeader::ENCODED_LEN] = bytes.try_into().unwrap();
        (bytes[0], bytes[1]) = (LAYOUT_VERSION, kind);
        if !reserved {
            bytes[2..4].fill(0);
        }
        if small {
            bytes[5..8].fill(0);
        }
        if let Ok(header) = StreamHeader::decode(&bytes) {
            prop_assert_eq!(header.encode(), bytes);
        }
    }

    /// Whatever a peer writes into a header that passes the check stays inside the region and under the caps.
    #[test]
    fn what_passes_the_check_stays_inside(
        region in 0u16..3, window in 0u32..6, seq in 6u64..9, present: [u64; 8], mask in 0u32..520, zero: [u64; 8],
        zstd: bool, right: bool, lens in (0u32..9000, 0u32..9000), lane in 0u8..LANES, base in 0u64..(5 << 20),
    ) {
        let geometry = [RegionLen(base), RegionLen(4097)];
        let present = WindowBits(present).and(&WindowBits::first(mask));
        let zero = WindowBits(zero).and(&present);
        let mut header = FrameHeader {
            version: LAYOUT_VERSION,
            seq: FrameSeq(seq),
            region: RegionId(region),
            window: WindowIndex(window),
            present,
            zero,
            encoding: if zstd { Encoding::Zstd } else { Encoding::Raw },
            raw_len: lens.0,
            payload_len: lens.1,
            digest: 0,
        };
        if right {
            let len = geometry[usize::from(region).min(1)];
            header.raw_len = len.bytes_of(header.window, &header.data_blocks());
            header.payload_len = header.raw_len;
            header.seq = FrameSeq(7);
        }
        if header.check(&geometry, Lane(lane), LANES, FrameSeq(7)).is_ok() {
            let len = geometry[usize::from(region)];
            prop_assert_eq!(lane_of(header.window, LANES), Lane(lane));
            prop_assert!(header.payload_len <= limits::MAX_FRAME_PAYLOAD && header.raw_len <= limits::MAX_FRAME_PAYLOAD);
            let mut data = 0;
            for run in header.data_runs(len) {
                prop_assert!(run.offset + u64::from(run.len) <= len.0);
                data += run.len;
            }
            prop_assert_eq!(data, header.raw_len);
            for run in header.zero_runs(len) {
                prop_assert!(run.offset + u64::from(run.len) <= len.0);
            }
            prop_assert!(header.present.count() <= WINDOW_BLOCKS);
        }
    }
}
