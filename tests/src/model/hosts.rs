//! The world of the model: two hosts with a machine, a disk and a guest each, and the network between them.
//!
//! Owns how a machine's actions change the world. Invariant: `bad` is set the moment something happens that no rule allows,
//! so that a property needs to look at one state only.

use std::collections::BTreeSet;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    CopyFound, DestinationAction, DestinationEvent, DestinationFacts, DestinationHandover,
    DestinationRecord, DestinationState, EarlierOutcome, OwnershipClaim, Peer, ProcessRecord,
    SourceAction, SourceEvent, SourceFacts, SourceHandover, SourceRecord, SourceState, Timer,
};
use vmferry_proto::ids::{Attempt, Generation, MigrationId, RegisterId, SessionNumber};
use vmferry_proto::message::{
    AttemptKey, Outcome, PrepareTiming, ToDestination, ToSource, Verdict,
};
use vmferry_proto::spec::RunState;

use super::action::Mutation;

/// What travels. Words that people read are left out: they decide nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "they are the protocol's own names")]
pub enum Message {
    Hello(SessionNumber),
    Welcome(SessionNumber, RegisterId),
    Offer(SessionNumber),
    Ready(SessionNumber),
    Open(Attempt),
    Opened(Attempt),
    State(Attempt),
    Prepared(AttemptKey),
    Abort(Attempt),
    Commit(AttemptKey),
    Query(AttemptKey),
    Committed(AttemptKey),
    Aborted(AttemptKey),
    Unknown(AttemptKey),
    Cancel,
    Cancelled,
}

impl Message {
    /// Whether the destination is meant.
    #[must_use]
    pub const fn is_to_destination(&self) -> bool {
        matches!(
            self,
            Self::Hello(_)
                | Self::Offer(_)
                | Self::Open(_)
                | Self::State(_)
                | Self::Abort(_)
                | Self::Commit(_)
                | Self::Query(_)
                | Self::Cancel
        )
    }
}

/// A part of the world that most steps leave alone: cloned when it is changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shared<T>(Arc<T>);

impl<T> Shared<T> {
    fn new(part: T) -> Self {
        Self(Arc::new(part))
    }
}

impl<T> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: Clone> DerefMut for Shared<T> {
    fn deref_mut(&mut self) -> &mut T {
        Arc::make_mut(&mut self.0)
    }
}

/// A record file: what a power cut cannot take away, and what a restarted agent reads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Disk<R> {
    /// Synced.
    pub durable: Option<R>,
    /// Renamed into place.
    pub visible: Option<R>,
    /// Being written.
    pub writing: Option<R>,
}

impl<R: Clone> Disk<R> {
    const fn empty() -> Self {
        Self {
            durable: None,
            visible: None,
            writing: None,
        }
    }

    pub(super) fn complete(&mut self) {
        if let Some(record) = self.writing.take() {
            self.durable = Some(record.clone());
            self.visible = Some(record);
        }
    }

    /// Ends a write that does not succeed; `landed`: after the rename.
    pub(super) fn cut(&mut self, landed: bool) {
        let record = self.writing.take();
        if landed {
            self.visible = record.or_else(|| self.visible.take());
        }
    }
}

/// A guest, as seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Guest {
    /// There is none.
    Missing,
    /// It takes content.
    Fresh,
    /// It has a state and stands still.
    Still,
    /// It runs.
    Running,
}

/// What an agent is doing with its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the machines' own names")]
pub enum Work {
    Pause,
    Stream(Attempt),
    Check(Attempt),
    Release,
    Make,
    LetGo,
    Load,
    Discard,
}

/// The source's host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceSide {
    /// The agent's machine; `None` while it is crashed.
    pub machine: Option<SourceHandover>,
    /// Its journal.
    pub disk: Disk<SourceRecord>,
    /// The guest.
    pub guest: Guest,
    /// A `cont` that the hypervisor has not carried out: it outlives the agent.
    pub cont: bool,
    /// What else is being done.
    pub work: Option<Work>,
    /// Session that is being opened or open, and whether `Ready` was read on it.
    pub session: Option<(SessionNumber, bool)>,
}

