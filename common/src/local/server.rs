//! The listening side: the socket file, who is let in, and each client's conversation.
//!
//! Owns the file's life and one task per client; what a command does is behind [`Commands`]. A client that breaks
//! the bounds is let go and harms no other.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, broadcast};
use tokio::task::JoinSet;

use super::lines::{LineError, Lines, send_line};
use super::{Caller, CommandError, Commands, Events, LocalError, MAX_LINE, Request};

/// Clients at once; more wait in the kernel's queue.
pub(super) const MAX_CLIENTS: usize = 32;
/// How often it is looked whether a client that sends no more still reads.
const GONE_CHECK: Duration = Duration::from_millis(200);

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
pub(super) fn in_group(pid: Option<i32>, gid: u32) -> bool {
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
