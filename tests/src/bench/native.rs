//! QEMU's own migration of a guest of the lab, as an administrator would set it up: TLS, multifd, zstd, mirrored disks.
//!
//! Owns the monitor commands on both sides. The order is libvirt's: disks are mirrored to an export of the destination,
//! then memory moves; while the guest is paused before the switch the mirrors end, then the migration goes on, and the
//! destination runs by itself as soon as it is loaded.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::harness::qemu::Side;
use crate::lab::Qemu;

const RAM_PORT: u16 = 7500;
const DISK_PORT: u16 = 7501;
const CREDENTIALS: &str = "tls0";
/// Connections of multifd: more than cores are of no use.
const CHANNELS: u32 = 4;
/// Between two looks at a migration; the answer to the last one costs as much.
const POLL: Duration = Duration::from_millis(5);

/// How QEMU sends memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// One TLS connection.
    Tls,
    /// Several.
    MultifdTls,
    /// Several, and pages compressed with zstd.
    MultifdZstdTls,
}

impl Variant {
    const fn is_multifd(self) -> bool {
        match self {
            Self::Tls => false,
            Self::MultifdTls | Self::MultifdZstdTls => true,
        }
    }
}

/// One side of a migration.
#[derive(Debug, Clone, Copy)]
pub struct Party<'a> {
    /// Where.
    pub side: &'a Side,
    /// The QEMU there; at the destination started with `-incoming defer`, without `-S`.
    pub qemu: &'a Qemu,
}

/// A migration to be made.
#[derive(Debug)]
pub struct Migration<'a> {
    /// How.
    pub variant: Variant,
    /// From where.
    pub source: Party<'a>,
    /// To where.
    pub target: Party<'a>,
    /// Node names of the disks that move too.
    pub disks: &'a [&'a str],
    /// Whether a write of the guest waits until the mirror has it: QEMU's `write-blocking`. In the background a mirror never
    /// becomes ready where there is no moment without a write under way.
    pub writes_wait: bool,
    /// Longest stop.
    pub downtime: Duration,
    /// When it is given up.
    pub limit: Duration,
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// From the first mirror to the end.
    pub total: Duration,
    /// Pages sent to pages there are.
    pub sent_to_distinct: f64,
}

