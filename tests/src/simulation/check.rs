//! What must be true of every run, judged from its log alone.
//!
//! Owns the rules; knows neither agents, machines nor drivers. It keeps its own model of what the guest is: the guest's writes,
//! one after the other, whichever process made them. Rules:
//! 1. at most one copy of the guest runs at any moment;
//! 2. a copy that runs is, block for block and in its CPU, what the guest was when it last stood still; where the destination is
//!    lost for good and an operator said so, what the source's own copy was then (`[HAND-9]`);
//! 3. so is a copy that took the device state of the guest's last pause: no dirty mark was lost, even if nothing came of it;
//! 4. no copy runs without the durable record that lets it: OWNED at the destination, ROLLED_BACK or an operator's word after a
//!    pause at the source;
//! 5. once faults have stopped, all is settled in bounded time: exactly one copy runs, the report says where, and nothing is
//!    left behind, unless a fault has ended the very process that the guest was in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use vmferry_common::journal::RecordFile;
use vmferry_common::ownership::{DESTINATION_VERSION, SOURCE_VERSION};
use vmferry_proto::handover::{DestinationRecord, DestinationState, SourceRecord, SourceState};
use vmferry_proto::spec::RunState;
use vmferry_src::report::GuestNow;

use super::facts::{Birth, Contents, DurableRecords, Fact, HostId, VmId, What};
use super::storage::disk_of;

/// A rule was broken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{rule}: {detail}")]
pub struct Broken {
    /// Which.
    pub rule: Rule,
    /// How.
    pub detail: String,
}

/// The rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rule {
    /// At most one runs.
    OneRunner,
    /// What runs is what the guest was.
    SameContents,
    /// What was loaded is what was paused.
    NoMarkLost,
    /// No run without its record.
    Recorded,
    /// All is settled.
    Settled,
    /// No panic and no surprise of the simulation itself.
    Sound,
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OneRunner => "at most one copy may run",
            Self::SameContents => "a copy that runs must be what the guest was",
            Self::NoMarkLost => "what was loaded must be what was paused",
            Self::Recorded => "no run without its durable record",
            Self::Settled => "all must be settled once faults have stopped",
            Self::Sound => "nothing may panic",
        })
    }
}

/// The guest, as the facts so far make it.
#[derive(Debug)]
struct Model {
    guest: Contents,
    births: BTreeMap<VmId, (HostId, Birth)>,
    running: BTreeSet<VmId>,
    /// Those that ran before: what runs anew was paused.
    ran: BTreeSet<VmId>,
    /// The process that the guest is in: it ran last, or took the state of its last pause.
    homes: BTreeSet<VmId>,
    /// A fault ended a process that the guest was in.
    lost: bool,
    gone_for_good: bool,
    /// CPU of each pause, and what the guest was.
    pauses: BTreeMap<u64, Contents>,
    /// What each process held when it last stood still.
    stood: BTreeMap<VmId, Contents>,
    report: Option<GuestNow>,
}

/// Judges a run of a guest that was in state `before`.
///
/// # Errors
/// The first rule that was broken.
pub(super) fn check(facts: &[Fact], before: RunState) -> Result<(), Broken> {
    let mut model = Model {
        guest: Contents {
            image: Vec::new(),
            cpu: 0,
        },
        births: BTreeMap::new(),
        running: BTreeSet::new(),
        ran: BTreeSet::new(),
        homes: BTreeSet::new(),
        lost: false,
        gone_for_good: false,
        pauses: BTreeMap::new(),
        stood: BTreeMap::new(),
        report: None,
    };
    facts
        .iter()
        .try_for_each(|fact| model.on(&fact.what, before))
        .map_err(|(rule, detail)| Broken { rule, detail })
}

type Judged = Result<(), (Rule, String)>;

