//! The control socket: a thread per connection, which passes commands to the machine's thread and lines back.
//!
//! Owns the socket file and the framing. A line longer than the cap, or one that is no command, is answered with an error; it
//! never reaches the machine.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::machine::Order;
use crate::protocol::{Failure, Line, Request};

/// Longest line from a client: a CPU state is under 2 KiB.
const MAX_LINE: u64 = 1 << 20;

/// A client that does not read its answers for this long is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bound control socket; its file goes with it.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    listener: UnixListener,
    connections: Connections,
}

/// Each connection's stream and thread.
type Connections = Arc<Mutex<Vec<(UnixStream, JoinHandle<()>)>>>;

impl Socket {
    /// Binds `path`. A socket file that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                format!(
                    "{} is another guest's socket: name a new one",
                    path.display()
                ),
            ));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        Ok(Self {
            path: path.to_owned(),
            listener: UnixListener::bind(path)?,
            connections: Connections::default(),
        })
    }

    /// Takes connections on a thread of its own; commands go to the receiver.
    pub fn serve(&self) -> io::Result<Receiver<Order>> {
        let (orders, receiver) = channel();
        let listener = self.listener.try_clone()?;
        let connections = Arc::clone(&self.connections);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let orders = orders.clone();
                let Ok(ours) = stream.try_clone() else {
                    continue;
                };
                let talking = thread::spawn(move || talk(stream, &orders));
                let mut all = connections.lock().unwrap_or_else(PoisonError::into_inner);
                all.retain(|(_, thread)| !thread.is_finished());
                all.push((ours, talking));
            }
        });
        Ok(receiver)
    }

    /// Ends all connections after what was said to them has been sent. The machine must be gone: it
    /// holds on to connections that want events.
    pub fn close(self) {
        let all = std::mem::take(
            &mut *self
                .connections
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for (stream, talking) in all {
            // Wakes the thread that waits for the next command; a stream that is broken already needs no waking.
            let _ = stream.shutdown(Shutdown::Read);
            let _ = talking.join();
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Gone already, or left behind: the next guest replaces it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One connection; ends with it.
fn talk(stream: UnixStream, orders: &Sender<Order>) {
    let Ok(mut output) = stream.try_clone() else {
        return;
    };
    if output.set_write_timeout(Some(PATIENCE)).is_err() {
        return;
    }
    let (lines, outgoing) = channel::<Line>();
    // One writer, so that an event never falls into the middle of an answer.
    let writer = thread::spawn(move || {
        for line in outgoing {
            let Ok(mut text) = serde_json::to_vec(&line) else {
                continue;
            };
            text.push(b'\n');
            if output.write_all(&text).is_err() {
                return;
            }
        }
    });
    let mut input = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) if line.last() != Some(&b'\n') => break,
            Ok(_) if line.trim_ascii().is_empty() => continue,
            Ok(_) => {}
        }
        if lines.send(answer(&line, orders, &lines)).is_err() {
            break;
        }
    }
    drop(lines);
    // Subscribed connections end when the machine drops them.
    let _ = writer.join();
}

fn answer(line: &[u8], orders: &Sender<Order>, events: &Sender<Line>) -> Line {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => {
            return Line::Error {
                error: Failure::new(format!("not a command: {error}")),
                id: None,
            };
        }
    };
    let (reply, result) = channel();
    let order = Order {
        command: request.command,
        reply,
        events: events.clone(),
    };
    let ended = || Err(Failure::new("the guest has ended"));
    let sent = orders.send(order);
    let result = sent.map_or_else(|_| ended(), |()| result.recv().unwrap_or_else(|_| ended()));
    match result {
        Ok(value) => Line::Return {
            value,
            id: request.id,
        },
        Err(error) => Line::Error {
            error,
            id: request.id,
        },
    }
}
