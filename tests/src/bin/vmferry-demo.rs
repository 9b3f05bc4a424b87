//! `vmferry-demo`: shows a migration on one machine, with real processes.

use std::process::ExitCode;

use vmferry_tests::{demo, harness::role};

/// Keeps the buffers of packets at hand; the system's allocator gives them back to the kernel all the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    role::run_if_asked().unwrap_or_else(demo::main)
}
