//! Files of words in the run folder, as the agents' mapped ledger and notes are.
//!
//! Owns their contents and, for each store, the moment at which an agent may be killed: what it stored before stays, what it
//! stores after never was. Sparse, as such files are: hardly any of their words is not zero.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_common::storage::Words;

use super::plan::Class;
use super::world::{Node, Stop};

/// A file.
#[derive(Debug)]
pub(super) struct WordFile {
    len: usize,
    words: Mutex<HashMap<usize, u64>>,
}

impl WordFile {
    pub(super) fn new(len: usize) -> Arc<Self> {
        Arc::new(Self {
            len,
            words: Mutex::default(),
        })
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    fn words(&self) -> MutexGuard<'_, HashMap<usize, u64>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, at: usize) -> u64 {
        self.words().get(&at).copied().unwrap_or(0)
    }

    fn set(&self, at: usize, value: u64) {
        if value == 0 {
            self.words().remove(&at);
        } else {
            self.words().insert(at, value);
        }
    }
}

/// A file of words in the hands of one life of an agent.
#[derive(Debug)]
pub(super) struct NodeWords {
    node: Node,
    file: Arc<WordFile>,
}

impl NodeWords {
    pub(super) fn new(node: &Node, file: Arc<WordFile>) -> Self {
        Self {
            node: node.clone(),
            file,
        }
    }

    /// One store, where it changes anything: nobody sees the others. It cannot fail.
    fn store(&self, at: usize, value: u64) {
        if at >= self.file.len || self.file.get(at) == value {
            return;
        }
        let mut state = self.node.world.state();
        if let Err(Stop::Dead) = self.node.enter(&mut state, Class::Notes) {
            return;
        }
        self.file.set(at, value);
        // Whoever is dead from here on stores nothing more.
        let _ = self.node.leave(&mut state, Class::Notes);
    }
}

impl Words for NodeWords {
    fn get(&self, at: usize) -> u64 {
        self.file.get(at)
    }

    fn set(&self, at: usize, value: u64) {
        self.store(at, value);
    }

    fn add(&self, at: usize, bits: u64) {
        self.store(at, self.file.get(at) | bits);
    }

    fn remove(&self, at: usize, bits: u64) {
        self.store(at, self.file.get(at) & !bits);
    }
}
