//! The protocol of vmferry: everything two agents must agree on, as types and pure machines.
//!
//! Owns the wire (control messages, data-frame header, limits, versions, coded errors), the copy
//! ledger and the machines of source, destination and handover. It does no I/O, reads no clock, draws
//! no random number and knows neither tokio nor quinn: time and ids come in as arguments, what is to
//! be done goes out as actions. `PROTOCOL.md` beside this crate is the normative text; rules such as
//! `[HAND-4]` are cited from there.

#![warn(clippy::wildcard_enum_match_arm)]

pub mod error;
pub mod frame;
pub mod geometry;
pub mod handover;
pub mod ids;
pub mod layout;
pub mod ledger;
pub mod limits;
pub mod message;
pub mod session;
pub mod session_destination;
pub mod session_source;
pub mod spec;
pub mod version;
pub mod wire;

#[cfg(test)]
mod session_tests;
