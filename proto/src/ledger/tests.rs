//! The ledger against its rules, and against a per-block oracle.

use super::*;
use crate::geometry::{RegionLen, WINDOW_SIZE};

mod plain_log;

use plain_log::PlainLog;

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

fn one_disk_and_memory() -> Ledger {
    Ledger::new(&[
        region(0, RegionKind::Memory, 3 * 4096),
        region(1, RegionKind::Disk, 3 * 4096),
    ])
}

fn bits(len: u64, blocks: &[u32]) -> RegionBits {
    let mut bits = RegionBits::empty(RegionLen(len));
    for block in blocks {
        bits.insert_bytes(u64::from(*block) * 4096, 1);
    }
    bits
}

fn open(ledger: &mut Ledger, session: u64) -> Resumed {
    ledger
        .on_ready(SessionNumber(session), 1, &ready(&[1, 1], None))
        .unwrap()
}

fn send_all(ledger: &mut Ledger) -> Vec<FrameJob> {
    std::iter::from_fn(|| ledger.next_frame(Lane(0), None)).collect()
}

fn resume_point(session: u64, lanes: Vec<LaneProgress>) -> Option<ResumePoint> {
    Some(ResumePoint {
        session: SessionNumber(session),
        lanes,
    })
}

#[test]
fn kinds_can_be_asked_for_alone() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    let disk = ledger.next_frame(Lane(0), Some(RegionKind::Disk)).unwrap();
    assert_eq!(disk.region, RegionId(1));
    assert!(ledger.next_frame(Lane(0), Some(RegionKind::Disk)).is_none());
    let memory = ledger.next_frame(Lane(0), None).unwrap();
    assert_eq!(memory.region, RegionId(0));
    assert!(ledger.next_frame(Lane(0), None).is_none());
    assert!(ledger.next_frame(Lane(1), None).is_none(), "no such lane");
}

/// What is written while a round runs waits for the next, whether this one had come to it or not.
#[test]
fn held_blocks_count_as_dirty_and_are_taken_when_they_are_released() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    let len = 3 * 4096;
    ledger.hold(RegionId(0), &bits(len, &[1])).unwrap();
    let job = ledger.next_frame(Lane(0), None).unwrap();
    assert_eq!(job.blocks.iter().collect::<Vec<_>>(), [0, 2]);
    ledger.hold(RegionId(0), &bits(len, &[0])).unwrap();
    send_all(&mut ledger);
    assert!(ledger.is_exhausted(None) && !ledger.is_clean());
    assert_eq!(ledger.dirty(None).all.blocks, 2);
    assert_eq!(ledger.release(), 2);
    let job = ledger.next_frame(Lane(0), None).unwrap();
    assert_eq!(job.blocks, WindowBits::first(2));
    assert!(ledger.is_clean());
}

/// The disks' last blocks go before those of memory, so that the exports can be closed.
#[test]
fn one_kind_can_be_exhausted_before_the_other() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    let disk = Some(RegionKind::Disk);
    while let Some(job) = ledger.next_frame(Lane(0), disk) {
        assert!(!ledger.is_exhausted(Some(RegionKind::Memory)));
        assert_eq!(job.region, RegionId(1));
    }
    assert!(ledger.is_exhausted(disk) && !ledger.is_exhausted(None));
    send_all(&mut ledger);
    assert!(ledger.is_exhausted(None));
}

/// What is written again and again comes behind everything else, if it is not written once more before.
#[test]
fn hot_windows_are_late() {
    let len = 3 << 21;
    let disk = region(1, RegionKind::Disk, 4096);
    let mut ledger = Ledger::new(&[region(0, RegionKind::Memory, len), disk]);
    open(&mut ledger, 1);
    send_all(&mut ledger);
    let block = |window: u32| window * 512 + 7;
    ledger.hold(RegionId(0), &bits(len, &[block(1)])).unwrap();
    let all = [block(0), block(1), block(2)];
    ledger.hold(RegionId(0), &bits(len, &all)).unwrap();
    assert_eq!(ledger.release_cold(), 3);
    let sent: BTreeSet<_> = send_all(&mut ledger)
        .iter()
        .map(|job| job.window.0)
        .collect();
    assert_eq!(sent, BTreeSet::from([0, 2]));
    assert!(ledger.is_exhausted(None) && !ledger.is_clean());
    assert_eq!(ledger.late_blocks(), 1);
    ledger.release_late();
    assert_eq!(send_all(&mut ledger)[0].window.0, 1);
    assert!(ledger.is_clean());
}

/// A window that is dirtied all the time does not keep the lane from the others.
#[test]
fn a_hot_window_does_not_starve_the_others() {
    let windows = 5;
    let len = windows * u64::from(WINDOW_SIZE);
    let mut ledger = Ledger::new(&[region(0, RegionKind::Memory, len)]);
    ledger
        .on_ready(SessionNumber(1), 1, &ready(&[1], None))
        .unwrap();
    let hot = WindowRef {
        region: RegionId(0),
        window: WindowIndex(1),
    };
    let mut visited = BTreeSet::new();
    for _ in 0..windows * 4 {
        let job = ledger.next_frame(Lane(0), None).unwrap();
        visited.insert(job.window);
        ledger.mark_dirty_window(hot, &WindowBits::FULL).unwrap();
    }
    assert_eq!(visited.len() as u64, windows);
}

