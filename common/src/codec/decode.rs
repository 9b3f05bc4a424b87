//! Payloads become blocks again.
//!
//! Owns the bound on what is made of a payload and the comparison of its digest, and of that of what its differences are to. Where
//! the bytes go, and where those come from that are here already, is the caller's.

use vmferry_proto::frame::{Bases, Encoding, FrameError, FrameHeader};
use vmferry_proto::geometry::RegionLen;
use vmferry_proto::limits::MAX_FRAME_PAYLOAD;
use zstd::bulk::Decompressor;

use super::{CodecError, places};
use crate::{digest, kept};

/// Decodes payloads; one per worker, since it keeps zstd's context and what that made of the last payload.
pub struct Decoder {
    zstd: Option<Decompressor<'static>>,
    raw: Vec<u8>,
}

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
            zstd: None,
            raw: Vec::new(),
        }
    }

    /// The blocks `present` less `zero` of the frame, one behind the other, their digest checked. Not of a frame of differences.
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
            Encoding::Zstd => self.unpack(header.raw_len, payload)?,
            Encoding::Difference => return Err(CodecError::Bases(FrameError::Bases)),
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
        self.unpack(header.raw_len, packed)?;
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

    /// Makes `raw` of what zstd packed.
    fn unpack(&mut self, expected: u32, packed: &[u8]) -> Result<&[u8], CodecError> {
        let wrong = |source| CodecError::Payload { expected, source };
        let decompressor = match self.zstd.take() {
            Some(decompressor) => decompressor,
            None => Decompressor::new().map_err(|error| wrong(Some(error)))?,
        };
        let decompressor = self.zstd.insert(decompressor);
        self.raw.resize(expected as usize, 0);
        // A payload that holds more fails for want of room: there is no bomb.
        let made = decompressor.decompress_to_buffer(packed, &mut self.raw[..]);
        if made.map_err(|error| wrong(Some(error)))? != expected as usize {
            return Err(wrong(None));
        }
        Ok(&self.raw)
    }
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
    if raw.len() != header.raw_len as usize {
        return Err(CodecError::Payload {
            expected: header.raw_len,
            source: None,
        });
    }
    if digest::plain(raw) != header.digest {
        return Err(CodecError::Digest);
    }
    Ok(())
}
