//! What the benchmarks share: series of measurements, their verdict against a target, and the yardsticks.
//!
//! A benchmark prints a ratio to a yardstick that was measured in the same run, turn and turn about with the thing
//! itself, since the machine may be busy with something else. It says whether a target is met and never fails
//! on a number; it fails where a copy is wrong or nothing could be measured.

pub mod cpu;
pub mod native;
pub mod pair;
pub mod picture;
pub mod quinn;
pub mod ready;
pub mod series;
pub mod zstd;

pub use pair::{Moved, Pair};
pub use series::{Series, Target};

use std::process::ExitCode;

/// Runs a benchmark: as a yardstick's process where the arguments say so, else `work`, else (under `cargo test`) nothing.
#[must_use]
pub fn main(work: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    if let Some(code) = quinn::run_if_asked() {
        return code;
    }
    if !std::env::args().any(|arg| arg == "--bench") {
        println!("a benchmark: run it with `cargo bench -p vmferry-tests`");
        return ExitCode::SUCCESS;
    }
    match work() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How many runs: `VMFERRY_BENCH_RUNS`, else `usual`.
#[must_use]
pub fn runs(usual: u32) -> u32 {
    std::env::var("VMFERRY_BENCH_RUNS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(usual)
}
