//! The controller itself: what is heard of each packet goes in, the window comes out.
//!
//! Owns the phases and the window. It has no clock and does no I/O: time comes as an argument of quinn's calls. What it
//! remembers is in `filters`, how it counts in `round`, how it shares in `sharing`; why it is as it is stands in the module above.

use std::time::{Duration, Instant};

use quinn::congestion::Controller;
use quinn_proto::RttEstimator;

use super::filters::{
    RATE_ROUNDS, RATE_ROUNDS_QUEUED, RateFilter, RttFilter, carried, percent, time_of,
};
use super::gathered::Gathered;
use super::round::{MIN_ROUND, Report, Round};
use super::sharing::Sharing;
use crate::units::Rate;

/// Window before anything is known, in packets: 1 Gbit/s over 80 ms is full nine round trips later, and quinn spreads these
/// 154 kB over a round trip.
const INITIAL_PACKETS: u64 = 128;
/// Least window and least headroom, in packets: they go in batches of ten, and every second one is acknowledged.
const LEAST_PACKETS: u64 = 16;
/// Beyond what the path holds the window has this much time's worth, for the grain of timers; or what acknowledgements that come
/// together need.
const HEADROOM: Duration = Duration::from_millis(1);
/// Batches of a host that pauses for which there is room: one is acknowledged while the next is on its way.
const BATCHES: u64 = 2;
/// Growth in start-up, in percent of what is acknowledged: a queue shows a round trip after it began, and doubling would have
/// filled one as large as the path by then.
const START_UP_GROWTH: u64 = 75;
/// Part of the shortest round trip that a queue may add, beside the headroom, before start-up stops growing.
const START_UP_QUEUE_PART: u32 = 8;
/// Bound of the window in start-up, in percent of what the path held a round before: two doublings.
const START_UP_GAIN: u64 = 400;
/// Growth of the rate from round to round, in percent, below which the path is taken to be full.
const START_UP_RISE: u64 = 125;
/// So many rounds without growth end start-up; one, if it built a queue.
const START_UP_FLAT: u8 = 3;
/// Window of the round that looks for more, in percent.
const PROBE_GAIN: u64 = 135;
/// Window of the round after it, in percent: the queue that the probe built runs empty, the path does not.
const AFTER_PROBE_GAIN: u64 = 90;
/// Window of the other rounds, in percent: a little more than fits, so that the path never idles.
const CRUISE_GAIN: u64 = 105;
/// Window to measure the round trip, in percent: any queue of the own making runs empty.
const DRAIN_GAIN: u64 = 75;
/// One round to let it run empty, one to measure.
const DRAIN_ROUNDS: u8 = 2;
/// Part of the expected shortening of the round trip, as a divisor, that must be seen in a drain for there to be a queue: others
/// fill up some of what is made free.
const DRAIN_DOUBT: u32 = 4;
/// Rounds of a probe cycle.
const CYCLE: u32 = 8;
/// The same after probes that were answered with loss: each doubles it, so that a full path is left alone.
const LONGEST_CYCLE: u32 = 64;
/// Rate that a probe must show, in percent of the one before, for start-up to follow it up: a path that became faster is
/// taken at once, not by a third every eight rounds.
const FOLLOW_UP: u64 = 115;
/// Loss of a round, in percent, up to which it is the line's noise and not congestion.
const LOSS_CEILING: u64 = 8;
/// Loss, in percent, from which a shared queue runs over, and not only at the end of the others' growth or for the line's noise.
const OVERFLOW_LOSS: u64 = 2;
/// Loss, in percent, from which the headroom may be what overflows the queue.
const HEADROOM_LOSS: u64 = 4;
/// What is left of the headroom then, in percent.
const HEADROOM_CUT: u64 = 70;
/// Rounds after which a cut of one packet is made up for.
const HEADROOM_REGROWTH: u64 = 8;
/// Fewer lost packets than this say nothing.
const LOSS_PACKETS: u64 = 4;
/// Rounds over the ceiling, one after the other, that make the path slower and not the loss a burst.
const OVERLOADED: u32 = 2;
/// What an outage (all packets of some round trips lost) leaves of the window, as a divisor: two rounds of start-up bring it back.
const AFTER_OUTAGE: u64 = 4;
/// Window up to which start-up goes on though a round lost more than the ceiling, in initial ones, if more came through than before.
const BEGINNING: u64 = 2;
/// What such a round leaves of the window, as a divisor.
const AFTER_OVERFLOW: u64 = 2;
/// Round trip from which a queue stands, as a part of the shortest one above it, beside twice the headroom: two of ours
/// beside each other stay below.
const QUEUE_PART: (u32, u32) = (15, 100);
/// The same when the own part was let run empty.
const EMPTY_PART: (u32, u32) = (5, 100);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The rate is looked for; `flat` rounds have not bettered `best` by enough.
    StartUp { best: Rate, flat: u8 },
    /// The round trip is measured; so many rounds are left.
    Drain { left: u8 },
    /// Step 0 probes, step 1 makes up for it, the others cruise.
    Cycle { step: u32 },
}

