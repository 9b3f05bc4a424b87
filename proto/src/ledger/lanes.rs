//! One lane of the session: its frames that are not settled yet, and the windows it still has to send.
//!
//! Invariants: frames stand in order of their sequence numbers; a window's bit in [`Work`] is set exactly while the
//! window has dirty blocks that can be taken. Bits stand in the order of the windows' turns ([`Turns`]), so a lane with little to do
//! finds it by whole words, also on a disk of 64 TiB.

use std::collections::VecDeque;

use super::marks::RegionMarks;
use super::turns::Turns;
use super::{Amount, Floor, Frames, LedgerError};
use crate::geometry::{WINDOW_BLOCKS, WindowBits, WindowIndex, WindowRef};
use crate::ids::{FrameSeq, Lane, RegionId};
use crate::limits::MAX_FRAME_BLOCKS;
use crate::message::LaneProgress;
use crate::spec::RegionKind;

/// A frame that was taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    pub(super) seq: FrameSeq,
    pub(super) kind: RegionKind,
    pub(super) bytes: u32,
    pub(super) at: WindowRef,
    pub(super) blocks: WindowBits,
}

impl Flight {
    pub(super) fn amount(&self) -> Amount {
        Amount {
            blocks: u64::from(self.blocks.count()),
            bytes: u64::from(self.bytes),
        }
    }
}

/// Frames in order, with their sum.
#[derive(Debug, Default)]
struct Queue {
    flights: VecDeque<Flight>,
    total: Frames,
}

impl Queue {
    fn push(&mut self, flight: Flight) {
        self.total.add(&flight);
        self.flights.push_back(flight);
    }

    fn pop_up_to(&mut self, seq: FrameSeq) -> Option<Flight> {
        self.flights.front().filter(|flight| flight.seq <= seq)?;
        let flight = self.flights.pop_front()?;
        self.total.remove(&flight);
        Some(flight)
    }
}

#[derive(Debug)]
pub(super) struct LaneState {
    pub(super) work: Work,
    sent: FrameSeq,
    applied: FrameSeq,
    flushed: FrameSeq,
    /// Not said to be applied.
    in_flight: Queue,
    /// Disk frames that are applied, not said to be flushed.
    unflushed: Queue,
}

impl LaneState {
    pub(super) fn new(regions: &[RegionMarks], lane: Lane, lanes: u8) -> Self {
        Self {
            work: Work::new(regions, lane, lanes),
            sent: FrameSeq(0),
            applied: FrameSeq(0),
            flushed: FrameSeq(0),
            in_flight: Queue::default(),
            unflushed: Queue::default(),
        }
    }

    pub(super) const fn last_sent(&self) -> FrameSeq {
        self.sent
    }

    pub(super) const fn in_flight(&self) -> Frames {
        self.in_flight.total
    }

    pub(super) const fn unflushed(&self) -> Frames {
        self.unflushed.total
    }

    /// Whether a frame of this window is not settled.
    pub(super) fn carries(&self, at: WindowRef) -> bool {
        let flights = self.in_flight.flights.iter();
        flights
            .chain(&self.unflushed.flights)
            .any(|flight| flight.at == at)
    }

    pub(super) fn send(
        &mut self,
        at: WindowRef,
        blocks: WindowBits,
        bytes: u32,
        kind: RegionKind,
    ) -> FrameSeq {
        self.sent = self.sent.next();
        self.in_flight.push(Flight {
            seq: self.sent,
            kind,
            bytes,
            at,
            blocks,
        });
        self.sent
    }

    /// What is applied and what is flushed.
    pub(super) const fn settled(&self) -> (FrameSeq, FrameSeq) {
        (self.applied, self.flushed)
    }

    /// A lane as an earlier process left it; its frames ascend and lie up to `sent`.
    pub(super) fn left(
        work: Work,
        (sent, applied, flushed): (FrameSeq, FrameSeq, FrameSeq),
        flights: impl Iterator<Item = Flight>,
    ) -> Self {
        let mut lane = Self {
            work,
            sent,
            applied: FrameSeq(0),
            flushed: FrameSeq(0),
            in_flight: Queue::default(),
            unflushed: Queue::default(),
        };
        flights.for_each(|flight| lane.in_flight.push(flight));
        lane.settle(applied, flushed);
        lane
    }

    pub(super) fn check(&self, claim: &LaneProgress, floor: Floor) -> Result<(), LedgerError> {
        let lane = claim.lane;
        if claim.applied > self.sent {
            return Err(LedgerError::NotSent {
                lane,
                sent: self.sent,
                claimed: claim.applied,
            });
        }
        if claim.flushed > claim.applied {
            return Err(LedgerError::FlushedUnapplied {
                lane,
                applied: claim.applied,
                flushed: claim.flushed,
            });
        }
        let back = [(self.applied, claim.applied), (self.flushed, claim.flushed)]
            .into_iter()
            .find(|(before, now)| now < before);
        match (floor, back) {
            (Floor::KnownProgress, Some((before, claimed))) => Err(LedgerError::Backwards {
                lane,
                before,
                claimed,
            }),
            (Floor::KnownProgress, None) | (Floor::Any, _) => Ok(()),
        }
    }

    /// Frames up to `applied` and `flushed` are; returns those newly applied.
    pub(super) fn settle(&mut self, applied: FrameSeq, flushed: FrameSeq) -> Frames {
        self.applied = self.applied.max(applied);
        self.flushed = self.flushed.max(flushed);
        let mut newly = Frames::default();
        while let Some(flight) = self.in_flight.pop_up_to(self.applied) {
            newly.add(&flight);
            match flight.kind {
                RegionKind::Disk => self.unflushed.push(flight),
                RegionKind::Memory => {}
            }
        }
        while self.unflushed.pop_up_to(self.flushed).is_some() {}
        newly
    }

