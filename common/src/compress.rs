//! The policy of `--compress`: whether the next frame is compressed, and how hard.
//!
//! Owns the decision, as a pure machine fed with what was measured; it reads no clock. `auto` begins with the
//! fastest level, goes up while the link is the bottleneck and cores are free, and down while the cores are. Raw is the yardstick:
//! a stretch is sent raw where compression may be what holds the copy up, and now and then otherwise, and what carries fewer guest
//! bytes per second than raw is turned off. A fast copy may be over within the second, so such a stretch comes at its very
//! beginning, where compression keeps the cores busy, and none is longer than it takes to see which of both is better: whether
//! senders wait does not tell, since busy cores let them wait as a full link does. Whether a frame's content shrinks at all is asked
//! of a sample of it: see [`Effort`].

use std::time::Duration;

mod measure;
mod mode;
#[cfg(test)]
mod tests;

pub use measure::Interval;
use measure::{Carried, STRETCH, Stretch, as_f64};
pub use mode::{CompressMode, CompressModeError};

/// What `auto` climbs. The first has nearly the ratio of the second in less time, which counts where the cores are the bottleneck.
const LADDER: [i32; 5] = [-1, 1, 3, 6, 9];
/// Time that a byte takes at the next rung to what it takes at this one, roughly; what it really takes is measured there.
const STEEPNESS: f64 = 2.5;
/// Share of all workers' time that compression may take where it went up: the guests of this host want the cores too.
const MOST_SHARE: f64 = 0.4;
/// Share up to which compression is no reason for a slow copy.
const HARMLESS_SHARE: f64 = 0.25;
/// While raw, one frame of this many is compressed to see what it would come to.
const PROBE_EVERY: u64 = 64;
/// Below this ratio compression is not worth the peer's time.
const MIN_RATIO: f64 = 1.1;
/// Expected gain at which compression is turned on; off needs no gain, so that it does not flap.
const GAIN_ON: f64 = 1.15;
/// What raw has to gain to be better: less on the wire is worth something too.
const GAIN_RAW: f64 = 1.05;
/// Share of an interval for which senders waited for the link, from which on the link is the bottleneck.
const LINK_BOUND: f64 = 0.3;
/// The same from which on a higher level is tried.
const LINK_BOUND_WELL: f64 = 0.6;
/// Weight of the newest measurement in a running mean.
const NEWEST: f64 = 0.25;
/// What is not better raw after this time is not so: before, the last compressed frames are still on their way, and only what is
/// [`CLEARLY_LESS`] is believed.
const LEAST_LOOK: Duration = Duration::from_millis(45);
/// What is better raw has to be so for this long.
const LOOK: Duration = Duration::from_millis(120);
/// Compression that is tried again is left after this time where it carries [`CLEARLY_LESS`].
const TRIAL: Duration = Duration::from_millis(90);
/// Part of what the other one carries that no burst explains.
const CLEARLY_LESS: f64 = 0.8;
/// Intervals of the opening, the first of which has the copy's beginning in it.
const OPENING: u32 = 20;
/// After compression slowed the copy it is tried again after this time, then twice as long, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest such pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// What was reached raw counts this long, at first; each time that compression proves better the next stretch waits twice as long.
const RAW_MEMORY: Duration = Duration::from_secs(20);
/// The same, as a part of it, where compression may be what holds the copy up.
const SUSPECTED: u32 = 10;
/// The longest time without a look at raw: a link may have become faster.
const MAX_RAW_MEMORY: Duration = Duration::from_secs(160);
/// What the link has to carry at a level of what it carried at the one below: less says that the level starves it, however long
/// senders wait, since compression and transport share the cores.
const LEAST_CARRIED: f64 = 0.93;
/// Stretches, those of settling included, until what the link carries is known well enough: frames are counted whole as they go.
const CARRIED_KNOWN: u32 = SETTLE + 4;
/// After a level was too high it is not tried for this time.
const CLIMB_PAUSE: Duration = Duration::from_secs(20);
/// The first stretches after a change still carry frames of before.
const SETTLE: u32 = 2;