#[test]
fn regions_are_gone_round_at_the_same_pace_and_by_one_lane_after_the_other() {
    let windows = |count: u64| count * u64::from(WINDOW_SIZE);
    let (memory, disk, lanes) = (64, 16, 4u8);
    let mut ledger = Ledger::new(&[
        region(0, RegionKind::Memory, windows(memory)),
        region(1, RegionKind::Disk, windows(disk)),
    ]);
    ledger
        .on_ready(SessionNumber(1), lanes, &ready(&[1, 1], None))
        .unwrap();
    let mut first_of_disk = Vec::new();
    for lane in (0..lanes).map(Lane) {
        let regions: Vec<_> = std::iter::from_fn(|| ledger.next_frame(lane, None))
            .map(|job| job.region.0)
            .collect();
        let whole = [memory, disk].map(|count| count * 4 / u64::from(lanes));
        let (mut taken, window) = ([0, 0], 4);
        for region in &regions {
            taken[usize::from(*region)] += 1;
            let [memory, disk] = [0, 1].map(|at| taken[at] * whole[1 - at]);
            // The longest step is a window of the disk.
            assert!(
                memory.abs_diff(disk) <= 2 * window * whole[0],
                "{regions:?}"
            );
        }
        assert_eq!(taken, whole);
        first_of_disk.push(regions.iter().position(|region| *region == 1).unwrap());
    }
    assert!(
        first_of_disk.is_sorted_by(|one, next| one < next),
        "{first_of_disk:?}"
    );
}

#[test]
fn zero_marks_live_until_the_next_write() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    let len = 3 * 4096;
    ledger.mark_zero(RegionId(0), &bits(len, &[0, 1])).unwrap();
    assert_eq!(ledger.dirty(None).known_zero_blocks, 2);
    ledger.mark_dirty(RegionId(0), &bits(len, &[1])).unwrap();
    assert_eq!(ledger.dirty_in(RegionId(0)).known_zero_blocks, 1);
    let job = ledger.next_frame(Lane(0), None).unwrap();
    assert_eq!(job.known_zero, WindowBits::first(1));
    ledger.mark_zero(RegionId(0), &bits(len, &[2])).unwrap();
    assert_eq!(
        ledger.dirty(None).known_zero_blocks,
        0,
        "a block that is not dirty is not sent, so nothing need be known of it"
    );
}

/// `[WIRE-32]`: memory counts as applied, disks count as flushed.
#[test]
fn a_lost_session_keeps_applied_memory_and_flushed_disk() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    let jobs = send_all(&mut ledger);
    assert_eq!(jobs.len(), 2);
    ledger.on_session_lost();
    assert!(ledger.next_frame(Lane(0), None).is_none());
    assert_eq!(
        ledger.on_progress(&[progress(0, 2, 2)]),
        Err(LedgerError::NoSession)
    );
    let resumed = ledger
        .on_ready(
            SessionNumber(2),
            1,
            &ready(&[1, 1], resume_point(1, vec![progress(0, 2, 1)])),
        )
        .unwrap();
    assert_eq!((resumed.kept.frames, resumed.put_back.frames), (1, 1));
    assert_eq!(ledger.dirty_in(RegionId(0)).all.blocks, 0);
    assert_eq!(ledger.dirty_in(RegionId(1)).all.blocks, 3);
    assert_eq!(
        send_all(&mut ledger)[0].seq,
        FrameSeq(1),
        "numbers begin anew"
    );
    assert_eq!(ledger.counters().resent_blocks(), 3);
}

#[test]
fn a_resume_point_of_another_session_adds_nothing() {
    for session in [2, 9] {
        let mut ledger = one_disk_and_memory();
        open(&mut ledger, 3);
        send_all(&mut ledger);
        ledger.on_progress(&[progress(0, 1, 0)]).unwrap();
        ledger.on_session_lost();
        let point = resume_point(session, vec![progress(0, 900, 900)]);
        ledger
            .on_ready(SessionNumber(10), 1, &ready(&[1, 1], point))
            .unwrap();
        assert_eq!(ledger.dirty_in(RegionId(0)).all.blocks, 0, "known before");
        assert_eq!(ledger.dirty_in(RegionId(1)).all.blocks, 3);
    }
}

#[test]
fn a_changed_incarnation_makes_the_region_wholly_dirty() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    send_all(&mut ledger);
    ledger.on_progress(&[progress(0, 2, 1)]).unwrap();
    ledger.on_session_lost();
    let point = resume_point(1, vec![progress(0, 2, 2)]);
    let resumed = ledger
        .on_ready(SessionNumber(2), 1, &ready(&[2, 1], point))
        .unwrap();
    assert_eq!(resumed.restarted, [RegionId(0)]);
    assert_eq!(ledger.dirty_in(RegionId(0)).all.blocks, 3);
    assert_eq!(ledger.dirty_in(RegionId(1)).all.blocks, 0);
}

