//! The window codec: blocks of a window become a frame's payload, and back.
//!
//! Owns the zero test, compression, differences, duplicates and the digest of the raw bytes; the frame's layout is
//! `vmferry_proto::frame`'s and where bytes come from or go to is the caller's. Invariants: guest memory was
//! copied before it came here and is copied at most once more, and a peer cannot make the decoder produce
//! more bytes than the checked header announced.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{Bases, BlockRef, Encoding, FrameError, FrameHeader, LAYOUT_VERSION};
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::FrameSeq;
use vmferry_proto::limits::MAX_FRAME_BLOCKS;
use vmferry_proto::spec::RegionKind;

use crate::compress::{Effort, Tried};
use crate::digest::{self, PlainDigest};
use crate::duplicates::Duplicates;
use crate::kept::{self, KeptBlocks};
use crate::sent::{SentBlocks, SentWindow};

mod decode;
mod duplicate;
mod press;
mod spent;

pub use decode::{Decoder, check_raw};
pub use press::EncoderPool;
use press::Press;
use spent::Started;

/// What all blocks are compared with.
static ZERO_BLOCK: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];

/// zstd level of a frame that is mostly differences and would go raw otherwise: differences are nearly all zeros.
const DIFFERENCE_LEVEL: i32 = 1;

/// Blocks could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The caller's buffer does not hold the blocks it names: a bug here.
    #[error("{got} bytes were given for {count} blocks of {expected} bytes")]
    Blocks {
        /// How many blocks there are, zero ones included.
        count: u32,
        /// What the blocks take.
        expected: usize,
        /// What was given.
        got: usize,
    },
    /// zstd cannot be used with this level.
    #[error("zstd cannot be set up for level {level}")]
    Setup {
        /// The level.
        level: i32,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The payload is not what the header says: not zstd, another length, or a bomb.
    #[error("the payload does not decode to {expected} bytes")]
    Payload {
        /// What the header announced.
        expected: u32,
        /// What zstd said, where it did.
        #[source]
        source: Option<std::io::Error>,
    },
    /// The decoded bytes are not those that were sent.
    #[error("the digest of the decoded bytes differs")]
    Digest,
    /// The frame's differences are to no blocks that can be.
    #[error("the frame's differences are of no use")]
    Bases(#[source] FrameError),
    /// The frame's differences are to other bytes than those that are here: the peer is not to blame.
    #[error("the blocks here are not those to which the frame has differences")]
    OtherBases,
    /// The frame's duplicates are of no blocks that can be.
    #[error("the frame's duplicates are of no use")]
    Origins(#[source] FrameError),
    /// The frame's duplicates are of other bytes than those that are here: the peer is not to blame.
    #[error("the blocks here are not those of which the frame has duplicates")]
    OtherOrigins,
}

impl CodecError {
    /// What the peer is to be told; `None` where it is not to blame.
    #[must_use]
    pub fn to_wire(&self) -> Option<WireError> {
        match self {
            Self::Payload { .. } | Self::Digest | Self::Bases(_) | Self::Origins(_) => Some(
                WireError::new(ErrorCode::BadFrame, format!("bad frame: {self}")),
            ),
            Self::Blocks { .. } | Self::Setup { .. } | Self::OtherBases | Self::OtherOrigins => {
                None
            }
        }
    }
}

/// Encoded blocks: everything a frame carries but its place on a lane.
#[derive(Debug, Clone)]
pub struct Encoded {
    /// The window.
    pub window: WindowRef,
    /// Blocks accounted for, zero ones included.
    pub present: WindowBits,
    /// Those that are zero.
    pub zero: WindowBits,
    /// Blocks that were given and are not in the frame: they are as they were sent before.
    pub unchanged: WindowBits,
    /// Blocks that go by reference to what the destination has: as differences or as duplicates, which `encoding` says.
    pub by_reference: WindowBits,
    /// Encoding of the payload.
    pub encoding: Encoding,
    /// Bytes of the blocks that are not zero.
    pub raw_len: u32,
    /// XXH3-128 of those bytes.
    pub digest: u128,
    /// The payload.
    pub payload: Bytes,
    /// What compression came to, of the frame or a piece of it; `None` where none was tried.
    pub tried: Option<Tried>,
}

impl Encoded {
    /// The header of this frame as number `seq` of its lane.
    #[must_use]
    pub fn header(&self, seq: FrameSeq) -> FrameHeader {
        FrameHeader {
            version: LAYOUT_VERSION,
            seq,
            region: self.window.region,
            window: self.window.window,
            present: self.present,
            zero: self.zero,
            encoding: self.encoding,
            raw_len: self.raw_len,
            // At most MAX_FRAME_PAYLOAD: the encoder takes no more blocks.
            payload_len: u32::try_from(self.payload.len()).unwrap_or(u32::MAX),
            digest: self.digest,
        }
    }
}

/// What is to be encoded.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// The window.
    pub window: WindowRef,
    /// Length of its region: the last block may be short.
    pub region: RegionLen,
    /// Blocks whose bytes are in `bytes`; at most `MAX_FRAME_BLOCKS` together with `known_zero`.
    pub read: WindowBits,
    /// Blocks known to be zero without reading them (holes); not in `read`.
    pub known_zero: WindowBits,
    /// The bytes of `read`, one block behind the other.
    pub bytes: &'a [u8],
}

/// What a lane knows of what it sent before.
#[derive(Debug)]
pub struct Before<'a> {
    /// Digests.
    pub sent: &'a mut SentBlocks,
    /// Content of blocks of memory that are written again and again, if the peer takes differences.
    pub kept: Option<KeptBefore<'a>>,
    /// What the destination has elsewhere, if the peer takes duplicates and they are worth the time now.
    pub elsewhere: Option<Elsewhere<'a>>,
}

