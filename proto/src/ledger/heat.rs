//! How often the windows of a region were seen to be written.
//!
//! Owns one byte per window, in which each bit is a look at the marks: what was written in several of the last few looks is likely to be
//! written again before anything that is sent of it can matter.

use crate::geometry::WindowIndex;

/// The newest look.
const NOW: u8 = 0x80;
/// Of the last four looks, a hot window was written in at least so many.
const RECENT: u8 = 0xf0;
const HOT: u32 = 2;

#[derive(Debug)]
pub(super) struct Heat(Vec<u8>);

impl Heat {
    /// Nothing is known of a region of so many windows.
    pub(super) fn unknown(windows: u32) -> Self {
        Self(vec![0; windows as usize])
    }

    /// One more look begins.
    pub(super) fn look(&mut self) {
        for looks in &mut self.0 {
            *looks >>= 1;
        }
    }

    /// This look found `window` written.
    pub(super) fn found(&mut self, window: WindowIndex) {
        if let Some(looks) = self.0.get_mut(window.0 as usize) {
            *looks |= NOW;
        }
    }

    pub(super) fn is_hot(&self, window: WindowIndex) -> bool {
        let looks = self.0.get(window.0 as usize);
        looks.is_some_and(|looks| (looks & RECENT).count_ones() >= HOT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_found_twice_is_hot_until_it_cools() {
        let (often, once) = (WindowIndex(1), WindowIndex(0));
        let mut heat = Heat::unknown(2);
        for look in 0..3 {
            heat.look();
            heat.found(often);
            if look == 1 {
                heat.found(once);
            }
        }
        assert!(heat.is_hot(often) && !heat.is_hot(once));
        heat.look();
        heat.look();
        assert!(heat.is_hot(often), "two of the last four");
        heat.look();
        assert!(!heat.is_hot(often));
        assert!(!heat.is_hot(WindowIndex(2)), "no such window");
    }
}
