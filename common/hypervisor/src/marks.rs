//! What survives a source agent that is killed: which marks it took, and what a later one needs to go on with the tracking.
//!
//! Owns the contract between a driver, which takes dirty marks out of a hypervisor, and whoever keeps what was taken. The
//! kernel and the hypervisor forget a mark in the moment in which they report it, so it must be in other hands before the
//! next moment: what is about to be taken is told first, and counts as dirty until its result was told (`[WIRE-37]`).

use std::fmt::Debug;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use vmferry_proto::geometry::RegionBits;
use vmferry_proto::ids::RegionId;

use crate::memory::MemoryBlock;

/// Where a driver writes down what it takes. Calls may come from any thread; they must be cheap and cannot fail.
pub trait MarkLog: Send + Sync + Debug {
    /// The marks of these windows are about to be taken: until [`after`](Self::after) of the same windows all of them count as
    /// dirty.
    fn before(&self, region: RegionId, windows: Range<u32>);

    /// They were taken. Both slices hold the windows' blocks, 64 to a word, or nothing at all where it is of no interest:
    /// `dirty` those to be sent, `told` those that the destination will hold as possibly not zero.
    fn after(&self, region: RegionId, windows: Range<u32>, dirty: &[u64], told: &[u64]);

    /// These blocks are dirty.
    fn found(&self, region: RegionId, dirty: &RegionBits);

    /// What rotation `round` of the region's marks held was told as found: the hypervisor need not keep it.
    fn rotated(&self, region: RegionId, round: u64);

    /// The last `told` of every block of the region, for a driver that goes on.
    fn told(&self, region: RegionId) -> Vec<u64>;

    /// The last rotation that was told; 0 if none.
    fn last_rotation(&self, region: RegionId) -> u64;
}

/// What a later agent needs to go on with a tracking, beside what it finds in the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrackingLeft {
    /// Number of the descriptor that stays open inside the process.
    pub descriptor: i32,
    /// Where the memory regions are in the process.
    pub memory: Vec<MemoryBlock>,
}
