//! A client of the control socket, for tests, the demo and the command line. Blocking, with a time limit.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cpu::Workload;
use crate::guest::Verdict;
use crate::protocol::{Command, Description, Line, Request, Status, from_hex, to_hex};

/// How long an answer may take; the full check of a large guest is the longest.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// A connection to a guest.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    id: u64,
}

/// A guest that does not answer, or answers with an error.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("no guest listens on {path}: is it running?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or the time ran out.
    #[error("the guest on {path} does not answer")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest refused.
    #[error("{0}")]
    Refused(String),
    /// The answer is not what was asked for.
    #[error("the guest on {path} gave an answer that is not understood")]
    Answer {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl Client {
    /// Connects to the guest at `path`.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .and_then(|stream| stream.set_read_timeout(Some(ANSWER_LIMIT)).map(|()| stream))
            .map_err(|source| ClientError::Connect {
                path: path.to_owned(),
                source,
            })?;
        Ok(Self {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            id: 0,
        })
    }

    /// Connects to a guest that is still starting, for as long as `limit`.
    pub fn connect_within(path: &Path, limit: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + limit;
        loop {
            match Self::connect(path) {
                Err(_) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                done => return done,
            }
        }
    }

    /// Carries out `command`; events that come before the answer are passed over.
    pub fn execute(&mut self, command: Command) -> Result<Value, ClientError> {
        self.id += 1;
        let request = Request {
            command,
            id: Some(self.id),
        };
        let mut text = serde_json::to_vec(&request).map_err(|source| self.answer_error(source))?;
        text.push(b'\n');
        let sent = self.stream.get_mut().write_all(&text);
        sent.map_err(|source| self.io_error(source))?;
        loop {
            match self.next_line()? {
                Line::Return { value, id } if id == Some(self.id) => return Ok(value),
                Line::Error { error, id } if id == Some(self.id) => {
                    return Err(ClientError::Refused(error.desc));
                }
                Line::Return { .. } | Line::Error { .. } | Line::Event { .. } => {}
            }
        }
    }

    /// The next line, be it an answer or an event.
    pub fn next_line(&mut self) -> Result<Line, ClientError> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) => Err(self.io_error(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => serde_json::from_str(&line).map_err(|source| self.answer_error(source)),
            Err(source) => Err(self.io_error(source)),
        }
    }

    fn ask<T: DeserializeOwned>(&mut self, command: Command) -> Result<T, ClientError> {
        let value = self.execute(command)?;
        serde_json::from_value(value).map_err(|source| self.answer_error(source))
    }

    /// What the guest is made of.
    pub fn describe(&mut self) -> Result<Description, ClientError> {
        self.ask(Command::Describe)
    }

    /// What it is doing.
    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.ask(Command::Status)
    }

    /// Stops it.
    pub fn stop(&mut self) -> Result<Status, ClientError> {
        self.ask(Command::Stop)
    }

    /// Lets it go on.
    pub fn cont(&mut self) -> Result<Status, ClientError> {
        self.ask(Command::Cont)
    }

    /// The CPU state of a stopped guest.
    pub fn save_state(&mut self) -> Result<Vec<u8>, ClientError> {
        let value = self.execute(Command::SaveState)?;
        value
            .get("state")
            .and_then(Value::as_str)
            .and_then(from_hex)
            .ok_or_else(|| ClientError::Refused("the answer holds no state".to_owned()))
    }

    /// Gives an incoming guest its CPU state.
    pub fn load_state(&mut self, state: &[u8]) -> Result<Status, ClientError> {
        self.ask(Command::LoadState {
            state: to_hex(state),
        })
    }

    /// The full check of RAM and disk.
    pub fn verify(&mut self) -> Result<Verdict, ClientError> {
        self.ask(Command::Verify)
    }

    /// Changes what the guest does.
    pub fn set_workload(&mut self, workload: Workload) -> Result<Status, ClientError> {
        self.ask(Command::SetWorkload(workload))
    }

    /// The guest shuts itself down.
    pub fn shutdown(&mut self) -> Result<(), ClientError> {
        self.execute(Command::Shutdown).map(drop)
    }

    /// The host ends it.
    pub fn quit(&mut self) -> Result<(), ClientError> {
        self.execute(Command::Quit).map(drop)
    }

    fn io_error(&self, source: io::Error) -> ClientError {
        ClientError::Io {
            path: self.path.clone(),
            source,
        }
    }

    fn answer_error(&self, source: serde_json::Error) -> ClientError {
        ClientError::Answer {
            path: self.path.clone(),
            source,
        }
    }
}
