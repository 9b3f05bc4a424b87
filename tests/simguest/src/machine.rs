//! The one thread that lets the guest live: pace of the workload, beats, and every command between two steps.
//!
//! Owns the guest and its state (incoming, paused, running). Commands are carried out here and nowhere else, so an answer to
//! `stop` means that no step is under way, and disk marks and disk writes are never apart.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use crate::content::PAGE;
use crate::guest::{Guest, RamKind};
use crate::heartbeat::Heartbeat;
use crate::protocol::{Command, Description, Failure, Line, State, Status, from_hex, to_hex};

/// Longest piece of work between two looks at the commands: what a `stop` waits for at most.
const SLICE: Duration = Duration::from_millis(1);
/// A guest that was held back writes at most this much at once afterwards.
const BURST: Duration = Duration::from_millis(20);
/// Steps from one page of the spot check to the next.
const SPOT_CHECK_EVERY: u64 = 64;

/// A command and where its answer goes.
#[derive(Debug)]
pub struct Order {
    /// What to do.
    pub command: Command,
    /// Where the result goes.
    pub reply: Sender<Result<Value, Failure>>,
    /// Where events of this connection go, for `subscribe`.
    pub events: Sender<Line>,
}

/// A guest that lives.
#[derive(Debug)]
pub struct Machine {
    name: String,
    ram_kind: RamKind,
    guest: Guest,
    state: State,
    heartbeat: Heartbeat,
    subscribers: Vec<Sender<Line>>,
    starts: u64,
    corrupt: u64,
    pace: Pace,
}

/// When what is due.
#[derive(Debug)]
struct Pace {
    last: Instant,
    beat: Instant,
    memory: f64,
    disk: f64,
    steps: u64,
}

impl Pace {
    fn from_now() -> Self {
        let now = Instant::now();
        Self {
            last: now,
            beat: now,
            memory: 0.0,
            disk: 0.0,
            steps: 0,
        }
    }
}

impl Machine {
    /// A guest called `name`: running, or incoming if it has no CPU state.
    #[must_use]
    pub fn new(
        name: String,
        ram_kind: RamKind,
        guest: Guest,
        heartbeat: Heartbeat,
        run: bool,
    ) -> Self {
        let state = match (guest.cpu().is_some(), run) {
            (false, _) => State::Incoming,
            (true, false) => State::Paused,
            (true, true) => State::Running,
        };
        Self {
            name,
            ram_kind,
            guest,
            state,
            heartbeat,
            subscribers: Vec::new(),
            starts: u64::from(state == State::Running),
            corrupt: 0,
            pace: Pace::from_now(),
        }
    }

    /// Lives until told to end, or until nobody can tell it any more.
    pub fn live(&mut self, orders: &Receiver<Order>) -> io::Result<()> {
        loop {
            let order = if self.state == State::Running {
                let idle = self.work()?;
                if idle.is_zero() {
                    match orders.try_recv() {
                        Ok(order) => Some(order),
                        Err(TryRecvError::Empty) => None,
                        Err(TryRecvError::Disconnected) => return Ok(()),
                    }
                } else {
                    match orders.recv_timeout(idle) {
                        Ok(order) => Some(order),
                        Err(RecvTimeoutError::Timeout) => None,
                        Err(RecvTimeoutError::Disconnected) => return Ok(()),
                    }
                }
            } else {
                match orders.recv() {
                    Ok(order) => Some(order),
                    Err(_) => return Ok(()),
                }
            };
            if order.is_some_and(|order| self.obey(order)) {
                return Ok(());
            }
        }
    }

    /// Does what is due, for a slice at most; how long nothing is due then.
    fn work(&mut self) -> io::Result<Duration> {
        let Some(workload) = self.guest.cpu().map(|cpu| cpu.workload) else {
            return Ok(SLICE);
        };
        let began = Instant::now();
        let passed = began
            .duration_since(self.pace.last)
            .min(BURST)
            .as_secs_f64();
        self.pace.last = began;
        let due = |credit: f64, rate: u64| {
            let limit = (rate as f64 * BURST.as_secs_f64()).max(PAGE as f64);
            (credit + passed * rate as f64).min(limit)
        };
        self.pace.memory = due(self.pace.memory, workload.dirty_rate);
        self.pace.disk = due(self.pace.disk, workload.disk_rate);
        self.beat_if_due(workload.beat_us);
        while began.elapsed() < SLICE {
            let memory = self.pace.memory >= PAGE as f64;
            let disk = self.pace.disk >= PAGE as f64;
            if memory {
                self.pace.memory -= PAGE as f64;
                let found = self.guest.memory_step()?;
                self.report(found);
            }
            if disk {
                self.pace.disk -= PAGE as f64;
                let found = self.guest.disk_step()?;
                self.report(found);
            }
            if !memory && !disk {
                return Ok(self.until_next_beat(workload.beat_us));
            }
            self.pace.steps += 1;
            if self.pace.steps.is_multiple_of(SPOT_CHECK_EVERY) {
                let found = self.guest.spot_check()?;
                self.report(found);
            }
            self.beat_if_due(workload.beat_us);
        }
        Ok(Duration::ZERO)
    }

    fn beat_if_due(&mut self, every_us: u64) {
        let now = Instant::now();
        if every_us == 0 || now < self.pace.beat {
            return;
        }
        let every = Duration::from_micros(every_us);
        // Late beats are not made up for: the gap is what the listener measures.
        self.pace.beat = (self.pace.beat + every).max(now);
        if let Some(number) = self.guest.next_beat() {
            self.heartbeat.beat(number);
        }
    }

    fn until_next_beat(&self, every_us: u64) -> Duration {
        if every_us == 0 {
            return SLICE;
        }
        let left = self.pace.beat.saturating_duration_since(Instant::now());
        left.clamp(Duration::from_micros(50), SLICE)
    }

