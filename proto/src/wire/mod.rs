//! The control stream: typed messages to framed bytes and back, and the only door between the two.
//!
//! Owns the framing (a `u32` little-endian length, then one protobuf message; `[WIRE-6]`), the caps and the
//! refusal of whatever the schema lets through but the protocol does not: unknown enum values, missing members,
//! numbers and texts outside their caps. It does not know which message is due: the session machines do.
//! A message that left this module is within every cap of [`crate::limits`]; a length is checked before anything is
//! allocated for it; and what this side is about to send passes the same door first.

mod lists;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::marker::PhantomData;

use prost::Message as _;

use crate::error::{ErrorCode, WireError};
use crate::limits::{CONTROL_PREFIX, MAX_CONTROL_MESSAGE};
use crate::message::{ToDestination, ToSource};

/// The types that prost makes of the schema.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "made by prost-build from control.proto; documented there"
)]
mod schema {
    include!(concat!(env!("OUT_DIR"), "/vmferry.v1.rs"));
}

/// Bytes that are no message of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireDecodeError {
    /// The announced length is above the cap.
    #[error("a control message of {len} bytes is announced, {MAX_CONTROL_MESSAGE} are allowed")]
    TooLong {
        /// What was announced.
        len: u64,
    },
    /// The bytes are not protobuf of the schema.
    #[error("a control message cannot be decoded: {0}")]
    Undecodable(prost::DecodeError),
    /// A member that must be there is not, or is one that this version does not know.
    #[error("field {field} is missing or unknown")]
    Missing {
        /// Name in the schema.
        field: &'static str,
    },
    /// An enum value that this version does not know.
    #[error("field {field} has the unknown value {value}")]
    UnknownValue {
        /// Name in the schema.
        field: &'static str,
        /// The value.
        value: i64,
    },
    /// A number outside its range.
    #[error("field {field} is {value}, allowed are {min} to {max}")]
    OutOfRange {
        /// Name in the schema.
        field: &'static str,
        /// The value.
        value: u64,
        /// Smallest allowed.
        min: u64,
        /// Largest allowed.
        max: u64,
    },
    /// A list, text or byte string outside its cap.
    #[error("field {field} has length {len}, allowed are {min} to {max}")]
    Length {
        /// Name in the schema.
        field: &'static str,
        /// Its length.
        len: usize,
        /// Shortest allowed.
        min: usize,
        /// Longest allowed.
        max: usize,
    },
    /// A text with characters that do not belong in it, or a guest name that is none.
    #[error("field {field} holds characters that are not allowed there")]
    Text {
        /// Name in the schema.
        field: &'static str,
    },
    /// A list whose entries repeat or are out of order.
    #[error("field {field} has repeated entries or entries out of order")]
    Order {
        /// Name in the schema.
        field: &'static str,
    },
    /// The stream ended within a message.
    #[error("the control stream ended within a message")]
    Truncated,
    /// An earlier message of this stream was refused.
    #[error("an earlier message of this control stream was refused")]
    AfterRefusal,
}

impl From<WireDecodeError> for WireError {
    fn from(error: WireDecodeError) -> Self {
        Self::new(ErrorCode::ProtocolViolation, error.to_string())
    }
}

