//! Frames of which the destination has some blocks elsewhere.
//!
//! Owns what becomes of the blocks of such a frame; where they are is the table's to know (`duplicates`).

use bytes::{Bytes, BytesMut};
use vmferry_proto::frame::{BlockRef, Origins};
use vmferry_proto::geometry::{BLOCK_SIZE, WindowBits};

use super::{Blocks, CodecError, Elsewhere, Encoder, Shape, places};
use crate::digest::PlainDigest;
use crate::duplicates::FirstSent;

impl Elsewhere<'_> {
    /// Where the destination has those of `contents`, blocks with their digests, that are whole.
    pub(super) fn find(
        &self,
        blocks: &Blocks<'_>,
        contents: impl Iterator<Item = (u32, u64)>,
    ) -> Vec<(u32, BlockRef)> {
        let window = blocks.window.window;
        let whole = |(block, _): &(u32, u64)| blocks.region.block_len(window, *block) == BLOCK_SIZE;
        let frame = FirstSent {
            at: blocks.window,
            kind: self.kind,
            seq: self.seq,
        };
        self.duplicates.find(&frame, contents.filter(whole))
    }
}

impl Encoder {
    /// The blocks that were `found` elsewhere, and the payload of a frame that refers to them. It is always smaller than the blocks.
    pub(super) fn duplicates(
        &self,
        blocks: &Blocks<'_>,
        shape: &Shape,
        level: Option<i32>,
        found: &[(u32, BlockRef)],
    ) -> Result<(WindowBits, Bytes), CodecError> {
        let mut copied = WindowBits::EMPTY;
        found.iter().for_each(|(block, _)| copied.insert(*block));
        let contents = |which: WindowBits| {
            let data = places(blocks.region, blocks.window.window, &shape.data);
            let wanted = data.filter(move |(block, _)| which.contains(*block));
            wanted.map(|(_, place)| self.raw.get(place).unwrap_or_default())
        };
        let mut digest = PlainDigest::new();
        contents(copied).for_each(|content| digest.update(content));
        let origins = Origins {
            blocks: copied,
            digest: digest.finish(),
            places: found.iter().map(|(_, place)| *place).collect(),
            rest: &[],
        };
        let head = origins.encode_head();
        // A buffer of just its length: what waits in queues is counted by payload.
        let others = self.raw.len() - found.len() * BLOCK_SIZE as usize;
        let mut payload = BytesMut::with_capacity(head.len() + others);
        payload.extend_from_slice(&head);
        contents(shape.data.minus(&copied)).for_each(|content| payload.extend_from_slice(content));
        let rest = payload.get(head.len()..).unwrap_or_default();
        let level = level.filter(|_| !rest.is_empty());
        let packed = level.map(|level| self.compress(level, &head, rest));
        let packed = packed.transpose()?.flatten();
        Ok((copied, packed.unwrap_or_else(|| payload.freeze())))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmferry_proto::error::ErrorCode;
    use vmferry_proto::frame::{Encoding, FrameHeader};
    use vmferry_proto::geometry::{RegionLen, WindowIndex, WindowRef};
    use vmferry_proto::ids::{FrameSeq, Lane, RegionId};
    use vmferry_proto::spec::RegionKind;

    use super::*;
    use crate::codec::{Before, Decoder, Encoded};
    use crate::compress::Effort;
    use crate::duplicates::Duplicates;
    use crate::sent::{Secret, SentBlocks};

    /// Two windows, the second of them with a short last block.
    const REGION: RegionLen = RegionLen(2 * 2_097_152 - 1000);

    fn len_of(region: RegionId) -> Option<RegionLen> {
        (region.0 == 0).then_some(REGION)
    }

    /// Content that does not compress where the number is even, and is not zero.
    fn content(number: u8, len: usize) -> Vec<u8> {
        let mut state = u64::from(number) + 1;
        let mut byte = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_le_bytes()[6]
        };
        if number.is_multiple_of(2) {
            (0..len).map(|_| byte()).collect()
        } else {
            vec![number; len]
        }
    }

    /// Blocks of a window by number, with their contents.
    type Content<'a> = &'a [(u32, u8)];

    fn bytes(window: u32, blocks: Content<'_>) -> Vec<u8> {
        let len = |block| REGION.block_len(WindowIndex(window), block) as usize;
        let contents = blocks.iter().map(|(block, number)| (*number, len(*block)));
        contents
            .flat_map(|(number, len)| content(number, len))
            .collect()
    }

