//! `vmferry-dst`: the destination agent's command line.

use std::process::ExitCode;

/// Keeps the buffers of packets at hand; the system's allocator gives them back to the kernel all the time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    vmferry_dst::command::main(std::env::args_os())
}
