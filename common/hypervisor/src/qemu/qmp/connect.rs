//! Connecting to a QMP socket: greeting, version, capabilities, and a busy socket told apart from a dead one.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use super::error::QmpError;
use super::io::{Lines, QUEUE, Shared, read_all, write_all};
use super::{Inner, Qmp};

/// How long a free QEMU may take for its greeting: it sends it at once; a second client waits for ever.
const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Version of a QEMU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u64,
    /// Second number.
    pub minor: u64,
    /// Third number.
    pub micro: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

impl Version {
    /// From a greeting.
    fn parse(greeting: &Value) -> Option<Self> {
        let qemu = &greeting["QMP"]["version"]["qemu"];
        Some(Self {
            major: qemu["major"].as_u64()?,
            minor: qemu["minor"].as_u64()?,
            micro: qemu["micro"].as_u64()?,
        })
    }
}

impl Qmp {
    /// Connects to the QMP socket at `path`.
    ///
    /// # Errors
    /// [`QmpError::Busy`] where QEMU accepts but does not greet within five seconds: another program is connected.
    pub async fn connect(path: &Path) -> Result<Self, QmpError> {
        Self::connect_within(path, GREETING_TIMEOUT).await
    }

    /// [`connect`](Self::connect) with a time limit of its own for the greeting.
    ///
    /// # Errors
    /// As `connect`.
    pub async fn connect_within(path: &Path, limit: Duration) -> Result<Self, QmpError> {
        let busy = || QmpError::Busy {
            path: path.to_owned(),
            seconds: limit.as_secs(),
        };
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            // The queue of those that wait to be served is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(busy()),
            Err(source) => {
                return Err(QmpError::Connect {
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let peer_pid = peer_pid(&stream).map_err(|error| QmpError::not_qmp(path, error))?;
        let mut lines = Lines::default();
        let greeting = match tokio::time::timeout(limit, lines.next(&stream)).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => {
                return Err(QmpError::not_qmp(path, "it closed the connection at once"));
            }
            Ok(Err(error)) => return Err(QmpError::not_qmp(path, error)),
            Err(_) => return Err(busy()),
        };
        let version = serde_json::from_slice(&greeting)
            .ok()
            .and_then(|greeting| Version::parse(&greeting))
            .ok_or_else(|| QmpError::not_qmp(path, String::from_utf8_lossy(&greeting)))?;
        let qmp = Self::spawn(stream, lines, peer_pid, version);
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    fn spawn(stream: UnixStream, lines: Lines, peer_pid: u32, version: Version) -> Self {
        let stream = Arc::new(stream);
        let (outgoing, queue) = mpsc::channel(QUEUE);
        let shared = Arc::new(Shared::new(outgoing));
        let reader = tokio::spawn(read_all(Arc::clone(&stream), lines, Arc::clone(&shared)));
        let writer = tokio::spawn(write_all(stream, queue, Arc::clone(&shared)));
        Self {
            inner: Arc::new(Inner {
                shared,
                peer_pid,
                version,
                descriptors: tokio::sync::Mutex::new(()),
                tasks: [reader.abort_handle(), writer.abort_handle()],
            }),
        }
    }
}

fn peer_pid(stream: &UnixStream) -> io::Result<u32> {
    let pid = stream.peer_cred()?.pid();
    pid.and_then(|pid| u32::try_from(pid).ok())
        .ok_or_else(|| io::Error::other("the kernel does not name the process behind it"))
}
