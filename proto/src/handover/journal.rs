//! The machines' side of the journal: which record is durable, which is in flight, which is wanted.
//!
//! Owns the order of writes. Invariants: at most one write is in flight; a failed write is not repeated
//! until somebody asks for it; a record counts only once its write was confirmed, except where a rule says
//! that a visible failed write counts (`[HAND-3]`).

/// Writes of one record file.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Journal<R> {
    durable: Option<R>,
    in_flight: Option<R>,
    held: Option<R>,
}

impl<R: Clone + PartialEq> Journal<R> {
    /// Nothing was written yet, or what is there was read after a restart: it is visible, and whether it is
    /// durable is not known until it is written again.
    pub(super) const fn unwritten() -> Self {
        Self {
            durable: None,
            in_flight: None,
            held: None,
        }
    }

    /// The last confirmed record.
    pub(super) const fn durable(&self) -> Option<&R> {
        self.durable.as_ref()
    }

    /// Lets the write that failed go again.
    pub(super) fn release_hold(&mut self) {
        self.held = None;
    }

    /// The record to write now, if `wanted` is neither durable nor held nor behind another write.
    pub(super) fn next_write(&mut self, wanted: R) -> Option<R> {
        if self.in_flight.is_some()
            || self.held.as_ref() == Some(&wanted)
            || self.durable.as_ref() == Some(&wanted)
        {
            return None;
        }
        self.held = None;
        self.in_flight = Some(wanted.clone());
        Some(wanted)
    }

    /// The write in flight is durable; returns whether there was one.
    pub(super) fn on_recorded(&mut self) -> bool {
        match self.in_flight.take() {
            Some(record) => {
                self.durable = Some(record);
                true
            }
            None => false,
        }
    }

    /// The write in flight failed; returns what it was. After a visible failure nothing is known to be durable.
    pub(super) fn on_failed(&mut self, visible: bool) -> Option<R> {
        let record = self.in_flight.take()?;
        self.held = Some(record.clone());
        if visible {
            self.durable = None;
        }
        Some(record)
    }
}
