//! The copy ledger: what of the guest still has to be sent, what is on its way, what is safe at the destination.
//!
//! Every block of every region is **dirty** (to be sent), **in flight** (in a frame that the destination has not
//! answered for), both (written again since), or **clean**. A disk frame that is applied but not flushed is
//! clean for the round but is remembered until it is flushed (`[WIRE-32]`). Owns these sets, the sequence
//! numbers of the lanes, and what a lost session means for them. It reads no guest and sends nothing; one engine
//! owns it. Invariant: a block that is neither dirty nor in flight is at the destination as it was when it was
//! last taken. A dirty block may be held back, or late: it counts as dirty, and is not taken before it is released. Memory is O(bitmap) +
//! O(frames not yet settled); no step costs more than its windows, but for a look, which costs a byte of each.
//!
//! A block also becomes clean where both sides are found to have the same (`compare`).
//!
//! ```text
//!             mark_dirty                     next_frame               on_progress: applied (memory), flushed (disk)
//!   clean ----------------> dirty -----------------> in flight ----------------------------------------------> clean
//!                             ^                          |
//!                             +------- on_ready: --------+  not applied (memory) or not flushed (disk) of the lost
//!                                  session lost             session; a new incarnation makes the whole region dirty
//! ```

mod compare;
mod heat;
mod lanes;
mod log;
mod marks;
mod restore;
#[cfg(test)]
mod tests;
mod turns;
mod types;

use std::collections::BTreeSet;

use crate::frame::lane_of;
use crate::geometry::{RegionBits, WindowBits, WindowIndex, WindowRef};
use crate::ids::{FrameSeq, Incarnation, Lane, RegionId, SessionNumber};
use crate::limits;
use crate::message::{LaneProgress, Ready, ResumePoint};
use crate::spec::{RegionKind, RegionSpec};

use lanes::{Flight, LaneState};
use marks::RegionMarks;

pub use log::{LedgerLog, SentFrame};
pub use restore::{FrameImage, LaneImage, LedgerImage, SessionImage};
pub use types::{Amount, Counters, Dirty, FrameJob, Frames, LedgerError, Resumed};

/// The copy ledger of one migration, over all its sessions.
#[derive(Debug)]
pub struct Ledger {
    regions: Vec<RegionMarks>,
    /// Empty before the first `Ready`.
    lanes: Vec<LaneState>,
    session: Session,
    incarnations: Option<Vec<Incarnation>>,
    counters: Counters,
    /// Windows that are being compared and were not touched since.
    comparing: BTreeSet<WindowRef>,
    /// Where changes are told, if another process is to be able to go on from them.
    log: Option<Box<dyn LedgerLog>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    None,
    Open(SessionNumber),
    /// Its frames wait for the next `Ready`.
    Lost(SessionNumber),
}

impl Ledger {
    /// A ledger in which every block of every region is dirty: the first pass accounts for all of them. Region ids
    /// are the positions.
    #[must_use]
    pub fn new(regions: &[RegionSpec]) -> Self {
        Self {
            regions: regions
                .iter()
                .map(|region| RegionMarks::all_dirty(region.kind, region.len))
                .collect(),
            lanes: Vec::new(),
            session: Session::None,
            incarnations: None,
            counters: Counters::default(),
            comparing: BTreeSet::new(),
            log: None,
        }
    }

    // Marks.

    /// Makes `bits` of a region dirty; what was known to be zero among them no longer is.
    ///
    /// # Errors
    /// No such region, or one of another length: then nothing is marked.
    pub fn mark_dirty(&mut self, region: RegionId, bits: &RegionBits) -> Result<(), LedgerError> {
        self.check_region(region, bits)?;
        for (window, bits) in bits.iter() {
            self.mark_dirty_window(WindowRef { region, window }, &bits)?;
        }
        Ok(())
    }

