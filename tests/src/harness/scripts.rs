//! Hook scripts for tests: real ones, in the hooks folder of a host.
//!
//! Owns three kinds: one that writes down how it was called, one that refuses, and a gate that holds the migration
//! in a phase until the test opens it. A gate gives up by itself, so that no test hangs on it, but later than any test
//! waits for something to come true: a script that should have been killed is noticed.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::hosts::Host;
use super::process::Running;

/// A hook was called.
#[derive(Debug, Clone, PartialEq)]
pub struct Call {
    /// The host whose script it is.
    pub host: String,
    /// Second argument.
    pub phase: String,
    /// First argument.
    pub guest: String,
    /// Standard input.
    pub facts: Value,
}

/// Holds a migration in a phase.
#[derive(Debug)]
pub struct Gate {
    reached: PathBuf,
    open: PathBuf,
    script: PathBuf,
}

impl Host {
    /// Writes hook script `name` (`PHASE` or `PHASE.d/SOMETHING`) with this `sh` body.
    ///
    /// # Errors
    /// The disk.
    pub fn hook(&self, name: &str, body: &str) -> anyhow::Result<PathBuf> {
        let path = self.path("hooks").join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Written by another process: a descriptor of ours could be open in a child that is just being started, and then the
        // kernel refuses to run the script.
        let mut writer = Command::new("sh")
            .args(["-c", "cat >\"$1\" && chmod 755 \"$1\"", "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()?;
        let mut stdin = writer.stdin.take().context("no stdin")?;
        stdin.write_all(format!("#!/bin/sh\n{body}\n").as_bytes())?;
        drop(stdin);
        ensure!(writer.wait()?.success(), "writing {}", path.display());
        Ok(path)
    }

    /// Scripts in all of `phases` that write each call down in `calls` of the hosts' folder.
    ///
    /// # Errors
    /// The disk.
    pub fn record_hooks(&self, phases: &[&str]) -> anyhow::Result<()> {
        for phase in phases {
            let body = format!(
                "printf '%s\\t%s\\t%s\\t%s\\n' {} \"$1\" \"$2\" \"$(cat)\" >>'{}'",
                self.name(),
                self.calls_file().display()
            );
            self.hook(&format!("{phase}.d/50-record"), &body)?;
        }
        Ok(())
    }

    fn calls_file(&self) -> PathBuf {
        self.path("../calls")
    }

    /// The calls so far, of all hosts of this folder, in their order.
    ///
    /// # Errors
    /// The file is not as the scripts write it.
    pub fn hook_calls(&self) -> anyhow::Result<Vec<Call>> {
        let text = fs::read_to_string(self.calls_file())?;
        let parse = |line: &str| {
            let mut words = line.splitn(4, '\t').map(str::to_owned);
            let mut next = || words.next().with_context(|| format!("{line:?}"));
            Ok(Call {
                host: next()?,
                guest: next()?,
                phase: next()?,
                facts: serde_json::from_str(&next()?)?,
            })
        };
        text.lines().map(parse).collect()
    }

    /// A gate in `phase`.
    ///
    /// # Errors
    /// The disk.
    pub fn gate(&self, phase: &str) -> anyhow::Result<Gate> {
        let (reached, open) = (
            self.path(&format!("{phase}.reached")),
            self.path(&format!("{phase}.open")),
        );
        let body = format!(
            "touch '{}'\nfor i in $(seq 1200); do [ -e '{}' ] && exit 0; sleep 0.05; done\nexit 1",
            reached.display(),
            open.display()
        );
        let script = self.hook(&format!("{phase}.d/90-gate"), &body)?;
        Ok(Gate {
            reached,
            open,
            script,
        })
    }
}

impl Gate {
    /// Waits until the migration that `process` runs stands before it.
    ///
    /// # Errors
    /// The process ends first, or it takes too long.
    pub fn wait_reached(&self, process: &mut Running) -> anyhow::Result<()> {
        process.wait_for(
            &format!("{}", self.reached.display()),
            Duration::from_secs(60),
            |_, _| self.reached.exists().then_some(()),
        )
    }

    /// Opens it for good.
    ///
    /// # Errors
    /// The disk.
    pub fn open(&self) -> anyhow::Result<()> {
        Ok(fs::write(&self.open, "")?)
    }

    /// Takes it away: the next migration finds no gate. One that stands before it is let through.
    ///
    /// # Errors
    /// The disk.
    pub fn remove(self) -> anyhow::Result<()> {
        self.open()?;
        Ok(fs::remove_file(&self.script)?)
    }
}
