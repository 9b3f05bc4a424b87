//! Sets of pages of one memory range.
//!
//! Owns the bit set in which scans are answered and its ranges of bytes. Indices count 4 KiB pages from the start
//! of the range; nothing outside the range is ever in the set.

use std::ops::Range;

use crate::sys::PAGE_SIZE;

/// Pages of one range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// No page of a range of `len` bytes.
    #[must_use]
    pub fn empty(len: u64) -> Self {
        let pages = len.div_ceil(PAGE_SIZE);
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            pages,
            words: vec![0; words],
        }
    }

    /// Every page of a range of `len` bytes.
    #[must_use]
    pub fn full(len: u64) -> Self {
        let mut all = Self::empty(len);
        all.insert_bytes(0..len);
        all
    }

    /// The set over a range of `len` bytes whose pages are the bits of `words`, lowest first; what lies outside is ignored.
    #[must_use]
    pub fn of_words(len: u64, words: impl IntoIterator<Item = u64>) -> Self {
        let mut set = Self::empty(len);
        for (index, (slot, word)) in set.words.iter_mut().zip(words).enumerate() {
            *slot = word & inside(set.pages, index);
        }
        set
    }

    /// Indices of the words that hold the pages of `bytes`.
    pub(crate) fn words_of(bytes: &Range<u64>) -> Range<usize> {
        let word = |page: u64| usize::try_from(page).unwrap_or(usize::MAX);
        word(bytes.start / PAGE_SIZE / 64)..word(bytes.end.div_ceil(PAGE_SIZE).div_ceil(64))
    }

    /// The bits of 64 pages that exist, of which the first is page 64 × `index`.
    pub(crate) fn inside(&self, index: usize) -> u64 {
        inside(self.pages, index)
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Adds every page that `bytes` (from the start of the range) touch; what lies outside is ignored.
    pub fn insert_bytes(&mut self, bytes: Range<u64>) {
        let end = bytes.end.div_ceil(PAGE_SIZE).min(self.pages);
        let mut page = bytes.start / PAGE_SIZE;
        while page < end {
            let (index, low) = ((page / 64) as usize, page % 64);
            let count = (64 - low).min(end - page);
            let ones = if count == 64 {
                u64::MAX
            } else {
                ((1 << count) - 1) << low
            };
            self.words[index] |= ones;
            page += count;
        }
    }

    /// Whether `page` is in the set.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Number of pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Pages in either set; both are of one range.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Pages in both sets.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Pages in this set and not in `other`.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Runs of neighbouring pages as bytes from the start of the range, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut page = 0;
        std::iter::from_fn(move || {
            let start = self.next(page, true)?;
            let end = self.next(start, false).unwrap_or(self.pages);
            page = end;
            Some(start * PAGE_SIZE..end * PAGE_SIZE)
        })
    }

    /// First page from `from` on that is (`set`) or is not in the set.
    fn next(&self, from: u64, set: bool) -> Option<u64> {
        let mut page = from;
        while page < self.pages {
            let word = self.words[(page / 64) as usize];
            let wanted = if set { word } else { !word } >> (page % 64);
            if wanted != 0 {
                let found = page + u64::from(wanted.trailing_zeros());
                return (found < self.pages).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    fn zip(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            pages: self.pages,
            words: (self.words.iter().zip(&other.words))
                .map(|(a, b)| f(*a, *b))
                .collect(),
        }
    }
}

fn inside(pages: u64, index: usize) -> u64 {
    match pages.saturating_sub(index as u64 * 64) {
        64.. => u64::MAX,
        left => (1 << left) - 1,
    }
}