/// The destination's host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DestinationSide {
    /// The agent's machine; `None` while it is crashed.
    pub machine: Option<DestinationHandover>,
    /// Its journal.
    pub disk: Disk<DestinationRecord>,
    /// Journal of the state folder that is not in use, for the fault of starting with the wrong one.
    pub other_disk: Disk<DestinationRecord>,
    /// Register of the folder in use.
    pub register: RegisterId,
    /// The copy.
    pub guest: Guest,
    /// A `cont` that the hypervisor has not carried out.
    pub cont: bool,
    /// What else is being done.
    pub work: Option<Work>,
    /// An operator has cut it off for good.
    pub fenced: bool,
}

/// Faults that have happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "counters of the faults of the same names")]
pub struct Used {
    pub crashes: u8,
    pub write_failures: u8,
    pub guest_failures: u8,
    pub touches: u8,
    pub cancels: u8,
    pub give_ups: u8,
    pub folder_switches: u8,
    pub newer_migrations: u8,
}

/// What has happened, for `sometimes` properties and rules about the past.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each says itself")]
pub struct Seen {
    pub in_doubt: bool,
    pub crash_in_committing: bool,
    pub guest_died_in_doubt: bool,
    /// Highest attempt whose COMMITTING a restart could have read.
    pub committing: Attempt,
}

/// One state of the model.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    /// The source's host.
    pub source: Shared<SourceSide>,
    /// The destination's host.
    pub destination: Shared<DestinationSide>,
    /// Everything that was ever sent.
    pub network: Shared<BTreeSet<Message>>,
    /// The guest has left the destination for a third host and runs there.
    pub elsewhere: bool,
    /// Faults so far.
    pub used: Used,
    /// History.
    pub seen: Seen,
    /// The first thing that no rule allows.
    pub bad: Option<&'static str>,
}

pub(super) const REGISTERS: [RegisterId; 2] = [
    RegisterId::from_bytes([0xa; 16]),
    RegisterId::from_bytes([0xb; 16]),
];
pub(super) const MIGRATION: MigrationId = MigrationId::from_bytes([1; 16]);

pub(super) fn reason() -> WireError {
    WireError {
        code: ErrorCode::Internal,
        detail: String::new(),
    }
}

fn process() -> ProcessRecord {
    ProcessRecord {
        pid: 1,
        start_ticks: 1,
        boot_id: String::new(),
    }
}

pub(super) fn source_machine() -> SourceHandover {
    SourceHandover::new(SourceFacts {
        guest: "g".parse().expect("a legal name"),
        migration: MIGRATION,
        generation: Generation(1),
        peer: Peer {
            address: String::new(),
            identity: String::new(),
        },
        process: process(),
        shared_disks: false,
    })
}

fn destination_machine(register: RegisterId) -> DestinationHandover {
    DestinationHandover::new(DestinationFacts {
        guest: "g".parse().expect("a legal name"),
        migration: MIGRATION,
        generation: Generation(1),
        sender: String::new(),
        register,
        earlier: Vec::new(),
    })
}

impl World {
    /// A guest that runs at the source; nothing was ever sent or written.
    #[must_use]
    pub fn new() -> Self {
        Self {
            source: Shared::new(SourceSide {
                machine: Some(source_machine()),
                disk: Disk::empty(),
                guest: Guest::Running,
                cont: false,
                work: None,
                session: None,
            }),
            destination: Shared::new(DestinationSide {
                machine: Some(destination_machine(REGISTERS[0])),
                disk: Disk::empty(),
                other_disk: Disk::empty(),
                register: REGISTERS[0],
                guest: Guest::Missing,
                cont: false,
                work: None,
                fenced: false,
            }),
            network: Shared::new(BTreeSet::new()),
            elsewhere: false,
            used: Used::default(),
            seen: Seen::default(),
            bad: None,
        }
    }

    /// The same, but the destination has a second state folder in which attempt 1 of this very migration is ABORTED: a source that was restarted
    /// before PAUSING had opened it there.
    #[must_use]
    pub fn with_an_abort_in_the_other_folder() -> Self {
        let mut world = Self::new();
        let record = DestinationRecord {
            state: DestinationState::Aborted {
                attempt: Attempt(1),
                reason: reason(),
            },
            ..destination_machine(REGISTERS[1]).record()
        };
        world.destination.other_disk.durable = Some(record.clone());
        world.destination.other_disk.visible = Some(record);
        world
    }