/// A destination that had to load into a fresh hypervisor says `Ready` again within the session.
#[test]
fn a_renewed_hypervisor_loses_what_was_not_flushed() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    send_all(&mut ledger);
    ledger.on_progress(&[progress(0, 2, 1)]).unwrap();
    assert!(ledger.is_settled());
    open(&mut ledger, 1);
    assert!(ledger.is_settled(), "nothing was renewed");
    ledger
        .on_ready(SessionNumber(1), 1, &ready(&[2, 1], None))
        .unwrap();
    assert_eq!(ledger.dirty(None).all.blocks, 6);
    assert_eq!(send_all(&mut ledger)[0].seq, FrameSeq(3), "numbers go on");
    ledger.on_progress(&[progress(0, 4, 4)]).unwrap();
    assert!(ledger.is_settled());
}

#[test]
fn a_block_written_again_in_flight_stays_dirty_when_the_frame_is_applied() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    send_all(&mut ledger);
    ledger
        .mark_dirty(RegionId(0), &bits(3 * 4096, &[1]))
        .unwrap();
    ledger.on_progress(&[progress(0, 2, 2)]).unwrap();
    assert_eq!(ledger.dirty(None).all.blocks, 1);
    assert_eq!(ledger.in_flight(), Frames::default());
}

#[test]
fn progress_that_cannot_be_is_refused_and_changes_nothing() {
    let mut ledger = one_disk_and_memory();
    open(&mut ledger, 1);
    send_all(&mut ledger);
    ledger.on_progress(&[progress(0, 1, 1)]).unwrap();
    let before = format!("{ledger:?}");
    let refused = [
        vec![progress(0, 3, 1)],
        vec![progress(0, u64::MAX, 1)],
        vec![progress(0, 0, 0)],
        vec![progress(0, 2, 0)],
        vec![progress(0, 1, 2)],
        vec![progress(1, 0, 0)],
        vec![progress(0, 2, 2), progress(0, 2, 2)],
        vec![progress(0, 2, 2), progress(1, 2, 2)],
    ];
    for claim in refused {
        assert!(ledger.on_progress(&claim).is_err(), "{claim:?}");
        assert_eq!(format!("{ledger:?}"), before, "{claim:?}");
    }
    ledger.on_session_lost();
    let before = format!("{ledger:?}");
    let refused = [
        (
            2,
            1,
            ready(&[1, 1], resume_point(1, vec![progress(0, 3, 0)])),
        ),
        (
            2,
            1,
            ready(&[1, 1], resume_point(1, vec![progress(5, 0, 0)])),
        ),
        (2, 1, ready(&[1], None)),
        (1, 1, ready(&[1, 1], None)),
        (2, 0, ready(&[1, 1], None)),
        (2, 65, ready(&[1, 1], None)),
    ];
    for (session, lanes, claim) in refused {
        let result = ledger.on_ready(SessionNumber(session), lanes, &claim);
        assert!(result.is_err(), "{claim:?}");
        assert_eq!(format!("{ledger:?}"), before, "{claim:?}");
    }
}

#[test]
fn marks_for_what_is_not_there_are_refused() {
    let mut ledger = one_disk_and_memory();
    let marks = RegionBits::full(RegionLen(3 * 4096));
    assert_eq!(
        ledger.mark_dirty(RegionId(2), &marks),
        Err(LedgerError::UnknownRegion(RegionId(2)))
    );
    let grown = RegionBits::full(RegionLen(4 * 4096));
    assert!(matches!(
        ledger.mark_dirty(RegionId(1), &grown),
        Err(LedgerError::RegionLength { .. })
    ));
    assert!(ledger.mark_zero(RegionId(1), &grown).is_err());
    assert!(ledger.region_restarted(RegionId(2)).is_err());
}

#[test]
fn what_was_left_must_fit_the_guest() {
    let specs = [region(0, RegionKind::Memory, 3 * 4096)];
    let image = |frame: Option<FrameImage>| LedgerImage {
        dirty: vec![RegionBits::empty(RegionLen(3 * 4096))],
        sent: vec![RegionBits::empty(RegionLen(3 * 4096))],
        incarnations: None,
        session: Some(SessionImage {
            number: SessionNumber(1),
            lanes: vec![LaneImage {
                sent: FrameSeq(1),
                applied: FrameSeq(0),
                flushed: FrameSeq(0),
                frames: frame.into_iter().collect(),
            }],
        }),
    };
    let frame = |region, block, seq| FrameImage {
        seq: FrameSeq(seq),
        at: WindowRef {
            region: RegionId(region),
            window: WindowIndex(0),
        },
        blocks: WindowBits::span(block, block + 1),
    };
    let log = || Box::new(PlainLog::new(&specs));
    let left = |frame| Ledger::restore(&specs, image(Some(frame)), log());
    assert_eq!(left(frame(0, 2, 1)).unwrap().in_flight().amount.blocks, 1);
    for wrong in [frame(1, 0, 1), frame(0, 3, 1), frame(0, 0, 2)] {
        assert!(matches!(left(wrong), Err(LedgerError::Image(_))));
    }
    let grown = [region(0, RegionKind::Memory, 4 * 4096)];
    assert!(Ledger::restore(&grown, image(None), log()).is_err());
}

mod against_an_oracle {
    //! The ledger beside a destination that really stores blocks: per block a version number. Whatever is lost, put
    //! back or renewed, once the ledger is settled the destination's blocks are those of the source.

    use std::collections::{BTreeMap, HashMap};

    use proptest::prelude::*;

    use super::*;
    use crate::geometry::BLOCK_SIZE;

    type Block = (u16, u64);