impl Model {
    fn on(&mut self, what: &What, before: RunState) -> Judged {
        match what {
            What::Appeared {
                vm,
                host,
                birth,
                contents,
            } => self.on_appeared(*vm, *host, *birth, contents),
            What::Ran {
                vm,
                contents,
                records,
            } => return self.on_ran(*vm, contents, records, before),
            What::Stood { vm, contents } => {
                self.running.remove(vm);
                self.on_stood(*vm, contents);
            }
            What::Submitted { vm, cpu } => {
                self.is_the_guest(*vm)?;
                self.guest.cpu = *cpu;
            }
            What::Wrote {
                vm,
                region,
                block,
                bytes,
                cpu,
            } => {
                self.is_the_guest(*vm)?;
                self.guest.image[*region][*block].clone_from(bytes);
                self.guest.cpu = *cpu;
            }
            What::Loaded { vm, contents } => return self.on_loaded(*vm, contents),
            What::Ended { vm, fault, .. } => {
                self.running.remove(vm);
                self.lost |= *fault && self.homes.contains(vm);
            }
            What::GoneForGood => self.gone_for_good = true,
            What::Reported { guest_now, .. } => self.report = Some(*guest_now),
            What::Settled { in_time, leftovers } => {
                return self.on_settled(*in_time, leftovers, before);
            }
            What::AgentStarted { host, .. } => {
                if *host == HostId::Alpha {
                    // What it will say is what counts.
                    self.report = None;
                }
            }
            What::Synced { .. } | What::Quiet | What::Note(_) => {}
        }
        Ok(())
    }

    fn on_appeared(&mut self, vm: VmId, host: HostId, birth: Birth, contents: &Contents) {
        self.births.insert(vm, (host, birth));
        match birth {
            Birth::Original | Birth::Booted => {
                self.guest = contents.clone();
                self.homes = BTreeSet::from([vm]);
                self.on_stood(vm, contents);
            }
            Birth::Incoming => {}
        }
    }

    fn on_stood(&mut self, vm: VmId, contents: &Contents) {
        self.pauses.insert(contents.cpu, contents.clone());
        self.stood.insert(vm, contents.clone());
    }

    fn is_the_guest(&self, vm: VmId) -> Judged {
        if self.homes.contains(&vm) {
            return Ok(());
        }
        let text = format!("vm {} wrote, and is not the guest", vm.0);
        Err((Rule::OneRunner, text))
    }

    fn on_ran(
        &mut self,
        vm: VmId,
        contents: &Contents,
        records: &DurableRecords,
        before: RunState,
    ) -> Judged {
        self.running.insert(vm);
        if self.running.len() > 1 {
            let text = format!("these run at once: {:?}", self.running);
            return Err((Rule::OneRunner, text));
        }
        self.may_run(vm, records, before)
            .map_err(|text| (Rule::Recorded, text))?;
        if self.gone_for_good && is_fenced(records) {
            self.go_back_to(vm);
        }
        if let Some(text) = difference(contents, &self.guest) {
            return Err((Rule::SameContents, format!("vm {}: {text}", vm.0)));
        }
        self.ran.insert(vm);
        self.homes = BTreeSet::from([vm]);
        Ok(())
    }

    /// What the guest did at the lost destination is lost with it, and the guest lives.
    fn go_back_to(&mut self, vm: VmId) {
        if let Some(stood) = self.stood.get(&vm) {
            self.guest = stood.clone();
            self.lost = false;
        }
    }

    fn may_run(&self, vm: VmId, records: &DurableRecords, before: RunState) -> Result<(), String> {
        let Some((host, birth)) = self.births.get(&vm) else {
            return Err(format!("vm {} came from nowhere", vm.0));
        };
        match birth {
            // It was started by a host that was told that it may, or by its users, who may also have left it paused.
            Birth::Booted if !self.ran.contains(&vm) => Ok(()),
            Birth::Original if !self.ran.contains(&vm) && before == RunState::Running => Ok(()),
            Birth::Original | Birth::Booted => {
                let state = source_record(records)?.map(|record| record.state);
                match &state {
                    Some(SourceState::RolledBack { .. } | SourceState::Fenced { .. }) => Ok(()),
                    Some(other) => Err(format!("vm {} went on at {}", vm.0, other.name())),
                    None => Err(format!("vm {} went on at {host:?} without a record", vm.0)),
                }
            }
            Birth::Incoming => {
                let state = destination_record(records)?.map(|record| record.state);
                match &state {
                    Some(DestinationState::Owned { .. }) => Ok(()),
                    Some(other) => Err(format!("vm {} started at {}", vm.0, other.name())),
                    None => Err(format!("vm {} started at {host:?} without a record", vm.0)),
                }
            }
        }
    }