    /// Guests that run.
    #[must_use]
    pub fn runners(&self) -> usize {
        usize::from(self.source.guest == Guest::Running)
            + usize::from(self.destination.guest == Guest::Running)
            + usize::from(self.elsewhere)
    }

    /// What the source's host answers to whoever asks before he boots the guest.
    #[must_use]
    pub fn may_boot_at_source(&self) -> bool {
        let record = self.source.disk.visible.as_ref();
        record.is_none_or(|record| record.claim() == OwnershipClaim::Here)
    }

    /// What the destination's host answers; whoever it was that fenced it for good asks no more.
    #[must_use]
    pub fn may_boot_at_destination(&self) -> bool {
        let record = self.destination.disk.visible.as_ref();
        !self.destination.fenced
            && record.is_some_and(|record| record.claim() == OwnershipClaim::Here)
    }

    /// Whether the source's journal says that only the destination knows.
    pub(super) fn is_in_doubt(&self) -> bool {
        let record = self.source.disk.visible.as_ref();
        record.is_some_and(|record| matches!(record.state, SourceState::Committing { .. }))
    }

    pub(super) fn say(&mut self, message: Message) {
        if !self.network.contains(&message) {
            self.network.insert(message);
        }
    }

    pub(super) fn blame(&mut self, what: &'static str) {
        self.bad.get_or_insert(what);
    }

    /// Feeds the source's machine; an event that it does not expect changes nothing.
    pub(super) fn tell_source(&mut self, event: SourceEvent, mutation: Option<Mutation>) {
        let Some(mut machine) = self.source.machine.clone() else {
            return;
        };
        let Ok(actions) = machine.handle(event) else {
            return;
        };
        if self.source.machine.as_ref() != Some(&machine) {
            self.source.machine = Some(machine);
        }
        self.do_source(actions, mutation);
    }

    /// Feeds the destination's machine; an event that it does not expect changes nothing.
    pub(super) fn tell_destination(&mut self, event: DestinationEvent, mutation: Option<Mutation>) {
        let Some(mut machine) = self.destination.machine.clone() else {
            return;
        };
        let Ok(actions) = machine.handle(event) else {
            return;
        };
        if self.destination.machine.as_ref() != Some(&machine) {
            self.destination.machine = Some(machine);
        }
        self.do_destination(actions, mutation);
    }

    fn do_source(&mut self, actions: Vec<SourceAction>, mutation: Option<Mutation>) {
        for action in actions {
            match action {
                SourceAction::Record(record) => self.source_records(*record, mutation),
                SourceAction::Connect { session } => {
                    self.source.session = Some((session, false));
                    self.say(Message::Hello(session));
                }
                SourceAction::Send(message) => self.source_sends(&message, mutation),
                SourceAction::PauseGuest { .. } => self.source.work = Some(Work::Pause),
                SourceAction::StreamFinal { attempt, .. } => {
                    self.source.work = Some(Work::Stream(attempt));
                }
                SourceAction::StopStream => self.source.work = None,
                SourceAction::CheckPaused { attempt } => {
                    self.source.work = Some(Work::Check(attempt));
                }
                SourceAction::Resume { .. } => self.source.cont = true,
                SourceAction::Release => self.source.work = Some(Work::Release),
                SourceAction::EndGuest => self.blame("the guest is ended without shared disks"),
                SourceAction::CloseSession => self.source.session = None,
                SourceAction::StartTimer(_) | SourceAction::Report(_) | SourceAction::Done(_) => {}
            }
        }
        let doubt = self
            .source
            .machine
            .as_ref()
            .is_some_and(SourceHandover::is_in_doubt);
        self.seen.in_doubt |= doubt;
    }

    fn source_records(&mut self, record: SourceRecord, mutation: Option<Mutation>) {
        if self.source.disk.writing.is_some() {
            self.blame("two writes in flight at the source");
        }
        if mutation == Some(Mutation::ResumeBeforeRolledBack)
            && matches!(record.state, SourceState::RolledBack { .. })
        {
            self.source.cont = true;
        }
        self.source.disk.writing = Some(record);
    }

