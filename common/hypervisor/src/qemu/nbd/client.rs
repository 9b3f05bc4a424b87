//! One NBD connection with many requests in flight.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::error::NbdError;
use super::negotiate::{Offer, negotiate};
use super::pending::{Outcome, Pending};
use super::wire::{self, Command, Extent, Reply};

/// Requests in flight on one connection: QEMU's server takes 16 at a time, as many again keep it busy.
const IN_FLIGHT: usize = 32;
/// Longest READ or WRITE: bounds what a connection holds in memory to `IN_FLIGHT` times this.
pub const MAX_TRANSFER: u32 = 1 << 20;
/// Longest range asked about at once: the largest multiple of 4 KiB that a request can name.
const MAX_STATUS: u64 = 0xffff_f000;
/// Longest wait for a reply: an overloaded disk may take long, a hung one for ever.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest wait for the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to one export; clones share it, and it is closed with the last of them.
#[derive(Debug, Clone)]
pub struct Nbd {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    offer: Offer,
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    tasks: [tokio::task::AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// What callers, reader and writer share.
#[derive(Debug)]
struct Shared {
    next_cookie: AtomicU64,
    outgoing: mpsc::Sender<(Bytes, Bytes)>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pending: HashMap<u64, Pending>,
    closed: Option<String>,
}

impl Shared {
    /// The guarded value is plain data: a panic elsewhere leaves it valid.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, why: &str) {
        let mut state = self.state();
        state.closed.get_or_insert_with(|| why.to_owned());
        state.pending.clear();
    }

    fn why_closed(&self) -> NbdError {
        let why = self.state().closed.clone();
        NbdError::Closed(why.unwrap_or_else(|| "the server closed it".to_owned()))
    }

    fn take(&self, cookie: u64) -> Result<Pending, String> {
        self.state()
            .pending
            .remove(&cookie)
            .ok_or_else(|| format!("a reply to request {cookie}, which is not under way"))
    }

    fn put_back(&self, cookie: u64, pending: Pending) {
        self.state().pending.insert(cookie, pending);
    }
}

impl Nbd {
    /// Connects to the export `export` behind the socket at `path` with the meta contexts `contexts`.
    ///
    /// # Errors
    /// Where the export or a context is not there, or the server speaks something else.
    pub async fn connect(path: &Path, export: &str, contexts: &[&str]) -> Result<Self, NbdError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| NbdError::Io {
                export: export.to_owned(),
                what: "its socket could not be connected",
                source,
            })?;
        let (read, write) = stream.into_split();
        Self::over(read, write, export, contexts).await
    }

    /// [`connect`](Self::connect) over halves that are connected already.
    pub(super) async fn over<R, W>(
        read: R,
        mut write: W,
        export: &str,
        contexts: &[&str],
    ) -> Result<Self, NbdError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let mut read = BufReader::with_capacity(64 << 10, read);
        let handshake = negotiate(&mut read, &mut write, export, contexts);
        let offer = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
            .await
            .map_err(|_| NbdError::TimedOut {
                request: "handshake",
                seconds: HANDSHAKE_TIMEOUT.as_secs(),
            })??;
        let (outgoing, queue) = mpsc::channel(IN_FLIGHT);
        let shared = Arc::new(Shared {
            next_cookie: AtomicU64::new(1),
            outgoing,
            state: Mutex::default(),
        });
        let reader = tokio::spawn(read_all(read, Arc::clone(&shared)));
        let writer = tokio::spawn(write_all(write, queue, Arc::clone(&shared)));
        Ok(Self {
            inner: Arc::new(Inner {
                offer,
                shared,
                room: Arc::new(Semaphore::new(IN_FLIGHT)),
                tasks: [reader.abort_handle(), writer.abort_handle()],
            }),
        })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.inner.offer.size
    }

    /// Whether the server refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.inner.offer.flags & wire::EXPORT_READ_ONLY != 0
    }

    /// Reads `len` bytes, at most [`MAX_TRANSFER`].
    ///
    /// # Errors
    /// See [`NbdError`].
    pub async fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>, NbdError> {
        match self
            .request(Command::Read, offset, len, Bytes::new())
            .await?
        {
            Outcome::Data(data) => Ok(data),
            other => Err(mixed_up(Command::Read, &other)),
        }
    }

    /// Writes `data`, at most [`MAX_TRANSFER`] bytes.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), NbdError> {
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.done(Command::Write, offset, len, data).await
    }

    /// Makes `len` bytes read as zero, with a hole where the image can have one.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub async fn write_zeroes(&self, offset: u64, len: u32) -> Result<(), NbdError> {
        if self.inner.offer.flags & wire::EXPORT_WRITE_ZEROES == 0 {
            return self.write_plain_zeroes(offset, len).await;
        }
        self.done(Command::WriteZeroes, offset, len, Bytes::new())
            .await
    }

    async fn write_plain_zeroes(&self, offset: u64, len: u32) -> Result<(), NbdError> {
        let mut at = 0;
        while at < len {
            let piece = (len - at).min(MAX_TRANSFER);
            let zeroes = Bytes::from(vec![0; piece as usize]);
            self.write(offset + u64::from(at), zeroes).await?;
            at += piece;
        }
        Ok(())
    }

    /// Makes durable what was answered before this call.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub async fn flush(&self) -> Result<(), NbdError> {
        if self.inner.offer.flags & wire::EXPORT_FLUSH == 0 {
            return Err(NbdError::Refused {
                export: String::new(),
                why: "it cannot flush, so nothing written to it is safe".to_owned(),
            });
        }
        self.done(Command::Flush, 0, 0, Bytes::new()).await
    }

    /// State in the meta context `context` of every byte of `offset..offset + len`, as extents one behind the other.
    ///
    /// # Errors
    /// See [`NbdError`].
    pub async fn extents(
        &self,
        context: &str,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, NbdError> {
        let known = &self.inner.offer.contexts;
        let id = known
            .iter()
            .find(|(_, name)| name == context)
            .map(|(id, _)| *id);
        let id = id.ok_or_else(|| NbdError::Refused {
            export: String::new(),
            why: format!("the meta context {context} was not chosen"),
        })?;
        let mut extents = Vec::new();
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let piece = u32::try_from((end - at).min(MAX_STATUS)).unwrap_or(u32::MAX);
            let outcome = self
                .request(Command::BlockStatus, at, piece, Bytes::new())
                .await?;
            let Outcome::Status(status) = outcome else {
                return Err(mixed_up(Command::BlockStatus, &outcome));
            };
            let found = status.into_iter().find(|(known, _)| *known == id);
            let (_, found) = found.ok_or_else(|| {
                NbdError::Protocol(format!("no block status of {context} in its answer"))
            })?;
            // The parser refuses extents of no length, so this ends.
            at += found
                .iter()
                .map(|extent| u64::from(extent.len))
                .sum::<u64>();
            extents.extend(found);
        }
        Ok(extents)
    }

    async fn done(
        &self,
        command: Command,
        offset: u64,
        len: u32,
        data: Bytes,
    ) -> Result<(), NbdError> {
        match self.request(command, offset, len, data).await? {
            Outcome::Done => Ok(()),
            other => Err(mixed_up(command, &other)),
        }
    }

    async fn request(
        &self,
        command: Command,
        offset: u64,
        len: u32,
        data: Bytes,
    ) -> Result<Outcome, NbdError> {
        self.check_range(command, offset, len)?;
        let shared = &self.inner.shared;
        let room = Arc::clone(&self.inner.room).acquire_owned().await;
        let room = room.map_err(|_| shared.why_closed())?;
        let cookie = shared.next_cookie.fetch_add(1, Ordering::Relaxed);
        let (answer_to, answer) = oneshot::channel();
        {
            let mut state = shared.state();
            if let Some(why) = &state.closed {
                return Err(NbdError::Closed(why.clone()));
            }
            let pending = Pending::new(command, offset, len, answer_to, room);
            state.pending.insert(cookie, pending);
        }
        let head = Bytes::copy_from_slice(&wire::request(command, cookie, offset, len));
        if shared.outgoing.send((head, data)).await.is_err() {
            return Err(shared.why_closed());
        }
        match tokio::time::timeout(REQUEST_TIMEOUT, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(shared.why_closed()),
            Err(_) => Err(NbdError::TimedOut {
                request: command.name(),
                seconds: REQUEST_TIMEOUT.as_secs(),
            }),
        }
    }

    fn check_range(&self, command: Command, offset: u64, len: u32) -> Result<(), NbdError> {
        let size = self.size();
        let inside = offset
            .checked_add(u64::from(len))
            .is_some_and(|end| end <= size);
        let short = match command {
            Command::Read | Command::Write => len > 0 && len <= MAX_TRANSFER,
            Command::WriteZeroes | Command::BlockStatus => len > 0,
            Command::Flush | Command::Disconnect => true,
        };
        if inside && short {
            return Ok(());
        }
        Err(NbdError::OutOfRange {
            request: command.name(),
            offset,
            len: u64::from(len),
            size,
        })
    }
}

