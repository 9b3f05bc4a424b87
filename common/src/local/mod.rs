//! The local control socket: newline-delimited JSON in the shape of QMP, so that `socat` and scripts can drive an agent.
//!
//! `{"execute": "status", "arguments": {…}, "id": 1}` is answered with `{"return": …, "id": 1}` or
//! `{"error": {"class": …, "desc": …}, "id": 1}`; what happens meanwhile comes as
//! `{"event": "PHASE", "data": {…}, "timestamp": {"seconds": …, "microseconds": …}}`.
//! Owns the socket file, who may speak, and the bounds; what a command does belongs to the agent. Only root, the
//! agent's own user and members of the socket's group get in. A socket file is replaced only if nobody listens.

mod lines;
mod server;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::broadcast;

use lines::{LineError, Lines, send_line};
pub use server::LocalServer;

/// Longest line; no command needs a hundredth of it.
pub const MAX_LINE: usize = 64 << 10;
/// Longest answer that a client reads: the status of a long migration with all its rounds.
pub const MAX_ANSWER: usize = 16 << 20;
/// Events that a slow client may lag behind before it loses some.
const EVENT_QUEUE: usize = 256;

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
mod tests;
