//! A newer migration of the guest at the destination, while the source of the checked one may still be in doubt (`[HAND-16]`).
//!
//! Owns when it may come and how the destination's agent answers about the replaced one: by the real admission and the real record.
//! The newer migration itself goes no further than its first record, since nothing more of it can reach the checked one. Where the
//! guest was the destination's, it has left for a third host, runs there, and is what comes back.

use vmferry_proto::handover::{
    Admission, DestinationEvent, DestinationFacts, DestinationHandover, DestinationRecord,
    RegisterAnswer, SourceRecord, SourceState, admit,
};
use vmferry_proto::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use vmferry_proto::message::{AttemptKey, Hello, Verdict};
use vmferry_proto::version::{Features, SUPPORTED};

use super::action::Mutation;
use super::hosts::{Guest, MIGRATION, Message, World, source_machine};

const NEWER: MigrationId = MigrationId::from_bytes([2; 16]);
/// The guest left with generation 2 and comes back with 3.
const LEFT_WITH: Generation = Generation(2);
const BACK_WITH: Generation = Generation(3);
const OTHER_SENDER: &str = "a third host";

fn hello(guest: GuestName, migration: MigrationId, generation: u64, session: u64) -> Hello {
    Hello {
        versions: SUPPORTED,
        features: Features::default(),
        guest,
        migration,
        generation: Generation(generation),
        session: SessionNumber(session),
        lanes: 1,
        connections: 1,
        connection: 0,
    }
}

/// What the destination's host wrote down when it sent the guest on.
fn sent_on() -> SourceRecord {
    SourceRecord {
        generation: LEFT_WITH,
        state: SourceState::Released {
            key: AttemptKey {
                migration: MigrationId::from_bytes([3; 16]),
                attempt: Attempt(1),
                register: RegisterId::from_bytes([0xc; 16]),
            },
        },
        ..source_machine().record()
    }
}

impl World {
    /// Whether the destination's agent would let a newer migration in: the checked one is over there, and the journals say so.
    pub(super) fn may_be_replaced(&self) -> bool {
        let host = &self.destination;
        let (Some(machine), Some(record)) = (&host.machine, &host.disk.visible) else {
            return false;
        };
        let owned = machine.state_name() == "OWNED" && host.guest == Guest::Running;
        // The agent writes before it hears of anything else.
        if host.disk.writing.is_some() || (!owned && !machine.is_ended()) {
            return false;
        }
        let source = owned.then(sent_on);
        let hello = hello(record.guest.clone(), NEWER, BACK_WITH.0, 1);
        let admission = admit(&hello, OTHER_SENDER, source.as_ref(), Some(record));
        admission == Ok(Admission::New)
    }

    /// The newer migration begins.
    pub(super) fn replace(&mut self, mutation: Option<Mutation>) {
        let Some(record) = self.destination.disk.visible.clone() else {
            return;
        };
        self.elsewhere |= self.destination.guest == Guest::Running;
        self.destination.guest = Guest::Missing;
        let mut earlier = record.outcomes();
        if mutation == Some(Mutation::ForgetsEarlier) {
            earlier.clear();
        }
        self.destination.machine = Some(DestinationHandover::new(DestinationFacts {
            guest: record.guest,
            migration: NEWER,
            generation: BACK_WITH,
            sender: OTHER_SENDER.to_owned(),
            register: record.register,
            earlier,
        }));
        let session = SessionNumber(1);
        self.tell_destination(DestinationEvent::SessionOpened { session }, mutation);
    }

    /// Whether the destination's agent works on the newer migration: it does not where it died before that was written down.
    pub(super) fn is_replaced(&self) -> bool {
        let machine = self.destination.machine.as_ref();
        machine.is_some_and(|machine| machine.record().migration != MIGRATION)
    }

    /// The source of the replaced migration asks.
    pub(super) fn ask_replaced(&mut self, message: Message) {
        let Some(record) = self.destination.disk.visible.clone() else {
            return;
        };
        if record.migration == MIGRATION {
            // The agent refuses, since the newer one that it begins holds the guest: the source tries again.
            return;
        }
        match message {
            Message::Hello(session) => {
                let hello = hello(record.guest.clone(), MIGRATION, 1, session.0);
                if admit(&hello, "", None, Some(&record)) == Ok(Admission::Replaced) {
                    self.say(Message::Welcome(session, record.register));
                }
            }
            Message::Commit(key) | Message::Query(key) => self.answer_replaced(&record, key),
            Message::Cancel => self.say(Message::Cancelled),
            // Refused: the session is over, which the source may learn at any time.
            _ => {}
        }
    }

    fn answer_replaced(&mut self, record: &DestinationRecord, key: AttemptKey) {
        self.say(match record.answer(&key) {
            RegisterAnswer::Settled(Verdict::Committed { .. }) => Message::Committed(key),
            RegisterAnswer::Settled(Verdict::Aborted(_)) => Message::Aborted(key),
            RegisterAnswer::Settled(Verdict::Unknown) | RegisterAnswer::Undecided => {
                Message::Unknown(key)
            }
        });
    }

    /// Whether a durable record says that the checked migration was committed before a newer one replaced it.
    pub(super) fn replaced_after_commit(&self) -> bool {
        let durable = self.destination.disk.durable.as_ref();
        durable.is_some_and(|record| record.earlier.iter().any(|earlier| earlier.committed))
    }
}
