//! Blocks, windows and the sets of them: how every region of a guest is cut up.
//!
//! A region is cut into blocks of 4 KiB (the last may be short) and windows of 512 blocks. Owns the
//! arithmetic and the bit sets; it does not know what a region is made of.

use serde::{Deserialize, Serialize};

use crate::ids::RegionId;

#[cfg(test)]
mod tests;

/// Bytes of a block: the unit of dirtiness.
pub const BLOCK_SIZE: u32 = 4096;
/// Blocks of a window: the unit of order and of transfer.
pub const WINDOW_BLOCKS: u32 = 512;
/// Bytes of a window.
pub const WINDOW_SIZE: u32 = BLOCK_SIZE * WINDOW_BLOCKS;

/// Index of a window within its region.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct WindowIndex(pub u32);

/// A window of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WindowRef {
    /// The region.
    pub region: RegionId,
    /// The window within it.
    pub window: WindowIndex,
}

/// A contiguous byte range of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// First byte, from the start of the region.
    pub offset: u64,
    /// Length in bytes.
    pub len: u32,
}

/// Length of a region in bytes, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RegionLen(pub u64);

impl RegionLen {
    /// Number of blocks, the short last one included.
    #[must_use]
    pub const fn blocks(self) -> u64 {
        self.0.div_ceil(BLOCK_SIZE as u64)
    }

    /// Number of windows, the short last one included. Saturates: `limits` caps region lengths far below.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        reason = "compared with the largest value before; try_from is not const"
    )]
    pub const fn windows(self) -> u32 {
        let windows = self.0.div_ceil(WINDOW_SIZE as u64);
        if windows > u32::MAX as u64 {
            u32::MAX
        } else {
            windows as u32
        }
    }

    /// Number of blocks in `window`: 512 but for the last window; 0 outside the region.
    #[must_use]
    pub fn blocks_in(self, window: WindowIndex) -> u32 {
        let before = u64::from(window.0) * u64::from(WINDOW_BLOCKS);
        let left = self.blocks().saturating_sub(before);
        u32::try_from(left).unwrap_or(u32::MAX).min(WINDOW_BLOCKS)
    }

    /// Length in bytes of block `block` of `window`: 4096 but for a short last block; 0 outside the region.
    #[must_use]
    pub fn block_len(self, window: WindowIndex, block: u32) -> u32 {
        let start = window.offset() + u64::from(block) * u64::from(BLOCK_SIZE);
        let left = self.0.saturating_sub(start);
        u32::try_from(left).unwrap_or(u32::MAX).min(BLOCK_SIZE)
    }

    /// All blocks that `window` has in this region.
    #[must_use]
    pub fn all_of(self, window: WindowIndex) -> WindowBits {
        WindowBits::first(self.blocks_in(window))
    }

    /// Bytes that the blocks `bits` of `window` hold; blocks outside the region hold none.
    #[must_use]
    pub fn bytes_of(self, window: WindowIndex, bits: &WindowBits) -> u32 {
        let bits = bits.and(&self.all_of(window));
        let last = self.blocks_in(window).saturating_sub(1);
        let full = bits.count() * BLOCK_SIZE;
        if bits.contains(last) {
            full - (BLOCK_SIZE - self.block_len(window, last))
        } else {
            full
        }
    }

    /// The byte ranges of blocks `bits` of `window` within the region, ascending, neighbours joined.
    #[must_use]
    pub fn runs(self, window: WindowIndex, bits: &WindowBits) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for block in bits.and(&self.all_of(window)).iter() {
            let offset = window.offset() + u64::from(block) * u64::from(BLOCK_SIZE);
            let len = self.block_len(window, block);
            match runs.last_mut() {
                Some(run) if run.offset + u64::from(run.len) == offset => run.len += len,
                _ => runs.push(Run { offset, len }),
            }
        }
        runs
    }
}

impl WindowIndex {
    /// First byte of the window, from the start of the region.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 as u64 * WINDOW_SIZE as u64
    }
}

/// A set of blocks of one window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WindowBits(pub [u64; 8]);

impl WindowBits {
    /// No block.
    pub const EMPTY: Self = Self([0; 8]);
    /// All 512 blocks.
    pub const FULL: Self = Self([u64::MAX; 8]);

    /// The first `count` blocks.
    #[must_use]
    pub fn first(count: u32) -> Self {
        Self::span(0, count)
    }

    /// Blocks `from..to`, cut to 512.
    #[must_use]
    pub fn span(from: u32, to: u32) -> Self {
        let mut bits = Self::EMPTY;
        for (base, word) in (0u32..).step_by(64).zip(&mut bits.0) {
            let low = from.saturating_sub(base).min(64);
            let high = to.saturating_sub(base).min(64);
            if low < high {
                let ones = if high - low == 64 {
                    u64::MAX
                } else {
                    (1 << (high - low)) - 1
                };
                *word = ones << low;
            }
        }
        bits
    }

    /// Whether `block` is in the set.
    #[must_use]
    pub const fn contains(&self, block: u32) -> bool {
        block < WINDOW_BLOCKS && self.0[block as usize / 64] & (1 << (block % 64)) != 0
    }