    fn report(&mut self, wrong: Option<String>) {
        if let Some(wrong) = wrong {
            self.corrupt += 1;
            println!("CORRUPT {wrong}");
            self.tell("CORRUPT", json!({ "what": wrong }));
        }
    }

    fn tell(&mut self, event: &str, data: Value) {
        let line = Line::Event {
            event: event.to_owned(),
            data,
        };
        self.subscribers
            .retain(|subscriber| subscriber.send(line.clone()).is_ok());
    }

    /// Carries out an order; true if it was the last.
    fn obey(&mut self, order: Order) -> bool {
        if order.command == Command::Subscribe {
            self.subscribers.push(order.events);
        }
        let last = matches!(order.command, Command::Quit | Command::Shutdown);
        let result = self.carry_out(order.command);
        // A client that went away does not want the answer any more.
        let _ = order.reply.send(result);
        last
    }

    fn carry_out(&mut self, command: Command) -> Result<Value, Failure> {
        let was_running = self.state == State::Running;
        match command {
            Command::Describe => value(&self.describe()),
            Command::Status | Command::Subscribe => value(&self.status(was_running)),
            Command::Stop => {
                if was_running {
                    self.state = State::Paused;
                    self.tell("STOP", json!({}));
                }
                value(&self.status(was_running))
            }
            Command::Cont => self.cont(was_running),
            Command::SaveState => self.save(),
            Command::LoadState { state } => self.load(&state),
            Command::Verify => self.verify(),
            Command::SetWorkload(workload) => {
                if !self.guest.set_workload(workload) {
                    return Err(Failure::new("the guest has no CPU state yet"));
                }
                self.pace = Pace::from_now();
                value(&self.status(was_running))
            }
            Command::StartDiskTracking => self.disk(|disk| {
                disk.start_tracking();
                Ok(json!({}))
            }),
            Command::StopDiskTracking => self.disk(|disk| {
                disk.stop_tracking();
                Ok(json!({}))
            }),
            Command::TakeDiskDirty => self.disk(|disk| {
                let extents = disk.take_dirty();
                let extents = extents.ok_or_else(|| Failure::new("disk writes are not tracked"))?;
                Ok(json!({ "extents": extents }))
            }),
            Command::Shutdown | Command::Quit => {
                let by = if command == Command::Quit {
                    "host"
                } else {
                    "guest"
                };
                self.state = State::Paused;
                self.tell("SHUTDOWN", json!({ "by": by }));
                value(&self.status(was_running))
            }
        }
    }

    fn describe(&self) -> Description {
        let disk = self.guest.disk();
        Description {
            name: self.name.clone(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ram_kind: self.ram_kind,
            ram_address: self.guest.ram().address(),
            ram_len: self.guest.ram().len() as u64,
            disk: disk.map(|disk| disk.path().to_owned()),
            disk_len: disk.map_or(0, crate::disk::Disk::len),
            state: self.state,
        }
    }

    fn status(&self, was_running: bool) -> Status {
        let cpu = self.guest.cpu();
        Status {
            state: self.state,
            was_running,
            starts: self.starts,
            steps: cpu.map_or(0, |cpu| cpu.steps),
            disk_steps: cpu.map_or(0, |cpu| cpu.disk_steps),
            beats: cpu.map_or(0, |cpu| cpu.beats),
            beats_lost: self.heartbeat.lost(),
            corrupt: self.corrupt,
            workload: cpu.map(|cpu| cpu.workload),
        }
    }

    fn cont(&mut self, was_running: bool) -> Result<Value, Failure> {
        if self.state == State::Incoming {
            return Err(Failure::new(
                "the guest waits for its content: load a state first",
            ));
        }
        if !was_running {
            self.state = State::Running;
            self.starts += 1;
            self.pace = Pace::from_now();
            self.tell("RESUME", json!({}));
        }
        value(&self.status(was_running))
    }

    fn save(&self) -> Result<Value, Failure> {
        match (self.state, self.guest.cpu()) {
            (State::Paused, Some(cpu)) => Ok(json!({ "state": to_hex(&cpu.to_bytes()) })),
            (State::Running | State::Incoming | State::Paused, _) => {
                Err(Failure::new("only a stopped guest's state can be saved"))
            }
        }
    }

    fn load(&mut self, state: &str) -> Result<Value, Failure> {
        if self.state != State::Incoming {
            return Err(Failure::new("only an incoming guest takes a state, once"));
        }
        let bytes = from_hex(state).ok_or_else(|| Failure::new("not hexadecimal digits"))?;
        let loaded = self.guest.load_cpu(&bytes);
        loaded.map_err(|error| Failure::new(error.to_string()))?;
        self.state = State::Paused;
        value(&self.status(false))
    }

    fn verify(&mut self) -> Result<Value, Failure> {
        let verdict = self
            .guest
            .verify()
            .map_err(|error| Failure::new(format!("the disk cannot be read: {error}")))?
            .ok_or_else(|| Failure::new("the guest has no content yet"))?;
        for detail in &verdict.details {
            println!("CORRUPT {detail}");
        }
        self.corrupt += verdict.wrong;
        value(&verdict)
    }

    fn disk(
        &mut self,
        work: impl FnOnce(&mut crate::disk::Disk) -> Result<Value, Failure>,
    ) -> Result<Value, Failure> {
        let disk = self.guest.disk_mut();
        work(disk.ok_or_else(|| Failure::new("the guest has no disk"))?)
    }
}

fn value(answer: &impl Serialize) -> Result<Value, Failure> {
    serde_json::to_value(answer).map_err(|error| Failure::new(error.to_string()))
}
