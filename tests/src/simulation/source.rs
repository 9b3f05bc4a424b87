//! The source's driver on a simulated guest.
//!
//! Owns nothing but the translation: each call of the engine is one effect on the world, which may fail, strike down the agent,
//! or both.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;
use vmferry_common::process::ProcessIdentity;
use vmferry_hypervisor::open::Leftovers;
use vmferry_hypervisor::{
    GuestError, GuestLife, GuestPaused, MarkLog, PauseError, RegionReader, RegionWriter,
    SavingDeviceState, Settlement, SourceGuest, Taken, TrackingLeft,
};
use vmferry_proto::geometry::Run;
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::{GuestName, RegionId};
use vmferry_proto::spec::{GuestSpec, RegionKind, RegionSpec, RunState};

use super::facts::VmId;
use super::guest::{Vm, VmState};
use super::plan::{Class, Flaw, Plan};
use super::tracking::Tracking;
use super::world::{Failed, Node, State};

/// A simulated guest at the source.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) node: Node,
    vm: VmId,
    pub(super) spec: GuestSpec,
    process: ProcessIdentity,
    life: watch::Receiver<GuestLife>,
    pub(super) tracking: Tracking,
    /// Count of starts at the pause.
    paused_at: Option<u64>,
}

/// What the plan's guest is.
pub(super) fn spec(plan: &Plan, name: &GuestName, run_state: RunState) -> GuestSpec {
    let regions = plan.regions.iter().enumerate().map(|(at, (kind, len))| {
        let word = match kind {
            RegionKind::Memory => "ram",
            RegionKind::Disk => "disk",
        };
        RegionSpec {
            id: RegionId(u16::try_from(at).unwrap_or(u16::MAX)),
            name: format!("{word}{at}"),
            kind: *kind,
            len: *len,
        }
    });
    GuestSpec {
        name: name.clone(),
        uuid: None,
        driver: "sim".to_owned(),
        hypervisor_version: "1".to_owned(),
        machine: "simulated".to_owned(),
        cpu_model: "simulated".to_owned(),
        vcpus: 1,
        run_state,
        regions: regions.collect(),
        shared_disks: Vec::new(),
        devices: Vec::new(),
    }
}

pub(super) fn process(state: &mut State, vm: VmId) -> ProcessIdentity {
    let host = state.vm(vm).map(|vm| vm.host);
    ProcessIdentity {
        pid: 1000 + vm.0,
        start_ticks: u64::from(vm.0),
        boot_id: host.map_or_else(String::new, |host| state.boot_id(host)),
    }
}

/// An effect that failed, as the hypervisor would put it.
pub(super) fn refused(_failed: Failed) -> GuestError {
    GuestError::Refused {
        command: "simulated order".to_owned(),
        answer: "it failed".to_owned(),
    }
}

pub(super) fn gone() -> GuestError {
    GuestError::Gone("simulated".to_owned())
}

impl Source {
    /// Attaches to the guest of this host.
    pub(super) async fn attach(
        node: &Node,
        name: &GuestName,
        leftovers: Leftovers,
    ) -> Result<Self, GuestError> {
        let host = node.host;
        let found = node
            .effect(Class::Control, |state| {
                let there = |vm: &&mut Vm| {
                    vm.host == host && matches!(vm.state, VmState::Running | VmState::Paused)
                };
                let vm = state.vms.iter_mut().find(there)?;
                // What an earlier agent left.
                match leftovers {
                    Leftovers::Remove => vm.marks.stop(),
                    Leftovers::KeepTracking => {}
                }
                let (id, life) = (vm.id, vm.life.subscribe());
                let runs = vm.state == VmState::Running;
                if state.plan.flaw == Some(Flaw::ResumesAtAttach) {
                    state.start(&node.world, id);
                }
                let run_state = if runs {
                    RunState::Running
                } else {
                    RunState::Paused
                };
                let spec = spec(&state.plan, name, run_state);
                Some((id, life, spec, process(state, id)))
            })
            .await;
        let (vm, life, spec, process) = found.map_err(refused)?.ok_or_else(gone)?;
        Ok(Self {
            node: node.clone(),
            vm,
            tracking: Tracking::new(spec.regions.iter().map(|region| region.len)),
            spec,
            process,
            life,
            paused_at: None,
        })
    }