    /// Three regions around the edges: several windows and a short last block, one block, one window and a bit.
    const LENS: [(RegionKind, u64); 3] = [
        (RegionKind::Memory, 5 * (2 << 20) + 4096 + 5),
        (RegionKind::Disk, 17),
        (RegionKind::Disk, (2 << 20) + 4096),
    ];

    #[derive(Debug, Clone)]
    enum Step {
        Write {
            region: u16,
            at: u64,
            len: u64,
            zero: bool,
            hold: bool,
        },
        /// A write that is marked in the kernel and waits for the next scan.
        WriteUnseen {
            region: u16,
            at: u64,
            len: u64,
            zero: bool,
        },
        Scan,
        /// A window's content is read here, to be compared.
        BeginCompare {
            region: u16,
            window: u32,
        },
        /// The destination's digests are there.
        Compare,
        Release,
        ReleaseCold,
        ReleaseLate,
        Send {
            lane: u8,
            kind: u8,
            frames: u8,
        },
        Apply {
            lane: u8,
            frames: u8,
        },
        Flush,
        Report,
        Lose {
            lanes: u8,
            flush_first: bool,
            forget: bool,
        },
        HypervisorDies {
            lanes: u8,
        },
        Renew,
        DiskReplaced {
            lanes: u8,
        },
        /// The source's process dies, and another one goes on from what it wrote down.
        Die {
            lanes: u8,
            forget: bool,
            during: During,
        },
    }

    /// What a dying process was about: so many of its words were still written down.
    #[derive(Debug, Clone, Copy)]
    enum During {
        Nothing,
        Progress(usize),
        Ready(usize),
        Frame,
    }

    fn step() -> impl Strategy<Value = Step> {
        let lanes = 1u8..5;
        prop_oneof![
            4 => (0u16..3, 0u64..11 << 20, 1u64..1 << 20, any::<bool>(), any::<bool>())
                .prop_map(|(region, at, len, zero, hold)| Step::Write { region, at, len, zero, hold }),
            1 => Just(Step::Release),
            2 => Just(Step::ReleaseCold),
            1 => Just(Step::ReleaseLate),
            4 => (0u16..3, 0u64..11 << 20, 1u64..1 << 20, any::<bool>())
                .prop_map(|(region, at, len, zero)| Step::WriteUnseen { region, at, len, zero }),
            2 => Just(Step::Scan),
            6 => (0u16..3, 0u32..6)
                .prop_map(|(region, window)| Step::BeginCompare { region, window }),
            3 => Just(Step::Compare),
            8 => (0u8..5, 0u8..3, 1u8..9).prop_map(|(lane, kind, frames)| Step::Send { lane, kind, frames }),
            6 => (0u8..5, 1u8..9).prop_map(|(lane, frames)| Step::Apply { lane, frames }),
            2 => Just(Step::Flush),
            3 => Just(Step::Report),
            2 => (lanes.clone(), any::<bool>(), any::<bool>())
                .prop_map(|(lanes, flush_first, forget)| Step::Lose { lanes, flush_first, forget }),
            1 => lanes.clone().prop_map(|lanes| Step::HypervisorDies { lanes }),
            1 => Just(Step::Renew),
            1 => lanes.clone().prop_map(|lanes| Step::DiskReplaced { lanes }),
            3 => (lanes, any::<bool>(), during())
                .prop_map(|(lanes, forget, during)| Step::Die { lanes, forget, during }),
        ]
    }

    fn during() -> impl Strategy<Value = During> {
        prop_oneof![
            Just(During::Nothing),
            (0usize..5).prop_map(During::Progress),
            (0usize..40).prop_map(During::Ready),
            Just(During::Frame),
        ]
    }

    #[derive(Debug, Default, Clone, Copy)]
    struct LaneCount {
        applied: u64,
        flushed: u64,
    }

    #[derive(Debug)]
    struct World {
        ledger: Ledger,
        log: PlainLog,
        specs: Vec<RegionSpec>,
        session: u64,
        incarnations: [u8; 3],
        clock: u64,
        /// What the source's guest has in each block.
        source: HashMap<Block, u64>,
        zero_known: BTreeSet<Block>,
        /// Written, and marked in the kernel alone.
        unseen: BTreeSet<Block>,
        /// Windows that are compared, with what the source had in them.
        compared: Vec<(WindowRef, Vec<(Block, u64)>)>,
        /// Held back; all of them are dirty.
        held: BTreeSet<Block>,
        /// Dirty as well, to be taken behind the others.
        late: BTreeSet<Block>,
        /// Windows that each look at a region found written, newest first.
        looks: HashMap<u16, Vec<BTreeSet<u64>>>,
        /// Dirty, as plainly as can be.
        dirty: BTreeSet<Block>,
        ever_sent: BTreeSet<Block>,
        /// How many of them the process before this one had sent.
        sent_before: u64,
        sent_blocks: u64,
        /// On the lanes: what each block had when it was read.
        wire: Vec<Vec<Vec<(Block, u64)>>>,
        /// The destination: content in its hypervisor, and of disks what would survive it.
        target: HashMap<Block, u64>,
        stable: HashMap<Block, u64>,
        lanes: Vec<LaneCount>,
    }

    fn is_disk(block: Block) -> bool {
        LENS[usize::from(block.0)].0 == RegionKind::Disk
    }

