//! The world that both agents work on: hosts, hypervisors, the log of facts, and the faults that strike.
//!
//! Owns everything that outlives an agent. An agent reaches it through a [`Node`], which is one life of an agent: once that is
//! over, nothing that its code still does has any effect, and nothing that it waits for ever comes. That is a kill at
//! exactly that effect, without ending the code's tasks one by one. Every effect passes [`Node::enter`] and
//! [`Node::leave`], so a fault can strike just before or just after each of them.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use vmferry_hypervisor::GuestLife;

use super::dice::Dice;
use super::facts::{DurableRecords, Fact, HostId, VmId, What};
use super::guest::{Vm, VmState};
use super::plan::{Class, Flaw, Link, Plan, Strike};
use super::storage::Disk;

/// How a hypervisor ends that was launched and not let go.
pub(super) const STAGED: &str = "its agent died before it was let go";

/// One of the two hosts.
#[derive(Debug)]
pub(super) struct Host {
    /// The life of the agent that is under way.
    epoch: Option<u64>,
    lives: u64,
    /// When the next agent may be started, and the host has power.
    pub(super) ready_at: Duration,
    /// Power cuts so far, as the boot id tells.
    boots: u32,
    /// Effects so far, by class.
    counts: [u64; Class::ALL.len()],
    /// Journal.
    pub(super) disk: Disk,
    /// The run folder.
    pub(super) run: Disk,
    /// The guest's disk images as they are on the platter, by region.
    pub(super) images: super::facts::Image,
}

/// What the lock protects.
#[derive(Debug)]
pub(super) struct State {
    pub(super) plan: Plan,
    facts: Vec<Fact>,
    hosts: [Host; 2],
    pub(super) vms: Vec<Vm>,
    /// For delays of effects.
    pub(super) dice: Dice,
    /// No packet passes before.
    pub(super) cut_until: Duration,
    pub(super) quiet: bool,
    pub(super) beta_is_lost: bool,
    now: Duration,
}

/// The world of one run.
pub(super) struct World {
    state: Mutex<State>,
    began: Instant,
    /// Raised when an agent, a host or the link changed.
    changes: watch::Sender<u64>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("World")
    }
}

/// What an effect was answered, where it did not happen or its answer is lost.
#[derive(Debug)]
pub(super) enum Stop {
    /// The agent is dead: nobody gets an answer.
    Dead,
    /// It fails; whether it happened is the caller's to know.
    Failed,
}

impl World {
    /// A world before anything has happened. Needs a tokio runtime.
    pub(super) fn new(plan: Plan) -> Arc<Self> {
        let host = |_| Host {
            epoch: None,
            lives: 0,
            ready_at: Duration::ZERO,
            boots: 0,
            counts: [0; Class::ALL.len()],
            disk: Disk::new(plan.flaw == Some(Flaw::LyingSync)),
            run: Disk::default(),
            images: Vec::new(),
        };
        Arc::new(Self {
            state: Mutex::new(State {
                dice: Dice::new(plan.seed, 2),
                facts: Vec::new(),
                hosts: [HostId::Alpha, HostId::Beta].map(host),
                vms: Vec::new(),
                cut_until: Duration::ZERO,
                quiet: false,
                beta_is_lost: false,
                now: Duration::ZERO,
                plan,
            }),
            began: Instant::now(),
            changes: watch::Sender::new(0),
        })
    }

    /// The state, its clock set.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.now = self.began.elapsed();
        state
    }

    /// When the run began.
    pub(super) const fn began(&self) -> Instant {
        self.began
    }

    /// Adds a line to the log.
    pub(super) fn note(&self, text: impl Into<String>) {
        self.state().tell(What::Note(text.into()));
    }

    /// Tells whoever waits that something changed.
    pub(super) fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// The log so far.
    pub(super) fn facts(&self) -> Vec<Fact> {
        self.state().facts.clone()
    }

    /// Begins a life of the agent of `host`.
    pub(super) fn start_agent(self: &Arc<Self>, host: HostId) -> Node {
        let mut state = self.state();
        let this = state.host(host);
        this.lives += 1;
        let epoch = this.lives;
        this.epoch = Some(epoch);
        this.disk.unlock_all();
        state.tell(What::AgentStarted { host, life: epoch });
        Node {
            world: self.clone(),
            host,
            epoch,
        }
    }

    /// Returns when the agent of `host` may be started.
    pub(super) async fn until_ready(&self, host: HostId) {
        loop {
            let ready_at = self.state().host(host).ready_at;
            if self.began.elapsed() >= ready_at {
                return;
            }
            tokio::time::sleep_until(self.began + ready_at).await;
        }
    }

    /// Something strikes `host`.
    pub(super) fn strike(&self, host: HostId, strike: Strike) {
        self.state().strike(host, strike);
        self.changed();
    }
}