    fn source_sends(&mut self, message: &ToDestination, mutation: Option<Mutation>) {
        let register = |mut key: AttemptKey| {
            if mutation == Some(Mutation::BelieveOtherRegister) {
                key.register = self.destination.register;
            }
            key
        };
        let message = match message {
            ToDestination::OpenAttempt { attempt } => Message::Open(*attempt),
            ToDestination::Abort { attempt, .. } => Message::Abort(*attempt),
            ToDestination::Commit(key) => Message::Commit(register(*key)),
            ToDestination::Query(key) => Message::Query(register(*key)),
            ToDestination::Cancel { .. } => Message::Cancel,
            ToDestination::Goodbye => return,
            ToDestination::Hello(_)
            | ToDestination::Offer(_)
            | ToDestination::Converged
            | ToDestination::Compare(_)
            | ToDestination::Final(_)
            | ToDestination::DeviceState { .. }
            | ToDestination::Error(_) => {
                self.blame("the source's machine sent what is the agent's to send");
                return;
            }
        };
        self.say(message);
    }

    fn do_destination(&mut self, actions: Vec<DestinationAction>, mutation: Option<Mutation>) {
        for action in actions {
            match action {
                DestinationAction::Record(record) => self.destination_records(*record, mutation),
                DestinationAction::Welcome { session } => {
                    let register = self.destination.register;
                    self.say(Message::Welcome(session, register));
                }
                DestinationAction::MakeCopy { .. } => {
                    // A guest that runs holds its images: the wrong state folder cannot take them.
                    if self.destination.guest != Guest::Running {
                        self.copy_goes();
                    }
                    self.destination.work = Some(Work::Make);
                }
                DestinationAction::Ready => {
                    if let Some(machine) = &self.destination.machine {
                        self.say(Message::Ready(machine.session()));
                    }
                }
                DestinationAction::Send(message) => self.destination_sends(&message, mutation),
                DestinationAction::LoadState { .. } => {
                    self.destination.work = Some(Work::Load);
                }
                DestinationAction::Start { .. } => self.destination.cont = true,
                DestinationAction::Discard => self.destination.work = Some(Work::Discard),
                DestinationAction::Refuse(_)
                | DestinationAction::RetryLater
                | DestinationAction::Report(_)
                | DestinationAction::Done(_) => {}
            }
        }
    }

    /// The copy is removed or replaced.
    pub(super) fn copy_goes(&mut self) {
        if self.destination.guest == Guest::Running {
            self.blame("a running guest is discarded at the destination");
        }
        self.destination.guest = Guest::Missing;
        self.destination.cont = false;
    }

    fn destination_records(&mut self, record: DestinationRecord, mutation: Option<Mutation>) {
        if self.destination.disk.writing.is_some() {
            self.blame("two writes in flight at the destination");
        }
        if mutation == Some(Mutation::StartBeforeOwned)
            && matches!(record.state, DestinationState::Owned { .. })
        {
            self.destination.cont = true;
        }
        self.destination.disk.writing = Some(record);
    }

    fn destination_sends(&mut self, message: &ToSource, mutation: Option<Mutation>) {
        let message = match message {
            ToSource::AttemptOpened { attempt } => Message::Opened(*attempt),
            ToSource::Prepared(prepared) => Message::Prepared(prepared.key),
            ToSource::Outcome(Outcome { key, verdict }) => match verdict {
                Verdict::Committed { .. } => Message::Committed(*key),
                Verdict::Aborted(_) => Message::Aborted(*key),
                Verdict::Unknown if mutation == Some(Mutation::UnknownIsAborted) => {
                    Message::Aborted(*key)
                }
                Verdict::Unknown => Message::Unknown(*key),
            },
            ToSource::Cancelled => Message::Cancelled,
            ToSource::Welcome(_)
            | ToSource::Ready(_)
            | ToSource::Progress(_)
            | ToSource::Digests(_)
            | ToSource::Compared(_)
            | ToSource::Complete { .. }
            | ToSource::Error(_) => {
                self.blame("the destination's machine sent what is the agent's to send");
                return;
            }
        };
        self.say(message);
    }