    fn all_blocks(region: u16) -> impl Iterator<Item = Block> {
        let blocks = RegionLen(LENS[usize::from(region)].1).blocks();
        (0..blocks).map(move |block| (region, block))
    }

    fn marks(region: u16, at: u64, len: u64) -> RegionBits {
        let mut marks = RegionBits::empty(RegionLen(LENS[usize::from(region)].1));
        marks.insert_bytes(at, len);
        marks
    }

    fn blocks_of(region: u16, set: &RegionBits) -> impl Iterator<Item = Block> {
        set.iter().flat_map(move |(window, bits)| {
            let base = u64::from(window.0) * 512;
            let block = move |block| (region, base + u64::from(block));
            bits.iter().map(block).collect::<Vec<_>>()
        })
    }

    fn blocks_in(at: WindowRef) -> Vec<Block> {
        let all = all_blocks(at.region.0);
        all.filter(|block| block.1 / 512 == u64::from(at.window.0))
            .collect()
    }

    fn in_job(job: &FrameJob, set: &WindowBits) -> Vec<Block> {
        let base = u64::from(job.window.0) * 512;
        set.iter()
            .map(|block| (job.region.0, base + u64::from(block)))
            .collect()
    }

    impl World {
        fn new() -> Self {
            let specs: Vec<_> = (0u16..)
                .zip(LENS)
                .map(|(id, (kind, len))| region(id, kind, len))
                .collect();
            let all: BTreeSet<Block> = (0..3).flat_map(all_blocks).collect();
            let log = PlainLog::new(&specs);
            let mut ledger = Ledger::new(&specs);
            ledger.write_down(Box::new(log.clone())).unwrap();
            let mut world = Self {
                ledger,
                log,
                specs,
                session: 0,
                incarnations: [1; 3],
                clock: 1,
                source: all.iter().map(|block| (*block, 1)).collect(),
                zero_known: BTreeSet::new(),
                unseen: BTreeSet::new(),
                compared: Vec::new(),
                held: BTreeSet::new(),
                late: BTreeSet::new(),
                looks: HashMap::new(),
                dirty: all,
                ever_sent: BTreeSet::new(),
                sent_before: 0,
                sent_blocks: 0,
                wire: Vec::new(),
                target: HashMap::new(),
                stable: HashMap::new(),
                lanes: Vec::new(),
            };
            world.connect(2, None);
            world
        }

        fn connect(&mut self, lanes: u8, resume: Option<ResumePoint>) {
            self.session += 1;
            self.ledger
                .on_ready(
                    SessionNumber(self.session),
                    lanes,
                    &ready(&self.incarnations, resume),
                )
                .unwrap();
            self.lanes = vec![LaneCount::default(); usize::from(lanes)];
            self.wire = vec![Vec::new(); usize::from(lanes)];
        }

        fn resume(&self, forget: bool) -> Option<ResumePoint> {
            let point = ResumePoint {
                session: SessionNumber(self.session),
                lanes: self.claim(),
            };
            (!forget).then_some(point)
        }

        fn claim(&self) -> Vec<LaneProgress> {
            (0u8..)
                .zip(&self.lanes)
                .map(|(lane, count)| progress(lane, count.applied, count.flushed))
                .collect()
        }

        fn apply(&mut self, step: &Step) {
            match *step {
                Step::Write {
                    region,
                    at,
                    len,
                    zero,
                    hold,
                } => self.write(region, at, len, zero, hold),
                Step::Release => {
                    assert_eq!(self.ledger.release(), self.held.len() as u64);
                    self.held.clear();
                    self.late.clear();
                }
                Step::ReleaseCold => self.release_cold(),
                Step::ReleaseLate => {
                    self.ledger.release_late();
                    self.late.clear();
                }
                Step::WriteUnseen {
                    region,
                    at,
                    len,
                    zero,
                } => {
                    let written = self.change(region, &marks(region, at, len), zero);
                    self.unseen.extend(written);
                }
                Step::Scan => self.scan(),
                Step::BeginCompare { region, window } => self.begin_compare(WindowRef {
                    region: RegionId(region),
                    window: WindowIndex(window),
                }),
                Step::Compare => self.compare(),
                Step::Send { lane, kind, frames } => {
                    for _ in 0..frames {
                        self.send(lane, kind);
                    }
                }
                Step::Apply { lane, frames } => {
                    for _ in 0..frames {
                        self.apply_one(lane);
                    }
                }
                Step::Flush => self.flush(),
                Step::Report => {
                    self.ledger.on_progress(&self.claim()).unwrap();
                }
                Step::Lose {
                    lanes,
                    flush_first,
                    forget,
                } => {
                    self.ledger.on_session_lost();
                    if flush_first {
                        self.flush();
                    }
                    self.connect(lanes, self.resume(forget));
                    self.learn_dirty();
                }
                Step::HypervisorDies { lanes } => {
                    self.ledger.on_session_lost();
                    self.hypervisor_dies();
                    self.connect(lanes, self.resume(false));
                    self.learn_dirty();
                }
                Step::Renew => {
                    while (0..5).any(|lane| self.apply_one(lane)) {}
                    self.hypervisor_dies();
                    let ready = ready(&self.incarnations, None);
                    self.ledger
                        .on_ready(SessionNumber(self.session), 1, &ready)
                        .unwrap();
                    self.learn_dirty();
                }
                Step::DiskReplaced { lanes } => {
                    self.ledger.on_session_lost();
                    self.incarnations[2] += 1;
                    self.target.retain(|block, _| block.0 != 2);
                    self.stable.retain(|block, _| block.0 != 2);
                    self.connect(lanes, self.resume(false));
                    self.learn_dirty();
                    assert!(all_blocks(2).all(|block| self.dirty.contains(&block)));
                }
                Step::Die {
                    lanes,
                    forget,
                    during,
                } => self.die(lanes, forget, during),
            }
        }