impl State {
    pub(super) const fn host(&mut self, id: HostId) -> &mut Host {
        let [alpha, beta] = &mut self.hosts;
        match id {
            HostId::Alpha => alpha,
            HostId::Beta => beta,
        }
    }

    pub(super) const fn now(&self) -> Duration {
        self.now
    }

    pub(super) fn tell(&mut self, what: What) {
        let at = self.now;
        self.facts.push(Fact { at, what });
    }

    pub(super) fn vm(&mut self, id: VmId) -> Option<&mut Vm> {
        self.vms.iter_mut().find(|vm| vm.id == id)
    }

    /// How the link is: without faults once these have stopped.
    pub(super) const fn link(&self) -> Link {
        if self.quiet {
            Link {
                delay_ms: self.plan.link.delay_ms,
                jitter_ms: 0,
                loss: 0,
                twice: 0,
            }
        } else {
            self.plan.link
        }
    }

    /// Boot id of a host.
    pub(super) fn boot_id(&mut self, host: HostId) -> String {
        format!("{host:?} {}", self.host(host).boots)
    }

    /// What both records of a host are after a power cut now.
    pub(super) fn durable_records(&mut self, host: HostId) -> DurableRecords {
        let disk = &self.host(host).disk;
        DurableRecords {
            source: disk.durable("source"),
            destination: disk.durable("destination"),
        }
    }

    fn lives(&self, host: HostId, epoch: u64) -> bool {
        let [alpha, beta] = &self.hosts;
        let host = match host {
            HostId::Alpha => alpha,
            HostId::Beta => beta,
        };
        host.epoch == Some(epoch)
    }

    pub(super) fn strike(&mut self, host: HostId, strike: Strike) {
        if self.quiet {
            return;
        }
        self.tell(What::Note(format!("fault at {host:?}: {strike:?}")));
        match strike {
            Strike::KillAgent(down) => self.kill_agent(host, down),
            Strike::KillBoth(down) => {
                self.kill_agent(HostId::Alpha, down);
                self.kill_agent(HostId::Beta, down / 2);
            }
            Strike::KillVm => self.kill_vms(host, "killed"),
            Strike::KillAgentAndVm(down) => {
                self.kill_agent(host, down);
                self.kill_vms(host, "killed");
            }
            Strike::KillAgentAndNotes(down) => {
                self.kill_agent(host, down);
                self.host(host).run = Disk::default();
            }
            Strike::Power(down) => self.cut_power(host, down),
            Strike::CutLink(time) => self.cut_until = self.cut_until.max(self.now + time),
            // It is the effect's own.
            Strike::Fail => {}
        }
    }

    fn kill_agent(&mut self, host: HostId, down: Duration) {
        let ready_at = self.now + down;
        self.end_staged(host);
        let host = self.host(host);
        host.epoch = None;
        host.ready_at = host.ready_at.max(ready_at);
    }

    /// What was launched and not let go ends with the agent that launched it.
    pub(super) fn end_staged(&mut self, host: HostId) {
        if self.plan.flaw == Some(Flaw::BeginsUnrecorded) {
            return;
        }
        let staged = |vm: &&Vm| vm.host == host && vm.state == VmState::Staged;
        let staged: Vec<VmId> = self.vms.iter().filter(staged).map(|vm| vm.id).collect();
        for id in staged {
            self.end_vm(id, STAGED, false);
        }
    }

    /// The agent of `host` ended by itself; the next one may come after `down`.
    pub(super) fn retire_agent(&mut self, host: HostId, down: Duration) {
        self.kill_agent(host, down);
    }

    fn kill_vms(&mut self, host: HostId, how: &'static str) {
        let there: Vec<VmId> = self
            .vms
            .iter()
            .filter(|vm| vm.host == host && vm.is_alive())
            .map(|vm| vm.id)
            .collect();
        for id in there {
            self.end_vm(id, how, true);
        }
    }

