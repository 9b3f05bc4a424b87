//! A model of two agents around the real handover machines, for exhaustive checking.
//!
//! Owns everything that is not the product: hosts, disks, guests, a network and their faults. It contains no rule of the
//! handover: it carries out the machines' actions as an agent does and looks at what happens to the guests.
//!
//! The network is a set that only grows: a message in it may be delivered at any time, any number of times, or never. That is loss,
//! duplication, delay and reordering at once, and harsher than a QUIC stream. A crash takes everything volatile; a write in flight
//! may or may not be found afterwards. `Mutation` breaks one rule in this wrapper, to show that the check bites.

mod action;
mod check;
mod hosts;
mod replaced;
mod schedule;

pub use action::{Bounds, Fault, HandoverModel, Mutation, Step};
pub use hosts::{DestinationSide, Disk, Guest, Message, SourceSide, Used, World};