    /// The frame of `second` in window 1, where the destination has `first` in window 0.
    fn encode(first: Content<'_>, second: Content<'_>, level: Option<i32>) -> Encoded {
        let duplicates = Duplicates::new(2, 1024);
        let mut sent = SentBlocks::of_one(1, Secret::new());
        let mut encoder = Encoder::new();
        let mut encode = |window: u32, content: Content<'_>| {
            let mut read = WindowBits::EMPTY;
            content.iter().for_each(|(block, _)| read.insert(*block));
            let blocks = Blocks {
                window: WindowRef {
                    region: RegionId(0),
                    window: WindowIndex(window),
                },
                region: REGION,
                read,
                known_zero: WindowBits::EMPTY,
                bytes: &[],
            };
            let bytes = bytes(window, content);
            encoder.room(bytes.len()).copy_from_slice(&bytes);
            let before = Before {
                sent: &mut sent,
                kept: None,
                elsewhere: Some(Elsewhere {
                    duplicates: &duplicates,
                    kind: RegionKind::Memory,
                    seq: FrameSeq(1),
                }),
            };
            let encoded = encoder.encode_filled(&blocks, level.map(Effort::Always), Some(before));
            duplicates.on_applied(Lane(0), FrameSeq(1));
            encoded.unwrap()
        };
        encode(0, first);
        encode(1, second)
    }

    /// Decodes a frame of duplicates, with what the destination has in window 0.
    fn decode(
        header: &FrameHeader,
        payload: &[u8],
        first: Content<'_>,
    ) -> Result<Vec<u8>, CodecError> {
        let origins = Origins::split(header, payload, len_of).map_err(CodecError::Origins)?;
        let number = |at: &BlockRef| {
            let known = first
                .iter()
                .find(|(block, _)| *block == u32::from(at.block));
            known.map_or(1, |(_, number)| *number)
        };
        let there = origins.places.iter();
        let there: Vec<u8> = there.flat_map(|at| content(number(at), 4096)).collect();
        let mut decoder = Decoder::new();
        let decoded = decoder.decode_duplicates(header, &origins, REGION, &there);
        decoded.map(<[u8]>::to_vec)
    }

    const FIRST: Content<'static> = &[(0, 2), (1, 3), (7, 4)];

    /// `[WIRE-54]` `[WIRE-55]`
    #[test]
    fn what_is_elsewhere_goes_as_a_reference_and_only_to_what_it_is() {
        let second: Content<'_> = &[(3, 4), (5, 2), (6, 6), (511, 2)];
        let encoded = encode(FIRST, second, None);
        assert_eq!(encoded.encoding, Encoding::Duplicate);
        assert_eq!(encoded.by_reference.iter().collect::<Vec<_>>(), [3, 5]);
        let header = encoded.header(FrameSeq(1));
        header.check(&[REGION], Lane(1), 2, FrameSeq(1)).unwrap();
        // Two places, one whole block and the short one.
        assert_eq!(encoded.payload.len(), 80 + 2 * 8 + 4096 + 3096);
        let decoded = decode(&header, &encoded.payload, FIRST).unwrap();
        assert_eq!(decoded, bytes(1, second));
        let error = decode(&header, &encoded.payload, &[(0, 2), (7, 5)]).unwrap_err();
        assert!(matches!(error, CodecError::OtherOrigins) && error.to_wire().is_none());
        let wrong = FrameHeader {
            digest: header.digest ^ 1,
            ..header.clone()
        };
        let error = decode(&wrong, &encoded.payload, FIRST).unwrap_err();
        assert!(matches!(error, CodecError::Digest));
        // As if nothing was referred to.
        let error = Decoder::new()
            .decode(&header, &encoded.payload)
            .unwrap_err();
        assert_eq!(error.to_wire().unwrap().code, ErrorCode::BadFrame);
    }

    #[test]
    fn nothing_but_duplicates_takes_their_places_only() {
        let second: Vec<(u32, u8)> = (0..128).map(|block| (block, 2)).collect();
        let encoded = encode(FIRST, &second, Some(1));
        assert_eq!(encoded.payload.len(), 80 + 128 * 8);
        let decoded = decode(&encoded.header(FrameSeq(1)), &encoded.payload, FIRST).unwrap();
        assert_eq!(decoded, bytes(1, &second));
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_alike(
            blocks in prop::collection::btree_map(0u32..512, 1u8..9, 1..=128),
            level in prop::option::of(1i32..4),
        ) {
            let second: Vec<(u32, u8)> = blocks.into_iter().collect();
            let encoded = encode(FIRST, &second, level);
            let header = encoded.header(FrameSeq(1));
            header.check(&[REGION], Lane(1), 2, FrameSeq(1)).unwrap();
            let known = |(block, number): &&(u32, u8)| *block < 511 && (2..=4).contains(number);
            let copied: Vec<u32> = second.iter().filter(known).map(|it| it.0).collect();
            prop_assert_eq!(encoded.encoding == Encoding::Duplicate, !copied.is_empty());
            prop_assert_eq!(encoded.by_reference.iter().collect::<Vec<_>>(), copied);
            if encoded.encoding == Encoding::Duplicate {
                let decoded = decode(&header, &encoded.payload, FIRST).unwrap();
                prop_assert_eq!(decoded, bytes(1, &second));
            }
        }

        #[test]
        fn no_payload_makes_the_decoder_panic_or_yields_other_bytes(
            spoils in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
            cut in prop::option::of(any::<prop::sample::Index>()),
            raw_len in prop::option::of(0u32..600_000),
        ) {
            let second: Content<'_> = &[(3, 4), (5, 2), (6, 6), (8, 1), (9, 1)];
            let encoded = encode(FIRST, second, Some(1));
            let mut payload = encoded.payload.to_vec();
            for (at, byte) in &spoils {
                let at = at.index(payload.len());
                payload[at] = *byte;
            }
            if let Some(cut) = cut {
                payload.truncate(cut.index(payload.len()));
            }
            let header = encoded.header(FrameSeq(1));
            let header = FrameHeader {
                raw_len: raw_len.unwrap_or(header.raw_len),
                ..header
            };
            if let Ok(decoded) = decode(&header, &payload, FIRST) {
                prop_assert_eq!(decoded, bytes(1, second));
            }
        }
    }
}