    /// Makes `bits` of one window dirty; bits outside the region are ignored.
    ///
    /// # Errors
    /// No such region.
    pub fn mark_dirty_window(
        &mut self,
        at: WindowRef,
        bits: &WindowBits,
    ) -> Result<(), LedgerError> {
        let marks = self
            .regions
            .get_mut(usize::from(at.region.0))
            .ok_or(LedgerError::UnknownRegion(at.region))?;
        marks.mark_dirty(at.window, bits);
        self.note_work(at);
        self.comparing.remove(&at);
        if let Some(log) = &mut self.log {
            log.dirty(at, bits);
        }
        Ok(())
    }

    /// Makes `bits` of a region dirty, all that a look at its marks found, and holds them back until [`release`](Self::release): what is
    /// written while a round runs goes with the next one, also where this one had not come to it yet, since it may be written once more.
    ///
    /// # Errors
    /// As [`mark_dirty`](Self::mark_dirty).
    pub fn hold(&mut self, region: RegionId, bits: &RegionBits) -> Result<(), LedgerError> {
        self.mark_dirty(region, bits)?;
        if let Some(marks) = self.regions.get_mut(usize::from(region.0)) {
            marks.look();
        }
        for (window, bits) in bits.iter() {
            if let Some(marks) = self.regions.get_mut(usize::from(region.0)) {
                marks.hold(window, &bits);
            }
            self.note_work(WindowRef { region, window });
        }
        Ok(())
    }

    /// Holds nothing back any more, and nothing is late. Returns how many blocks were held back.
    pub fn release(&mut self) -> u64 {
        let released = self.held_blocks();
        self.release_by(RegionMarks::release);
        released
    }

    /// The same, but the dirty blocks of windows that several of the last looks found written are late: they are taken after
    /// [`release_late`](Self::release_late), when all others are sent, if they are not written again before.
    pub fn release_cold(&mut self) -> u64 {
        let released = self.held_blocks();
        self.release_by(RegionMarks::release_cold);
        released
    }

    /// Nothing is late any more.
    pub fn release_late(&mut self) {
        self.release_by(RegionMarks::release_late);
    }

    /// Blocks that are late.
    #[must_use]
    pub fn late_blocks(&self) -> u64 {
        self.regions.iter().map(RegionMarks::late_blocks).sum()
    }

    fn held_blocks(&self) -> u64 {
        self.regions.iter().map(RegionMarks::held_blocks).sum()
    }

    fn release_by(&mut self, release: impl Fn(&mut RegionMarks) -> Vec<WindowIndex>) {
        for index in 0..self.regions.len() {
            let windows = self.regions.get_mut(index).map(&release);
            let region = RegionId(u16::try_from(index).unwrap_or(u16::MAX));
            for window in windows.unwrap_or_default() {
                self.note_work(WindowRef { region, window });
            }
        }
    }

    /// Remembers that the dirty ones among `bits` are known to be zero, until they are marked dirty again.
    ///
    /// # Errors
    /// No such region, or one of another length: then nothing is marked.
    pub fn mark_zero(&mut self, region: RegionId, bits: &RegionBits) -> Result<(), LedgerError> {
        let marks = self.check_region(region, bits)?;
        for (window, bits) in bits.iter() {
            marks.mark_zero(window, &bits);
        }
        Ok(())
    }

    /// Makes a whole region dirty: the destination's copy of it starts from nothing.
    ///
    /// # Errors
    /// No such region.
    pub fn region_restarted(&mut self, region: RegionId) -> Result<(), LedgerError> {
        let marks = self
            .regions
            .get_mut(usize::from(region.0))
            .ok_or(LedgerError::UnknownRegion(region))?;
        marks.mark_all_dirty();
        self.comparing.retain(|at| at.region != region);
        if let Some(log) = &mut self.log {
            log.region_dirty(region);
        }
        let windows = marks.len().windows();
        for window in (0..windows).map(WindowIndex) {
            self.note_work(WindowRef { region, window });
        }
        Ok(())
    }

    /// Makes every block dirty again that is in flight, or in a disk frame that is applied but not flushed.
    pub fn put_back_all(&mut self) -> Frames {
        let flights: Vec<Flight> = self.lanes.iter_mut().flat_map(LaneState::drain).collect();
        self.put_back(&flights)
    }

