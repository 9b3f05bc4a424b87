//! `vmferry-simguest`: the embedded guest's command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    vmferry_simguest::command::main(std::env::args_os())
}