        fn die(&mut self, lanes: u8, forget: bool, during: During) {
            match during {
                During::Nothing => {}
                During::Progress(words) => {
                    self.log.dies_after(words);
                    self.ledger.on_progress(&self.claim()).unwrap();
                }
                During::Ready(words) => {
                    self.log.dies_after(words);
                    self.ledger.on_session_lost();
                    self.connect(lanes, self.resume(forget));
                }
                // Written down as sent, and never sent.
                During::Frame => drop(self.ledger.next_frame(Lane(0), None)),
            }
            let left = self.log.image();
            self.log.dies_after(usize::MAX);
            self.ledger = Ledger::restore(&self.specs, left, Box::new(self.log.clone())).unwrap();
            self.sent_before = self.ever_sent.len() as u64;
            self.sent_blocks = 0;
            self.zero_known.clear();
            self.held.clear();
            self.late.clear();
            self.looks.clear();
            self.connect(lanes, self.resume(forget));
            self.learn_dirty();
            if let During::Frame = during {
                // It counts as sent, which nobody saw.
                self.ever_sent = self.ever_sent_by_ledger();
                self.sent_before = self.ever_sent.len() as u64;
            }
        }

        fn ever_sent_by_ledger(&self) -> BTreeSet<Block> {
            (0..3u16)
                .flat_map(all_blocks)
                .filter(|block| {
                    let window = WindowIndex(u32::try_from(block.1 / 512).unwrap());
                    let bit = u32::try_from(block.1 % 512).unwrap();
                    self.ledger.regions[usize::from(block.0)]
                        .sent_in(window)
                        .contains(bit)
                })
                .collect()
        }

        fn release_cold(&mut self) {
            assert_eq!(self.ledger.release_cold(), self.held.len() as u64);
            let released = std::mem::take(&mut self.held).into_iter();
            let released: BTreeSet<_> = released.chain(std::mem::take(&mut self.late)).collect();
            let windows: BTreeSet<_> = released.iter().map(|at| (at.0, at.1 / 512)).collect();
            let hot = |(region, window): &(u16, u64)| {
                let looks = self.looks.get(region).into_iter().flatten().take(4);
                looks.filter(|found| found.contains(window)).count() >= 2
            };
            let hot: BTreeSet<_> = windows.into_iter().filter(hot).collect();
            let late = |at: &&Block| hot.contains(&(at.0, at.1 / 512));
            self.late = self.dirty.iter().filter(late).copied().collect();
        }

        fn write(&mut self, region: u16, at: u64, len: u64, zero: bool, hold: bool) {
            let marks = marks(region, at, len);
            if hold {
                let found = marks.iter().map(|(window, _)| u64::from(window.0));
                let looks = self.looks.entry(region).or_default();
                looks.insert(0, found.collect());
            }
            for block in self.change(region, &marks, zero) {
                self.dirty.insert(block);
                if hold {
                    self.late.remove(&block);
                    self.held.insert(block);
                }
                self.zero_known.remove(&block);
                if zero {
                    self.zero_known.insert(block);
                }
            }
            let region_id = RegionId(region);
            if hold {
                self.ledger.hold(region_id, &marks).unwrap();
            } else {
                self.ledger.mark_dirty(region_id, &marks).unwrap();
            }
            if zero {
                self.ledger.mark_zero(RegionId(region), &marks).unwrap();
            }
        }

        /// Zeroes come again and again, so that a block may have what it had before.
        fn change(&mut self, region: u16, marks: &RegionBits, zero: bool) -> Vec<Block> {
            self.clock += 1;
            let content = if zero { 0 } else { self.clock };
            let written: Vec<Block> = blocks_of(region, marks).collect();
            let change = written.iter().map(|block| (*block, content));
            self.source.extend(change);
            written
        }

        fn scan(&mut self) {
            for (region, (_, len)) in (0u16..).zip(LENS) {
                let mut marks = RegionBits::empty(RegionLen(len));
                for (_, block) in self.unseen.iter().filter(|block| block.0 == region) {
                    marks.insert_bytes(block * u64::from(BLOCK_SIZE), 1);
                }
                self.ledger.mark_dirty(RegionId(region), &marks).unwrap();
            }
            for block in std::mem::take(&mut self.unseen) {
                self.dirty.insert(block);
                self.zero_known.remove(&block);
            }
        }

        fn begin_compare(&mut self, at: WindowRef) {
            if self.ledger.begin_compare(at) {
                let here = blocks_in(at).into_iter();
                let content = here.map(|block| (block, self.source[&block])).collect();
                self.compared.push((at, content));
            }
        }

