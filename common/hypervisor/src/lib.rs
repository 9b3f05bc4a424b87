//! Guest drivers behind two traits: [`SourceGuest`] and [`TargetGuest`].
//!
//! Owns how a hypervisor is spoken to: attach, preflight, tracking, barrier, pause, device state, start.
//! Does not own when any of it happens (the engines in the agents) nor who may run the guest (the
//! handover machines in `vmferry-proto`, whose `RunPermit` the drivers consume). A new hypervisor is one new
//! folder here and one line in the table of `open`.

pub mod config;
pub mod error;
mod gone;
pub mod guest;
pub mod launch;
pub mod marks;
pub mod memory;
pub mod open;
pub mod qemu;
pub mod sim;
mod space;
mod touching;
pub mod watched;

pub use error::GuestError;
pub use gone::GoneGuest;
pub use guest::{
    GuestLife, GuestPaused, PauseError, RegionReader, RegionWriter, SavingDeviceState, Settlement,
    SourceGuest, StartError, Taken, TargetGuest,
};
pub use marks::{MarkLog, TrackingLeft};