    fn on_loaded(&mut self, vm: VmId, contents: &Contents) -> Judged {
        let Some(paused) = self.pauses.get(&contents.cpu) else {
            let text = format!("vm {} took a CPU state that no pause had", vm.0);
            return Err((Rule::NoMarkLost, text));
        };
        if let Some(text) = difference(contents, paused) {
            return Err((Rule::NoMarkLost, format!("vm {}: {text}", vm.0)));
        }
        if contents.cpu == self.guest.cpu {
            self.homes.insert(vm);
        }
        Ok(())
    }

    fn on_settled(&self, in_time: bool, leftovers: &[VmId], before: RunState) -> Judged {
        let broken = |text: String| Err((Rule::Settled, text));
        if !in_time {
            return broken("it was not settled within the bound".to_owned());
        }
        if !leftovers.is_empty() {
            return broken(format!("copies are left at the destination: {leftovers:?}"));
        }
        if self.lost {
            // Rule 1 held all along, and there is little else to say of a guest that is dead.
            return match self.report {
                Some(GuestNow::InDoubt) if !self.gone_for_good => {
                    broken("the guest is gone, and nobody settled where it was".to_owned())
                }
                _ => Ok(()),
            };
        }
        let hosts: Vec<HostId> = self
            .running
            .iter()
            .filter_map(|vm| Some(self.births.get(vm)?.0))
            .collect();
        if self.report.is_none() {
            // The source's program did not live to say where it is.
            let count = usize::from(before == RunState::Running);
            if hosts.len() == count {
                return Ok(());
            }
            return broken(format!("nobody says where it is, and it runs at {hosts:?}"));
        }
        let expected = match self.report {
            Some(GuestNow::RunsAtSource) => Some(HostId::Alpha),
            Some(GuestNow::RunsAtDestination) => Some(HostId::Beta),
            Some(GuestNow::PausedAtSource | GuestNow::PausedAtDestination) => None,
            Some(GuestNow::InDoubt) if self.gone_for_good => None,
            None | Some(GuestNow::StuckAtSource | GuestNow::Ended | GuestNow::InDoubt) => {
                return broken(format!("the last report says {:?}", self.report));
            }
        };
        if hosts == Vec::from_iter(expected) {
            return Ok(());
        }
        broken(format!(
            "the last report says {:?}, and it runs at {hosts:?}",
            self.report
        ))
    }
}

fn source_record(records: &DurableRecords) -> Result<Option<SourceRecord>, String> {
    let Some(bytes) = records.source.clone() else {
        return Ok(None);
    };
    RecordFile::on(disk_of(bytes), PathBuf::from("source"), SOURCE_VERSION)
        .read()
        .map_err(|error| format!("the source's record: {error}"))
}

fn destination_record(records: &DurableRecords) -> Result<Option<DestinationRecord>, String> {
    let Some(bytes) = records.destination.clone() else {
        return Ok(None);
    };
    RecordFile::on(
        disk_of(bytes),
        PathBuf::from("destination"),
        DESTINATION_VERSION,
    )
    .read()
    .map_err(|error| format!("the destination's record: {error}"))
}

/// Whether the source goes on because the destination is lost and fenced.
fn is_fenced(records: &DurableRecords) -> bool {
    let record = source_record(records).ok().flatten();
    record.is_some_and(|record| matches!(record.state, SourceState::Fenced { .. }))
}

/// Whether the guest is the destination's.
pub(super) fn is_owned(records: &DurableRecords) -> bool {
    let record = destination_record(records).ok().flatten();
    record.is_some_and(|record| matches!(record.state, DestinationState::Owned { .. }))
}

/// The first difference between two guests.
fn difference(found: &Contents, wanted: &Contents) -> Option<String> {
    if found.cpu != wanted.cpu {
        return Some(format!("{found:?} and not {wanted:?}"));
    }
    let regions = found.image.iter().zip(&wanted.image).enumerate();
    for (region, (found, wanted)) in regions {
        if let Some(block) = found.iter().zip(wanted).position(|(a, b)| a != b) {
            return Some(format!("region {region} differs in block {block}"));
        }
    }
    None
}
