//! The policy of `--compress`: whether the next frame is compressed.
//!
//! Owns the decision, as a pure machine fed with what was measured; it reads no clock. `auto` begins raw,
//! measures compression on single frames (every fourth until something is known, then 1 of 64), and turns it on only where the link is the
//! bottleneck and compression is expected to carry more of the guest per second. It then compares the guest
//! bytes per second really reached with those reached raw, and turns itself off where it slows the copy.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::units::Rate;

/// Level of `auto`: nearly the ratio of higher ones at the highest speed of the regular levels.
pub const AUTO_LEVEL: i32 = 1;
/// Levels that may be asked for.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
/// One frame of this many is tried the other way.
const PROBE_EVERY: u64 = 64;
/// Until compression was measured, one frame of this many is tried.
const FIRST_PROBES_EVERY: u64 = 4;
/// Below this ratio compression is not worth the peer's time.
const MIN_RATIO: f64 = 1.1;
/// Expected gain at which compression is turned on; off needs no gain, so that it does not flap.
const GAIN_ON: f64 = 1.15;
/// Share of an interval for which senders waited for the link, from which on the link is the bottleneck.
const LINK_BOUND: f64 = 0.3;
/// Weight of the newest measurement in a running mean.
const NEWEST: f64 = 0.25;
/// Intervals shorter than this measure noise.
const MIN_INTERVAL: Duration = Duration::from_millis(50);
/// After compression slowed the copy it is tried again after this time, then twice as long, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
/// The longest such pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// What was reached raw counts this long; then a stretch is sent raw to see whether the link has changed.
const RAW_MEMORY: Duration = Duration::from_secs(20);
/// The first intervals after a change still carry frames of before.
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
    /// Bytes that they took as payload.
    pub wire_bytes: u64,
    /// Share of the time for which the senders waited for the transport or the bandwidth limit: 0 to 1.
    pub link_wait: f64,
}

/// Decides for every frame whether it is compressed.
#[derive(Debug)]
pub struct CompressPolicy {
    mode: CompressMode,
    workers: f64,
    frames: u64,
    compressing: bool,
    /// Guest bytes per byte on the wire.
    ratio: Option<f64>,
    /// Guest bytes that one worker compresses per second.
    speed: Option<f64>,
    /// Guest bytes per second reached raw while the link was the bottleneck, and when.
    raw_goodput: Option<(f64, Duration)>,
    intervals_in_state: u32,
    paused_until: Duration,
    pause: Duration,
}

impl CompressPolicy {
    /// For `workers` threads that encode at once.
    #[must_use]
    pub fn new(mode: CompressMode, workers: u32) -> Self {
        Self {
            mode,
            workers: f64::from(workers.max(1)),
            frames: 0,
            compressing: false,
            ratio: None,
            speed: None,
            raw_goodput: None,
            intervals_in_state: 0,
            paused_until: Duration::ZERO,
            pause: FIRST_PAUSE,
        }
    }

    /// zstd level of the next frame, or `None` for raw.
    pub fn next_level(&mut self) -> Option<i32> {
        match self.mode {
            CompressMode::Off => None,
            CompressMode::Level(level) => Some(level),
            CompressMode::Auto => {
                self.frames += 1;
                let every = if self.ratio.is_some() {
                    PROBE_EVERY
                } else {
                    FIRST_PROBES_EVERY
                };
                let probe = !self.compressing && self.frames % every == 1;
                (self.compressing || probe).then_some(AUTO_LEVEL)
            }
        }
    }

    /// Whether frames are compressed now, single tries left out.
    #[must_use]
    pub const fn is_compressing(&self) -> bool {
        match self.mode {
            CompressMode::Auto => self.compressing,
            CompressMode::Off => false,
            CompressMode::Level(_) => true,
        }
    }

    /// A frame was compressed: guest bytes, bytes of its payload, time it took. Frames sent raw by decision are not told.
    pub fn on_compressed(&mut self, raw: u32, payload: usize, time: Duration) {
        if raw == 0 || payload == 0 {
            return;
        }
        let raw = f64::from(raw);
        mean(&mut self.ratio, raw / as_f64(payload as u64));
        if !time.is_zero() {
            mean(&mut self.speed, raw / time.as_secs_f64());
        }
    }

