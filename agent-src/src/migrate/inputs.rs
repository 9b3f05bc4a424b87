//! Everything that can happen while something else is under way, in one place to wait for it.
//!
//! Owns the waiting and the translation of what came into what it means: in the copy an error that ends or
//! interrupts it, during a handover an event for the machine. Waiting is cancel safe, so the copy can wait
//! for a lane and for everything else at once.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use vmferry_hypervisor::GuestLife;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{SourceEvent, Timer};
use vmferry_proto::message::{ToSource, Verdict};

use super::Migration;
use crate::error::{LinkError, MigrateError};
use crate::local::Command;
use crate::session::Session;

/// For so long an agent that is told to stop while it is in doubt goes on asking, so that a destination that can be reached settles it.
const LEAVE_AFTER: Duration = Duration::from_secs(10);

/// Something happened.
#[derive(Debug)]
pub(super) enum Input {
    /// The destination said something.
    Peer(ToSource),
    /// The session is gone.
    LinkLost(LinkError),
    /// A lane could not read the guest, or the peer broke the protocol.
    Failed(MigrateError),
    /// A timer of the handover ran out.
    Timer(Timer),
    /// The whole migration has taken too long.
    Deadline,
    /// Somebody wants the cutover.
    Trigger,
    /// Somebody wants the end; whoever it is.
    Cancel(&'static str),
    /// The process is to stop now, whatever the state.
    Leave,
    /// An operator vouches that the destination is fenced.
    Fenced,
    /// The guest is gone.
    GuestEnded(GuestLife),
}

/// The handover's timers: one of each kind at most.
#[derive(Debug, Default)]
pub(super) struct Timers {
    running: Vec<(Timer, Instant)>,
}

impl Timers {
    /// Starts `timer`, replacing one of its kind.
    pub(super) fn start(&mut self, timer: Timer, after: Duration) {
        let kind = std::mem::discriminant(&timer);
        self.running
            .retain(|(other, _)| std::mem::discriminant(other) != kind);
        self.running.push((timer, Instant::now() + after));
    }

    /// The next to run out; waits for ever where none runs. Cancel safe.
    async fn next(&mut self) -> Timer {
        let Some((index, (timer, at))) = self
            .running
            .iter()
            .copied()
            .enumerate()
            .min_by_key(|(_, (_, at))| *at)
        else {
            return std::future::pending().await;
        };
        sleep_until(at).await;
        self.running.remove(index);
        timer
    }
}

enum Ready {
    Link(Result<ToSource, LinkError>),
    Command(Option<Command>),
    Life,
    Timer(Timer),
    Deadline,
    Tick,
}

impl Migration {
    /// The next thing that happens. Cancel safe; `status` and the display are served on the way.
    pub(super) async fn input(&mut self) -> Input {
        loop {
            let deadline = self.deadline();
            let Self {
                session,
                commands,
                life,
                timers,
                ticker,
                ..
            } = self;
            let ready = tokio::select! {
                // What is rare goes first: the peer may have something to say at any time.
                biased;
                command = commands.recv() => Ready::Command(command),
                // Once only: when the driver has told the end, it tells no more, and the rest must have its turn.
                Ok(()) = life.changed() => Ready::Life,
                timer = timers.next() => Ready::Timer(timer),
                () = sleep_until(deadline) => Ready::Deadline,
                _ = ticker.tick() => Ready::Tick,
                message = Session::next(session.as_mut()) => Ready::Link(message),
            };
            if let Some(input) = self.interpret(ready) {
                return input;
            }
        }
    }

    /// The moment at which `--timeout` ends the copy; never once a handover is under way, whose own timers bound it.
    /// A doubt has one only where the process is told to stop.
    fn deadline(&self) -> Instant {
        const FAR: Duration = Duration::from_secs(365 * 24 * 3600);
        if let Some(leave_at) = self.leave_at
            && self.handover.is_in_doubt()
        {
            leave_at
        } else if self.handover.is_copying() && self.end.is_none() && !self.parting {
            self.began + self.options.limits.timeout
        } else {
            Instant::now() + FAR
        }
    }

