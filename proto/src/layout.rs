//! The fixed layout of frame headers and journal records, and the only user of bincode.
//!
//! Owns how a serde value becomes bytes: fields in order of declaration, fixed-size integers, little
//! endian, no names, no padding; an enum variant as its `u32` index, a string or sequence behind its
//! `u64` length. It adds no version and no checksum: whoever stores or sends the bytes does.
//! A value decodes only from exactly its own bytes, and nothing longer than [`MAX_LEN`] is read or written,
//! so a corrupt length cannot make this process allocate more than that.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest encoded value: a journal record with the largest error detail and names is far shorter.
pub const MAX_LEN: usize = 1 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_LEN>> = bincode::config::standard()
    .with_fixed_int_encoding()
    .with_limit::<MAX_LEN>();

/// A value that has no bytes, or bytes that are no value.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The type cannot be laid out (a sequence of unknown length); a bug here.
    #[error("the value cannot be laid out")]
    Unencodable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// More than [`MAX_LEN`] bytes.
    #[error("the value takes {len} bytes, more than the {MAX_LEN} allowed")]
    TooLong {
        /// Bytes.
        len: usize,
    },
    /// The bytes are no such value: too short, an unknown variant, a text that is not UTF-8.
    #[error("the bytes are not a value of the expected layout")]
    Undecodable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Bytes are left over behind the value.
    #[error("{left} bytes are left over behind the value")]
    LeftOver {
        /// How many.
        left: usize,
    },
}

/// The bytes of `value`.
///
/// # Errors
/// [`LayoutError::TooLong`] past [`MAX_LEN`], [`LayoutError::Unencodable`] for a type without a fixed layout.
pub fn encode(value: &impl Serialize) -> Result<Vec<u8>, LayoutError> {
    let bytes = bincode::serde::encode_to_vec(value, CONFIG)
        .map_err(|error| LayoutError::Unencodable(Box::new(error)))?;
    if bytes.len() > MAX_LEN {
        return Err(LayoutError::TooLong { len: bytes.len() });
    }
    Ok(bytes)
}

/// The value whose bytes are exactly `bytes`.
///
/// # Errors
/// [`LayoutError::TooLong`], [`LayoutError::Undecodable`] or [`LayoutError::LeftOver`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, LayoutError> {
    if bytes.len() > MAX_LEN {
        return Err(LayoutError::TooLong { len: bytes.len() });
    }
    let (value, used) = bincode::serde::decode_from_slice(bytes, CONFIG)
        .map_err(|error| LayoutError::Undecodable(Box::new(error)))?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(LayoutError::LeftOver { left }),
    }
}

/// The bytes of `value`, which always takes `N` of them. For headers whose every field has a fixed size.
///
/// # Errors
/// [`LayoutError::Unencodable`] where the value takes another number of bytes: a bug that any test of the header finds.
pub(crate) fn encode_fixed<const N: usize>(value: &impl Serialize) -> Result<[u8; N], LayoutError> {
    let bytes = encode(value)?;
    <[u8; N]>::try_from(bytes.as_slice()).map_err(|error| LayoutError::Unencodable(Box::new(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
    enum Record {
        Small(u8),
        Named {
            id: [u8; 4],
            count: u64,
            name: String,
        },
        List(Vec<u32>),
        Maybe(Option<u16>),
    }

    #[test]
    fn integers_are_fixed_and_little_endian() {
        let record = Record::Named {
            id: [1, 2, 3, 4],
            count: 0x0102,
            name: "ab".into(),
        };
        let bytes = encode(&record).unwrap();
        let expected = [
            &[1, 0, 0, 0][..],
            &[1, 2, 3, 4],
            &[2, 1, 0, 0, 0, 0, 0, 0],
            &[2, 0, 0, 0, 0, 0, 0, 0],
            b"ab",
        ]
        .concat();
        assert_eq!(bytes, expected);
        assert_eq!(decode::<Record>(&bytes).unwrap(), record);
    }

    #[test]
    fn only_exactly_the_value_decodes() {
        for record in [
            Record::Small(7),
            Record::List(vec![1, 2, 3]),
            Record::Maybe(Some(9)),
            Record::Maybe(None),
        ] {
            let bytes = encode(&record).unwrap();
            assert_eq!(decode::<Record>(&bytes).unwrap(), record);
            for shorter in 0..bytes.len() {
                assert!(decode::<Record>(&bytes[..shorter]).is_err(), "{record:?}");
            }
            let longer = [bytes.as_slice(), &[0]].concat();
            assert!(matches!(
                decode::<Record>(&longer),
                Err(LayoutError::LeftOver { left: 1 })
            ));
        }
    }

    #[test]
    fn a_huge_length_is_refused_before_it_is_allocated() {
        for (variant, length) in [(1u32, u64::MAX), (2, u64::MAX), (2, 1 << 40), (1, 1 << 21)] {
            let bytes = [
                variant.to_le_bytes().as_slice(),
                &[0; 12][..if variant == 1 { 12 } else { 0 }],
                &length.to_le_bytes(),
                b"tail",
            ]
            .concat();
            assert!(matches!(
                decode::<Record>(&bytes),
                Err(LayoutError::Undecodable(_))
            ));
        }
    }

    #[test]
    fn values_past_the_cap_are_refused_both_ways() {
        let long = "x".repeat(MAX_LEN);
        assert!(encode(&long).is_err());
        assert!(matches!(
            decode::<String>(&vec![0; MAX_LEN + 1]),
            Err(LayoutError::TooLong { .. })
        ));
    }
}
