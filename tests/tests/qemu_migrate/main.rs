//! Real Linux guests under QEMU move between real agents: the whole of the main job, on real input.
//!
//! Boots are what costs time here, so a test takes one guest through several journeys where each leaves it as the next
//! wants it. Nothing is asserted of how long anything takes; the figures are printed.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests fail as the tests themselves do"
)]

mod guests;
mod moves;
mod refused;
mod resumes;
mod shared;
mod states;
mod stays;

use vmferry_tests::harness::role::Programs;

fn programs() -> Programs {
    Programs::played_by(env!("CARGO_BIN_EXE_vmferry-demo").as_ref())
}