    fn interpret(&mut self, ready: Ready) -> Option<Input> {
        match ready {
            // `[WIRE-53]`, `[WIRE-56]`: nothing was sent yet in the next session, so everything goes whole.
            Ready::Link(Ok(ToSource::Error(error))) if error.code == ErrorCode::LinkLost => {
                self.counters.send_only_whole();
                Some(self.lost(LinkError::GivenUp(error)))
            }
            Ready::Link(Ok(message)) => Some(Input::Peer(message)),
            Ready::Link(Err(error)) => Some(self.lost(error)),
            Ready::Command(command) => self.on_command(command),
            Ready::Life => {
                let life = self.life.borrow_and_update().clone();
                (life != GuestLife::Alive).then_some(Input::GuestEnded(life))
            }
            Ready::Timer(timer) => Some(Input::Timer(timer)),
            Ready::Deadline if self.handover.is_in_doubt() => Some(Input::Leave),
            Ready::Deadline => Some(Input::Deadline),
            Ready::Tick => {
                let sent = self.session.as_ref().map_or(0, Session::sent_bytes);
                self.counters.tick(usize::from(self.options.lanes), sent);
                self.show();
                None
            }
        }
    }

    /// The session is of no use any more; a guest that cannot be read is no matter of the link.
    fn lost(&mut self, error: LinkError) -> Input {
        match error {
            LinkError::Lane(lane) if lane.is_guest() => Input::Failed(MigrateError::Read(lane)),
            LinkError::Protocol(error) => Input::Failed(MigrateError::Protocol(error)),
            error => {
                self.session = None;
                Input::LinkLost(error)
            }
        }
    }

    fn on_command(&mut self, command: Option<Command>) -> Option<Input> {
        match command {
            Some(Command::Status(reply)) => {
                // The asker may have gone away: then nobody wants the answer.
                let _ = reply.send(self.status());
                None
            }
            Some(Command::Set(settings, reply)) => {
                let _ = reply.send(self.set_limits(&settings));
                None
            }
            Some(Command::Cutover(waiter)) => {
                self.waiters.push(waiter);
                Some(Input::Trigger)
            }
            Some(Command::Cancel(waiter)) => {
                self.waiters.push(waiter);
                Some(Input::Cancel("`vmferry-src cancel`"))
            }
            Some(Command::Resolve(waiter)) => {
                self.waiters.push(waiter);
                Some(Input::Fenced)
            }
            Some(Command::Signal { name, again: false }) => {
                self.leave_at = Some(Instant::now() + LEAVE_AFTER);
                Some(Input::Cancel(name))
            }
            Some(Command::Signal { again: true, .. }) | None => Some(Input::Leave),
        }
    }

    /// In the copy: waits for one thing and deals with it.
    ///
    /// # Errors
    /// Whatever interrupts or ends the copy.
    pub(super) async fn attend(&mut self) -> Result<(), MigrateError> {
        let input = self.input().await;
        self.on_input(input)
    }

    /// In the copy: deals with what came.
    pub(super) fn on_input(&mut self, input: Input) -> Result<(), MigrateError> {
        match input {
            Input::Peer(message) => self.on_copy_message(message),
            Input::LinkLost(error) => Err(MigrateError::SessionLost(error)),
            Input::Failed(error) => Err(error),
            Input::Timer(_) | Input::Fenced => Ok(()),
            Input::Deadline => Err(MigrateError::TimedOut(self.options.limits.timeout)),
            Input::Trigger => {
                self.triggered = true;
                Ok(())
            }
            Input::Cancel(who) => Err(MigrateError::Cancelled(who)),
            Input::Leave => Err(MigrateError::Cancelled("a second signal")),
            Input::GuestEnded(life) => Err(MigrateError::GuestEnded(life)),
        }
    }

