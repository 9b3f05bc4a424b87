//! Real guests on hosts: a guest of the lab, two hosts with agents, and what must be true when it has moved or stayed.
//!
//! Owns joining the two: the guest file of each host, the way a destination's QEMU comes up there, and the checks that
//! every move has in common. The lab knows nothing of agents and the agents nothing of the lab: they meet in the guest files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;
use toml::{Table, Value};

use super::hosts::{Agent, Host, Hosts};
use super::process::{Finished, Running};
use super::role::Programs;
use crate::lab::{Guest, Images, Place, Qemu, Start};
use crate::link::Link;

/// How long a QEMU may take to end when it should.
const END_LIMIT: Duration = Duration::from_secs(60);
/// How long a migration may take to reach a phase.
const PHASE_LIMIT: Duration = Duration::from_secs(120);
/// How long the guest may take to beat at a new place.
const BEAT_LIMIT: Duration = Duration::from_secs(60);

/// Two hosts that may send each other one guest.
#[derive(Debug)]
pub struct Pair {
    hosts: Hosts,
    /// The guest, wherever it is.
    pub guest: Guest,
    /// Where it is first.
    pub alpha: Side,
    /// Where it goes.
    pub beta: Side,
}

/// One host with the guest's folder there.
#[derive(Debug)]
pub struct Side {
    /// The host, as agents see it.
    pub host: Host,
    /// The host, as the lab sees it.
    pub place: Place,
}

impl Pair {
    /// Two hosts; the images at the second hold something else everywhere.
    ///
    /// # Errors
    /// The disk.
    pub fn new(programs: Programs, guest: Guest) -> Result<Self> {
        let hosts = Hosts::new(programs)?;
        let ends = (hosts.host("alpha")?, hosts.host("beta")?);
        Self::between(hosts, ends, guest)
    }

    /// As [`new`](Self::new), the two hosts at the ends of `link`.
    ///
    /// # Errors
    /// The disk.
    pub fn on_link(programs: Programs, guest: Guest, link: &Link) -> Result<Self> {
        let hosts = Hosts::new(programs)?;
        let ends = (
            hosts.host_at("alpha", &link.alpha)?,
            hosts.host_at("beta", &link.beta)?,
        );
        Self::between(hosts, ends, guest)
    }

    fn between(hosts: Hosts, (alpha, beta): (Host, Host), guest: Guest) -> Result<Self> {
        let side = |host: Host, images| {
            Ok::<_, anyhow::Error>(Side {
                place: guest.place_with(host.name(), images)?,
                host,
            })
        };
        Ok(Self {
            alpha: side(alpha, Images::AsDescribed)?,
            beta: side(beta, Images::OldData)?,
            hosts,
            guest,
        })
    }

