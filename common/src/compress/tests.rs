use super::{
    CARRIED_KNOWN, CompressMode, CompressPolicy, Effort, Interval, LADDER, SHORT_PATH, Spent, Tried,
};
use std::time::Duration;

const STEP: Duration = Duration::from_millis(25);
const MB: u64 = 1_000_000;
const FRAME: u32 = 524_288;

/// A frame that was to be compressed by a thread that nobody disturbs.
fn frame(packed: usize, micros: u64) -> Tried {
    tried(FRAME as usize, packed, Duration::from_micros(micros))
}

fn tried(raw: usize, packed: usize, time: Duration) -> Tried {
    let spent = Spent {
        elapsed: time,
        cpu: time,
    };
    Tried { raw, packed, spent }
}

/// Whether a frame goes compressed.
fn packs(effort: Option<Effort>) -> bool {
    matches!(effort, Some(Effort::Sampled(_) | Effort::Always(_)))
}

/// Where on the ladder it is.
fn rung_of(effort: Effort) -> usize {
    let same = |level: &i32| *level == effort.level();
    LADDER.iter().position(same).unwrap()
}

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

    /// Tries to compress so many bytes: what becomes of them.
    fn compress(&mut self, raw: u64, effort: Effort, work: &mut Work) -> u64 {
        let rung = rung_of(effort) as u64;
        let mut time = raw as f64 * f64::from(1 << rung) / self.compressor as f64;
        let packed = raw * 10 / (self.ratio_tenths + rung * u64::from(self.ratio_tenths > 10));
        if packed >= raw && packs(Some(effort)) {
            // Only the sample.
            time /= 32.0;
        }
        let bytes = |bytes| usize::try_from(bytes).unwrap();
        let took = Duration::from_secs_f64(time);
        self.policy
            .on_compressed(&tried(bytes(raw), bytes(packed), took));
        work.packing += time;
        packed
    }

    /// One frame: bytes that it has on the wire.
    fn frame(&mut self, work: &mut Work, came: &mut Came) -> u64 {
        let mut payload = u64::from(FRAME);
        match self.policy.next_effort() {
            Some(effort @ Effort::Probe(_)) => {
                self.compress(payload / 8, effort, work);
            }
            Some(effort) => {
                payload = self.compress(payload, effort, work);
                came.packed += 1;
            }
            None => {}
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
        interval.sent_bytes = interval.wire_bytes;
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
    assert_eq!(world.policy.next_effort().map(rung_of), Some(3));
    world.compressor = 150 * MB;
    world.run(480);
    let effort = world.policy.next_effort();
    assert!(effort.is_none_or(|effort| rung_of(effort) < 3));
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
        (12, 700, Some(1000), 3),
        (60, 50, Some(70), 12),
        (10_000, 900, None, 2),
        (1200, 900, None, 2),
        (117, 900, None, 2),
    ] {
        for (steps, rtt) in [20, 40, 80, 200, 800]
            .into_iter()
            .flat_map(|steps| [(steps, SHORT_PATH), (steps, SHORT_PATH * 10)])
        {
            let guest_bytes = |mode| {
                let mut world = World {
                    transport: transport.map(|transport: u64| transport * MB),
                    policy: CompressPolicy::new(mode, 1),
                    ..World::new(link, compressor, 4000, 25)
                };
                world.policy.open(rtt);
                world.run(steps).guest_bytes as f64
            };
            let raw = guest_bytes(CompressMode::Off);
            let packed = guest_bytes(CompressMode::Level(LADDER[0]));
            let auto = guest_bytes(CompressMode::Auto);
            let (better, worse) = (raw.max(packed), raw.min(packed));
            // Over a long path one more, since it begins compressed.
            let seen = seen + u32::from(rtt > SHORT_PATH);
            let lost = f64::from(seen) / f64::from(steps) * (1.0 - worse / better);
            let least = 1.0 - lost - 0.02;
            assert!(
                auto > better * least,
                "{link} {compressor} {transport:?} {steps} {rtt:?}: {}",
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
        assert!(packs(world.policy.next_effort()));
        world.policy.on_compressed(&frame(200_000, 1000));
        world.now += STEP;
        let interval = Interval {
            elapsed: STEP,
            raw_bytes: u64::from(FRAME),
            wire_bytes: 200_000,
            sent_bytes: 200_000,
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
    let effort = world.policy.next_effort();
    assert!(!matches!(effort, Some(Effort::Always(_))), "{effort:?}");
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
            let effort = policy.next_effort();
            if effort.is_some() {
                policy.on_compressed(&frame(131_072, 1200));
                on += u32::from(packs(effort));
            }
        }
        let on = on > 4;
        switched_on += u32::from(on && !was);
        was = on;
        now += STEP;
        let wire_bytes = if on { 5 * MB / 8 } else { 15 * MB / 2 };
        let interval = Interval {
            elapsed: STEP,
            raw_bytes: if on { 5 * MB / 2 } else { wire_bytes },
            wire_bytes,
            sent_bytes: wire_bytes,
            link_wait: 0.9,
        };
        policy.on_interval(now, &interval);
    }
    assert!((1..=8).contains(&switched_on), "{switched_on}");
    assert!(!was);
}

#[test]
fn a_level_that_starves_the_link_is_left_though_senders_wait() {
    let mut policy = CompressPolicy::new(CompressMode::Auto, 1);
    let (mut now, mut levels, mut too_high) = (Duration::ZERO, vec![LADDER[0]], 0);
    for _ in 0..800 {
        let level = policy.next_effort().unwrap().level();
        // The third rung would be harmless, the fourth not.
        let cost = if level > 1 { 3400 } else { 2000 };
        policy.on_compressed(&frame(131_072, cost));
        if levels.last() != Some(&level) {
            levels.push(level);
        }
        too_high += u32::from(level > 1);
        now += STEP;
        let wire_bytes = if level > 1 { 9 * MB / 8 } else { 10 * MB / 8 };
        let interval = Interval {
            elapsed: STEP,
            raw_bytes: 5 * MB,
            wire_bytes,
            sent_bytes: wire_bytes,
            link_wait: 0.9,
        };
        policy.on_interval(now, &interval);
    }
    // At once to the highest that is harmless, and one by one back.
    assert_eq!(levels[..3], [-1, 3, 1], "{levels:?}");
    assert!(levels.iter().all(|level| *level <= 3), "{levels:?}");
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
        assert_eq!(three.next_effort(), Some(Effort::Always(3)));
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

#[test]
fn buffers_that_fill_up_are_no_reason_to_go_raw() {
    let mut policy = CompressPolicy::new(CompressMode::Auto, 1);
    let (mut now, mut looks) = (Duration::ZERO, 0);
    for step in 0..40 {
        let packed = packs(policy.next_effort());
        if packed {
            policy.on_compressed(&frame(FRAME as usize / 2, 15_000));
        }
        now += STEP;
        // A line of 100 MB/s, of which buffers take three times as much for a while after each change.
        let sent_bytes = 5 * MB / 2;
        let wire_bytes = if packed { sent_bytes } else { 3 * sent_bytes };
        let interval = Interval {
            elapsed: STEP,
            raw_bytes: if packed { 2 * wire_bytes } else { wire_bytes },
            wire_bytes,
            sent_bytes,
            link_wait: 0.9,
        };
        policy.on_interval(now, &interval);
        looks += u32::from(!packed);
        assert!(step < 10 || packed, "{step}");
    }
    assert!(looks >= 2, "{looks}");
}
