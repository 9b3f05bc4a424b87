//! The policy of `--compress`: whether the next frame is compressed, and how hard.
//!
//! Owns the decision, as a pure machine fed with what was measured; it reads no clock. `auto` begins with the
//! fastest level, goes up while the link is the bottleneck and cores are free, and down while the cores are. Raw is the yardstick:
//! a stretch is sent raw where compression may be what holds the copy up, and now and then otherwise, and what carries fewer guest
//! bytes per second than raw is turned off. A fast copy may be over within the second, so such a stretch comes at its very
//! beginning, where compression keeps the cores busy, and none is longer than it takes to see which of both is better: whether
//! senders wait does not tell, since busy cores let them wait as a full link does. Whether a frame's content shrinks at all is asked
//! of a sample of it: see [`Effort`].

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What `auto` climbs. The first has nearly the ratio of the second in less time, which counts where the cores are the bottleneck.
const LADDER: [i32; 5] = [-1, 1, 3, 6, 9];
/// Time that a byte takes at the next rung to what it takes at this one, roughly; what it really takes is measured there.
const STEEPNESS: f64 = 2.5;
/// Share of all workers' time that compression may take where it went up: the guests of this host want the cores too.
const MOST_SHARE: f64 = 0.4;
/// Share up to which compression is no reason for a slow copy.
const HARMLESS_SHARE: f64 = 0.25;
/// Levels that may be asked for.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
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
/// A stage is judged by stretches of this length.
const STRETCH: Duration = Duration::from_millis(190);
/// A comparison with raw is judged as soon as it took this long and carried [`CONCLUSIVE`] guest bytes, or at the end of a stretch.
const SHORT_STRETCH: Duration = Duration::from_millis(20);
/// Some frames: they are counted whole, as they are handed over.
const CONCLUSIVE: u64 = 2 << 20;
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
/// What was carried longer ago than this counts half.
const LATELY: Duration = Duration::from_secs(2);
/// After a level was too high it is not tried for this time.
const CLIMB_PAUSE: Duration = Duration::from_secs(20);
/// The first stretches after a change still carry frames of before.
const SETTLE: u32 = 2;

/// What `--compress` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CompressMode {
    /// As it serves the copy, frame by frame.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, at this zstd level.
    Level(i32),
}

/// Text that is no compression mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a way to compress: use auto, off, or a zstd level from -7 to 19 without 0")]
pub struct CompressModeError(String);

impl FromStr for CompressMode {
    type Err = CompressModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            level => level
                .parse()
                .ok()
                .filter(|level| *level != 0 && LEVELS.contains(level))
                .map(Self::Level)
                .ok_or_else(|| CompressModeError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for CompressMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Level(level) => level.fmt(f),
        }
    }
}

/// What happened on all lanes since the last report.
#[derive(Debug, Clone, Copy, Default)]
pub struct Interval {
    /// Its length.
    pub elapsed: Duration,
    /// Guest bytes that were handed to the transport, before compression, zero blocks left out.
    pub raw_bytes: u64,
    /// Bytes of headers and payloads that became of them.
    pub wire_bytes: u64,
    /// Share of the time for which the senders waited for the transport or the bandwidth limit: 0 to 1.
    pub link_wait: f64,
}

/// Some intervals together.
#[derive(Debug, Clone, Copy, Default)]
struct Stretch {
    elapsed: f64,
    raw_bytes: u64,
    wire_bytes: u64,
    waited: f64,
    /// Time spent compressing, by all workers.
    packing: f64,
}

impl Stretch {
    fn add(&mut self, interval: &Interval, packing: Duration) {
        let elapsed = interval.elapsed.as_secs_f64();
        self.elapsed += elapsed;
        self.raw_bytes += interval.raw_bytes;
        self.wire_bytes += interval.wire_bytes;
        self.waited += interval.link_wait * elapsed;
        self.packing += packing.as_secs_f64();
    }

    /// Guest bytes per second.
    fn goodput(&self) -> f64 {
        as_f64(self.raw_bytes) / self.elapsed
    }

    /// Share of the time for which senders waited.
    fn link_wait(&self) -> f64 {
        self.waited / self.elapsed
    }

    /// Share of the time of so many workers that compression took.
    fn share(&self, workers: f64) -> f64 {
        self.packing / (self.elapsed * workers)
    }

    fn lasts(&self, time: Duration) -> bool {
        self.elapsed >= time.as_secs_f64()
    }

