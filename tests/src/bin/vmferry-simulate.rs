//! `vmferry-simulate`: both agents' drive loops in a simulated world, many thousand times.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_tests::simulation::command::main()
}
