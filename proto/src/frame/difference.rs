//! What the payload of a frame of differences begins with: which of its blocks are differences, and to what.
//!
//! Owns the layout and the check of it. Who reads the destination's bytes compares them with the digest (`[WIRE-52]`).

use serde::{Deserialize, Serialize};

use super::{FrameError, FrameHeader};
use crate::geometry::WindowBits;
use crate::layout;

/// The blocks of a frame that are differences to what the destination has there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bases {
    /// Which: some of the frame's blocks that are not zero, and at least one.
    pub blocks: WindowBits,
    /// XXH3-128 of what the destination has there, one block behind the other.
    pub digest: u128,
}

/// The layout: fields in this order.
#[derive(Serialize, Deserialize)]
struct RawBases {
    digest: u128,
    blocks: [u64; 8],
}

impl Bases {
    /// Bytes at the beginning of the payload.
    pub const ENCODED_LEN: usize = 80;

    /// These bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::ENCODED_LEN] {
        let raw = RawBases {
            digest: self.digest,
            blocks: self.blocks.0,
        };
        layout::encode_fixed(&raw).expect("integers and arrays of them always take the same bytes")
    }

    /// What the payload of `header` begins with, and the rest of it.
    ///
    /// # Errors
    /// [`FrameError::Bases`]: the payload is too short, or other blocks are named than the frame has.
    pub fn split<'a>(
        header: &FrameHeader,
        payload: &'a [u8],
    ) -> Result<(Self, &'a [u8]), FrameError> {
        let (head, packed) = payload
            .split_at_checked(Self::ENCODED_LEN)
            .ok_or(FrameError::Bases)?;
        let raw: RawBases = layout::decode(head).map_err(|_| FrameError::Bases)?;
        let blocks = WindowBits(raw.blocks);
        let digest = raw.digest;
        if blocks.is_empty() || !blocks.minus(&header.data_blocks()).is_empty() {
            return Err(FrameError::Bases);
        }
        Ok((Self { blocks, digest }, packed))
    }
}
