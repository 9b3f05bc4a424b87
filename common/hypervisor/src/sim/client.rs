//! The control socket of the embedded guest: one JSON object per line, `execute` and `return`.
//!
//! Owns one connection, its time limit and what a failure means. Answers are matched by id, so a future that was dropped in
//! the middle does no harm to the next call.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::error::GuestError;
use crate::guest::GuestLife;

/// How long an answer may take: a slice of the guest's work, or its full check.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Longest line taken from the guest: extents of a large, scattered disk.
const MAX_LINE: usize = 64 << 20;

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    id: u64,
    /// What came of a line so far, kept when a future is dropped in the middle of it.
    partial: Vec<u8>,
}

impl Client {
    pub(super) async fn connect(path: &Path) -> Result<Self, GuestError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| GuestError::Io {
                what: format!(
                    "cannot reach the guest on {}: is it running, and is `socket` in the guest file right?",
                    path.display()
                ),
                source,
            })?;
        Ok(Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            id: 0,
            partial: Vec::new(),
        })
    }

    /// Pid of the process behind the socket, as the kernel knows it.
    pub(super) fn peer_pid(&self) -> Result<u32, GuestError> {
        let peer = self.stream.get_ref().peer_cred();
        let pid = peer.map_err(|source| self.broken(source))?.pid();
        pid.and_then(|pid| u32::try_from(pid).ok())
            .ok_or_else(|| GuestError::Gone(format!("nobody owns {}", self.path.display())))
    }

    /// Carries out `command` and reads its result.
    pub(super) async fn ask<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<T, GuestError> {
        self.send(command, arguments).await?;
        let value = self.answer(command).await?;
        serde_json::from_value(value).map_err(|error| GuestError::Refused {
            command: command.to_owned(),
            answer: format!("the answer is not understood: {error}"),
        })
    }

    /// Carries out `command`, whose result is of no interest.
    pub(super) async fn tell(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<(), GuestError> {
        self.ask::<Value>(command, arguments).await.map(drop)
    }

    /// Sends `command`. After an error the guest did not get it: its last byte, the end of the line, was not sent.
    pub(super) async fn send(
        &mut self,
        command: &str,
        arguments: Option<Value>,
    ) -> Result<(), GuestError> {
        self.id += 1;
        let mut request = json!({ "execute": command, "id": self.id });
        if let Some(arguments) = arguments {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        let sent = in_time(command, self.stream.get_mut().write_all(&line)).await?;
        sent.map_err(|source| self.broken(source))
    }

    /// The answer to the command that was sent last.
    pub(super) async fn answer(&mut self, command: &str) -> Result<Value, GuestError> {
        in_time(command, self.read_answer(command)).await?
    }

    async fn read_answer(&mut self, command: &str) -> Result<Value, GuestError> {
        loop {
            let mut answer = self.next_line().await?;
            if answer.get("id").and_then(Value::as_u64) != Some(self.id) {
                continue;
            }
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str);
                return Err(GuestError::Refused {
                    command: command.to_owned(),
                    answer: text.unwrap_or("an error without a text").to_owned(),
                });
            }
            return Ok(answer["return"].take());
        }
    }

    /// The next line, answer or event. Cancel safe.
    async fn next_line(&mut self) -> Result<Value, GuestError> {
        loop {
            let buffered = self.stream.fill_buf().await;
            let buffered = buffered.map_err(|source| GuestError::Io {
                what: format!("the guest on {} does not answer", self.path.display()),
                source,
            })?;
            if buffered.is_empty() {
                return Err(GuestError::Gone(format!(
                    "the guest on {} closed its socket",
                    self.path.display()
                )));
            }
            let end = buffered.iter().position(|byte| *byte == b'\n');
            let used = end.map_or(buffered.len(), |at| at + 1);
            self.partial.extend_from_slice(&buffered[..used]);
            self.stream.consume(used);
            if self.partial.len() > MAX_LINE {
                return Err(self.broken(std::io::Error::other("a line without end")));
            }
            if end.is_some() {
                let line = std::mem::take(&mut self.partial);
                return serde_json::from_slice(&line)
                    .map_err(|error| self.broken(std::io::Error::other(error)));
            }
        }
    }

    fn broken(&self, source: std::io::Error) -> GuestError {
        GuestError::Io {
            what: format!("the guest on {} does not answer", self.path.display()),
            source,
        }
    }
}

/// What `doing` gives, unless the guest takes too long over `command`.
async fn in_time<T>(command: &str, doing: impl Future<Output = T>) -> Result<T, GuestError> {
    let done = tokio::time::timeout(ANSWER_LIMIT, doing).await;
    done.map_err(|_| GuestError::TimedOut {
        command: command.to_owned(),
        seconds: ANSWER_LIMIT.as_secs(),
    })
}

/// Watches a guest for its end, on a connection of its own.
#[derive(Debug)]
pub(super) struct LifeWatch {
    pub(super) receiver: watch::Receiver<GuestLife>,
    task: JoinHandle<()>,
}

impl LifeWatch {
    pub(super) async fn start(path: &Path) -> Result<Self, GuestError> {
        let mut client = Client::connect(path).await?;
        client.tell("subscribe", None).await?;
        let (sender, receiver) = watch::channel(GuestLife::Alive);
        let task = tokio::spawn(async move {
            let end = loop {
                match client.next_line().await {
                    Ok(line) if line["event"] == "SHUTDOWN" => {
                        let by = line["data"]["by"].as_str().unwrap_or("somebody");
                        break GuestLife::ShutDown(format!("by the {by}"));
                    }
                    Ok(_) => {}
                    Err(error) => break GuestLife::Gone(error.to_string()),
                }
            };
            // Nobody may be watching any more.
            let _ = sender.send(end);
        });
        Ok(Self { receiver, task })
    }

    pub(super) fn receiver(&self) -> watch::Receiver<GuestLife> {
        self.receiver.clone()
    }
}

impl Drop for LifeWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