/// After the probe and what makes up for it.
const CRUISE: Phase = Phase::Cycle { step: 2 };

/// Model-based congestion control: see the module.
#[derive(Debug, Clone)]
pub(super) struct Model {
    mtu: u64,
    window: u64,
    in_flight: u64,
    rate: RateFilter,
    rtt: RttFilter,
    round: Round,
    gathered: Gathered,
    phase: Phase,
    cycle: u32,
    /// The model's rate when the last probe began.
    before_probe: Rate,
    /// Rounds in a row with more loss than the ceiling.
    overloaded: u32,
    /// When loss ended start-up: what was sent before and is lost tells of its window, and what is carried meanwhile of the lack of it.
    overshot: Option<Instant>,
    /// Round trip of the newest packets acknowledged.
    latest: Duration,
    /// Packets wait somewhere, and not only the own headroom.
    queued: bool,
    sharing: Sharing,
    /// Bytes in flight when the round began.
    under_way: u64,
    /// Round trip and window when the last drain began.
    before_drain: (Duration, u64),
    /// Bound of the headroom, on a path whose queue has less room than that.
    most_headroom: u64,
}

impl Model {
    pub(super) fn new(now: Instant, mtu: u16) -> Self {
        let mtu = u64::from(mtu);
        Self {
            mtu,
            window: INITIAL_PACKETS * mtu,
            in_flight: 0,
            rate: RateFilter::default(),
            rtt: RttFilter::default(),
            round: Round::new(now),
            gathered: Gathered::default(),
            phase: Phase::StartUp {
                best: Rate(0),
                flat: 0,
            },
            cycle: CYCLE,
            before_probe: Rate(0),
            overloaded: 0,
            overshot: None,
            latest: Duration::MAX,
            queued: false,
            sharing: Sharing::default(),
            most_headroom: u64::MAX,
            under_way: 0,
            before_drain: (Duration::ZERO, 0),
        }
    }

    const fn starts_up(&self) -> bool {
        matches!(self.phase, Phase::StartUp { .. })
    }

    fn headroom(&self) -> u64 {
        let wanted = carried(self.rate.get(), HEADROOM).max(BATCHES * self.gathered.get());
        wanted.min(self.most_headroom).max(LEAST_PACKETS * self.mtu)
    }

    /// Bytes that the path holds.
    fn bdp(&self) -> u64 {
        self.rtt
            .get()
            .map_or(0, |rtt| carried(self.rate.get(), rtt))
    }

    fn on_round(&mut self, report: &Report) {
        self.gathered.on_round();
        self.judge_loss(report);
        self.queued = self.has_queue(report.min_rtt);
        self.rtt.push(report.min_rtt);
        let under_way = std::mem::replace(&mut self.under_way, self.in_flight);
        self.sharing.on_step(under_way, self.latest);
        if report.limited {
            self.rate.push_limited(report.rate);
            if !self.queued && self.overloaded == 0 {
                self.on_limited_round();
                return;
            }
        } else {
            self.rtt.grow_older(report.span);
            self.learn(report);
        }
        self.next_phase(report);
        self.set_window();
    }

