//! What a lane has sent of blocks that are written again and again: the next copy of such a block goes as the difference to it.
//!
//! Owns a bounded number of blocks of memory, each in the one place that its position gives it. A block that was sent again since
//! another one wanted its place keeps it, so a working set beyond the bound does not drive itself out. As with the digests of
//! `sent`, a window's frames are applied in their order, so what is kept is what the destination has when the next frame is
//! applied: whatever is sent of a block has to be told here. Invariant: it lives no longer than its lane.

use std::fmt;

use vmferry_proto::geometry::{BLOCK_SIZE, WINDOW_BLOCKS, WindowRef};

/// Kept by all lanes of a session.
const MOST_BYTES: usize = 64 << 20;
/// Bytes of a block; a region's short last one is not kept.
const BLOCK: usize = BLOCK_SIZE as usize;
/// A block goes as a difference where at most one of so many words of it is another one: more of them would not get much smaller,
/// and what was compressible is less so as a difference.
const CHANGED_AT_MOST: usize = 4;

/// What one lane keeps.
pub struct KeptBlocks {
    lanes: usize,
    places: Vec<Place>,
    /// The content of each place; nothing before the first one is taken.
    content: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    of: Option<(WindowRef, u32)>,
    /// Sent again since another block wanted the place.
    used: bool,
}

impl fmt::Debug for KeptBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places = self.places.len();
        f.debug_struct("KeptBlocks")
            .field("places", &places)
            .finish_non_exhaustive()
    }
}

impl KeptBlocks {
    /// For one of `lanes` lanes.
    #[must_use]
    pub fn of_one(lanes: usize) -> Self {
        let lanes = lanes.max(1);
        Self {
            lanes,
            places: vec![Place::default(); (MOST_BYTES / BLOCK / lanes).max(1)],
            content: Vec::new(),
        }
    }

    /// What was sent last of a block, where it is kept.
    pub(crate) fn get(&self, window: WindowRef, block: u32) -> Option<&[u8]> {
        let index = self.index(window, block);
        let place = self.places.get(index)?;
        (place.of == Some((window, block)))
            .then(|| self.content.get(index * BLOCK..)?.get(..BLOCK))
            .flatten()
    }

    /// A block was sent with this content. It is kept if it was before, or, with `new`, where it finds its place free.
    pub(crate) fn put(&mut self, window: WindowRef, block: u32, content: &[u8], new: bool) {
        let (index, of) = (self.index(window, block), Some((window, block)));
        let Some(place) = self.places.get_mut(index) else {
            return;
        };
        if place.of == of {
            place.used = true;
        } else if !new || content.len() != BLOCK || std::mem::take(&mut place.used) {
            return;
        }
        place.of = of;
        if self.content.is_empty() {
            // Taken from the system as it is written to.
            self.content = vec![0; self.places.len() * BLOCK];
        }
        if let Some(kept) = self.content.get_mut(index * BLOCK..(index + 1) * BLOCK) {
            kept.copy_from_slice(content);
        }
    }

    /// A block was sent as zero.
    pub(crate) fn forget(&mut self, window: WindowRef, block: u32) {
        let index = self.index(window, block);
        if let Some(place) = self.places.get_mut(index)
            && place.of == Some((window, block))
        {
            *place = Place::default();
        }
    }

    /// The place of a block. The windows of a lane lie `lanes` apart; those of each region begin elsewhere.
    fn index(&self, window: WindowRef, block: u32) -> usize {
        let slot = window.window.0 as usize / self.lanes + usize::from(window.region.0) * 7919;
        (slot * WINDOW_BLOCKS as usize + block as usize) % self.places.len()
    }
}

/// Whether `content` as the difference to `base` is much smaller.
pub(crate) fn is_near(content: &[u8], base: &[u8]) -> bool {
    let words = content.chunks_exact(8).zip(base.chunks_exact(8));
    let changed = words
        .map(|(now, then)| usize::from(now != then))
        .sum::<usize>();
    changed * CHANGED_AT_MOST * 8 <= content.len()
}

/// Makes the difference of `content` to `base`, or the content of the difference.
pub(crate) fn difference(content: &mut [u8], base: &[u8]) {
    for (byte, base) in content.iter_mut().zip(base) {
        *byte ^= base;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_proto::geometry::WindowIndex;
    use vmferry_proto::ids::RegionId;

    fn at(window: u32) -> WindowRef {
        WindowRef {
            region: RegionId(0),
            window: WindowIndex(window),
        }
    }

    /// 256 blocks: blocks 0 and 256 of a window have one place.
    fn small() -> KeptBlocks {
        KeptBlocks::of_one(64)
    }

    #[test]
    fn only_what_was_sent_last_is_kept() {
        let mut kept = small();
        kept.put(at(3), 7, &[1; BLOCK], false);
        assert_eq!(kept.get(at(3), 7), None, "not asked for");
        kept.put(at(3), 7, &[1; BLOCK], true);
        assert_eq!(kept.get(at(3), 7), Some(&[1; BLOCK][..]));
        kept.put(at(3), 7, &[2; BLOCK], false);
        assert_eq!(kept.get(at(3), 7), Some(&[2; BLOCK][..]));
        assert_eq!(kept.get(at(3), 8), None);
        kept.forget(at(3), 263);
        assert!(kept.get(at(3), 7).is_some(), "another block of this place");
        kept.forget(at(3), 7);
        assert_eq!(kept.get(at(3), 7), None);
        kept.put(at(3), 7, &[1; 100], true);
        assert_eq!(kept.get(at(3), 7), None, "a short block");
    }

    #[test]
    fn a_block_that_is_sent_again_keeps_its_place() {
        let mut kept = small();
        kept.put(at(0), 0, &[1; BLOCK], true);
        kept.put(at(0), 256, &[2; BLOCK], true);
        assert_eq!(kept.get(at(0), 0), None, "it was never sent again");
        kept.put(at(0), 256, &[3; BLOCK], true);
        kept.put(at(0), 0, &[1; BLOCK], true);
        assert_eq!(kept.get(at(0), 256), Some(&[3; BLOCK][..]));
        kept.put(at(0), 0, &[1; BLOCK], true);
        assert_eq!(kept.get(at(0), 256), None, "not since it was wanted last");
    }

    #[test]
    fn a_block_is_near_where_few_words_differ() {
        let base: Vec<u8> = (0..BLOCK).map(|at| at.to_le_bytes()[0]).collect();
        let mut content = base.clone();
        for word in 0..128 {
            content[word * 8] ^= 1;
        }
        assert!(is_near(&content, &base));
        content[4088] ^= 1;
        assert!(!is_near(&content, &base));
        let mut made = content.clone();
        difference(&mut made, &base);
        assert_eq!(made.iter().filter(|byte| **byte != 0).count(), 129);
        difference(&mut made, &base);
        assert_eq!(made, content);
    }
}
