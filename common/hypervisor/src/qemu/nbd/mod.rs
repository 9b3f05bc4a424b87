//! Client of the NBD protocol on a Unix socket: fixed newstyle, structured replies, meta contexts.
//!
//! Owns one connection to one export, with many requests in flight. It knows nothing of guests. Invariants:
//! no length, offset or id that the server sends is used before it is checked against the request it belongs to;
//! a request goes out whole or the connection ends; a caller that goes away disturbs no other.
//!
//! The shape of messages is in [`wire`], from
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>.

mod client;
mod error;
mod negotiate;
mod pending;
pub mod wire;

pub use client::{MAX_TRANSFER, Nbd};
pub use error::NbdError;
pub use wire::Extent;

#[cfg(test)]
mod tests;
