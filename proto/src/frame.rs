//! What travels on the unidirectional streams: the header a stream begins with and the header of each data frame.
//!
//! Owns the two fixed layouts and the check of everything that a lying peer can put into a frame header
//! (`[WIRE-20]` ff.). It neither compresses nor hashes: `raw_len` and `digest` speak of the decoded bytes,
//! and whoever decodes compares both. A header that passed [`FrameHeader::check`] addresses no byte outside
//! its region and announces no payload above the cap.

use serde::{Deserialize, Serialize};

use crate::error::{ErrorCode, WireError};
use crate::geometry::{RegionLen, Run, WindowBits, WindowIndex};
use crate::ids::{FrameSeq, Lane, RegionId};
use crate::layout;
use crate::limits;

mod difference;
mod duplicate;
mod stream;
#[cfg(test)]
mod tests;

pub use difference::Bases;
pub use duplicate::{BlockRef, Origins};
pub use stream::{StreamHeader, StreamHeaderError, StreamKind};

/// Version of both layouts of this file; another one is refused.
pub const LAYOUT_VERSION: u8 = 1;

/// How a frame's payload is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// The blocks as they are, one behind the other.
    Raw,
    /// One zstd frame of them.
    Zstd,
    /// [`Bases`], then one zstd frame of the blocks, of which some are exclusive-ored with what the destination has there.
    Difference,
    /// [`Origins`]: some of the blocks are what the destination has elsewhere, the others follow, as they are or as one zstd frame.
    Duplicate,
}

/// Header of a data frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameHeader {
    /// [`LAYOUT_VERSION`].
    pub version: u8,
    /// Position within (session, lane), from 1, without a gap.
    pub seq: FrameSeq,
    /// The region.
    pub region: RegionId,
    /// The window of it.
    pub window: WindowIndex,
    /// Blocks that the frame accounts for, zero ones included; never empty.
    pub present: WindowBits,
    /// Those of them that read as zero: they take no payload.
    pub zero: WindowBits,
    /// Encoding of the payload; `Raw` where there is none.
    pub encoding: Encoding,
    /// Bytes of the payload once decoded: those of `present` less `zero`.
    pub raw_len: u32,
    /// Bytes that follow this header.
    pub payload_len: u32,
    /// XXH3-128 of the decoded bytes (of no byte, where there are none).
    pub digest: u128,
}

/// The layout: fields in this order.
#[derive(Serialize, Deserialize)]
struct RawFrameHeader {
    version: u8,
    encoding: u8,
    region: u16,
    window: u32,
    seq: u64,
    raw_len: u32,
    payload_len: u32,
    digest: u128,
    present: [u64; 8],
    zero: [u64; 8],
}

