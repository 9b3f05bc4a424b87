//! The words of the mapped ledger, and the order in which they reach it.
//!
//! Owns nothing but a test's way to die between any two of them. Each store is one atomic operation with release order, so a
//! process that is killed leaves a beginning of their sequence; what that must mean is `ledger_file`'s.

use std::io;
use std::path::Path;

use vmferry_common::storage::{self, Storage};

/// The words.
#[derive(Debug)]
pub(super) struct Words {
    shared: Box<dyn storage::Words>,
    /// Stores that are still carried out: a test's way to die between any two.
    #[cfg(test)]
    pub(super) fuse: std::sync::atomic::AtomicUsize,
}

impl Words {
    pub(super) fn create(storage: &dyn Storage, path: &Path, count: usize) -> io::Result<Self> {
        storage.create_words(path, count).map(Self::of)
    }

    pub(super) fn open(storage: &dyn Storage, path: &Path, count: usize) -> io::Result<Self> {
        storage.open_words(path, count).map(Self::of)
    }

    fn of(shared: Box<dyn storage::Words>) -> Self {
        Self {
            shared,
            #[cfg(test)]
            fuse: usize::MAX.into(),
        }
    }

    #[cfg(test)]
    fn is_dead(&self) -> bool {
        use std::sync::atomic::Ordering;
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

    pub(super) fn get(&self, at: usize) -> u64 {
        self.shared.get(at)
    }

    pub(super) fn set(&self, at: usize, value: u64) {
        if !self.is_dead() {
            self.shared.set(at, value);
        }
    }

    pub(super) fn add(&self, at: usize, bits: u64) {
        if !self.is_dead() {
            self.shared.add(at, bits);
        }
    }

    pub(super) fn remove(&self, at: usize, bits: u64) {
        if !self.is_dead() {
            self.shared.remove(at, bits);
        }
    }
}
