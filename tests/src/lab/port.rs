//! The host's end of a virtio-serial port: a Unix socket to which every QEMU of a guest connects by itself.
//!
//! Owns accepting and knowing who came. QEMU is the client, not the server: it connects while it starts, before any
//! vCPU runs, so nothing that a guest writes is ever dropped for want of a listener, at the source and at the
//! destination alike. Each connection is one QEMU process.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use rustix::net::{Shutdown, shutdown, sockopt::socket_peercred};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A QEMU process that connected.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) pid: u32,
    handle: OwnedFd,
}

impl Peer {
    fn of(stream: &UnixStream) -> io::Result<Self> {
        let pid = socket_peercred(stream)?.pid;
        Self::of_pid(pid)
    }

    pub(crate) fn of_pid(pid: Pid) -> io::Result<Self> {
        Ok(Self {
            pid: pid.as_raw_nonzero().get().unsigned_abs(),
            handle: pidfd_open(pid, PidfdFlags::empty())?,
        })
    }

    /// Kills exactly this process, if it is still there.
    pub(crate) fn kill(&self) {
        // The only failure is that it is gone.
        let _ = pidfd_send_signal(&self.handle, Signal::KILL);
    }

    /// Whether it ended within `limit`.
    pub(crate) fn ended_within(&self, limit: std::time::Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec::try_from(limit).ok();
        let mut handle = [PollFd::new(&self.handle, PollFlags::IN)];
        matches!(poll(&mut handle, limit.as_ref()), Ok(1..))
    }
}

/// A listening socket and the thread that accepts on it.
#[derive(Debug)]
pub(crate) struct Port {
    listener: Arc<UnixListener>,
}

impl Port {
    /// Listens at `path` and gives every connection a thread of its own with `serve`.
    pub(crate) fn listen(
        path: &Path,
        serve: impl Fn(UnixStream, Peer) + Clone + Send + 'static,
    ) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| path.display().to_string())?;
        let listener = Arc::new(listener);
        let accepting = Arc::clone(&listener);
        thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // A process that is gone again already has nothing to say.
                if let Ok(peer) = Peer::of(&stream) {
                    let serve = serve.clone();
                    thread::spawn(move || serve(stream, peer));
                }
            }
        });
        Ok(Self { listener })
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // Wakes the accepting thread, which then ends.
        let _ = shutdown(&*self.listener, Shutdown::Both);
    }
}
