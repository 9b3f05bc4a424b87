//! The local control socket: newline-delimited JSON in the shape of QMP, so that `socat` and scripts can drive an agent.
//!
//! `{"execute": "status", "arguments": {…}, "id": 1}` is answered with `{"return": …, "id": 1}` or
//! `{"error": {"class": …, "desc": …}, "id": 1}`; what happens meanwhile comes as
//! `{"event": "PHASE", "data": {…}, "timestamp": {"seconds": …, "microseconds": …}}`.
//! Owns the socket file, who may speak, and the bounds; what a command does belongs to the agent. Only root, the
//! agent's own user and members of the socket's group get in. A socket file is replaced only if nobody listens.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, broadcast};
use tokio::task::JoinSet;

/// Longest line; no command needs a hundredth of it.
pub const MAX_LINE: usize = 64 << 10;
/// Longest answer that a client reads: the status of a long migration with all its rounds.
pub const MAX_ANSWER: usize = 16 << 20;
/// Clients at once; more wait in the kernel's queue.
const MAX_CLIENTS: usize = 32;
/// Events that a slow client may lag behind before it loses some.
const EVENT_QUEUE: usize = 256;
/// A client that does not read is dropped after this.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked whether a client that sends no more still reads.
const GONE_CHECK: Duration = Duration::from_millis(200);

/// A command from a client.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Its name.
    pub execute: String,
    /// Its arguments; an object.
    #[serde(default = "no_arguments")]
    pub arguments: Value,
    /// Given back with the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
}

fn no_arguments() -> Value {
    json!({})
}

/// Why a command was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc} ({class})")]
pub struct CommandError {
    /// A word for programs: `CommandNotFound`, `GenericError` or the agent's own.
    pub class: String,
    /// A sentence for people.
    pub desc: String,
}

impl CommandError {
    /// An error of a class of the agent's own.
    pub fn new(class: impl Into<String>, desc: impl Into<String>) -> Self {
        Self {
            class: class.into(),
            desc: desc.into(),
        }
    }

    /// The command does not exist.
    #[must_use]
    pub fn not_found(command: &str) -> Self {
        let shown: String = command.chars().take(80).collect();
        Self::new("CommandNotFound", format!("there is no command {shown:?}"))
    }

    /// The request makes no sense.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new("GenericError", desc)
    }
}

/// Who speaks, as the kernel says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Process, where known.
    pub pid: Option<i32>,
}

/// Carries out commands.
#[async_trait]
pub trait Commands: Send + Sync + 'static {
    /// Carries out `command`. It may take long: other clients are served meanwhile. Dropped if the client goes away.
    async fn execute(
        &self,
        caller: Caller,
        command: &str,
        arguments: Value,
    ) -> Result<Value, CommandError>;
}

/// The socket cannot be set up or used.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// Another agent listens there.
    #[error("{path} is in use: another agent is running with this socket", path = path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{path} is there and is no socket: move it away", path = path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Nobody listens there.
    #[error("no agent listens on {path}: is it running, and is the name right?", path = path.display())]
    NobodyListens {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made or used.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The agent did not answer in time.
    #[error("the agent at {path} did not answer within {}", crate::units::Span(*limit), path = path.display())]
    TimedOut {
        /// The socket.
        path: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// The agent answered something that cannot be understood.
    #[error("the agent at {path} gave an answer that is not understood: {problem}", path = path.display())]
    BadAnswer {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The agent refused.
    #[error(transparent)]
    Refused(#[from] CommandError),
}

/// Sends events to all clients.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<Arc<str>>,
}

impl Events {
    /// Nobody listens yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            sender: broadcast::Sender::new(EVENT_QUEUE),
        }
    }

    /// Tells all clients; those that lag too far behind lose it.
    #[allow(
        clippy::needless_pass_by_value,
        reason = "callers build the value in place"
    )]
    pub fn send(&self, event: &str, data: Value) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let line = json!({
            "event": event,
            "data": data,
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
        });
        // Nobody listening is no error.
        drop(self.sender.send(line.to_string().into()));
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

/// The listening socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct LocalServer {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file that was made here.
    made: Option<(u64, u64)>,
}

