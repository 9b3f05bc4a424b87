//! How far each lane of a session has come: the numbers that `Progress` and a resume point are made of.
//!
//! Owns the positions and the meaning of "flushed"; the lanes write them, the session reads them. Invariant: `flushed`
//! is never above `applied`, and a disk frame counts as flushed only when a flush that began after its write has ended
//! (one that ran at the same time may have missed it, and its data would die with the hypervisor).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use vmferry_proto::ids::{FrameSeq, Lane, SessionNumber};
use vmferry_proto::message::LaneProgress;
use vmferry_proto::spec::RegionKind;

use crate::durable::Applied;

/// Positions of all lanes of one session.
#[derive(Debug)]
pub(crate) struct Board {
    lanes: Vec<Mutex<Position>>,
    /// Raised with each change; what it counts does not matter.
    changes: watch::Sender<u64>,
    /// Bytes of disk written since the last flush began.
    unflushed: AtomicU64,
    /// Where a later agent finds the positions.
    kept: Option<Arc<Applied>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Position {
    applied: FrameSeq,
    /// The last frame that carried disk blocks.
    last_disk: FrameSeq,
    /// A frame at or before the first disk frame that no flush covers yet.
    unsafe_from: Option<FrameSeq>,
}

impl Position {
    fn apply(&mut self, seq: FrameSeq, kind: RegionKind) {
        self.applied = seq;
        if kind == RegionKind::Disk {
            self.last_disk = seq;
            self.unsafe_from.get_or_insert(seq);
        }
    }

    /// Everything up to `covered` was flushed. Which disk frame came next is not kept, so the one after it stands for it.
    fn cover(&mut self, covered: FrameSeq) {
        if self.unsafe_from.is_some_and(|first| first <= covered) {
            self.unsafe_from = (self.last_disk > covered).then(|| covered.next());
        }
    }

    /// Never goes back: `unsafe_from` is only set above what is applied, and only raised.
    fn flushed(&self) -> FrameSeq {
        match self.unsafe_from {
            Some(first) => FrameSeq(first.0.saturating_sub(1)),
            None => self.applied,
        }
    }
}

/// What was applied when a flush began.
#[derive(Debug)]
pub(crate) struct FlushMark(Vec<FrameSeq>);

impl Board {
    /// Positions of `lanes` lanes that have not begun.
    pub(crate) fn new(lanes: u8) -> Self {
        Self {
            lanes: (0..lanes).map(|_| Mutex::default()).collect(),
            changes: watch::Sender::new(0),
            unflushed: AtomicU64::new(0),
            kept: None,
        }
    }

    /// As [`new`](Self::new), of `session`, with the positions noted in `kept`.
    pub(crate) fn kept(session: SessionNumber, lanes: u8, kept: Option<Arc<Applied>>) -> Self {
        if let Some(kept) = &kept {
            kept.begin_session(session, lanes);
        }
        Self {
            kept,
            ..Self::new(lanes)
        }
    }

    /// Under the lane's lock, so that positions are noted in their order.
    fn note(&self, lane: Lane, position: &Position) {
        if let Some(kept) = &self.kept {
            kept.progress(lane, position.applied, position.flushed());
        }
    }

