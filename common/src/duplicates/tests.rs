//! The table beside a naive oracle: lanes that share it, and a destination that applies their frames in any order.

use std::collections::{BTreeMap, VecDeque};
use std::task::{Context, Waker};

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vmferry_proto::frame::{Encoding, FrameHeader, Origins};
use vmferry_proto::geometry::{RegionLen, WINDOW_SIZE, WindowBits};

use super::*;
use crate::codec::{Before, Blocks, Decoder, Elsewhere, Encoder};
use crate::sent::{Secret, SentBlocks};

const LANES: u8 = 3;
/// Windows of each of the two regions: memory and a disk.
const WINDOWS: u32 = 12;
/// Blocks of each window that are ever sent.
const BLOCKS: u32 = 4;
const LEN: RegionLen = RegionLen(WINDOWS as u64 * WINDOW_SIZE as u64);

fn len_of(region: RegionId) -> Option<RegionLen> {
    (region.0 < 2).then_some(LEN)
}

const fn kind_of(region: RegionId) -> RegionKind {
    if region.0 == 0 {
        RegionKind::Memory
    } else {
        RegionKind::Disk
    }
}

/// A block of content `number`; 0 is zero.
fn content(number: u8) -> Vec<u8> {
    vec![number; 4096]
}

/// A frame that is to be sent.
#[derive(Debug, Clone)]
struct Job {
    at: WindowRef,
    blocks: WindowBits,
}

impl Job {
    fn places(&self) -> Vec<BlockRef> {
        let place = |block: u32| BlockRef {
            region: self.at.region,
            block: u16::try_from(block).unwrap(),
            window: self.at.window,
        };
        self.blocks.iter().map(place).collect()
    }
}

/// What happens next.
#[derive(Debug, Clone)]
enum Step {
    /// The guest writes a block, of those there are modulo their number, with one of few contents.
    Write(usize, u8),
    /// The engine hands out a frame.
    Queue(Job),
    /// A lane reads, encodes and sends the next of its frames.
    Send(u8),
    /// The destination applies the next frame of a lane.
    Apply(u8),
    /// The source hears what is applied of a lane.
    Hear(u8),
}

