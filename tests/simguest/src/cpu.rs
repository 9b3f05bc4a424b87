//! The CPU state: everything outside RAM and disk that the guest needs to go on exactly.
//!
//! Owns its form as bytes, with a check sum so that a damaged state is refused and not run. It depends on every
//! step so far: the accumulator takes in what each step read.

use serde::{Deserialize, Serialize};

use crate::content::{Entry, Place, Random, mix, share};

/// What fills a page when it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// One eighth zero, half text, the rest random.
    Mixed,
    /// Does not compress.
    Random,
    /// All zero.
    Zero,
    /// Compresses about threefold.
    Text,
    /// Does not compress; every page and block is one of 512.
    Copies,
}

/// What the guest does while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Bytes of RAM written per second, in whole pages.
    pub dirty_rate: u64,
    /// Bytes of RAM among which they are spread.
    pub working_set: u64,
    /// Bytes of disk written per second.
    pub disk_rate: u64,
    /// Bytes of disk among which they are spread.
    pub disk_working_set: u64,
    /// What is written.
    pub content: Content,
    /// Microseconds from one beat to the next; 0 for none.
    pub beat_us: u64,
}

/// Registers, so to speak.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// Bytes of RAM that this state belongs to.
    pub ram_len: u64,
    /// Bytes of disk that this state belongs to.
    pub disk_len: u64,
    /// Seed of all content.
    pub seed: u64,
    /// Where the next step goes.
    pub random: Random,
    /// Pages written so far.
    pub steps: u64,
    /// Disk blocks written so far.
    pub disk_steps: u64,
    /// Number of the last beat.
    pub beats: u64,
    /// Takes in what every step saw.
    pub accumulator: u64,
    /// Sum over the entries of all pages of RAM.
    pub memory_sum: u64,
    /// Sum over the entries of all blocks of the disk.
    pub disk_sum: u64,
    /// What it is doing.
    pub workload: Workload,
}

/// Bytes that are not a CPU state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("these bytes are not a CPU state of this program, or were damaged on the way")]
pub struct BadState;

impl CpuState {
    /// The state as bytes: a check sum of 16 hexadecimal digits, then JSON.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let body = serde_json::to_vec(self).unwrap_or_default();
        let mut bytes = format!("{:016x}", checksum(&body)).into_bytes();
        bytes.extend(body);
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadState> {
        let (sum, body) = bytes.split_at_checked(16).ok_or(BadState)?;
        if sum != format!("{:016x}", checksum(body)).as_bytes() {
            return Err(BadState);
        }
        serde_json::from_slice(body).map_err(|_| BadState)
    }

    /// Takes note that the entry at `place` went from `old` to `new`, and of a word that was seen there.
    pub fn account(&mut self, place: Place, old: Entry, new: Entry, seen: u64) {
        let change = share(place, old) ^ share(place, new);
        match place {
            Place::Memory(_) => {
                self.memory_sum ^= change;
                self.steps += 1;
            }
            Place::Disk(_) => {
                self.disk_sum ^= change;
                self.disk_steps += 1;
            }
        }
        self.accumulator = mix(self.accumulator ^ change ^ seen.rotate_left(17));
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let start = mix(bytes.len() as u64);
    bytes
        .iter()
        .fold(start, |sum, byte| mix(sum ^ u64::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::{BadState, Content, CpuState, Workload};
    use crate::content::Random;

    #[test]
    fn a_state_survives_the_way_and_a_damaged_one_is_refused() {
        let state = CpuState {
            ram_len: 1,
            disk_len: 2,
            seed: u64::MAX,
            random: Random(u64::MAX - 1),
            steps: 3,
            disk_steps: 4,
            beats: 5,
            accumulator: 6,
            memory_sum: 7,
            disk_sum: 8,
            workload: Workload {
                dirty_rate: 9,
                working_set: 10,
                disk_rate: 11,
                disk_working_set: 12,
                content: Content::Mixed,
                beat_us: 13,
            },
        };
        let bytes = state.to_bytes();
        assert_eq!(CpuState::from_bytes(&bytes), Ok(state));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            assert_eq!(CpuState::from_bytes(&damaged), Err(BadState), "byte {at}");
        }
        assert_eq!(
            CpuState::from_bytes(&bytes[..bytes.len() - 1]),
            Err(BadState)
        );
        assert_eq!(CpuState::from_bytes(b""), Err(BadState));
    }
}
