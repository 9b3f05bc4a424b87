//! The ledger against its rules, and against a per-block oracle.

use super::*;
use crate::geometry::{RegionLen, WINDOW_SIZE};

fn region(id: u16, kind: RegionKind, len: u64) -> RegionSpec {
    RegionSpec {
        id: RegionId(id),
        name: format!("r{id}"),
        kind,
        len: RegionLen(len),
    }
}

fn ready(incarnations: &[u8], resume: Option<ResumePoint>) -> Ready {
    Ready {
        incarnations: incarnations
            .iter()
            .map(|byte| Incarnation::from_bytes([*byte; 16]))
            .collect(),
        resume,
    }
}

fn progress(lane: u8, applied: u64, flushed: u64) -> LaneProgress {
    LaneProgress {
        lane: Lane(lane),
        applied: FrameSeq(applied),
        flushed: FrameSeq(flushed),
    }
}

#[test]
fn the_first_pass_accounts_for_every_block_of_every_region() {
    let lens = [3 * u64::from(WINDOW_SIZE) + 4097, 100];
    let mut ledger = Ledger::new(&[
        region(0, RegionKind::Memory, lens[0]),
        region(1, RegionKind::Disk, lens[1]),
    ]);
    assert!(ledger.next_frame(Lane(0), None).is_none(), "no session yet");
    ledger
        .on_ready(SessionNumber(1), 2, &ready(&[1, 1], None))
        .unwrap();
    let mut seen = [
        RegionBits::empty(RegionLen(lens[0])),
        RegionBits::empty(RegionLen(lens[1])),
    ];
    for lane in [Lane(0), Lane(1)] {
        let mut seq = FrameSeq(0);
        while let Some(job) = ledger.next_frame(lane, None) {
            seq = seq.next();
            assert_eq!((job.lane, job.seq), (lane, seq));
            assert_eq!(lane_of(job.window, 2), lane);
            assert!(job.blocks.count() <= limits::MAX_FRAME_BLOCKS);
            let seen = &mut seen[usize::from(job.region.0)];
            assert!(seen.get(job.window).and(&job.blocks).is_empty(), "twice");
            seen.insert(job.window, &job.blocks);
        }
        assert_eq!(ledger.final_seqs()[usize::from(lane.0)], seq);
    }
    assert!(ledger.is_clean() && !ledger.is_settled());
    assert_eq!(seen.map(|bits| bits.count()), [3 * 512 + 2, 1]);
    assert_eq!(ledger.counters().bytes, lens[0] + lens[1]);
    assert_eq!(ledger.counters().resent_blocks(), 0);
    let last = ledger.final_seqs();
    let all: Vec<_> = (0..2)
        .map(|lane| progress(lane, last[usize::from(lane)].0, 0))
        .collect();
    let acked = ledger.on_progress(&all).unwrap();
    assert_eq!(acked.amount.bytes, lens[0] + lens[1]);
    assert!(ledger.is_settled());
    assert_eq!(ledger.unflushed().amount.bytes, lens[1]);
}
