//! The policy of `--compress`: whether the next frame is compressed, and how hard.
//!
//! Owns the decision, as a pure machine fed with what was measured; it reads no clock. `auto` takes the fastest level first, goes up
//! while the link is the bottleneck and cores are free, and down while the cores are. Raw is the yardstick: a stretch is sent raw
//! where compression may be what holds the copy up, and now and then otherwise, and what carries fewer guest bytes per second than
//! raw is turned off.
//!
//! A copy over a short path may be over within the second, and what both carry over some hundredths of one differs by more than they
//! do: it begins raw, so that the path's model grows to what raw needs, with pieces of the first frames compressed, and goes on
//! compressed where the cores suffice for what the line carries. Over a long path the link is what is short until the start-up is
//! over: the copy begins compressed, and raw is looked at as soon as that keeps the cores busy. Whether a frame's content shrinks at
//! all is asked of a sample of it: see [`Effort`].

use std::time::Duration;

mod measure;
mod mode;
#[cfg(test)]
mod tests;

use measure::{Carried, Mean, SHORT_STRETCH, STRETCH, Stretch, as_f64};
pub use measure::{Interval, Spent, Tried};
pub use mode::{CompressMode, CompressModeError};

/// What `auto` climbs. The first has nearly the ratio of the second in less time, which counts where the cores are the bottleneck.
const LADDER: [i32; 5] = [-1, 1, 3, 6, 9];
/// Time that a byte takes at each rung to what it takes at the first, by `zstd -b` over the memory of a Linux guest: which of them may
/// be tried; what it really takes is measured there.
const COST: [f64; LADDER.len()] = [1.0, 1.2, 1.7, 5.5, 7.6];
/// Share of all workers' time that compression may take where it went up: the guests of this host want the cores too.
const MOST_SHARE: f64 = 0.4;
/// Share up to which compression is no reason for a slow copy: no level is tried that would take more.
const HARMLESS_SHARE: f64 = 0.25;
/// While raw, a piece of one frame of this many is compressed to see what that would come to.
const PROBE_EVERY: u64 = 64;
/// So many frames tell of those to come.
const TELLING: f64 = 4.0;
/// Below this ratio compression is not worth the peer's time.
const MIN_RATIO: f64 = 1.1;
/// Expected gain at which compression is turned on; off needs no gain, so that it does not flap.
const GAIN_ON: f64 = 1.15;
/// In the opening compression is taken where all cores together would compress so many times what the line carries: transport, reader
/// and guest want them too, and where two cores have to do for all of them and the destination both carry the same at about that.
const ENOUGH: f64 = 2.8;
/// The same before the line's rate is well known.
const AMPLE: f64 = 5.0;
/// The first frames find contexts and caches cold, and take up to so many times what later ones do.
const COLD: f64 = 2.0;
/// Seconds of a core that the lowest level takes for a byte on the processors of these years: what takes no longer is not cold.
const USUAL_COST: f64 = 2.0e-9;
/// What raw has to gain to be better: less on the wire is worth something too.
const GAIN_RAW: f64 = 1.05;
/// Share of an interval for which senders waited for the link, from which on the link is the bottleneck.
const LINK_BOUND: f64 = 0.3;
/// The same from which on a higher level is tried.
const LINK_BOUND_WELL: f64 = 0.6;
/// What is clearly not better raw after this time is not so: before, the path's model grows to what is raw.
const LEAST_LOOK: Duration = Duration::from_millis(45);
/// What is better raw has to be so for this long.
const LOOK: Duration = Duration::from_millis(120);
/// What one carries of what the other does where no burst explains it.
const CLEARLY_MORE: f64 = 1.3;
/// Compression that is tried is judged after this time.
const TRIAL: Duration = Duration::from_millis(65);
/// Round-trip time up to which a path's start-up is over when its first look at raw is.
const SHORT_PATH: Duration = Duration::from_millis(2);
/// Intervals of the opening over a long path.
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
pub enum Effort {
    /// At this level of zstd, whatever the content.
    Always(i32),
    /// At this level, or raw where a sample of it does not shrink.
    Sampled(i32),
    /// Raw, but a piece of it is compressed at this level to see what that comes to.
    Probe(i32),
}

impl Effort {
    /// zstd's level.
    #[must_use]
    pub const fn level(self) -> i32 {
        match self {
            Self::Always(level) | Self::Sampled(level) | Self::Probe(level) => level,
        }
    }
}