        fn compare(&mut self) {
            // `[WIRE-50]`: what the destination says to have is flushed.
            self.flush();
            for (at, content) in std::mem::take(&mut self.compared) {
                let equal =
                    |(block, content): &(Block, u64)| self.target.get(block) == Some(content);
                if !content.iter().all(equal) {
                    continue;
                }
                let became_clean = self.ledger.found_equal(at);
                if became_clean > 0 {
                    let dirty = |block: &Block| self.dirty.contains(block);
                    let clean: Vec<Block> = blocks_in(at).into_iter().filter(dirty).collect();
                    assert_eq!(clean.len(), became_clean as usize);
                    for block in clean {
                        self.dirty.remove(&block);
                        self.zero_known.remove(&block);
                        self.sent_before += u64::from(self.ever_sent.insert(block));
                    }
                }
            }
            self.ledger.end_compare();
        }

        fn send(&mut self, lane: u8, kind: u8) {
            let kind = [None, Some(RegionKind::Memory), Some(RegionKind::Disk)][usize::from(kind)];
            let lanes = u64::try_from(self.lanes.len()).unwrap();
            let Some(job) = self.ledger.next_frame(Lane(lane), kind) else {
                let waits = |block: &&Block| self.held.contains(block) || self.late.contains(block);
                let left = self
                    .dirty
                    .iter()
                    .filter(|block| !waits(block))
                    .any(|block| {
                        block.1 / 512 % lanes == u64::from(lane)
                            && kind.is_none_or(|kind| kind == LENS[usize::from(block.0)].0)
                    });
                assert!(!left, "lane {lane} has work but got no frame");
                return;
            };
            let blocks = in_job(&job, &job.blocks);
            let zero: BTreeSet<_> = in_job(&job, &job.known_zero).into_iter().collect();
            let queue = &mut self.wire[usize::from(lane)];
            let count = self.lanes[usize::from(lane)];
            assert_eq!(job.seq.0, count.applied + queue.len() as u64 + 1);
            for block in &blocks {
                assert!(self.dirty.remove(block), "{block:?} was not dirty");
                assert!(!self.held.contains(block), "{block:?} was held");
                assert!(!self.late.contains(block), "{block:?} was late");
                assert_eq!(zero.contains(block), self.zero_known.remove(block));
                self.ever_sent.insert(*block);
                self.sent_blocks += 1;
            }
            queue.push(blocks.into_iter().map(|b| (b, self.source[&b])).collect());
        }

        fn apply_one(&mut self, lane: u8) -> bool {
            let Some(queue) = self.wire.get_mut(usize::from(lane)) else {
                return false;
            };
            if queue.is_empty() {
                return false;
            }
            self.target.extend(queue.remove(0));
            self.lanes[usize::from(lane)].applied += 1;
            true
        }

        fn flush(&mut self) {
            let disk = self.target.iter().filter(|(block, _)| is_disk(**block));
            self.stable = disk.map(|(block, version)| (*block, *version)).collect();
            for lane in &mut self.lanes {
                lane.flushed = lane.applied;
            }
        }

        fn hypervisor_dies(&mut self) {
            self.incarnations[0] += 1;
            self.target = self.stable.clone();
        }

        /// After a loss the ledger says what is dirty: it may be more than needed, and must not be less.
        fn learn_dirty(&mut self) {
            let before = std::mem::take(&mut self.dirty);
            for region in 0..3u16 {
                let marks = &self.ledger.regions[usize::from(region)];
                for block in all_blocks(region) {
                    let window = WindowIndex(u32::try_from(block.1 / 512).unwrap());
                    let bit = u32::try_from(block.1 % 512).unwrap();
                    if marks.dirty_in(window).contains(bit) {
                        self.dirty.insert(block);
                    }
                }
            }
            assert!(self.dirty.is_superset(&before), "a mark was lost");
            // What was put back may have lost its zero mark; what was known before and kept is as it was.
            let kept = self.ledger.dirty(None).known_zero_blocks;
            let marks = &self.ledger.regions;
            self.zero_known.retain(|block| {
                let window = WindowIndex(u32::try_from(block.1 / 512).unwrap());
                let bit = u32::try_from(block.1 % 512).unwrap();
                marks[usize::from(block.0)].zero_in(window).contains(bit)
            });
            assert_eq!(self.zero_known.len() as u64, kept);
        }

        fn check(&self) {
            let mut blocks = BTreeMap::<u16, u64>::new();
            self.dirty
                .iter()
                .for_each(|block| *blocks.entry(block.0).or_default() += 1);
            for (id, (_, len)) in (0u16..).zip(LENS) {
                let count = blocks.get(&id).copied().unwrap_or_default();
                let last = RegionLen(len).blocks() - 1;
                let short = u64::from(BLOCK_SIZE) - (len - last * u64::from(BLOCK_SIZE));
                let missing = if self.dirty.contains(&(id, last)) {
                    short
                } else {
                    0
                };
                let dirty = self.ledger.dirty_in(RegionId(id));
                assert_eq!(dirty.all.blocks, count);
                assert_eq!(dirty.all.bytes, count * u64::from(BLOCK_SIZE) - missing);
            }
            let counters = self.ledger.counters();
            assert_eq!(counters.blocks, self.sent_blocks);
            let new = self.ever_sent.len() as u64 - self.sent_before;
            assert_eq!(counters.distinct_blocks, new);
            assert_eq!(self.ledger.is_clean(), self.dirty.is_empty());
            let waiting = self.held.union(&self.late).copied().collect();
            assert_eq!(self.ledger.is_exhausted(None), self.dirty == waiting);
            assert_eq!(self.ledger.late_blocks(), self.late.len() as u64);
            assert_eq!(
                self.ledger.dirty(None).known_zero_blocks,
                self.zero_known.len() as u64
            );
            // The invariant: what is neither dirty nor on the way is at the destination.
            let on_the_way: BTreeSet<Block> = self
                .wire
                .iter()
                .flatten()
                .flatten()
                .map(|(block, _)| *block)
                .collect();
            for (block, version) in &self.source {
                let waits = self.dirty.contains(block) || self.unseen.contains(block);
                if !waits && !on_the_way.contains(block) {
                    assert_eq!(self.target.get(block), Some(version), "{block:?} is lost");
                }
            }
        }

