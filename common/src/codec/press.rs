//! zstd's contexts, shared by all encoders of a session.
//!
//! Owns how many there are: as many as are in use at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use vmferry_proto::geometry::BLOCK_SIZE;
use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use crate::buffers::FrameBuffers;

/// Pieces of a frame that its sample is made of, and the bytes of each: a thirtieth of a whole frame.
const PIECES: usize = 16;
const PIECE: usize = 1024;
/// Bytes of a frame that tell what all of it would come to: over the memory of a Linux guest `zstd -b --fast=1` has the same ratio with
/// `-B64K` as with `-B512K`, 1.97, and takes 5 % more time for a byte.
const PROBED: usize = 64 << 10;
/// A frame that is no longer than so many samples is compressed without a look at one.
const FEW_SAMPLES: usize = 4;
/// Share of the sample that compression has to save, in percent: less is not worth the peer's time.
const LEAST_SAVED: usize = 5;

/// zstd's context and its working memory: megabytes at the higher levels.
pub(super) struct Press {
    level: i32,
    compressor: Compressor<'static>,
    packed: Vec<u8>,
    /// The blocks of a frame, of which some are differences.
    pub(super) differences: Vec<u8>,
}

impl Press {
    /// Whether a sample of `content`, pieces from all over it, gets smaller.
    pub(super) fn shrinks(&mut self, content: &[u8]) -> std::io::Result<bool> {
        if content.len() <= FEW_SAMPLES * PIECES * PIECE {
            return Ok(true);
        }
        let mut sample = [0; PIECES * PIECE];
        let apart = content.len() / PIECES;
        let pieces = sample.chunks_mut(PIECE).zip(content.chunks(apart));
        for (at, (piece, content)) in pieces.enumerate() {
            // Not the same part of every block: what begins alike may go on differently.
            let from = at * PIECE % BLOCK_SIZE as usize;
            if let Some(content) = content.get(from..from + PIECE) {
                piece.copy_from_slice(content);
            }
        }
        let len = self.compress(&sample)?.len();
        Ok(len * 100 <= sample.len() * (100 - LEAST_SAVED))
    }

    /// Bytes of a piece from the middle of `content`, and of the same compressed.
    pub(super) fn probe(&mut self, content: &[u8]) -> std::io::Result<(usize, usize)> {
        let from = content.len().saturating_sub(PROBED) / 2;
        let piece = content.get(from..).unwrap_or_default();
        let piece = piece.get(..PROBED).unwrap_or(piece);
        Ok((piece.len(), self.compress(piece)?.len()))
    }

    /// `head` and, behind it, `content` compressed; `None` where that is not smaller than `content`.
    pub(super) fn pack(&mut self, head: &[u8], content: &[u8]) -> std::io::Result<Option<Bytes>> {
        let packed = self.compress(content)?;
        let len = head.len() + packed.len();
        if len >= content.len() {
            return Ok(None);
        }
        // A buffer of just its length: what waits in queues is counted by payload.
        let mut payload = BytesMut::with_capacity(len);
        payload.extend_from_slice(head);
        payload.extend_from_slice(packed);
        Ok(Some(payload.freeze()))
    }

    /// `content` compressed, in this context's own memory.
    fn compress(&mut self, content: &[u8]) -> std::io::Result<&[u8]> {
        self.packed.clear();
        // Room for the worst case, so that zstd never fails half way: a context that did would have to be made anew.
        self.packed
            .reserve(zstd::zstd_safe::compress_bound(content.len()));
        let len = self
            .compressor
            .compress_to_buffer(content, &mut self.packed)?;
        Ok(self.packed.get(..len).unwrap_or_default())
    }
}

/// What encoders share: as much of it exists as is in use at once, however many there are of them.
#[derive(Default)]
pub struct EncoderPool {
    pub(super) buffers: FrameBuffers,
    presses: Mutex<Vec<Press>>,
}

impl std::fmt::Debug for EncoderPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncoderPool")
            .field("buffers", &self.buffers)
            .finish_non_exhaustive()
    }
}

impl EncoderPool {
    /// One that is free, set to `level`.
    pub(super) fn press(&self, level: i32) -> std::io::Result<Press> {
        let free = self.presses().pop();
        match free {
            Some(press) if press.level == level => Ok(press),
            Some(mut press) => {
                press.compressor.set_compression_level(level)?;
                Ok(Press { level, ..press })
            }
            None => Ok(Press {
                level,
                compressor: new_compressor(level)?,
                packed: Vec::new(),
                differences: Vec::new(),
            }),
        }
    }

    pub(super) fn presses(&self) -> MutexGuard<'_, Vec<Press>> {
        self.presses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn new_compressor(level: i32) -> std::io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(level)?;
    // The frame carries a digest and the length already.
    compressor.set_parameter(CParameter::ChecksumFlag(false))?;
    compressor.set_parameter(CParameter::ContentSizeFlag(false))?;
    Ok(compressor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::tests::block;

    fn random(len: usize) -> Vec<u8> {
        block(2, 7, len)
    }

    fn shrinks(content: &[u8]) -> bool {
        EncoderPool::default()
            .press(-1)
            .unwrap()
            .shrinks(content)
            .unwrap()
    }

    #[test]
    fn a_sample_tells_whether_content_shrinks() {
        for len in [65_537, 400_000, 524_288] {
            let mut content = random(len);
            assert!(!shrinks(&content), "{len} random bytes");
            // Every fifth block is text.
            for block in content.chunks_mut(4096).step_by(5) {
                block.fill(b'a');
            }
            assert!(shrinks(&content), "{len} bytes");
            assert!(shrinks(&vec![7; len]));
        }
        assert!(shrinks(&random(65_536)), "too little for a sample");
    }

    #[test]
    fn blocks_that_begin_alike_and_go_on_differently_do_not_shrink() {
        let mut content = random(524_288);
        for block in content.chunks_mut(4096) {
            block[..150].fill(0);
        }
        assert!(!shrinks(&content));
    }
}
