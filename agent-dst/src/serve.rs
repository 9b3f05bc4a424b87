//! The command `serve`: from checked arguments to a waiting agent, and to its end by a signal.
//!
//! Owns the order of setting up (state folder, guest files, identity, socket, endpoint: what can be wrong is found before
//! anything listens) and the control socket with its one command, `status`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use vmferry_common::endpoint::{self, EndpointError, TransportTuning};
use vmferry_common::hooks::Hooks;
use vmferry_common::identity::{Identity, IdentityError};
use vmferry_common::local::{Caller, CommandError, Commands, Events, LocalError, LocalServer};
use vmferry_common::state::{StateDir, StateError, run_dir};
use vmferry_hypervisor::open::Drivers;
use vmferry_proto::ids::GuestName;

use crate::cli::ServeArgs;
use crate::config::{ConfigError, GuestFiles};
use crate::host::Host;
use crate::server::Server;
use crate::status::MigrationStatus;

/// Control socket within the run folder.
const SOCKET: &str = "dst.sock";
/// How long one hook script may take: long enough for a storage or network change, short enough for a paused guest's
/// administrator to notice.
const HOOK_TIME: Duration = Duration::from_secs(30);
/// How long an agent may take to answer `status`.
const STATUS_TIME: Duration = Duration::from_secs(5);

/// The agent cannot wait for guests.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A guest file is wrong.
    #[error("the guest files cannot be used")]
    Guests(#[from] ConfigError),
    /// The identity is wrong.
    #[error("this host's identity cannot be used")]
    Identity(#[from] IdentityError),
    /// The state folder cannot be used.
    #[error("the state folder cannot be used")]
    State(#[from] StateError),
    /// The control socket cannot be made.
    #[error("no control socket")]
    Local(#[from] LocalError),
    /// The address cannot be listened on.
    #[error("cannot wait for guests")]
    Endpoint(#[from] EndpointError),
    /// The system refuses something basic.
    #[error("cannot {what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl ServeError {
    /// 2 for wrong use, 1 for what the host refuses.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Guests(_) | Self::Identity(_) => 2,
            Self::State(_) | Self::Local(_) | Self::Endpoint(_) | Self::System { .. } => 1,
        }
    }
}

/// An agent that is set up and listens.
#[derive(Debug)]
pub struct Agent {
    server: Arc<Server>,
    socket: LocalServer,
    address: SocketAddr,
}

impl Agent {
    /// Sets the agent up. Needs a tokio runtime.
    ///
    /// # Errors
    /// What is wrong, before anything was accepted.
    pub fn set_up(args: &ServeArgs) -> Result<Self, ServeError> {
        let guests = GuestFiles::new(&args.guests);
        let known = guests.load()?;
        let identity = Identity::load(&args.identity)?;
        let state = StateDir::open(&args.state)?;
        let run_dir = run_dir(&args.state);
        let socket = LocalServer::bind(&run_dir.join(SOCKET))?;
        let hooks = Hooks::new(Some(args.hooks.clone()), HOOK_TIME);
        let host = Host::new(
            state,
            guests,
            hooks,
            args.keep,
            run_dir.into(),
            Arc::new(Drivers),
        )?;
        let register = host.register;
        let tuning = TransportTuning::default();
        let endpoint = endpoint::bind_server(args.listen, &identity, &tuning)?;
        let server = Server::new(host, endpoint, tuning);
        let address = server.address().map_err(|source| ServeError::System {
            what: "find out the address that is listened on",
            source,
        })?;
        tracing::info!(host = %identity.name(), %address, guests = known.len(), %register, "waiting for guests");
        Ok(Self {
            server: Arc::new(server),
            socket,
            address,
        })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends [`run`](Self::run) in good order.
    #[must_use]
    pub fn stopper(&self) -> CancellationToken {
        self.server.stopper()
    }

    /// Serves until stopped.
    pub async fn run(self) {
        let commands: Arc<dyn Commands> = Arc::new(LocalCommands(self.server.clone()));
        tokio::select! {
            () = self.server.run() => {}
            () = self.socket.serve(commands, Events::new()) => {}
        }
    }
}

/// Sets the agent up, names its address on stdout and serves until SIGINT or SIGTERM.
///
/// # Errors
/// What is wrong with the arguments or the host.
pub async fn serve(args: &ServeArgs) -> Result<(), ServeError> {
    let system = |what| move |source| ServeError::System { what, source };
    let mut interrupt = signal(SignalKind::interrupt()).map_err(system("wait for SIGINT"))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(system("wait for SIGTERM"))?;
    let agent = Agent::set_up(args)?;
    // Scripts that asked for port 0 read this line. A closed stdout is no reason to stop.
    let _ = writeln!(std::io::stdout(), "listening on {}", agent.address());
    let stop = agent.stopper();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
    });
    agent.run().await;
    Ok(())
}

#[derive(Debug)]
struct LocalCommands(Arc<Server>);

#[async_trait]
impl Commands for LocalCommands {
    async fn execute(
        &self,
        _caller: Caller,
        command: &str,
        arguments: Value,
    ) -> Result<Value, CommandError> {
        match command {
            "status" => self.status(&arguments).await,
            other => Err(CommandError::not_found(other)),
        }
    }
}

impl LocalCommands {
    async fn status(&self, arguments: &Value) -> Result<Value, CommandError> {
        let name = arguments.get("name").and_then(Value::as_str);
        let mut statuses = self.0.statuses().await;
        statuses.retain(|status| name.is_none_or(|name| status.guest.as_str() == name));
        match name {
            Some(name) if statuses.is_empty() => Err(CommandError::new(
                "GuestNotFound",
                format!("no migration of guest {name} is under way here"),
            )),
            Some(_) | None => Ok(json!({ "migrations": statuses })),
        }
    }
}

/// Asks the agent of the state folder `state` how its migrations stand: one guest's, or all.
///
/// # Errors
/// No agent answers, or it does not know the guest.
pub async fn ask_status(
    state: &Path,
    name: Option<&GuestName>,
) -> Result<Vec<MigrationStatus>, LocalError> {
    let path = run_dir(state).join(SOCKET);
    let arguments = name.map_or_else(|| json!({}), |name| json!({ "name": name }));
    let mut answer = vmferry_common::local::call(&path, "status", arguments, STATUS_TIME).await?;
    serde_json::from_value(answer["migrations"].take()).map_err(|error| LocalError::BadAnswer {
        path,
        problem: error.to_string(),
    })
}
