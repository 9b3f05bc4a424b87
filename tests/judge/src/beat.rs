//! Layout of a beat: 32 bytes, little endian, with a check word.
//!
//! Owns only the layout. A reader that finds a bad check word has lost its place in the stream, which never
//! happens unless bytes were lost or repeated.

/// Length of a beat in bytes.
pub const BEAT_LEN: usize = 32;
const MARK: u64 = 0x5442_4541_5446_4d56;

/// One beat of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// Number of this boot of the guest: random, so that a reboot is not taken for a repetition.
    pub boot: u64,
    /// Counts from 0 at each boot, by one.
    pub sequence: u64,
    /// The guest's own monotonic clock.
    pub guest_nanos: u64,
}

impl Beat {
    /// The beat as it is on the port.
    #[must_use]
    pub fn encode(&self) -> [u8; BEAT_LEN] {
        let mut bytes = [0; BEAT_LEN];
        bytes[..8].copy_from_slice(&self.check_word().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.boot.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..].copy_from_slice(&self.guest_nanos.to_le_bytes());
        bytes
    }

    /// The beat in `bytes`, unless they are none.
    #[must_use]
    pub fn decode(bytes: &[u8; BEAT_LEN]) -> Option<Self> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let beat = Self {
            boot: word(8),
            sequence: word(16),
            guest_nanos: word(24),
        };
        (word(0) == beat.check_word()).then_some(beat)
    }

    const fn check_word(&self) -> u64 {
        MARK ^ self.boot ^ self.sequence.rotate_left(21) ^ self.guest_nanos.rotate_left(43)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beat_comes_back_as_it_was() {
        let beat = Beat {
            boot: 7,
            sequence: u64::MAX - 3,
            guest_nanos: 123_456_789,
        };
        assert_eq!(Beat::decode(&beat.encode()), Some(beat));
    }

    #[test]
    fn a_beat_read_from_the_wrong_place_is_refused() {
        let beats: Vec<u8> = (0..4)
            .flat_map(|sequence| {
                Beat {
                    boot: 99,
                    sequence,
                    guest_nanos: sequence * 1_000_000,
                }
                .encode()
            })
            .collect();
        for shift in 1..BEAT_LEN {
            let bytes = beats[shift..shift + BEAT_LEN].try_into().unwrap();
            assert_eq!(Beat::decode(bytes), None, "shift {shift}");
        }
    }
}
