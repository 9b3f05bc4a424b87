//! What people at other terminals may ask of a running migration: `status`, `set`, `cutover`, `cancel`, `resolve`.
//!
//! Owns the commands and how they come in over the control socket; the migration answers them between two steps of
//! its own. Who asked for the cutover or the cancel is told the end of the migration, not just that the wish arrived.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use vmferry_common::local::{Caller, CommandError, Commands, Events, LocalError, LocalServer};
use vmferry_common::state::run_dir;

use crate::settings::Setting;

/// Commands that wait for the migration to look; more than a few mean that somebody polls too fast.
pub const QUEUE: usize = 32;

/// Told when the migration has ended: the report, as an object.
pub type Waiter = oneshot::Sender<Value>;

/// A wish.
#[derive(Debug)]
pub enum Command {
    /// How far is it?
    Status(oneshot::Sender<Value>),
    /// Change limits; answered with the limits as they are then, or why not.
    Set(Vec<Setting>, oneshot::Sender<Result<Value, CommandError>>),
    /// Cut over now, or as soon as it fits.
    Cutover(Waiter),
    /// Give up; the guest runs on here.
    Cancel(Waiter),
    /// The destination is fenced: settle the doubt here.
    Resolve(Waiter),
    /// The process was signalled.
    Signal {
        /// Name of the signal, for messages.
        name: &'static str,
        /// Whether it is not the first.
        again: bool,
    },
}

/// The control socket of a guest's migration in this state folder.
#[must_use]
pub fn socket_path(state: &Path, guest: &str) -> PathBuf {
    run_dir(state).join(format!("{guest}.source.sock"))
}

/// Forwards SIGINT and SIGTERM as wishes.
///
/// # Errors
/// The kernel refuses a signal handler.
pub fn forward_signals(commands: mpsc::Sender<Command>) -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        let mut again = false;
        loop {
            let name = tokio::select! {
                got = interrupt.recv() => got.map(|()| "Ctrl-C"),
                got = terminate.recv() => got.map(|()| "SIGTERM"),
            };
            let Some(name) = name else { return };
            if commands
                .send(Command::Signal { name, again })
                .await
                .is_err()
            {
                return;
            }
            again = true;
        }
    });
    Ok(())
}

/// The control socket of one migration; closed and removed when dropped.
#[derive(Debug)]
pub struct Server {
    serving: JoinHandle<()>,
    events: Events,
}

impl Server {
    /// Listens at `path` and forwards what comes to `commands`.
    ///
    /// # Errors
    /// The socket cannot be made, or another agent listens there.
    pub fn start(path: &Path, commands: mpsc::Sender<Command>) -> Result<Self, LocalError> {
        let server = LocalServer::bind(path)?;
        let desk: Arc<dyn Commands> = Arc::new(Desk { commands });
        let events = Events::new();
        let heard = events.clone();
        let serving = tokio::spawn(async move { server.serve(desk, heard).await });
        Ok(Self { serving, events })
    }

    /// Where `PHASE` and `END` are told to all who listen at the socket.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct Desk {
    commands: mpsc::Sender<Command>,
}

#[async_trait]
impl Commands for Desk {
    async fn execute(
        &self,
        caller: Caller,
        command: &str,
        arguments: Value,
    ) -> Result<Value, CommandError> {
        if command != "status" {
            tracing::info!(command, uid = caller.uid, "asked for at the control socket");
        }
        if command == "set" {
            return self.set(&arguments).await;
        }
        let (reply, answer) = oneshot::channel();
        let wish = match command {
            "status" => Command::Status(reply),
            "cutover" => Command::Cutover(reply),
            "cancel" => Command::Cancel(reply),
            "resolve" => Command::Resolve(reply),
            other => return Err(CommandError::not_found(other)),
        };
        self.commands.send(wish).await.map_err(|_closed| ended())?;
        answer.await.map_err(|_dropped| ended())
    }
}

impl Desk {
    async fn set(&self, arguments: &Value) -> Result<Value, CommandError> {
        let settings = Setting::from_arguments(arguments)
            .map_err(|error| CommandError::generic(error.to_string()))?;
        let (reply, answer) = oneshot::channel();
        let wish = Command::Set(settings, reply);
        self.commands.send(wish).await.map_err(|_closed| ended())?;
        answer.await.map_err(|_dropped| ended())?
    }
}

fn ended() -> CommandError {
    CommandError::generic("the migration has just ended")
}