    fn put_back(&mut self, flights: &[Flight]) -> Frames {
        let mut total = Frames::default();
        for flight in flights {
            total.add(flight);
            // A flight was made from a region of this ledger.
            let _known_region = self.mark_dirty_window(flight.at, &flight.blocks);
        }
        total
    }

    fn check_region(
        &mut self,
        region: RegionId,
        bits: &RegionBits,
    ) -> Result<&mut RegionMarks, LedgerError> {
        let marks = self
            .regions
            .get_mut(usize::from(region.0))
            .ok_or(LedgerError::UnknownRegion(region))?;
        if marks.len() != bits.region_len() {
            return Err(LedgerError::RegionLength {
                region,
                expected: marks.len().0,
                got: bits.region_len().0,
            });
        }
        Ok(marks)
    }

    /// Notes at its lane whether there is something to take of a window.
    fn note_work(&mut self, at: WindowRef) {
        let lanes = self.lane_count();
        let marks = self.regions.get(usize::from(at.region.0));
        let ready = marks.is_some_and(|marks| !marks.ready_in(at.window).is_empty());
        if let Some(lane) = self.lanes.get_mut(usize::from(lane_of(at.window, lanes).0)) {
            lane.work.set(at, lanes, ready);
        }
    }

    fn lane_count(&self) -> u8 {
        u8::try_from(self.lanes.len()).unwrap_or(limits::MAX_LANES)
    }

    // Frames.

    /// Takes the next frame of `lane`, of regions of `kind` if one is given: up to [`limits::MAX_FRAME_BLOCKS`] dirty
    /// blocks of one window that are neither held back nor late. `None` if the lane has nothing to send or no session is open.
    ///
    /// A lane goes round its windows, those of disks in ascending order and those of memory spread over it, and round all regions at the
    /// same pace, so each gets its turn however fast another one is dirtied.
    pub fn next_frame(&mut self, lane: Lane, kind: Option<RegionKind>) -> Option<FrameJob> {
        let Session::Open(_) = self.session else {
            return None;
        };
        let lanes = self.lane_count();
        let regions = &self.regions;
        let state = self.lanes.get_mut(usize::from(lane.0))?;
        let wanted = |region: RegionId| {
            let marks = regions.get(usize::from(region.0));
            marks.is_some_and(|marks| kind.is_none_or(|kind| kind == marks.kind()))
        };
        let dirty = |at: WindowRef| {
            let marks = regions.get(usize::from(at.region.0));
            marks.map_or(WindowBits::EMPTY, |marks| marks.ready_in(at.window))
        };
        let (at, blocks) = state.work.next(lane, lanes, wanted, dirty)?;
        self.take(lane, at, &blocks)
    }

    fn take(&mut self, lane: Lane, at: WindowRef, blocks: &WindowBits) -> Option<FrameJob> {
        let lanes = self.lane_count();
        self.comparing.remove(&at);
        let marks = self.regions.get_mut(usize::from(at.region.0))?;
        let state = self.lanes.get_mut(usize::from(lane.0))?;
        let taken = marks.take(at.window, blocks);
        let ready = !marks.ready_in(at.window).is_empty();
        state.work.set(at, lanes, ready);
        let bytes = marks.len().bytes_of(at.window, blocks);
        let kind = marks.kind();
        let seq = state.send(at, *blocks, bytes, kind);
        if let Some(log) = &mut self.log {
            log.sent(&SentFrame {
                lane,
                seq,
                at,
                blocks: *blocks,
                kind,
            });
        }
        self.counters.frames += 1;
        self.counters.blocks += u64::from(blocks.count());
        self.counters.bytes += u64::from(bytes);
        self.counters.distinct_blocks += u64::from(taken.first_time);
        self.counters.known_zero_blocks += u64::from(taken.zero.count());
        Some(FrameJob {
            region: at.region,
            window: at.window,
            blocks: *blocks,
            known_zero: taken.zero,
            lane,
            seq,
        })
    }