    pub(super) fn cut_power(&mut self, host: HostId, down: Duration) {
        self.kill_agent(host, down);
        self.kill_vms(host, "power cut");
        let mut dice = self.dice.clone();
        let this = self.host(host);
        this.boots += 1;
        this.disk.cut_power(&mut dice);
        this.run = Disk::default();
        self.dice = dice;
    }

    /// Ends a hypervisor; what its disk got and did not flush is lost.
    pub(super) fn end_vm(&mut self, id: VmId, how: &'static str, fault: bool) {
        let Some(vm) = self.vm(id).filter(|vm| vm.is_alive()) else {
            return;
        };
        vm.state = VmState::Gone;
        vm.in_flight.clear();
        vm.life.send_replace(GuestLife::Gone(how.to_owned()));
        self.tell(What::Ended { vm: id, how, fault });
    }

    /// The strikes that are due at this effect.
    fn trap(&mut self, host: HostId, class: Class, late: bool) -> Option<Strike> {
        if self.quiet {
            return None;
        }
        let count = self.host(host).counts[class as usize];
        let found = self.plan.traps.iter().find(|trap| {
            (trap.host, trap.class, trap.nth, trap.late) == (host, class, count, late)
        });
        let strike = found?.strike;
        self.strike(host, strike);
        Some(strike)
    }
}

/// One life of an agent.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) world: Arc<World>,
    pub(super) host: HostId,
    pub(super) epoch: u64,
}

impl Node {
    /// Whether it is not over.
    pub(super) fn is_alive(&self) -> bool {
        self.world.state().lives(self.host, self.epoch)
    }

    /// Returns when it is over.
    pub(super) async fn died(&self) {
        let mut changes = self.world.changes.subscribe();
        while self.is_alive() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// An effect is about to happen.
    pub(super) fn enter(&self, state: &mut State, class: Class) -> Result<(), Stop> {
        if !state.lives(self.host, self.epoch) {
            return Err(Stop::Dead);
        }
        state.host(self.host).counts[class as usize] += 1;
        let struck = state.trap(self.host, class, false);
        self.after(state, struck)
    }

    /// An effect has happened.
    pub(super) fn leave(&self, state: &mut State, class: Class) -> Result<(), Stop> {
        if !state.lives(self.host, self.epoch) {
            return Err(Stop::Dead);
        }
        let struck = state.trap(self.host, class, true);
        self.after(state, struck)
    }

    fn after(&self, state: &State, struck: Option<Strike>) -> Result<(), Stop> {
        if struck.is_some() {
            self.world.changed();
        }
        if !state.lives(self.host, self.epoch) {
            Err(Stop::Dead)
        } else if struck == Some(Strike::Fail) {
            Err(Stop::Failed)
        } else {
            Ok(())
        }
    }

    /// One effect, with the time that it takes. Never returns to an agent that is dead by then; `Err(true)` where it failed
    /// after it had happened.
    pub(super) async fn effect<T>(
        &self,
        class: Class,
        what: impl FnOnce(&mut State) -> T,
    ) -> Result<T, Failed> {
        let takes = self.world.state().takes(class);
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let done = self.effect_now(class, what);
        match done {
            Ok(done) => Ok(done),
            Err((Stop::Dead, _)) => std::future::pending().await,
            Err((Stop::Failed, failed)) => Err(failed),
        }
    }

    fn effect_now<T>(
        &self,
        class: Class,
        what: impl FnOnce(&mut State) -> T,
    ) -> Result<T, (Stop, Failed)> {
        let mut state = self.world.state();
        self.enter(&mut state, class)
            .map_err(|stop| (stop, Failed::Before))?;
        let done = what(&mut state);
        self.leave(&mut state, class)
            .map_err(|stop| (stop, Failed::After))?;
        Ok(done)
    }
}

/// An effect that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failed {
    /// It did not happen.
    Before,
    /// It happened all the same.
    After,
}

impl State {
    /// How long an effect takes: mostly no time that a clock of milliseconds shows.
    const fn takes(&mut self, class: Class) -> Duration {
        let per_mille = match class {
            Class::Journal | Class::Notes => 0,
            Class::Control => 300,
            Class::Data => 20,
        };
        if self.dice.chance(per_mille) {
            self.dice.millis(1, 8)
        } else {
            Duration::ZERO
        }
    }
}