    /// Adds `block`; blocks past 511 are ignored.
    pub const fn insert(&mut self, block: u32) {
        if block < WINDOW_BLOCKS {
            self.0[block as usize / 64] |= 1 << (block % 64);
        }
    }

    /// Number of blocks in the set.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    /// Blocks in either set.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Blocks in both sets.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Blocks in this set and not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// The highest block of the set.
    #[must_use]
    pub fn last(&self) -> Option<u32> {
        let words = (0u32..).zip(&self.0);
        let (index, word) = words.filter(|(_, word)| **word != 0).last()?;
        Some(index * 64 + 63 - word.leading_zeros())
    }

    /// The lowest `count` blocks of the set.
    #[must_use]
    pub fn lowest(&self, count: u32) -> Self {
        let mut out = Self::EMPTY;
        self.iter()
            .take(count as usize)
            .for_each(|block| out.insert(block));
        out
    }

    /// The blocks, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0u32..).step_by(64).zip(&self.0).flat_map(|(base, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    base + bit
                })
            })
        })
    }

    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self(std::array::from_fn(|index| {
            f(self.0[index], other.0[index])
        }))
    }
}

/// A set of blocks of one region, window by window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionBits {
    len: RegionLen,
    windows: Vec<WindowBits>,
}

impl RegionBits {
    /// The empty set over a region of `len` bytes.
    #[must_use]
    pub fn empty(len: RegionLen) -> Self {
        Self {
            len,
            windows: vec![WindowBits::EMPTY; len.windows() as usize],
        }
    }

    /// Every block of a region of `len` bytes.
    #[must_use]
    pub fn full(len: RegionLen) -> Self {
        let mut all = Self::empty(len);
        all.fill();
        all
    }

    /// The region's length.
    #[must_use]
    pub const fn region_len(&self) -> RegionLen {
        self.len
    }

    /// Number of windows.
    #[must_use]
    pub fn windows(&self) -> u32 {
        self.len.windows()
    }

    /// Blocks of `window` in the set; empty outside the region.
    #[must_use]
    pub fn get(&self, window: WindowIndex) -> WindowBits {
        self.windows
            .get(window.0 as usize)
            .copied()
            .unwrap_or_default()
    }

    /// Adds `bits` of `window`; what lies outside the region is ignored.
    pub fn insert(&mut self, window: WindowIndex, bits: &WindowBits) {
        let inside = self.len.all_of(window);
        if let Some(slot) = self.windows.get_mut(window.0 as usize) {
            *slot = slot.or(&bits.and(&inside));
        }
    }

    /// Takes `bits` of `window` out of the set.
    pub fn remove(&mut self, window: WindowIndex, bits: &WindowBits) {
        if let Some(slot) = self.windows.get_mut(window.0 as usize) {
            *slot = slot.minus(bits);
        }
    }

    /// Adds every block that bytes `offset..offset + len` touch; what lies outside the region is ignored.
    pub fn insert_bytes(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len.0);
        if offset >= end {
            return;
        }
        let (first, last) = (
            offset / u64::from(BLOCK_SIZE),
            end.div_ceil(u64::from(BLOCK_SIZE)),
        );
        self.insert_blocks(first, last);
    }

    /// Adds every block that lies wholly (the region's short last block included) within bytes `offset..offset + len`.
    pub fn insert_whole_blocks(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len.0);
        let first = offset.div_ceil(u64::from(BLOCK_SIZE));
        let last = if end == self.len.0 {
            self.len.blocks()
        } else {
            end / u64::from(BLOCK_SIZE)
        };
        self.insert_blocks(first, last);
    }

    fn insert_blocks(&mut self, first: u64, end: u64) {
        let per_window = u64::from(WINDOW_BLOCKS);
        for window in first / per_window..end.div_ceil(per_window) {
            let within = |block: u64| {
                let block = block.saturating_sub(window * per_window).min(per_window);
                u32::try_from(block).unwrap_or(WINDOW_BLOCKS)
            };
            let bits = WindowBits::span(within(first), within(end));
            if let Ok(window) = u32::try_from(window) {
                self.insert(WindowIndex(window), &bits);
            }
        }
    }

    /// Adds every block of `other`, which is over a region of the same length.
    pub fn union(&mut self, other: &Self) {
        for (slot, bits) in self.windows.iter_mut().zip(&other.windows) {
            *slot = slot.or(bits);
        }
    }

    /// Every block.
    pub fn fill(&mut self) {
        for window in 0..self.len.windows() {
            self.windows[window as usize] = self.len.all_of(WindowIndex(window));
        }
    }

    /// No block.
    pub fn clear(&mut self) {
        self.windows.fill(WindowBits::EMPTY);
    }

    /// Number of blocks in the set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.windows
            .iter()
            .map(|bits| u64::from(bits.count()))
            .sum()
    }

    /// Whether the set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.windows.iter().all(WindowBits::is_empty)
    }

    /// The windows that have blocks in the set, ascending, with those blocks.
    pub fn iter(&self) -> impl Iterator<Item = (WindowIndex, WindowBits)> + '_ {
        (0u32..)
            .map(WindowIndex)
            .zip(self.windows.iter().copied())
            .filter(|(_, bits)| !bits.is_empty())
    }
}
