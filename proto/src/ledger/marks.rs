//! Marks of one region: which blocks are dirty, which of those are known to be zero or are held back, which were ever sent.
//!
//! Invariants: zero blocks, held ones and late ones are dirty ones; none is both held and late; the counts are those of the sets.

use super::heat::Heat;
use super::{Amount, Dirty};
use crate::geometry::{BLOCK_SIZE, RegionBits, RegionLen, WindowBits, WindowIndex};
use crate::spec::RegionKind;

#[derive(Debug)]
pub(super) struct RegionMarks {
    kind: RegionKind,
    dirty: RegionBits,
    zero: RegionBits,
    /// Written since the last scan, and not to be taken before the next one.
    held: RegionBits,
    /// In hot windows, and not to be taken before all others.
    late: RegionBits,
    heat: Heat,
    sent: RegionBits,
    dirty_blocks: u64,
    zero_blocks: u64,
    held_blocks: u64,
    late_blocks: u64,
}

/// What taking blocks found.
pub(super) struct TakenBlocks {
    pub(super) zero: WindowBits,
    pub(super) first_time: u32,
}

impl RegionMarks {
    pub(super) fn all_dirty(kind: RegionKind, len: RegionLen) -> Self {
        Self::left(kind, RegionBits::full(len), RegionBits::empty(len))
    }

    /// Marks as an earlier process left them.
    pub(super) fn left(kind: RegionKind, dirty: RegionBits, sent: RegionBits) -> Self {
        let len = dirty.region_len();
        Self {
            kind,
            dirty_blocks: dirty.count(),
            zero: RegionBits::empty(len),
            held: RegionBits::empty(len),
            late: RegionBits::empty(len),
            heat: Heat::unknown(len.windows()),
            dirty,
            sent,
            zero_blocks: 0,
            held_blocks: 0,
            late_blocks: 0,
        }
    }

    pub(super) const fn kind(&self) -> RegionKind {
        self.kind
    }

    pub(super) const fn len(&self) -> RegionLen {
        self.dirty.region_len()
    }

    pub(super) const fn is_clean(&self) -> bool {
        self.dirty_blocks == 0
    }

    pub(super) const fn held_blocks(&self) -> u64 {
        self.held_blocks
    }

    pub(super) const fn late_blocks(&self) -> u64 {
        self.late_blocks
    }

    /// Whether no block can be taken.
    pub(super) const fn is_exhausted(&self) -> bool {
        self.dirty_blocks == self.held_blocks + self.late_blocks
    }

    /// Whether every dirty block of a window can be taken.
    pub(super) fn all_ready_in(&self, window: WindowIndex) -> bool {
        self.ready_in(window) == self.dirty.get(window)
    }

    /// The dirty blocks that can be taken.
    pub(super) fn ready_in(&self, window: WindowIndex) -> WindowBits {
        self.dirty
            .get(window)
            .minus(&self.held.get(window))
            .minus(&self.late.get(window))
    }

