//! Reading and writing a disk's runs over NBD.
//!
//! Owns the cut into requests and what is known to read as zero at the destination. Invariant: a block counts as
//! known zero only from the server's own word until a write to it begins.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::try_join_all;
use vmferry_proto::geometry::{
    BLOCK_SIZE, RegionBits, RegionLen, Run, WINDOW_SIZE, WindowBits, WindowIndex,
};

use super::nbd::{MAX_TRANSFER, Nbd, wire};
use crate::error::GuestError;
use crate::guest::{RegionReader, RegionWriter};

/// Meta context of holes and zeroes.
pub(super) const ALLOCATION: &str = "base:allocation";

/// The connection to one disk, which may come and go while handles to it live on.
#[derive(Debug)]
pub(super) struct DiskHandle {
    name: String,
    len: RegionLen,
    nbd: Mutex<Option<Nbd>>,
    known_zero: Mutex<RegionBits>,
}

/// The guarded values are plain data: a panic elsewhere leaves them valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DiskHandle {
    pub(super) fn new(name: &str, len: RegionLen) -> Self {
        Self {
            name: name.to_owned(),
            len,
            nbd: Mutex::new(None),
            known_zero: Mutex::new(RegionBits::empty(len)),
        }
    }

    /// Uses `nbd` from now on.
    pub(super) fn open(&self, nbd: Nbd) -> Result<(), GuestError> {
        if nbd.size() != self.len.0 {
            return Err(GuestError::Incompatible(format!(
                "disk {} is {} bytes by its description and {} bytes by its NBD export: was it resized just now? Migrate again",
                self.name,
                self.len.0,
                nbd.size()
            )));
        }
        *lock(&self.nbd) = Some(nbd);
        Ok(())
    }

    /// Lets the connection go; requests under way fail.
    pub(super) fn close(&self) {
        lock(&self.nbd).take();
    }

    pub(super) fn is_open(&self) -> bool {
        lock(&self.nbd).is_some()
    }

    pub(super) fn nbd(&self) -> Result<Nbd, GuestError> {
        let nbd = lock(&self.nbd).clone();
        nbd.ok_or_else(|| GuestError::Refused {
            command: format!("disk {}", self.name),
            answer: "its NBD export is closed".to_owned(),
        })
    }

    /// Blocks that the server says read as zero.
    pub(super) async fn zeroes(&self) -> Result<RegionBits, GuestError> {
        let extents = self.nbd()?.extents(ALLOCATION, 0, self.len.0).await?;
        let mut zero = RegionBits::empty(self.len);
        let mut at = 0;
        for extent in extents {
            if extent.status & wire::STATUS_ZERO != 0 {
                zero.insert_whole_blocks(at, u64::from(extent.len));
            }
            at += u64::from(extent.len);
        }
        Ok(zero)
    }

    /// Asks which blocks read as zero, for [`RegionWriter::zero`]. Nothing may be written meanwhile.
    pub(super) async fn learn_zeroes(&self) -> Result<(), GuestError> {
        let zero = self.zeroes().await?;
        *lock(&self.known_zero) = zero;
        Ok(())
    }

    fn check(&self, runs: &[Run], len: usize) -> Result<(), GuestError> {
        let total: u64 = runs.iter().map(|run| u64::from(run.len)).sum();
        if total == len as u64 {
            return Ok(());
        }
        Err(GuestError::Refused {
            command: format!("disk {}", self.name),
            answer: format!("{total} bytes named, {len} given"),
        })
    }

    /// What of `run` is not known to be zero.
    fn not_zero(&self, run: &Run) -> Vec<Run> {
        let known = lock(&self.known_zero);
        let mut out: Vec<Run> = Vec::new();
        for (window, bits) in blocks_of(run, self.len) {
            let unknown = bits.minus(&known.get(window));
            for part in self.len.runs(window, &unknown) {
                match out.last_mut() {
                    Some(last) if last.offset + u64::from(last.len) == part.offset => {
                        last.len += part.len;
                    }
                    _ => out.push(part),
                }
            }
        }
        out
    }
}

/// The windows and blocks that `run` touches.
fn blocks_of(run: &Run, len: RegionLen) -> impl Iterator<Item = (WindowIndex, WindowBits)> {
    let end = run.offset.saturating_add(u64::from(run.len)).min(len.0);
    let first = run.offset / u64::from(WINDOW_SIZE);
    let last = end.div_ceil(u64::from(WINDOW_SIZE));
    let (offset, windows) = (run.offset, first..last.max(first));
    windows.filter_map(move |index| {
        let window = WindowIndex(u32::try_from(index).ok()?);
        let base = window.offset();
        let from = offset.max(base) - base;
        let to = end.min(base + u64::from(WINDOW_SIZE)).checked_sub(base)?;
        // A run of no bytes, or one behind the end, touches no block.
        (from < to).then_some(())?;
        let block = u64::from(BLOCK_SIZE);
        let from = u32::try_from(from / block).ok()?;
        let to = u32::try_from(to.div_ceil(block)).ok()?;
        Some((window, WindowBits::span(from, to)))
    })
}