    /// Some time has passed; `now` is any clock that does not go back. Best called every 100 to 500 ms.
    pub fn on_interval(&mut self, now: Duration, interval: &Interval) {
        if self.mode != CompressMode::Auto
            || interval.elapsed < MIN_INTERVAL
            || interval.raw_bytes == 0
        {
            return;
        }
        self.intervals_in_state = self.intervals_in_state.saturating_add(1);
        if self.intervals_in_state <= SETTLE {
            return;
        }
        let goodput = as_f64(interval.raw_bytes) / interval.elapsed.as_secs_f64();
        if self.compressing {
            self.judge_compressing(now, goodput);
        } else {
            self.judge_raw(now, goodput, interval);
        }
    }

    fn judge_raw(&mut self, now: Duration, goodput: f64, interval: &Interval) {
        // Single probes hardly change it; but it is the link's rate only where the link held the senders up.
        if interval.link_wait < LINK_BOUND {
            self.raw_goodput = None;
            return;
        }
        self.raw_goodput = Some((goodput, now));
        let (Some(ratio), Some(speed)) = (self.ratio, self.speed) else {
            return;
        };
        let expected = (goodput * ratio).min(speed * self.workers);
        if now >= self.paused_until && ratio >= MIN_RATIO && expected >= goodput * GAIN_ON {
            self.change(true);
        }
    }

    fn judge_compressing(&mut self, now: Duration, goodput: f64) {
        let Some((raw, seen)) = self.raw_goodput else {
            self.change(false);
            return;
        };
        let too_little = self.ratio.is_none_or(|ratio| ratio < MIN_RATIO);
        if goodput < raw || too_little {
            self.paused_until = now.saturating_add(self.pause);
            self.pause = (self.pause * 2).min(MAX_PAUSE);
            self.change(false);
        } else if now.saturating_sub(seen) > RAW_MEMORY {
            // Not a failure: only the yardstick is old.
            self.pause = FIRST_PAUSE;
            self.change(false);
        }
    }

    fn change(&mut self, compressing: bool) {
        self.compressing = compressing;
        self.intervals_in_state = 0;
    }