impl Migration<'_> {
    /// Makes it.
    ///
    /// # Errors
    /// It fails, or takes longer than its limit.
    pub fn run(&self) -> Result<Moved> {
        self.prepare(self.source, "client")?;
        self.prepare(self.target, "server")?;
        let to = format!("tcp:{}:{RAM_PORT}", self.address());
        self.target.ask("migrate-incoming", json!({ "uri": to }))?;
        let began = Instant::now();
        self.mirror(began)?;
        self.source.ask("migrate", json!({ "uri": to }))?;
        self.follow(began)
    }

    const fn address(&self) -> Ipv4Addr {
        self.target.side.host.address()
    }

    fn prepare(&self, party: Party<'_>, endpoint: &str) -> Result<()> {
        // QEMU wants "key encipherment" in certificates, which TLS 1.3 has no use for: its own check is off, the peer's is on.
        party.ask(
            "object-add",
            json!({ "qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": party.tls_folder()?,
                "endpoint": endpoint, "verify-peer": true, "sanity-check": false }),
        )?;
        let mut capabilities = vec![
            json!({ "capability": "pause-before-switchover", "state": !self.disks.is_empty() }),
        ];
        let mut parameters = json!({ "tls-creds": CREDENTIALS, "max-bandwidth": 0,
            "downtime-limit": u64::try_from(self.downtime.as_millis())? });
        if endpoint == "client" {
            parameters["tls-hostname"] = self.address().to_string().into();
        }
        if self.variant.is_multifd() {
            capabilities.push(json!({ "capability": "multifd", "state": true }));
            parameters["multifd-channels"] = CHANNELS.into();
        }
        if self.variant == Variant::MultifdZstdTls {
            parameters["multifd-compression"] = "zstd".into();
        }
        let capabilities = json!({ "capabilities": capabilities });
        party.ask("migrate-set-capabilities", capabilities)?;
        party.ask("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Copies the disks, and keeps the copies up to date.
    fn mirror(&self, began: Instant) -> Result<()> {
        if self.disks.is_empty() {
            return Ok(());
        }
        let server = json!({ "host": self.address(), "port": DISK_PORT.to_string() });
        let address = json!({ "type": "inet", "data": server });
        self.target.ask(
            "nbd-server-start",
            json!({ "addr": address, "tls-creds": CREDENTIALS }),
        )?;
        for disk in self.disks {
            self.target.ask(
                "block-export-add",
                json!({ "type": "nbd", "id": format!("export-{disk}"), "node-name": disk,
                    "name": disk, "writable": true }),
            )?;
            let far = json!({ "driver": "nbd", "export": disk, "tls-creds": CREDENTIALS,
                "tls-hostname": self.address(),
                "server": { "type": "inet", "host": self.address(), "port": DISK_PORT.to_string() } });
            self.source.ask(
                "blockdev-add",
                json!({ "driver": "raw", "node-name": far_node(disk), "file": far }),
            )?;
            self.source.ask(
                "blockdev-mirror",
                json!({ "job-id": job(disk), "device": disk, "target": far_node(disk), "sync": "full",
                    "copy-mode": if self.writes_wait { "write-blocking" } else { "background" } }),
            )?;
        }
        self.wait(began, |jobs| jobs.iter().all(|job| job["ready"] == true))
    }

    /// The guest is paused: the mirrors are complete, and the images belong to the destination.
    fn end_mirrors(&self, began: Instant) -> Result<()> {
        for disk in self.disks {
            self.source
                .ask("block-job-cancel", json!({ "device": job(disk) }))?;
        }
        self.wait(began, <[Value]>::is_empty)?;
        for disk in self.disks {
            let node = json!({ "node-name": far_node(disk) });
            self.source.ask("blockdev-del", node)?;
        }
        self.target.ask("nbd-server-stop", json!({}))?;
        self.source
            .ask("migrate-continue", json!({ "state": "pre-switchover" }))?;
        Ok(())
    }

    /// Waits until the block jobs are as `done` wants them.
    fn wait(&self, began: Instant, done: impl Fn(&[Value]) -> bool) -> Result<()> {
        loop {
            let jobs = self.source.ask("query-block-jobs", json!({}))?;
            if done(jobs.as_array().context("no list of jobs")?) {
                return Ok(());
            }
            self.check(began)?;
            thread::sleep(POLL);
        }
    }

    fn follow(&self, began: Instant) -> Result<Moved> {
        let mut switched = false;
        loop {
            let state = self.source.ask("query-migrate", json!({}))?;
            match state["status"].as_str().unwrap_or_default() {
                "completed" => return moved(&state, began.elapsed()),
                "failed" | "cancelled" => bail!("QEMU's migration failed: {state}"),
                "pre-switchover" if !switched => {
                    self.end_mirrors(began)?;
                    switched = true;
                }
                _ => {
                    self.check(began)?;
                    thread::sleep(POLL);
                }
            }
        }
    }

    fn check(&self, began: Instant) -> Result<()> {
        ensure!(
            began.elapsed() < self.limit,
            "did not end in {:?}",
            self.limit
        );
        Ok(())
    }
}

impl Party<'_> {
    fn ask(&self, command: &str, arguments: Value) -> Result<Value> {
        self.qemu.qmp().execute(command, arguments)
    }

    /// The host's identity under the names that QEMU looks for.
    fn tls_folder(&self) -> Result<PathBuf> {
        let (identity, folder) = (
            self.side.host.path("identity"),
            self.side.host.path("qemu-tls"),
        );
        fs::create_dir_all(&folder)?;
        let files = [
            ("ca.pem", "ca-cert.pem"),
            ("cert.pem", "server-cert.pem"),
            ("key.pem", "server-key.pem"),
            ("cert.pem", "client-cert.pem"),
            ("key.pem", "client-key.pem"),
        ];
        for (from, to) in files {
            fs::copy(identity.join(from), folder.join(to)).context(to)?;
        }
        Ok(folder)
    }
}

fn moved(state: &Value, total: Duration) -> Result<Moved> {
    let ram = &state["ram"];
    let number = |name: &str| ram[name].as_f64().with_context(|| format!("{name}: {ram}"));
    let pages = number("total")? / number("page-size")?;
    Ok(Moved {
        total,
        sent_to_distinct: (number("normal")? + number("duplicate")?) / pages,
    })
}

fn job(disk: &str) -> String {
    format!("mirror-{disk}")
}

fn far_node(disk: &str) -> String {
    format!("far-{disk}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_sent_are_compared_with_pages_there_are() {
        let state =
            json!({ "ram": { "total": 40_960, "page-size": 4096, "normal": 9, "duplicate": 6 } });
        let moved = moved(&state, Duration::ZERO).unwrap();
        assert!((moved.sent_to_distinct - 1.5).abs() < 1e-9);
        assert!(super::moved(&json!({}), Duration::ZERO).is_err());
    }
}
