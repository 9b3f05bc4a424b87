//! The destination agent: waits for guests, receives them, and starts them once they are this host's.
//!
//! Owns the server, sessions, the writing of frames and the carrying out of what the handover machine decides. Does not own the
//! protocol (`vmferry-proto`), hypervisors (`vmferry-hypervisor`) nor any decision about who may run a guest. Invariants: only
//! guests with a file on this host are accepted, only from senders that it names; a peer can write nothing outside the
//! regions of the guest it may send; whatever fails before OWNED leaves nothing behind here and the guest unharmed there.
//!
//! ```text
//!  server ── admission ──> migration (one task per guest) ── jobs ──> TargetGuest
//!                             │  machine: vmferry_proto::handover     (prepare, load, start, discard)
//!                             ├─ session ── lanes (apply) ──> sink ──> RegionWriter
//!                             │     └─ board: applied, flushed ──> Progress
//!                             └─ receipt: Final, completeness, digests, device state
//! ```
//!
//! # Hooks
//! Scripts `PHASE` and `PHASE.d/*` in the hooks folder get the guest's name and the phase as arguments and one JSON object
//! (`side guest migration_id generation peer phase`) on stdin. Before they begin, `negotiate` (first session), `prepare`
//! (each copy that is made), `copy`, `converged`, `pause` (before the attempt is opened: the guest still runs), `final` and
//! `load` (the guest is paused) are asked and may refuse with a non-zero exit. `commit`, `start`, `release` and
//! the end (`committed`, `cancelled`, `failed`) are told afterwards; a failure is logged.

mod admission;
mod apply;
mod board;
pub mod cli;
pub mod command;
mod compare;
pub mod config;
mod coverage;
mod durable;
mod earlier;
mod error;
mod flusher;
mod hooks;
mod host;
mod meter;
mod migration;
mod origins;
mod receipt;
pub mod serve;
mod server;
mod session;
mod sink;
mod status;
mod store;
mod streams;
mod verify;

pub use host::{Host, RunFolder};
pub use server::Server;
pub use status::{LaneStatus, MigrationStatus};