    /// Takes in what the destination says it has applied and flushed. Checked as a whole before any of it counts.
    ///
    /// # Errors
    /// The peer claims what cannot be; nothing has changed.
    pub fn on_progress(&mut self, progress: &[LaneProgress]) -> Result<Frames, LedgerError> {
        let Session::Open(_) = self.session else {
            return Err(LedgerError::NoSession);
        };
        self.check_progress(progress, Floor::KnownProgress)?;
        let mut acked = Frames::default();
        for lane in progress {
            acked.add_all(self.settle(lane));
        }
        Ok(acked)
    }

    fn settle(&mut self, progress: &LaneProgress) -> Frames {
        let Some(state) = self.lanes.get_mut(usize::from(progress.lane.0)) else {
            return Frames::default();
        };
        let newly = state.settle(progress.applied, progress.flushed);
        if let Some(log) = &mut self.log {
            let (applied, flushed) = state.settled();
            log.settled(progress.lane, applied, flushed);
        }
        newly
    }

    fn check_progress(&self, progress: &[LaneProgress], floor: Floor) -> Result<(), LedgerError> {
        let mut next = 0;
        for claim in progress {
            let index = usize::from(claim.lane.0);
            let state =
                self.lanes
                    .get(index)
                    .filter(|_| index >= next)
                    .ok_or(LedgerError::Lane {
                        lane: claim.lane,
                        lanes: self.lanes.len(),
                    })?;
            next = index + 1;
            state.check(claim, floor)?;
        }
        Ok(())
    }

    // Sessions.

    /// The session is gone: no frame is taken until the next [`on_ready`](Self::on_ready). What is in flight stays so,
    /// since the destination may still apply it.
    pub fn on_session_lost(&mut self) {
        if let Session::Open(session) = self.session {
            self.session = Session::Lost(session);
        }
        self.end_compare();
    }

    /// Opens session `session` of `lanes` lanes with what the destination said in `Ready` (`[WIRE-30]` ff.).
    ///
    /// Of the frames of the session before, memory frames that the destination has applied and disk frames that it has
    /// flushed are safe; all others are dirty again. What it said earlier stays true for as long as the incarnation
    /// is the same, so a resume point can only add to it. A `Ready` within the open session (its number is the same)
    /// changes nothing but the incarnations; then everything not yet safe is sent again.
    ///
    /// # Errors
    /// The peer claims what cannot be, or the session number is not above the last one; nothing has changed.
    pub fn on_ready(
        &mut self,
        session: SessionNumber,
        lanes: u8,
        ready: &Ready,
    ) -> Result<Resumed, LedgerError> {
        if ready.incarnations.len() != self.regions.len() {
            return Err(LedgerError::Incarnations {
                expected: self.regions.len(),
                got: ready.incarnations.len(),
            });
        }
        self.end_compare();
        let (kept, put_back) = if self.session == Session::Open(session) {
            self.renew_within_session(&ready.incarnations)
        } else {
            self.begin_session(session, lanes, ready.resume.as_ref())?
        };
        let restarted = self.adopt(&ready.incarnations);
        for region in &restarted {
            self.region_restarted(*region)?;
        }
        if let Some(log) = &mut self.log {
            log.incarnations(&ready.incarnations);
        }
        Ok(Resumed {
            restarted,
            kept,
            put_back,
        })
    }

    fn begin_session(
        &mut self,
        session: SessionNumber,
        lanes: u8,
        point: Option<&ResumePoint>,
    ) -> Result<(Frames, Frames), LedgerError> {
        let last = match self.session {
            Session::None => SessionNumber(0),
            Session::Open(last) | Session::Lost(last) => last,
        };
        if session <= last || lanes == 0 || lanes > limits::MAX_LANES {
            return Err(LedgerError::SessionNumber {
                last,
                got: session,
                lanes,
            });
        }
        let mut kept = self.in_flight();
        kept.add_all(self.unflushed());
        if let Some(point) = point.filter(|point| point.session == last) {
            self.check_progress(&point.lanes, Floor::Any)?;
            for lane in &point.lanes {
                self.settle(lane);
            }
        }
        let flights: Vec<Flight> = self.lanes.iter_mut().flat_map(LaneState::drain).collect();
        self.lanes = (0..lanes)
            .map(|lane| LaneState::new(&self.regions, Lane(lane), lanes))
            .collect();
        self.session = Session::Open(session);
        self.note_all_work();
        let put_back = self.put_back(&flights);
        if let Some(log) = &mut self.log {
            log.session(session, lanes);
        }
        kept.remove_all(put_back);
        Ok((kept, put_back))
    }

