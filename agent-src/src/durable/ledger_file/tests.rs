//! The mapped ledger against a plain one, with a process that may die between any two stores.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use proptest::prelude::*;
use vmferry_common::storage::Files;
use vmferry_proto::frame::lane_of;
use vmferry_proto::ledger::{LedgerLog, SentFrame};

use super::writer::LedgerWriter;
use super::*;

type Block = (u16, u32, u32);

const ID: [u8; 16] = [7; 16];

fn regions() -> Vec<RegionSpec> {
    let region = |id: u16, kind, len| RegionSpec {
        id: RegionId(id),
        name: format!("r{id}"),
        kind,
        len: RegionLen(len),
    };
    vec![
        region(0, RegionKind::Memory, (4 << 20) + 4096),
        region(1, RegionKind::Disk, (2 << 20) + 5),
    ]
}

#[derive(Debug, Clone)]
enum Op {
    Dirty {
        region: u16,
        window: u32,
        from: u32,
        len: u32,
    },
    Scan {
        window: u32,
        from: u32,
        len: u32,
    },
    Send {
        region: u16,
        window: u32,
    },
    Settle {
        lane: u8,
        applied: u64,
        flushed: u64,
    },
    Session {
        lanes: u8,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let window = (0u16..2, 0u32..3);
    let blocks = (0u32..512, 1u32..100);
    prop_oneof![
        3 => (window.clone(), blocks.clone()).prop_map(|((region, window), (from, len))| {
            Op::Dirty { region, window, from, len }
        }),
        2 => (0u32..3, blocks).prop_map(|(window, (from, len))| Op::Scan { window, from, len }),
        8 => window.prop_map(|(region, window)| Op::Send { region, window }),
        3 => (0u8..4, 0u64..6, 0u64..6)
            .prop_map(|(lane, applied, flushed)| Op::Settle { lane, applied, flushed }),
        1 => (1u8..4).prop_map(|lanes| Op::Session { lanes }),
    ]
}

#[derive(Debug, Clone, Default)]
struct PlainLane {
    sent: u64,
    applied: u64,
    flushed: u64,
    frames: Vec<(u64, RegionKind, WindowRef, WindowBits)>,
}

#[derive(Debug, Clone, Default)]
struct Plain {
    dirty: BTreeSet<Block>,
    session: u64,
    lanes: Vec<PlainLane>,
}

fn blocks(at: WindowRef, bits: &WindowBits) -> Vec<Block> {
    bits.iter()
        .map(|block| (at.region.0, at.window.0, block))
        .collect()
}

impl Plain {
    fn in_window(&self, at: WindowRef) -> WindowBits {
        let mut bits = WindowBits::EMPTY;
        let found = self.dirty.iter();
        found
            .filter(|block| (block.0, block.1) == (at.region.0, at.window.0))
            .for_each(|block| bits.insert(block.2));
        bits
    }

