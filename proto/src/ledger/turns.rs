//! In which order a lane goes round its windows of a region.
//!
//! Disks are read in ascending order. What a guest writes again and again in its memory mostly lies together: spread over the whole
//! round, and over all lanes, most of it is seen to be written again before its turn comes, and waits. Invariant: a permutation; every
//! window has one turn a round.

use crate::ids::Lane;

/// Turns of the windows of one lane in one region. Window `w` is slot `w / lanes` of its lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turns {
    len: u64,
    /// Turns between neighbouring slots; shares no divisor with `len`.
    stride: u64,
    /// `stride * inverse` is 1 modulo `len`.
    inverse: u64,
    /// The turn of slot 0.
    first: u64,
}

impl Turns {
    /// One after the other.
    pub(super) fn ascending(slots: u32) -> Self {
        Self {
            len: u64::from(slots.max(1)),
            stride: 1,
            inverse: 1,
            first: 0,
        }
    }

    /// Neighbours far apart, and lane by lane elsewhere.
    pub(super) fn spread(slots: u32, lane: Lane, lanes: u8) -> Self {
        let len = u64::from(slots.max(1));
        // By the golden section any few neighbours are spread evenly.
        let golden = len * 618 / 1000;
        let inverse = |stride| Some((stride, inverse(stride, len)?));
        let (stride, inverse) = (1..=golden).rev().find_map(inverse).unwrap_or((1, 1));
        Self {
            len,
            stride,
            inverse,
            first: len * u64::from(lane.0) / u64::from(lanes.max(1)),
        }
    }

    /// How many there are.
    pub(super) const fn len(&self) -> u64 {
        self.len
    }

    /// When `slot` has its turn; `None` where there is no such slot.
    pub(super) fn turn(&self, slot: u32) -> Option<usize> {
        let slot = Some(u64::from(slot)).filter(|slot| *slot < self.len)?;
        usize::try_from((slot * self.stride + self.first) % self.len).ok()
    }

    /// Whose `turn` it is.
    pub(super) fn slot(&self, turn: usize) -> Option<u32> {
        let after_first = (turn as u64 + self.len - self.first) % self.len;
        u32::try_from(after_first * self.inverse % self.len).ok()
    }
}

/// The number by which `stride` is 1 modulo `len`, if they share no divisor (Euclid's algorithm, extended).
fn inverse(stride: u64, len: u64) -> Option<u64> {
    let (mut rest, mut next_rest) = (i128::from(len), i128::from(stride));
    let (mut factor, mut next_factor) = (0, 1);
    while next_rest != 0 {
        let times = rest / next_rest;
        (rest, next_rest) = (next_rest, rest - times * next_rest);
        (factor, next_factor) = (next_factor, factor - times * next_factor);
    }
    (rest == 1).then_some(())?;
    u64::try_from(factor.rem_euclid(i128::from(len))).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Turns;
    use crate::ids::Lane;

    proptest! {
        #[test]
        fn every_slot_has_one_turn(slots in 1_u32..3000, lane in 0_u8..16) {
            for turns in [Turns::ascending(slots), Turns::spread(slots, Lane(lane), 16)] {
                let mut seen = vec![false; slots as usize];
                for slot in 0..slots {
                    let turn = turns.turn(slot).unwrap();
                    prop_assert_eq!(turns.slot(turn), Some(slot));
                    prop_assert!(!std::mem::replace(&mut seen[turn], true));
                }
            }
        }
    }

    #[test]
    fn the_largest_memory_has_turns() {
        for slots in [u32::MAX, u32::MAX - 1, 1 << 31] {
            let turns = Turns::spread(slots, Lane(63), 64);
            for slot in [0, 1, slots / 2, slots - 1] {
                assert_eq!(turns.slot(turns.turn(slot).unwrap()), Some(slot));
            }
            assert_eq!(turns.turn(slots), None);
        }
    }

    #[test]
    fn neighbours_are_far_apart_and_lanes_begin_elsewhere() {
        let turns = |lane| Turns::spread(1000, Lane(lane), 16);
        let mut of_first_tenth: Vec<_> =
            (0..100).map(|slot| turns(0).turn(slot).unwrap()).collect();
        of_first_tenth.sort_unstable();
        let gaps = of_first_tenth.windows(2).map(|two| two[1] - two[0]);
        let most = gaps.max().unwrap();
        assert!(most <= 25, "the first tenth leaves out {most} turns");
        let mut firsts: Vec<_> = (0..16).map(|lane| turns(lane).turn(0).unwrap()).collect();
        firsts.dedup();
        assert_eq!(firsts.len(), 16);
    }
}
