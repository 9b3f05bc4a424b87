//! Carries packets from one TUN device to another, when the schedule says.
//!
//! Owns a thread per direction and the counters. A packet of many segments is judged segment by segment and goes on in
//! runs that take at most [`GRANULE`] of the line: a receiver sees neither more batching nor less loss than on a real line.

use std::collections::VecDeque;
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::SyncDevice;

use super::packet::{MAX_FRAME, Packet};
use super::schedule::{Fate, Schedule};

/// Longest stretch of the line that arrives at once.
const GRANULE: Duration = Duration::from_micros(100);
/// Packets read before those that are due go out.
const BATCH: usize = 32;
/// How often a relay looks whether it shall end.
const LOOK_UP: Duration = Duration::from_millis(20);
/// Above every ordinary process, below the kernel's own threads.
const PRIORITY: &str = "10";

/// What one direction has carried so far.
#[derive(Debug, Default)]
pub(super) struct Counters {
    wire_bytes: AtomicU64,
    wire_packets: AtomicU64,
    lost: AtomicU64,
    no_room: AtomicU64,
    cut_off: AtomicU64,
    late_nanos: AtomicU64,
    arrivals: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// Bytes that took their time on the line, from the IP header on; the lost ones too.
    pub bytes: u64,
    /// Packets that did.
    pub packets: u64,
    /// Those of them that were lost.
    pub lost: u64,
    /// Packets for which the queue had no room.
    pub no_room: u64,
    /// Packets that came to a cut line, and batches that were on it.
    pub cut_off: u64,
    /// Mean time by which the relay handed packets over too late.
    pub late: Duration,
}

impl Counters {
    /// What they say now.
    #[must_use]
    pub(super) fn read(&self) -> Carried {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Carried {
            bytes: get(&self.wire_bytes),
            packets: get(&self.wire_packets),
            lost: get(&self.lost),
            no_room: get(&self.no_room),
            cut_off: get(&self.cut_off),
            late: Duration::from_nanos(get(&self.late_nanos) / get(&self.arrivals).max(1)),
        }
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// What both directions obey.
#[derive(Debug, Default)]
pub(super) struct Switch {
    pub(super) cut: AtomicBool,
    over: AtomicBool,
}

/// One direction, on its thread; ends when dropped.
#[derive(Debug)]
pub(super) struct Relay {
    switch: Arc<Switch>,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Carries from `from` to `to`.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(
        (from, to): (Arc<SyncDevice>, Arc<SyncDevice>),
        schedule: Schedule,
        switch: Arc<Switch>,
    ) -> io::Result<Self> {
        let counters = Arc::<Counters>::default();
        let mut direction = Direction {
            from,
            to,
            schedule,
            switch: Arc::clone(&switch),
            counters: Arc::clone(&counters),
            epoch: Instant::now(),
            on_the_way: VecDeque::new(),
        };
        let thread = thread::Builder::new()
            .name("link".to_owned())
            .spawn(move || direction.work())?;
        Ok(Self {
            switch,
            counters,
            thread: Some(thread),
        })
    }

    /// What it has carried.
    #[must_use]
    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.switch.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            // A panic of it was printed; the test fails by what did not arrive.
            let _ = thread.join();
        }
    }
}

struct Direction {
    from: Arc<SyncDevice>,
    to: Arc<SyncDevice>,
    schedule: Schedule,
    switch: Arc<Switch>,
    counters: Arc<Counters>,
    epoch: Instant,
    on_the_way: VecDeque<(Duration, Vec<u8>)>,
}

impl Direction {
    fn work(&mut self) {
        go_first();
        let mut buffer = vec![0; MAX_FRAME];
        while !self.switch.over.load(Ordering::Acquire) {
            for _ in 0..BATCH {
                match self.from.recv(&mut buffer) {
                    Ok(length) => self.take_in(&buffer[..length]),
                    // Nothing there; anything else shows as a link that carries nothing.
                    Err(_) => break,
                }
            }
            self.hand_over();
            self.rest();
        }
    }