    /// Whether it is long enough to be compared with another, whose frames may have been of another size.
    fn is_conclusive(&self) -> bool {
        self.lasts(STRETCH) || (self.lasts(SHORT_STRETCH) && self.raw_bytes >= CONCLUSIVE)
    }
}

/// What went over the wire lately: frames are counted whole as they are handed over, so a single stretch says little.
#[derive(Debug, Clone, Copy, Default)]
struct Carried {
    bytes: f64,
    elapsed: f64,
}

impl Carried {
    fn add(&mut self, stretch: &Stretch) {
        if self.elapsed >= LATELY.as_secs_f64() {
            self.bytes /= 2.0;
            self.elapsed /= 2.0;
        }
        self.bytes += as_f64(stretch.wire_bytes);
        self.elapsed += stretch.elapsed;
    }

    fn rate(&self) -> f64 {
        self.bytes / self.elapsed
    }
}

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

#[allow(
    clippy::cast_precision_loss,
    reason = "rates are estimates; 2^53 bytes are far above any interval"
)]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::{CARRIED_KNOWN, CompressMode, CompressPolicy, Interval, LADDER};
    use std::time::Duration;

    const STEP: Duration = Duration::from_millis(25);
    const MB: u64 = 1_000_000;
    const FRAME: u32 = 524_288;

    /// A world with a link, a compressor and a guest, run for some steps.
    struct World {
        /// Bytes per second on the wire.
        link: u64,
        /// Guest bytes per second that all workers compress at the lowest level; half of it at each higher one.
        compressor: u64,
        /// Guest bytes per second that can be read at all.
        reader: u64,
        /// Ratio in tenths; a tenth more at each higher level.
        ratio_tenths: u64,
        /// Bytes per second on the wire for which the cores do what a transport does, where it shares them with compressor and reader.
        transport: Option<u64>,
        /// Seconds by which the last frame went on into the next step.
        debt: f64,
        now: Duration,
        policy: CompressPolicy,
    }

    /// What came of some steps.
    #[derive(Debug, Default)]
    struct Came {
        guest_bytes: u64,
        packed: u64,
        frames: u64,
    }

    /// Seconds for which each was at work.
    #[derive(Default)]
    struct Work {
        reading: f64,
        packing: f64,
        sending: f64,
        transport: f64,
    }

    impl Work {
        /// How long it took: everything at once, or what shares the cores one after the other.
        fn took(&self, shared: bool) -> f64 {
            let cores = if shared {
                self.reading + self.packing + self.transport
            } else {
                self.reading.max(self.packing)
            };
            cores.max(self.sending)
        }
    }

    impl World {
        fn new(link: u64, compressor: u64, reader: u64, ratio_tenths: u64) -> Self {
            Self {
                link: link * MB,
                compressor: compressor * MB,
                reader: reader * MB,
                ratio_tenths,
                transport: None,
                debt: 0.0,
                now: Duration::ZERO,
                policy: CompressPolicy::new(CompressMode::Auto, 1),
            }
        }

        fn rung(&mut self) -> Option<u64> {
            let effort = self.policy.next_effort()?;
            LADDER
                .iter()
                .position(|rung| *rung == effort.level)
                .map(|at| at as u64)
        }

        /// One frame: bytes that it has on the wire.
        fn frame(&mut self, work: &mut Work, came: &mut Came) -> u64 {
            let mut payload = u64::from(FRAME);
            if let Some(rung) = self.rung() {
                let mut time = f64::from(FRAME) * f64::from(1 << rung) / self.compressor as f64;
                payload = u64::from(FRAME) * 10
                    / (self.ratio_tenths + rung * u64::from(self.ratio_tenths > 10));
                if payload < u64::from(FRAME) {
                    let payload = usize::try_from(payload).unwrap();
                    let time = Duration::from_secs_f64(time);
                    self.policy.on_compressed(FRAME, payload, time);
                } else {
                    // Only the sample.
                    time /= 32.0;
                    self.policy.on_incompressible(Duration::from_secs_f64(time));
                }
                work.packing += time;
                came.packed += 1;
            }
            work.reading += f64::from(FRAME) / self.reader as f64;
            work.sending += payload as f64 / self.link as f64;
            if let Some(transport) = self.transport {
                work.transport += payload as f64 / transport as f64;
            }
            came.frames += 1;
            came.guest_bytes += u64::from(FRAME);
            payload
        }

        /// Frames for one step, one after the other: on the wire while the next ones are compressed.
        fn step(&mut self, came: &mut Came) {
            let mut work = Work::default();
            let shared = self.transport.is_some();
            let mut interval = Interval {
                elapsed: STEP,
                ..Interval::default()
            };
            while self.debt + work.took(shared) < STEP.as_secs_f64() {
                interval.wire_bytes += self.frame(&mut work, came);
                interval.raw_bytes += u64::from(FRAME);
            }
            let (took, own) = (work.took(shared), work.reading.max(work.packing));
            self.debt += took - STEP.as_secs_f64();
            // Busy cores let senders wait as a full link does.
            if took > 0.0 && (shared || work.sending >= took) {
                interval.link_wait = 1.0 - own / took;
            }
            self.now += STEP;
            self.policy.on_interval(self.now, &interval);
        }

        fn run(&mut self, steps: u32) -> Came {
            let mut came = Came::default();
            for _ in 0..steps {
                self.step(&mut came);
            }
            came
        }

        /// Guest bytes in the same time, to what they were at full rate.
        fn share_of(came: &Came, steps: u32, rate: u64) -> f64 {
            came.guest_bytes as f64 / (STEP.as_secs_f64() * f64::from(steps) * rate as f64)
        }
    }

    #[test]
    fn a_slow_link_is_relieved_from_the_first_frame() {
        let mut world = World::new(100, 2000, 3000, 30);
        let came = world.run(40);
        assert_eq!(came.packed, came.frames);
        let came = world.run(4000);
        assert!(World::share_of(&came, 4000, 300 * MB) > 0.98, "{came:?}");
    }

    #[test]
    fn the_level_goes_up_while_the_link_is_slow_and_cores_are_free_and_down_when_they_are_not() {
        let mut world = World::new(10, 1000, 3000, 30);
        world.run(480);
        assert_eq!(world.rung(), Some(3));
        world.compressor = 150 * MB;
        world.run(480);
        assert!(world.rung().is_none_or(|rung| rung < 3));
        let came = world.run(800);
        assert!(World::share_of(&came, 800, 30 * MB) > 0.95, "{came:?}");
    }

    #[test]
    fn a_link_faster_than_the_compressor_goes_raw() {
        let mut world = World::new(1200, 900, 3000, 40);
        world.run(8);
        let came = world.run(4000);
        assert!(World::share_of(&came, 4000, 1200 * MB) > 0.98, "{came:?}");
    }

    #[test]
    fn a_copy_is_as_fast_as_the_better_of_both_but_for_what_it_takes_to_see_which() {
        // Compressor and transport, sharing the cores or not; and the steps in which it is to be seen.
        for (link, compressor, transport, seen) in [
            (10_000, 700, Some(1000), 2),
            (10_000, 400, Some(800), 2),
            (1200, 700, Some(1000), 2),
            (117, 700, Some(1000), 2),
            (12, 700, Some(1000), 2),
            (60, 50, Some(70), 12),
            (10_000, 900, None, 2),
            (1200, 900, None, 2),
            (117, 900, None, 2),
        ] {
            for steps in [20, 40, 80, 200, 800] {
                let world = |mode| World {
                    transport: transport.map(|transport: u64| transport * MB),
                    policy: CompressPolicy::new(mode, 1),
                    ..World::new(link, compressor, 4000, 25)
                };
                let guest_bytes = |mode| world(mode).run(steps).guest_bytes as f64;
                let raw = guest_bytes(CompressMode::Off);
                let packed = guest_bytes(CompressMode::Level(LADDER[0]));
                let auto = guest_bytes(CompressMode::Auto);
                let (better, worse) = (raw.max(packed), raw.min(packed));
                let lost = f64::from(seen) / f64::from(steps) * (1.0 - worse / better);
                let least = 1.0 - lost - 0.02;
                assert!(
                    auto > better * least,
                    "{link} {compressor} {transport:?} {steps}: {}",
                    auto / better
                );
            }
        }
    }

    #[test]
    fn a_guest_with_little_to_send_is_no_reason_to_go_raw() {
        let mut world = World {
            transport: Some(1000 * MB),
            ..World::new(117, 700, 4000, 25)
        };
        let came = world.run(200);
        assert!(World::share_of(&came, 200, 117 * MB) > 2.0, "{came:?}");
        for _ in 0..800 {
            assert!(world.policy.next_effort().is_some());
            world
                .policy
                .on_compressed(FRAME, 200_000, Duration::from_millis(1));
            world.now += STEP;
            let interval = Interval {
                elapsed: STEP,
                raw_bytes: u64::from(FRAME),
                wire_bytes: 200_000,
                link_wait: 0.05,
            };
            world.policy.on_interval(world.now, &interval);
        }
    }

    #[test]
    fn content_that_does_not_shrink_is_no_reason_to_let_others_go_raw() {
        let mut world = World::new(100, 900, 3000, 10);
        let came = world.run(1600);
        assert!(World::share_of(&came, 1600, 100 * MB) > 0.99, "{came:?}");
        assert!(
            world
                .policy
                .next_effort()
                .is_none_or(|effort| effort.sampled)
        );
        // Now some that does.
        world.ratio_tenths = 40;
        let came = world.run(160);
        assert!(came.packed * 10 > came.frames * 9, "{came:?}");
    }

    #[test]
    fn what_slows_the_copy_turns_itself_off_and_is_tried_ever_more_rarely() {
        // The compressor shares a core with the transport: what it takes, the link lacks.
        let mut policy = CompressPolicy::new(CompressMode::Auto, 1);
        let (mut now, mut switched_on, mut was) = (Duration::ZERO, 0, true);
        for _ in 0..8000 {
            let mut on = 0;
            for _ in 0..8 {
                if policy.next_effort().is_some() {
                    policy.on_compressed(FRAME, 131_072, Duration::from_micros(1200));
                    on += 1;
                }
            }
            let on = on > 4;
            switched_on += u32::from(on && !was);
            was = on;
            now += STEP;
            policy.on_interval(
                now,
                &Interval {
                    elapsed: STEP,
                    raw_bytes: if on { 5 * MB / 2 } else { 15 * MB / 2 },
                    wire_bytes: if on { 5 * MB / 8 } else { 15 * MB / 2 },
                    link_wait: 0.9,
                },
            );
        }
        assert!((1..=8).contains(&switched_on), "{switched_on}");
        assert!(!was);
    }

    #[test]
    fn a_level_that_starves_the_link_is_left_though_senders_wait() {
        let mut policy = CompressPolicy::new(CompressMode::Auto, 1);
        let (mut now, mut highest, mut too_high) = (Duration::ZERO, 0, 0);
        for _ in 0..800 {
            let level = policy.next_effort().unwrap().level;
            policy.on_compressed(FRAME, 131_072, Duration::from_micros(12));
            highest = highest.max(level);
            too_high += u32::from(level > 1);
            now += STEP;
            let interval = Interval {
                elapsed: STEP,
                raw_bytes: 5 * MB,
                wire_bytes: if level > 1 { 9 * MB / 8 } else { 10 * MB / 8 },
                link_wait: 0.9,
            };
            policy.on_interval(now, &interval);
        }
        assert_eq!(highest, 3);
        // Twenty seconds, and one try.
        assert!(too_high <= 2 * 8 * CARRIED_KNOWN, "{too_high}");
    }

    #[test]
    fn a_link_that_became_fast_is_noticed() {
        let mut world = World::new(100, 500, 3000, 40);
        let came = world.run(160);
        assert!(came.packed * 10 > came.frames * 9, "{came:?}");
        world.link = 2000 * MB;
        world.run(960);
        let came = world.run(800);
        assert!(World::share_of(&came, 800, 2000 * MB) > 0.9, "{came:?}");
    }

    #[test]
    fn a_slow_reader_loses_nothing() {
        let mut world = World::new(1000, 5000, 300, 40);
        let came = world.run(1600);
        assert!(World::share_of(&came, 1600, 300 * MB) > 0.99, "{came:?}");
    }

    #[test]
    fn a_given_mode_is_kept() {
        let mut off = CompressPolicy::new(CompressMode::Off, 1);
        let mut three = CompressPolicy::new(CompressMode::Level(3), 1);
        for _ in 0..200 {
            assert_eq!(off.next_effort(), None);
            assert_eq!(three.next_effort(), Some(3.into()));
        }
        assert!(three.refers() && !off.refers());
        for (text, mode) in [
            ("auto", CompressMode::Auto),
            ("off", CompressMode::Off),
            ("-5", CompressMode::Level(-5)),
            ("19", CompressMode::Level(19)),
        ] {
            assert_eq!(text.parse(), Ok(mode));
            assert_eq!(mode.to_string(), text);
        }
        for bad in ["", "on", "20", "-8", "AUTO", "1.5"] {
            assert!(bad.parse::<CompressMode>().is_err(), "{bad:?}");
        }
    }
}
