//! Two hosts, a destination agent, and embedded guests that are moved once each.
//!
//! Owns the round of every benchmark: a fresh guest, a migration, the proof that the copy is right, the end of the guest.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

use super::cpu::{CpuMeter, Watched};
use crate::harness::hosts::{Agent, MIGRATE_LIMIT};
use crate::harness::process::{Finished, Running};
use crate::harness::role::Programs;
use crate::harness::sim::{Beats, SimGuest, SimSpec};
use crate::harness::{Host, Hosts};
use crate::link::Link;

/// Beats to wait for behind a migration: the guest runs on.
const BEATS_AFTER: usize = 50;

/// Two hosts.
#[derive(Debug)]
pub struct Pair {
    _hosts: Hosts,
    /// Where guests start.
    pub alpha: Host,
    /// Where they go.
    pub beta: Host,
    /// The agent at `beta`.
    pub agent: Agent,
    count: u32,
}

/// One migration.
#[derive(Debug)]
pub struct Moved {
    /// What the source agent reported.
    pub report: Value,
    /// Beats of the guest's life.
    pub beats: Beats,
}

impl Pair {
    /// Hosts and agent, played by `executable`.
    ///
    /// # Errors
    /// The agent does not come up.
    pub fn new(executable: &str) -> anyhow::Result<Self> {
        let hosts = Hosts::new(Programs::played_by(Path::new(executable)))?;
        let ends = (hosts.host("alpha")?, hosts.host("beta")?);
        Self::between(hosts, ends)
    }

    /// As [`new`](Self::new), at the two ends of `link`.
    ///
    /// # Errors
    /// The agent does not come up.
    pub fn on_link(executable: &str, link: &Link) -> anyhow::Result<Self> {
        let hosts = Hosts::new(Programs::played_by(Path::new(executable)))?;
        let ends = (
            hosts.host_at("alpha", &link.alpha)?,
            hosts.host_at("beta", &link.beta)?,
        );
        Self::between(hosts, ends)
    }

    fn between(hosts: Hosts, (alpha, beta): (Host, Host)) -> anyhow::Result<Self> {
        let agent = beta.serve(&[])?;
        Ok(Self {
            _hosts: hosts,
            alpha,
            beta,
            agent,
            count: 0,
        })
    }

    /// Starts a fresh guest like `spec` at alpha; beta expects it.
    ///
    /// # Errors
    /// It does not come up.
    pub fn guest(&mut self, spec: &SimSpec) -> anyhow::Result<SimGuest> {
        self.count += 1;
        let spec = SimSpec {
            name: format!("{}-{}", spec.name, self.count),
            ..spec.clone()
        };
        let guest = SimGuest::start(spec, &self.alpha)?;
        guest.expect_at(&self.beta, &["alpha"])?;
        Ok(guest)
    }

    /// Moves a fresh guest like `spec` and checks all of it.
    ///
    /// # Errors
    /// It does not arrive, or not right.
    pub fn move_one(&mut self, spec: &SimSpec, options: &[&str]) -> anyhow::Result<Moved> {
        Ok(self.move_metered(spec, options)?.0)
    }

    /// The same, with the CPU time of both agents.
    ///
    /// # Errors
    /// As there.
    pub fn move_metered(
        &mut self,
        spec: &SimSpec,
        options: &[&str],
    ) -> anyhow::Result<(Moved, Duration)> {
        let guest = self.guest(spec)?;
        guest.wait_for_beats(BEATS_AFTER)?;
        let (source, meter) = self.start_metered(&guest, options)?;
        let done = source.wait(MIGRATE_LIMIT)?;
        let cpu = meter.used();
        Ok((self.conclude(&guest, &done)?, cpu))
    }

    /// Starts to move `guest`, and to count the CPU time of both agents.
    ///
    /// # Errors
    /// The agent cannot be started.
    pub fn start_metered(
        &self,
        guest: &SimGuest,
        options: &[&str],
    ) -> anyhow::Result<(Running, CpuMeter)> {
        let meter = CpuMeter::start();
        meter.watch(Watched::whole(self.agent.process.pid()));
        let source = self
            .alpha
            .start_migrate_to(guest.name(), &self.agent.to(), options)?;
        meter.watch(Watched::whole(source.pid()));
        Ok((source, meter))
    }

    /// The migration of `guest` has ended: checks that it runs at beta with the right content, and ends it.
    ///
    /// # Errors
    /// It does not, or something is wrong.
    pub fn conclude(&self, guest: &SimGuest, done: &Finished) -> anyhow::Result<Moved> {
        let said = || format!("{}\n{}", done.stderr, self.agent.process.stderr());
        ensure!(done.code() == 0, "exit code {}:\n{}", done.code(), said());
        let report = done.json()?;
        ensure!(report["outcome"] == "committed", "{report}");
        guest.wait_for_beats(BEATS_AFTER)?;
        let beats = guest.beats()?;
        guest.verify_on(&self.beta).with_context(said)?;
        beats.check()?;
        guest.end_on(&self.beta);
        Ok(Moved { report, beats })
    }
}

impl Moved {
    /// A time of the report, by its path (`"downtime_parts/pause_ms"`), in milliseconds.
    ///
    /// # Errors
    /// It is not there.
    pub fn millis(&self, path: &str) -> anyhow::Result<f64> {
        let value = self.report.pointer(&format!("/{path}"));
        value
            .and_then(Value::as_f64)
            .with_context(|| format!("no number at {path} in {}", self.report))
    }

    /// A size of the report, by its path.
    ///
    /// # Errors
    /// It is not there.
    pub fn bytes(&self, path: &str) -> anyhow::Result<u64> {
        let value = self.report.pointer(&format!("/{path}"));
        value
            .and_then(Value::as_u64)
            .with_context(|| format!("no size at {path} in {}", self.report))
    }

    /// Bytes of guest content, zero blocks left out, that the first round carried per second.
    ///
    /// # Errors
    /// The report has no round.
    pub fn goodput(&self) -> anyhow::Result<f64> {
        let took = Duration::from_secs_f64(self.millis("rounds/0/elapsed_ms")? / 1000.0);
        Ok(super::quinn::per_second(self.content()?, took))
    }

    /// Bytes of guest content, zero blocks left out, in the first round.
    ///
    /// # Errors
    /// The report has no round.
    pub fn content(&self) -> anyhow::Result<u64> {
        let (raw, zero) = (
            self.bytes("rounds/0/raw_bytes")?,
            self.bytes("rounds/0/zero_bytes")?,
        );
        raw.checked_sub(zero).context("more zero bytes than bytes")
    }

    /// From the last beat at the source to the first at the destination.
    ///
    /// # Errors
    /// There was no handover, or more than one.
    pub fn gap(&self) -> anyhow::Result<Duration> {
        match self.beats.handovers()[..] {
            [gap] => Ok(gap),
            ref other => anyhow::bail!("{} handovers instead of one", other.len()),
        }
    }
}
