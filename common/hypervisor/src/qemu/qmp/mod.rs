//! Client of QEMU's machine protocol on a Unix socket.
//!
//! Owns the connection: greeting, replies matched by id, time-outs, events, descriptors that travel with a
//! command. It knows no command of QEMU's by meaning. Invariants: a command is written whole or the connection
//! is closed, also when the caller goes away; a reply nobody waits for any more is dropped; an event is
//! counted in [`EventTally`] before the reply to any later command is delivered.

mod connect;
mod error;
mod events;
mod io;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::Instant;

pub use connect::Version;
pub use error::QmpError;
pub use events::{Event, EventTally, Touch};

use io::{Outgoing, Shared};

/// Longest wait for an ordinary answer. QEMU's main loop may be held by a flush of a slow disk, so it is generous.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a QEMU; clones share it, and it is closed with the last of them.
#[derive(Debug, Clone)]
pub struct Qmp {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    shared: Arc<Shared>,
    peer_pid: u32,
    version: Version,
    /// QEMU keeps the descriptors of one message at a time, so only one command that carries some is under way.
    descriptors: tokio::sync::Mutex<()>,
    tasks: [tokio::task::AbortHandle; 2],
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

impl Qmp {
    /// Process that listens at the other end, as the kernel says.
    #[must_use]
    pub fn peer_pid(&self) -> u32 {
        self.inner.peer_pid
    }

    /// Version that QEMU's greeting names.
    #[must_use]
    pub fn version(&self) -> &Version {
        &self.inner.version
    }

    /// Sends `command` and waits for its answer, at most [`COMMAND_TIMEOUT`].
    ///
    /// Commands are carried out in the order in which their futures are first polled. Dropping the future
    /// does not take the command back.
    ///
    /// # Errors
    /// See [`QmpError`]; [`QmpError::NotSent`] alone proves that QEMU never saw the command.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, COMMAND_TIMEOUT)
            .await
    }

    /// [`execute`](Self::execute) with a time limit of its own.
    ///
    /// # Errors
    /// As `execute`.
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, Vec::new(), limit).await
    }

    /// Sends `command` with descriptors (`getfd`, `add-fd`) and waits for its answer.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: OwnedFd,
    ) -> Result<Value, QmpError> {
        let _one_at_a_time = self.inner.descriptors.lock().await;
        self.send(command, arguments, vec![fd], COMMAND_TIMEOUT)
            .await
    }

    /// Runs a command of the human monitor and returns its text.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub async fn human(&self, line: &str) -> Result<String, QmpError> {
        let answer = self
            .execute("human-monitor-command", json!({ "command-line": line }))
            .await?;
        answer
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| QmpError::unexpected(line, &answer))
    }

    /// Events from now on. A receiver that falls more than 256 behind is told that it lost some.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.inner.shared.events.subscribe()
    }

    /// How often each event that matters for ownership was seen so far.
    #[must_use]
    pub fn tally(&self) -> EventTally {
        self.inner.shared.tally()
    }

    /// Becomes `Some(why)` once, when the connection has ended.
    #[must_use]
    pub fn closed(&self) -> watch::Receiver<Option<String>> {
        self.inner.shared.closed.subscribe()
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &self.inner.shared;
        let begun = Instant::now();
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message =
            serde_json::to_vec(&json!({ "execute": command, "arguments": arguments, "id": id }))
                .map_err(|error| QmpError::unexpected(command, &error))?;
        message.push(b'\n');
        let (answer_to, answer) = oneshot::channel();
        let waiting = shared.expect(id, answer_to);
        if shared.closed.borrow().is_some() {
            return Err(shared.not_sent(command));
        }
        shared
            .outgoing
            .send(Outgoing { message, fds })
            .await
            .map_err(|_| shared.not_sent(command))?;
        let outcome = tokio::time::timeout(limit, answer).await;
        drop(waiting);
        tracing::trace!(command, elapsed = ?begun.elapsed(), "asked QEMU");
        match outcome {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(refusal))) => Err(QmpError::refused(command, &refusal)),
            Ok(Err(_)) => Err(QmpError::Closed {
                command: command.to_owned(),
                why: shared.why_closed(),
            }),
            Err(_) => Err(QmpError::TimedOut {
                command: command.to_owned(),
                seconds: limit.as_secs(),
            }),
        }
    }
}

#[cfg(test)]
mod tests;
