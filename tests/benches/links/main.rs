//! vmferry on emulated links: beside QEMU's own migration of the same guest, and by itself against its targets.
//!
//! ```text
//! cargo bench -p vmferry-tests --bench links                            the comparison, some ten minutes
//! cargo bench -p vmferry-tests --bench links -- --quick --link 1gbit    a part of it, with a smaller guest
//! cargo bench -p vmferry-tests --bench links -- --table goodput,stop    other tables
//! cargo bench -p vmferry-tests --bench links -- --runs 5 --write        medians of five, and the picture in the README
//! ```
//!
//! Needs root, and the comparison QEMU. Every run has a time limit; what does not end in it has no figure. Both hosts, the
//! guest and the link share this machine: figures taken while it does something else say little.

mod compare;
mod goodput;
mod limit;
mod share;
mod sim;
mod trace;

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use vmferry_tests::bench;
use vmferry_tests::harness::Running;
use vmferry_tests::link::Link;

/// The executable that plays agents and embedded guests.
const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");

/// A source that is told to stop does so within this time.
const INTERRUPTED: Duration = Duration::from_secs(30);

#[derive(Debug, Parser)]
#[command(about = "vmferry on emulated links")]
struct Args {
    /// What to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "compare")]
    table: Vec<Table>,
    /// Runs of each figure; the figure is their median.
    #[arg(long)]
    runs: Option<u32>,
    /// Smaller guests.
    #[arg(long)]
    quick: bool,
    /// Only links whose name contains this.
    #[arg(long, default_value = "")]
    link: String,
    /// Only systems (of the goodput: controllers) whose name contains this.
    #[arg(long, default_value = "")]
    system: String,
    /// Write the picture that the README shows.
    #[arg(long)]
    write: bool,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Table {
    /// vmferry and QEMU's own migration of one Linux guest.
    Compare,
    /// Share of the line that a copy fills, how soon, and what CPU time it takes.
    Goodput,
    /// Whether a downtime limit of 50 ms is kept while the guest writes at half the rate.
    Stop,
    /// How much is sent twice.
    Resend,
    /// How much the copy slows the guest down.
    Slowdown,
    /// What it takes of a line beside one TCP flow.
    Share,
    /// Whether the wire carries what `--max-bandwidth` says.
    Limit,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compare => "vmferry and QEMU's own migration",
            Self::Goodput => "share of the line that a copy fills",
            Self::Stop => "downtime limit of 50 ms, writer at half the link rate",
            Self::Resend => "blocks sent to distinct blocks, working set of 10 %",
            Self::Slowdown => "slow-down of a writer at 0.3 of the link rate",
            Self::Share => "share of the line beside one flow of the kernel's Cubic",
            Self::Limit => "--max-bandwidth over any second",
        })
    }
}

/// Ends a copy that was only to be watched, and is still under way.
fn interrupt(mut source: Running) -> Result<()> {
    ensure!(!source.has_ended()?, "the copy was done too early");
    source.signal(rustix::process::Signal::INT)?;
    source.wait(INTERRUPTED)?;
    Ok(())
}

fn main() -> ExitCode {
    bench::main(|| {
        let args = Args::parse();
        if let Err(missing) = Link::possible() {
            println!("SKIPPED: {missing}");
            return Ok(());
        }
        for table in &args.table {
            println!("== {table}");
            match table {
                Table::Compare => compare::run(&args)?,
                Table::Goodput => goodput::run(&args)?,
                Table::Stop => sim::stop(&args)?,
                Table::Resend => sim::resend(&args)?,
                Table::Slowdown => sim::slowdown(&args)?,
                Table::Share => share::run(&args)?,
                Table::Limit => limit::run(&args)?,
            }
        }
        Ok(())
    })
}
