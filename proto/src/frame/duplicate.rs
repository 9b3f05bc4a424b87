//! What the payload of a frame of duplicates begins with: which of its blocks the destination has elsewhere, and where.
//!
//! Owns the layout and the check of it against the guest's regions. Whether what is named was received is known to who has the
//! copy; who reads it compares its digest (`[WIRE-54]`).

use serde::{Deserialize, Serialize};

use super::{FrameError, FrameHeader};
use crate::geometry::{BLOCK_SIZE, RegionLen, WindowBits, WindowIndex};
use crate::ids::RegionId;
use crate::layout;

/// A block of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockRef {
    /// The region.
    pub region: RegionId,
    /// The block within its window.
    pub block: u16,
    /// The window within the region.
    pub window: WindowIndex,
}

/// The duplicates of a frame and what they are of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origins<'a> {
    /// Which blocks of the frame: some of those that are not zero, whole ones, and at least one.
    pub blocks: WindowBits,
    /// XXH3-128 of their bytes, one block behind the other.
    pub digest: u128,
    /// Where the destination has the content of each, in their order.
    pub places: Vec<BlockRef>,
    /// The other blocks of the frame that are not zero: raw where it is as long as they are, else one zstd frame of them.
    pub rest: &'a [u8],
}

/// The layout: fields in this order, and then the places.
#[derive(Serialize, Deserialize)]
struct RawOrigins {
    digest: u128,
    blocks: [u64; 8],
}

/// Bytes before the places.
const HEAD_LEN: usize = 80;
/// Bytes of a place.
const PLACE_LEN: usize = 8;

impl Origins<'_> {
    /// Bytes at the beginning of the payload, at least.
    pub const LEAST_LEN: usize = HEAD_LEN + PLACE_LEN;

    /// The bytes before `rest`.
    #[must_use]
    pub fn encode_head(&self) -> Vec<u8> {
        let raw = RawOrigins {
            digest: self.digest,
            blocks: self.blocks.0,
        };
        let head: [u8; HEAD_LEN] = layout::encode_fixed(&raw)
            .expect("integers and arrays of them always take the same bytes");
        let mut bytes = Vec::with_capacity(HEAD_LEN + self.places.len() * PLACE_LEN);
        bytes.extend(head);
        for place in &self.places {
            let place: [u8; PLACE_LEN] =
                layout::encode_fixed(place).expect("integers always take the same bytes");
            bytes.extend(place);
        }
        bytes
    }
}

impl<'a> Origins<'a> {
    /// What the payload of `header`, which was checked, holds; `len_of` are the lengths of the guest's regions.
    ///
    /// # Errors
    /// [`FrameError::Origins`]: the payload's length is not possible, or other blocks are named than the frame has.
    /// [`FrameError::Origin`]: a duplicate is of what is no whole block of the guest.
    pub fn split(
        header: &FrameHeader,
        payload: &'a [u8],
        len_of: impl Fn(RegionId) -> Option<RegionLen>,
    ) -> Result<Self, FrameError> {
        let (head, behind) = payload
            .split_at_checked(HEAD_LEN)
            .ok_or(FrameError::Origins)?;
        let raw: RawOrigins = layout::decode(head).map_err(|_| FrameError::Origins)?;
        let blocks = WindowBits(raw.blocks);
        let count = blocks.count();
        let named = blocks.minus(&header.data_blocks()).is_empty() && count > 0;
        let len = len_of(header.region).ok_or(FrameError::Origins)?;
        let whole = len.bytes_of(header.window, &blocks) == count * BLOCK_SIZE;
        let split = behind.split_at_checked(count as usize * PLACE_LEN);
        let Some((places, rest)) = split.filter(|_| named && whole) else {
            return Err(FrameError::Origins);
        };
        let others = header.raw_len.saturating_sub(count * BLOCK_SIZE) as usize;
        if rest.len() > others || rest.is_empty() != (others == 0) {
            return Err(FrameError::Origins);
        }
        let places = places.chunks_exact(PLACE_LEN);
        Ok(Self {
            blocks,
            digest: raw.digest,
            places: places
                .map(|place| BlockRef::read(place, &len_of))
                .collect::<Result<_, _>>()?,
            rest,
        })
    }
}

