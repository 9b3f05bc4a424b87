//! What may happen in the model, and within which bounds.
//!
//! Owns the list of steps and what each does. A step is offered only if it can change something; which of them are faults is for
//! `schedule` to know.

use stateright::{Model, Property};
use vmferry_proto::handover::{
    DestinationEvent, DestinationState, SourceEvent, SourceHandover, SourceState, Timer,
};
use vmferry_proto::ids::Attempt;
use vmferry_proto::spec::RunState;

use super::hosts::{Guest, Message, Work, World, reason};
use super::schedule::Settled;

/// A rule broken by the wrapper, to show that the check notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mutation {
    /// The source resumes after COMMITTING without an answer.
    ResumeInDoubt,
    /// An attempt that the register does not know is answered as aborted.
    UnknownIsAborted,
    /// The source sends `cont` as soon as ROLLED_BACK is handed to the journal.
    ResumeBeforeRolledBack,
    /// A failed COMMITTING write is taken for none, although a restart may find it.
    FailedCommittingIsNone,
    /// The destination sends `cont` as soon as OWNED is handed to the journal.
    StartBeforeOwned,
    /// The destination's hypervisor runs by itself once the device state is loaded.
    StartsByItself,
    /// Questions go to, and answers are believed from, whichever register is there.
    BelieveOtherRegister,
    /// A launched process becomes a hypervisor although the journal could not name it.
    LetGoUnnamed,
    /// A newer migration's record forgets what became of the one before.
    ForgetsEarlier,
}

/// How often each fault may happen, and how far the good case may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "bounds of the steps of the same names")]
pub struct Bounds {
    pub attempts: u32,
    pub sessions: u64,
    pub crashes: u8,
    pub write_failures: u8,
    pub guest_failures: u8,
    pub touches: u8,
    pub cancels: u8,
    pub give_ups: u8,
    pub folder_switches: u8,
    pub newer_migrations: u8,
    pub fencing: bool,
}

/// Things that go wrong, or that people do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each says itself")]
pub enum Fault {
    CrashSource { landed: bool },
    CrashDestination { landed: bool },
    SourceWriteFails { visible: bool },
    DestinationWriteFails { visible: bool },
    PauseFails,
    StreamFails,
    ResumeFails,
    ReleaseFails,
    GuestDies,
    MakeFails,
    LoadFails,
    CopyDies,
    AttemptFails,
    StartFails { never_ran: bool },
    DiscardFails,
    SomebodyResumes,
    Cancel,
    AbortAttempt,
    GiveUp,
    Fence,
    SwitchFolder,
    NewerMigration,
    ByItself,
    ResumeInDoubt,
    DestinationLosesSession,
}

/// One step of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each says itself")]
pub enum Step {
    Deliver(Message),
    SourceWritten,
    DestinationWritten,
    SourceWorkDone,
    DestinationWorkDone,
    SourceContinues,
    DestinationContinues,
    RestartSource,
    RestartDestination,
    ConnectWanted,
    BeginCutover,
    SourceTimer(Timer),
    DestinationRetry,
    SourceLosesSession,
    Fault(Fault),
}

/// The model: real machines, simulated everything else.
#[derive(Debug)]
pub struct HandoverModel {
    /// Where it begins.
    pub first: World,
    /// Bounds.
    pub bounds: Bounds,
    /// The rule that is broken, if any.
    pub mutation: Option<Mutation>,
    /// Whether every state is also driven to its end without faults.
    pub check_ending: bool,
    pub(super) settled: Settled,
}

