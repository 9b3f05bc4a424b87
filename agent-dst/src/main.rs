//! `vmferry-dst`: the destination agent's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_dst::command::main(std::env::args_os())
}
