//! The right to run the guest, as a value.

/// The right to run the guest on this side, once.
///
/// It is not `Clone` and only the handover machines of this crate make one, so a side that may not run
/// the guest cannot be written to do so by mistake: the driver's `resume` and `start` consume it.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    _made_here: (),
}

impl RunPermit {
    /// Only the handover machines call this.
    #[must_use]
    pub(crate) const fn new() -> Self {
        Self { _made_here: () }
    }
}