fn job() -> impl Strategy<Value = Job> {
    (0u16..2, 0..WINDOWS, 1u64..1 << BLOCKS).prop_map(|(region, window, bits)| Job {
        at: WindowRef {
            region: RegionId(region),
            window: WindowIndex(window),
        },
        blocks: WindowBits([bits, 0, 0, 0, 0, 0, 0, 0]),
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (any::<usize>(), 0u8..6).prop_map(|(block, content)| Step::Write(block, content)),
        2 => job().prop_map(Step::Queue),
        3 => (0..LANES).prop_map(Step::Send),
        3 => (0..LANES).prop_map(Step::Apply),
        3 => (0..LANES).prop_map(Step::Hear),
    ]
}

struct LaneModel {
    sent: SentBlocks,
    /// Until a block is sent for the second time.
    looks: bool,
    queue: VecDeque<Job>,
    wire: VecDeque<(FrameHeader, Bytes)>,
    last: FrameSeq,
    applied: FrameSeq,
    heard: FrameSeq,
    /// Frames that refer to anything.
    refers: Vec<FrameSeq>,
}

impl LaneModel {
    fn all_that_refers_is_heard(&self) -> bool {
        self.refers.iter().all(|seq| *seq <= self.heard)
    }
}

struct World {
    table: Duplicates,
    lanes: Vec<LaneModel>,
    guest: BTreeMap<BlockRef, u8>,
    /// What was sent last of each block, with which frame, and how often one had it.
    sent: BTreeMap<BlockRef, (u8, FrameSeq, u32)>,
    there: BTreeMap<BlockRef, Vec<u8>>,
    encoder: Encoder,
    decoder: Decoder,
    /// Blocks that went as duplicates.
    duplicates: u32,
    /// Times that a lane had to wait.
    waits: u32,
}

impl World {
    fn new() -> Self {
        let secret = Secret::new();
        let lane = |_| LaneModel {
            sent: SentBlocks::of_one(usize::from(LANES), secret.clone()),
            looks: true,
            queue: VecDeque::new(),
            wire: VecDeque::new(),
            last: FrameSeq(0),
            applied: FrameSeq(0),
            heard: FrameSeq(0),
            refers: Vec::new(),
        };
        Self {
            // Room for fewer contents than there are.
            table: Duplicates::new(LANES, 4),
            lanes: (0..LANES).map(lane).collect(),
            guest: all().into_iter().zip((1..6).cycle()).collect(),
            sent: BTreeMap::new(),
            there: BTreeMap::new(),
            encoder: Encoder::new(),
            decoder: Decoder::new(),
            duplicates: 0,
            waits: 0,
        }
    }

    fn lane(&mut self, lane: u8) -> &mut LaneModel {
        &mut self.lanes[usize::from(lane)]
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Write(block, content) => {
                let all = all();
                self.guest.insert(all[block % all.len()], content);
            }
            Step::Queue(job) => {
                let lane = lane_of(job.at.window, LANES).0;
                self.lane(lane).queue.push_back(job);
            }
            Step::Send(lane) => self.send(lane),
            Step::Apply(lane) => self.apply(lane),
            Step::Hear(lane) => {
                let applied = self.lane(lane).applied;
                self.lane(lane).heard = applied;
                self.table.on_applied(Lane(lane), applied);
            }
        }
    }

    /// As a lane's task does it.
    fn send(&mut self, lane: u8) {
        let state = &self.lanes[usize::from(lane)];
        let Some(job) = state.queue.front().cloned() else {
            return;
        };
        let again = state.sent.has_any(job.at, &job.blocks);
        let sent = |at: &BlockRef| self.sent.contains_key(at);
        assert_eq!(again, job.places().iter().any(sent));
        if again {
            let heard = self.lanes.iter().all(LaneModel::all_that_refers_is_heard);
            if state.looks && !is_over(&self.table) {
                assert!(!heard, "it waits for nothing");
                self.waits += 1;
                return;
            }
            assert!(heard, "what is referred to is sent again");
            self.lane(lane).looks = false;
        }
        let _sent = self.lane(lane).queue.pop_front();
        self.encode(lane, &job);
    }

    fn encode(&mut self, lane: u8, job: &Job) {
        let contents = job.places();
        let contents = contents.iter().flat_map(|at| content(self.guest[at]));
        let bytes: Vec<u8> = contents.collect();
        let state = &mut self.lanes[usize::from(lane)];
        state.last = state.last.next();
        let seq = state.last;
        let blocks = Blocks {
            window: job.at,
            region: LEN,
            read: job.blocks,
            known_zero: WindowBits::EMPTY,
            bytes: &[],
        };
        let before = Before {
            sent: &mut state.sent,
            kept: None,
            elsewhere: state.looks.then_some(Elsewhere {
                duplicates: &self.table,
                kind: kind_of(job.at.region),
                seq,
            }),
        };
        self.encoder.room(bytes.len()).copy_from_slice(&bytes);
        let encoded = self.encoder.encode_filled(&blocks, None, Some(before));
        let encoded = encoded.unwrap();
        let header = encoded.header(seq);
        header.check(&[LEN; 2], Lane(lane), LANES, seq).unwrap();
        if encoded.encoding == Encoding::Duplicate {
            self.check(&header, &encoded.payload);
            self.duplicates += encoded.by_reference.count();
            self.lane(lane).refers.push(seq);
        }
        for at in job.places() {
            let times = self.sent.get(&at).map_or(0, |(_, _, times)| *times);
            self.sent.insert(at, (self.guest[&at], seq, times + 1));
        }
        self.lane(lane).wire.push_back((header, encoded.payload));
    }

    /// The oracle: what is referred to was sent once, is known to be applied, and is the same.
    fn check(&self, header: &FrameHeader, payload: &[u8]) {
        let origins = Origins::split(header, payload, len_of).unwrap();
        for (block, origin) in origins.blocks.iter().zip(&origins.places) {
            let copy = BlockRef {
                region: header.region,
                block: u16::try_from(block).unwrap(),
                window: header.window,
            };
            let (content, seq, times) = self.sent[origin];
            assert_eq!((content, times), (self.guest[&copy], 1), "{copy:?}");
            let lane = lane_of(origin.window, LANES);
            assert!(self.lanes[usize::from(lane.0)].heard >= seq, "{origin:?}");
        }
    }

    fn apply(&mut self, lane: u8) {
        let Some((header, payload)) = self.lane(lane).wire.pop_front() else {
            return;
        };
        let decoded = if header.encoding == Encoding::Duplicate {
            let origins = Origins::split(&header, &payload, len_of).unwrap();
            let there = origins.places.iter().flat_map(|at| self.there[at].clone());
            let there: Vec<u8> = there.collect();
            self.decoder
                .decode_duplicates(&header, &origins, LEN, &there)
        } else {
            self.decoder.decode(&header, &payload)
        };
        let mut blocks = decoded.unwrap().chunks(4096);
        let whole = Job {
            at: WindowRef {
                region: header.region,
                window: header.window,
            },
            blocks: header.present,
        };
        for at in whole.places() {
            let data = header.data_blocks().contains(u32::from(at.block));
            let block = data.then(|| blocks.next().unwrap().to_vec());
            self.there.insert(at, block.unwrap_or_else(|| content(0)));
        }
        self.lane(lane).applied = header.seq;
    }

    /// Everything that was handed out arrives, also where lanes wait for each other.
    fn come_to_rest(&mut self) {
        while self.steps_left() > 0 {
            let before = self.steps_left();
            for lane in 0..LANES {
                self.take(Step::Apply(lane));
                self.take(Step::Hear(lane));
                self.take(Step::Send(lane));
            }
            assert!(self.steps_left() < before, "nothing moves any more");
        }
        for (at, (sent, _, _)) in &self.sent {
            assert_eq!(self.there[at], content(*sent), "{at:?}");
        }
    }

    /// What still has to be done: frames to be sent and applied, and lanes to be heard of.
    fn steps_left(&self) -> usize {
        let left = |lane: &LaneModel| {
            let unheard = usize::from(lane.heard != lane.applied);
            2 * lane.queue.len() + lane.wire.len() + unheard
        };
        self.lanes.iter().map(left).sum()
    }
}