    /// Delivers one message to the destination's agent.
    pub(super) fn reach_destination(&mut self, message: Message, mutation: Option<Mutation>) {
        if self.is_replaced() {
            self.ask_replaced(message);
            return;
        }
        let current = self
            .destination
            .machine
            .as_ref()
            .map(DestinationHandover::session);
        let event = match message {
            Message::Hello(session) => DestinationEvent::SessionOpened { session },
            Message::Offer(session) if current == Some(session) => DestinationEvent::Offered,
            Message::Open(attempt) => DestinationEvent::OpenAttempt { attempt },
            Message::State(attempt) => DestinationEvent::StateReceived {
                attempt,
                to: RunState::Running,
            },
            Message::Abort(attempt) => DestinationEvent::Abort {
                attempt,
                reason: reason(),
            },
            Message::Commit(key) => DestinationEvent::Commit(key),
            Message::Query(key) => DestinationEvent::Query(key),
            Message::Cancel => DestinationEvent::Cancel { reason: reason() },
            Message::Offer(_)
            | Message::Welcome(..)
            | Message::Ready(_)
            | Message::Opened(_)
            | Message::Prepared(_)
            | Message::Committed(_)
            | Message::Aborted(_)
            | Message::Unknown(_)
            | Message::Cancelled => return,
        };
        self.tell_destination(event, mutation);
    }

    /// Delivers one message to the source's agent.
    pub(super) fn reach_source(&mut self, message: Message, mutation: Option<Mutation>) {
        let outcome = |mut key: AttemptKey, verdict| {
            if mutation == Some(Mutation::BelieveOtherRegister) {
                key.register = self.committing_register().unwrap_or(key.register);
            }
            SourceEvent::Outcome(Outcome { key, verdict })
        };
        let event = match message {
            Message::Welcome(session, register)
                if self.source.session == Some((session, false)) =>
            {
                SourceEvent::Connected { register }
            }
            Message::Ready(session) => {
                if self.source.session == Some((session, false)) {
                    self.source.session = Some((session, true));
                }
                return;
            }
            Message::Opened(attempt) => SourceEvent::AttemptOpened { attempt },
            Message::Prepared(key) => SourceEvent::Prepared { key },
            Message::Committed(key) => outcome(
                key,
                Verdict::Committed {
                    record_us: 0,
                    start_us: 0,
                },
            ),
            Message::Aborted(key) => outcome(key, Verdict::Aborted(reason())),
            Message::Unknown(key) => outcome(key, Verdict::Unknown),
            Message::Cancelled => SourceEvent::Cancelled,
            Message::Welcome(..)
            | Message::Hello(_)
            | Message::Offer(_)
            | Message::Open(_)
            | Message::State(_)
            | Message::Abort(_)
            | Message::Commit(_)
            | Message::Query(_)
            | Message::Cancel => return,
        };
        let welcomed = matches!(event, SourceEvent::Connected { .. });
        self.tell_source(event, mutation);
        if welcomed {
            self.offer();
        }
    }

    fn committing_register(&self) -> Option<RegisterId> {
        match &self.source.machine.as_ref()?.record().state {
            SourceState::Committing { key } => Some(key.register),
            SourceState::Copying { .. }
            | SourceState::Pausing { .. }
            | SourceState::RolledBack { .. }
            | SourceState::Released { .. }
            | SourceState::Fenced { .. }
            | SourceState::Ended { .. } => None,
        }
    }

    /// A source that copies offers its guest on every new session; one in doubt does not.
    fn offer(&mut self) {
        let copies = self
            .source
            .machine
            .as_ref()
            .is_some_and(SourceHandover::can_cut_over);
        if let (true, Some((session, _))) = (copies, self.source.session) {
            self.say(Message::Offer(session));
        }
    }

    /// The source's write in flight is durable.
    pub(super) fn source_written(&mut self, mutation: Option<Mutation>) {
        self.note_committing();
        self.source.disk.complete();
        self.tell_source(SourceEvent::Recorded, mutation);
    }

    /// The source's write in flight failed.
    pub(super) fn source_write_failed(&mut self, visible: bool, mutation: Option<Mutation>) {
        if visible {
            self.note_committing();
        }
        let committing = matches!(
            self.source
                .disk
                .writing
                .as_ref()
                .map(|record| &record.state),
            Some(SourceState::Committing { .. })
        );
        self.source.disk.cut(visible);
        let forget = mutation == Some(Mutation::FailedCommittingIsNone) && committing;
        let event = SourceEvent::RecordFailed {
            visible: visible && !forget,
            reason: reason(),
        };
        self.tell_source(event, mutation);
    }

    fn note_committing(&mut self) {
        if let Some(record) = &self.source.disk.writing
            && let SourceState::Committing { key } = &record.state
        {
            self.seen.committing = self.seen.committing.max(key.attempt);
        }
    }