/// A frame header that breaks a rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another layout.
    #[error("layout version {got} instead of {LAYOUT_VERSION}")]
    Version {
        /// What came.
        got: u8,
    },
    /// An encoding that this version does not have.
    #[error("unknown encoding {got}")]
    Encoding {
        /// What came.
        got: u8,
    },
    /// A frame is missing, repeated or out of order.
    #[error("frame {got} instead of {expected}")]
    Sequence {
        /// What had to come.
        expected: FrameSeq,
        /// What came.
        got: FrameSeq,
    },
    /// The window belongs on another lane.
    #[error("window {} belongs on lane {belongs}, not on lane {lane}", window.0)]
    Lane {
        /// The window.
        window: WindowIndex,
        /// Its lane.
        belongs: Lane,
        /// The lane it came on.
        lane: Lane,
    },
    /// No such region.
    #[error("region {got} of a guest with {regions} regions")]
    Region {
        /// What came.
        got: RegionId,
        /// How many there are.
        regions: usize,
    },
    /// No such window.
    #[error("window {} of region {region}, which has {windows} windows", got.0)]
    Window {
        /// The region.
        region: RegionId,
        /// What came.
        got: WindowIndex,
        /// How many there are.
        windows: u32,
    },
    /// A block outside the region.
    #[error("a block past the end of region {region} in window {}", window.0)]
    Block {
        /// The region.
        region: RegionId,
        /// The window.
        window: WindowIndex,
    },
    /// A frame without or with too many blocks.
    #[error(
        "{got} blocks in a frame that holds at most {}",
        limits::MAX_FRAME_BLOCKS
    )]
    BlockCount {
        /// What came.
        got: u32,
    },
    /// Zero blocks that are not present.
    #[error("zero blocks that are not present")]
    Zero,
    /// The decoded length does not follow from the blocks.
    #[error("decoded length {got} where the blocks take {expected}")]
    RawLen {
        /// What the blocks take.
        expected: u32,
        /// What came.
        got: u32,
    },
    /// The payload does not begin with what its differences are to.
    #[error("differences to blocks that the frame does not have, or to none")]
    Bases,
    /// The payload does not say of which blocks its duplicates are.
    #[error("duplicates that the frame does not have, or with a payload of another length")]
    Origins,
    /// A duplicate of what is no whole block of the guest.
    #[error("a duplicate of block {} of window {} of region {}, which is no whole block of the guest", .0.block, .0.window.0, .0.region)]
    Origin(BlockRef),
    /// A duplicate of a block that was not received yet.
    #[error("a duplicate of block {} of window {} of region {}, which was never received", .0.block, .0.window.0, .0.region)]
    Unreceived(BlockRef),
    /// The payload's length does not fit encoding and decoded length.
    #[error("payload of {payload_len} bytes for {raw_len} decoded ones in encoding {encoding:?}")]
    PayloadLen {
        /// Its length.
        payload_len: u32,
        /// Decoded length.
        raw_len: u32,
        /// The encoding.
        encoding: Encoding,
    },
}

impl From<FrameError> for WireError {
    fn from(error: FrameError) -> Self {
        Self::new(ErrorCode::BadFrame, format!("bad frame header: {error}"))
    }
}

impl Encoding {
    const fn number(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
            Self::Difference => 2,
            Self::Duplicate => 3,
        }
    }

    const fn from_number(number: u8) -> Result<Self, FrameError> {
        match number {
            0 => Ok(Self::Raw),
            1 => Ok(Self::Zstd),
            2 => Ok(Self::Difference),
            3 => Ok(Self::Duplicate),
            got => Err(FrameError::Encoding { got }),
        }
    }
}

/// The lane on which `window` of any region travels, in a session of `lanes` lanes.
#[must_use]
pub fn lane_of(window: WindowIndex, lanes: u8) -> Lane {
    let lane = window.0 % u32::from(lanes.max(1));
    Lane(u8::try_from(lane).unwrap_or(u8::MAX))
}