    /// Guest bytes per second that reach the wire per byte per second of the link: 1 while raw.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        if self.is_compressing() {
            self.ratio.unwrap_or(1.0).max(1.0)
        } else {
            1.0
        }
    }

    /// Guest bytes that one worker compresses per second, where measured.
    #[must_use]
    pub fn speed(&self) -> Option<Rate> {
        self.speed.map(|speed| {
            Rate::of(
                1 << 30,
                Duration::from_secs_f64(as_f64(1 << 30) / speed.max(1.0)),
            )
        })
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
    use super::{AUTO_LEVEL, CompressMode, CompressPolicy, Interval};
    use std::time::Duration;

    const STEP: Duration = Duration::from_millis(200);
    const MB: u64 = 1_000_000;

    /// A world with a link, a compressor and a guest, run for some steps.
    struct World {
        /// Bytes per second on the wire.
        link: u64,
        /// Guest bytes per second that all workers compress.
        compressor: u64,
        /// Guest bytes per second that can be read at all.
        reader: u64,
        /// Ratio in tenths.
        ratio_tenths: u64,
        now: Duration,
    }

    impl World {
        fn run(&mut self, policy: &mut CompressPolicy, steps: u32) -> u32 {
            let mut compressing = 0;
            for _ in 0..steps {
                for _ in 0..64 {
                    if policy.next_level().is_some() {
                        let payload = usize::try_from(524_288 * 10 / self.ratio_tenths).unwrap();
                        let seconds = 524_288.0 / self.compressor as f64;
                        policy.on_compressed(524_288, payload, Duration::from_secs_f64(seconds));
                    }
                }
                let on = policy.is_compressing();
                compressing += u32::from(on);
                let carried = if on {
                    self.link * self.ratio_tenths / 10
                } else {
                    self.link
                };
                let made = if on {
                    self.compressor.min(self.reader)
                } else {
                    self.reader
                };
                let goodput = carried.min(made);
                self.now += STEP;
                policy.on_interval(
                    self.now,
                    &Interval {
                        elapsed: STEP,
                        raw_bytes: goodput / 5,
                        wire_bytes: if on {
                            goodput / 5 * 10 / self.ratio_tenths
                        } else {
                            goodput / 5
                        },
                        link_wait: if carried <= made { 0.9 } else { 0.0 },
                    },
                );
            }
            compressing
        }
    }

    fn auto() -> CompressPolicy {
        CompressPolicy::new(CompressMode::Auto, 1)
    }

    #[test]
    fn a_slow_link_is_relieved() {
        let mut world = World {
            link: 100 * MB,
            compressor: 900 * MB,
            reader: 3000 * MB,
            ratio_tenths: 30,
            now: Duration::ZERO,
        };
        let mut policy = auto();
        world.run(&mut policy, 10);
        assert!(policy.is_compressing());
        assert!(policy.ratio() > 2.9);
        assert!(world.run(&mut policy, 100) >= 90);
    }

    #[test]
    fn a_link_faster_than_the_compressor_stays_raw() {
        let mut world = World {
            link: 1200 * MB,
            compressor: 900 * MB,
            reader: 3000 * MB,
            ratio_tenths: 40,
            now: Duration::ZERO,
        };
        assert_eq!(world.run(&mut auto(), 200), 0);
    }

    #[test]
    fn content_that_does_not_shrink_stays_raw() {
        let mut world = World {
            link: 100 * MB,
            compressor: 900 * MB,
            reader: 3000 * MB,
            ratio_tenths: 10,
            now: Duration::ZERO,
        };
        assert_eq!(world.run(&mut auto(), 200), 0);
    }

    #[test]
    fn a_slow_reader_gains_nothing_and_stays_raw() {
        let mut world = World {
            link: 1000 * MB,
            compressor: 5000 * MB,
            reader: 300 * MB,
            ratio_tenths: 40,
            now: Duration::ZERO,
        };
        assert_eq!(world.run(&mut auto(), 200), 0);
    }

    #[test]
    fn what_slows_the_copy_turns_itself_off_and_is_tried_ever_more_rarely() {
        // Alone the compressor looks fast; with all workers busy it is not: they share a core with the transport.
        let mut policy = auto();
        let mut now = Duration::ZERO;
        let (mut switched_on, mut was) = (0, false);
        for _ in 0..1000 {
            for _ in 0..64 {
                if policy.next_level().is_some() {
                    policy.on_compressed(524_288, 131_072, Duration::from_micros(400));
                }
            }
            let on = policy.is_compressing();
            switched_on += u32::from(on && !was);
            was = on;
            now += STEP;
            policy.on_interval(
                now,
                &Interval {
                    elapsed: STEP,
                    raw_bytes: if on { 20 * MB } else { 60 * MB },
                    wire_bytes: 20 * MB,
                    link_wait: 0.9,
                },
            );
        }
        assert!((2..=8).contains(&switched_on), "{switched_on}");
        assert!(!policy.is_compressing());
    }

    #[test]
    fn a_link_that_became_fast_is_noticed() {
        let mut world = World {
            link: 100 * MB,
            compressor: 500 * MB,
            reader: 3000 * MB,
            ratio_tenths: 40,
            now: Duration::ZERO,
        };
        let mut policy = auto();
        world.run(&mut policy, 20);
        assert!(policy.is_compressing());
        world.link = 2000 * MB;
        world.run(&mut policy, 150);
        assert!(!policy.is_compressing());
    }

    #[test]
    fn while_raw_one_frame_of_sixty_four_is_tried() {
        let mut policy = auto();
        assert_eq!(policy.next_level(), Some(AUTO_LEVEL));
        policy.on_compressed(524_288, 100_000, Duration::from_micros(500));
        let tried = (0..640).filter(|_| policy.next_level().is_some()).count();
        assert_eq!(tried, 10);
    }

    #[test]
    fn a_given_mode_is_kept() {
        let mut off = CompressPolicy::new(CompressMode::Off, 1);
        let mut three = CompressPolicy::new(CompressMode::Level(3), 1);
        for _ in 0..200 {
            assert_eq!(off.next_level(), None);
            assert_eq!(three.next_level(), Some(3));
        }
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