/// How a frame is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// zstd's level.
    pub level: i32,
    /// Whether a frame of which a sample does not shrink goes raw.
    pub sampled: bool,
}

impl From<i32> for Effort {
    /// At `level`, whatever the content.
    fn from(level: i32) -> Self {
        Self {
            level,
            sampled: false,
        }
    }
}

/// How frames are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// At this rung of the ladder.
    Packed(usize),
    /// At the lowest one, to see whether it has become better than raw.
    Trial,
    /// As they are.
    Raw,
    /// As they are, for a stretch, to see whether that carries more than what the rung did.
    Yardstick { rung: usize, packed: f64 },
}

/// Decides for every frame whether it is compressed, and at which level.
#[derive(Debug)]
pub struct CompressPolicy {
    mode: CompressMode,
    workers: f64,
    frames: u64,
    stage: Stage,
    /// Guest bytes per byte on the wire, of what was tried.
    ratio: Option<f64>,
    /// Guest bytes that one worker compresses per second at the present level.
    speed: Option<f64>,
    /// Time spent compressing since the last report, by all workers.
    packing: Duration,
    /// What happened since the last judgement.
    stretch: Stretch,
    /// Intervals in which something was sent, up to [`OPENING`], or that when raw was looked at.
    opening: u32,
    /// Guest bytes per second reached raw.
    raw_goodput: Option<f64>,
    /// When raw was last looked at, and for how long that counts.
    looked: Duration,
    memory: Duration,
    stretches_in_stage: u32,
    paused_until: Duration,
    pause: Duration,
    climb_after: Duration,
    /// What went over the wire in this stage lately.
    carried: Carried,
    /// Bytes per second at the level below, if that was left for this one.
    carried_below: f64,
}

impl CompressPolicy {
    /// For `workers` threads that encode at once.
    #[must_use]
    pub fn new(mode: CompressMode, workers: u32) -> Self {
        Self {
            mode,
            workers: f64::from(workers.max(1)),
            frames: 0,
            stage: Stage::Packed(0),
            ratio: None,
            speed: None,
            packing: Duration::ZERO,
            stretch: Stretch::default(),
            opening: 0,
            raw_goodput: None,
            looked: Duration::ZERO,
            memory: RAW_MEMORY,
            stretches_in_stage: 0,
            paused_until: Duration::ZERO,
            pause: FIRST_PAUSE,
            climb_after: Duration::ZERO,
            carried: Carried::default(),
            carried_below: 0.0,
        }
    }