impl LocalServer {
    /// Listens on `path` with mode 0660; folders above it are made. Must be called within a tokio runtime.
    pub fn bind(path: &Path) -> Result<Self, LocalError> {
        let failed = |action| {
            move |source| LocalError::Io {
                action,
                path: path.to_owned(),
                source,
            }
        };
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed("make the folder of"))?;
        }
        clear_stale(path)?;
        // Made under another name and renamed, so that it is never open to others, not even for a moment.
        let draft = draft_of(path);
        drop(fs::remove_file(&draft));
        let listener = UnixListener::bind(&draft).map_err(failed("listen on"))?;
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o660))
            .and_then(|()| fs::rename(&draft, path))
            .map_err(failed("set up"))?;
        let made = fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        Ok(Self {
            listener,
            path: path.to_owned(),
            made,
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves clients until it is dropped; it never returns. Cancel safe: clients are cut off, commands dropped.
    pub async fn serve(&self, commands: Arc<dyn Commands>, events: Events) {
        let places = Arc::new(Semaphore::new(MAX_CLIENTS));
        let mut clients = JoinSet::new();
        loop {
            // Finished tasks are let go, else the set would only grow.
            while clients.try_join_next().is_some() {}
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: others will go.
                    tracing::warn!(socket = %self.path.display(), %error, "cannot accept a client");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let commands = Arc::clone(&commands);
            let events = events.sender.subscribe();
            let group = fs::metadata(&self.path).ok().map(|meta| meta.gid());
            clients.spawn(async move {
                let _place = place;
                match admit(&stream, group) {
                    Ok(caller) => {
                        let (read, write) = stream.into_split();
                        let client = Client {
                            lines: Lines::new(read, MAX_LINE),
                            write,
                            caller,
                            events,
                        };
                        client.serve(commands).await;
                    }
                    Err(error) => tracing::warn!(%error, "a client was turned away"),
                }
            });
        }
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        // Only the file that was made here: a later agent may have put its own there.
        let now = fs::symlink_metadata(&self.path)
            .ok()
            .map(|meta| (meta.dev(), meta.ino()));
        if now.is_some() && now == self.made {
            drop(fs::remove_file(&self.path));
        }
    }
}

fn draft_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

/// Removes a socket file on which nobody listens.
fn clear_stale(path: &Path) -> Result<(), LocalError> {
    let io = |source| LocalError::Io {
        action: "look at",
        path: path.to_owned(),
        source,
    };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    if !meta.file_type().is_socket() {
        return Err(LocalError::NotASocket {
            path: path.to_owned(),
        });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!(socket = %path.display(), "replacing a stale socket");
            fs::remove_file(path).map_err(io)
        }
        // Connected, or a full queue: somebody is there.
        Ok(_) => Err(LocalError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(LocalError::InUse {
            path: path.to_owned(),
        }),
        Err(error) => Err(io(error)),
    }
}

/// Lets in root, the agent's own user and the group of the socket. The file's mode says the same; this holds
/// also where somebody changed it.
fn admit(stream: &UnixStream, group: Option<u32>) -> io::Result<Caller> {
    let credentials = stream.peer_cred()?;
    let caller = Caller {
        uid: credentials.uid(),
        pid: credentials.pid(),
    };
    let own = rustix::process::geteuid().as_raw();
    let member = || group.is_some_and(|gid| gid == credentials.gid() || in_group(caller.pid, gid));
    if caller.uid == 0 || caller.uid == own || member() {
        return Ok(caller);
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("user {} may not use this socket", caller.uid),
    ))
}

/// Whether the process has `gid` among its supplementary groups.
fn in_group(pid: Option<i32>, gid: u32) -> bool {
    let status = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/status")).ok());
    let groups = status
        .as_deref()
        .and_then(|text| text.lines().find_map(|line| line.strip_prefix("Groups:")));
    groups.is_some_and(|list| {
        list.split_ascii_whitespace()
            .any(|one| one.parse() == Ok(gid))
    })
}

/// One client of the socket.
struct Client {
    lines: Lines<OwnedReadHalf>,
    write: OwnedWriteHalf,
    caller: Caller,
    events: broadcast::Receiver<Arc<str>>,
}

impl Client {
    /// Serves it until it leaves.
    async fn serve(mut self, commands: Arc<dyn Commands>) {
        while let Some(line) = self.next_line().await {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let reply = match parse(&line) {
                Ok(request) => {
                    let id = request.id.clone();
                    match self.execute(&*commands, request).await {
                        Some(result) => answer(result, id),
                        None => return,
                    }
                }
                Err(error) => answer(Err(error), None),
            };
            if send_line(&mut self.write, &reply).await.is_err() {
                return;
            }
        }
    }

    /// The next line, events passed on meanwhile; `None` when the client is gone or is let go.
    async fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let line = tokio::select! {
                line = self.lines.next() => line,
                event = self.events.recv() => {
                    if pass_on(&mut self.write, event).await {
                        continue;
                    }
                    return None;
                }
            };
            match line {
                Ok(line) => return line,
                Err(LineError::TooLong) => {
                    // Where the next line begins cannot be told cheaply: the client is let go.
                    let error =
                        CommandError::generic(format!("a line is longer than {MAX_LINE} bytes"));
                    drop(send_line(&mut self.write, &answer(Err(error), None)).await);
                    return None;
                }
                Err(LineError::Io(error)) => {
                    tracing::debug!(%error, "a client went away");
                    return None;
                }
            }
        }
    }

    /// Carries out a command; `None` when the client left meanwhile. Events go on while it runs.
    async fn execute(
        &mut self,
        commands: &dyn Commands,
        request: Request,
    ) -> Option<Result<Value, CommandError>> {
        let mut work = commands.execute(self.caller, &request.execute, request.arguments);
        loop {
            tokio::select! {
                result = &mut work => return Some(result),
                event = self.events.recv() => {
                    if !pass_on(&mut self.write, event).await {
                        return None;
                    }
                }
                () = gone(&mut self.lines, &self.write) => {
                    tracing::debug!("a client left during its command");
                    return None;
                }
            }
        }
    }
}

