//! `vmferry-demo`: shows a migration on one machine, with real processes.

use std::process::ExitCode;

use vmferry_tests::{demo, harness::role};

fn main() -> ExitCode {
    role::run_if_asked().unwrap_or_else(demo::main)
}
