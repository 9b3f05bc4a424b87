//! Buffers of frames that come back when the transport has no use for them any more.
//!
//! Owns a bounded list of them, shared by the lanes of a session. A payload is lent to the transport until it is
//! acknowledged; from then on its memory can carry another frame, without the page faults and the clearing of fresh
//! memory. Invariant: a buffer is handed out only when nobody else holds it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use vmferry_proto::limits::MAX_FRAME_PAYLOAD;

/// Buffers kept: 32 MiB, as much as a connection may have under way.
const MOST: usize = 64;
/// Where buffers begin: a cache line. The system's allocator begins large ones 16 bytes into a page, and the kernel's copy of guest
/// pages to such an address was a third as fast on an AMD EPYC (`rep movsb` to an address just above the source's, modulo 4 KiB).
const ALIGNMENT: usize = 64;

/// Buffers that were lent, each as large as the largest payload.
#[derive(Debug, Default)]
pub(crate) struct FrameBuffers {
    lent: Mutex<VecDeque<Bytes>>,
}

impl FrameBuffers {
    /// An empty buffer for the largest payload: one that has come back, else a new one.
    pub(crate) fn take(&self) -> BytesMut {
        let free = {
            let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
            // The one lent last of those that are back: its memory is the likeliest to be in a cache still.
            let free = lent.iter().rposition(Bytes::is_unique);
            free.and_then(|at| lent.remove(at))
        };
        free.and_then(|buffer| buffer.try_into_mut().ok())
            .unwrap_or_else(|| aligned(MAX_FRAME_PAYLOAD as usize))
    }

    /// Lends `buffer`: what is returned may be held as long as need be.
    pub(crate) fn lend(&self, buffer: BytesMut) -> Bytes {
        let payload = buffer.freeze();
        let mut lent = self.lent.lock().unwrap_or_else(PoisonError::into_inner);
        if lent.len() == MOST {
            lent.pop_front();
        }
        lent.push_back(payload.clone());
        payload
    }
}

/// An empty buffer of at least `capacity` bytes that begins at a multiple of [`ALIGNMENT`].
fn aligned(capacity: usize) -> BytesMut {
    let mut buffer = BytesMut::with_capacity(capacity + ALIGNMENT);
    let before = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
    buffer.resize(before, 0);
    buffer.advance(before);
    buffer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_only_when_nobody_holds_it() {
        let buffers = FrameBuffers::default();
        let mut first = buffers.take();
        first.extend_from_slice(&[7; 300_000]);
        let at = first.as_ptr();
        assert_eq!(at.align_offset(ALIGNMENT), 0);
        let payload = buffers.lend(first);
        let second = buffers.take();
        assert_ne!(second.as_ptr(), at, "the payload is still held");
        assert_eq!(payload.as_ref(), &[7; 300_000]);
        drop(payload);
        let third = buffers.take();
        assert_eq!(third.as_ptr(), at);
        assert!(third.capacity() >= MAX_FRAME_PAYLOAD as usize);
    }

    #[test]
    fn only_so_many_are_kept() {
        let buffers = FrameBuffers::default();
        let held: Vec<Bytes> = (0..MOST + 9)
            .map(|_| buffers.lend(BytesMut::zeroed(8)))
            .collect();
        assert_eq!(buffers.lent.lock().unwrap().len(), MOST);
        drop(held);
        // One of the small ones comes back: the caller makes it larger.
        assert_eq!(buffers.take().len(), 8);
    }
}
