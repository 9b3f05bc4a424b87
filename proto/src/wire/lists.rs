//! Caps on lists, checked on the bytes before anything is decoded.
//!
//! An empty list entry takes two bytes on the wire and up to a hundred in memory, so the cap on a message's length does not
//! bound what decoding it allocates. This walks the message without allocating and counts the entries of every list
//! that the schema has, before the decoder sees it. It judges nothing else: what it cannot read, the decoder refuses.

use prost::bytes::Buf;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::WireDecodeError;
use crate::limits;

/// A field that is, or holds, a list.
#[derive(Debug)]
pub struct Field {
    number: u32,
    name: &'static str,
    /// Most entries, over all occurrences of what holds it: protobuf merges those.
    cap: usize,
    holds: &'static [Self],
}

impl Field {
    const fn list(number: u32, name: &'static str, cap: usize) -> Self {
        Self {
            number,
            name,
            cap,
            holds: &[],
        }
    }

    /// A member that holds lists; it is there once.
    const fn holder(number: u32, name: &'static str, holds: &'static [Self]) -> Self {
        Self {
            number,
            name,
            cap: 1,
            holds,
        }
    }
}

/// Room for the counts of one level's fields.
const MOST_FIELDS: usize = 5;

const LANES: usize = limits::MAX_LANES as usize;

/// The lists of `ToDestination`.
pub(super) const TO_DESTINATION: &[Field] = &[
    Field::holder(
        1,
        "hello",
        &[Field::list(3, "features", limits::MAX_FEATURES)],
    ),
    Field::holder(
        2,
        "offer",
        &[
            Field::holder(
                1,
                "offer.spec",
                &[
                    Field::list(9, "spec.regions", limits::MAX_REGIONS),
                    Field::list(10, "spec.shared_disks", limits::MAX_SHARED_DISKS),
                    Field::list(11, "spec.devices", limits::MAX_DEVICES),
                ],
            ),
            Field::list(2, "offer.populated", limits::MAX_POPULATED),
        ],
    ),
    Field::holder(
        4,
        "final",
        &[
            // Packed numbers: what they take in memory is bounded by the message's length.
            Field::list(2, "final.lanes", LANES),
            Field::list(3, "final.verify", limits::MAX_REGIONS),
        ],
    ),
];

/// The lists of `ToSource`.
pub(super) const TO_SOURCE: &[Field] = &[
    Field::holder(
        1,
        "welcome",
        &[Field::list(3, "features", limits::MAX_FEATURES)],
    ),
    Field::holder(
        2,
        "ready",
        &[
            Field::list(1, "ready.incarnations", limits::MAX_REGIONS),
            Field::holder(2, "ready.resume", &[Field::list(2, "resume.lanes", LANES)]),
        ],
    ),
    Field::holder(3, "progress", &[Field::list(1, "progress.lanes", LANES)]),
    Field::holder(
        5,
        "digests",
        &[Field::list(2, "digests.windows", limits::MAX_DIGESTS)],
    ),
    Field::holder(
        11,
        "compared",
        &[Field::list(
            1,
            "compared.windows",
            limits::MAX_COMPARE_WINDOWS as usize,
        )],
    ),
];

const _: () = assert!(TO_DESTINATION.len() <= MOST_FIELDS && TO_SOURCE.len() <= MOST_FIELDS);

/// Refuses a message with a list longer than its cap, or with a holder of lists that is there twice.
///
/// What cannot be read ends the walk: the decoder fails at the same place, and has allocated no more than was counted.
pub(super) fn check(mut message: &[u8], fields: &'static [Field]) -> Result<(), WireDecodeError> {
    let mut counts = [0usize; MOST_FIELDS];
    while message.has_remaining() {
        let Ok((number, wire_type)) = decode_key(&mut message) else {
            return Ok(());
        };
        let found = fields
            .iter()
            .zip(&mut counts)
            .find(|(field, _)| field.number == number && wire_type == WireType::LengthDelimited);
        let Some((field, count)) = found else {
            let context = DecodeContext::default();
            if skip_field(wire_type, number, &mut message, context).is_err() {
                return Ok(());
            }
            continue;
        };
        *count += 1;
        if *count > field.cap {
            return Err(WireDecodeError::Length {
                field: field.name,
                len: *count,
                min: 0,
                max: field.cap,
            });
        }
        let Some(inner) = take(&mut message) else {
            return Ok(());
        };
        check(inner, field.holds)?;
    }
    Ok(())
}

/// The bytes of a length-delimited field, if they are all there.
fn take<'a>(message: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = usize::try_from(decode_varint(message).ok()?).ok()?;
    let (field, rest) = message.split_at_checked(len)?;
    *message = rest;
    Some(field)
}