        fn finish(mut self) {
            self.scan();
            self.apply(&Step::Release);
            for lane in 0..u8::try_from(self.lanes.len()).unwrap() {
                while self.ledger.next_frame_exists(lane) {
                    self.send(lane, 0);
                }
                while self.apply_one(lane) {}
            }
            self.flush();
            let finals: Vec<_> = self
                .lanes
                .iter()
                .map(|lane| FrameSeq(lane.applied))
                .collect();
            assert_eq!(self.ledger.final_seqs(), finals);
            self.ledger.on_progress(&self.claim()).unwrap();
            assert!(self.ledger.is_settled());
            assert_eq!(self.ledger.unflushed(), Frames::default());
            assert_eq!(self.target, self.source);
        }
    }

    impl Ledger {
        fn next_frame_exists(&self, lane: u8) -> bool {
            let lanes = self.lane_count();
            self.regions.iter().any(|marks| {
                marks
                    .ready_windows()
                    .any(|window| lane_of(window, lanes) == Lane(lane))
            })
        }
    }

    /// Region 2 stands in its middle, behind what is dirty again, when its turn comes.
    #[test]
    fn a_region_that_was_left_in_its_middle_gets_its_turn() {
        let mut world = World::new();
        for step in [
            Step::Lose {
                lanes: 1,
                flush_first: false,
                forget: false,
            },
            Step::Send {
                lane: 0,
                kind: 2,
                frames: 6,
            },
            Step::Renew,
            Step::Send {
                lane: 0,
                kind: 1,
                frames: 1,
            },
        ] {
            world.apply(&step);
            world.check();
        }
        world.finish();
    }

    fn at(region: u16, window: u32) -> WindowRef {
        WindowRef {
            region: RegionId(region),
            window: WindowIndex(window),
        }
    }

    /// A source that lost its ledger: a new one, all dirty, beside a destination that has what was sent before.
    fn without_its_ledger() -> World {
        let mut world = World::new();
        for lane in 0..2 {
            while world.ledger.next_frame_exists(lane) {
                world.send(lane, 0);
            }
            while world.apply_one(lane) {}
        }
        world.ledger = Ledger::new(&world.specs);
        world.session += 1;
        world.dirty = (0..3).flat_map(all_blocks).collect();
        (world.ever_sent, world.sent_blocks) = (BTreeSet::new(), 0);
        world.connect(2, None);
        world
    }

    #[test]
    fn a_window_that_both_sides_have_is_clean_and_not_sent() {
        let mut world = without_its_ledger();
        world.write(0, 3 << 20, 4096, false, false);
        for window in 0..6 {
            assert!(world.ledger.begin_compare(at(0, window)));
            world.begin_compare(at(0, window));
        }
        assert!(!world.ledger.begin_compare(at(0, 6)), "no such window");
        world.compare();
        world.check();
        assert_eq!(world.ledger.dirty_in(RegionId(0)).all.blocks, 512);
        assert_eq!(world.ledger.counters(), Counters::default());
        assert!(!world.ledger.begin_compare(at(0, 0)), "nothing to find out");
        world.finish();
    }

    #[test]
    fn a_window_that_is_touched_while_it_is_compared_stays_dirty() {
        let touches: [fn(&mut World); 5] = [
            |world| world.write(0, 0, 1, false, false),
            |world| world.send(0, 1),
            |world| {
                world.ledger.on_session_lost();
                world.connect(2, None);
            },
            |world| {
                world.incarnations[0] += 1;
                world.target.retain(|block, _| block.0 != 0);
                world.ledger.on_session_lost();
                world.connect(2, None);
            },
            |world| world.ledger.end_compare(),
        ];
        for touch in touches {
            let mut world = without_its_ledger();
            assert!(world.ledger.begin_compare(at(0, 0)));
            touch(&mut world);
            let before = world.ledger.dirty(None);
            assert_eq!(world.ledger.found_equal(at(0, 0)), 0);
            assert_eq!(world.ledger.dirty(None), before);
            world.finish();
        }
        let mut world = without_its_ledger();
        world.send(0, 1);
        assert!(
            !world.ledger.begin_compare(at(0, 0)),
            "a frame of it is on its way"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nothing_is_ever_lost(steps in prop::collection::vec(step(), 1..60)) {
            let mut world = World::new();
            for step in &steps {
                world.apply(step);
                world.check();
            }
            world.finish();
        }
    }
}
