//! Payloads become blocks again.
//!
//! Owns the bound on what is made of a payload and the comparison of its digest, and of that of what it refers to. Where the
//! bytes go, and where those come from that are here already, is the caller's.

use bytes::Bytes;
use vmferry_proto::frame::{Bases, Encoding, FrameError, FrameHeader, Origins};
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen};
use vmferry_proto::limits::MAX_FRAME_PAYLOAD;
use zstd::bulk::Decompressor;

use super::{CodecError, places};
use crate::digest::{self, PlainDigest};
use crate::kept;

/// Decodes payloads; one per worker, since it keeps zstd's context and what that made of the last payload.
pub struct Decoder {
    zstd: Unpacker,
    raw: Vec<u8>,
    /// The blocks of a frame of duplicates that are none.
    rest: Vec<u8>,
}

/// zstd, once it is needed.
struct Unpacker(Option<Decompressor<'static>>);

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder; zstd is set up with the first frame that needs it.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            zstd: Unpacker(None),
            raw: Vec::new(),
            rest: Vec::new(),
        }
    }

    /// The blocks `present` less `zero` of the frame, one behind the other, their digest checked. Not of a frame that refers to what is here.
    ///
    /// The header has passed [`FrameHeader::check`], so `raw_len` fits the blocks and the cap; exactly that much
    /// is allocated and produced, whatever the payload says.
    pub fn decode<'a>(
        &'a mut self,
        header: &FrameHeader,
        payload: &'a [u8],
    ) -> Result<&'a [u8], CodecError> {
        check_payload(header, payload)?;
        let raw = match header.encoding {
            Encoding::Raw => payload,
            Encoding::Zstd => {
                self.zstd.unpack(header.raw_len, payload, &mut self.raw)?;
                &self.raw
            }
            Encoding::Difference => return Err(CodecError::Bases(FrameError::Bases)),
            Encoding::Duplicate => return Err(CodecError::Origins(FrameError::Origins)),
        };
        check_decoded(header, raw)?;
        Ok(raw)
    }

    /// The same of a frame of differences in a region of length `region`: `here` are the bytes that the destination has in the blocks
    /// that [`Bases::split`] found in the payload, one behind the other.
    pub fn decode_differences(
        &mut self,
        header: &FrameHeader,
        payload: &[u8],
        region: RegionLen,
        here: &[u8],
    ) -> Result<&[u8], CodecError> {
        check_payload(header, payload)?;
        let (bases, packed) = Bases::split(header, payload).map_err(CodecError::Bases)?;
        if digest::plain(here) != bases.digest {
            return Err(CodecError::OtherBases);
        }
        self.zstd.unpack(header.raw_len, packed, &mut self.raw)?;
        let data = header.data_blocks();
        let mut here =
            places(region, header.window, &bases.blocks).map(|(_, place)| here.get(place));
        for (_, place) in
            places(region, header.window, &data).filter(|(block, _)| bases.blocks.contains(*block))
        {
            if let Some((content, base)) = self.raw.get_mut(place).zip(here.next().flatten()) {
                kept::difference(content, base);
            }
        }
        check_decoded(header, &self.raw)?;
        Ok(&self.raw)
    }

    /// The same of a frame of duplicates in a region of length `region`: `there` are the bytes that the destination has in the places that
    /// [`Origins::split`] found in its payload, one behind the other.
    pub fn decode_duplicates(
        &mut self,
        header: &FrameHeader,
        origins: &Origins<'_>,
        region: RegionLen,
        there: &[u8],
    ) -> Result<&[u8], CodecError> {
        if digest::plain(there) != origins.digest {
            return Err(CodecError::OtherOrigins);
        }
        let Self { zstd, raw, rest } = self;
        let copied = origins.blocks.count() * BLOCK_SIZE;
        let others = header.raw_len.min(MAX_FRAME_PAYLOAD).saturating_sub(copied);
        let mut rest = if origins.rest.len() == others as usize {
            origins.rest
        } else {
            zstd.unpack(others, origins.rest, rest)?;
            rest
        };
        let mut there = there;
        raw.clear();
        for (block, place) in places(region, header.window, &header.data_blocks()) {
            let from = if origins.blocks.contains(block) {
                &mut there
            } else {
                &mut rest
            };
            // Where one is too short the sum is, which is compared.
            let (content, behind) = from.split_at_checked(place.len()).unwrap_or_default();
            raw.extend_from_slice(content);
            *from = behind;
        }
        check_decoded(header, raw)?;
        Ok(raw)
    }
}

impl Unpacker {
    /// Makes `raw` of what zstd packed.
    fn unpack(
        &mut self,
        expected: u32,
        packed: &[u8],
        raw: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let wrong = |source| CodecError::Payload { expected, source };
        let decompressor = match self.0.take() {
            Some(decompressor) => decompressor,
            None => Decompressor::new().map_err(|error| wrong(Some(error)))?,
        };
        let decompressor = self.0.insert(decompressor);
        raw.resize(expected as usize, 0);
        // A payload that holds more fails for want of room: there is no bomb.
        let made = decompressor.decompress_to_buffer(packed, &mut raw[..]);
        if made.map_err(|error| wrong(Some(error)))? != expected as usize {
            return Err(wrong(None));
        }
        Ok(())
    }
}

/// Checks the blocks of a raw frame, as [`Decoder::decode`] does, where they stand in several pieces.
pub fn check_raw(header: &FrameHeader, pieces: &[Bytes]) -> Result<(), CodecError> {
    let len: usize = pieces.iter().map(Bytes::len).sum();
    check_length(header, len)?;
    let mut digest = PlainDigest::new();
    pieces.iter().for_each(|piece| digest.update(piece));
    check_digest(header, digest.finish())
}

fn check_payload(header: &FrameHeader, payload: &[u8]) -> Result<(), CodecError> {
    if header.raw_len > MAX_FRAME_PAYLOAD || payload.len() != header.payload_len as usize {
        return Err(CodecError::Payload {
            expected: header.raw_len,
            source: None,
        });
    }
    Ok(())
}

fn check_decoded(header: &FrameHeader, raw: &[u8]) -> Result<(), CodecError> {
    check_length(header, raw.len())?;
    check_digest(header, digest::plain(raw))
}

const fn check_length(header: &FrameHeader, len: usize) -> Result<(), CodecError> {
    if len == header.raw_len as usize {
        return Ok(());
    }
    Err(CodecError::Payload {
        expected: header.raw_len,
        source: None,
    })
}

const fn check_digest(header: &FrameHeader, digest: u128) -> Result<(), CodecError> {
    if digest == header.digest {
        return Ok(());
    }
    Err(CodecError::Digest)
}
