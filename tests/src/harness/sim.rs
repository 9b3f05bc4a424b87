//! Embedded guests on hosts: the running one at the source, the waiting one that a destination launches, and their beats.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use toml::{Table, Value};
use vmferry_simguest::Client;
use vmferry_simguest::protocol::State;

use super::hosts::Host;
use super::process::Running;
use super::role::Role;

/// How long a guest may take to fill its memory and come up.
const START_LIMIT: Duration = Duration::from_secs(60);

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct SimSpec {
    /// Its name.
    pub name: String,
    /// Bytes of RAM.
    pub ram: u64,
    /// `anon` or `memfd`.
    pub ram_kind: &'static str,
    /// Whether all of RAM is taken from the system at once.
    pub prealloc: bool,
    /// Bytes of disk; 0 for none.
    pub disk: u64,
    /// RAM written per second, in bytes.
    pub dirty_rate: u64,
    /// Bytes of RAM among which the writes are spread.
    pub working_set: u64,
    /// Disk written per second, in bytes.
    pub disk_rate: u64,
    /// Percent of RAM that is written before the start.
    pub fill: u8,
    /// `mixed`, `random`, `text`, `zero` or `copies`.
    pub content: &'static str,
    /// Whether it stands still at first.
    pub paused: bool,
}

impl SimSpec {
    /// A small guest that works a little: 64 MiB of RAM, 16 MiB of disk.
    #[must_use]
    pub fn small(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ram: 64 << 20,
            ram_kind: "anon",
            prealloc: false,
            disk: 16 << 20,
            dirty_rate: 8 << 20,
            working_set: 8 << 20,
            disk_rate: 1 << 20,
            fill: 75,
            content: "mixed",
            paused: false,
        }
    }

    /// A still smaller one that works less: 32 MiB of RAM, 8 MiB of disk.
    #[must_use]
    pub fn quiet(name: &str) -> Self {
        Self {
            ram: 32 << 20,
            disk: 8 << 20,
            dirty_rate: 1 << 20,
            working_set: 1 << 20,
            ..Self::small(name)
        }
    }

    /// One that writes nothing and has no disk; its RAM of `ram` bytes, where it is not zero, is random.
    #[must_use]
    pub fn still(name: &str, ram: u64) -> Self {
        Self {
            ram,
            disk: 0,
            dirty_rate: 0,
            disk_rate: 0,
            content: "random",
            ..Self::small(name)
        }
    }

    fn args(&self, host: &Host, beats: &Path) -> Vec<String> {
        let mut args: Vec<String> = vec!["run".into(), "--name".into(), self.name.clone()];
        let mut set = |flag: &str, value: String| args.extend([flag.to_owned(), value]);
        set("--socket", socket(host, &self.name).display().to_string());
        set("--ram", format!("{}B", self.ram));
        set("--ram-kind", self.ram_kind.to_owned());
        set("--dirty-rate", format!("{}B", self.dirty_rate));
        set("--working-set", format!("{}B", self.working_set));
        set("--disk-rate", format!("{}B", self.disk_rate));
        set("--fill", self.fill.to_string());
        set("--content", self.content.to_owned());
        set("--heartbeat", beats.display().to_string());
        if self.disk > 0 {
            set("--disk", disk(host, &self.name).display().to_string());
            set("--disk-size", format!("{}B", self.disk));
        }
        if self.prealloc {
            args.push("--prealloc".to_owned());
        }
        args
    }
}

fn socket(host: &Host, name: &str) -> PathBuf {
    host.path(&format!("{name}.sock"))
}

fn disk(host: &Host, name: &str) -> PathBuf {
    host.path("images").join(format!("{name}.raw"))
}

/// A guest that may be on any of the hosts it was prepared for.
#[derive(Debug)]
pub struct SimGuest {
    spec: SimSpec,
    beats: PathBuf,
    /// The first one, started here; those after it are launched by agents.
    first: Running,
    /// Its control sockets on all hosts.
    sockets: Mutex<Vec<PathBuf>>,
}

