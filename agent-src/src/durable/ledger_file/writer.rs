//! What the copy changes in the mapped ledger.
//!
//! Owns the order of the stores of each change: a frame stands in its slot before its lane's number says so, and only then do its
//! blocks cease to be dirty. Frames in flight have a ring of slots per lane. One that finds its slot taken by a frame which is not
//! settled leaves its blocks marked dirty here until all is settled: a later agent would send them once more, no more than that.

use std::sync::Arc;

use vmferry_proto::geometry::{RegionBits, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::{FrameSeq, Incarnation, Lane, RegionId, SessionNumber};
use vmferry_proto::ledger::{LedgerLog, SentFrame};
use vmferry_proto::limits::MAX_LANES;
use vmferry_proto::spec::RegionKind;

use super::{
    DISK_BIT, KNOWN_AT, LANE, LANES_AT, LedgerFile, SESSION_AT, SLOTS, halves, is_settled, lane_at,
};

impl LedgerFile {
    /// Writes a ledger's changes down; one at a time.
    #[must_use]
    pub fn writer(self: &Arc<Self>) -> LedgerWriter {
        let mut writer = LedgerWriter {
            last_disk: vec![FrameSeq(0); usize::from(MAX_LANES)],
            spilt: vec![None; self.regions.len()],
            lanes: u8::try_from(self.words.get(LANES_AT)).unwrap_or(MAX_LANES),
            file: Arc::clone(self),
        };
        // Of frames without a slot nobody knows what they were: all of a restored lane counts.
        for lane in (0..MAX_LANES).map(Lane) {
            writer.last_disk[usize::from(lane.0)] = FrameSeq(self.words.get(lane_at(lane)));
        }
        writer
    }
}

/// Writes the changes of one ledger down.
#[derive(Debug)]
pub struct LedgerWriter {
    file: Arc<LedgerFile>,
    lanes: u8,
    /// Last frame of each lane that carried disk blocks.
    last_disk: Vec<FrameSeq>,
    /// Blocks that the file calls dirty only because their frame found no slot.
    spilt: Vec<Option<RegionBits>>,
}

impl LedgerWriter {
    /// Whether no frame is in flight or waits for a flush.
    fn is_settled(&self) -> bool {
        let words = &self.file.words;
        (0..self.lanes).map(Lane).all(|lane| {
            let at = lane_at(lane);
            let last_disk = self.last_disk.get(usize::from(lane.0)).copied();
            words.get(at + 1) == words.get(at)
                && last_disk.is_none_or(|last| words.get(at + 2) >= last.0)
        })
    }

    fn forget_spilt(&mut self) {
        for (place, spilt) in self.file.regions.iter().zip(&mut self.spilt) {
            for (window, bits) in spilt.take().iter().flat_map(RegionBits::iter) {
                self.file.remove(place.dirty, window.0, &bits);
            }
        }
    }

    fn take_slot(&self, frame: &SentFrame) -> bool {
        let Self { file, lanes, .. } = self;
        let ring = SLOTS / usize::from((*lanes).max(1));
        let number = usize::try_from(frame.seq.0 % ring.max(1) as u64).unwrap_or(0);
        let Some(slot) = file.ring(frame.lane, *lanes).nth(number) else {
            return false;
        };
        let at = lane_at(frame.lane);
        let [applied, flushed] = [1, 2].map(|word| FrameSeq(file.words.get(at + word)));
        let before = file.slot(slot);
        if before.is_some_and(|(before, kind)| !is_settled(before.seq, kind, applied, flushed)) {
            return false;
        }
        let disk = match frame.kind {
            RegionKind::Memory => 0,
            RegionKind::Disk => DISK_BIT,
        };
        let place = u64::from(frame.at.region.0) << 32 | u64::from(frame.at.window.0) | disk;
        // What stands there is settled; while its number is zero nothing does.
        file.words.set(slot, 0);
        file.words.set(slot + 1, place);
        for (word, bits) in frame.blocks.0.iter().enumerate() {
            file.words.set(slot + 2 + word, *bits);
        }
        file.words.set(slot, frame.seq.0);
        true
    }
}

impl LedgerLog for LedgerWriter {
    fn dirty(&mut self, at: WindowRef, blocks: &WindowBits) {
        let index = usize::from(at.region.0);
        let Some(place) = self.file.regions.get(index) else {
            return;
        };
        let blocks = blocks.and(&place.len.all_of(at.window));
        self.file.add(place.dirty, at.window.0, &blocks);
        if let Some(Some(spilt)) = self.spilt.get_mut(index) {
            spilt.remove(at.window, &blocks);
        }
    }

    fn region_dirty(&mut self, region: RegionId) {
        let Some(place) = self.file.place(region).copied() else {
            return;
        };
        for window in (0..place.len.windows()).map(WindowIndex) {
            self.dirty(WindowRef { region, window }, &WindowBits::FULL);
        }
    }

    fn equal(&mut self, at: WindowRef, blocks: &WindowBits) {
        if let Some(place) = self.file.place(at.region).copied() {
            let blocks = blocks.and(&place.len.all_of(at.window));
            self.file.add(place.sent, at.window.0, &blocks);
            self.file.remove(place.dirty, at.window.0, &blocks);
        }
    }

    fn sent(&mut self, frame: &SentFrame) {
        let index = usize::from(frame.at.region.0);
        let Some(place) = self.file.regions.get(index).copied() else {
            return;
        };
        let has_slot = self.take_slot(frame);
        self.file.words.set(lane_at(frame.lane), frame.seq.0);
        self.file.add(place.sent, frame.at.window.0, &frame.blocks);
        if let (RegionKind::Disk, Some(last)) = (
            place.kind,
            self.last_disk.get_mut(usize::from(frame.lane.0)),
        ) {
            *last = frame.seq;
        }
        if has_slot {
            self.file
                .remove(place.dirty, frame.at.window.0, &frame.blocks);
        } else if let Some(spilt) = self.spilt.get_mut(index) {
            spilt
                .get_or_insert_with(|| RegionBits::empty(place.len))
                .insert(frame.at.window, &frame.blocks);
        }
    }

    fn settled(&mut self, lane: Lane, applied: FrameSeq, flushed: FrameSeq) {
        let at = lane_at(lane);
        self.file.words.set(at + 1, applied.0);
        self.file.words.set(at + 2, flushed.0);
        if self.spilt.iter().any(Option::is_some) && self.is_settled() {
            self.forget_spilt();
        }
    }

    fn session(&mut self, session: SessionNumber, lanes: u8) {
        let words = &self.file.words;
        words.set(SESSION_AT, 0);
        // The numbers begin again: a slot of the session before must not be taken for one of this. Before the lanes, which say how
        // many there are: a process that dies in between has left them to the next one.
        self.file.clear_slots();
        for lane in (0..MAX_LANES).map(Lane) {
            (0..LANE).for_each(|word| words.set(lane_at(lane) + word, 0));
        }
        words.set(LANES_AT, u64::from(lanes));
        words.set(SESSION_AT, session.0);
        self.lanes = lanes;
        self.last_disk.fill(FrameSeq(0));
        // Whatever of it is not safe was told as dirty.
        self.forget_spilt();
    }

    fn incarnations(&mut self, all: &[Incarnation]) {
        for (place, incarnation) in self.file.regions.iter().zip(all) {
            let (low, high) = halves(*incarnation.as_bytes());
            self.file.words.set(place.entry + 2, low);
            self.file.words.set(place.entry + 3, high);
        }
        self.file.words.set(KNOWN_AT, 1);
    }
}