impl BlockRef {
    fn read(
        bytes: &[u8],
        len_of: impl Fn(RegionId) -> Option<RegionLen>,
    ) -> Result<Self, FrameError> {
        let place: Self = layout::decode(bytes).map_err(|_| FrameError::Origins)?;
        let block = u32::from(place.block);
        let whole = len_of(place.region).is_some_and(|len| {
            len.all_of(place.window).contains(block)
                && len.block_len(place.window, block) == BLOCK_SIZE
        });
        whole.then_some(place).ok_or(FrameError::Origin(place))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::frame::{Encoding, LAYOUT_VERSION};
    use crate::ids::FrameSeq;

    /// Two windows, the second of them with a short last block; and less than one block.
    const GUEST: [RegionLen; 2] = [RegionLen(2 * 2_097_152 - 1000), RegionLen(512)];

    fn len_of(region: RegionId) -> Option<RegionLen> {
        GUEST.get(usize::from(region.0)).copied()
    }

    fn at(region: u16, window: u32, block: u16) -> BlockRef {
        BlockRef {
            region: RegionId(region),
            block,
            window: WindowIndex(window),
        }
    }

    /// Blocks 0, 1 and the short last one of window 1.
    fn header() -> FrameHeader {
        let mut present = WindowBits::first(2);
        present.insert(511);
        FrameHeader {
            version: LAYOUT_VERSION,
            seq: FrameSeq(1),
            region: RegionId(0),
            window: WindowIndex(1),
            present,
            zero: WindowBits::EMPTY,
            encoding: Encoding::Duplicate,
            raw_len: 2 * 4096 + 3096,
            payload_len: 0,
            digest: 0,
        }
    }

    fn origins(places: Vec<BlockRef>) -> Origins<'static> {
        Origins {
            blocks: WindowBits::first(u32::try_from(places.len()).unwrap()),
            digest: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
            places,
            rest: b"rest",
        }
    }

    fn payload(origins: &Origins<'_>) -> Vec<u8> {
        [&origins.encode_head()[..], origins.rest].concat()
    }

    /// `[WIRE-54]`
    #[test]
    fn duplicates_begin_with_their_origins() {
        let origins = origins(vec![at(0, 1, 0x1fe), at(0, 0, 3)]);
        let golden = concat!(
            "100f0e0d0c0b0a090807060504030201", // digest
            "0300000000000000",                 // blocks
            "000000000000000000000000000000000000000000000000",
            "000000000000000000000000000000000000000000000000",
            "0000000000000000",
            "0000fe0101000000", // region, block, window
            "0000030000000000",
        );
        let head = origins.encode_head();
        let head: String = head.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(head, golden);
        let payload = payload(&origins);
        assert_eq!(Origins::split(&header(), &payload, len_of), Ok(origins));
    }

    /// `[WIRE-54]`
    #[test]
    fn duplicates_of_what_cannot_be_are_refused() {
        let good = origins(vec![at(0, 0, 3), at(0, 0, 3)]);
        let split =
            |origins: &Origins<'_>| Origins::split(&header(), &payload(origins), len_of).map(drop);
        assert_eq!(split(&good), Ok(()));
        for blocks in [
            WindowBits::EMPTY,
            WindowBits::span(1, 3),
            // The short block is no whole one.
            WindowBits::span(511, 512),
        ] {
            let wrong = Origins {
                blocks,
                ..good.clone()
            };
            assert_eq!(split(&wrong), Err(FrameError::Origins), "{blocks:?}");
        }
        let nowhere = [(0, 1, 511), (0, 2, 0), (0, 0, 512), (1, 0, 0), (2, 0, 0)];
        for (region, window, block) in nowhere {
            let place = at(region, window, block);
            let wrong = origins(vec![at(0, 0, 3), place]);
            assert_eq!(split(&wrong), Err(FrameError::Origin(place)));
        }
        // The short block is all that is left: it is there, and not more of it.
        for rest in [&[][..], &[0; 3097]] {
            let wrong = Origins {
                rest,
                ..good.clone()
            };
            assert_eq!(split(&wrong), Err(FrameError::Origins), "{}", rest.len());
        }
        let short = payload(&good);
        for len in [0, 79, 95] {
            let split = Origins::split(&header(), &short[..len], len_of);
            assert_eq!(split, Err(FrameError::Origins));
        }
    }

    proptest! {
        #[test]
        fn no_payload_names_what_is_not_there(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            bits in any::<u8>(),
        ) {
            let mut payload = payload;
            if let Some(blocks) = payload.get_mut(16..80) {
                blocks.fill(0);
                blocks[0] = bits;
            }
            if let Ok(origins) = Origins::split(&header(), &payload, len_of) {
                prop_assert_eq!(origins.places.len(), origins.blocks.count() as usize);
                for place in &origins.places {
                    let len = len_of(place.region).unwrap();
                    prop_assert_eq!(len.block_len(place.window, u32::from(place.block)), 4096);
                    prop_assert!(u32::from(place.block) < crate::geometry::WINDOW_BLOCKS);
                }
            }
        }
    }
}
