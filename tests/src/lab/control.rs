//! The host's end of the judge's command port: asks, and keeps what the judge says unasked.
//!
//! Owns the lines per QEMU process. A question goes to one process, the one that runs the guest.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::port::Port;

#[derive(Debug)]
struct Line {
    pid: u32,
    stream: UnixStream,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<Line>,
    said: Vec<(u32, String)>,
    questions: u64,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Commands to the judge.
#[derive(Debug)]
pub(crate) struct Control {
    shared: Arc<Shared>,
    _port: Port,
}

impl Control {
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let serving = Arc::clone(&shared);
        let port = Port::listen(path, move |stream, peer| {
            // Without a second handle the line is deaf, and the question says so by its time limit.
            if let Ok(writer) = stream.try_clone() {
                serving.serve(stream, writer, peer.pid);
            }
        })?;
        Ok(Self {
            shared,
            _port: port,
        })
    }

    /// Everything that the judge said, with the process that it said it in.
    pub(crate) fn said(&self) -> Vec<(u32, String)> {
        self.shared.lock().said.clone()
    }

    /// Waits until `count` lines begin with `start`.
    pub(crate) fn wait_said(&self, start: &str, count: usize, limit: Duration) -> Result<()> {
        self.wait(start, limit, |said| {
            let lines = said
                .iter()
                .filter(|(_, line)| line.starts_with(start))
                .count();
            (lines >= count).then_some(())
        })
    }

    /// Sends a command to process `pid` and returns the answer without its number.
    pub(crate) fn ask(&self, pid: u32, command: &str, limit: Duration) -> Result<String> {
        let start = {
            let mut state = self.shared.lock();
            state.questions += 1;
            let start = format!("{} ", state.questions);
            let line = state.lines.iter_mut().find(|line| line.pid == pid);
            let line = line.with_context(|| format!("QEMU {pid} has no command port"))?;
            line.stream
                .write_all(format!("{start}{command}\n").as_bytes())?;
            start
        };
        self.wait(command, limit, |said| {
            said.iter()
                .find_map(|(_, line)| line.strip_prefix(&start).map(Into::into))
        })
    }

    fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        find: impl Fn(&[(u32, String)]) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = find(&state.said) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the judge did not answer {what:?} within {limit:?}");
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, reader: UnixStream, writer: UnixStream, pid: u32) {
        self.lock().lines.push(Line {
            pid,
            stream: writer,
        });
        for line in BufReader::new(reader).lines() {
            // An error is the end as much as end of file is: the process was killed.
            let Ok(line) = line else { return };
            self.lock().said.push((pid, line));
            self.changed.notify_all();
        }
    }
}