    /// The source's agent dies; `landed`: its write in flight had reached the rename.
    pub(super) fn crash_source(&mut self, landed: bool) {
        if landed {
            self.note_committing();
        }
        let doubt = self
            .source
            .machine
            .as_ref()
            .is_some_and(SourceHandover::is_in_doubt);
        self.seen.crash_in_committing |= doubt;
        self.source.disk.cut(landed);
        self.source.machine = None;
        self.source.work = None;
        self.source.session = None;
    }

    /// It comes back and reads its journal.
    pub(super) fn restart_source(&mut self, mutation: Option<Mutation>) {
        match self.source.disk.visible.clone() {
            Some(record) => {
                let (machine, actions) = SourceHandover::recover(record);
                self.source.machine = Some(machine);
                self.do_source(actions, mutation);
            }
            None => self.source.machine = Some(source_machine()),
        }
    }

    /// The destination's agent dies; its guests live on.
    pub(super) fn crash_destination(&mut self, landed: bool) {
        self.destination.disk.cut(landed);
        self.destination.machine = None;
        self.destination.work = None;
    }

    /// It comes back and reads its journal.
    pub(super) fn restart_destination(&mut self, mutation: Option<Mutation>) {
        let found = match self.destination.guest {
            Guest::Missing => CopyFound::Missing,
            Guest::Fresh => CopyFound::Receiving,
            Guest::Still | Guest::Running => CopyFound::Used,
        };
        match self.destination.disk.visible.clone() {
            Some(record) => {
                let (machine, actions) = DestinationHandover::recover(record, found);
                self.destination.machine = Some(machine);
                self.do_destination(actions, mutation);
            }
            None => {
                let register = self.destination.register;
                self.destination.machine = Some(destination_machine(register));
            }
        }
    }

    /// The dead destination is started with its other state folder. What runs or waits on the host stays as it is, but for a copy that
    /// this folder knows nothing of.
    pub(super) fn switch_folder(&mut self) {
        let host = &mut self.destination;
        let host: &mut DestinationSide = host;
        std::mem::swap(&mut host.disk, &mut host.other_disk);
        host.register = if host.register == REGISTERS[0] {
            REGISTERS[1]
        } else {
            REGISTERS[0]
        };
    }

    /// Whether the destination runs with another state folder than the one whose answer the source waits for.
    pub(super) fn has_wrong_folder(&self) -> bool {
        let asked = self.committing_register();
        !self.destination.fenced && asked.is_some_and(|asked| asked != self.destination.register)
    }

    /// The hypervisor at the source carries out a `cont`.
    pub(super) fn source_continues(&mut self, mutation: Option<Mutation>) {
        self.source.cont = false;
        let allowed = match self
            .source
            .disk
            .durable
            .as_ref()
            .map(|record| &record.state)
        {
            Some(SourceState::Fenced { .. } | SourceState::RolledBack { .. }) => true,
            // The resume was answered before the agent died; a later record stands behind it.
            Some(SourceState::Copying { .. } | SourceState::Ended { .. }) => {
                self.source.guest == Guest::Running
            }
            Some(
                SourceState::Pausing { .. }
                | SourceState::Committing { .. }
                | SourceState::Released { .. },
            )
            | None => false,
        };
        if !allowed {
            self.blame("[HAND-3] the source resumed without a durable ROLLED_BACK");
        }
        self.check_resume_out_of_committing();
        let event = match self.source.guest {
            Guest::Missing => SourceEvent::GuestGone,
            Guest::Fresh | Guest::Still | Guest::Running => SourceEvent::Resumed,
        };
        if self.source.guest == Guest::Still {
            self.source.guest = Guest::Running;
        }
        self.tell_source(event, mutation);
    }

