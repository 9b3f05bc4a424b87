//! A request that waits for its reply, and what a reply may do to it.
//!
//! Owns the check of everything the server says about a request: a reply that does not belong to it is an error
//! before a byte is stored.

use std::io;

use tokio::sync::oneshot;

use super::error::NbdError;
use super::wire::{self, Command, Extent};

/// What a request brought.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing but success.
    Done,
    /// The bytes of a READ.
    Data(Vec<u8>),
    /// The extents of each context, by its id.
    Status(Vec<(u32, Vec<Extent>)>),
}

/// A request under way.
#[derive(Debug)]
pub(super) struct Pending {
    command: Command,
    offset: u64,
    len: u32,
    buffer: Vec<u8>,
    /// Ranges of `buffer` that have come: start and end.
    covered: Vec<(usize, usize)>,
    status: Vec<(u32, Vec<Extent>)>,
    failure: Option<io::Error>,
    answer_to: oneshot::Sender<Result<Outcome, NbdError>>,
    /// Room among the requests in flight, given back with this.
    _room: tokio::sync::OwnedSemaphorePermit,
}

impl Pending {
    pub(super) fn new(
        command: Command,
        offset: u64,
        len: u32,
        answer_to: oneshot::Sender<Result<Outcome, NbdError>>,
        room: tokio::sync::OwnedSemaphorePermit,
    ) -> Self {
        let buffer = match command {
            Command::Read => vec![0; len as usize],
            _ => Vec::new(),
        };
        Self {
            command,
            offset,
            len,
            buffer,
            covered: Vec::new(),
            status: Vec::new(),
            failure: None,
            answer_to,
            _room: room,
        }
    }

    /// Part of the buffer that a data chunk for `offset` with `len` bytes fills.
    pub(super) fn data(&mut self, offset: u64, len: usize) -> Result<&mut [u8], String> {
        let range = self.cover(offset, len)?;
        Ok(&mut self.buffer[range.0..range.1])
    }

    /// A hole chunk: the buffer is zero already.
    pub(super) fn hole(&mut self, offset: u64, len: u32) -> Result<(), String> {
        self.cover(offset, len as usize).map(|_| ())
    }

    fn cover(&mut self, offset: u64, len: usize) -> Result<(usize, usize), String> {
        if self.command != Command::Read {
            return Err(format!("data in answer to {}", self.command.name()));
        }
        let start = offset
            .checked_sub(self.offset)
            .and_then(|start| usize::try_from(start).ok());
        let range = start.and_then(|start| Some((start, start.checked_add(len)?)));
        let fresh = |(start, end): (usize, usize)| {
            end <= self.buffer.len()
                && start < end
                && self
                    .covered
                    .iter()
                    .all(|old| end <= old.0 || old.1 <= start)
        };
        match range.filter(|range| fresh(*range)) {
            Some(range) => {
                self.covered.push(range);
                Ok(range)
            }
            None => Err(format!(
                "{len} bytes at {offset} in answer to a READ of {} bytes at {}",
                self.len, self.offset
            )),
        }
    }

    /// A block status chunk.
    pub(super) fn status(&mut self, payload: &[u8]) -> Result<(), String> {
        if self.command != Command::BlockStatus {
            return Err(format!("block status in answer to {}", self.command.name()));
        }
        let (context, mut extents) = wire::block_status(payload)?;
        if self.status.iter().any(|(known, _)| *known == context) {
            return Err(format!("block status of context {context} twice"));
        }
        // Only the last extent may reach past what was asked; what does is of no use here.
        let mut left = self.len;
        for extent in &mut extents {
            if left == 0 {
                return Err("an extent past the range that was asked for".to_owned());
            }
            extent.len = extent.len.min(left);
            left -= extent.len;
        }
        self.status.push((context, extents));
        Ok(())
    }

    /// An error of the server's; the reply may go on.
    pub(super) fn fail(&mut self, number: u32, text: &str) {
        if self.failure.is_none() {
            self.failure = Some(errno(number, text));
        }
    }

    /// The end of the reply: hands the outcome to the caller, where it still waits.
    pub(super) fn finish(self) -> Result<(), String> {
        let (command, offset) = (self.command, self.offset);
        let outcome = match (self.failure, command) {
            (Some(source), _) => Err(NbdError::Failed {
                request: command.name(),
                offset,
                source,
            }),
            (None, Command::Read) => {
                let come: usize = self.covered.iter().map(|(start, end)| end - start).sum();
                if come != self.buffer.len() {
                    return Err(format!("a READ of {} bytes answered with {come}", self.len));
                }
                Ok(Outcome::Data(self.buffer))
            }
            (None, Command::BlockStatus) => Ok(Outcome::Status(self.status)),
            (
                None,
                Command::Write | Command::WriteZeroes | Command::Flush | Command::Disconnect,
            ) => Ok(Outcome::Done),
        };
        // A caller that went away needs nothing.
        let _ = self.answer_to.send(outcome);
        Ok(())
    }

    /// Whether a simple reply may answer it: a READ is answered in chunks once those were negotiated.
    pub(super) fn takes_simple(&self, error: u32) -> bool {
        error != 0 || !matches!(self.command, Command::Read | Command::BlockStatus)
    }
}

/// The numbers are Linux's for every error that the protocol knows.
fn errno(number: u32, text: &str) -> io::Error {
    let plain = io::Error::from_raw_os_error(i32::try_from(number).unwrap_or(5));
    if text.is_empty() {
        plain
    } else {
        let text: String = text.chars().take(500).collect();
        io::Error::new(plain.kind(), format!("{plain}: {text}"))
    }
}
