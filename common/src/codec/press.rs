//! zstd's contexts, shared by all encoders of a session.
//!
//! Owns how many there are: as many as are in use at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use crate::buffers::FrameBuffers;

/// zstd's context and its working memory: megabytes at the higher levels.
pub(super) struct Press {
    level: i32,
    compressor: Compressor<'static>,
    packed: Vec<u8>,
    /// The blocks of a frame, of which some are differences.
    pub(super) differences: Vec<u8>,
}

impl Press {
    /// `head` and, behind it, `content` compressed; `None` where that is not smaller than `content`.
    pub(super) fn pack(&mut self, head: &[u8], content: &[u8]) -> std::io::Result<Option<Bytes>> {
        self.packed.clear();
        // Room for the worst case, so that zstd never fails half way: a context that did would have to be made anew.
        self.packed
            .reserve(zstd::zstd_safe::compress_bound(content.len()));
        let len = self
            .compressor
            .compress_to_buffer(content, &mut self.packed)?;
        let packed = self.packed.get(..len).unwrap_or_default();
        if head.len() + len >= content.len() {
            return Ok(None);
        }
        // A buffer of just its length: what waits in queues is counted by payload.
        let mut payload = BytesMut::with_capacity(head.len() + len);
        payload.extend_from_slice(head);
        payload.extend_from_slice(packed);
        Ok(Some(payload.freeze()))
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