    pub(super) fn dirty_windows(&self) -> impl Iterator<Item = (WindowIndex, WindowBits)> + '_ {
        self.dirty.iter()
    }

    pub(super) fn dirty_in(&self, window: WindowIndex) -> WindowBits {
        self.dirty.get(window)
    }

    #[cfg(test)]
    pub(super) fn zero_in(&self, window: WindowIndex) -> WindowBits {
        self.zero.get(window)
    }

    #[cfg(test)]
    pub(super) fn sent_in(&self, window: WindowIndex) -> WindowBits {
        self.sent.get(window)
    }

    /// Windows of which blocks can be taken.
    pub(super) fn ready_windows(&self) -> impl Iterator<Item = WindowIndex> + '_ {
        let dirty = self.dirty.iter().map(|(window, _)| window);
        dirty.filter(|window| !self.ready_in(*window).is_empty())
    }

    pub(super) fn mark_dirty(&mut self, window: WindowIndex, bits: &WindowBits) {
        let bits = bits.and(&self.len().all_of(window));
        let new = bits.minus(&self.dirty.get(window));
        self.forget_zero(window, &bits);
        self.dirty.insert(window, &bits);
        self.dirty_blocks += u64::from(new.count());
    }

    /// Holds back the dirty ones among `bits`.
    pub(super) fn hold(&mut self, window: WindowIndex, bits: &WindowBits) {
        self.heat.found(window);
        let now_held = bits.and(&self.late.get(window));
        self.late.remove(window, &now_held);
        self.late_blocks -= u64::from(now_held.count());
        let new = bits.and(&self.ready_in(window));
        self.held.insert(window, &new);
        self.held_blocks += u64::from(new.count());
    }

    /// The marks of the region are about to be looked at.
    pub(super) fn look(&mut self) {
        self.heat.look();
    }

    /// Holds nothing back any more. Returns the windows of which something was held, or late.
    pub(super) fn release(&mut self) -> Vec<WindowIndex> {
        let mut windows = self.release_late();
        if self.held_blocks > 0 {
            windows.extend(self.held.iter().map(|(window, _)| window));
            self.held.clear();
            self.held_blocks = 0;
        }
        windows
    }

    /// The same, but what is in hot windows is late.
    pub(super) fn release_cold(&mut self) -> Vec<WindowIndex> {
        let windows = self.release();
        for window in &windows {
            if self.heat.is_hot(*window) {
                let late = self.dirty.get(*window).minus(&self.late.get(*window));
                self.late.insert(*window, &late);
                self.late_blocks += u64::from(late.count());
            }
        }
        windows
    }

    /// Nothing is late any more. Returns the windows of which something was.
    pub(super) fn release_late(&mut self) -> Vec<WindowIndex> {
        if self.late_blocks == 0 {
            return Vec::new();
        }
        let windows = self.late.iter().map(|(window, _)| window).collect();
        self.late.clear();
        self.late_blocks = 0;
        windows
    }

    pub(super) fn mark_all_dirty(&mut self) {
        self.dirty.fill();
        self.zero.clear();
        self.dirty_blocks = self.len().blocks();
        self.zero_blocks = 0;
    }

    pub(super) fn mark_zero(&mut self, window: WindowIndex, bits: &WindowBits) {
        let new = bits
            .and(&self.dirty.get(window))
            .minus(&self.zero.get(window));
        self.zero.insert(window, &new);
        self.zero_blocks += u64::from(new.count());
    }

    /// Takes `bits`, which are dirty, out of the dirty ones.
    pub(super) fn take(&mut self, window: WindowIndex, bits: &WindowBits) -> TakenBlocks {
        let zero = self.forget_zero(window, bits);
        let first_time = bits.minus(&self.sent.get(window)).count();
        let taken = bits.and(&self.dirty.get(window)).count();
        self.sent.insert(window, bits);
        self.dirty.remove(window, bits);
        self.dirty_blocks -= u64::from(taken);
        TakenBlocks { zero, first_time }
    }

    /// Makes the dirty blocks of a window clean without sending them, and returns them: the destination has them already, so they
    /// count as sent once.
    pub(super) fn have(&mut self, window: WindowIndex) -> WindowBits {
        let blocks = self.dirty.get(window);
        let _not_sent_now = self.take(window, &blocks);
        blocks
    }

    fn forget_zero(&mut self, window: WindowIndex, bits: &WindowBits) -> WindowBits {
        let zero = bits.and(&self.zero.get(window));
        self.zero.remove(window, &zero);
        self.zero_blocks -= u64::from(zero.count());
        zero
    }

    pub(super) fn dirty(&self) -> Dirty {
        let len = self.len();
        let last = WindowIndex(len.windows().saturating_sub(1));
        let last_bits = self.dirty.get(last);
        // Only a region's last block can be short.
        let missing = last_bits.count() * BLOCK_SIZE - len.bytes_of(last, &last_bits);
        Dirty {
            all: Amount {
                blocks: self.dirty_blocks,
                bytes: self.dirty_blocks * u64::from(BLOCK_SIZE) - u64::from(missing),
            },
            known_zero_blocks: self.zero_blocks,
        }
    }
}