fn mixed_up(command: Command, outcome: &Outcome) -> NbdError {
    let kind = match outcome {
        Outcome::Done => "nothing",
        Outcome::Data(_) => "data",
        Outcome::Status(_) => "block status",
    };
    NbdError::Protocol(format!("{} answered with {kind}", command.name()))
}

async fn write_all<W: AsyncWrite + Unpin>(
    mut write: W,
    mut queue: mpsc::Receiver<(Bytes, Bytes)>,
    shared: Arc<Shared>,
) {
    while let Some((head, data)) = queue.recv().await {
        if let Err(error) = write.write_all_buf(&mut head.chain(data)).await {
            shared.close(&format!("writing failed: {error}"));
            return;
        }
    }
}

async fn read_all<R: AsyncRead + Unpin>(mut read: BufReader<R>, shared: Arc<Shared>) {
    let why = loop {
        match read_reply(&mut read, &shared).await {
            Ok(()) => {}
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                break "the server closed it".to_owned();
            }
            Err(ReadError::Io(error)) => break format!("reading failed: {error}"),
            Err(ReadError::Broken(what)) => break format!("the server broke the protocol: {what}"),
        }
    };
    shared.close(&why);
}

#[derive(Debug)]
enum ReadError {
    Io(io::Error),
    Broken(String),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<String> for ReadError {
    fn from(what: String) -> Self {
        Self::Broken(what)
    }
}

async fn read_reply<R: AsyncRead + Unpin>(
    read: &mut BufReader<R>,
    shared: &Shared,
) -> Result<(), ReadError> {
    let mut head = [0; wire::REPLY_LEN];
    read.read_exact(&mut head).await?;
    match wire::reply(&head)? {
        Reply::Simple { error, cookie } => {
            let mut pending = shared.take(cookie)?;
            if !pending.takes_simple(error) {
                return Err(ReadError::Broken("a simple reply to a READ".to_owned()));
            }
            if error != 0 {
                pending.fail(error, "");
            }
            Ok(pending.finish()?)
        }
        Reply::Chunk {
            flags,
            kind,
            cookie,
        } => {
            let mut pending = shared.take(cookie)?;
            read_chunk(read, kind, &mut pending).await?;
            if flags & wire::CHUNK_DONE != 0 {
                return Ok(pending.finish()?);
            }
            shared.put_back(cookie, pending);
            Ok(())
        }
    }
}

async fn read_chunk<R: AsyncRead + Unpin>(
    read: &mut BufReader<R>,
    kind: u16,
    pending: &mut Pending,
) -> Result<(), ReadError> {
    let len = read.read_u32().await?;
    if len > wire::MAX_CHUNK {
        return Err(ReadError::Broken(format!("a chunk of {len} bytes")));
    }
    if kind == wire::CHUNK_DATA {
        let data = len
            .checked_sub(8)
            .ok_or_else(|| format!("a data chunk of {len} bytes"))?;
        let offset = read.read_u64().await?;
        let part = pending.data(offset, data as usize)?;
        read.read_exact(part).await?;
        return Ok(());
    }
    let mut payload = vec![0; len as usize];
    read.read_exact(&mut payload).await?;
    match kind {
        wire::CHUNK_NONE if len == 0 => {}
        wire::CHUNK_HOLE => {
            let mut take = wire::Take(&payload);
            pending.hole(take.u64()?, take.u32()?)?;
        }
        wire::CHUNK_BLOCK_STATUS => pending.status(&payload)?,
        _ if kind & wire::CHUNK_ERROR != 0 => {
            let (number, text) = wire::error_chunk(&payload)?;
            pending.fail(number, &text);
        }
        _ => {
            return Err(ReadError::Broken(format!(
                "a chunk of kind {kind} and {len} bytes"
            )));
        }
    }
    Ok(())
}
