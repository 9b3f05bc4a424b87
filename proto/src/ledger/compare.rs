//! Windows whose content is compared with the destination's copy instead of being sent.
//!
//! For a ledger that takes everything for dirty although the destination kept what an earlier one had sent. Owns when a
//! window may become clean without a frame. The reader's part of the rule: the window's marks were armed before
//! [`Ledger::begin_compare`], and both sides read it between that and [`Ledger::found_equal`]; a write after the read at the source
//! is marked then and comes with the next scan. Invariant: a window that was marked, taken or put back in between, or of which a frame is on
//! its way (it would overwrite what was compared), stays as it is, whatever was found.

use crate::frame::lane_of;
use crate::geometry::WindowRef;

use super::{Ledger, Session};

impl Ledger {
    /// Begins to compare a window. Returns whether that can come to anything: a session is open, the window has dirty blocks, of
    /// which none is held back or late, and nothing of it is in flight or waits for a flush.
    pub fn begin_compare(&mut self, at: WindowRef) -> bool {
        let Session::Open(_) = self.session else {
            return false;
        };
        let marks = self.regions.get(usize::from(at.region.0));
        let dirty = marks.is_some_and(|marks| {
            !marks.dirty_in(at.window).is_empty() && marks.all_ready_in(at.window)
        });
        let lane = lane_of(at.window, self.lane_count());
        let lane = self.lanes.get(usize::from(lane.0));
        let due = dirty && lane.is_some_and(|lane| !lane.carries(at));
        if due {
            self.comparing.insert(at);
        }
        due
    }

    /// Both sides have the same in a window: its dirty blocks are clean, unless it was touched since
    /// [`begin_compare`](Self::begin_compare). Returns how many became so.
    pub fn found_equal(&mut self, at: WindowRef) -> u32 {
        if !self.comparing.remove(&at) {
            return 0;
        }
        let lanes = self.lane_count();
        let Some(marks) = self.regions.get_mut(usize::from(at.region.0)) else {
            return 0;
        };
        let blocks = marks.have(at.window);
        if let Some(lane) = self.lanes.get_mut(usize::from(lane_of(at.window, lanes).0)) {
            lane.work.set(at, lanes, false);
        }
        if let Some(log) = &mut self.log {
            log.equal(at, &blocks);
        }
        blocks.count()
    }

    /// Nothing is being compared any more.
    pub fn end_compare(&mut self) {
        self.comparing.clear();
    }
}
