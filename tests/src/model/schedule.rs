//! The fault-free end of every state: one fixed schedule without faults, and what it must lead to.
//!
//! Owns the claim "once faults stop, exactly one side runs the guest" as a safety property: a checker's `eventually` misses
//! counter-examples that end in cycles, while a schedule that is too long or turns in a circle is found here. The result for a
//! state on the way is remembered, so that each state is left once.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

use vmferry_proto::handover::{DestinationState, Timer};

use super::action::{Fault, HandoverModel, Step};
use super::hosts::{Guest, Message, World};

/// Longest schedule: a full in-doubt reconnect takes some thirty steps.
const MAX_STEPS: usize = 300;

/// States that are known to end well.
#[derive(Debug, Default)]
pub(super) struct Settled(Mutex<HashSet<u64>>);

fn fingerprint(world: &World) -> u64 {
    let mut hasher = DefaultHasher::new();
    world.hash(&mut hasher);
    hasher.finish()
}

impl HandoverModel {
    /// Whether the schedule without faults leads from here to exactly one runner.
    pub(super) fn ends_well(&self, world: &World) -> bool {
        if !self.check_ending || world.bad.is_some() {
            return true;
        }
        let mut path = Vec::new();
        let mut current = world.clone();
        loop {
            let print = fingerprint(&current);
            if at_rest(&current) || self.is_known(print) {
                self.remember(&path);
                return true;
            }
            if path.contains(&print) || path.len() > MAX_STEPS {
                return false;
            }
            path.push(print);
            let Some(next) = self.next_without_fault(&current) else {
                return false;
            };
            current = next;
        }
    }

    fn is_known(&self, print: u64) -> bool {
        self.settled
            .0
            .lock()
            .is_ok_and(|known| known.contains(&print))
    }

    fn remember(&self, path: &[u64]) {
        if let Ok(mut known) = self.settled.0.lock() {
            known.extend(path);
        }
    }

    /// The first step of the schedule that changes something. Work that is under way comes first, then messages of the session that is
    /// up, then timers.
    fn next_without_fault(&self, world: &World) -> Option<World> {
        schedule(world)
            .into_iter()
            .map(|step| self.step(world, step))
            .find(|next| next != world)
    }
}

fn schedule(world: &World) -> Vec<Step> {
    let (source, destination) = (&world.source, &world.destination);
    let mut steps = Vec::new();
    if world.has_wrong_folder() {
        // With the wrong state folder in place it is in doubt for as long as that lasts: that is right (`[HAND-2]`).
        let stop = Fault::CrashDestination { landed: true };
        steps.push(Step::Fault(match destination.machine {
            Some(_) => stop,
            None => Fault::SwitchFolder,
        }));
    }
    if destination.machine.is_none() && !destination.fenced {
        steps.push(Step::RestartDestination);
    }
    if source.machine.is_none() {
        steps.push(Step::RestartSource);
    }
    if source.disk.writing.is_some() {
        steps.push(Step::SourceWritten);
    }
    if destination.disk.writing.is_some() && !destination.fenced {
        steps.push(Step::DestinationWritten);
    }
    if source.cont {
        steps.push(Step::SourceContinues);
    }
    if destination.cont {
        steps.push(Step::DestinationContinues);
    }
    if source.work.is_some() {
        steps.push(Step::SourceWorkDone);
    }
    if destination.work.is_some() && !destination.fenced {
        steps.push(Step::DestinationWorkDone);
    }
    // Answers first, and the newest question last: what is old changes nothing any more.
    steps.extend(
        world
            .network
            .iter()
            .rev()
            .copied()
            .filter(fits(world))
            .map(Step::Deliver),
    );
    // An operator whose word was lost in a crash gives it again.
    if destination.fenced && world.source_state() == "IN-DOUBT" {
        steps.push(Step::Fault(Fault::Fence));
    }
    steps.push(Step::SourceTimer(Timer::Retry));
    // A start is repeated for ever; where the copy is gone that is a circle.
    let crashed = copy_is_lost(world)
        && destination
            .machine
            .as_ref()
            .is_some_and(|machine| machine.state_name() == "OWNED(start uncertain)");
    if !crashed {
        steps.push(Step::DestinationRetry);
    }
    if let Some(machine) = &source.machine {
        let attempt = machine.attempt();
        steps.push(Step::SourceTimer(Timer::Open(attempt)));
        steps.push(Step::SourceTimer(Timer::Pause(attempt)));
        steps.push(Step::SourceTimer(Timer::BackOff { failures: 0 }));
        steps.push(Step::SourceTimer(Timer::Cancel));
    }
    steps.push(Step::SourceLosesSession);
    steps
}

/// The session is real again: what belongs to an older one does not arrive.
fn fits(world: &World) -> impl Fn(&Message) -> bool {
    let current = world.source.session.map(|(session, _)| session);
    let fenced = world.destination.fenced;
    move |message| {
        !(fenced && message.is_to_destination())
            && match message {
                Message::Hello(session)
                | Message::Welcome(session, _)
                | Message::Offer(session)
                | Message::Ready(session) => Some(*session) == current,
                Message::Open(_)
                | Message::Opened(_)
                | Message::State(_)
                | Message::Prepared(_)
                | Message::Abort(_)
                | Message::Commit(_)
                | Message::Query(_)
                | Message::Committed(_)
                | Message::Aborted(_)
                | Message::Unknown(_)
                | Message::Cancel
                | Message::Cancelled => current.is_some(),
            }
    }
}

/// Exactly one runner and nobody on the way to anywhere else.
fn at_rest(world: &World) -> bool {
    let source = &world.source;
    let quiet = source.machine.is_some()
        && source.disk.writing.is_none()
        && !source.cont
        && !world.destination.cont;
    let settled = match world.source_state() {
        "COPYING" | "DONE" => true,
        state => state.starts_with("ENDING"),
    };
    let owner_is_up =
        world.destination.guest != Guest::Running || world.destination.machine.is_some();
    quiet
        && settled
        && owner_is_up
        && (world.runners() == 1 || is_ordinary_crash(world) || is_crash_at_source(world))
}

/// `[HAND-6]`: the owner's copy died between OWNED and an answered start, or the owner was fenced after it had said so: the guest has crashed where
/// it lived, as guests do, and its disks are there.
fn is_ordinary_crash(world: &World) -> bool {
    let owned = matches!(
        world
            .destination
            .disk
            .durable
            .as_ref()
            .map(|record| &record.state),
        Some(DestinationState::Owned { .. })
    );
    world.runners() == 0 && copy_is_lost(world) && owned
}

/// The guest died at the source, whose host says that it may be booted there.
fn is_crash_at_source(world: &World) -> bool {
    world.runners() == 0 && world.source.guest == Guest::Missing && world.may_boot_at_source()
}

/// Nothing of the loaded copy is left. An agent that was started with the wrong state folder may have put a fresh one in its place.
fn copy_is_lost(world: &World) -> bool {
    let replaced = world.used.folder_switches > 0 && world.destination.guest == Guest::Fresh;
    world.destination.guest == Guest::Missing || replaced
}
