//! A ledger made from what an earlier process wrote down.
//!
//! Owns the shape of what was left and its check: nothing of it is believed that could not have been written. What was in
//! flight then waits, as after a lost session, for the next `Ready` to say what became of it.

use std::collections::BTreeSet;

use crate::frame::lane_of;
use crate::geometry::{RegionBits, WindowBits, WindowRef};
use crate::ids::{FrameSeq, Incarnation, Lane, SessionNumber};
use crate::limits;
use crate::spec::{RegionKind, RegionSpec};

use super::lanes::{Flight, LaneState, Work};
use super::marks::RegionMarks;
use super::{Counters, Ledger, LedgerError, LedgerLog, Session};

/// What an earlier process left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerImage {
    /// Dirty blocks, by region.
    pub dirty: Vec<RegionBits>,
    /// Blocks that were ever sent, by region: for the count of those sent again.
    pub sent: Vec<RegionBits>,
    /// Incarnations in the last `Ready`.
    pub incarnations: Option<Vec<Incarnation>>,
    /// The last session in which frames may have been sent.
    pub session: Option<SessionImage>,
}

/// A session that ended with its process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionImage {
    /// Its number.
    pub number: SessionNumber,
    /// Its lanes.
    pub lanes: Vec<LaneImage>,
}

/// A lane of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneImage {
    /// Last number that was taken.
    pub sent: FrameSeq,
    /// Last one that is applied.
    pub applied: FrameSeq,
    /// Last one that is flushed.
    pub flushed: FrameSeq,
    /// Frames that are not settled, ascending. Settled ones do no harm.
    pub frames: Vec<FrameImage>,
}

/// A frame that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameImage {
    /// Its number.
    pub seq: FrameSeq,
    /// Its window.
    pub at: WindowRef,
    /// Its blocks.
    pub blocks: WindowBits,
}

impl Ledger {
    /// Goes on from what an earlier process left of a ledger of `regions` in `log`, which is told every change from here on.
    ///
    /// # Errors
    /// [`LedgerError::Image`]: it is not one of a ledger of these regions.
    pub fn restore(
        regions: &[RegionSpec],
        image: LedgerImage,
        log: Box<dyn LedgerLog>,
    ) -> Result<Self, LedgerError> {
        check_regions(regions, &image)?;
        let marks = image.dirty.into_iter().zip(image.sent);
        let marks: Vec<RegionMarks> = regions
            .iter()
            .zip(marks)
            .map(|(region, (dirty, sent))| RegionMarks::left(region.kind, dirty, sent))
            .collect();
        let (session, lanes) = match image.session {
            None => (Session::None, Vec::new()),
            Some(session) => (Session::Lost(session.number), lanes(&marks, &session)?),
        };
        Ok(Self {
            regions: marks,
            lanes,
            session,
            incarnations: image.incarnations,
            counters: Counters::default(),
            comparing: BTreeSet::new(),
            log: Some(log),
        })
    }
}

fn check_regions(regions: &[RegionSpec], image: &LedgerImage) -> Result<(), LedgerError> {
    let fits = |sets: &[RegionBits]| {
        sets.len() == regions.len()
            && sets
                .iter()
                .zip(regions)
                .all(|(set, region)| set.region_len() == region.len)
    };
    let incarnations = image.incarnations.as_ref();
    if !fits(&image.dirty) || !fits(&image.sent) {
        return Err(LedgerError::Image("its regions are others"));
    }
    if incarnations.is_some_and(|all| all.len() != regions.len()) {
        return Err(LedgerError::Image("its incarnations are of other regions"));
    }
    Ok(())
}

fn lanes(marks: &[RegionMarks], session: &SessionImage) -> Result<Vec<LaneState>, LedgerError> {
    let count = u8::try_from(session.lanes.len()).unwrap_or(u8::MAX);
    if count == 0 || count > limits::MAX_LANES {
        return Err(LedgerError::Image("its number of lanes cannot be"));
    }
    (0u8..)
        .map(Lane)
        .zip(&session.lanes)
        .map(|(lane, image)| lane_left(marks, (lane, count), image))
        .collect()
}

fn lane_left(
    marks: &[RegionMarks],
    (lane, count): (Lane, u8),
    image: &LaneImage,
) -> Result<LaneState, LedgerError> {
    if image.applied > image.sent || image.flushed > image.applied {
        return Err(LedgerError::Image("a lane's numbers cannot be"));
    }
    let mut flights = Vec::with_capacity(image.frames.len());
    let mut last = FrameSeq(0);
    for frame in &image.frames {
        let region = marks.get(usize::from(frame.at.region.0));
        let region = region.ok_or(LedgerError::Image("a frame is of no region"))?;
        let inside = frame.blocks.minus(&region.len().all_of(frame.at.window));
        let fits = inside.is_empty() && lane_of(frame.at.window, count) == lane;
        if !fits || frame.seq <= last || frame.seq > image.sent {
            return Err(LedgerError::Image("a frame cannot be where it is"));
        }
        last = frame.seq;
        flights.push(Flight {
            seq: frame.seq,
            kind: region.kind(),
            bytes: region.len().bytes_of(frame.at.window, &frame.blocks),
            at: frame.at,
            blocks: frame.blocks,
        });
    }
    let numbers = (image.sent, image.applied, image.flushed);
    let needed = |flight: &Flight| match flight.kind {
        RegionKind::Memory => flight.seq > image.applied,
        RegionKind::Disk => flight.seq > image.flushed,
    };
    let unsettled = flights.into_iter().filter(needed);
    Ok(LaneState::left(
        Work::new(marks, lane, count),
        numbers,
        unsettled,
    ))
}
