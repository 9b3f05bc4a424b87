//! Which content a session has brought to the destination, and where: a block of the same content goes as a reference to it.
//!
//! Owns a bounded table of blocks by the digest of their content, shared by all lanes, with what is applied of each lane and which
//! frames refer to others. 24 bytes for each block of the guest and at most 24 MiB, taken when the first frame comes and let go
//! when the first block is sent for the second time. Guests have most of their duplicates where the page cache, the disk and several
//! processes hold the same file; what is written later rarely is what is elsewhere. References lie within one guest, so nothing
//! is told of any other.
//!
//! # Why a block that is referred to is still what it was
//! 1. A frame refers only to blocks whose frame the destination has said to be applied (`[WIRE-30]`).
//! 2. While there are references no block of the table is sent twice. A lane that is about to send one for the second time
//!    first [`end`](Duplicates::end)s them for the session: from then on no frame refers to anything, and the lane goes on when those that do are
//!    applied.
//!
//! So between the frame that brought a block and the last one that refers to it, no other frame of that block is under way, whatever the
//! lanes do. The digest that goes along (`[WIRE-54]`) is for what else may write there.
//!
//! # Why nobody waits for ever
//! `end` waits for frames that are encoded already, each on its way to the transport without another word from here; who waits
//! holds no lock and no room for a frame. As a copy goes in rounds and each begins with everything of the one before
//! applied, there is nothing to wait for as a rule.

use std::fmt;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use vmferry_proto::frame::{BlockRef, lane_of};
use vmferry_proto::geometry::{WindowIndex, WindowRef};
use vmferry_proto::ids::{FrameSeq, Lane, RegionId};
use vmferry_proto::spec::RegionKind;

#[cfg(test)]
mod tests;

/// Most blocks in the table: 24 MiB, all content of a guest of 4 GiB.
const MOST_PLACES: usize = 1 << 20;
/// Places that the digest of a content leaves it: of those that want them, the ones that were met last have them.
const WAYS: usize = 4;

/// The table of one session.
pub struct Duplicates {
    state: Mutex<State>,
    /// Told when something was applied.
    applied: Notify,
}

#[derive(Debug)]
struct State {
    table: Table,
    lanes: Vec<LaneState>,
}

#[derive(Debug)]
enum Table {
    /// Nothing was sent yet.
    Unused { buckets: usize },
    /// The content that was met last is first in each.
    Open(Vec<[Place; WAYS]>),
    /// Nothing is referred to any more.
    Ended,
}

#[derive(Debug, Clone, Copy, Default)]
struct LaneState {
    /// The last frame up to which all are applied.
    applied: FrameSeq,
    /// The last frame that refers to anything.
    refers: FrameSeq,
}

/// A block that was sent, and when. A digest of 0 is none.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    digest: u64,
    seq: u32,
    window: u32,
    region: u16,
    block: u16,
    of_disk: bool,
}

/// A frame of blocks that were not sent before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FirstSent {
    /// Its window.
    pub(crate) at: WindowRef,
    /// What that is of.
    pub(crate) kind: RegionKind,
    /// Its number.
    pub(crate) seq: FrameSeq,
}

impl fmt::Debug for Duplicates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Duplicates")
            .field("lanes", &self.lock().lanes)
            .finish_non_exhaustive()
    }
}

impl Duplicates {
    /// For a session of `lanes` lanes and a guest of so many blocks.
    #[must_use]
    pub fn new(lanes: u8, blocks: u64) -> Self {
        let places = usize::try_from(blocks).map_or(MOST_PLACES, |blocks| blocks.min(MOST_PLACES));
        let buckets = places.div_ceil(WAYS).max(1);
        Self {
            state: Mutex::new(State {
                table: Table::Unused { buckets },
                lanes: vec![LaneState::default(); usize::from(lanes)],
            }),
            applied: Notify::new(),
        }
    }

    /// The frames up to `seq` of `lane` are applied.
    pub fn on_applied(&self, lane: Lane, seq: FrameSeq) {
        if let Some(lane) = self.lock().lanes.get_mut(usize::from(lane.0)) {
            lane.applied = lane.applied.max(seq);
        }
        self.applied.notify_waiters();
    }

