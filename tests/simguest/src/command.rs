//! The verbs of `vmferry-simguest`: each from its arguments to output and an exit code.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::Client;
use crate::cpu::{Content, Workload};
use crate::guest::{Guest, GuestConfig, RamKind, Verdict};
use crate::heartbeat::Heartbeat;
use crate::machine::Machine;
use crate::protocol::Status;
use crate::server::Socket;
use anyhow::Context;
use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};

/// A process that plays a virtual machine: something to migrate where no hypervisor is at hand.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a guest; it lives until `quit`.
    Run(Box<Run>),
    /// Show what a guest is doing.
    Status(At),
    /// Stop a guest.
    Stop(At),
    /// Let a stopped guest go on.
    Cont(At),
    /// Check all of its RAM and disk; exit status 1 if anything is wrong.
    Verify(At),
    /// End a guest.
    Quit(At),
}

#[derive(Debug, Args)]
struct At {
    /// Control socket of the guest.
    #[arg(long)]
    socket: PathBuf,
    /// Print the answer as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Run {
    /// Name of the guest.
    #[arg(long, default_value = "sim")]
    name: String,
    /// Control socket to listen on.
    #[arg(long)]
    socket: PathBuf,
    /// Size of RAM.
    #[arg(long, default_value = "256MiB", value_parser = size)]
    ram: u64,
    /// What RAM is made of.
    #[arg(long, default_value = "anon")]
    ram_kind: RamKind,
    /// Take all of RAM from the system at once, not page by page as it is written.
    #[arg(long)]
    prealloc: bool,
    /// File of the disk; without it there is none. Emptied first, unless --incoming.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Size of the disk.
    #[arg(long, default_value = "64MiB", value_parser = size)]
    disk_size: u64,
    /// RAM written per second.
    #[arg(long, default_value = "1MiB/s", value_parser = size)]
    dirty_rate: u64,
    /// RAM among which the writes are spread (default: all).
    #[arg(long, value_parser = size)]
    working_set: Option<u64>,
    /// Disk written per second.
    #[arg(long, default_value = "0", value_parser = size)]
    disk_rate: u64,
    /// Disk among which the writes are spread (default: all).
    #[arg(long, value_parser = size)]
    disk_working_set: Option<u64>,
    /// What is written.
    #[arg(long, default_value = "mixed")]
    content: Content,
    /// Share of RAM that is written before the start.
    #[arg(long, default_value = "75%", value_parser = percent)]
    fill: u8,
    /// Share of the disk that is written before the start.
    #[arg(long, default_value = "25%", value_parser = percent)]
    disk_fill: u8,
    /// Seed of all content.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// File (appended to) or Unix datagram socket for the heartbeat.
    #[arg(long)]
    heartbeat: Option<PathBuf>,
    /// Time from beat to beat.
    #[arg(long, default_value = "1ms", value_parser = humantime::parse_duration)]
    beat: Duration,
    /// Wait, empty, for the content of another guest.
    #[arg(long)]
    incoming: bool,
    /// Start stopped.
    #[arg(long)]
    paused: bool,
}

/// `100MiB`, `100MiB/s`.
fn size(text: &str) -> Result<u64, String> {
    let text = text.strip_suffix("/s").unwrap_or(text);
    text.parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| format!("{text:?} is not a size: write it like 100MiB"))
}

/// `75%`, `75`.
fn percent(text: &str) -> Result<u8, String> {
    let number = text.strip_suffix('%').unwrap_or(text).parse::<u8>().ok();
    number
        .filter(|number| *number <= 100)
        .ok_or_else(|| format!("{text:?} is not a share: write it like 75%"))
}

/// Runs the command line `args`, program name first. Exit code 1 where the verb failed, 2 where it was wrong.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Printing fails only where nobody reads.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli.verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Run(run) => live(*run),
        Verb::Status(at) => {
            let status = connect(&at)?.status()?;
            show(&at, &status)
        }
        Verb::Stop(at) => {
            let status = connect(&at)?.stop()?;
            show(&at, &status)
        }
        Verb::Cont(at) => {
            let status = connect(&at)?.cont()?;
            show(&at, &status)
        }
        Verb::Quit(at) => Ok(connect(&at)?.quit()?),
        Verb::Verify(at) => {
            let verdict = connect(&at)?.verify()?;
            judge(&at, &verdict)
        }
    }
}

fn connect(at: &At) -> anyhow::Result<Client> {
    Ok(Client::connect(&at.socket)?)
}

fn show(at: &At, status: &Status) -> anyhow::Result<()> {
    if at.json {
        println!("{}", serde_json::to_string(status)?);
        return Ok(());
    }
    println!(
        "{:?}: {} pages and {} disk blocks written, beat {}, {} wrong",
        status.state, status.steps, status.disk_steps, status.beats, status.corrupt
    );
    Ok(())
}

fn judge(at: &At, verdict: &Verdict) -> anyhow::Result<()> {
    if at.json {
        println!("{}", serde_json::to_string(verdict)?);
    } else if verdict.ok {
        println!(
            "{} pages and {} disk blocks are right",
            verdict.pages, verdict.blocks
        );
    }
    anyhow::ensure!(
        verdict.ok,
        "CORRUPT: {} wrong: {}",
        verdict.wrong,
        verdict.details.join("; ")
    );
    Ok(())
}

fn live(run: Run) -> anyhow::Result<()> {
    let config = GuestConfig {
        ram_len: run.ram,
        ram_kind: run.ram_kind,
        disk: run.disk.map(|path| (path, run.disk_size)),
        seed: run.seed,
        fill: run.fill,
        disk_fill: run.disk_fill,
        workload: Workload {
            dirty_rate: run.dirty_rate,
            working_set: run.working_set.unwrap_or(u64::MAX),
            disk_rate: run.disk_rate,
            disk_working_set: run.disk_working_set.unwrap_or(u64::MAX),
            content: run.content,
            beat_us: u64::try_from(run.beat.as_micros()).context("--beat is too long")?,
        },
    };
    let heartbeat = Heartbeat::open(run.heartbeat.as_deref()).context("heartbeat")?;
    let guest = if run.incoming {
        Guest::incoming(&config)
    } else {
        Guest::create(&config)
    };
    let guest = guest.context("the guest cannot be made")?;
    if run.prealloc {
        let taken = guest.ram().preallocate();
        taken.context("the system does not give all of the RAM (--prealloc)")?;
    }
    let socket = Socket::bind(&run.socket)
        .with_context(|| format!("cannot listen on {}", run.socket.display()))?;
    let orders = socket.serve().context("control socket")?;
    let mut machine = Machine::new(run.name, config.ram_kind, guest, heartbeat, !run.paused);
    println!("ready on {}", run.socket.display());
    let end = machine.live(&orders);
    drop((machine, orders));
    socket.close();
    end.context("the guest's disk failed")
}
