//! Bringing a migration to the two moments at which only the destination's register knows the outcome,
//! and writing what it would say.
//!
//! Owns the way there: a gate before the load, and a proxy that loses or holds one direction while it opens.

use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use vmferry_common::ownership;
use vmferry_common::state::StateDir;
use vmferry_proto::handover::DestinationState;
use vmferry_proto::spec::RunState;

use super::hosts::Host;
use super::process::Running;
use super::proxy::Proxy;
use super::role::Role;
use super::sim::SimGuest;
use super::stage::{Stage, soon};

const LIMIT: Duration = Duration::from_secs(120);
/// What a test of these moments migrates with: the link is slow on purpose.
const PATIENT: [&str; 2] = ["--max-downtime", "10s"];
/// Longer than anything that a test does before it cuts the link for good.
const HELD_BACK: Duration = Duration::from_secs(4);

/// COMMITTING is durable at the source, and its `Commit` was lost on the way.
///
/// # Panics
/// It does not come to that.
#[must_use]
pub fn commit_into_the_void(stage: &Stage, proxy: &Proxy) -> Running {
    let (gate, mut running) = at_the_load(stage, proxy);
    proxy.cut_there();
    open(gate);
    let seen = running.wait_for("COMMITTING", LIMIT, |_, _| {
        let owner = stage
            .alpha
            .ask(Role::Source, "owner", "web", &["--json"])
            .ok()?;
        (owner.json().ok()?["state"] == "COMMITTING").then_some(())
    });
    seen.unwrap_or_else(|error| panic!("{error:#}\n{}", stage.agent_log()));
    running
}

/// The guest runs at the destination, and the answer that says so is on its way for some seconds.
///
/// # Panics
/// It does not come to that.
#[must_use]
pub fn answer_held_back(stage: &Stage, guest: &SimGuest, proxy: &Proxy) -> Running {
    let (gate, running) = at_the_load(stage, proxy);
    proxy.delay_back(HELD_BACK);
    open(gate);
    assert!(soon(|| guest.runs_on(&stage.beta)), "{}", stage.agent_log());
    running
}

fn at_the_load(stage: &Stage, proxy: &Proxy) -> (super::scripts::Gate, Running) {
    let begin = || {
        let gate = stage.beta.gate("load")?;
        let mut running = stage.alpha.start_migrate("web", proxy.port(), &PATIENT)?;
        gate.wait_reached(&mut running)?;
        anyhow::Ok((gate, running))
    };
    begin().unwrap_or_else(|error| panic!("{error:#}\n{}", stage.agent_log()))
}

fn open(gate: super::scripts::Gate) {
    gate.remove()
        .unwrap_or_else(|error| panic!("the gate: {error:#}"));
}

/// Makes the journal of the destination `host` what it is between a durable OWNED and the start, of an attempt that is open there.
///
/// # Panics
/// None is.
pub fn write_owned(host: &Host, guest: &str) {
    let written = || {
        let state = StateDir::open(&host.path("state"))?;
        let file = ownership::destination_file(&state, &guest.parse()?);
        let mut record = file.read()?.context("no record")?;
        let DestinationState::Opened { attempt } = record.state else {
            bail!("{record:?}");
        };
        record.state = DestinationState::Owned {
            attempt,
            to: RunState::Running,
            started: false,
        };
        Ok(file.write(&record)?)
    };
    written().unwrap_or_else(|error: anyhow::Error| panic!("OWNED: {error:#}"));
}

/// Ends an agent as a crash would.
///
/// # Panics
/// It has ended already.
pub fn kill(running: Running) {
    let killed = running.signal(Signal::KILL);
    killed.unwrap_or_else(|error| panic!("the agent is gone: {error}"));
    let ended = running.wait(LIMIT);
    ended.unwrap_or_else(|error| panic!("{error:#}"));
}
