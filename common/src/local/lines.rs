//! Lines of bounded length over a socket.
//!
//! Owns cutting and the bounds of reading and writing; what a line says is the caller's. Cancel safe: what has
//! come is kept here.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

/// A client that does not read is dropped after this.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Sends one line; a peer that does not read it in time is an error.
pub(super) async fn send_line(
    write: &mut (impl AsyncWriteExt + Unpin),
    line: &str,
) -> io::Result<()> {
    let send = async {
        write.write_all(line.as_bytes()).await?;
        write.write_all(b"\n").await
    };
    match tokio::time::timeout(WRITE_LIMIT, send).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Cuts a stream into lines of bounded length. Cancel safe: what has come is kept here.
pub(super) struct Lines<R> {
    stream: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no line end.
    searched: usize,
    max: usize,
}

#[derive(Debug)]
pub(super) enum LineError {
    TooLong,
    Io(io::Error),
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub(super) const fn new(stream: R, max: usize) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            searched: 0,
            max,
        }
    }

    /// The next line without its end; `None` at the end of the stream, where a last line without an end is dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        loop {
            let fresh = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = fresh.iter().position(|byte| *byte == b'\n') {
                let end = self.searched + at;
                if end > self.max {
                    return Err(LineError::TooLong);
                }
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.searched > self.max {
                return Err(LineError::TooLong);
            }
            match self.stream.read_buf(&mut self.buffer).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) => return Err(LineError::Io(error)),
            }
        }
    }

    /// Reads ahead until the stream ends or a line's length is kept; past that nothing is read until the command
    /// at work is done. Cancel safe.
    pub(super) async fn read_ahead(&mut self) {
        while self.buffer.len() <= self.max {
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }
}