    /// `[HAND-4]`: out of COMMITTING only the register's ABORTED or an operator's word leads back.
    pub(super) fn check_resume_out_of_committing(&mut self) {
        let attempt = match &self.source.disk.durable {
            Some(record) => record.state.attempt(),
            None => Attempt(0),
        };
        if self.seen.committing != attempt || attempt == Attempt(0) || self.destination.fenced {
            return;
        }
        let settled = [&self.destination.disk, &self.destination.other_disk]
            .into_iter()
            .filter_map(|disk| disk.durable.as_ref())
            .any(|record| match &record.state {
                _ if record.migration != MIGRATION => {
                    let aborts =
                        |earlier: &EarlierOutcome| !earlier.committed && earlier.attempt >= attempt;
                    record.earlier.iter().any(aborts)
                }
                DestinationState::Aborted { attempt: a, .. }
                | DestinationState::Relinquished { attempt: a, .. }
                | DestinationState::Ended { last: a, .. } => *a >= attempt,
                DestinationState::Opened { attempt: a } => *a > attempt,
                DestinationState::Receiving | DestinationState::Owned { .. } => false,
            });
        if !settled {
            self.blame("[HAND-4] the source resumed out of COMMITTING without an ABORTED");
        }
    }

    /// The hypervisor at the destination carries out a `cont`, or is gone: then the guest provably never ran.
    pub(super) fn destination_continues(&mut self) -> DestinationEvent {
        self.destination.cont = false;
        if matches!(self.destination.guest, Guest::Still | Guest::Running) {
            self.destination.guest = Guest::Running;
            return DestinationEvent::Started {
                record_us: 0,
                start_us: 0,
            };
        }
        DestinationEvent::StartFailed {
            never_ran: true,
            reason: reason(),
        }
    }

    /// `[HAND-2]`, `[HAND-3]`: a guest that runs at the destination is OWNED durably, in one of its folders.
    #[must_use]
    pub fn destination_run_is_recorded(&self) -> bool {
        let owned = |disk: &Disk<DestinationRecord>| {
            matches!(
                disk.durable.as_ref().map(|record| &record.state),
                Some(DestinationState::Owned { .. })
            )
        };
        self.destination.guest != Guest::Running
            || owned(&self.destination.disk)
            || owned(&self.destination.other_disk)
    }

    /// The source lets its copy go.
    pub(super) fn source_releases(&mut self, mutation: Option<Mutation>) {
        if !matches!(
            self.source
                .disk
                .durable
                .as_ref()
                .map(|record| &record.state),
            Some(SourceState::Released { .. })
        ) {
            self.blame("[HAND-3] the source let go without a durable RELEASED");
        }
        let owned = [&self.destination.disk, &self.destination.other_disk]
            .into_iter()
            .any(|disk| {
                matches!(
                    disk.durable.as_ref().map(|record| &record.state),
                    Some(DestinationState::Owned { .. })
                )
            });
        if !owned && !self.replaced_after_commit() {
            self.blame("[HAND-3] the source let go before OWNED");
        }
        self.source.work = None;
        self.source.guest = Guest::Missing;
        self.tell_source(SourceEvent::Released, mutation);
    }

    pub(super) fn source_state(&self) -> &'static str {
        self.source
            .machine
            .as_ref()
            .map_or("crashed", SourceHandover::state_name)
    }

    pub(super) fn loaded() -> DestinationEvent {
        DestinationEvent::StateLoaded {
            timing: PrepareTiming::default(),
        }
    }

    /// The copy's process is there, and waits on its stage until the journal names it.
    pub(super) fn launch_copy(&mut self, mutation: Option<Mutation>) {
        self.destination.work = Some(Work::LetGo);
        let process = process();
        self.tell_destination(DestinationEvent::CopyLaunched { process }, mutation);
    }

    /// It is let go, or ended where the journal could not name it.
    pub(super) fn let_copy_go(&mut self, mutation: Option<Mutation>) {
        let process = process();
        let machine = self.destination.machine.as_ref();
        let named = machine.is_some_and(|machine| machine.names(&process));
        if !named && mutation != Some(Mutation::LetGoUnnamed) {
            let event = DestinationEvent::MakeCopyFailed { reason: reason() };
            self.tell_destination(event, mutation);
            return;
        }
        let durable = self.destination.disk.durable.as_ref();
        if durable.and_then(|record| record.process.as_ref()) != Some(&process) {
            self.blame("a process that the journal does not name is let go");
        }
        self.destination.guest = Guest::Fresh;
        self.tell_destination(DestinationEvent::CopyMade { process }, mutation);
    }

    pub(super) fn source_timer(&mut self, timer: Timer, mutation: Option<Mutation>) {
        self.tell_source(SourceEvent::TimedOut(timer), mutation);
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}
