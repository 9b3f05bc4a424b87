//! Both agents' own drive loops in a simulated world, seeded and replayable.
//!
//! Owns the world that stands for everything outside of the agents' code, and the rules by which a run is judged. Real are: both
//! agents from the desk (`vmferry_src::run`) and the server (`vmferry_dst::Server`) on, the machines, the ledger, the journal's
//! and QUIC's own code. Simulated are: hypervisors and guest with its dirty marks, the disks under the journals and under what an
//! agent leaves for a later one, the packets' way, the clock, and the people and service managers around them. No code of the
//! agents knows that it is simulated.
//!
//! ```text
//!  plan ──> run ──┬─ alpha: vmferry-src migrate | recover | resolve     guest, source, tracking
//!  (seed)         ├─ beta:  vmferry-dst serve                           guest, target
//!                 ├─ people, faults at times                            storage, words
//!                 └─ world: hosts, hypervisors, faults at effects       network
//!                       └─ facts ──> check
//! ```
//!
//! # What a seed replays
//! The same build replays a seed to the same log, fact by fact and millisecond by millisecond. Certificates, keys and ids are
//! random in each process; nothing but their bytes depends on them.

mod alpha;
mod check;
pub mod command;
mod dice;
pub mod facts;
mod guest;
mod network;
mod plan;
mod run;
mod source;
mod storage;
mod tally;
mod target;
mod tracking;
mod words;
mod world;

#[cfg(test)]
mod tests;

pub use check::{Broken, Rule};
pub use plan::{Flaw, Plan};
pub use run::{Ground, Outcome, run};
pub use tally::Tally;