/// All blocks that are ever sent.
fn all() -> Vec<BlockRef> {
    let windows = (0..2).flat_map(|region| (0..WINDOWS).map(move |window| (region, window)));
    let blocks = windows.flat_map(|(region, window)| {
        let at = WindowRef {
            region: RegionId(region),
            window: WindowIndex(window),
        };
        let blocks = WindowBits::first(BLOCKS);
        Job { at, blocks }.places()
    });
    blocks.collect()
}

/// Whether [`Duplicates::end`] returns at once.
fn is_over(table: &Duplicates) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    pin!(table.end()).poll(&mut context).is_ready()
}

/// `[WIRE-54]` `[WIRE-55]`
#[test]
fn whatever_lanes_do_what_is_referred_to_is_there_and_as_it_was() {
    let counts = std::cell::Cell::new((0, 0));
    let steps = prop::collection::vec(step(), 1..200);
    let config = Config {
        failure_persistence: None,
        ..Config::default()
    };
    let ran = TestRunner::new(config).run(&steps, |steps| {
        let mut world = World::new();
        for step in steps {
            world.take(step);
        }
        world.come_to_rest();
        let (duplicates, waits) = counts.get();
        counts.set((duplicates + world.duplicates, waits + world.waits));
        Ok(())
    });
    ran.unwrap();
    let (duplicates, waits) = counts.get();
    println!("{duplicates} blocks went as duplicates, {waits} times a lane waited");
    assert!(duplicates > 100 && waits > 10, "{duplicates} {waits}");
}