    /// How many lanes there are.
    pub(crate) fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Notes that the frame `seq` of `lane`, `bytes` long, is applied.
    pub(crate) fn note_applied(&self, lane: Lane, seq: FrameSeq, kind: RegionKind, bytes: u64) {
        let Some(slot) = self.lanes.get(usize::from(lane.0)) else {
            return;
        };
        {
            let mut position = lock(slot);
            position.apply(seq, kind);
            self.note(lane, &position);
            if kind == RegionKind::Disk {
                self.unflushed.fetch_add(bytes, Ordering::Relaxed);
            }
        }
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Positions now, by lane.
    pub(crate) fn positions(&self) -> Vec<LaneProgress> {
        (0u8..)
            .zip(&self.lanes)
            .map(|(lane, slot)| {
                let position = *lock(slot);
                LaneProgress {
                    lane: Lane(lane),
                    applied: position.applied,
                    flushed: position.flushed(),
                }
            })
            .collect()
    }

    /// Bytes of disk written since the last flush began.
    pub(crate) fn unflushed(&self) -> u64 {
        self.unflushed.load(Ordering::Relaxed)
    }

    /// To be called before a flush begins.
    pub(crate) fn begin_flush(&self) -> FlushMark {
        self.unflushed.store(0, Ordering::Relaxed);
        FlushMark(self.lanes.iter().map(|slot| lock(slot).applied).collect())
    }

    /// To be called when the flush that `mark` was taken for has ended well.
    pub(crate) fn end_flush(&self, mark: &FlushMark) {
        for ((slot, seq), lane) in self.lanes.iter().zip(&mark.0).zip((0u8..).map(Lane)) {
            let mut position = lock(slot);
            position.cover(*seq);
            self.note(lane, &position);
        }
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Sees each change after this call.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Whether every lane has applied at least `finals`.
    pub(crate) fn has_reached(&self, finals: &[FrameSeq]) -> bool {
        self.lanes.len() == finals.len()
            && self
                .lanes
                .iter()
                .zip(finals)
                .all(|(slot, seq)| lock(slot).applied >= *seq)
    }

    /// The first lane that is past its final sequence number, if any: the peer broke its word.
    pub(crate) fn overrun(&self, finals: &[FrameSeq]) -> Option<Lane> {
        (0u8..)
            .zip(self.lanes.iter().zip(finals))
            .find(|(_, (slot, seq))| lock(slot).applied > **seq)
            .map(|(lane, _)| Lane(lane))
    }

    /// Returns when every lane has applied at least `finals`. Cancel safe.
    pub(crate) async fn reached(&self, finals: &[FrameSeq]) {
        let mut changes = self.watch();
        while !self.has_reached(finals) {
            // The sender lives in `self`, so it cannot be gone.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

/// A poisoned position is still a position: each is written in one piece.
fn lock(slot: &Mutex<Position>) -> MutexGuard<'_, Position> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flushed(board: &Board, lane: u8) -> u64 {
        board.positions()[usize::from(lane)].flushed.0
    }

    #[test]
    fn what_was_flushed_stays_so_when_a_disk_frame_comes() {
        let board = Board::new(1);
        for seq in 1..=6 {
            board.note_applied(Lane(0), FrameSeq(seq), RegionKind::Memory, 4096);
        }
        assert_eq!(flushed(&board, 0), 6);
        board.note_applied(Lane(0), FrameSeq(7), RegionKind::Disk, 4096);
        board.note_applied(Lane(0), FrameSeq(8), RegionKind::Memory, 4096);
        assert_eq!(flushed(&board, 0), 6);
        let mark = board.begin_flush();
        board.note_applied(Lane(0), FrameSeq(9), RegionKind::Memory, 4096);
        board.end_flush(&mark);
        assert_eq!(flushed(&board, 0), 9);
    }

    #[test]
    fn a_lane_without_disk_frames_is_flushed_as_soon_as_applied() {
        let board = Board::new(2);
        board.note_applied(Lane(1), FrameSeq(1), RegionKind::Memory, 4096);
        assert_eq!(flushed(&board, 1), 1);
    }

    #[test]
    fn a_disk_frame_needs_a_flush_that_began_after_it() {
        let board = Board::new(1);
        board.note_applied(Lane(0), FrameSeq(1), RegionKind::Disk, 4096);
        let mark = board.begin_flush();
        board.note_applied(Lane(0), FrameSeq(2), RegionKind::Disk, 4096);
        board.note_applied(Lane(0), FrameSeq(3), RegionKind::Memory, 4096);
        assert_eq!(flushed(&board, 0), 0);
        board.end_flush(&mark);
        assert_eq!(
            flushed(&board, 0),
            1,
            "frame 2 was written while the flush ran"
        );
        let mark = board.begin_flush();
        board.end_flush(&mark);
        assert_eq!(flushed(&board, 0), 3);
        assert_eq!(board.unflushed(), 0);
    }

    #[test]
    fn final_numbers_must_name_every_lane() {
        let board = Board::new(2);
        assert!(!board.has_reached(&[FrameSeq(0)]));
        assert!(board.has_reached(&[FrameSeq(0), FrameSeq(0)]));
        board.note_applied(Lane(1), FrameSeq(1), RegionKind::Memory, 1);
        assert_eq!(board.overrun(&[FrameSeq(0), FrameSeq(0)]), Some(Lane(1)));
    }

    #[tokio::test]
    async fn waiting_ends_when_the_last_lane_arrives() {
        let board = Arc::new(Board::new(2));
        let waiter = tokio::spawn({
            let board = board.clone();
            async move { board.reached(&[FrameSeq(2), FrameSeq(1)]).await }
        });
        board.note_applied(Lane(0), FrameSeq(1), RegionKind::Memory, 1);
        board.note_applied(Lane(1), FrameSeq(1), RegionKind::Memory, 1);
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        board.note_applied(Lane(0), FrameSeq(2), RegionKind::Memory, 1);
        waiter.await.unwrap();
    }
}
