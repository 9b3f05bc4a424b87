//! What a ledger writes down, kept as plainly as can be, with a fuse: after so many calls the process is dead.

use std::sync::{Arc, Mutex};

use super::*;

/// What survives.
#[derive(Debug)]
struct Paper {
    image: LedgerImage,
    /// Calls that are still heard.
    fuse: usize,
}

/// The pen, and with a clone of it the reader.
#[derive(Debug, Clone)]
pub(super) struct PlainLog(Arc<Mutex<Paper>>);

impl PlainLog {
    pub(super) fn new(regions: &[RegionSpec]) -> Self {
        let empty = || regions.iter().map(|region| RegionBits::empty(region.len));
        Self(Arc::new(Mutex::new(Paper {
            image: LedgerImage {
                dirty: empty().collect(),
                sent: empty().collect(),
                incarnations: None,
                session: None,
            },
            fuse: usize::MAX,
        })))
    }

    /// After `calls` more calls nothing is heard any more.
    pub(super) fn dies_after(&self, calls: usize) {
        self.0.lock().unwrap().fuse = calls;
    }

    pub(super) fn image(&self) -> LedgerImage {
        self.0.lock().unwrap().image.clone()
    }

    fn write(&self, change: impl FnOnce(&mut LedgerImage)) {
        let mut paper = self.0.lock().unwrap();
        if let Some(left) = paper.fuse.checked_sub(1) {
            paper.fuse = left;
            change(&mut paper.image);
        }
    }
}

fn lane(image: &mut LedgerImage, lane: Lane) -> &mut LaneImage {
    &mut image.session.as_mut().unwrap().lanes[usize::from(lane.0)]
}

impl LedgerLog for PlainLog {
    fn dirty(&mut self, at: WindowRef, blocks: &WindowBits) {
        self.write(|image| image.dirty[usize::from(at.region.0)].insert(at.window, blocks));
    }

    fn region_dirty(&mut self, region: RegionId) {
        self.write(|image| image.dirty[usize::from(region.0)].fill());
    }

    fn equal(&mut self, at: WindowRef, blocks: &WindowBits) {
        self.write(|image| {
            let region = usize::from(at.region.0);
            image.dirty[region].remove(at.window, blocks);
            image.sent[region].insert(at.window, blocks);
        });
    }

    fn sent(&mut self, frame: &SentFrame) {
        self.write(|image| {
            let region = usize::from(frame.at.region.0);
            image.dirty[region].remove(frame.at.window, &frame.blocks);
            image.sent[region].insert(frame.at.window, &frame.blocks);
            let lane = lane(image, frame.lane);
            assert_eq!(frame.seq, lane.sent.next(), "a gap");
            lane.sent = frame.seq;
            lane.frames.push(FrameImage {
                seq: frame.seq,
                at: frame.at,
                blocks: frame.blocks,
            });
        });
    }

    fn settled(&mut self, at: Lane, applied: FrameSeq, flushed: FrameSeq) {
        self.write(|image| {
            let lane = lane(image, at);
            assert!(lane.applied <= applied && lane.flushed <= flushed);
            (lane.applied, lane.flushed) = (applied, flushed);
        });
    }

    fn session(&mut self, session: SessionNumber, lanes: u8) {
        let lane = LaneImage {
            sent: FrameSeq(0),
            applied: FrameSeq(0),
            flushed: FrameSeq(0),
            frames: Vec::new(),
        };
        self.write(|image| {
            image.session = Some(SessionImage {
                number: session,
                lanes: vec![lane; usize::from(lanes)],
            });
        });
    }

    fn incarnations(&mut self, all: &[Incarnation]) {
        self.write(|image| image.incarnations = Some(all.to_vec()));
    }
}
