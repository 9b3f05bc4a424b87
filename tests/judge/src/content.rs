//! What a page of memory or a block of a disk holds, as a function of (seed, index, version).
//!
//! Owns filling and checking 4 KiB units. Does not know where they lie nor which version is current.
//! Invariant: two different (seed, index, version) never have the same content, except where both are zero units
//! of [`Content::Mixed`], and there neighbouring versions nearly always differ.

/// Size of a unit: a page of memory, a block of a disk.
pub const UNIT: usize = 4096;
/// First word of every unit that is not zero.
pub const MARK: u64 = 0x4547_4455_4a4d_4656;

const HEADER_WORDS: usize = 4;
const TEXT: [&[u8; 8]; 16] = [
    b"the ship",
    b" carries",
    b" a guest",
    b" at sea ",
    b"between ",
    b"two host",
    b"s, and n",
    b"one is l",
    b"ost on t",
    b"he way. ",
    b"memory, ",
    b"blocks; ",
    b"windows ",
    b"and lane",
    b"s arrive",
    b" whole.\n",
];

/// Kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Does not compress.
    Random,
    /// Compresses like text.
    Text,
    /// Half text, a quarter random, a quarter all zero; the kind of a unit changes with its version.
    Mixed,
}

/// Which unit, in which version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Tells one memory or disk from the others.
    pub seed: u64,
    /// Number of the unit.
    pub index: u64,
    /// How often it was written.
    pub version: u32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Random,
    Text,
}

impl Content {
    /// Fills `unit` with what `stamp` says.
    pub fn fill(self, stamp: Stamp, unit: &mut [u8]) {
        let mut words = Words::new(self, stamp);
        for chunk in unit.chunks_exact_mut(8) {
            chunk.copy_from_slice(&words.take().to_le_bytes());
        }
    }

    /// The number of the first word of `unit` that is not what `stamp` says.
    #[must_use]
    pub fn first_difference(self, stamp: Stamp, unit: &[u8]) -> Option<usize> {
        let mut words = Words::new(self, stamp);
        unit.chunks_exact(8)
            .position(|chunk| word(chunk) != words.take())
    }

    const fn kind(self, mixed: u64) -> Kind {
        match self {
            Self::Random => Kind::Random,
            Self::Text => Kind::Text,
            Self::Mixed => match mixed >> 62 {
                0 => Kind::Zero,
                1 => Kind::Random,
                2.. => Kind::Text,
            },
        }
    }
}

/// What a unit says of itself: for the report of a mismatch.
#[must_use]
pub fn describe(unit: &[u8]) -> String {
    if unit.iter().all(|&byte| byte == 0) {
        return "all zero".into();
    }
    let at = |i: usize| word(&unit[i * 8..i * 8 + 8]);
    if at(0) == MARK {
        format!(
            "index {} version {} seed {:#x}",
            at(1),
            at(2) & 0xffff_ffff,
            at(3)
        )
    } else {
        format!("{:#018x} {:#018x} …", at(0), at(1))
    }
}

/// A hash of a unit, for content that was there before.
#[must_use]
pub fn hash(unit: &[u8]) -> u64 {
    unit.chunks_exact(8)
        .fold(0x9e37_79b9_7f4a_7c15, |hash, chunk| {
            mix(hash.rotate_left(5) ^ word(chunk))
        })
}

/// Spreads the bits of `x` (the finisher of MurmurHash3).
#[must_use]
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// The words of a unit, one after the other.
struct Words {
    kind: Kind,
    header: [u64; HEADER_WORDS],
    next: usize,
    state: u64,
}

impl Words {
    const fn new(content: Content, stamp: Stamp) -> Self {
        let state = mix(stamp.seed ^ mix(stamp.index ^ mix(stamp.version as u64)));
        Self {
            kind: content.kind(state),
            header: [MARK, stamp.index, stamp.version as u64, stamp.seed],
            next: 0,
            state,
        }
    }

    /// The next word. One multiplication a word: the guest's processor may be emulated.
    fn take(&mut self) -> u64 {
        if self.kind == Kind::Zero {
            return 0;
        }
        if self.next < HEADER_WORDS {
            self.next += 1;
            return self.header[self.next - 1];
        }
        self.state = self
            .state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        match self.kind {
            Kind::Text => u64::from_le_bytes(*TEXT[(self.state >> 60) as usize]),
            Kind::Random | Kind::Zero => self.state ^ (self.state >> 32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Content; 3] = [Content::Random, Content::Text, Content::Mixed];

    fn unit(content: Content, stamp: Stamp) -> Vec<u8> {
        let mut unit = vec![0xaa; UNIT];
        content.fill(stamp, &mut unit);
        unit
    }

    #[test]
    fn a_filled_unit_is_what_its_stamp_says() {
        for content in ALL {
            for version in 0..50 {
                let stamp = Stamp {
                    seed: 3,
                    index: 77,
                    version,
                };
                assert_eq!(content.first_difference(stamp, &unit(content, stamp)), None);
            }
        }
    }

    #[test]
    fn a_stale_swapped_or_foreign_unit_is_found() {
        for content in [Content::Random, Content::Text] {
            let stamp = Stamp {
                seed: 3,
                index: 77,
                version: 9,
            };
            for other in [
                Stamp {
                    version: 8,
                    ..stamp
                },
                Stamp { index: 78, ..stamp },
                Stamp { seed: 4, ..stamp },
            ] {
                assert!(
                    content
                        .first_difference(stamp, &unit(content, other))
                        .is_some()
                );
            }
        }
    }

    #[test]
    fn any_changed_byte_is_found() {
        for content in ALL {
            let stamp = Stamp {
                seed: 1,
                index: 2,
                version: 3,
            };
            let good = unit(content, stamp);
            for at in 0..UNIT {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                assert_eq!(content.first_difference(stamp, &bad), Some(at / 8));
                assert_ne!(hash(&good), hash(&bad));
            }
        }
    }

    #[test]
    fn mixed_content_turns_zero_and_back() {
        let zero = (0..1000)
            .filter(|&version| {
                let stamp = Stamp {
                    seed: 5,
                    index: 6,
                    version,
                };
                unit(Content::Mixed, stamp).iter().all(|&byte| byte == 0)
            })
            .count();
        assert!((150..350).contains(&zero), "{zero} of 1000 are zero");
    }
}