impl FrameHeader {
    /// Bytes of a header.
    pub const ENCODED_LEN: usize = 168;

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::ENCODED_LEN] {
        let raw = RawFrameHeader {
            version: self.version,
            encoding: self.encoding.number(),
            region: self.region.0,
            window: self.window.0,
            seq: self.seq.0,
            raw_len: self.raw_len,
            payload_len: self.payload_len,
            digest: self.digest,
            present: self.present.0,
            zero: self.zero.0,
        };
        layout::encode_fixed(&raw).expect("integers and arrays of them always take the same bytes")
    }

    /// Reads a header. Its version and encoding are known ones; everything else is [`check`](Self::check)ed.
    ///
    /// # Errors
    /// [`FrameError::Version`] or [`FrameError::Encoding`].
    pub fn decode(bytes: &[u8; Self::ENCODED_LEN]) -> Result<Self, FrameError> {
        if bytes[0] != LAYOUT_VERSION {
            return Err(FrameError::Version { got: bytes[0] });
        }
        let raw: RawFrameHeader =
            layout::decode(bytes).expect("any bytes of this length are integers");
        Ok(Self {
            version: raw.version,
            seq: FrameSeq(raw.seq),
            region: RegionId(raw.region),
            window: WindowIndex(raw.window),
            present: WindowBits(raw.present),
            zero: WindowBits(raw.zero),
            encoding: Encoding::from_number(raw.encoding)?,
            raw_len: raw.raw_len,
            payload_len: raw.payload_len,
            digest: raw.digest,
        })
    }

    /// Checks everything that a peer can get wrong in a header that came on `lane` of `lanes`, for a guest whose
    /// regions have the lengths `geometry`, where frame `expected_seq` is due.
    ///
    /// # Errors
    /// The first rule that is broken. Nothing may be allocated or written for such a frame.
    pub fn check(
        &self,
        geometry: &[RegionLen],
        lane: Lane,
        lanes: u8,
        expected_seq: FrameSeq,
    ) -> Result<(), FrameError> {
        if self.version != LAYOUT_VERSION {
            return Err(FrameError::Version { got: self.version });
        }
        if self.seq != expected_seq {
            return Err(FrameError::Sequence {
                expected: expected_seq,
                got: self.seq,
            });
        }
        let belongs = lane_of(self.window, lanes);
        if belongs != lane {
            return Err(FrameError::Lane {
                window: self.window,
                belongs,
                lane,
            });
        }
        let region = geometry
            .get(usize::from(self.region.0))
            .ok_or(FrameError::Region {
                got: self.region,
                regions: geometry.len(),
            })?;
        self.check_blocks(*region)?;
        self.check_lengths(*region)
    }

    fn check_blocks(&self, region: RegionLen) -> Result<(), FrameError> {
        if self.window.0 >= region.windows() {
            return Err(FrameError::Window {
                region: self.region,
                got: self.window,
                windows: region.windows(),
            });
        }
        if !self.present.minus(&region.all_of(self.window)).is_empty() {
            return Err(FrameError::Block {
                region: self.region,
                window: self.window,
            });
        }
        let count = self.present.count();
        if count > limits::MAX_FRAME_BLOCKS {
            return Err(FrameError::BlockCount { got: count });
        }
        if !self.zero.minus(&self.present).is_empty() {
            return Err(FrameError::Zero);
        }
        Ok(())
    }

    fn check_lengths(&self, region: RegionLen) -> Result<(), FrameError> {
        let expected = region.bytes_of(self.window, &self.data_blocks());
        if self.raw_len != expected {
            return Err(FrameError::RawLen {
                expected,
                got: self.raw_len,
            });
        }
        let fits = match self.encoding {
            Encoding::Raw => self.payload_len == self.raw_len,
            Encoding::Zstd => self.payload_len > 0 && self.payload_len <= self.raw_len,
            Encoding::Difference => {
                self.payload_len as usize > Bases::ENCODED_LEN && self.payload_len <= self.raw_len
            }
            Encoding::Duplicate => {
                self.payload_len as usize >= Origins::LEAST_LEN && self.payload_len <= self.raw_len
            }
        };
        if !fits || self.payload_len > limits::MAX_FRAME_PAYLOAD {
            return Err(FrameError::PayloadLen {
                payload_len: self.payload_len,
                raw_len: self.raw_len,
                encoding: self.encoding,
            });
        }
        Ok(())
    }

    /// The blocks whose bytes are in the payload.
    #[must_use]
    pub fn data_blocks(&self) -> WindowBits {
        self.present.minus(&self.zero)
    }

    /// Where the decoded payload goes, in its order.
    #[must_use]
    pub fn data_runs(&self, region: RegionLen) -> Vec<Run> {
        region.runs(self.window, &self.data_blocks())
    }

    /// What must read as zero.
    #[must_use]
    pub fn zero_runs(&self, region: RegionLen) -> Vec<Run> {
        region.runs(self.window, &self.zero)
    }
}