/// Pieces of `runs` that one request carries, each with its place in a buffer that holds the runs one behind the other.
fn pieces(runs: &[Run]) -> Vec<(u64, usize, u32)> {
    let mut out = Vec::new();
    let mut place = 0;
    for run in runs {
        let mut done = 0;
        while done < run.len {
            let len = (run.len - done).min(MAX_TRANSFER);
            out.push((run.offset + u64::from(done), place, len));
            place += len as usize;
            done += len;
        }
    }
    out
}

#[async_trait]
impl RegionReader for DiskHandle {
    async fn read(&self, runs: &[Run], buf: &mut [u8]) -> Result<(), GuestError> {
        self.check(runs, buf.len())?;
        let nbd = self.nbd()?;
        let pieces = pieces(runs);
        let reads = pieces
            .iter()
            .map(|(offset, _, len)| nbd.read(*offset, *len));
        let data = try_join_all(reads).await?;
        for ((_, place, _), data) in pieces.iter().zip(data) {
            buf[*place..*place + data.len()].copy_from_slice(&data);
        }
        Ok(())
    }
}

#[async_trait]
impl RegionWriter for DiskHandle {
    async fn write(&self, runs: &[Run], data: &[u8]) -> Result<(), GuestError> {
        self.check(runs, data.len())?;
        let nbd = self.nbd()?;
        {
            let mut known = lock(&self.known_zero);
            for run in runs {
                blocks_of(run, self.len).for_each(|(window, bits)| known.remove(window, &bits));
            }
        }
        let pieces = pieces(runs);
        let writes = pieces.iter().map(|(offset, place, len)| {
            let part = &data[*place..*place + *len as usize];
            nbd.write(*offset, Bytes::copy_from_slice(part))
        });
        try_join_all(writes).await?;
        Ok(())
    }

    async fn zero(&self, runs: &[Run]) -> Result<(), GuestError> {
        let unknown: Vec<Run> = runs.iter().flat_map(|run| self.not_zero(run)).collect();
        let nbd = self.nbd()?;
        try_join_all(
            unknown
                .iter()
                .map(|run| nbd.write_zeroes(run.offset, run.len)),
        )
        .await?;
        let mut known = lock(&self.known_zero);
        for run in &unknown {
            known.insert_whole_blocks(run.offset, u64::from(run.len));
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), GuestError> {
        Ok(self.nbd()?.flush().await?)
    }
}

/// Handles of all disks, flushed together.
pub(super) async fn flush_all(disks: &[Arc<DiskHandle>]) -> Result<(), GuestError> {
    try_join_all(disks.iter().map(|disk| disk.flush())).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmferry_proto::geometry::{RegionBits, RegionLen, Run, WindowBits, WindowIndex};

    use super::{DiskHandle, blocks_of, lock, pieces};

    proptest! {
        #[test]
        fn blocks_of_a_run_are_those_that_its_bytes_touch(len in 1u64..9_000_000, from in 0u64..9_000_000, bytes in 0u32..5_000_000) {
            let len = RegionLen(len);
            let run = Run { offset: from, len: bytes };
            let mut naive = RegionBits::empty(len);
            naive.insert_bytes(from, u64::from(bytes));
            let mut found = RegionBits::empty(len);
            blocks_of(&run, len).for_each(|(window, bits)| found.insert(window, &bits));
            prop_assert_eq!(found, naive);
        }

        #[test]
        fn an_empty_run_touches_no_block(from in 0u64..9_000_000) {
            let run = Run { offset: from, len: 0 };
            prop_assert_eq!(blocks_of(&run, RegionLen(5_038_081)).count(), 0);
        }

        #[test]
        fn pieces_cover_runs_in_order(lens in prop::collection::vec(1u32..5_000_000, 0..5)) {
            let runs: Vec<Run> = lens.iter().enumerate().map(|(at, len)| Run { offset: at as u64 * (1 << 30), len: *len }).collect();
            let mut place = 0;
            let mut bytes = 0u64;
            for (_, at, len) in pieces(&runs) {
                prop_assert_eq!(at, place);
                prop_assert!(len > 0 && len <= super::MAX_TRANSFER);
                place += len as usize;
                bytes += u64::from(len);
            }
            prop_assert_eq!(bytes, lens.iter().map(|len| u64::from(*len)).sum::<u64>());
        }
    }

    #[test]
    fn only_blocks_not_known_zero_are_zeroed() {
        let disk = DiskHandle::new("d", RegionLen(4 << 20));
        lock(&disk.known_zero).insert(WindowIndex(0), &WindowBits::span(1, 511));
        let whole = Run {
            offset: 0,
            len: 4 << 20,
        };
        let wanted = [
            Run {
                offset: 0,
                len: 4096,
            },
            Run {
                offset: 511 * 4096,
                len: (2 << 20) + 4096,
            },
        ];
        assert_eq!(disk.not_zero(&whole), wanted);
    }
}