    /// Blocks that are not safe at the destination.
    fn not_safe(&self) -> BTreeSet<Block> {
        let mut all = self.dirty.clone();
        for lane in &self.lanes {
            for (seq, kind, at, bits) in &lane.frames {
                let (applied, flushed) = (FrameSeq(lane.applied), FrameSeq(lane.flushed));
                if !is_settled(FrameSeq(*seq), *kind, applied, flushed) {
                    all.extend(blocks(*at, bits));
                }
            }
        }
        all
    }
}

/// As a restarted process sees it.
fn not_safe(file: &LedgerFile) -> BTreeSet<Block> {
    file.heal();
    let image = file.image();
    let mut all = BTreeSet::new();
    for (region, set) in (0u16..).map(RegionId).zip(&image.dirty) {
        for (window, bits) in set.iter() {
            all.extend(blocks(WindowRef { region, window }, &bits));
        }
    }
    for frame in image
        .session
        .iter()
        .flat_map(|session| &session.lanes)
        .flat_map(|lane| &lane.frames)
    {
        all.extend(blocks(frame.at, &frame.blocks));
    }
    all
}

fn span(region: u16, window: u32, from: u32, len: u32) -> WindowBits {
    let all = regions()[usize::from(region)]
        .len
        .all_of(WindowIndex(window));
    WindowBits::span(from, from + len).and(&all)
}

fn apply(op: &Op, plain: &mut Plain, file: &LedgerFile, writer: &mut LedgerWriter) {
    match *op {
        Op::Dirty {
            region,
            window,
            from,
            len,
        } => {
            let at = WindowRef {
                region: RegionId(region),
                window: WindowIndex(window),
            };
            let bits = span(region, window, from, len);
            writer.dirty(at, &bits);
            plain.dirty.extend(blocks(at, &bits));
        }
        Op::Scan { window, from, len } => {
            let at = WindowRef {
                region: RegionId(0),
                window: WindowIndex(window),
            };
            let bits = span(0, window, from, len);
            file.before(RegionId(0), window..window + 1);
            file.after(RegionId(0), window..window + 1, &bits.0, &bits.0);
            writer.dirty(at, &bits);
            plain.dirty.extend(blocks(at, &bits));
        }
        Op::Send { region, window } => send(region, window, plain, writer),
        Op::Settle {
            lane,
            applied,
            flushed,
        } => {
            let Some(state) = plain.lanes.get_mut(usize::from(lane)) else {
                return;
            };
            state.applied = (state.applied + applied).min(state.sent);
            state.flushed = (state.flushed + flushed).min(state.applied);
            writer.settled(Lane(lane), FrameSeq(state.applied), FrameSeq(state.flushed));
        }
        Op::Session { lanes } => {
            let left = plain.not_safe();
            for block in &left {
                let mut bits = WindowBits::EMPTY;
                bits.insert(block.2);
                let at = WindowRef {
                    region: RegionId(block.0),
                    window: WindowIndex(block.1),
                };
                writer.dirty(at, &bits);
            }
            plain.dirty = left;
            plain.session += 1;
            plain.lanes = vec![PlainLane::default(); usize::from(lanes)];
            writer.session(SessionNumber(plain.session), lanes);
        }
    }
}

fn send(region: u16, window: u32, plain: &mut Plain, writer: &mut LedgerWriter) {
    let at = WindowRef {
        region: RegionId(region),
        window: WindowIndex(window),
    };
    let bits = plain.in_window(at).lowest(3);
    if bits.is_empty() || plain.lanes.is_empty() {
        return;
    }
    let lane = lane_of(at.window, u8::try_from(plain.lanes.len()).unwrap());
    let kind = regions()[usize::from(region)].kind;
    let state = &mut plain.lanes[usize::from(lane.0)];
    state.sent += 1;
    state.frames.push((state.sent, kind, at, bits));
    writer.sent(&SentFrame {
        lane,
        seq: FrameSeq(state.sent),
        at,
        blocks: bits,
        kind,
    });
    for block in blocks(at, &bits) {
        plain.dirty.remove(&block);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn whenever_the_process_dies_nothing_is_lost(
        ops in prop::collection::vec(op(), 1..80),
        last in 0usize..60,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let file = Arc::new(LedgerFile::create(&Files, &path, ID, &regions()).unwrap());
        let (mut plain, mut writer) = (Plain::default(), file.writer());
        apply(&Op::Session { lanes: 2 }, &mut plain, &file, &mut writer);
        let mut before = plain.not_safe();
        for (number, op) in ops.iter().enumerate() {
            before = plain.not_safe();
            if number + 1 == ops.len() {
                file.words.fuse.store(last, Relaxed);
            }
            apply(op, &mut plain, &file, &mut writer);
        }
        // What the last change adds it may not have come to, and what it takes away it may not have.
        let needed: BTreeSet<Block> = before.intersection(&plain.not_safe()).copied().collect();
        let next = LedgerFile::open(&Files, &path, ID, &regions()).unwrap();
        let found = not_safe(&next);
        let lost: Vec<_> = needed.difference(&found).collect();
        prop_assert!(lost.is_empty(), "{lost:?} are lost");
        // And what is found is a ledger.
        let next = Arc::new(next);
        let restored = vmferry_proto::ledger::Ledger::restore(&regions(), next.image(), Box::new(next.writer()));
        prop_assert!(restored.is_ok(), "{restored:?}");
    }

    /// Without a death, and with a slot for each frame, a later agent finds exactly what there is.
    #[test]
    fn what_is_safe_is_not_called_dirty(ops in prop::collection::vec(op(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ledger");
        let file = Arc::new(LedgerFile::create(&Files, &path, ID, &regions()).unwrap());
        let (mut plain, mut writer) = (Plain::default(), file.writer());
        apply(&Op::Session { lanes: 1 }, &mut plain, &file, &mut writer);
        for op in &ops {
            apply(op, &mut plain, &file, &mut writer);
            for lane in 0u8..4 {
                // Everything at once: no ring is ever full.
                apply(&Op::Settle { lane, applied: 99, flushed: 99 }, &mut plain, &file, &mut writer);
            }
        }
        let next = LedgerFile::open(&Files, &path, ID, &regions()).unwrap();
        prop_assert_eq!(not_safe(&next), plain.not_safe());
    }
}

#[test]
fn another_file_is_known_by_what_it_begins_with() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger");
    let error = |id| {
        LedgerFile::open(&Files, &path, id, &regions())
            .unwrap_err()
            .to_string()
    };
    assert!(error(ID).contains("No such file"));
    drop(LedgerFile::create(&Files, &path, ID, &regions()).unwrap());
    assert!(error([8; 16]).contains("another ledger"));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(error(ID).contains("no ledger of this version"));
    std::fs::write(&path, &bytes[..bytes.len() - 8]).unwrap();
    assert!(error(ID).contains("bytes and not"));
}

#[test]
fn a_scan_that_was_cut_off_is_wholly_dirty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ledger");
    let file = LedgerFile::create(&Files, &path, ID, &regions()).unwrap();
    file.before(RegionId(0), 1..3);
    let next = LedgerFile::open(&Files, &path, ID, &regions()).unwrap();
    next.heal();
    let image = next.image();
    assert_eq!(image.dirty[0].count(), 512 + 1);
    assert!(image.dirty[0].get(WindowIndex(0)).is_empty());
    assert_eq!(next.told(RegionId(0))[8], u64::MAX);
    assert!(image.dirty[1].is_empty());
}