/// Whether the client is still there.
async fn pass_on(
    write: &mut (impl AsyncWriteExt + Unpin),
    event: Result<Arc<str>, broadcast::error::RecvError>,
) -> bool {
    match event {
        Ok(line) => send_line(write, &line).await.is_ok(),
        Err(broadcast::error::RecvError::Lagged(missed)) => {
            let line = json!({"event": "EVENTS_LOST", "data": {"count": missed}});
            send_line(write, &line.to_string()).await.is_ok()
        }
        // The agent holds a sender as long as it serves; without one there is nothing to pass on, ever.
        Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
    }
}

fn parse(line: &[u8]) -> Result<Request, CommandError> {
    let request: Request = serde_json::from_slice(line)
        .map_err(|error| CommandError::generic(format!("not a command: {error}")))?;
    if request.arguments.is_object() {
        Ok(request)
    } else {
        Err(CommandError::generic("arguments must be an object"))
    }
}

fn answer(result: Result<Value, CommandError>, id: Option<Value>) -> String {
    let mut reply = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error}),
    };
    if let (Some(id), Some(object)) = (id, reply.as_object_mut()) {
        object.insert("id".to_owned(), id);
    }
    reply.to_string()
}

async fn send_line(write: &mut (impl AsyncWriteExt + Unpin), line: &str) -> io::Result<()> {
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
struct Lines<R> {
    stream: R,
    buffer: Vec<u8>,
    /// Bytes of `buffer` that hold no line end.
    searched: usize,
    max: usize,
}

#[derive(Debug)]
enum LineError {
    TooLong,
    Io(io::Error),
}

impl<R: AsyncRead + Unpin> Lines<R> {
    const fn new(stream: R, max: usize) -> Self {
        Self {
            stream,
            buffer: Vec::new(),
            searched: 0,
            max,
        }
    }

    /// The next line without its end; `None` at the end of the stream, where a last line without an end is dropped.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, LineError> {
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
    async fn read_ahead(&mut self) {
        while self.buffer.len() <= self.max {
            if !matches!(self.stream.read_buf(&mut self.buffer).await, Ok(1..)) {
                return;
            }
        }
    }
}

/// Returns when the client can no longer read an answer. That it will send no more is not enough: `socat` closes
/// its sending direction as soon as its input ends, and waits for the answer. Cancel safe.
async fn gone(lines: &mut Lines<OwnedReadHalf>, write: &OwnedWriteHalf) {
    lines.read_ahead().await;
    loop {
        match write.ready(Interest::WRITABLE).await {
            Ok(ready) if !ready.is_write_closed() => tokio::time::sleep(GONE_CHECK).await,
            _ => return,
        }
    }
}

/// Asks the agent at `path` to carry out a command and waits at most `limit` for the answer. Events are passed over.
pub async fn call(
    path: &Path,
    command: &str,
    arguments: Value,
    limit: Duration,
) -> Result<Value, LocalError> {
    match tokio::time::timeout(limit, call_unbounded(path, command, arguments)).await {
        Ok(result) => result,
        Err(_) => Err(LocalError::TimedOut {
            path: path.to_owned(),
            limit,
        }),
    }
}

async fn call_unbounded(path: &Path, command: &str, arguments: Value) -> Result<Value, LocalError> {
    let failed = |action| {
        move |source| LocalError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    };
    let stream = UnixStream::connect(path)
        .await
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                LocalError::NobodyListens {
                    path: path.to_owned(),
                }
            }
            _ => failed("connect to")(source),
        })?;
    let (read, mut write) = stream.into_split();
    let request = json!({"execute": command, "arguments": arguments, "id": 1});
    send_line(&mut write, &request.to_string())
        .await
        .map_err(failed("send to"))?;
    let mut lines = Lines::new(read, MAX_ANSWER);
    loop {
        let bad = |problem: &str| LocalError::BadAnswer {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => return Err(bad("it closed the socket without one")),
            Err(LineError::TooLong) => return Err(bad("it is too long")),
            Err(LineError::Io(source)) => return Err(failed("read from")(source)),
        };
        let mut reply: Value =
            serde_json::from_slice(&line).map_err(|error| bad(&error.to_string()))?;
        if let Some(value) = reply.get_mut("return") {
            return Ok(value.take());
        }
        if let Some(error) = reply.get_mut("error") {
            let error: CommandError =
                serde_json::from_value(error.take()).map_err(|error| bad(&error.to_string()))?;
            return Err(error.into());
        }
        if reply.get("event").is_none() {
            return Err(bad("it is neither a return, an error nor an event"));
        }
    }
}

#[cfg(test)]
#[path = "local_tests.rs"]
mod tests;
