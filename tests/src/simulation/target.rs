//! The destination's driver on simulated hypervisors.
//!
//! Owns the translation of each call into one effect on the world, and the incarnations of the copies.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;
use vmferry_common::process::ProcessIdentity;
use vmferry_hypervisor::config::{SourceConfig, TargetConfig};
use vmferry_hypervisor::launch::LaunchJournal;
use vmferry_hypervisor::open::{CopyLeft, Hypervisors, Leftovers, Reopening, TargetOptions};
use vmferry_hypervisor::{
    GuestError, GuestLife, RegionWriter, SourceGuest, StartError, TargetGuest,
};
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::{Incarnation, RegionId};
use vmferry_proto::spec::{GuestSpec, RegionKind, RunState};

use super::facts::{Birth, VmId, What};
use super::guest::VmState;
use super::plan::{Class, Flaw};
use super::source::{Region, Source, gone, process, refused};
use super::world::{Failed, Node, State};

/// The hypervisors of a host, in the hands of one life of its agent.
#[derive(Debug)]
pub(super) struct SimHypervisors(pub(super) Node);

/// A hypervisor that waits for content, or has it.
#[derive(Debug)]
struct Target {
    node: Node,
    vm: VmId,
    spec: GuestSpec,
    incarnations: Vec<Incarnation>,
    process: ProcessIdentity,
    life: watch::Receiver<GuestLife>,
    journal: Arc<dyn LaunchJournal>,
}

impl Target {
    /// Launches a process, has it recorded and lets it go.
    async fn make(
        node: &Node,
        spec: &GuestSpec,
        journal: Arc<dyn LaunchJournal>,
    ) -> Result<Self, GuestError> {
        let made = Self::launch(node, spec, journal).await?;
        match made.begin().await {
            Ok(()) => Ok(made),
            Err(error) => {
                // A driver ends what it launched and cannot use.
                made.end_unasked();
                Err(error)
            }
        }
    }

    async fn launch(
        node: &Node,
        spec: &GuestSpec,
        journal: Arc<dyn LaunchJournal>,
    ) -> Result<Self, GuestError> {
        let made = node
            .effect(Class::Control, |state| {
                let vm = state.new_vm(node.host, Birth::Incoming);
                state.tell_birth(vm, Birth::Incoming);
                let life = state.vm(vm).map(|vm| vm.life.subscribe());
                Some((vm, process(state, vm), life?))
            })
            .await;
        if made.is_err() && node.is_alive() {
            node.world.state().end_staged(node.host);
        }
        let (vm, process, life) = made.map_err(refused)?.ok_or_else(gone)?;
        Ok(Self {
            node: node.clone(),
            vm,
            incarnations: (0..spec.regions.len())
                .map(|region| incarnation(vm, region))
                .collect(),
            spec: spec.clone(),
            process,
            life,
            journal,
        })
    }

    /// What was launched becomes a hypervisor, once it is recorded.
    async fn begin(&self) -> Result<(), GuestError> {
        let recorded = self.journal.record(&self.process).await?;
        if !recorded.names(&self.process) {
            return Err(gone());
        }
        let began = self.order(|state, id| {
            let vm = state.vm(id).filter(|vm| vm.state == VmState::Staged)?;
            vm.state = VmState::Incoming;
            Some(())
        });
        began.await?.ok_or_else(gone)
    }

    /// Nobody but the operating system takes part.
    fn end_unasked(&self) {
        if self.node.is_alive() {
            let mut state = self.node.world.state();
            state.end_vm(self.vm, "discarded", false);
        }
    }

    /// Attaches to the copy that an earlier agent left, if it is in the state that it is wanted in.
    async fn take_again(
        node: &Node,
        spec: &GuestSpec,
        left: &CopyLeft,
        journal: Arc<dyn LaunchJournal>,
    ) -> Result<Self, GuestError> {
        let fits: fn(VmState) -> bool = match left.purpose {
            Reopening::Fill => |state| state == VmState::Incoming,
            Reopening::Start => |state| matches!(state, VmState::Paused | VmState::Running),
        };
        let found = node
            .effect(Class::Control, |state| {
                let vm = of_process(state, &left.process)?;
                let found = state.vm(vm)?;
                Some((vm, found.state, found.life.subscribe()))
            })
            .await;
        let (vm, state, life) = found.map_err(refused)?.ok_or_else(gone)?;
        if !fits(state) {
            return Err(GuestError::Refused {
                command: "attaching again".to_owned(),
                answer: format!("it is {state:?}"),
            });
        }
        node.world.note(match left.purpose {
            Reopening::Fill => "the destination's agent fills its copy on",
            Reopening::Start => "the destination's agent takes its loaded copy again",
        });
        Ok(Self {
            node: node.clone(),
            vm,
            spec: spec.clone(),
            incarnations: left.incarnations.clone(),
            process: left.process.clone(),
            life,
            journal,
        })
    }

    /// Something with the process, if it is there.
    async fn order<T>(&self, what: impl FnOnce(&mut State, VmId) -> T) -> Result<T, Failure> {
        let id = self.vm;
        let done = self.node.effect(Class::Control, |state| {
            let lives = state.vm(id).is_some_and(|vm| vm.is_alive());
            lives.then(|| what(state, id))
        });
        done.await.map_err(Failure::Refused)?.ok_or(Failure::Gone)
    }
}