/// A message that this side must not send: the peer would refuse it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the message breaks the protocol's own caps")]
pub struct WireEncodeError(#[source] pub WireDecodeError);

mod sealed {
    use super::WireDecodeError;
    use super::lists::Field;

    /// How a typed message and its schema type become each other.
    pub trait Door: Sized {
        type Schema: prost::Message + Default;
        /// The lists of the schema type, to be counted before it is decoded.
        const LISTS: &'static [Field];
        fn to_schema(&self) -> Self::Schema;
        fn from_schema(schema: Self::Schema) -> Result<Self, WireDecodeError>;
    }
}

use sealed::Door;

/// A message of the control stream: [`ToDestination`] or [`ToSource`].
pub trait ControlMessage: Door {}

impl ControlMessage for ToDestination {}
impl ControlMessage for ToSource {}

/// The framed bytes of `message`.
///
/// # Errors
/// The message breaks a cap, so the peer would refuse it. A [`WireError`] in a message never does: its detail is cut.
pub fn encode<M: ControlMessage>(message: &M) -> Result<Vec<u8>, WireEncodeError> {
    let schema = message.to_schema();
    let len = schema.encoded_len();
    let prefix = u32::try_from(len)
        .ok()
        .filter(|_| len <= MAX_CONTROL_MESSAGE)
        .ok_or(WireEncodeError(WireDecodeError::TooLong {
            len: len as u64,
        }))?;
    let mut bytes = Vec::with_capacity(CONTROL_PREFIX + len);
    bytes.extend_from_slice(&prefix.to_le_bytes());
    schema.encode_raw(&mut bytes);
    M::from_schema(schema).map_err(WireEncodeError)?;
    Ok(bytes)
}

/// [`encode`] for what the source says.
///
/// # Errors
/// As [`encode`].
pub fn encode_to_destination(message: &ToDestination) -> Result<Vec<u8>, WireEncodeError> {
    encode(message)
}

/// [`encode`] for what the destination says.
///
/// # Errors
/// As [`encode`].
pub fn encode_to_source(message: &ToSource) -> Result<Vec<u8>, WireEncodeError> {
    encode(message)
}

/// Length of the message behind `prefix`, within the cap: the reader may allocate that much.
///
/// # Errors
/// [`WireDecodeError::TooLong`].
pub fn body_len(prefix: [u8; CONTROL_PREFIX]) -> Result<usize, WireDecodeError> {
    let len = u32::from_le_bytes(prefix);
    usize::try_from(len)
        .ok()
        .filter(|len| *len <= MAX_CONTROL_MESSAGE)
        .ok_or(WireDecodeError::TooLong {
            len: u64::from(len),
        })
}

/// The message whose bytes (without the prefix) are `body`.
///
/// # Errors
/// Whatever of [`WireDecodeError`] is wrong with it.
pub fn decode_body<M: ControlMessage>(body: &[u8]) -> Result<M, WireDecodeError> {
    if body.len() > MAX_CONTROL_MESSAGE {
        return Err(WireDecodeError::TooLong {
            len: body.len() as u64,
        });
    }
    lists::check(body, M::LISTS)?;
    let schema = M::Schema::decode(body).map_err(WireDecodeError::Undecodable)?;
    M::from_schema(schema)
}

/// Decodes a control stream from pieces of any size.
///
/// Holds at most one message; its buffer grows only with bytes that have come, never with bytes announced.
/// After the first error it stays refused: nothing behind a broken message is looked at.
#[derive(Debug)]
pub struct Decoder<M> {
    state: State,
    message: PhantomData<fn() -> M>,
}

#[derive(Debug)]
enum State {
    Prefix { have: Vec<u8> },
    Body { len: usize, have: Vec<u8> },
    Refused,
}

impl<M> Default for Decoder<M> {
    fn default() -> Self {
        Self {
            state: State::Prefix { have: Vec::new() },
            message: PhantomData,
        }
    }
}

impl<M: ControlMessage> Decoder<M> {
    /// A decoder at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from the front of `input` up to the end of the next message and returns that message;
    /// `None` once `input` is used up. Call again while `input` is not empty.
    ///
    /// # Errors
    /// The stream is broken; all later calls answer [`WireDecodeError::AfterRefusal`].
    pub fn next_message(&mut self, input: &mut &[u8]) -> Result<Option<M>, WireDecodeError> {
        let (state, result) = match std::mem::replace(&mut self.state, State::Refused) {
            State::Prefix { have } => Self::step_prefix(have, input),
            State::Body { len, have } => Self::step_body(len, have, input),
            State::Refused => (State::Refused, Err(WireDecodeError::AfterRefusal)),
        };
        self.state = state;
        result
    }

    fn step_prefix(
        mut have: Vec<u8>,
        input: &mut &[u8],
    ) -> (State, Result<Option<M>, WireDecodeError>) {
        take_up_to(&mut have, CONTROL_PREFIX, input);
        let Ok(prefix) = <[u8; CONTROL_PREFIX]>::try_from(have.as_slice()) else {
            return (State::Prefix { have }, Ok(None));
        };
        match body_len(prefix) {
            Ok(len) => {
                have.clear();
                Self::step_body(len, have, input)
            }
            Err(error) => (State::Refused, Err(error)),
        }
    }

    fn step_body(
        len: usize,
        mut have: Vec<u8>,
        input: &mut &[u8],
    ) -> (State, Result<Option<M>, WireDecodeError>) {
        take_up_to(&mut have, len, input);
        if have.len() < len {
            return (State::Body { len, have }, Ok(None));
        }
        match decode_body(&have) {
            Ok(message) => (State::Prefix { have: Vec::new() }, Ok(Some(message))),
            Err(error) => (State::Refused, Err(error)),
        }
    }

    /// Says whether the stream may end here: between two messages.
    ///
    /// # Errors
    /// [`WireDecodeError::Truncated`] within a message, [`WireDecodeError::AfterRefusal`] after an error.
    pub fn finish(&self) -> Result<(), WireDecodeError> {
        match &self.state {
            State::Prefix { have } if have.is_empty() => Ok(()),
            State::Prefix { .. } | State::Body { .. } => Err(WireDecodeError::Truncated),
            State::Refused => Err(WireDecodeError::AfterRefusal),
        }
    }
}

fn take_up_to(have: &mut Vec<u8>, want: usize, input: &mut &[u8]) {
    let count = want.saturating_sub(have.len()).min(input.len());
    let (taken, rest) = input.split_at(count);
    have.extend_from_slice(taken);
    *input = rest;
}
