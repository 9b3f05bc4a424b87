//! `vmferry-demo`: shows a migration on one machine, with real processes.

use std::process::ExitCode;

use vmferry_tests::harness::role;

fn main() -> ExitCode {
    if let Some(code) = role::run_if_asked() {
        return code;
    }
    ExitCode::SUCCESS
}
