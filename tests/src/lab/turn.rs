//! Turns: how many guests of the lab run on this machine at one time.
//!
//! An emulated processor takes a core of the host, and so do two agents. With more guests than that, boots and copies only
//! slow each other down, until time limits that are wide for one guest are not for eight. Test processes share the turns
//! by locked files, so `cargo test` may run as many threads as it likes. A test that holds one guest while it makes
//! another could wait for itself: it must drop the first.

use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::cache;

/// Guests at a time: there are rarely more cores to spare.
const TURNS: usize = 2;
const POLL: Duration = Duration::from_millis(50);

/// The right to run a guest; given back when dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    _lock: File,
}

impl Turn {
    /// Waits for a turn.
    pub(crate) fn wait() -> Result<Self> {
        let folder = cache();
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        let files: Vec<File> = (0..TURNS)
            .map(|turn| File::create(folder.join(format!("turn-{turn}.lock"))))
            .collect::<Result<_, _>>()?;
        loop {
            for lock in &files {
                match flock(lock, FlockOperation::NonBlockingLockExclusive) {
                    // The clone is the same open file: its lock is.
                    Ok(()) => {
                        return Ok(Self {
                            _lock: lock.try_clone()?,
                        });
                    }
                    Err(Errno::WOULDBLOCK) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            thread::sleep(POLL);
        }
    }
}
