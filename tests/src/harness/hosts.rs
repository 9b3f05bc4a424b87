//! Hosts: each a folder with an identity, a state folder and guest files, on one machine.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use tempfile::TempDir;
use vmferry_certs::{CertificateAuthority, HostRequest, Validity};

use super::leftovers;
use super::process::{Finished, Running};
use super::role::{Programs, Role};
use crate::link::End;

/// How long an agent may take to come up.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long any migration of a test may take.
pub(crate) const MIGRATE_LIMIT: Duration = Duration::from_secs(300);

/// Some hosts with one certificate authority, in a folder that goes with them.
#[derive(Debug)]
pub struct Hosts {
    dir: TempDir,
    programs: Programs,
    authority: CertificateAuthority,
}

/// One host.
#[derive(Debug, Clone)]
pub struct Host {
    name: String,
    dir: PathBuf,
    programs: Programs,
    /// Where its agents are; `None` for where we are.
    end: Option<End>,
}

/// A destination agent that listens.
#[derive(Debug)]
pub struct Agent {
    /// Its process.
    pub process: Running,
    /// Its host's address.
    pub address: Ipv4Addr,
    /// Its UDP port there.
    pub port: u16,
}

impl Agent {
    /// What `--to` says to reach it.
    #[must_use]
    pub fn to(&self) -> String {
        format!("{}:{}", self.address, self.port)
    }
}

impl Hosts {
    /// No host yet.
    ///
    /// # Errors
    /// The disk.
    pub fn new(programs: Programs) -> anyhow::Result<Self> {
        let dir = leftovers::folder("hosts")?;
        let made = CertificateAuthority::create(&dir.path().join("ca"), Validity::days(90)?)?;
        Ok(Self {
            dir,
            programs,
            authority: made.authority,
        })
    }

    /// The folder of all of them.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The certificate authority.
    #[must_use]
    pub const fn authority(&self) -> &CertificateAuthority {
        &self.authority
    }

    /// A new host, reachable at 127.0.0.1.
    ///
    /// # Errors
    /// The disk.
    pub fn host(&self, name: &str) -> anyhow::Result<Host> {
        self.add(name, None)
    }

    /// A new host whose agents are at one end of an emulated link.
    ///
    /// # Errors
    /// The disk.
    pub fn host_at(&self, name: &str, end: &End) -> anyhow::Result<Host> {
        self.add(name, Some(end.clone()))
    }

    fn add(&self, name: &str, end: Option<End>) -> anyhow::Result<Host> {
        let dir = self.dir.path().join(name);
        for sub in ["guests", "logs", "hooks", "images"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let mut addresses = vec!["127.0.0.1".parse()?, "localhost".parse()?];
        if let Some(end) = &end {
            addresses.push(end.address.to_string().parse()?);
        }
        let request = HostRequest {
            name: name.to_owned(),
            addresses,
            validity: Validity::days(90)?,
        };
        self.authority.issue(&request, &dir.join("identity"))?;
        Ok(Host {
            name: name.to_owned(),
            dir,
            programs: self.programs.clone(),
            end,
        })
    }
}

impl Drop for Hosts {
    /// Guests outlive the agents that launch them; the folder's name in their command line says whose they are.
    fn drop(&mut self) {
        let mark = format!("{}/", self.dir.path().display());
        for pid in super::process::with_words(&mark) {
            super::process::kill(pid);
        }
    }
}

impl Host {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    #[must_use]
    pub const fn address(&self) -> Ipv4Addr {
        match &self.end {
            Some(end) => end.address,
            None => Ipv4Addr::LOCALHOST,
        }
    }

    /// Runs `work` where its agents are: what it starts is there too.
    ///
    /// # Errors
    /// What `work` says.
    pub fn run<T: Send>(
        &self,
        work: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        match &self.end {
            Some(end) => end.namespace.run(work),
            None => work(),
        }
    }

    fn start(&self, name: &str, command: Command) -> anyhow::Result<Running> {
        self.run(|| Running::start(name, command, &self.path("logs")))
    }

    /// A path in its folder.
    #[must_use]
    pub fn path(&self, sub: &str) -> PathBuf {
        self.dir.join(sub)
    }

    /// The programs.
    #[must_use]
    pub const fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Identifies itself with what is in `dir` from now on.
    ///
    /// # Errors
    /// The disk.
    pub fn take_identity(&self, dir: &Path) -> anyhow::Result<()> {
        let own = self.path("identity");
        for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
            let from = entry?.path();
            let to = own.join(from.file_name().context("no file name")?);
            fs::copy(&from, &to).with_context(|| to.display().to_string())?;
        }
        Ok(())
    }

