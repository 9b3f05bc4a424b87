//! `vmferry-src`: the source agent's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_src::command::main(std::env::args_os())
}
