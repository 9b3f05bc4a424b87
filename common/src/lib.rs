//! What both agents need and neither owns.
//!
//! Owns the QUIC endpoint and the host's identity, control and data streams, the window codec and digests,
//! the journal and state folder, hooks, the local control socket, logging, units and pacing. It does not
//! know what a migration is: order and decisions belong to `vmferry-proto` and the agents.

pub mod budget;
mod buffers;
pub mod causes;
pub mod codec;
pub mod compress;
pub mod congestion;
pub mod control;
pub mod cores;
pub mod digest;
pub mod duplicates;
pub mod endpoint;
pub mod hooks;
pub mod identity;
pub mod journal;
pub mod kept;
pub mod lanes;
pub mod link;
pub mod local;
pub mod ownership;
pub mod pace;
pub mod phase;
pub mod process;
pub mod sent;
mod socket;
pub mod state;
pub mod storage;
pub mod telemetry;
pub mod units;
pub mod waits;