    /// The path, not the sender, was the limit: what it carried is what it carries.
    fn learn(&mut self, report: &Report) {
        let keep = if self.queued {
            RATE_ROUNDS_QUEUED
        } else {
            RATE_ROUNDS
        };
        if self.overloaded >= OVERLOADED {
            self.rate.reset(report.rate);
        } else {
            self.rate.push(report.rate, keep);
        }
        let overflowed = report.loses_more_than(OVERFLOW_LOSS);
        self.sharing.on_round(self.queued, overflowed, report.rate);
    }

    /// The sender has little to send: nothing is held back, so that whatever comes next finds the whole window.
    fn on_limited_round(&mut self) {
        match self.phase {
            Phase::StartUp { .. } => {}
            Phase::Drain { .. } | Phase::Cycle { .. } => {
                self.phase = CRUISE;
                self.set_window();
            }
        }
    }

    fn judge_loss(&mut self, report: &Report) {
        let least = LOSS_PACKETS * self.mtu;
        let exceeds = |part| report.lost >= least && report.loses_more_than(part);
        self.overloaded = if exceeds(LOSS_CEILING) {
            self.overloaded + 1
        } else {
            0
        };
        self.most_headroom = if exceeds(HEADROOM_LOSS) && !self.starts_up() {
            percent(self.headroom(), HEADROOM_CUT)
        } else {
            self.most_headroom
                .saturating_add(self.mtu / HEADROOM_REGROWTH)
        };
    }

    /// Whether packets wait for longer than the own headroom explains.
    fn has_queue(&self, rtt: Duration) -> bool {
        let Some(min) = self.rtt.get() else {
            return false;
        };
        let line = self.sharing.line().max(self.rate.get());
        let own = time_of(2 * self.headroom(), line);
        rtt > min + min * QUEUE_PART.0 / QUEUE_PART.1 + own
    }

    fn next_phase(&mut self, report: &Report) {
        self.phase = match self.phase {
            Phase::StartUp { best, flat } => self.next_start_up(best, flat, report),
            Phase::Drain { left } if left > 1 => Phase::Drain { left: left - 1 },
            Phase::Drain { .. } => self.after_drain(report),
            Phase::Cycle { step } => self.next_step(step, report),
        };
    }

    fn next_start_up(&mut self, best: Rate, flat: u8, report: &Report) -> Phase {
        let rate = self.rate.get();
        let rises = rate.0 >= percent(best.0, START_UP_RISE);
        if self.overloaded > 0 {
            if !rises || self.window > BEGINNING * INITIAL_PACKETS * self.mtu {
                self.overshot = Some(report.ended);
                self.sharing.on_started(rate);
                return CRUISE;
            }
            // Who begins where a queue runs over just now learns of that moment, and not of the path.
            self.window /= AFTER_OVERFLOW;
        }
        if rises {
            return Phase::StartUp {
                best: rate,
                flat: 0,
            };
        }
        if flat + 1 < START_UP_FLAT && !self.queued {
            return Phase::StartUp {
                best,
                flat: flat + 1,
            };
        }
        self.sharing.on_started(rate);
        CRUISE
    }

    fn after_drain(&mut self, report: &Report) -> Phase {
        let known = self.rtt.get().unwrap_or_default();
        let as_known = known + known * EMPTY_PART.0 / EMPTY_PART.1 + HEADROOM;
        if report.min_rtt <= as_known || self.path_is_longer(report.min_rtt) {
            self.sharing.leave();
            if self.rtt.is_old() {
                self.rtt.renew(report.min_rtt);
            }
        } else {
            self.rtt.keep();
        }
        CRUISE
    }

    /// Whether less under way made the wait no shorter: then nothing waited, and the path itself is that long.
    fn path_is_longer(&self, drained: Duration) -> bool {
        let (rtt, window) = self.before_drain;
        let less = window.saturating_sub(self.window);
        let expected = time_of(less, self.sharing.line());
        rtt.saturating_sub(drained) < expected / DRAIN_DOUBT
    }

