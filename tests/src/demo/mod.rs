//! The demo: two hosts on this machine, a guest that works, and its move, shown step by step.
//!
//! Owns what is said on the way and the verdict; certificates, agents and guests are the harness's and the lab's. It
//! ends with success only if the guest's memory and disk were compared, block by block, and are right.

mod qemu;
mod sim;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Parser, ValueEnum};
use serde_json::Value;
use vmferry_common::units::Size;

use crate::harness::role::Programs;
use crate::harness::{Host, Hosts, hosts::Agent};

/// Shows a migration on this machine: certificates, two agents and a guest, all real processes, on loopback.
#[derive(Debug, Parser)]
#[command(name = "vmferry-demo", version)]
struct Cli {
    /// What is moved: the embedded guest, or a real Linux guest under QEMU.
    #[arg(long, value_enum, default_value = "sim")]
    guest: Kind,
    /// Memory of the guest.
    #[arg(long, default_value = "512MiB")]
    memory: Size,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The embedded guest: needs nothing but Linux 6.7.
    Sim,
    /// A Linux kernel under QEMU.
    Qemu,
}

/// Runs the demo with the arguments of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let stopped = match stop_on_signal() {
        Ok(stopped) => stopped,
        Err(error) => {
            eprintln!("error: no signal handler: {error}");
            return ExitCode::FAILURE;
        }
    };
    let shown = match cli.guest {
        Kind::Sim => sim::show(cli.memory.0),
        Kind::Qemu => qemu::show(cli.memory.0),
    };
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if stopped.load(std::sync::atomic::Ordering::Relaxed) => {
            eprintln!("\nstopped: every process of the demo was ended and its folder removed");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ctrl-C reaches the agents too; this process must live on to clean up after them.
fn stop_on_signal() -> std::io::Result<std::sync::Arc<std::sync::atomic::AtomicBool>> {
    let stopped = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = stopped.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handler = {
        let _in_runtime = runtime.enter();
        tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?
    };
    std::thread::spawn(move || {
        let mut handler = handler;
        runtime.block_on(async {
            while handler.recv().await.is_some() {
                seen.store(true, std::sync::atomic::Ordering::Relaxed);
            }
        });
    });
    Ok(stopped)
}

/// The two hosts.
struct Stage {
    /// Keeps the folder.
    _hosts: Hosts,
    alpha: Host,
    beta: Host,
}

fn set_the_stage() -> anyhow::Result<Stage> {
    let executable = std::env::current_exe().context("where is this program?")?;
    let hosts = Hosts::new(Programs::played_by(&executable))?;
    say("folder", &hosts.dir().display().to_string());
    let (alpha, beta) = (hosts.host("alpha")?, hosts.host("beta")?);
    say(
        "certificates",
        "a private CA, and identities for the hosts alpha and beta",
    );
    Ok(Stage {
        _hosts: hosts,
        alpha,
        beta,
    })
}

fn start_destination(host: &Host) -> anyhow::Result<Agent> {
    let agent = host.serve(&["-q"])?;
    let words = format!(
        "vmferry-dst on {}, process {}, 127.0.0.1:{}",
        host.name(),
        agent.process.pid(),
        agent.port
    );
    say("destination", &words);
    Ok(agent)
}

/// Moves `guest` away from `host` in front of the user.
fn migrate(host: &Host, agent: &Agent, guest: &str, more: &[&str]) -> anyhow::Result<Value> {
    let words = format!(
        "vmferry-src on {}: migrate {guest}.toml --to 127.0.0.1:{} {}",
        host.name(),
        agent.port,
        more.join(" ")
    );
    say("source", &words);
    let done = host.migrate_in_view(guest, agent.port, more, Duration::from_secs(300))?;
    if done.code() != 0 {
        bail!(
            "the migration ended with exit code {}\n{}",
            done.code(),
            agent.process.stderr()
        );
    }
    let report = done.json()?;
    if report["outcome"] != "committed" {
        bail!("the migration was not committed: {report}");
    }
    Ok(report)
}

/// The options of the second move. What is compared while the guest stands still counts towards the downtime.
const VERIFIED: [&str; 6] = [
    "--verify",
    "full",
    "--max-downtime",
    "3s",
    "--pause-timeout",
    "120s",
];

/// Whether a report says that everything was compared.
fn check_verified(report: &Value) -> anyhow::Result<()> {
    let all =
        report["memory_bytes"].as_u64().unwrap_or(0) + report["disk_bytes"].as_u64().unwrap_or(0);
    if report["verified"]["mode"] != "full"
        || report["verified"]["bytes"].as_u64() != Some(all)
        || all == 0
    {
        bail!("the migration was not verified: {report}");
    }
    Ok(())
}

fn say(what: &str, words: &str) {
    println!("{what:>13}  {words}");
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