    /// Where the destination has the same as blocks of `frame` whose `contents` have these digests, and notes the others. The frame must
    /// be sent with what is found, as the next one of its lane.
    pub(crate) fn find(
        &self,
        frame: &FirstSent,
        contents: impl Iterator<Item = (u32, u64)>,
    ) -> Vec<(u32, BlockRef)> {
        let mut state = self.lock();
        let State { table, lanes } = &mut *state;
        let Some(buckets) = table.open() else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for (block, digest) in contents {
            let known = Place::new(frame, block, digest).and_then(|new| meet(buckets, new));
            if let Some(origin) = known.filter(|known| known.is_applied(lanes)) {
                found.push((block, origin.block()));
            }
        }
        let lane = lane_of(frame.at.window, lane_count(lanes));
        if let Some(lane) = lanes.get_mut(usize::from(lane.0))
            && !found.is_empty()
        {
            lane.refers = frame.seq;
        }
        found
    }

    /// Nothing is referred to from here on; the table's memory is given back.
    pub fn close(&self) {
        let table = std::mem::replace(&mut self.lock().table, Table::Ended);
        // Without the lock.
        drop(table);
    }

    /// The same, and waits until all frames that refer to anything are applied. To be called before a block is sent for the second
    /// time. Cancel safe.
    pub async fn end(&self) {
        self.close();
        loop {
            let mut applied = pin!(self.applied.notified());
            // From here on nothing is missed.
            applied.as_mut().enable();
            if self.are_applied() {
                return;
            }
            applied.await;
        }
    }

    fn are_applied(&self) -> bool {
        let state = self.lock();
        state.lanes.iter().all(|lane| lane.applied >= lane.refers)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn open(&mut self) -> Option<&mut [[Place; WAYS]]> {
        if let Self::Unused { buckets } = self {
            *self = Self::Open(vec![Default::default(); *buckets]);
        }
        match self {
            Self::Open(buckets) => Some(buckets),
            Self::Unused { .. } | Self::Ended => None,
        }
    }
}

impl Place {
    /// `None` for what has no room in a place: a digest of nothing, and whatever comes behind 2^32 frames.
    fn new(frame: &FirstSent, block: u32, digest: u64) -> Option<Self> {
        (digest != 0).then_some(Self {
            digest,
            seq: u32::try_from(frame.seq.0).ok()?,
            window: frame.at.window.0,
            region: frame.at.region.0,
            block: u16::try_from(block).ok()?,
            of_disk: frame.kind == RegionKind::Disk,
        })
    }

    fn is_applied(&self, lanes: &[LaneState]) -> bool {
        let lane = lane_of(WindowIndex(self.window), lane_count(lanes));
        let lane = lanes.get(usize::from(lane.0));
        lane.is_some_and(|lane| lane.applied >= FrameSeq(u64::from(self.seq)))
    }

    const fn block(&self) -> BlockRef {
        BlockRef {
            region: RegionId(self.region),
            block: self.block,
            window: WindowIndex(self.window),
        }
    }
}

fn lane_count(lanes: &[LaneState]) -> u8 {
    u8::try_from(lanes.len()).unwrap_or(u8::MAX)
}

/// The block that has the content of `new` already; without one `new` takes the place of what was not met for longest. Memory takes
/// that of a disk, since the destination reads it faster.
fn meet(buckets: &mut [[Place; WAYS]], new: Place) -> Option<Place> {
    let index = usize::try_from(new.digest % buckets.len() as u64).ok()?;
    let bucket = buckets.get_mut(index)?;
    let at = bucket.iter().position(|place| place.digest == new.digest);
    let known = at.and_then(|at| bucket.get(at).copied());
    bucket[..=at.unwrap_or(WAYS - 1)].rotate_right(1);
    bucket[0] = known
        .filter(|known| new.of_disk || !known.of_disk)
        .unwrap_or(new);
    known
}