    fn next_step(&mut self, step: u32, report: &Report) -> Phase {
        if self.sharing.should_enter() {
            self.sharing.enter();
        } else if self.sharing.is_over() {
            self.sharing.leave();
        }
        if self.rtt.is_old() || self.sharing.should_check() {
            self.before_drain = (report.min_rtt, self.window);
            return Phase::Drain { left: DRAIN_ROUNDS };
        }
        // What was sent in the probe has been acknowledged in the round after it.
        if step == 1 && self.probe_found_more(report) {
            return Phase::StartUp {
                best: report.rate,
                flat: 0,
            };
        }
        if step + 1 < self.cycle {
            return Phase::Cycle { step: step + 1 };
        }
        self.before_probe = self.rate.get();
        Phase::Cycle { step: 0 }
    }

    /// Judges a probe; one that was answered with loss makes the next ones rarer.
    fn probe_found_more(&mut self, report: &Report) -> bool {
        if self.overloaded > 0 {
            self.cycle = (self.cycle * 2).min(LONGEST_CYCLE);
            return false;
        }
        self.cycle = CYCLE;
        let more = report.rate.0 >= percent(self.before_probe.0, FOLLOW_UP);
        more && !self.queued && !self.sharing.is_active()
    }

    fn set_window(&mut self) {
        let wanted = match self.phase {
            Phase::StartUp { .. } => {
                let most = percent(self.bdp(), START_UP_GAIN) + self.headroom();
                self.window.min(most.max(INITIAL_PACKETS * self.mtu))
            }
            Phase::Drain { .. } => percent(self.bdp(), DRAIN_GAIN),
            Phase::Cycle { step } => match self.sharing.window(self.latest) {
                Some(part) => part,
                None => self.cycle_window(step),
            },
        };
        self.window = wanted.max(LEAST_PACKETS * self.mtu);
    }

    fn cycle_window(&self, step: u32) -> u64 {
        let (bdp, headroom) = (self.bdp(), self.headroom());
        match step {
            // Headroom included, so that the probe shows also where the window is little else.
            0 => percent(bdp + headroom, PROBE_GAIN),
            1 => percent(bdp, AFTER_PROBE_GAIN) + headroom,
            _ => percent(bdp, CRUISE_GAIN) + headroom,
        }
    }

    /// Start-up: the window grows with what is acknowledged, as long as no queue builds up.
    fn grow(&mut self, bytes: u64) {
        let Some(min) = self.rtt.get() else { return };
        let own = HEADROOM.max(time_of(self.headroom(), self.rate.get()));
        if self.latest <= min + min / START_UP_QUEUE_PART + own {
            self.window += percent(bytes, START_UP_GROWTH);
        }
    }
}

impl Controller for Model {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        if self.in_flight == 0 {
            // After an idle time: what comes now says nothing about the time before.
            self.round = Round::new(now);
            self.gathered.restart();
        }
        self.in_flight += bytes;
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _rtt: &RttEstimator,
    ) {
        self.latest = now.saturating_duration_since(sent);
        if self.rtt.get().is_none() {
            self.rtt.push(self.latest);
        }
        self.round.on_ack(now, sent, bytes, app_limited);
        let min_rtt = self.rtt.get().unwrap_or_default();
        let starts_up = self.starts_up();
        // On a longer path start-up itself sends in trains, with pauses between them.
        if !starts_up || min_rtt < MIN_ROUND {
            self.gathered.on_ack(now, bytes, self.rate.get(), min_rtt);
        }
        if starts_up && !app_limited {
            self.grow(bytes);
        }
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest: Option<u64>,
    ) {
        self.in_flight = in_flight;
        if let Some(report) = self.round.end(now) {
            self.on_round(&report);
        }
    }

    fn on_congestion_event(
        &mut self,
        _now: Instant,
        sent: Instant,
        is_persistent: bool,
        lost_bytes: u64,
    ) {
        if self.overshot.is_none_or(|end| sent >= end) {
            self.round.on_lost(lost_bytes);
        }
        self.in_flight = self.in_flight.saturating_sub(lost_bytes);
        if is_persistent {
            self.sharing.leave();
            self.window = (self.window / AFTER_OUTAGE).max(INITIAL_PACKETS * self.mtu);
            self.phase = Phase::StartUp {
                best: Rate(0),
                flat: 0,
            };
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = u64::from(new_mtu);
        self.window = self.window.max(LEAST_PACKETS * self.mtu);
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_PACKETS * self.mtu
    }

    fn into_any(self: Box<Self>) -> Box<dyn std::any::Any> {
        self
    }
}