fn frame(region: u16, window: u32, seq: u64) -> FirstSent {
    let region = RegionId(region);
    FirstSent {
        at: WindowRef {
            region,
            window: WindowIndex(window),
        },
        kind: kind_of(region),
        seq: FrameSeq(seq),
    }
}

/// Blocks of a frame whose contents have these digests, with region and window of what they are duplicates of.
fn found(table: &Duplicates, frame: &FirstSent, digests: &[u64]) -> Vec<(u32, u16, u32)> {
    let found = table.find(frame, (0..).zip(digests.iter().copied()));
    let origin = |(block, at): &(u32, BlockRef)| (*block, at.region.0, at.window.0);
    found.iter().map(origin).collect()
}

#[test]
fn memory_takes_the_place_of_a_disk_and_what_is_met_again_keeps_its_own() {
    let table = Duplicates::new(2, 4);
    assert_eq!(found(&table, &frame(1, 0, 1), &[7, 8]), []);
    assert_eq!(found(&table, &frame(1, 1, 1), &[7]), [], "not applied");
    table.on_applied(Lane(0), FrameSeq(1));
    let both = found(&table, &frame(1, 3, 2), &[8, 7]);
    assert_eq!(both, [(0, 1, 0), (1, 1, 0)]);
    assert_eq!(found(&table, &frame(0, 0, 2), &[7]), [(0, 1, 0)]);
    assert_eq!(found(&table, &frame(0, 2, 3), &[7]), [], "not applied");
    table.on_applied(Lane(0), FrameSeq(3));
    // What was met last of all stays, and what was met first goes.
    assert_eq!(found(&table, &frame(1, 4, 4), &[7, 1, 2, 3]), [(0, 0, 0)]);
    assert_eq!(found(&table, &frame(1, 6, 5), &[7]), [(0, 0, 0)]);
    assert_eq!(found(&table, &frame(1, 8, 6), &[8]), []);
}

#[test]
fn the_end_waits_for_what_refers_and_for_nothing_else() {
    let table = Duplicates::new(2, 1000);
    found(&table, &frame(0, 0, 1), &[7]);
    table.on_applied(Lane(0), FrameSeq(1));
    found(&table, &frame(0, 0, 2), &[9]);
    assert_eq!(found(&table, &frame(0, 1, 1), &[7]), [(0, 0, 0)]);
    assert!(!is_over(&table));
    assert_eq!(found(&table, &frame(0, 3, 2), &[7]), [], "it has ended");
    table.on_applied(Lane(1), FrameSeq(1));
    assert!(is_over(&table), "frame 2 of lane 0 refers to nothing");
}

#[tokio::test]
async fn who_waits_for_the_end_is_woken() {
    let table = std::sync::Arc::new(Duplicates::new(2, 1000));
    found(&table, &frame(0, 0, 1), &[7]);
    table.on_applied(Lane(0), FrameSeq(1));
    found(&table, &frame(0, 1, 1), &[7]);
    let waiter = table.clone();
    let waits = tokio::spawn(async move { waiter.end().await });
    tokio::task::yield_now().await;
    assert!(!waits.is_finished());
    table.on_applied(Lane(1), FrameSeq(1));
    waits.await.unwrap();
}

#[test]
fn a_table_is_as_large_as_the_guest_up_to_a_bound() {
    let buckets = |blocks| match Duplicates::new(1, blocks).lock().table {
        Table::Unused { buckets } => buckets,
        Table::Open(_) | Table::Ended => 0,
    };
    assert_eq!([0, 9, u64::MAX].map(buckets), [1, 3, MOST_PLACES / WAYS]);
    assert_eq!(size_of::<Place>() * MOST_PLACES, 24 << 20);
}
