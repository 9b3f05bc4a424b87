//! Which blocks of the guest have been accounted for: the completeness rule of the destination.
//!
//! Owns one bit set per region, tied to the incarnation of its copy: when a copy begins anew from nothing, so does its
//! set. A copy is complete when every block of every region was received at least once, as data or as zero; the order
//! of later copies is the lanes' affair.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_proto::frame::BlockRef;
use vmferry_proto::geometry::{RegionBits, WindowBits, WindowIndex};
use vmferry_proto::ids::{Incarnation, RegionId};
use vmferry_proto::spec::GuestSpec;

use crate::durable::Applied;

/// Blocks received, by region.
#[derive(Debug)]
pub(crate) struct Coverage {
    regions: Vec<Mutex<Received>>,
    /// Where a later agent finds the same.
    kept: Option<Arc<Applied>>,
}

#[derive(Debug)]
struct Received {
    name: String,
    incarnation: Incarnation,
    bits: RegionBits,
}

/// A block that nobody sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{missing} blocks of region {region} were never sent, the first of them block {block} of window {window}",
    window = window.0
)]
pub(crate) struct Incomplete {
    region: String,
    window: WindowIndex,
    block: u32,
    missing: u64,
}

impl Coverage {
    /// Nothing received yet of the guest `spec`, whose copies are `incarnations`.
    pub(crate) fn new(spec: &GuestSpec, incarnations: &[Incarnation]) -> Self {
        let regions = spec.regions.iter().zip(incarnations);
        Self {
            regions: regions
                .map(|(region, incarnation)| {
                    Mutex::new(Received {
                        name: region.name.clone(),
                        incarnation: *incarnation,
                        bits: RegionBits::empty(region.len),
                    })
                })
                .collect(),
            kept: None,
        }
    }

    /// What an earlier agent had received, and noted in `kept`, of copies that were `incarnations`. All that is received is noted
    /// there from here on.
    pub(crate) fn kept(spec: &GuestSpec, incarnations: &[Incarnation], kept: Arc<Applied>) -> Self {
        let mut coverage = Self::new(spec, incarnations);
        for (slot, region) in coverage.regions.iter().zip(&spec.regions) {
            if let Some(bits) = kept.received(region.id) {
                lock(slot).bits.union(&bits);
            }
        }
        coverage.kept = Some(kept);
        coverage
    }

    /// Where it is noted for a later agent.
    pub(crate) fn noted_in(&self) -> Option<Arc<Applied>> {
        self.kept.clone()
    }

    /// Begins again with each region whose copy is a new one.
    pub(crate) fn renew(&self, incarnations: &[Incarnation]) {
        let regions = self.regions.iter().zip(incarnations);
        for ((slot, incarnation), region) in regions.zip((0u16..).map(RegionId)) {
            let mut received = lock(slot);
            if received.incarnation != *incarnation {
                if let Some(kept) = &self.kept {
                    kept.forget(region);
                }
                received.incarnation = *incarnation;
                received.bits.clear();
            }
        }
    }

    /// Notes that `bits` of a window were received and written.
    pub(crate) fn note(&self, region: RegionId, window: WindowIndex, bits: &WindowBits) {
        if let Some(slot) = self.regions.get(usize::from(region.0)) {
            lock(slot).bits.insert(window, bits);
        }
        if let Some(kept) = &self.kept {
            kept.note(region, window, bits);
        }
    }

    /// The first of these blocks that was not received.
    pub(crate) fn missing(&self, blocks: &[BlockRef]) -> Option<BlockRef> {
        let mut runs = blocks.chunk_by(|one, next| one.region == next.region);
        runs.find_map(|run| {
            let region = run.first()?.region;
            let received = self.regions.get(usize::from(region.0)).map(lock);
            let has = |at: &&BlockRef| {
                let received = received.as_ref();
                received.is_some_and(|it| it.bits.get(at.window).contains(u32::from(at.block)))
            };
            run.iter().find(|at| !has(at)).copied()
        })
    }

    /// Whether every block of a window that the region has was received.
    pub(crate) fn is_whole(&self, region: RegionId, window: WindowIndex) -> bool {
        self.regions
            .get(usize::from(region.0))
            .is_some_and(|slot| lock(slot).is_whole(window))
    }

