//! The words of the mapped ledger, and the order in which they reach it.
//!
//! Owns single stores. Each is one atomic operation with release order, so a process that is killed between any two leaves
//! a beginning of their sequence; what that must mean is `ledger_file`'s.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use vmferry_memtrack::SharedWords;

/// The words.
#[derive(Debug)]
pub(super) struct Words {
    shared: SharedWords,
    /// Stores that are still carried out: a test's way to die between any two.
    #[cfg(test)]
    pub(super) fuse: std::sync::atomic::AtomicUsize,
}

impl Words {
    pub(super) fn create(path: &Path, count: usize) -> io::Result<Self> {
        SharedWords::create(path, count).map(Self::of)
    }

    pub(super) fn open(path: &Path, count: usize) -> io::Result<Self> {
        SharedWords::open(path, count).map(Self::of)
    }

    fn of(shared: SharedWords) -> Self {
        Self {
            shared,
            #[cfg(test)]
            fuse: usize::MAX.into(),
        }
    }

    #[cfg(test)]
    fn is_dead(&self) -> bool {
        let burnt = self
            .fuse
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            });
        burnt.is_err()
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "its twin for tests has a fuse")]
    const fn is_dead(&self) -> bool {
        false
    }

    /// Zero outside.
    pub(super) fn get(&self, at: usize) -> u64 {
        let word = self.shared.words().get(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(super) fn set(&self, at: usize, value: u64) {
        if let Some(word) = self.shared.words().get(at)
            && !self.is_dead()
        {
            word.store(value, Ordering::Release);
        }
    }

    /// Adds bits; stores nothing where they are there.
    pub(super) fn add(&self, at: usize, bits: u64) {
        if self.get(at) & bits != bits
            && let Some(word) = self.shared.words().get(at)
            && !self.is_dead()
        {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Takes bits away.
    pub(super) fn remove(&self, at: usize, bits: u64) {
        if self.get(at) & bits != 0
            && let Some(word) = self.shared.words().get(at)
            && !self.is_dead()
        {
            word.fetch_and(!bits, Ordering::AcqRel);
        }
    }
}