impl HandoverModel {
    /// The machines as they are, within `bounds`.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            first: World::new(),
            bounds,
            mutation: None,
            check_ending: true,
            settled: Settled::default(),
        }
    }

    /// The machines with one rule broken around them. Only safety is looked at.
    #[must_use]
    pub fn broken(bounds: Bounds, mutation: Mutation) -> Self {
        Self {
            mutation: Some(mutation),
            check_ending: false,
            ..Self::new(bounds)
        }
    }

    /// The same model, begun elsewhere.
    #[must_use]
    pub fn begun_at(self, first: World) -> Self {
        Self { first, ..self }
    }

    fn all_steps(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(world.network.iter().copied().map(Step::Deliver));
        self.source_steps(world, steps);
        self.destination_steps(world, steps);
        self.faults_of_source(world, steps);
        self.faults_of_destination(world, steps);
    }

    fn source_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let host = &world.source;
        if host.disk.writing.is_some() {
            steps.push(Step::SourceWritten);
        }
        if host.cont {
            steps.push(Step::SourceContinues);
        }
        let Some(machine) = &host.machine else {
            steps.push(Step::RestartSource);
            return;
        };
        if host.work.is_some() && !(host.work == Some(Work::Pause) && host.cont) {
            steps.push(Step::SourceWorkDone);
        }
        if machine.session().0 < self.bounds.sessions {
            steps.push(Step::ConnectWanted);
            steps.push(Step::SourceTimer(Timer::BackOff { failures: 0 }));
        }
        let ready = matches!(host.session, Some((_, true)));
        if ready && machine.attempt().0 < self.bounds.attempts {
            steps.push(Step::BeginCutover);
        }
        let attempt = machine.attempt();
        steps.extend(
            [
                Timer::Open(attempt),
                Timer::Pause(attempt),
                Timer::Doubt(attempt),
                Timer::Retry,
                Timer::Cancel,
            ]
            .map(Step::SourceTimer),
        );
        if host.session.is_some() {
            steps.push(Step::SourceLosesSession);
        }
    }

    fn destination_steps(&self, world: &World, steps: &mut Vec<Step>) {
        let host = &world.destination;
        if host.fenced {
            return;
        }
        if host.disk.writing.is_some() {
            steps.push(Step::DestinationWritten);
        }
        if host.cont {
            steps.push(Step::DestinationContinues);
        }
        if host.machine.is_none() {
            steps.push(Step::RestartDestination);
            return;
        }
        // The record that names a launched process is written before anything is done with that.
        let unnamed = host.work == Some(Work::LetGo) && host.disk.writing.is_some();
        if host.work.is_some() && !unnamed {
            steps.push(Step::DestinationWorkDone);
        }
        steps.push(Step::DestinationRetry);
        if self.mutation == Some(Mutation::StartsByItself) && host.guest == Guest::Still {
            steps.push(Step::Fault(Fault::ByItself));
        }
    }

    fn faults_of_source(&self, world: &World, steps: &mut Vec<Step>) {
        let (host, used, bounds) = (&world.source, world.used, self.bounds);
        let mut fault = |fault| steps.push(Step::Fault(fault));
        if used.guest_failures < bounds.guest_failures && host.guest != Guest::Missing {
            fault(Fault::GuestDies);
        }
        let Some(machine) = &host.machine else {
            return;
        };
        if used.crashes < bounds.crashes {
            fault(Fault::CrashSource { landed: false });
            if host.disk.writing.is_some() {
                fault(Fault::CrashSource { landed: true });
            }
        }
        if used.write_failures < bounds.write_failures && host.disk.writing.is_some() {
            fault(Fault::SourceWriteFails { visible: false });
            fault(Fault::SourceWriteFails { visible: true });
        }
        if used.guest_failures < bounds.guest_failures {
            match host.work {
                Some(Work::Pause) => fault(Fault::PauseFails),
                Some(Work::Stream(_)) => fault(Fault::StreamFails),
                Some(Work::Release) => fault(Fault::ReleaseFails),
                Some(Work::Check(_) | Work::Make | Work::LetGo | Work::Load | Work::Discard)
                | None => {}
            }
            if host.cont {
                fault(Fault::ResumeFails);
            }
        }
        if used.touches < bounds.touches && touch_can_be_noticed(machine, host.guest) {
            fault(Fault::SomebodyResumes);
        }
        if used.cancels < bounds.cancels {
            fault(Fault::Cancel);
            fault(Fault::AbortAttempt);
        }
        if bounds.fencing && !world.destination.fenced && machine.state_name() == "IN-DOUBT" {
            fault(Fault::Fence);
        }
        if self.mutation == Some(Mutation::ResumeInDoubt) && machine.state_name() == "IN-DOUBT" {
            fault(Fault::ResumeInDoubt);
        }
    }

    fn faults_of_destination(&self, world: &World, steps: &mut Vec<Step>) {
        let (host, used, bounds) = (&world.destination, world.used, self.bounds);
        if host.fenced {
            return;
        }
        let mut fault = |fault| steps.push(Step::Fault(fault));
        if host.machine.is_none() {
            if used.folder_switches < bounds.folder_switches {
                fault(Fault::SwitchFolder);
            }
            return;
        }
        if used.crashes < bounds.crashes {
            fault(Fault::CrashDestination { landed: false });
            if host.disk.writing.is_some() {
                fault(Fault::CrashDestination { landed: true });
            }
        }
        if used.write_failures < bounds.write_failures && host.disk.writing.is_some() {
            fault(Fault::DestinationWriteFails { visible: false });
            fault(Fault::DestinationWriteFails { visible: true });
        }
        if used.guest_failures < bounds.guest_failures {
            match host.work {
                Some(Work::Make | Work::LetGo) => fault(Fault::MakeFails),
                Some(Work::Load) => fault(Fault::LoadFails),
                Some(Work::Discard) => fault(Fault::DiscardFails),
                Some(Work::Pause | Work::Stream(_) | Work::Check(_) | Work::Release) | None => {}
            }
            if host.cont {
                fault(Fault::StartFails { never_ran: true });
                fault(Fault::StartFails { never_ran: false });
            }
            if matches!(host.guest, Guest::Fresh | Guest::Still) && !host.cont {
                fault(Fault::CopyDies);
            }
            fault(Fault::AttemptFails);
        }
        if used.give_ups < bounds.give_ups {
            fault(Fault::GiveUp);
        }
        if used.newer_migrations < bounds.newer_migrations && world.may_be_replaced() {
            fault(Fault::NewerMigration);
        }
        fault(Fault::DestinationLosesSession);
    }

    pub(super) fn step(&self, world: &World, step: Step) -> World {
        let mut next = world.clone();
        let m = self.mutation;
        match step {
            Step::Deliver(message) if message.is_to_destination() => {
                next.reach_destination(message, m);
            }
            Step::Deliver(message) => next.reach_source(message, m),
            Step::SourceWritten => next.source_written(m),
            Step::DestinationWritten => {
                next.destination.disk.complete();
                next.tell_destination(DestinationEvent::Recorded, m);
            }
            Step::SourceWorkDone => self.source_work_done(&mut next),
            Step::DestinationWorkDone => self.destination_work_done(&mut next),
            Step::SourceContinues => next.source_continues(m),
            Step::DestinationContinues => {
                let event = next.destination_continues();
                next.tell_destination(event, m);
            }
            Step::RestartSource => next.restart_source(m),
            Step::RestartDestination => next.restart_destination(m),
            Step::ConnectWanted => next.tell_source(SourceEvent::ConnectWanted, m),
            Step::BeginCutover => next.tell_source(
                SourceEvent::BeginCutover {
                    run_state: RunState::Running,
                },
                m,
            ),
            Step::SourceTimer(timer) => next.source_timer(timer, m),
            Step::DestinationRetry => next.tell_destination(DestinationEvent::Retry, m),
            Step::SourceLosesSession => {
                next.source.session = None;
                next.tell_source(SourceEvent::ConnectionLost { reason: reason() }, m);
            }
            Step::Fault(fault) => self.fault(&mut next, fault),
        }
        next
    }

    fn source_work_done(&self, next: &mut World) {
        let m = self.mutation;
        match next.source.work.take() {
            Some(Work::Pause) if next.source.guest == Guest::Missing => {
                let event = SourceEvent::PauseFailed {
                    before: None,
                    reason: reason(),
                };
                next.tell_source(event, m);
            }
            Some(Work::Stream(attempt)) if next.source.guest == Guest::Missing => {
                let event = SourceEvent::StreamFailed {
                    attempt,
                    reason: reason(),
                };
                next.tell_source(event, m);
            }
            Some(Work::Pause) => {
                next.source.guest = Guest::Still;
                let before = RunState::Running;
                next.tell_source(SourceEvent::GuestPaused { before }, m);
            }
            Some(Work::Stream(attempt)) => {
                if next.source.guest != Guest::Still {
                    next.blame("the last pass reads a guest that is not paused");
                }
                next.say(Message::State(attempt));
                next.tell_source(SourceEvent::FinalSent { attempt }, m);
            }
            Some(Work::Check(attempt)) => {
                let event = if next.source.guest == Guest::Still {
                    SourceEvent::StillPaused { attempt }
                } else {
                    SourceEvent::GuestTouched { reason: reason() }
                };
                next.tell_source(event, m);
            }
            Some(Work::Release) => next.source_releases(m),
            Some(Work::Make | Work::LetGo | Work::Load | Work::Discard) | None => {}
        }
    }

    fn destination_work_done(&self, next: &mut World) {
        let m = self.mutation;
        match next.destination.work.take() {
            Some(Work::Make) if next.destination.guest == Guest::Running => {
                let event = DestinationEvent::MakeCopyFailed { reason: reason() };
                next.tell_destination(event, m);
            }
            Some(Work::Make) => next.launch_copy(m),
            Some(Work::LetGo) => next.let_copy_go(m),
            Some(Work::Load) => {
                if next.destination.guest == Guest::Fresh {
                    next.destination.guest = Guest::Still;
                    next.tell_destination(World::loaded(), m);
                } else {
                    let event = DestinationEvent::LoadFailed { reason: reason() };
                    next.tell_destination(event, m);
                }
            }
            Some(Work::Discard) => {
                // The other folder's guest is not this migration's copy.
                let foreign =
                    next.used.folder_switches > 0 && next.destination.guest == Guest::Running;
                if !foreign {
                    next.copy_goes();
                }
                next.tell_destination(DestinationEvent::Discarded, m);
            }
            Some(Work::Pause | Work::Stream(_) | Work::Check(_) | Work::Release) | None => {}
        }
    }

    fn fault(&self, next: &mut World, fault: Fault) {
        let m = self.mutation;
        match fault {
            Fault::CrashSource { landed } => {
                next.used.crashes += 1;
                next.crash_source(landed);
            }
            Fault::CrashDestination { landed } => {
                next.used.crashes += 1;
                next.crash_destination(landed);
            }
            Fault::SourceWriteFails { visible } => {
                next.used.write_failures += 1;
                next.source_write_failed(visible, m);
            }
            Fault::DestinationWriteFails { visible } => {
                next.used.write_failures += 1;
                next.destination.disk.cut(visible);
                let event = DestinationEvent::RecordFailed {
                    visible,
                    reason: reason(),
                };
                next.tell_destination(event, m);
            }
            Fault::PauseFails | Fault::StreamFails | Fault::ResumeFails | Fault::ReleaseFails => {
                next.used.guest_failures += 1;
                source_guest_fails(next, fault, m);
            }
            Fault::GuestDies => {
                next.used.guest_failures += 1;
                next.seen.guest_died_in_doubt = next.is_in_doubt();
                next.source.guest = Guest::Missing;
                next.tell_source(SourceEvent::GuestTouched { reason: reason() }, m);
            }
            Fault::MakeFails
            | Fault::LoadFails
            | Fault::CopyDies
            | Fault::AttemptFails
            | Fault::StartFails { .. }
            | Fault::DiscardFails => {
                next.used.guest_failures += 1;
                destination_guest_fails(next, fault, m);
            }
            Fault::SomebodyResumes => {
                next.used.touches += 1;
                next.source.guest = Guest::Running;
                next.tell_source(SourceEvent::GuestTouched { reason: reason() }, m);
            }
            Fault::Cancel => {
                next.used.cancels += 1;
                next.tell_source(SourceEvent::Cancel { reason: reason() }, m);
            }
            Fault::AbortAttempt => {
                next.used.cancels += 1;
                next.tell_source(SourceEvent::AbortAttempt { reason: reason() }, m);
            }
            Fault::GiveUp => {
                next.used.give_ups += 1;
                next.tell_destination(DestinationEvent::GiveUp { reason: reason() }, m);
            }
            Fault::Fence => {
                next.crash_destination(false);
                next.destination.fenced = true;
                next.destination.guest = Guest::Missing;
                next.destination.cont = false;
                next.tell_source(SourceEvent::ResolveDestinationFenced, m);
            }
            Fault::SwitchFolder => {
                next.used.folder_switches += 1;
                next.switch_folder();
            }
            Fault::NewerMigration => {
                next.used.newer_migrations += 1;
                next.replace(m);
            }
            Fault::ByItself => next.destination.guest = Guest::Running,
            Fault::ResumeInDoubt => next.source.guest = Guest::Running,
            Fault::DestinationLosesSession => {
                next.tell_destination(DestinationEvent::ConnectionLost, m);
            }
        }
    }
}

