//! A stream's bytes in the pieces in which they came.
//!
//! Owns the way from the transport's chunks to pieces of a wanted length. Invariant: what holds a payload in pieces is bounded
//! however small they are, since each keeps the memory of a whole packet.

use std::collections::VecDeque;

use bytes::Bytes;
use quinn::{ReadError, RecvStream};

/// Pieces taken from the transport at once: one lock of the connection for each time.
const AT_ONCE: usize = 32;
/// Most pieces of a payload that are held as they came: the smallest packets of QUIC (1,200 bytes) fill a frame with half as many.
const MOST: usize = 1024;

/// Reads a stream in pieces.
#[derive(Debug)]
pub(super) struct PieceReader {
    stream: RecvStream,
    /// What was taken from the transport and not asked for yet.
    ahead: VecDeque<Bytes>,
}

impl PieceReader {
    pub(super) const fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            ahead: VecDeque::new(),
        }
    }

    /// The next piece, of at most `most` bytes; `None` at the stream's end.
    pub(super) async fn next(&mut self, most: usize) -> Result<Option<Bytes>, ReadError> {
        if self.ahead.is_empty() {
            let mut room = [const { Bytes::new() }; AT_ONCE];
            let read = self.stream.read_chunks(&mut room).await?;
            self.ahead.extend(room.into_iter().take(read.unwrap_or(0)));
        }
        let Some(mut piece) = self.ahead.pop_front() else {
            return Ok(None);
        };
        if piece.len() > most {
            self.ahead.push_front(piece.split_off(most));
        }
        Ok(Some(piece))
    }
}

/// Pieces of a payload, one behind the other.
#[derive(Debug, Default)]
pub(super) struct Gathered(Vec<Bytes>);

impl Gathered {
    /// Adds a piece. Of too many those that are there are made one.
    pub(super) fn push(&mut self, piece: Bytes) {
        if self.0.len() == MOST {
            self.0 = vec![self.0.concat().into()];
        }
        self.0.push(piece);
    }

    pub(super) fn into_pieces(self) -> Vec<Bytes> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{Gathered, MOST};

    #[test]
    fn pieces_of_a_byte_are_put_together_before_they_hold_much() {
        let whole: Vec<u8> = (0..=255).cycle().take(5 * MOST).collect();
        let whole = Bytes::from(whole);
        let mut gathered = Gathered::default();
        for at in 0..whole.len() {
            gathered.push(whole.slice(at..=at));
            assert!(gathered.0.len() <= MOST);
        }
        assert_eq!(gathered.into_pieces().concat(), whole);
    }
}
