//! The NBD server inside a QEMU: one per process, behind a private socket that this agent makes and hands over.
//!
//! Owns the socket's folder (0700) and the exports' commands. QEMU gets the socket as a descriptor, so it needs
//! no right to any path. Invariant: a server that somebody else started is never used or stopped.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use vmferry_common::process::ProcessIdentity;

use super::names;
use super::nbd::{Nbd, NbdError};
use super::qmp::{Qmp, QmpError};
use crate::error::GuestError;

/// Where sockets live, the first that can be written.
const FOLDERS: [&str; 2] = ["/run/vmferry", "/tmp"];
/// Name of the socket in its folder; a later agent knows a leftover by it.
const SOCKET: &str = "vmferry-nbd.sock";

/// The server, started.
#[derive(Debug)]
pub(super) struct NbdServer {
    folder: PathBuf,
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // The server is unreachable from here on; QEMU's own descriptor goes with `stop`.
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            tracing::debug!(%error, folder = %self.folder.display(), "a socket's folder was not removed");
        }
    }
}

impl NbdServer {
    /// Starts the server.
    pub(super) async fn start(qmp: &Qmp) -> Result<Self, GuestError> {
        let server = Self {
            folder: private_folder()?,
        };
        let path = server.socket();
        let listener = UnixListener::bind(&path).map_err(|source| GuestError::Io {
            what: format!("cannot make the socket {}", path.display()),
            source,
        })?;
        let name = json!({ "fdname": names::NBD_SOCKET });
        qmp.execute_with_fd("getfd", name, OwnedFd::from(listener))
            .await?;
        let address = json!({ "type": "fd", "data": { "str": names::NBD_SOCKET } });
        let arguments = json!({ "addr": address, "max-connections": 0 });
        match qmp.execute("nbd-server-start", arguments).await {
            Ok(_) => Ok(server),
            Err(error) => {
                let name = json!({ "fdname": names::NBD_SOCKET });
                if let Err(left) = qmp.execute("closefd", name).await {
                    tracing::debug!(%left, "a handed-over socket was not closed");
                }
                Err(refused(error))
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.folder.join(SOCKET)
    }

    /// Arguments of `block-export-add`.
    pub(super) fn export_arguments(
        id: &str,
        node: &str,
        writable: bool,
        bitmap: Option<&str>,
    ) -> Value {
        let mut arguments = json!({
            "type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable,
        });
        if let Some(bitmap) = bitmap {
            arguments["bitmaps"] = json!([bitmap]);
        }
        arguments
    }

    /// Exports `node` as `id`.
    pub(super) async fn export(
        &self,
        qmp: &Qmp,
        id: &str,
        node: &str,
        writable: bool,
    ) -> Result<(), QmpError> {
        let arguments = Self::export_arguments(id, node, writable, None);
        qmp.execute("block-export-add", arguments).await.map(drop)
    }

    /// Connects to the export `id`.
    pub(super) async fn connect(&self, id: &str, contexts: &[&str]) -> Result<Nbd, NbdError> {
        Nbd::connect(&self.socket(), id, contexts).await
    }

    /// Stops the server, if there is one; its exports are gone when this returns.
    pub(super) async fn stop(server: Option<Self>, qmp: &Qmp) -> Result<(), QmpError> {
        if server.is_some() {
            qmp.execute("nbd-server-stop", json!({})).await?;
        }
        Ok(())
    }
}

fn refused(error: QmpError) -> GuestError {
    match error {
        QmpError::Refused { description, .. } if description.contains("already running") => {
            GuestError::Incompatible(
                "this QEMU's NBD server is in use by another program (a backup or a mirror), and a QEMU has only one: \
                 end that, or `nbd-server-stop` it, and migrate again"
                    .to_owned(),
            )
        }
        other => other.into(),
    }
}

/// A fresh folder that only this user can enter.
fn private_folder() -> Result<PathBuf, GuestError> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut last = None;
    for base in FOLDERS.map(Path::new) {
        // Made by a package or service manager as a rule; otherwise here.
        let _ = DirBuilder::new().mode(0o755).create(base);
        for _ in 0..64 {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let folder = base.join(format!("vmferry-nbd-{}-{number}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&folder) {
                Ok(()) => return Ok(folder),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    last = Some(error);
                    break;
                }
            }
        }
    }
    Err(GuestError::Io {
        what: format!(
            "cannot make a private folder under {}",
            FOLDERS.join(" or ")
        ),
        source: last.unwrap_or_else(|| io::ErrorKind::AlreadyExists.into()),
    })
}

/// Paths of sockets of ours on which `process` listens: an NBD server that an earlier agent left.
pub(super) fn left_sockets(process: &ProcessIdentity) -> Vec<PathBuf> {
    let sockets = fs::read_to_string(format!("/proc/{}/net/unix", process.pid)).unwrap_or_default();
    let open = open_sockets(process.pid);
    sockets
        .lines()
        .filter_map(|line| {
            // Num RefCount Protocol Flags Type St Inode Path
            let mut fields = line.split_ascii_whitespace().skip(6);
            let inode: u64 = fields.next()?.parse().ok()?;
            let path = PathBuf::from(fields.next()?);
            (path.ends_with(SOCKET) && open.contains(&inode)).then_some(path)
        })
        .collect()
}

fn open_sockets(pid: u32) -> Vec<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    entries
        .filter_map(|entry| {
            let target = fs::read_link(entry.ok()?.path()).ok()?;
            let inode = target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?;
            inode.parse().ok()
        })
        .collect()
}

/// Removes the folder of a leftover socket; it is known to be ours by its name.
pub(super) fn remove_left(socket: &Path) {
    let folder = socket.parent().filter(|folder| {
        folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("vmferry-nbd-"))
    });
    if let Some(Err(error)) = folder.map(fs::remove_dir_all) {
        tracing::debug!(%error, socket = %socket.display(), "a leftover socket was not removed");
    }
}