/// How frames are sent.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    /// At this rung of the ladder.
    Packed(usize),
    /// At the lowest one, to see whether that carries less than raw did: guest bytes per second.
    Trial { raw: f64 },
    /// As they are.
    Raw,
    /// As they are, for a stretch, to see whether that carries more than what the rung did: guest bytes per second.
    Yardstick { rung: usize, packed: f64 },
    /// As they are, to see what the line carries; pieces of the first are compressed to see what that takes.
    Opening,
}

/// Decides for every frame whether it is compressed, and at which level.
#[derive(Debug)]
pub struct CompressPolicy {
    mode: CompressMode,
    workers: f64,
    frames: u64,
    stage: Stage,
    /// What a guest byte comes to, of frames that were to be compressed.
    shrunk: Mean,
    /// Seconds of a core that this takes for a guest byte at the present level.
    cost: Mean,
    /// Time spent compressing since the last report, by all workers.
    packing: Duration,
    /// What happened since the last judgement.
    stretch: Stretch,
    /// Whether the present interval began before the stage did.
    partial: bool,
    /// Intervals in which something was sent; no fewer than [`OPENING`] once raw was looked at.
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
    /// A lower level that was left for a higher one, and bytes per second there.
    below: Option<(usize, f64)>,
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
            shrunk: Mean::default(),
            cost: Mean::default(),
            packing: Duration::ZERO,
            stretch: Stretch::default(),
            partial: true,
            opening: 0,
            raw_goodput: None,
            looked: Duration::ZERO,
            memory: RAW_MEMORY,
            stretches_in_stage: 0,
            paused_until: Duration::ZERO,
            pause: FIRST_PAUSE,
            climb_after: Duration::ZERO,
            carried: Carried::default(),
            below: None,
        }
    }

    /// A session begins over a path of this round-trip time. Only the copy's first one matters.
    pub fn open(&mut self, rtt: Duration) {
        if self.frames == 0 && rtt <= SHORT_PATH {
            self.opening = OPENING;
            self.stage = Stage::Opening;
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
            CompressMode::Auto => matches!(self.stage, Stage::Packed(_) | Stage::Trial { .. }),
        }
    }

    /// A frame went as differences or with duplicates, which took this. How much smaller it got says nothing of other content.
    pub fn on_referring(&mut self, spent: Spent) {
        self.packing += spent.elapsed;
    }

    /// How the next frame is compressed, or `None` for raw.
    pub fn next_effort(&mut self) -> Option<Effort> {
        match self.mode {
            CompressMode::Off => None,
            CompressMode::Level(level) => Some(Effort::Always(level)),
            CompressMode::Auto => {
                self.frames += 1;
                let probe = |due: bool| due.then_some(Effort::Probe(LADDER[0]));
                match self.stage {
                    Stage::Packed(rung) => LADDER.get(rung).copied().map(Effort::Sampled),
                    Stage::Trial { .. } => Some(Effort::Sampled(LADDER[0])),
                    Stage::Raw => probe(self.frames % PROBE_EVERY == 1),
                    Stage::Opening => probe(self.partial && self.frames % 2 == 1),
                    Stage::Yardstick { .. } => None,
                }
            }
        }
    }

    /// A frame was to be compressed, or a piece of it was. Frames sent raw by decision are not told.
    pub fn on_compressed(&mut self, tried: &Tried) {
        self.packing += tried.spent.elapsed;
        if tried.raw > 0 {
            let raw = as_f64(tried.raw as u64);
            self.shrunk.add(as_f64(tried.packed as u64) / raw);
            self.cost.add(tried.spent.cpu.as_secs_f64() / raw);
        }
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
        if std::mem::take(&mut self.partial) {
            self.stretch = Stretch::default();
            return;
        }
        match self.stage {
            Stage::Opening => self.judge_opening(now),
            Stage::Yardstick { rung, packed } => self.judge_yardstick(now, rung, packed),
            Stage::Trial { raw } => self.judge_trial(now, raw),
            Stage::Raw | Stage::Packed(_) if self.is_doubtful() => {
                self.opening = OPENING;
                let packed = self.stretch.carried();
                self.change(Stage::Yardstick { rung: 0, packed });
            }
            Stage::Raw | Stage::Packed(_) => {
                self.opening = self.opening.saturating_add(1);
                if complete {
                    self.judge(now);
                }
            }
        }
    }

    /// Whether compression keeps the cores busy in the opening of a copy.
    fn is_doubtful(&self) -> bool {
        self.opening < OPENING
            && self.stretch.share(self.workers) > HARMLESS_SHARE
            && self.stretch.is_conclusive()
    }

    /// Guest bytes per byte on the wire.
    fn ratio(&self) -> Option<f64> {
        self.shrunk.get().map(f64::recip)
    }

    /// Whether frames shrink, or too few are known.
    fn may_shrink(&self) -> bool {
        let shrink = self.ratio().is_none_or(|ratio| ratio >= MIN_RATIO);
        shrink || self.shrunk.frames < TELLING
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
        let (Some(ratio), Some(cost)) = (self.ratio(), self.cost.get()) else {
            return;
        };
        let expected = (goodput * ratio).min(self.workers / cost);
        if now >= self.paused_until && ratio >= MIN_RATIO && expected >= goodput * GAIN_ON {
            self.change(Stage::Trial { raw: goodput });
        }
    }

    fn judge_opening(&mut self, now: Duration) {
        if !self.stretch.lasts(SHORT_STRETCH) {
            return;
        }
        let raw = self.stretch.line();
        let done = self.stretch.lasts(LOOK);
        let cost = self.cost.get().unwrap_or_default();
        let warm = (cost / COLD).max(USUAL_COST).min(cost);
        let cores = raw * if done { ENOUGH * cost } else { AMPLE * warm };
        if self.may_shrink() && cores <= self.workers {
            self.looked = now;
            self.change(Stage::Trial { raw });
        } else if done {
            self.look(now, raw);
            self.rest(now);
        }
    }

    fn judge_yardstick(&mut self, now: Duration, rung: usize, packed: f64) {
        let line = self.stretch.line();
        let clear = self.stretch.lasts(LEAST_LOOK) && line * CLEARLY_MORE < packed;
        if !clear && !self.stretch.lasts(LOOK) {
            return;
        }
        if line <= packed * GAIN_RAW {
            // So short a look tells which of both is better, and not how much raw carries.
            self.raw_goodput = None;
            self.looked = now;
            self.pause = FIRST_PAUSE;
            self.memory = (self.memory * 2).min(MAX_RAW_MEMORY);
            self.change(Stage::Packed(rung));
        } else {
            self.look(now, line);
            self.rest(now);
        }
    }

    fn judge_trial(&mut self, now: Duration, raw: f64) {
        if !self.stretch.lasts(TRIAL) || !self.stretch.is_conclusive() {
            return;
        }
        if self.stretch.carried() * CLEARLY_MORE < raw {
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
        let starves = carried
            .zip(self.below)
            .is_some_and(|(now, (_, before))| now < before * LEAST_CARRIED);
        let too_high = share > MOST_SHARE || link_wait < LINK_BOUND || slower || starves;
        // Senders that wait for the link would do so the more with everything raw.
        let suspect = link_wait < LINK_BOUND && share > HARMLESS_SHARE;
        let due = now.saturating_sub(self.looked) > self.memory / SUSPECTED;
        if rung > 0 && too_high {
            self.climb_after = now.saturating_add(CLIMB_PAUSE);
            let below = self.below.filter(|(below, _)| below + 1 < rung);
            self.change(Stage::Packed(rung - 1));
            self.below = below;
        } else if slower {
            self.rest(now);
        } else if (held_up && !fresh) || (suspect && due) {
            let packed = goodput;
            self.change(Stage::Yardstick { rung, packed });
        } else if let Some(carried) = carried
            && link_wait >= LINK_BOUND_WELL
            && self.ratio().is_some_and(|ratio| ratio >= MIN_RATIO)
            && now >= self.climb_after
            && let Some(higher) = highest_harmless(rung, share)
        {
            self.change(Stage::Packed(higher));
            self.below = Some((rung, carried));
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
        tracing::debug!(from = ?self.stage, to = ?stage, "frames are compressed in another way");
        // What it takes is that of a level: the lowest one's is kept for the time without compression.
        if matches!(stage, Stage::Packed(_) | Stage::Trial { .. }) {
            self.cost = Mean::default();
        }
        self.partial = matches!(stage, Stage::Yardstick { .. } | Stage::Trial { .. });
        self.stage = stage;
        self.stretches_in_stage = 0;
        self.stretch = Stretch::default();
        self.carried = Carried::default();
        self.below = None;
    }
}

/// The highest rung above this one at which compression would not take too much, where it takes this share here.
fn highest_harmless(rung: usize, share: f64) -> Option<usize> {
    let harmless = |cost: &f64| share * cost / COST[rung] <= HARMLESS_SHARE;
    COST.iter()
        .rposition(harmless)
        .filter(|higher| *higher > rung)
}