/// Why an order came to nothing.
#[derive(Debug)]
enum Failure {
    Refused(Failed),
    Gone,
}

impl From<Failure> for GuestError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refused(failed) => refused(failed),
            Failure::Gone => gone(),
        }
    }
}

/// No two copies have the same.
fn incarnation(vm: VmId, region: usize) -> Incarnation {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&vm.0.to_le_bytes());
    bytes[8..].copy_from_slice(&(region as u64 + 1).to_le_bytes());
    Incarnation::from_bytes(bytes)
}

#[async_trait]
impl TargetGuest for Target {
    fn writer(&self, region: RegionId) -> Option<Arc<dyn RegionWriter>> {
        self.spec.region(region)?;
        Some(Arc::new(Region::new(&self.node, self.vm, region)))
    }

    fn incarnations(&self) -> Vec<Incarnation> {
        self.incarnations.clone()
    }

    fn keep_incarnation(&mut self, region: RegionId, incarnation: Incarnation) {
        if let Some(slot) = self.incarnations.get_mut(usize::from(region.0)) {
            *slot = incarnation;
            self.node
                .world
                .note("the destination's agent keeps the disk of its copy");
        }
    }

    async fn flush(&mut self) -> Result<(), GuestError> {
        Ok(self.order(State::flush).await?)
    }

    async fn load_device_state(&mut self, device: &[u8]) -> Result<(), GuestError> {
        let world = self.node.world.clone();
        let loaded = self.order(|state, id| {
            let vm = state.vm(id).filter(|vm| vm.state == VmState::Incoming)?;
            let whole = vm.load(device);
            let contents = vm.contents();
            state.tell(What::Loaded { vm: id, contents });
            if state.plan.flaw == Some(Flaw::StartsByItself) {
                state.start(&world, id);
            }
            whole.then_some(())
        });
        loaded.await?.ok_or_else(|| GuestError::Refused {
            command: "load of the device state".to_owned(),
            answer: "it is damaged, or there is one already".to_owned(),
        })
    }

    async fn start(&mut self, _permit: RunPermit, to: RunState) -> Result<(), StartError> {
        if to == RunState::Paused {
            return Ok(());
        }
        let world = self.node.world.clone();
        match self.order(|state, id| state.start(&world, id)).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(Failure::Refused(Failed::Before)) => {
                Err(StartError::NeverRan(refused(Failed::Before)))
            }
            Err(failure) => Err(StartError::MayHaveRun(failure.into())),
        }
    }

    async fn discard(&mut self) -> Result<(), GuestError> {
        let id = self.vm;
        let ended = self.node.effect(Class::Control, |state| {
            state.end_vm(id, "discarded", false);
        });
        ended.await.map_err(refused)
    }

    async fn renew(&mut self) -> Result<(), GuestError> {
        self.discard().await?;
        let mut fresh = Self::make(&self.node, &self.spec, self.journal.clone()).await?;
        let kept = self.spec.regions.iter().zip(&self.incarnations);
        for ((region, before), now) in kept.zip(&mut fresh.incarnations) {
            if region.kind == RegionKind::Disk {
                *now = *before;
            }
        }
        *self = fresh;
        Ok(())
    }

    fn life(&self) -> watch::Receiver<GuestLife> {
        self.life.clone()
    }

    fn process(&self) -> ProcessIdentity {
        self.process.clone()
    }
}

fn of_process(state: &mut State, wanted: &ProcessIdentity) -> Option<VmId> {
    let ids: Vec<VmId> = state
        .vms
        .iter()
        .filter(|vm| vm.is_alive())
        .map(|vm| vm.id)
        .collect();
    ids.into_iter().find(|id| process(state, *id) == *wanted)
}

#[async_trait]
impl Hypervisors for SimHypervisors {
    async fn open_source(
        &self,
        config: &SourceConfig,
        leftovers: Leftovers,
    ) -> Result<Box<dyn SourceGuest>, GuestError> {
        let found = Source::attach(&self.0, &config.name, leftovers).await?;
        Ok(Box::new(found))
    }

    async fn open_target(
        &self,
        _config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
    ) -> Result<Box<dyn TargetGuest>, GuestError> {
        let journal = options.journal.clone();
        Ok(Box::new(Target::make(&self.0, spec, journal).await?))
    }

    async fn reopen_target(
        &self,
        _config: &TargetConfig,
        spec: &GuestSpec,
        options: &TargetOptions,
        left: &CopyLeft,
    ) -> Result<Box<dyn TargetGuest>, GuestError> {
        let journal = options.journal.clone();
        let found = Target::take_again(&self.0, spec, left, journal).await?;
        Ok(Box::new(found))
    }

    fn is_alive(&self, process: &ProcessIdentity) -> bool {
        of_process(&mut self.0.world.state(), process).is_some()
    }

    async fn end(&self, process: &ProcessIdentity) -> Result<(), GuestError> {
        let ended = self.0.effect(Class::Control, |state| {
            if let Some(vm) = of_process(state, process) {
                state.end_vm(vm, "discarded", false);
            }
        });
        ended.await.map_err(refused)
    }
}