    fn on_copy_message(&mut self, message: ToSource) -> Result<(), MigrateError> {
        match message {
            ToSource::Progress(lanes) => self.on_progress(&lanes),
            ToSource::Error(error) => {
                self.session = None;
                Err(MigrateError::Peer(error))
            }
            // Late answers of an attempt that was rolled back; what is compared is read where it is asked for.
            ToSource::AttemptOpened { .. }
            | ToSource::Digests(_)
            | ToSource::Compared(_)
            | ToSource::Complete { .. }
            | ToSource::Prepared(_)
            | ToSource::Outcome(_) => Ok(()),
            ToSource::Welcome(_) | ToSource::Ready(_) | ToSource::Cancelled => Err(
                MigrateError::Protocol(unexpected("a message of another phase during the copy")),
            ),
        }
    }

    /// During a handover: waits for one thing and says what it means to the machine.
    pub(super) async fn attend_handover(&mut self) -> Option<SourceEvent> {
        let input = self.input().await;
        self.handover_input(input)
    }

    /// During a handover: what `input` means to the machine.
    pub(super) fn handover_input(&mut self, input: Input) -> Option<SourceEvent> {
        match input {
            Input::Peer(message) => self.handover_event(message),
            Input::LinkLost(error) => {
                let reason = MigrateError::SessionLost(error).to_wire();
                Some(SourceEvent::ConnectionLost { reason })
            }
            Input::Failed(error) => Some(self.drop_session(&error)),
            Input::Timer(timer) => Some(SourceEvent::TimedOut(timer)),
            Input::Deadline => None,
            Input::Trigger => {
                self.triggered = true;
                None
            }
            Input::Cancel(who) => Some(SourceEvent::Cancel {
                reason: MigrateError::Cancelled(who).to_wire(),
            }),
            Input::Leave => {
                self.left_in_doubt = self.handover.is_in_doubt();
                None
            }
            Input::Fenced => Some(SourceEvent::ResolveDestinationFenced),
            Input::GuestEnded(life) => {
                let reason = MigrateError::GuestEnded(life).to_wire();
                Some(SourceEvent::GuestTouched { reason })
            }
        }
    }

    fn handover_event(&mut self, message: ToSource) -> Option<SourceEvent> {
        match message {
            ToSource::Progress(lanes) => self
                .on_progress(&lanes)
                .err()
                .map(|error| self.drop_session(&error)),
            ToSource::AttemptOpened { attempt } => Some(SourceEvent::AttemptOpened { attempt }),
            ToSource::Prepared(prepared) => {
                self.stats.on_prepared(&prepared.timing);
                Some(SourceEvent::Prepared { key: prepared.key })
            }
            ToSource::Outcome(outcome) => {
                if let Verdict::Committed {
                    record_us,
                    start_us,
                } = outcome.verdict
                {
                    self.stats.on_committed(record_us, start_us);
                }
                Some(SourceEvent::Outcome(outcome))
            }
            ToSource::Cancelled => Some(SourceEvent::Cancelled),
            ToSource::Error(error) => Some(self.drop_session(&MigrateError::Peer(error))),
            // Digests and Complete belong to the flight, which reads them itself; Ready and Compared may cross a cancel on the way.
            ToSource::Digests(_)
            | ToSource::Complete { .. }
            | ToSource::Ready(_)
            | ToSource::Compared(_) => None,
            ToSource::Welcome(_) => {
                let error = unexpected("a message of another phase during the handover");
                Some(self.drop_session(&MigrateError::Protocol(error)))
            }
        }
    }

    pub(super) fn drop_session(&mut self, error: &MigrateError) -> SourceEvent {
        self.session = None;
        SourceEvent::ConnectionLost {
            reason: error.to_wire(),
        }
    }
}

fn unexpected(what: &str) -> WireError {
    WireError::new(ErrorCode::ProtocolViolation, what)
}
