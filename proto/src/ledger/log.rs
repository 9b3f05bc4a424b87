//! What a ledger tells of its changes, so that another process can go on from them.
//!
//! Owns the calls and their order. Invariant: whoever has heard any beginning of them holds, as dirty or in flight, every
//! block that is not safe at the destination; only that can be lost which the ledger itself was not told of yet. So each
//! call adds before a later one takes away: a frame is in flight before its blocks cease to be dirty, what is put back is
//! dirty before its session ends, and a region that starts over is dirty before its new incarnation is known.

use crate::geometry::{WindowBits, WindowRef};
use crate::ids::{FrameSeq, Incarnation, Lane, RegionId, SessionNumber};
use crate::spec::RegionKind;

use super::{Ledger, LedgerError, Session};

/// A frame that was taken, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentFrame {
    /// Its lane.
    pub lane: Lane,
    /// Its number there.
    pub seq: FrameSeq,
    /// Its window.
    pub at: WindowRef,
    /// Its blocks.
    pub blocks: WindowBits,
    /// Whether it must be flushed to be safe.
    pub kind: RegionKind,
}

/// Is told of every change of a ledger, before anybody else can act on it.
pub trait LedgerLog: std::fmt::Debug + Send {
    /// These blocks are dirty.
    fn dirty(&mut self, at: WindowRef, blocks: &WindowBits);
    /// The whole region is.
    fn region_dirty(&mut self, region: RegionId);
    /// These blocks are not dirty any more: the destination has what the source has.
    fn equal(&mut self, at: WindowRef, blocks: &WindowBits);
    /// A frame is in flight, and its blocks are not dirty any more. Numbers of a lane come in order, without a gap.
    fn sent(&mut self, frame: &SentFrame);
    /// Frames of the lane are applied, and flushed, up to these numbers.
    fn settled(&mut self, lane: Lane, applied: FrameSeq, flushed: FrameSeq);
    /// A session of so many lanes is open; every frame of the one before is safe, or its blocks were told as dirty.
    fn session(&mut self, session: SessionNumber, lanes: u8);
    /// The incarnations, by region; a region that has another one than before was told as dirty.
    fn incarnations(&mut self, all: &[Incarnation]);
}

impl Ledger {
    /// Tells `log`, which holds nothing, everything that is known, and every change from here on.
    ///
    /// # Errors
    /// A frame was taken already: then what is in flight could not be told.
    pub fn write_down(&mut self, mut log: Box<dyn LedgerLog>) -> Result<(), LedgerError> {
        if self.lanes.iter().any(|lane| lane.last_sent() > FrameSeq(0)) {
            return Err(LedgerError::Image("frames were sent before it was begun"));
        }
        for (marks, region) in self.regions.iter().zip((0u16..).map(RegionId)) {
            for (window, dirty) in marks.dirty_windows() {
                log.dirty(WindowRef { region, window }, &dirty);
            }
        }
        if let Session::Open(session) | Session::Lost(session) = self.session {
            log.session(session, self.lane_count());
        }
        if let Some(all) = &self.incarnations {
            log.incarnations(all);
        }
        self.log = Some(log);
        Ok(())
    }
}