    /// Fails with the first region that has a block which was never received.
    pub(crate) fn check(&self) -> Result<(), Incomplete> {
        self.regions.iter().try_for_each(|slot| lock(slot).check())
    }
}

impl Received {
    /// Blocks of a window that were never received.
    fn missing(&self, window: WindowIndex) -> WindowBits {
        let all = self.bits.region_len().all_of(window);
        all.minus(&self.bits.get(window))
    }

    fn is_whole(&self, window: WindowIndex) -> bool {
        window.0 < self.bits.windows() && self.missing(window).is_empty()
    }

    fn check(&self) -> Result<(), Incomplete> {
        let len = self.bits.region_len();
        let gap = (0..self.bits.windows())
            .map(WindowIndex)
            .find_map(|window| {
                let first = self.missing(window).iter().next();
                first.map(|block| (window, block))
            });
        match gap {
            None => Ok(()),
            Some((window, block)) => Err(Incomplete {
                region: self.name.clone(),
                window,
                block,
                missing: len.blocks() - self.bits.count(),
            }),
        }
    }
}

fn lock(slot: &Mutex<Received>) -> MutexGuard<'_, Received> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use vmferry_proto::geometry::{RegionLen, WINDOW_SIZE};
    use vmferry_proto::spec::{RegionKind, RegionSpec, RunState};

    use super::*;

    fn spec(lens: &[u64]) -> GuestSpec {
        GuestSpec {
            name: "web-1".parse().unwrap(),
            uuid: None,
            driver: "sim".into(),
            hypervisor_version: "1".into(),
            machine: "sim".into(),
            cpu_model: "sim".into(),
            vcpus: 1,
            run_state: RunState::Running,
            regions: (0u16..)
                .zip(lens)
                .map(|(id, len)| RegionSpec {
                    id: RegionId(id),
                    name: format!("region-{id}"),
                    kind: RegionKind::Memory,
                    len: RegionLen(*len),
                })
                .collect(),
            shared_disks: Vec::new(),
            devices: Vec::new(),
        }
    }

    const OLD: Incarnation = Incarnation::from_bytes([1; 16]);
    const NEW: Incarnation = Incarnation::from_bytes([2; 16]);

    #[test]
    fn the_block_that_nobody_sent_is_named() {
        let len = u64::from(WINDOW_SIZE) + 10_000;
        let coverage = Coverage::new(&spec(&[4096, len]), &[OLD, OLD]);
        coverage.note(RegionId(0), WindowIndex(0), &WindowBits::FULL);
        coverage.note(RegionId(1), WindowIndex(0), &WindowBits::FULL);
        coverage.note(RegionId(1), WindowIndex(1), &WindowBits::span(0, 2));
        let gap = coverage.check().unwrap_err();
        assert_eq!(
            (gap.region.as_str(), gap.window.0, gap.block, gap.missing),
            ("region-1", 1, 2, 1)
        );
        let whole = |window| coverage.is_whole(RegionId(1), WindowIndex(window));
        assert_eq!([0, 1, 2].map(whole), [true, false, false]);
        assert!(!coverage.is_whole(RegionId(2), WindowIndex(0)));
        let has = |(region, window, block)| {
            let at = BlockRef {
                region: RegionId(region),
                block,
                window: WindowIndex(window),
            };
            coverage.missing(&[at]).is_none()
        };
        let asked = [(1, 1, 1), (1, 1, 2), (0, 0, 0), (1, 2, 0), (2, 0, 0)];
        assert_eq!(asked.map(has), [true, false, true, false, false]);
        coverage.note(RegionId(1), WindowIndex(1), &WindowBits::FULL);
        assert_eq!(coverage.check(), Ok(()));
    }

    #[test]
    fn a_new_copy_of_a_region_begins_with_nothing() {
        let coverage = Coverage::new(&spec(&[4096, 4096]), &[OLD, OLD]);
        for region in 0..2 {
            coverage.note(RegionId(region), WindowIndex(0), &WindowBits::FULL);
        }
        coverage.renew(&[OLD, NEW]);
        let whole = |region| coverage.is_whole(RegionId(region), WindowIndex(0));
        assert_eq!([0, 1].map(whole), [true, false]);
        assert_eq!(coverage.check().unwrap_err().region, "region-1");
    }
}