    /// Their common folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.hosts.dir()
    }

    /// Starts the guest at the first host, and waits until it works.
    ///
    /// # Errors
    /// It does not come up.
    pub fn boot(&self) -> Result<Qemu> {
        let qemu = self.alpha.start(Start::Boot)?;
        self.guest.wait_ready()?;
        Ok(qemu)
    }

    /// Writes the guest files: the second host launches the guest when the first sends it, and the other way round.
    ///
    /// # Errors
    /// The disk.
    pub fn expect_launched(&self) -> Result<()> {
        self.expect_at(
            &self.beta,
            "alpha",
            Some(self.beta.place.argv(Start::Incoming)),
        )?;
        self.expect_at(
            &self.alpha,
            "beta",
            Some(self.alpha.place.argv(Start::Incoming)),
        )
    }

    /// Writes the guest files of two hosts on which an administrator starts QEMU.
    ///
    /// # Errors
    /// The disk.
    pub fn expect_waiting(&self) -> Result<()> {
        self.expect_at(&self.beta, "alpha", None)?;
        self.expect_at(&self.alpha, "beta", None)
    }

    /// Writes the guest file of `side`: QEMU comes up by `launch`, or is there already.
    ///
    /// # Errors
    /// The disk.
    pub fn expect_at(&self, side: &Side, from: &str, launch: Option<Vec<String>>) -> Result<()> {
        let mut table = Table::new();
        let mut set = |key: &str, value: Value| table.insert(key.into(), value);
        set("name", self.guest.name().into());
        set("driver", "qemu".into());
        set("qmp", side.place.qmp_path().display().to_string().into());
        set("from", vec![from].into());
        if let Some(launch) = launch {
            set("launch", launch.into());
        }
        let shared = self.guest.shared_disks().into_iter().map(|node| {
            let mut disk = Table::new();
            disk.insert("node".into(), node.into());
            disk.insert("mode".into(), "shared".into());
            Value::Table(disk)
        });
        set("disk", shared.collect::<Vec<_>>().into());
        side.host.write_guest(self.guest.name(), &table)?;
        Ok(())
    }

    /// Moves the guest from one side to the other and checks all that must be true then; says how it went.
    ///
    /// # Errors
    /// What is not true.
    pub fn move_guest(
        &self,
        (from, to): (&Side, &Side),
        agent: &Agent,
        more: &[&str],
    ) -> Result<Moved> {
        let left = self.guest.running_pid()?;
        let done = from.host.migrate(self.guest.name(), agent.port, more)?;
        let report = committed(&done, agent)?;
        self.arrived(left, to, &done, report)
    }

    /// What must be true of a guest that left process `left` and went to `to`.
    ///
    /// # Errors
    /// What is not true.
    pub fn arrived(&self, left: u32, to: &Side, done: &Finished, report: Json) -> Result<Moved> {
        let beats = self.guest.beats();
        let pid = beats.wait_for_other(&self.known_pids(left), BEAT_LIMIT)?;
        beats.wait_for_from(pid, 200, BEAT_LIMIT)?;
        ensure!(!is_alive(left), "the source QEMU {left} was not ended");
        let here = self.incoming_at(to);
        ensure!(here == [pid], "{pid} beats, and {here:?} are there");
        self.guest.verify_now()?;
        println!("{}", summary(&done.stderr));
        Ok(Moved { pid, report })
    }

    /// Processes that have beaten so far, but for those that came after `left`.
    fn known_pids(&self, left: u32) -> Vec<u32> {
        let mut pids = self.guest.beats().pids();
        let last = pids.iter().rposition(|pid| *pid == left);
        pids.truncate(last.map_or(0, |last| last + 1));
        pids
    }

    /// Says whether all beats so far are one sequence, in `boots` boots, and prints it.
    ///
    /// # Errors
    /// They are not.
    pub fn unbroken(&self, boots: usize) -> Result<crate::lab::BeatReport> {
        let report = self.guest.beats().report(boots)?;
        println!("{report}");
        self.guest.check_no_corrupt()?;
        Ok(report)
    }

    /// What must be true after a migration that did not commit: the guest beats on where it was, nothing is left of it
    /// at the other side, and it is whole.
    ///
    /// # Errors
    /// What is not true.
    pub fn stayed(&self, pid: u32, to: &Side) -> Result<()> {
        ensure!(self.guest.running_pid()? == pid, "another process beats");
        self.guest.wait_for_beats(100)?;
        self.nothing_at(to)?;
        self.guest.check_no_corrupt()
    }

    /// Processes that were started at `side` to receive the guest, and live.
    fn incoming_at(&self, side: &Side) -> Vec<u32> {
        let folder = side.place.folder().display().to_string();
        let mine = |words: &str| words.contains(&folder) && words.contains("-incoming");
        let all = processes().into_iter();
        all.filter(|(_, words)| mine(words))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Waits until no QEMU of the guest is at `side`, and no run-time file of its agent.
    ///
    /// # Errors
    /// What is left there.
    pub fn nothing_at(&self, side: &Side) -> Result<()> {
        let began = Instant::now();
        loop {
            let here = self.incoming_at(side).into_iter();
            let mut left: Vec<String> = here.map(|pid| format!("QEMU {pid}")).collect();
            left.extend(leavings(&side.host.path("state")));
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                began.elapsed() < END_LIMIT,
                "left at {}: {}",
                side.host.name(),
                left.join(", ")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A guest that has arrived.
#[derive(Debug)]
pub struct Moved {
    /// Process that runs it now.
    pub pid: u32,
    /// The `--json` object.
    pub report: Json,
}

/// A hook script that keeps a phase from going on.
#[derive(Debug)]
pub struct Hold {
    script: PathBuf,
    reached: PathBuf,
    released: PathBuf,
}

impl Side {
    /// Starts QEMU here, on the host's network.
    ///
    /// # Errors
    /// It does not come up.
    pub fn start(&self, how: Start) -> Result<Qemu> {
        self.host.run(|| self.place.start(how))
    }

    /// From now on the agent of this host stops at `phase`, until the hold is released.
    ///
    /// # Errors
    /// The disk.
    pub fn hold_at(&self, phase: &str) -> Result<Hold> {
        let file = |end: &str| self.host.path(&format!("hold-{phase}.{end}"));
        let hold = Hold {
            script: self.host.path("hooks").join(phase),
            reached: file("reached"),
            released: file("released"),
        };
        for old in [&hold.reached, &hold.released] {
            if old.exists() {
                fs::remove_file(old)?;
            }
        }
        let script = format!(
            "#!/bin/sh\n: >'{}'\nuntil [ -e '{}' ]; do sleep 0.02; done\n",
            hold.reached.display(),
            hold.released.display()
        );
        fs::write(&hold.script, script)?;
        fs::set_permissions(&hold.script, fs::Permissions::from_mode(0o755))?;
        Ok(hold)
    }
}

impl Hold {
    /// Waits until the phase is held.
    ///
    /// # Errors
    /// It is not reached while `migration` runs.
    pub fn wait_reached(&self, migration: &mut Running) -> Result<()> {
        migration.wait_for("the held phase", PHASE_LIMIT, |_, _| {
            self.reached.exists().then_some(())
        })
    }

    /// Lets the phase go on, and removes the hook.
    ///
    /// # Errors
    /// The disk.
    pub fn release(self) -> Result<()> {
        fs::remove_file(&self.script)?;
        fs::write(&self.released, "")?;
        Ok(())
    }
}

/// Waits until `migration` says that it is in `phase`.
///
/// # Errors
/// It ends first.
pub fn wait_phase(migration: &mut Running, phase: &str) -> Result<()> {
    let said = format!(" {phase}, round ");
    migration.wait_for(phase, PHASE_LIMIT, |_, err| {
        err.contains(&said).then_some(())
    })
}

/// The `--json` object of a migration that must have been committed.
///
/// # Errors
/// It was not.
pub fn committed(done: &Finished, agent: &Agent) -> Result<Json> {
    let there = || {
        format!(
            "{}\n--- destination\n{}",
            done.stderr,
            agent.process.stderr()
        )
    };
    ensure!(done.code() == 0, "exit code {}:\n{}", done.code(), there());
    let report = done.json()?;
    ensure!(report["outcome"] == "committed", "{report}");
    Ok(report)
}

/// The `--json` object of a migration that must have ended with `code` and `outcome`.
///
/// # Errors
/// It ended otherwise.
pub fn ended(done: &Finished, code: i32, outcome: &str) -> Result<Json> {
    ensure!(
        done.code() == code,
        "exit code {}:\n{}",
        done.code(),
        done.stderr
    );
    println!("{}", done.stderr);
    let report = done.json()?;
    ensure!(report["outcome"] == outcome, "{report}");
    Ok(report)
}

/// Waits until process `pid` is gone.
///
/// # Errors
/// It stays.
pub fn wait_gone(pid: u32) -> Result<()> {
    let began = Instant::now();
    while is_alive(pid) {
        ensure!(began.elapsed() < END_LIMIT, "process {pid} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether process `pid` runs: a zombie that its parent has yet to take does not.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest.trim_start());
    !state.starts_with('Z')
}

/// Each process with its command line.
fn processes() -> Vec<(u32, String)> {
    let list = fs::read_dir("/proc").into_iter().flatten().flatten();
    list.filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let words = fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&words).replace('\0', " ")))
    })
    .filter(|(pid, words)| !words.is_empty() && is_alive(*pid))
    .collect()
}

/// Files of a state folder that only a migration under way has: not journals, locks, logs, and the agent's own socket.
fn leavings(state: &Path) -> Vec<String> {
    const KEPT: [&str; 7] = [
        "register",
        "lock",
        "source",
        "destination",
        "command",
        "log",
        "dst.sock",
    ];
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = vec![state.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path.display().to_string();
            if path.is_dir() {
                folders.push(path);
            } else if !KEPT.iter().any(|kept| name.ends_with(kept)) {
                found.push(name);
            }
        }
    }
    found
}

/// The part of a source agent's output that a person reads at the end.
fn summary(stderr: &str) -> &str {
    stderr.rfind(" has moved to ").map_or(stderr, |at| {
        let line = stderr[..at].rfind('\n').map_or(0, |end| end + 1);
        &stderr[line..]
    })
}

/// Bytes that a file takes on its disk.
///
/// # Errors
/// It is not there.
pub fn allocated(path: &Path) -> Result<u64> {
    let meta = fs::metadata(path).with_context(|| path.display().to_string())?;
    Ok(meta.blocks() * 512)
}
