//! The descriptors on which a device state leaves one QEMU and enters another.
//!
//! Owns our ends and the set or name of QEMU's. QEMU writes a state only to a descriptor that is write-only and can be
//! truncated, so that one is of an anonymous file in memory, opened anew.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use vmferry_proto::limits::MAX_DEVICE_STATE;

use super::names;
use super::qmp::{Qmp, QmpError};
use crate::error::GuestError;

/// A file that QEMU writes its device state to.
#[derive(Debug)]
pub(super) struct StateFile {
    file: File,
    set: u64,
}

fn failed(source: io::Error) -> GuestError {
    GuestError::Io {
        what: "cannot make a file in memory for the device state".to_owned(),
        source,
    }
}

fn memory_file() -> io::Result<File> {
    Ok(File::from(memfd_create(
        "vmferry-state",
        MemfdFlags::CLOEXEC,
    )?))
}

/// The file opened once more, with a position of its own.
fn reopened(file: &File, options: &OpenOptions) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    options.open(path).map(OwnedFd::from)
}

impl StateFile {
    /// Makes a file and gives QEMU a descriptor of it.
    pub(super) async fn for_saving(qmp: &Qmp) -> Result<Self, GuestError> {
        let file = memory_file().map_err(failed)?;
        let theirs = reopened(&file, OpenOptions::new().write(true)).map_err(failed)?;
        let opaque = json!({ "opaque": names::STATE_SET });
        let answer = qmp.execute_with_fd("add-fd", opaque, theirs).await?;
        let set = answer["fdset-id"]
            .as_u64()
            .ok_or_else(|| QmpError::unexpected("add-fd", &answer))?;
        Ok(Self { file, set })
    }

    /// The name under which QEMU opens it.
    pub(super) fn path(&self) -> String {
        format!("/dev/fdset/{}", self.set)
    }

    /// What QEMU wrote.
    pub(super) fn read(&self) -> Result<Vec<u8>, GuestError> {
        let read = || {
            let mut file = &self.file;
            let len = file.seek(SeekFrom::End(0))?;
            if len > MAX_DEVICE_STATE {
                return Err(io::Error::other(format!(
                    "it is {len} bytes long; at most {MAX_DEVICE_STATE} are allowed"
                )));
            }
            file.rewind()?;
            let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0) + 1);
            file.take(MAX_DEVICE_STATE).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|source| GuestError::Io {
            what: "cannot read the saved device state".to_owned(),
            source,
        })
    }

    /// Takes the descriptor back from QEMU.
    pub(super) async fn remove(self, qmp: &Qmp) {
        let arguments = json!({ "fdset-id": self.set });
        if let Err(error) = qmp.execute("remove-fd", arguments).await {
            tracing::debug!(%error, "a descriptor set was not removed");
        }
    }

    /// [`remove`](Self::remove) without waiting for it: the guest is paused meanwhile.
    pub(super) fn remove_later(self, qmp: &Qmp) {
        let qmp = qmp.clone();
        tokio::spawn(async move { self.remove(&qmp).await });
    }
}

/// The way on which QEMU will read an incoming device state: a socket pair, since newer versions of QEMU warn of a plain
/// file. QEMU has its end ahead of the content.
#[derive(Debug)]
pub(super) struct IncomingPipe {
    ours: UnixStream,
}

impl IncomingPipe {
    /// Makes the pair and gives QEMU one end, under [`names::INCOMING`].
    pub(super) async fn hand_over(qmp: &Qmp) -> Result<Self, GuestError> {
        let pair = || {
            let (ours, theirs) = UnixStream::pair()?;
            Ok((ours, OwnedFd::from(theirs.into_std()?)))
        };
        let (ours, theirs) = pair().map_err(|source| GuestError::Io {
            what: "cannot make a socket pair for the device state".to_owned(),
            source,
        })?;
        let name = json!({ "fdname": names::INCOMING });
        qmp.execute_with_fd("getfd", name, theirs).await?;
        Ok(Self { ours })
    }

    /// Sends the whole stream. QEMU reads it while it loads, so this ends only with the load.
    pub(super) async fn send(&mut self, stream: &[u8]) -> Result<(), GuestError> {
        let send = async {
            self.ours.write_all(stream).await?;
            self.ours.shutdown().await
        };
        send.await.map_err(|source| GuestError::Io {
            what: "QEMU did not take the device state to its end".to_owned(),
            source,
        })
    }
}