impl Drop for SimGuest {
    fn drop(&mut self) {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        for socket in sockets.iter() {
            // Wherever it is now, nobody needs it any more.
            if let Ok(mut client) = Client::connect(socket) {
                let _ = client.quit();
            }
        }
    }
}

impl SimGuest {
    /// Starts the guest on `host` and writes the guest file from which that host's source agent finds it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(spec: SimSpec, host: &Host) -> anyhow::Result<Self> {
        let beats = host.path(&format!("{}.beats", spec.name));
        let mut command = host.programs().command(Role::SimGuest);
        command.args(spec.args(host, &beats));
        if spec.paused {
            command.arg("--paused");
        }
        let mut first = Running::start("vmferry-simguest", command, &host.path("logs"))?;
        first.wait_for("ready", START_LIMIT, |out, _| {
            out.contains("ready").then_some(())
        })?;
        let guest = Self {
            spec,
            beats,
            first,
            sockets: Mutex::default(),
        };
        guest.write_source_file(host)?;
        Ok(guest)
    }

    /// Writes the guest file for a source agent on `host`.
    ///
    /// # Errors
    /// The disk.
    pub fn write_source_file(&self, host: &Host) -> anyhow::Result<PathBuf> {
        host.write_guest(&self.spec.name, &self.common(host))
    }

    /// Writes the guest file from which the destination agent of `host` launches this guest when `from` sends it.
    ///
    /// # Errors
    /// The disk.
    pub fn expect_at(&self, host: &Host, from: &[&str]) -> anyhow::Result<PathBuf> {
        self.expect_as(&self.spec, host, from)
    }

    /// As [`expect_at`](Self::expect_at), but what is launched there is made as `spec` says.
    ///
    /// # Errors
    /// The disk.
    pub fn expect_as(&self, spec: &SimSpec, host: &Host, from: &[&str]) -> anyhow::Result<PathBuf> {
        let mut launch = host.programs().words(Role::SimGuest);
        launch.extend(spec.args(host, &self.beats));
        launch.push("--incoming".to_owned());
        let mut table = self.common(host);
        table.insert(
            "from".into(),
            Value::Array(from.iter().map(|name| Value::from(*name)).collect()),
        );
        table.insert(
            "launch".into(),
            Value::Array(launch.into_iter().map(Value::from).collect()),
        );
        host.write_guest(&self.spec.name, &table)
    }

    fn common(&self, host: &Host) -> Table {
        let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        sockets.push(socket(host, &self.spec.name));
        let mut table = Table::new();
        table.insert("name".into(), self.spec.name.clone().into());
        table.insert("driver".into(), "sim".into());
        table.insert(
            "socket".into(),
            socket(host, &self.spec.name).display().to_string().into(),
        );
        table
    }

    /// Process id of the first one.
    #[must_use]
    pub fn first_pid(&self) -> u32 {
        self.first.pid()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Speaks to the guest on `host`.
    ///
    /// # Errors
    /// It is not there.
    pub fn client(&self, host: &Host) -> anyhow::Result<Client> {
        let path = socket(host, &self.spec.name);
        Client::connect(&path).with_context(|| format!("no guest at {}", path.display()))
    }

    /// Whether a guest process answers on `host`.
    #[must_use]
    pub fn is_on(&self, host: &Host) -> bool {
        self.client(host)
            .and_then(|mut client| Ok(client.status()?))
            .is_ok()
    }

    /// Whether the guest runs on `host`.
    #[must_use]
    pub fn runs_on(&self, host: &Host) -> bool {
        self.has_state(host, State::Running)
    }

    /// Whether the guest stands still on `host`.
    #[must_use]
    pub fn is_paused_on(&self, host: &Host) -> bool {
        self.has_state(host, State::Paused)
    }

    fn has_state(&self, host: &Host, state: State) -> bool {
        self.client(host)
            .and_then(|mut client| Ok(client.status()?))
            .is_ok_and(|status| status.state == state)
    }

    /// Checks every page and disk block of the guest on `host` against what it must hold.
    ///
    /// # Errors
    /// Something is wrong, or it does not answer.
    pub fn verify_on(&self, host: &Host) -> anyhow::Result<()> {
        let verdict = self.client(host)?.verify()?;
        ensure!(
            verdict.ok,
            "CORRUPT on {}: {:?}",
            host.name(),
            verdict.details
        );
        ensure!(verdict.pages > 0, "nothing was checked");
        Ok(())
    }

    /// What there is of the guest on `host` although it is not there: processes, socket, files of the run folder.
    #[must_use]
    pub fn traces_on(&self, host: &Host) -> Vec<String> {
        let socket = socket(host, &self.spec.name);
        let processes = super::process::with_words(&socket.display().to_string())
            .into_iter()
            .map(|pid| format!("process {pid}"));
        let run_folder = host.path("state/run/guests").join(&self.spec.name);
        let paths = [socket, run_folder]
            .into_iter()
            .filter(|path| path.exists());
        processes
            .chain(paths.map(|path| path.display().to_string()))
            .collect()
    }

    /// The disk image of the guest on `host`.
    #[must_use]
    pub fn disk_on(&self, host: &Host) -> PathBuf {
        disk(host, &self.spec.name)
    }

    /// The beats so far.
    ///
    /// # Errors
    /// The file is not what it should be.
    pub fn beats(&self) -> anyhow::Result<Beats> {
        Beats::parse(&fs::read_to_string(&self.beats)?)
    }

    /// Waits until the guest beats on, wherever it is.
    ///
    /// # Errors
    /// It does not within a minute.
    pub fn wait_for_beats(&self, more: usize) -> anyhow::Result<()> {
        let before = self.beats()?.list.len();
        let began = std::time::Instant::now();
        while self.beats()?.list.len() < before + more {
            ensure!(
                began.elapsed() < Duration::from_secs(60),
                "the guest does not beat"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Ends the guest on `host`, if it is there.
    pub fn end_on(&self, host: &Host) {
        if let Ok(mut client) = self.client(host) {
            // It may be gone already.
            let _ = client.quit();
        }
    }
}

/// One beat, stamped on the host's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Number of the beat in the guest's life.
    pub number: u64,
    /// When.
    pub at: Duration,
    /// The process that sent it.
    pub pid: u32,
}

/// The beats of a guest's life.
#[derive(Debug, Clone, Default)]
pub struct Beats {
    /// All of them, in the order in which they came.
    pub list: Vec<Beat>,
}

impl Beats {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let mut list = Vec::new();
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for line in whole.lines() {
            let mut words = line.split_whitespace();
            let mut next = || words.next().with_context(|| format!("beat {line:?}"));
            let (number, nanos, pid) = (next()?, next()?, next()?);
            list.push(Beat {
                number: number.parse()?,
                at: Duration::from_nanos(nanos.parse()?),
                pid: pid.parse()?,
            });
        }
        Ok(Self { list })
    }

    /// Checks that no beat is missing, repeated or backwards, and that no process beats after its successor began.
    ///
    /// # Errors
    /// Which rule is broken, and where.
    pub fn check(&self) -> anyhow::Result<()> {
        for pair in self.list.windows(2) {
            let (last, next) = (pair[0], pair[1]);
            if next.number != last.number + 1 {
                bail!(
                    "beat {} of {} follows beat {} of {}",
                    next.number,
                    next.pid,
                    last.number,
                    last.pid
                );
            }
            ensure!(
                next.at >= last.at,
                "beat {} is stamped before beat {}",
                next.number,
                last.number
            );
        }
        ensure!(!self.list.is_empty(), "no beat at all");
        Ok(())
    }

    /// Time between the last beat of one process and the first of the next, for each move.
    #[must_use]
    pub fn handovers(&self) -> Vec<Duration> {
        self.list
            .windows(2)
            .filter(|pair| pair[0].pid != pair[1].pid)
            .map(|pair| pair[1].at.saturating_sub(pair[0].at))
            .collect()
    }

    /// The longest time between two beats of one process.
    #[must_use]
    pub fn longest_within(&self) -> Duration {
        self.list
            .windows(2)
            .filter(|pair| pair[0].pid == pair[1].pid)
            .map(|pair| pair[1].at.saturating_sub(pair[0].at))
            .max()
            .unwrap_or_default()
    }
}
