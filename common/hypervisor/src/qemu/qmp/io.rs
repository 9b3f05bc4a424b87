//! The two tasks of a QMP connection, and what they share with its callers.
//!
//! The writer owns the sending half: a message goes out whole whoever stops waiting for it. The reader takes the
//! stream apart into lines; a line that is longer than [`MAX_LINE`] or is not JSON ends the connection.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::error::QmpError;
use super::events::{BACKLOG, Event, EventTally};

/// Longest line from QEMU: a schema is 0.3 MB, a listing of thousands of block nodes some MB.
const MAX_LINE: usize = 32 << 20;
/// Messages that wait for the writer; a caller beyond that waits.
pub(super) const QUEUE: usize = 64;

/// QEMU's answer: `return`, or `error`.
pub(super) type Answer = Result<Value, Value>;

/// A message to QEMU.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) message: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What callers, reader and writer share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) next_id: AtomicU64,
    pub(super) outgoing: mpsc::Sender<Outgoing>,
    pub(super) events: broadcast::Sender<Event>,
    pub(super) closed: watch::Sender<Option<String>>,
    pending: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    tally: Mutex<EventTally>,
}

/// Takes the entry of a caller that stopped waiting out of the table.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(&self.shared.pending).remove(&self.id);
    }
}

/// The guarded values are plain data: a panic elsewhere leaves them valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(outgoing: mpsc::Sender<Outgoing>) -> Self {
        Self {
            next_id: AtomicU64::new(1),
            outgoing,
            events: broadcast::channel(BACKLOG).0,
            closed: watch::channel(None).0,
            pending: Mutex::default(),
            tally: Mutex::default(),
        }
    }

    pub(super) fn expect(&self, id: u64, answer_to: oneshot::Sender<Answer>) -> Waiting<'_> {
        lock(&self.pending).insert(id, answer_to);
        Waiting { shared: self, id }
    }

    pub(super) fn tally(&self) -> EventTally {
        lock(&self.tally).clone()
    }

    pub(super) fn why_closed(&self) -> String {
        let why = self.closed.borrow().clone();
        why.unwrap_or_else(|| "QEMU closed it".to_owned())
    }

    pub(super) fn not_sent(&self, command: &str) -> QmpError {
        QmpError::NotSent {
            command: command.to_owned(),
            why: self.why_closed(),
        }
    }

    /// Ends the connection for every caller: marked closed first, so that nobody starts to wait afterwards.
    fn close(&self, why: &str) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some(why.to_owned());
            }
            first
        });
        lock(&self.pending).clear();
    }

    fn handle_line(&self, line: &[u8]) -> Result<(), String> {
        let mut message: Value = serde_json::from_slice(line)
            .map_err(|error| format!("QEMU sent a line that is not JSON: {error}"))?;
        if let Some(name) = message["event"].as_str() {
            let event = Event {
                name: name.to_owned(),
                data: message["data"].take(),
            };
            lock(&self.tally).count(&event);
            tracing::debug!(event = event.name, data = %event.data, "QEMU event");
            // Nobody has to listen.
            let _ = self.events.send(event);
            return Ok(());
        }
        let Some(id) = message["id"].as_u64() else {
            return Err(format!("QEMU answered without an id: {message}"));
        };
        let Some(answer_to) = lock(&self.pending).remove(&id) else {
            return Ok(());
        };
        let answer = match message.get_mut("error") {
            Some(error) => Err(error.take()),
            None => Ok(message["return"].take()),
        };
        let _ = answer_to.send(answer);
        Ok(())
    }
}

/// Splits what arrives into lines.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    searched: usize,
}

impl Lines {
    /// The next line without its end, `None` at the end of the stream. Cancel safe.
    pub(super) async fn next(&mut self, stream: &UnixStream) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(at) = self.buffer[self.searched..]
                .iter()
                .position(|b| *b == b'\n')
            {
                let rest = self.buffer.split_off(self.searched + at + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                line.pop();
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > MAX_LINE {
                return Err(io::Error::other("a line of more than 32 MiB"));
            }
            stream.readable().await?;
            self.buffer.reserve(16 << 10);
            match stream.try_read_buf(&mut self.buffer) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Hands out what QEMU sends, until the connection ends.
pub(super) async fn read_all(stream: Arc<UnixStream>, mut lines: Lines, shared: Arc<Shared>) {
    let why = loop {
        match lines.next(&stream).await {
            Ok(Some(line)) => {
                if let Err(why) = shared.handle_line(&line) {
                    break why;
                }
            }
            Ok(None) => break "QEMU closed it".to_owned(),
            Err(error) => break format!("reading failed: {error}"),
        }
    };
    shared.close(&why);
}

/// Sends what callers queue, until the connection ends.
pub(super) async fn write_all(
    stream: Arc<UnixStream>,
    mut queue: mpsc::Receiver<Outgoing>,
    shared: Arc<Shared>,
) {
    while let Some(Outgoing { message, fds }) = queue.recv().await {
        if let Err(error) = send(&stream, &message, &fds).await {
            shared.close(&format!("writing failed: {error}"));
            return;
        }
    }
}

/// Writes `message` whole; `fds` travel with its first byte.
pub(super) async fn send(stream: &UnixStream, message: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut sent = 0;
    while sent < message.len() {
        let attached: &[OwnedFd] = if sent == 0 { fds } else { &[] };
        sent += stream
            .async_io(Interest::WRITABLE, || {
                send_some(stream, &message[sent..], attached)
            })
            .await?;
    }
    Ok(())
}

fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors for one command"));
    }
    let flags = SendFlags::NOSIGNAL;
    Ok(sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        flags,
    )?)
}