/// What all lanes of a session sent, for a frame of which no block was sent before.
#[derive(Debug, Clone, Copy)]
pub struct Elsewhere<'a> {
    /// The blocks, by content.
    pub duplicates: &'a Duplicates,
    /// What the frame's window is of.
    pub kind: RegionKind,
    /// Number of the frame: it is the next one of its lane.
    pub seq: FrameSeq,
}

/// Content that was sent before, and what is to be done with it.
#[derive(Debug)]
pub struct KeptBefore<'a> {
    /// The content.
    pub blocks: &'a mut KeptBlocks,
    /// Whether the frame's blocks are likely to be sent again: then they are kept.
    pub again: bool,
    /// Whether differences are worth the time now.
    pub differ: bool,
}

/// Encodes windows; one per worker.
#[derive(Debug)]
pub struct Encoder {
    /// The non-zero blocks of the frame at hand.
    raw: BytesMut,
    /// Where `raw` comes from, and goes when it is lent to the transport.
    pool: Arc<EncoderPool>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Encoder {
    /// An encoder with a pool of its own; zstd is set up with the first frame that wants it.
    #[must_use]
    pub fn new() -> Self {
        Self::of(Arc::default())
    }

    /// An encoder whose memory comes from `pool`, and goes back there when what it made was sent.
    #[must_use]
    pub fn of(pool: Arc<EncoderPool>) -> Self {
        Self {
            raw: BytesMut::new(),
            pool,
        }
    }

    /// Encodes blocks, with zstd at `level` where one is given and it makes them smaller, whatever a sample of them says.
    pub fn encode(
        &mut self,
        blocks: &Blocks<'_>,
        level: Option<i32>,
    ) -> Result<Encoded, CodecError> {
        self.room(blocks.bytes.len()).copy_from_slice(blocks.bytes);
        self.encode_filled(blocks, level.map(Effort::Always), None)
    }

    /// Room for the bytes of the blocks that [`encode_filled`](Self::encode_filled) is then called for. What is in it
    /// until the caller fills it has no meaning.
    pub fn room(&mut self, len: usize) -> &mut [u8] {
        if self.raw.capacity() < len {
            self.raw = self.pool.buffers.take();
        }
        // Clears only what is longer than the frame before.
        self.raw.resize(len, 0);
        &mut self.raw
    }

    /// As [`encode`](Self::encode), of what was filled into [`room`](Self::room): where no block is zero, nothing is
    /// copied any more. `blocks.bytes` is not looked at. What was sent `before` saves bytes: blocks that are as they were then are
    /// left out, some that are nearly so go as differences, and what another block brought goes as a duplicate of that.
    pub fn encode_filled(
        &mut self,
        blocks: &Blocks<'_>,
        effort: Option<Effort>,
        before: Option<Before<'_>>,
    ) -> Result<Encoded, CodecError> {
        let Some(Before {
            sent,
            kept,
            elsewhere,
        }) = before
        else {
            let shape = self.compact(blocks, None)?;
            return self.finish(blocks, &shape, effort, (None, Vec::new()));
        };
        let shape = self.compact(blocks, Some(sent))?;
        let found = elsewhere.map_or_else(Vec::new, |elsewhere| {
            elsewhere.find(blocks, sent.contents(blocks.window, &shape.data))
        });
        self.finish(blocks, &shape, effort, (kept, found))
    }

    /// Makes the frame of what is in `raw`, by reference to what was kept of it or was found elsewhere where that saves bytes.
    fn finish(
        &mut self,
        blocks: &Blocks<'_>,
        shape: &Shape,
        effort: Option<Effort>,
        (kept, found): (Option<KeptBefore<'_>>, Vec<(u32, BlockRef)>),
    ) -> Result<Encoded, CodecError> {
        let digest = digest::plain(&self.raw);
        // At most MAX_FRAME_PAYLOAD, as `compact` takes no more blocks.
        let raw_len = u32::try_from(self.raw.len()).unwrap_or(u32::MAX);
        let effort = effort.filter(|_| !self.raw.is_empty());
        let probed = self.probe(effort)?;
        let started = Started::now();
        let level = self.level_of(effort)?;
        let kept = kept.map(|kept| KeptBefore {
            // A frame has one or the other.
            differ: kept.differ && found.is_empty(),
            ..kept
        });
        let differences = match kept {
            Some(kept) => self.differences(blocks, shape, level, kept)?,
            None => None,
        };
        let (encoding, by_reference, payload) = if !found.is_empty() {
            let (duplicates, payload) = self.duplicates(blocks, shape, level, &found)?;
            (Encoding::Duplicate, duplicates, payload)
        } else if let Some((differences, payload)) = differences {
            (Encoding::Difference, differences, payload)
        } else {
            let packed = level.map(|level| self.compress(level, &[], &self.raw));
            match packed.transpose()?.flatten() {
                Some(packed) => (Encoding::Zstd, WindowBits::EMPTY, packed),
                None => (Encoding::Raw, WindowBits::EMPTY, self.payload()),
            }
        };
        let worked = effort.is_some() || !by_reference.is_empty();
        let whole = || Tried {
            raw: raw_len as usize,
            packed: payload.len(),
            spent: started.spent(),
        };
        let tried = probed.or_else(|| worked.then(whole));
        // Back to the others at once: the next frame of any worker finds it in the cache.
        if self.raw.capacity() > 0 {
            drop(self.pool.buffers.lend(std::mem::take(&mut self.raw)));
        }
        Ok(Encoded {
            window: blocks.window,
            present: shape.zero.or(&shape.data),
            zero: shape.zero,
            unchanged: shape.unchanged,
            by_reference,
            encoding,
            raw_len,
            digest,
            payload,
            tried,
        })
    }

    /// What a piece of `raw` comes to, if that is all that is asked of it.
    fn probe(&self, effort: Option<Effort>) -> Result<Option<Tried>, CodecError> {
        let Some(Effort::Probe(level)) = effort else {
            return Ok(None);
        };
        let started = Started::now();
        let (raw, packed) = self.with_press(level, |press| press.probe(&self.raw))?;
        let spent = started.spent();
        Ok(Some(Tried { raw, packed, spent }))
    }

    /// The level at which what is in `raw` is worth to be compressed.
    fn level_of(&self, effort: Option<Effort>) -> Result<Option<i32>, CodecError> {
        match effort {
            None | Some(Effort::Probe(_)) => Ok(None),
            Some(Effort::Always(level)) => Ok(Some(level)),
            Some(Effort::Sampled(level)) => {
                let worth = self.with_press(level, |press| press.shrinks(&self.raw))?;
                Ok(worth.then_some(level))
            }
        }
    }

    /// The payload of a frame of differences, and its blocks that are; `None` where there is nothing to gain. Whatever comes of it,
    /// what is sent of the blocks is noted.
    fn differences(
        &self,
        blocks: &Blocks<'_>,
        shape: &Shape,
        level: Option<i32>,
        kept: KeptBefore<'_>,
    ) -> Result<Option<(WindowBits, Bytes)>, CodecError> {
        let KeptBefore {
            blocks: kept,
            again,
            differ,
        } = kept;
        let made = if differ {
            self.differences_to(kept, blocks, shape, level)?
        } else {
            None
        };
        shape
            .zero
            .iter()
            .for_each(|block| kept.forget(blocks.window, block));
        for (block, place) in places(blocks.region, blocks.window.window, &shape.data) {
            let content = self.raw.get(place).unwrap_or_default();
            kept.put(blocks.window, block, content, again);
        }
        Ok(made)
    }

    fn differences_to(
        &self,
        kept: &KeptBlocks,
        blocks: &Blocks<'_>,
        shape: &Shape,
        level: Option<i32>,
    ) -> Result<Option<(WindowBits, Bytes)>, CodecError> {
        let window = blocks.window;
        let places = || places(blocks.region, window.window, &shape.data);
        let (mut near, mut digest) = (WindowBits::EMPTY, PlainDigest::new());
        for (block, place) in places() {
            let base = kept.get(window, block).zip(self.raw.get(place));
            if let Some((base, _)) = base.filter(|(base, content)| kept::is_near(content, base)) {
                near.insert(block);
                digest.update(base);
            }
        }
        // What would go raw is not compressed for the sake of a few blocks.
        let worth = level.is_some() || near.count() * 2 >= shape.data.count();
        if near.is_empty() || !worth {
            return Ok(None);
        }
        let bases = Bases {
            blocks: near,
            digest: digest.finish(),
        };
        let packed = self.with_press(level.unwrap_or(DIFFERENCE_LEVEL), |press| {
            let mut content = std::mem::take(&mut press.differences);
            content.clear();
            content.extend_from_slice(&self.raw);
            for (block, place) in places().filter(|(block, _)| near.contains(*block)) {
                if let Some((content, base)) = content.get_mut(place).zip(kept.get(window, block)) {
                    kept::difference(content, base);
                }
            }
            let packed = press.pack(&bases.encode(), &content);
            press.differences = content;
            packed
        })?;
        Ok(packed.map(|packed| (near, packed)))
    }

    /// What is in `raw`: the buffer itself where it is well used, since what waits in queues is counted by payload.
    fn payload(&mut self) -> Bytes {
        if self.raw.is_empty() {
            Bytes::new()
        } else if self.raw.len() >= self.raw.capacity() / 2 {
            self.pool.buffers.lend(std::mem::take(&mut self.raw))
        } else {
            Bytes::copy_from_slice(&self.raw)
        }
    }

    /// Moves the blocks of `raw` that have to go together: those that are neither zero nor as before.
    fn compact(
        &mut self,
        blocks: &Blocks<'_>,
        sent: Option<&mut SentBlocks>,
    ) -> Result<Shape, CodecError> {
        check_blocks(blocks, self.raw.len())?;
        let mut before = sent.map(|sent| sent.window(blocks.window));
        let mut shape = Shape::default();
        for block in blocks.known_zero.minus(&blocks.read).iter() {
            shape.put_zero(block, &mut before);
        }
        let (mut from, mut to) = (0, 0);
        for block in blocks.read.iter() {
            let len = blocks.region.block_len(blocks.window.window, block) as usize;
            // Never past the end: the sum of all lengths was compared.
            let content = self.raw.get(from..from + len).unwrap_or_default();
            if is_zero(content) {
                shape.put_zero(block, &mut before);
            } else if before
                .as_mut()
                .is_some_and(|before| before.is_as_before(block, content))
            {
                shape.unchanged.insert(block);
            } else {
                shape.data.insert(block);
                if from != to {
                    self.raw.copy_within(from..from + len, to);
                }
                to += len;
            }
            from += len;
        }
        self.raw.truncate(to);
        Ok(shape)
    }

    /// `head` and, behind it, `content` compressed; `None` where that would not get smaller.
    fn compress(
        &self,
        level: i32,
        head: &[u8],
        content: &[u8],
    ) -> Result<Option<Bytes>, CodecError> {
        self.with_press(level, |press| press.pack(head, content))
    }

    /// Does something with a context of zstd's that is set to `level`.
    fn with_press<T>(
        &self,
        level: i32,
        work: impl FnOnce(&mut Press) -> std::io::Result<T>,
    ) -> Result<T, CodecError> {
        let setup = |source| CodecError::Setup { level, source };
        let mut press = self.pool.press(level).map_err(setup)?;
        let done = work(&mut press).map_err(setup)?;
        self.pool.presses().push(press);
        Ok(done)
    }
}

/// What becomes of the blocks of a frame.
#[derive(Debug, Clone, Copy, Default)]
struct Shape {
    zero: WindowBits,
    /// Their bytes go.
    data: WindowBits,
    /// They are left out.
    unchanged: WindowBits,
}

impl Shape {
    fn put_zero(&mut self, block: u32, before: &mut Option<SentWindow<'_>>) {
        let as_before = before
            .as_mut()
            .is_some_and(|before| before.is_zero_as_before(block));
        if as_before {
            self.unchanged.insert(block);
        } else {
            self.zero.insert(block);
        }
    }
}

/// The blocks `which` of a window, and where their bytes are if they lie one behind the other.
fn places(
    region: RegionLen,
    window: WindowIndex,
    which: &WindowBits,
) -> impl Iterator<Item = (u32, Range<usize>)> {
    which.iter().scan(0, move |end, block| {
        let begin = *end;
        *end += region.block_len(window, block) as usize;
        Some((block, begin..*end))
    })
}

fn is_zero(block: &[u8]) -> bool {
    ZERO_BLOCK.get(..block.len()) == Some(block)
}

/// Whether `len` bytes are those of `blocks.read` and all blocks fit into one frame.
fn check_blocks(blocks: &Blocks<'_>, len: usize) -> Result<(), CodecError> {
    let window = blocks.window.window;
    let present = blocks.read.or(&blocks.known_zero);
    let expected = blocks.region.bytes_of(window, &blocks.read) as usize;
    let inside = present.minus(&blocks.region.all_of(window)).is_empty();
    if len == expected && present.count() <= MAX_FRAME_BLOCKS && inside {
        return Ok(());
    }
    Err(CodecError::Blocks {
        count: present.count(),
        expected,
        got: len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use vmferry_proto::ids::RegionId;
    use vmferry_proto::limits::MAX_FRAME_PAYLOAD;

    use crate::sent::Secret;

    const WINDOW: WindowRef = WindowRef {
        region: RegionId(0),
        window: WindowIndex(1),
    };

    /// A window at the region's end with a short last block.
    const REGION: RegionLen = RegionLen(2 * 2_097_152 - 1000);

    /// Blocks of the window with their bytes, none of them known to be zero.
    fn blocks(bytes: &[u8], read: WindowBits) -> Blocks<'_> {
        Blocks {
            window: WINDOW,
            region: REGION,
            read,
            known_zero: WindowBits::EMPTY,
            bytes,
        }
    }

    /// Content of a block by kind: zero, compressible or random.
    pub(super) fn block(kind: u8, seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed | 1;
        match kind {
            0 => vec![0; len],
            1 => (0..len)
                .map(|at| (at / 64).to_le_bytes()[0] ^ seed.to_le_bytes()[0])
                .collect(),
            _ => (0..len)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[4]
                })
                .collect(),
        }
    }

    fn content(kinds: &[(u32, u8)]) -> (WindowBits, Vec<u8>) {
        let mut read = WindowBits::EMPTY;
        for (at, _) in kinds {
            read.insert(*at);
        }
        let mut bytes = Vec::new();
        for at in read.iter() {
            let kind = kinds.iter().find(|(other, _)| *other == at).unwrap().1;
            let len = REGION.block_len(WINDOW.window, at) as usize;
            bytes.extend(block(kind, u64::from(at) * 7919 + 1, len));
        }
        (read, bytes)
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_alike(
            kinds in prop::collection::btree_map(0u32..512, 0u8..3, 1..=128),
            holes in prop::collection::vec(0u32..512, 0..20),
            level in prop::option::of(-3i32..4),
        ) {
            let kinds: Vec<_> = kinds.into_iter().collect();
            let (read, bytes) = content(&kinds);
            let mut known_zero = WindowBits::EMPTY;
            for hole in holes {
                if !read.contains(hole) && read.or(&known_zero).count() < MAX_FRAME_BLOCKS {
                    known_zero.insert(hole);
                }
            }
            let blocks = Blocks { window: WINDOW, region: REGION, read, known_zero, bytes: &bytes };
            let encoded = Encoder::new().encode(&blocks, level).unwrap();
            let mut encoder = Encoder::new();
            encoder.room(MAX_FRAME_PAYLOAD as usize).fill(0xdd);
            encoder.room(bytes.len()).copy_from_slice(&bytes);
            let filled = encoder.encode_filled(&Blocks { bytes: &[], ..blocks }, level.map(Effort::Always), None).unwrap();
            prop_assert_eq!(filled.header(FrameSeq(1)), encoded.header(FrameSeq(1)));
            prop_assert_eq!(&filled.payload, &encoded.payload);
            let header = encoded.header(FrameSeq(1));
            header.check(&[REGION], vmferry_proto::ids::Lane(1), 16, FrameSeq(1)).unwrap();
            let mut decoder = Decoder::new();
            let decoded = decoder.decode(&header, &encoded.payload).unwrap();

            // The naive oracle: lay the frame out over a window of rubbish and compare block by block.
            let mut image = vec![0xee; 2_097_152];
            let mut rest: &[u8] = decoded;
            for at in header.data_blocks().iter() {
                let (this, behind) = rest.split_at(REGION.block_len(WINDOW.window, at) as usize);
                rest = behind;
                image[at as usize * 4096..][..this.len()].copy_from_slice(this);
            }
            prop_assert!(rest.is_empty());
            for at in header.zero.iter() {
                image[at as usize * 4096..][..4096].fill(0);
            }
            let mut rest: &[u8] = &bytes;
            for at in read.iter() {
                let (this, behind) = rest.split_at(REGION.block_len(WINDOW.window, at) as usize);
                rest = behind;
                prop_assert_eq!(&image[at as usize * 4096..][..this.len()], this);
                prop_assert_eq!(header.zero.contains(at), this.iter().all(|byte| *byte == 0));
            }
            for at in known_zero.iter() {
                prop_assert!(header.zero.contains(at) && header.present.contains(at));
            }
        }

        #[test]
        fn no_payload_makes_the_decoder_panic(
            payload in prop::collection::vec(any::<u8>(), 0..5000),
            raw_len in 0u32..600_000,
            zstd in any::<bool>(),
            real_magic in any::<bool>(),
        ) {
            let mut payload = payload;
            if real_magic && payload.len() > 4 {
                payload[..4].copy_from_slice(&[0x28, 0xb5, 0x2f, 0xfd]);
            }
            let header = FrameHeader {
                encoding: if zstd { Encoding::Zstd } else { Encoding::Raw },
                raw_len,
                payload_len: u32::try_from(payload.len()).unwrap(),
                ..sample().header(FrameSeq(1))
            };
            prop_assert!(Decoder::new().decode(&header, &payload).is_err());
        }
    }

    fn sample() -> Encoded {
        let (read, bytes) = content(&[(0, 1), (1, 0), (5, 1)]);
        let blocks = blocks(&bytes, read);
        Encoder::new().encode(&blocks, Some(1)).unwrap()
    }

    #[test]
    fn a_zstd_bomb_is_refused_with_the_announced_memory_only() {
        let bomb = zstd::bulk::compress(&vec![7u8; 64 << 20], 19).unwrap();
        let header = FrameHeader {
            payload_len: u32::try_from(bomb.len()).unwrap(),
            ..sample().header(FrameSeq(1))
        };
        let error = Decoder::new().decode(&header, &bomb).unwrap_err();
        assert!(
            matches!(error, CodecError::Payload { expected: 8192, .. }),
            "{error:?}"
        );
        assert_eq!(error.to_wire().unwrap().code, ErrorCode::BadFrame);
    }

    #[test]
    fn a_flipped_bit_never_yields_other_bytes() {
        let encoded = sample();
        let header = encoded.header(FrameSeq(1));
        let mut decoder = Decoder::new();
        let right = decoder.decode(&header, &encoded.payload).unwrap().to_vec();
        let mut refused = 0;
        for bit in 0..encoded.payload.len() * 8 {
            let mut payload = encoded.payload.to_vec();
            payload[bit / 8] ^= 1 << (bit % 8);
            match decoder.decode(&header, &payload) {
                // zstd has a few bits without a meaning.
                Ok(same) => assert_eq!(same, right, "bit {bit}"),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > encoded.payload.len() * 7, "{refused}");
        // And the context is sound afterwards.
        assert_eq!(decoder.decode(&header, &encoded.payload).unwrap(), right);
    }

    #[test]
    fn a_payload_that_decodes_to_less_is_refused() {
        let short = zstd::bulk::compress(&[1; 100], 1).unwrap();
        let header = FrameHeader {
            payload_len: u32::try_from(short.len()).unwrap(),
            ..sample().header(FrameSeq(1))
        };
        assert!(matches!(
            Decoder::new().decode(&header, &short),
            Err(CodecError::Payload { source: None, .. })
        ));
    }

    #[test]
    fn of_a_frame_that_goes_raw_a_piece_tells_what_it_would_come_to() {
        for count in [8, 64] {
            let shapes: Vec<_> = (0..count).map(|block| (block, 1)).collect();
            let (read, bytes) = content(&shapes);
            let blocks = blocks(&[], read);
            let mut encoder = Encoder::new();
            encoder.room(bytes.len()).copy_from_slice(&bytes);
            let effort = Some(Effort::Probe(-1));
            let probed = encoder.encode_filled(&blocks, effort, None).unwrap();
            assert_eq!(probed.encoding, Encoding::Raw);
            assert_eq!(probed.payload, bytes);
            let tried = probed.tried.unwrap();
            assert_eq!(tried.raw, bytes.len().min(65_536));
            assert!(tried.packed > 0 && tried.packed < tried.raw, "{tried:?}");
        }
    }

    #[test]
    fn random_content_goes_raw_though_asked_otherwise_and_zeros_take_no_payload() {
        let (read, bytes) = content(&[(0, 2), (1, 2)]);
        let mut blocks = blocks(&bytes, read);
        let mut encoder = Encoder::new();
        let random = encoder.encode(&blocks, Some(3)).unwrap();
        assert_eq!(random.encoding, Encoding::Raw);
        assert!(random.tried.is_some());
        let zeros = vec![0; bytes.len()];
        blocks.bytes = &zeros;
        let zero = encoder.encode(&blocks, Some(3)).unwrap();
        assert_eq!(
            (zero.encoding, zero.raw_len, zero.payload.len()),
            (Encoding::Raw, 0, 0)
        );
        assert_eq!(zero.zero, read);
        Decoder::new()
            .decode(&zero.header(FrameSeq(1)), &zero.payload)
            .unwrap();
    }

    #[test]
    fn a_buffer_that_does_not_hold_its_blocks_is_refused() {
        let (read, bytes) = content(&[(0, 1), (511, 1)]);
        assert_eq!(bytes.len(), 4096 + 3096);
        let blocks = |bytes| Blocks {
            window: WINDOW,
            region: REGION,
            read,
            known_zero: WindowBits::EMPTY,
            bytes,
        };
        let mut encoder = Encoder::new();
        encoder.encode(&blocks(&bytes), None).unwrap();
        assert!(encoder.encode(&blocks(&bytes[1..]), None).is_err());
        encoder.room(bytes.len() - 1).copy_from_slice(&bytes[1..]);
        assert!(encoder.encode_filled(&blocks(&[]), None, None).is_err());
        let all = Blocks {
            read: WindowBits::EMPTY,
            known_zero: WindowBits::FULL,
            ..blocks(&[])
        };
        assert!(
            encoder.encode(&all, None).is_err(),
            "too many blocks for a frame"
        );
    }

    proptest! {
        /// Frames of one window, one after the other: what is left out of one is there from those before, and so is what another one
        /// has only the difference to.
        #[test]
        fn what_is_left_out_is_there_already(
            passes in prop::collection::vec(
                prop::collection::btree_map(0u32..40, (0u8..5, 0u64..2), 1..40), 1..8
            ),
            lanes in prop::sample::select(vec![1, 2000]),
            level in prop::option::of(1..4),
        ) {
            let mut encoder = Encoder::new();
            let mut decoder = Decoder::new();
            let mut sent = SentBlocks::of_one(1, Secret::new());
            let mut kept = KeptBlocks::of_one(lanes);
            let mut there: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
            for pass in passes {
                // The last block of the region is a short one.
                let pass = pass.into_iter().map(|(at, kind)| (if at == 39 { 511 } else { at }, kind));
                let content: BTreeMap<u32, Vec<u8>> = pass.map(|(at, (kind, seed))| {
                    let len = REGION.block_len(WINDOW.window, at) as usize;
                    (at, match there.get(&at) {
                        Some(before) if kind > 2 => nearly(before, seed + u64::from(kind)),
                        _ => block(kind, seed, len),
                    })
                }).collect();
                let mut read = WindowBits::EMPTY;
                content.keys().for_each(|at| read.insert(*at));
                let bytes: Vec<u8> = content.values().flatten().copied().collect();
                let blocks = Blocks { window: WINDOW, region: REGION, read, known_zero: WindowBits::EMPTY, bytes: &[] };
                encoder.room(bytes.len()).copy_from_slice(&bytes);
                let before = Before {
                    sent: &mut sent,
                    kept: Some(KeptBefore { blocks: &mut kept, again: true, differ: true }),
                    elsewhere: None,
                };
                let encoded = encoder.encode_filled(&blocks, level.map(Effort::Always), Some(before)).unwrap();
                let header = encoded.header(FrameSeq(1));
                header.check(&[REGION], vmferry_proto::ids::Lane(1), 16, FrameSeq(1)).unwrap();
                for (at, new) in &content {
                    prop_assert_eq!(encoded.unchanged.contains(*at), there.get(at) == Some(new));
                    prop_assert_eq!(encoded.present.contains(*at), !encoded.unchanged.contains(*at));
                }
                let raw = decode(&mut decoder, &header, &encoded.payload, &there).unwrap();
                for (at, place) in places(REGION, WINDOW.window, &header.data_blocks()) {
                    there.insert(at, raw[place].to_vec());
                }
                for at in header.zero.iter() {
                    there.insert(at, vec![0; REGION.block_len(WINDOW.window, at) as usize]);
                }
                for (at, new) in &content {
                    prop_assert_eq!(there.get(at), Some(new));
                }
            }
        }

        #[test]
        fn no_differences_make_the_decoder_panic(
            payload in prop::collection::vec(any::<u8>(), 0..5000), blocks in 0u64..40, here in 0usize..9000,
            raw_len in 0u32..600_000,
        ) {
            let base = vec![7; here];
            let bases = Bases { blocks: WindowBits([blocks, 0, 0, 0, 0, 0, 0, 0]), digest: digest::plain(&base) };
            let payload = [&bases.encode()[..], &payload].concat();
            let header = FrameHeader {
                encoding: Encoding::Difference,
                raw_len,
                payload_len: u32::try_from(payload.len()).unwrap(),
                ..sample().header(FrameSeq(1))
            };
            prop_assert!(Decoder::new().decode_differences(&header, &payload, REGION, &base).is_err());
            prop_assert!(Decoder::new().decode(&header, &payload).is_err());
        }
    }

    /// `before` with a few other words.
    fn nearly(before: &[u8], seed: u64) -> Vec<u8> {
        let mut content = before.to_vec();
        for at in (usize::try_from(seed).unwrap() * 8 % 500..content.len()).step_by(520) {
            content[at] ^= 0x41;
        }
        content
    }

    /// As the destination does, which has `there`.
    fn decode(
        decoder: &mut Decoder,
        header: &FrameHeader,
        payload: &[u8],
        there: &BTreeMap<u32, Vec<u8>>,
    ) -> Result<Vec<u8>, CodecError> {
        if header.encoding != Encoding::Difference {
            return decoder.decode(header, payload).map(<[u8]>::to_vec);
        }
        let (bases, _) = Bases::split(header, payload).unwrap();
        let here: Vec<u8> = bases
            .blocks
            .iter()
            .flat_map(|at| there[&at].clone())
            .collect();
        let decoded = decoder.decode_differences(header, payload, REGION, &here);
        decoded.map(<[u8]>::to_vec)
    }

    /// Two copies of three random blocks, the second with a few other words: what the destination has, and the second frame.
    fn differing() -> (BTreeMap<u32, Vec<u8>>, Encoded) {
        let (mut sent, mut kept) = (SentBlocks::of_one(1, Secret::new()), KeptBlocks::of_one(1));
        let mut encoder = Encoder::new();
        let (read, first) = content(&[(0, 2), (1, 2), (5, 2)]);
        let mut encode = |bytes: &[u8]| {
            let blocks = blocks(&[], read);
            encoder.room(bytes.len()).copy_from_slice(bytes);
            let before = Before {
                sent: &mut sent,
                kept: Some(KeptBefore {
                    blocks: &mut kept,
                    again: true,
                    differ: true,
                }),
                elsewhere: None,
            };
            encoder.encode_filled(&blocks, None, Some(before)).unwrap()
        };
        assert_eq!(encode(&first).encoding, Encoding::Raw);
        let second = encode(&nearly(&first, 3));
        let there = read.iter().zip(first.chunks(4096).map(<[u8]>::to_vec));
        (there.collect(), second)
    }

    /// `[WIRE-52]`
    #[test]
    fn nearly_the_same_goes_as_a_difference_and_only_to_what_it_is_to() {
        let (mut there, encoded) = differing();
        assert_eq!(encoded.encoding, Encoding::Difference);
        assert_eq!(encoded.by_reference.count(), 3);
        assert!(encoded.payload.len() < 400, "{}", encoded.payload.len());
        let header = encoded.header(FrameSeq(1));
        let mut decoder = Decoder::new();
        decode(&mut decoder, &header, &encoded.payload, &there).unwrap();
        there.get_mut(&5).unwrap()[4095] ^= 1;
        let error = decode(&mut decoder, &header, &encoded.payload, &there).unwrap_err();
        assert!(matches!(error, CodecError::OtherBases) && error.to_wire().is_none());
        there.get_mut(&5).unwrap()[4095] ^= 1;
        let wrong = FrameHeader {
            digest: header.digest ^ 1,
            ..header
        };
        let error = decode(&mut decoder, &wrong, &encoded.payload, &there).unwrap_err();
        assert!(matches!(error, CodecError::Digest));
    }
}