    /// Removes and returns everything that is not settled.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Flight> + use<> {
        let unflushed = std::mem::take(&mut self.unflushed);
        let in_flight = std::mem::take(&mut self.in_flight);
        unflushed.flights.into_iter().chain(in_flight.flights)
    }
}

/// Progress of a region of which everything was gone round.
const ALL: u64 = 1 << 20;

/// The windows of one lane of which there are blocks to take, and where the lane stands in going round them.
///
/// It goes round all regions at the same pace: what is read slowly, as disks are, is read beside what is read fast and takes time to
/// compress, and memory is not sent long before a large disk is there.
#[derive(Debug)]
pub(super) struct Work {
    regions: Vec<RegionWork>,
}

#[derive(Debug)]
struct RegionWork {
    turns: Turns,
    /// How many lanes come to its windows before this one, so that they do not come all at once.
    behind: u8,
    /// One bit for each turn.
    words: Vec<u64>,
    /// Whose turn it is; what has a lower one has had it.
    turn: usize,
    /// Blocks below it have been taken in this turn.
    block: u32,
    /// Nothing more of it until all regions were gone round.
    ended: bool,
}

impl Work {
    pub(super) fn new(regions: &[RegionMarks], lane: Lane, lanes: u8) -> Self {
        let region = |marks: &RegionMarks| {
            let slots = marks.len().windows().div_ceil(u32::from(lanes));
            let (turns, behind) = match marks.kind() {
                RegionKind::Memory => (Turns::spread(slots, lane, lanes), 0),
                RegionKind::Disk => (Turns::ascending(slots), lane.0),
            };
            RegionWork {
                turns,
                behind,
                words: vec![0; slots.div_ceil(64) as usize],
                turn: 0,
                block: 0,
                ended: false,
            }
        };
        Self {
            regions: regions.iter().map(region).collect(),
        }
    }

    /// Whether there is something to take of a window of this lane.
    pub(super) fn set(&mut self, at: WindowRef, lanes: u8, ready: bool) {
        match self.word(at, lanes) {
            Some((word, bit)) if ready => *word |= bit,
            Some((word, bit)) => *word &= !bit,
            None => {}
        }
    }

    fn word(&mut self, at: WindowRef, lanes: u8) -> Option<(&mut u64, u64)> {
        let slot = at.window.0 / u32::from(lanes);
        let region = self.regions.get_mut(usize::from(at.region.0))?;
        let turn = region.turns.turn(slot)?;
        Some((region.words.get_mut(turn / 64)?, 1 << (turn % 64)))
    }

    /// The next window, and the blocks of it that come next, for lane `lane` of `lanes`: of the wanted region of which the least was gone
    /// round. Each ends once before any of them starts over.
    pub(super) fn next(
        &mut self,
        lane: Lane,
        lanes: u8,
        wanted: impl Fn(RegionId) -> bool,
        dirty: impl Fn(WindowRef) -> WindowBits,
    ) -> Option<(WindowRef, WindowBits)> {
        // Once round what is left, and once round everything.
        for _ in 0..2 {
            while let Some((region, work)) = self.furthest_behind(lanes, &wanted) {
                let found = work.next(|slot| {
                    let window = WindowIndex(slot * u32::from(lanes) + u32::from(lane.0));
                    let at = WindowRef { region, window };
                    (at, dirty(at))
                });
                if found.is_some() {
                    return found;
                }
                work.ended = true;
            }
            self.all(&wanted).for_each(|(_, work)| work.ended = false);
        }
        None
    }

    fn furthest_behind(
        &mut self,
        lanes: u8,
        wanted: impl Fn(RegionId) -> bool,
    ) -> Option<(RegionId, &mut RegionWork)> {
        self.all(wanted)
            .filter(|(_, work)| !work.ended)
            .min_by_key(|(_, work)| work.progress(lanes))
    }

    fn all(
        &mut self,
        wanted: impl Fn(RegionId) -> bool,
    ) -> impl Iterator<Item = (RegionId, &mut RegionWork)> {
        let ids = (0u16..).map(RegionId);
        ids.zip(&mut self.regions)
            .filter(move |(region, _)| wanted(*region))
    }
}

impl RegionWork {
    /// How much of it was gone round, of [`ALL`].
    fn progress(&self, lanes: u8) -> u64 {
        let lanes = u64::from(lanes);
        let gone = self.turn as u64 * lanes + u64::from(self.behind);
        gone * ALL / (self.turns.len() * lanes).max(1)
    }

    /// The next blocks from where the region stands to its end; at the end it starts over with the next call.
    fn next(
        &mut self,
        window: impl Fn(u32) -> (WindowRef, WindowBits),
    ) -> Option<(WindowRef, WindowBits)> {
        while let Some(turn) = self.find_turn() {
            if turn != self.turn {
                self.turn = turn;
                self.block = 0;
            }
            let (at, dirty) = window(self.turns.slot(turn)?);
            let left = dirty.and(&WindowBits::span(self.block, WINDOW_BLOCKS));
            let blocks = left.lowest(MAX_FRAME_BLOCKS);
            if let Some(last) = blocks.last() {
                self.block = last + 1;
                return Some((at, blocks));
            }
            self.turn = turn + 1;
            self.block = 0;
        }
        self.turn = 0;
        self.block = 0;
        None
    }

    fn find_turn(&self) -> Option<usize> {
        let first = self.turn / 64;
        let rest = self.words.get(first..)?;
        rest.iter().zip(first..).find_map(|(word, index)| {
            let below = if index == first { self.turn % 64 } else { 0 };
            let left = word & (u64::MAX << below);
            (left != 0).then(|| index * 64 + left.trailing_zeros() as usize)
        })
    }
}