    fn take_in(&mut self, frame: &[u8]) {
        let Some(packet) = Packet::parse(frame) else {
            // Not IPv4: the kernel's own chatter.
            return;
        };
        let segments = packet.segments();
        if self.switch.cut.load(Ordering::Acquire) {
            add(&self.counters.cut_off, segments as u64);
            return;
        }
        let now = self.epoch.elapsed();
        let mut run: Option<Run> = None;
        for index in 0..segments {
            let bytes = packet.wire_bytes(index);
            let arrival = self.count(now, bytes);
            run = match (run, arrival) {
                (Some(run), Some(arrival)) if arrival - run.first <= GRANULE => {
                    Some(run.longer(index, arrival))
                }
                (before, arrival) => {
                    self.send_off(&packet, before);
                    arrival.map(|arrival| Run::begin(index, arrival))
                }
            };
        }
        self.send_off(&packet, run);
    }

    /// Offers a segment to the schedule and counts what becomes of it.
    fn count(&mut self, now: Duration, bytes: usize) -> Option<Duration> {
        let fate = self.schedule.offer(now, bytes);
        if fate == Fate::NoRoom {
            add(&self.counters.no_room, 1);
            return None;
        }
        add(&self.counters.wire_bytes, bytes as u64);
        add(&self.counters.wire_packets, 1);
        match fate {
            Fate::Arrives(time) => Some(time),
            Fate::Lost | Fate::NoRoom => {
                add(&self.counters.lost, 1);
                None
            }
        }
    }

    fn send_off(&mut self, packet: &Packet<'_>, run: Option<Run>) {
        if let Some(run) = run {
            self.on_the_way
                .push_back((run.last, packet.take(&run.segments)));
        }
    }

    fn hand_over(&mut self) {
        if self.switch.cut.load(Ordering::Acquire) {
            add(&self.counters.cut_off, self.on_the_way.len() as u64);
            self.on_the_way.clear();
        }
        let now = self.epoch.elapsed();
        let is_due = |(due, _): &(Duration, Vec<u8>)| *due <= now;
        while self.on_the_way.front().is_some_and(is_due) {
            let Some((due, frame)) = self.on_the_way.pop_front() else {
                return;
            };
            let late = u64::try_from((now - due).as_nanos()).unwrap_or(u64::MAX);
            add(&self.counters.late_nanos, late);
            add(&self.counters.arrivals, 1);
            // A receiver that has no room for it loses it, as ever.
            let _ = self.to.send(&frame);
        }
    }

    /// Waits for a packet or the next arrival.
    fn rest(&self) {
        let next = self.on_the_way.front().map_or(LOOK_UP, |(due, _)| {
            due.saturating_sub(self.epoch.elapsed()).min(LOOK_UP)
        });
        let mut waits = [PollFd::from_borrowed_fd(self.from.as_fd(), PollFlags::IN)];
        // An error ends the wait early, which is harmless.
        let _ = poll(&mut waits, Timespec::try_from(next).ok().as_ref());
    }
}

/// Asks to run before everything else, and to be woken on time: the link is part of the machine, not of the load on it.
/// Where that is refused the link is only less exact, and the calibration shows it.
fn go_first() {
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    // The system call itself has no safe wrapper; the program is part of every distribution.
    let _ = Command::new("chrt")
        .args(["--fifo", "--pid", PRIORITY, &thread])
        .stderr(Stdio::null())
        .status();
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
}

/// Segments that follow each other and arrive together.
struct Run {
    segments: Range<usize>,
    first: Duration,
    last: Duration,
}

impl Run {
    const fn begin(index: usize, arrival: Duration) -> Self {
        Self {
            segments: index..index + 1,
            first: arrival,
            last: arrival,
        }
    }

    const fn longer(self, index: usize, arrival: Duration) -> Self {
        Self {
            segments: self.segments.start..index + 1,
            last: arrival,
            ..self
        }
    }
}