    /// Something with the guest, if its process is there.
    pub(super) async fn order<T>(&self, what: impl FnOnce(&mut Vm) -> T) -> Result<T, GuestError> {
        order(&self.node, self.vm, what).await
    }

    /// Returns when no device transfer of now is in flight any more.
    async fn drained(&self) {
        let newest = {
            let mut state = self.node.world.state();
            state.vm(self.vm).map_or(0, |vm| vm.newest_transfer())
        };
        loop {
            let lands = {
                let mut state = self.node.world.state();
                state.vm(self.vm).is_some_and(|vm| vm.has_until(newest))
            };
            if !lands {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[async_trait]
impl SourceGuest for Source {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn reader(&self, region: RegionId) -> Option<Arc<dyn RegionReader>> {
        self.spec.region(region)?;
        Some(Arc::new(Region::new(&self.node, self.vm, region)))
    }

    async fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.begin_tracking().await
    }

    fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.tracking.keep_marks(log);
    }

    fn tracking(&self) -> Option<TrackingLeft> {
        self.tracking.left()
    }

    async fn resume_tracking(&mut self, left: &TrackingLeft) -> Result<(), GuestError> {
        self.go_on_tracking(left).await
    }

    async fn stop_tracking(&mut self) -> Result<(), GuestError> {
        self.end_tracking().await
    }

    async fn take_dirty(&mut self, region: RegionId) -> Result<Taken, GuestError> {
        self.take(region).await
    }

    async fn settle(&mut self, region: RegionId, outcome: Settlement) -> Result<(), GuestError> {
        match outcome {
            Settlement::Acknowledged => self.acknowledge(region).await,
            // It is owed already.
            Settlement::PutBack => Ok(()),
        }
    }

    async fn io_barrier(&mut self) -> Result<Duration, GuestError> {
        let began = Instant::now();
        self.order(|_| ()).await?;
        if self.node.world.state().plan.flaw != Some(Flaw::SkipsBarrier) {
            self.drained().await;
        }
        Ok(began.elapsed())
    }

    async fn run_state(&mut self) -> Result<RunState, GuestError> {
        let state = self.order(|vm| vm.state).await?;
        match state {
            VmState::Running => Ok(RunState::Running),
            VmState::Paused | VmState::Staged | VmState::Incoming => Ok(RunState::Paused),
            VmState::ShutDown | VmState::Gone => Err(GuestError::ShutDown("simulated".to_owned())),
        }
    }

    async fn pause(&mut self) -> Result<GuestPaused, PauseError> {
        let id = self.vm;
        let before = self.spec.run_state;
        let stopped = self
            .node
            .effect(Class::Control, |state| state.stop(id))
            .await;
        let stopped = stopped.map_err(|failed| PauseError {
            before: (failed == Failed::After).then_some(before),
            source: refused(failed),
        })?;
        let (ran, starts) = stopped.ok_or_else(|| PauseError {
            before: Some(before),
            source: gone(),
        })?;
        self.paused_at = Some(starts);
        self.drained().await;
        if ran && self.node.world.state().take_reset() {
            return Err(PauseError {
                before: Some(before),
                source: GuestError::Rebooted,
            });
        }
        Ok(GuestPaused::confirmed_by_driver(if ran {
            RunState::Running
        } else {
            RunState::Paused
        }))
    }

    async fn still_paused(&mut self, _paused: &GuestPaused) -> Result<(), GuestError> {
        let (state, starts) = self.order(|vm| (vm.state, vm.starts)).await?;
        if state == VmState::Paused && Some(starts) == self.paused_at {
            return Ok(());
        }
        Err(GuestError::Touched("simulated".to_owned()))
    }

    async fn begin_device_state(
        &mut self,
        paused: &GuestPaused,
    ) -> Result<SavingDeviceState, GuestError> {
        self.still_paused(paused).await?;
        let (node, vm) = (self.node.clone(), self.vm);
        Ok(async move { order(&node, vm, |vm| vm.device_state()).await }.boxed())
    }

    async fn resume(&mut self, _permit: RunPermit, to: RunState) -> Result<(), GuestError> {
        self.paused_at = None;
        if to == RunState::Paused {
            return Ok(());
        }
        let (id, world) = (self.vm, self.node.world.clone());
        let started = self
            .node
            .effect(Class::Control, |state| state.start(&world, id))
            .await;
        if started.map_err(refused)? {
            Ok(())
        } else {
            Err(gone())
        }
    }

    async fn release(&mut self) -> Result<(), GuestError> {
        let id = self.vm;
        let released = self.node.effect(Class::Control, |state| {
            state.end_vm(id, "released", false);
        });
        released.await.map_err(refused)
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.life.clone()
    }

    fn process(&self) -> ProcessIdentity {
        self.process.clone()
    }
}

/// Something with the guest `id`, if its process is there.
async fn order<T>(node: &Node, id: VmId, what: impl FnOnce(&mut Vm) -> T) -> Result<T, GuestError> {
    let done = node.effect(Class::Control, |state| {
        state.vm(id).filter(|vm| vm.is_alive()).map(what)
    });
    done.await.map_err(refused)?.ok_or_else(gone)
}

/// A region of a simulated guest, in the hands of one agent.
#[derive(Debug)]
pub(super) struct Region {
    node: Node,
    vm: VmId,
    region: usize,
}

impl Region {
    pub(super) fn new(node: &Node, vm: VmId, region: RegionId) -> Self {
        Self {
            node: node.clone(),
            vm,
            region: usize::from(region.0),
        }
    }

    async fn touch<T>(&self, what: impl FnOnce(&mut Vm, usize) -> T) -> Result<T, GuestError> {
        let (id, region) = (self.vm, self.region);
        let done = self.node.effect(Class::Data, |state| {
            state
                .vm(id)
                .filter(|vm| vm.is_alive())
                .map(|vm| what(vm, region))
        });
        done.await.map_err(refused)?.ok_or_else(gone)
    }

    /// Whether each write arrives.
    fn keeps(&self) -> impl FnMut() -> bool + use<> {
        let mut state = self.node.world.state();
        let loses = state.plan.flaw == Some(Flaw::LosesWrites);
        let mut dice = super::dice::Dice::new(state.dice.roll(), 6);
        move || !(loses && dice.chance(2))
    }
}

#[async_trait]
impl RegionReader for Region {
    async fn read(&self, runs: &[Run], buf: &mut [u8]) -> Result<(), GuestError> {
        self.touch(|vm, region| vm.read(region, runs, buf)).await
    }
}

#[async_trait]
impl RegionWriter for Region {
    async fn write(&self, runs: &[Run], data: &[u8]) -> Result<(), GuestError> {
        let keeps = self.keeps();
        self.touch(|vm, region| vm.write(region, runs, Some(data), keeps))
            .await
    }

    async fn zero(&self, runs: &[Run]) -> Result<(), GuestError> {
        let keeps = self.keeps();
        self.touch(|vm, region| vm.write(region, runs, None, keeps))
            .await
    }

    async fn flush(&self) -> Result<(), GuestError> {
        let id = self.vm;
        let flushed = self.node.effect(Class::Data, |state| {
            if state.plan.flaw != Some(Flaw::ClaimsFlushed) {
                state.flush(id);
            }
        });
        flushed.await.map_err(refused)
    }
}