    /// A fresh hypervisor within the session: what it had not flushed is lost with the old one.
    fn renew_within_session(&mut self, incarnations: &[Incarnation]) -> (Frames, Frames) {
        let changed = self
            .incarnations
            .as_deref()
            .is_some_and(|known| known != incarnations);
        let put_back = if changed {
            self.put_back_all()
        } else {
            Frames::default()
        };
        (Frames::default(), put_back)
    }

    /// Stores the incarnations and returns the regions that had another one.
    fn adopt(&mut self, incarnations: &[Incarnation]) -> Vec<RegionId> {
        let known = self.incarnations.replace(incarnations.to_vec());
        known
            .iter()
            .flatten()
            .zip(incarnations)
            .zip((0u16..).map(RegionId))
            .filter(|((before, now), _)| before != now)
            .map(|(_, region)| region)
            .collect()
    }

    fn note_all_work(&mut self) {
        let lanes = self.lane_count();
        for (marks, region) in self.regions.iter().zip((0u16..).map(RegionId)) {
            for window in marks.ready_windows() {
                let lane = usize::from(lane_of(window, lanes).0);
                if let Some(lane) = self.lanes.get_mut(lane) {
                    lane.work.set(WindowRef { region, window }, lanes, true);
                }
            }
        }
    }

    // Questions.

    /// Dirty blocks of all regions, or of those of one kind. Costs O(regions).
    #[must_use]
    pub fn dirty(&self, kind: Option<RegionKind>) -> Dirty {
        self.regions
            .iter()
            .filter(|marks| kind.is_none_or(|kind| kind == marks.kind()))
            .map(RegionMarks::dirty)
            .fold(Dirty::default(), Dirty::plus)
    }

    /// Dirty blocks of one region; none for a region that does not exist.
    #[must_use]
    pub fn dirty_in(&self, region: RegionId) -> Dirty {
        self.regions
            .get(usize::from(region.0))
            .map(RegionMarks::dirty)
            .unwrap_or_default()
    }

    /// Whether no block is dirty: everything is taken. It may still be in flight.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.regions.iter().all(RegionMarks::is_clean)
    }

    /// Whether no block can be taken, of regions of `kind` if one is given: none is dirty, or all that are are held back or late.
    #[must_use]
    pub fn is_exhausted(&self, kind: Option<RegionKind>) -> bool {
        self.regions
            .iter()
            .filter(|marks| kind.is_none_or(|kind| kind == marks.kind()))
            .all(RegionMarks::is_exhausted)
    }

    /// Whether no block is dirty and every frame is applied.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.is_clean() && self.in_flight().frames == 0
    }

    /// Frames that the destination has not said to have applied. Costs O(lanes).
    #[must_use]
    pub fn in_flight(&self) -> Frames {
        self.sum(LaneState::in_flight)
    }

    /// Disk frames that are applied but not flushed. Costs O(lanes).
    #[must_use]
    pub fn unflushed(&self) -> Frames {
        self.sum(LaneState::unflushed)
    }

    fn sum(&self, part: impl Fn(&LaneState) -> Frames) -> Frames {
        let mut total = Frames::default();
        self.lanes.iter().for_each(|lane| total.add_all(part(lane)));
        total
    }

    /// Last sequence number taken of each lane: what `Final` names. Empty before the first session.
    #[must_use]
    pub fn final_seqs(&self) -> Vec<FrameSeq> {
        self.lanes.iter().map(LaneState::last_sent).collect()
    }

    /// Totals since the migration began.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }
}

/// What progress is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Floor {
    /// It may not be below what was said before.
    KnownProgress,
    /// It may: a destination that was restarted need not remember all it said.
    Any,
}
