//! Numbered beats to the outside, by which a test measures how long the guest stood still.
//!
//! Owns where they go: a file (lines appended) or a Unix datagram socket (one line each). A line is `NUMBER NANOSECONDS PID`,
//! the time being the host's monotonic clock, so lines of a source and a destination on one host form one series.
//! The number is part of the CPU state: after a migration it goes on where it stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmferry_memtrack::process::monotonic_nanos;

/// A listener that does not read for this long loses a beat, which is counted: the guest is not held longer.
const PATIENCE: Duration = Duration::from_millis(100);

/// Where beats go.
#[derive(Debug)]
pub struct Heartbeat {
    sink: Sink,
    lost: u64,
}

#[derive(Debug)]
enum Sink {
    None,
    File(File),
    Datagram(UnixDatagram, PathBuf),
}

impl Heartbeat {
    /// Beats to `path`: to a socket if one is there, else to a file, which is made if missing and appended to.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let sink = match path {
            None => Sink::None,
            Some(path) if is_socket(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.set_write_timeout(Some(PATIENCE))?;
                Sink::Datagram(socket, path.to_owned())
            }
            Some(path) => Sink::File(OpenOptions::new().create(true).append(true).open(path)?),
        };
        Ok(Self { sink, lost: 0 })
    }

    /// Sends beat `number`.
    pub fn beat(&mut self, number: u64) {
        let line = format!("{number} {} {}\n", monotonic_nanos(), std::process::id());
        let sent = match &mut self.sink {
            Sink::None => Ok(()),
            // One write each: lines of two processes do not mix in an appended file.
            Sink::File(file) => file.write_all(line.as_bytes()),
            Sink::Datagram(socket, path) => socket.send_to(line.as_bytes(), path).map(drop),
        };
        self.lost += u64::from(sent.is_err());
    }

    /// Beats that nobody took.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }
}

fn is_socket(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|found| found.file_type().is_socket())
}