/// A stranger's `cont` is told to the machine at once. Once Commit was sent nobody can undo it: that is the stranger's doing.
fn touch_can_be_noticed(machine: &SourceHandover, guest: Guest) -> bool {
    guest == Guest::Still
        && matches!(
            machine.state_name(),
            "STREAMING" | "AWAITING-PREPARED" | "CHECKING" | "RECORDING-COMMITTING"
        )
}

fn source_guest_fails(next: &mut World, fault: Fault, m: Option<Mutation>) {
    let event = match fault {
        Fault::PauseFails => {
            next.source.work = None;
            SourceEvent::PauseFailed {
                before: None,
                reason: reason(),
            }
        }
        Fault::StreamFails => {
            let attempt = next
                .source
                .machine
                .as_ref()
                .map_or(Attempt(0), SourceHandover::attempt);
            next.source.work = None;
            SourceEvent::StreamFailed {
                attempt,
                reason: reason(),
            }
        }
        Fault::ResumeFails => {
            next.source.cont = false;
            SourceEvent::ResumeFailed { reason: reason() }
        }
        _ => {
            next.source.work = None;
            SourceEvent::ReleaseFailed { reason: reason() }
        }
    };
    next.tell_source(event, m);
}

fn destination_guest_fails(next: &mut World, fault: Fault, m: Option<Mutation>) {
    let event = match fault {
        Fault::MakeFails => {
            next.destination.work = None;
            DestinationEvent::MakeCopyFailed { reason: reason() }
        }
        Fault::LoadFails => {
            next.destination.work = None;
            next.destination.guest = Guest::Still;
            DestinationEvent::LoadFailed { reason: reason() }
        }
        Fault::CopyDies => {
            next.destination.guest = Guest::Missing;
            DestinationEvent::CopyLost { reason: reason() }
        }
        Fault::StartFails { never_ran } => {
            if !never_ran {
                next.destination_continues();
            }
            next.destination.cont = false;
            DestinationEvent::StartFailed {
                never_ran,
                reason: reason(),
            }
        }
        Fault::DiscardFails => {
            next.destination.work = None;
            DestinationEvent::DiscardFailed { reason: reason() }
        }
        _ => DestinationEvent::AttemptFailed { reason: reason() },
    };
    next.tell_destination(event, m);
}

impl Model for HandoverModel {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.first.clone()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        // What follows the first wrong thing proves nothing more.
        if world.bad.is_none() && world.runners() <= 1 {
            self.all_steps(world, steps);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let next = self.step(world, step);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        super::check::properties()
    }
}

pub(super) fn committed(world: &World) -> bool {
    let owned = matches!(
        world
            .destination
            .disk
            .durable
            .as_ref()
            .map(|record| &record.state),
        Some(DestinationState::Owned { started: true, .. })
    );
    let released = matches!(
        world
            .source
            .disk
            .durable
            .as_ref()
            .map(|record| &record.state),
        Some(SourceState::Released { .. })
    );
    let runs = world.destination.guest == Guest::Running || world.elsewhere;
    (owned || world.replaced_after_commit()) && released && runs
}

pub(super) fn rolled_back(world: &World) -> bool {
    matches!(
        world
            .source
            .disk
            .durable
            .as_ref()
            .map(|record| &record.state),
        Some(SourceState::RolledBack { .. })
    ) && world.source.guest == Guest::Running
}