    /// Writes the guest file of `guest`.
    ///
    /// # Errors
    /// The disk.
    pub fn write_guest(&self, guest: &str, content: &toml::Table) -> anyhow::Result<PathBuf> {
        let path = self.dir.join("guests").join(format!("{guest}.toml"));
        fs::write(&path, toml::to_string(content)?).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Starts the destination agent on a free port.
    ///
    /// # Errors
    /// It does not come up.
    pub fn serve(&self, more: &[&str]) -> anyhow::Result<Agent> {
        self.serve_at(0, more)
    }

    /// Starts the destination agent on `port`; 0 for a free one.
    ///
    /// # Errors
    /// It does not come up.
    pub fn serve_at(&self, port: u16, more: &[&str]) -> anyhow::Result<Agent> {
        self.serve_by(self.serve_command(port, more))
    }

    /// As [`serve_at`](Self::serve_at), in a session of its own, as a service manager starts it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn serve_in_session(&self, port: u16) -> anyhow::Result<Agent> {
        let agent = self.serve_command(port, &[]);
        let mut command = Command::new("setsid");
        command.arg(agent.get_program()).args(agent.get_args());
        self.serve_by(command)
    }

    fn serve_command(&self, port: u16, more: &[&str]) -> Command {
        let mut command = self.programs.command(Role::Destination);
        command
            .arg("serve")
            .arg("--listen")
            .arg(format!("{}:{port}", self.address()));
        command.arg("--identity").arg(self.path("identity"));
        command.arg("--guests").arg(self.path("guests"));
        command
            .arg("--state")
            .arg(self.path("state"))
            .arg("--hooks")
            .arg(self.path("hooks"));
        command.args(more);
        command
    }

    fn serve_by(&self, command: Command) -> anyhow::Result<Agent> {
        let mut process = self.start("vmferry-dst", command)?;
        let mark = format!("{}:", self.address());
        let port = process.wait_for("listening", START_LIMIT, |out, _| {
            let line = out.lines().find(|line| line.contains(&mark))?;
            let digits: String = line
                .split(&mark)
                .nth(1)?
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            digits.parse().ok()
        })?;
        Ok(Agent {
            process,
            address: self.address(),
            port,
        })
    }

    /// Starts `vmferry-src migrate GUEST.toml --to 127.0.0.1:port --json`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_migrate(&self, guest: &str, port: u16, more: &[&str]) -> anyhow::Result<Running> {
        self.start_migrate_to(guest, &format!("127.0.0.1:{port}"), more)
    }

    /// Starts `vmferry-src migrate GUEST.toml --to HOST:PORT --json`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start_migrate_to(
        &self,
        guest: &str,
        to: &str,
        more: &[&str],
    ) -> anyhow::Result<Running> {
        self.start("vmferry-src", self.migrate_command(guest, to, more))
    }

    fn migrate_command(&self, guest: &str, to: &str, more: &[&str]) -> Command {
        let mut command = self.programs.command(Role::Source);
        command
            .arg("migrate")
            .arg(self.path("guests").join(format!("{guest}.toml")));
        command.arg("--to").arg(to);
        command.arg("--identity").arg(self.path("identity"));
        command
            .arg("--state")
            .arg(self.path("state"))
            .arg("--hooks")
            .arg(self.path("hooks"));
        command.arg("--json").args(more);
        command
    }

    /// Migrates `guest` with the source agent's standard error where ours is, so that a person sees its progress.
    ///
    /// # Errors
    /// The program cannot be started or does not end.
    pub fn migrate_in_view(
        &self,
        guest: &str,
        port: u16,
        more: &[&str],
        limit: Duration,
    ) -> anyhow::Result<Finished> {
        let command = self.migrate_command(guest, &format!("127.0.0.1:{port}"), more);
        Running::start_in_view("vmferry-src", command, &self.path("logs"))?.wait(limit)
    }

    /// Migrates `guest` to `agent` and waits for the end.
    ///
    /// # Errors
    /// The program cannot be started or does not end.
    pub fn migrate_to(
        &self,
        guest: &str,
        agent: &Agent,
        more: &[&str],
    ) -> anyhow::Result<Finished> {
        self.start_migrate_to(guest, &agent.to(), more)?
            .wait(MIGRATE_LIMIT)
    }

    /// Migrates `guest` to an agent on this machine and waits for the end.
    ///
    /// # Errors
    /// The program cannot be started or does not end.
    pub fn migrate(&self, guest: &str, port: u16, more: &[&str]) -> anyhow::Result<Finished> {
        self.start_migrate(guest, port, more)?.wait(MIGRATE_LIMIT)
    }

    /// Runs another verb of an agent (`status`, `cutover`, `owner`, …) on this host's state and waits.
    ///
    /// # Errors
    /// The program cannot be started or does not end.
    pub fn ask(
        &self,
        role: Role,
        verb: &str,
        guest: &str,
        more: &[&str],
    ) -> anyhow::Result<Finished> {
        let mut command = self.programs.command(role);
        command
            .arg(verb)
            .arg(guest)
            .arg("--state")
            .arg(self.path("state"))
            .args(more);
        self.start(verb, command)?.wait(MIGRATE_LIMIT)
    }
}
