//! A small QMP client for tests: one command at a time, blocking, with a time limit.
//!
//! Owns nothing of what the agents use: the lab looks at a QEMU over a socket of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to a QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects, waiting for the socket to appear.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let begin = Instant::now();
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if begin.elapsed() < limit => thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error).context(path.display().to_string()),
            }
        };
        writer.set_read_timeout(Some(ANSWER_LIMIT))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self {
            reader,
            writer,
            events: Vec::new(),
        };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "no QMP greeting: {greeting}");
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Process behind the socket.
    pub(crate) fn peer(&self) -> Result<rustix::process::Pid> {
        Ok(rustix::net::sockopt::socket_peercred(&self.writer)?.pid)
    }

    /// Executes a command and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if arguments
            .as_object()
            .is_some_and(|object| !object.is_empty())
        {
            request["arguments"] = arguments;
        }
        self.writer.write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.read()?;
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            self.events.push(answer);
        }
    }

    /// Waits until an event of this name has come (or has already).
    pub fn wait_event(&mut self, name: &str) -> Result<Value> {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.swap_remove(at));
            }
            let event = self.read().with_context(|| format!("waiting for {name}"))?;
            self.events.push(event);
        }
    }

    /// `query-status`: `running`, `paused`, `inmigrate`, …
    pub fn status(&mut self) -> Result<String> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or_default().into())
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.reader.read_line(&mut line).context("QMP")?;
        ensure!(read > 0, "QEMU closed its QMP connection");
        Ok(serde_json::from_str(&line)?)
    }
}