    /// Whether bytes are to be saved at all.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.mode == CompressMode::Off
    }

    /// Whether differences and duplicates are worth their time: raw is only for what cannot be compressed, not for what takes too long.
    #[must_use]
    pub const fn refers(&self) -> bool {
        match self.mode {
            CompressMode::Off => false,
            CompressMode::Level(_) => true,
            CompressMode::Auto => matches!(self.stage, Stage::Packed(_) | Stage::Trial),
        }
    }

    /// A frame went as differences or with duplicates, which took this time. How much smaller it got says nothing of other content.
    pub fn on_referring(&mut self, time: Duration) {
        self.packing += time;
    }

    /// How the next frame is compressed, or `None` for raw.
    pub fn next_effort(&mut self) -> Option<Effort> {
        let level = match self.mode {
            CompressMode::Off => return None,
            CompressMode::Level(level) => return Some(level.into()),
            CompressMode::Auto => {
                self.frames += 1;
                match self.stage {
                    Stage::Packed(rung) => LADDER.get(rung).copied(),
                    Stage::Trial => Some(LADDER[0]),
                    Stage::Raw => (self.frames % PROBE_EVERY == 1).then_some(LADDER[0]),
                    Stage::Yardstick { .. } => None,
                }
            }
        };
        level.map(|level| Effort {
            level,
            sampled: true,
        })
    }

    /// A frame was compressed: guest bytes, bytes of its payload, time it took. Frames sent raw by decision are not told.
    pub fn on_compressed(&mut self, raw: u32, payload: usize, time: Duration) {
        if raw == 0 || payload == 0 {
            return;
        }
        let raw = f64::from(raw);
        mean(&mut self.ratio, raw / as_f64(payload as u64));
        self.packing += time;
        if !time.is_zero() {
            mean(&mut self.speed, raw / time.as_secs_f64());
        }
    }

    /// A frame was to be compressed and goes raw, as it does not shrink, which took this time to see.
    pub fn on_incompressible(&mut self, time: Duration) {
        mean(&mut self.ratio, 1.0);
        self.packing += time;
    }

    /// Some time has passed; `now` is any clock that does not go back. Best called every 25 ms.
    pub fn on_interval(&mut self, now: Duration, interval: &Interval) {
        if self.mode != CompressMode::Auto {
            return;
        }
        let packing = std::mem::take(&mut self.packing);
        self.stretch.add(interval, packing);
        let complete = self.stretch.lasts(STRETCH);
        if self.stretch.raw_bytes == 0 {
            // Nobody sends, which says nothing.
            if complete {
                self.stretch = Stretch::default();
            }
            return;
        }
        if self.opens_with_doubt() {
            let packed = self.stretch.goodput();
            self.change(Stage::Yardstick { rung: 0, packed });
            return;
        }
        match self.stage {
            Stage::Yardstick { rung, packed } => self.judge_yardstick(now, rung, packed),
            Stage::Trial => self.judge_trial(now),
            Stage::Raw | Stage::Packed(_) if complete => self.judge(now),
            Stage::Raw | Stage::Packed(_) => {}
        }
    }

    /// Whether compression keeps the cores busy in the opening of a copy.
    fn opens_with_doubt(&mut self) -> bool {
        if self.opening >= OPENING {
            return false;
        }
        self.opening += 1;
        if self.opening == 1 {
            // The copy began in the middle of this interval.
            self.stretch = Stretch::default();
            return false;
        }
        let busy = self.stretch.share(self.workers) > HARMLESS_SHARE;
        let doubtful = busy && self.stretch.is_conclusive();
        if doubtful {
            self.opening = OPENING;
        }
        doubtful
    }

    /// Judges a stretch of a stage that lasts.
    fn judge(&mut self, now: Duration) {
        let stretch = std::mem::take(&mut self.stretch);
        self.stretches_in_stage = self.stretches_in_stage.saturating_add(1);
        if self.stretches_in_stage <= SETTLE {
            return;
        }
        self.carried.add(&stretch);
        if let Stage::Packed(rung) = self.stage {
            self.judge_packed(now, rung, &stretch);
        } else {
            self.judge_raw(now, &stretch);
        }
    }

    fn judge_raw(&mut self, now: Duration, stretch: &Stretch) {
        // Single probes hardly change it; but it is the link's rate only where the link held the senders up.
        if stretch.link_wait() < LINK_BOUND {
            self.raw_goodput = None;
            return;
        }
        let goodput = stretch.goodput();
        self.look(now, goodput);
        let (Some(ratio), Some(speed)) = (self.ratio, self.speed) else {
            return;
        };
        let expected = (goodput * ratio).min(speed * self.workers);
        if now >= self.paused_until && ratio >= MIN_RATIO && expected >= goodput * GAIN_ON {
            self.change(Stage::Trial);
        }
    }

    fn judge_yardstick(&mut self, now: Duration, rung: usize, packed: f64) {
        let goodput = self.stretch.goodput();
        let clear = self.stretch.lasts(LEAST_LOOK) || goodput < packed * CLEARLY_LESS;
        if !clear || !self.stretch.is_conclusive() {
            return;
        }
        if goodput > packed * GAIN_RAW {
            if self.stretch.lasts(LOOK) {
                self.look(now, goodput);
                self.rest(now);
            }
            return;
        }
        // So short a look tells which of both is better, and not what raw carries: a burst is in it.
        self.raw_goodput = None;
        self.looked = now;
        self.pause = FIRST_PAUSE;
        self.memory = (self.memory * 2).min(MAX_RAW_MEMORY);
        self.change(Stage::Packed(rung));
    }

    fn judge_trial(&mut self, now: Duration) {
        let stretch = &self.stretch;
        if !stretch.lasts(TRIAL) || !stretch.is_conclusive() {
            return;
        }
        let less = |raw: f64| stretch.goodput() < raw * CLEARLY_LESS;
        if self.raw_goodput.is_some_and(less) {
            self.rest(now);
        } else {
            self.stage = Stage::Packed(0);
        }
    }

    fn judge_packed(&mut self, now: Duration, rung: usize, stretch: &Stretch) {
        let (goodput, link_wait) = (stretch.goodput(), stretch.link_wait());
        let share = stretch.share(self.workers);
        let known = self.stretches_in_stage >= CARRIED_KNOWN;
        let carried = known.then(|| self.carried.rate());
        // Where the link no longer is the bottleneck it may have become faster since.
        let memory = if link_wait < LINK_BOUND {
            RAW_MEMORY
        } else {
            self.memory
        };
        let fresh = now.saturating_sub(self.looked) <= memory;
        // Where the guest has little to send nothing is to be learned.
        let held_up = link_wait >= LINK_BOUND || share > HARMLESS_SHARE;
        let slower = fresh && held_up && self.raw_goodput.is_some_and(|raw| goodput < raw);
        let starves = carried.is_some_and(|now| now < self.carried_below * LEAST_CARRIED);
        let too_high = share > MOST_SHARE || link_wait < LINK_BOUND || slower || starves;
        // Senders that wait for the link would do so the more with everything raw.
        let suspect = link_wait < LINK_BOUND && share > HARMLESS_SHARE;
        let due = now.saturating_sub(self.looked) > self.memory / SUSPECTED;
        if rung > 0 && too_high {
            self.climb_after = now.saturating_add(CLIMB_PAUSE);
            self.change(Stage::Packed(rung - 1));
        } else if slower {
            self.rest(now);
        } else if (held_up && !fresh) || (suspect && due) {
            let packed = goodput;
            self.change(Stage::Yardstick { rung, packed });
        } else if let Some(carried) = carried
            && link_wait >= LINK_BOUND_WELL
            && self.ratio.is_some_and(|ratio| ratio >= MIN_RATIO)
            && rung + 1 < LADDER.len()
            && share * STEEPNESS <= MOST_SHARE
            && now >= self.climb_after
        {
            self.change(Stage::Packed(rung + 1));
            self.carried_below = carried;
        }
    }

    /// Raw carried `goodput`.
    fn look(&mut self, now: Duration, goodput: f64) {
        self.raw_goodput = Some(goodput);
        self.looked = now;
    }

    /// Raw, and no other try for some time.
    fn rest(&mut self, now: Duration) {
        self.paused_until = now.saturating_add(self.pause);
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        self.memory = RAW_MEMORY;
        self.change(Stage::Raw);
    }

    fn change(&mut self, stage: Stage) {
        // Speed is that of a level: the lowest one's is kept for the time without compression.
        if matches!(stage, Stage::Packed(_) | Stage::Trial) {
            self.speed = None;
        }
        self.stage = stage;
        self.stretches_in_stage = 0;
        self.stretch = Stretch::default();
        self.carried = Carried::default();
        self.carried_below = 0.0;
    }
}

fn mean(slot: &mut Option<f64>, newest: f64) {
    *slot = Some(match *slot {
        Some(old) => old + (newest - old) * NEWEST,
        None => newest,
    });
}
