//! The command line of `vmferry-dst`: arguments into a checked configuration, once.
//!
//! Owns flags, defaults and exit codes; it does nothing with them. Every path and limit that the rest of the agent uses
//! has passed through here, so nothing further in looks at the environment.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vmferry_common::telemetry::LogArgs;
use vmferry_common::units::parse_duration;
use vmferry_proto::ids::GuestName;

/// Receives running virtual machines from `vmferry-src`.
#[derive(Debug, Parser)]
#[command(name = "vmferry-dst", version, max_term_width = 100)]
pub struct Cli {
    /// How much is logged, and how.
    #[command(flatten)]
    pub log: LogArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Wait for guests and receive them, several at once, until told to stop.
    Serve(ServeArgs),
    /// Say how the migrations of this host stand. Exit code 1 if no agent answers or it does not know NAME.
    Status(StatusArgs),
    /// Say who may run a guest, from the journals alone. Exit code 0 only if this host may: usable as a boot guard.
    Owner(NameArgs),
}

/// Arguments of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Address and UDP port to wait on, such as `[::]:7447`; port 0 takes a free one, named on stdout.
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub listen: SocketAddr,
    /// Folder with cert.pem, key.pem and ca.pem, as `vmferry-certs issue` makes it.
    #[arg(long, value_name = "DIR", default_value = "/etc/vmferry/identity")]
    pub identity: PathBuf,
    /// Guest file, or folder of *.toml files: the guests that may arrive here.
    #[arg(long, value_name = "FILE|DIR", default_value = "/etc/vmferry/guests")]
    pub guests: PathBuf,
    /// State folder: journals, locks, register. It must survive a reboot.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmferry")]
    pub state: PathBuf,
    /// Folder of hook scripts: PHASE, and PHASE.d/*.
    #[arg(long, value_name = "DIR", default_value = "/etc/vmferry/hooks")]
    pub hooks: PathBuf,
    /// For how long the copy of a guest is kept when its source has lost the connection: long enough for a switch that
    /// restarts, short enough that a forgotten copy does not hold memory for the night.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub keep: Duration,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Name of the guest; without it, all.
    pub name: Option<GuestName>,
    /// State folder of the agent.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmferry")]
    pub state: PathBuf,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `owner`.
#[derive(Debug, Args)]
pub struct NameArgs {
    /// Name of the guest.
    pub name: GuestName,
    /// State folder of this host's agents.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmferry")]
    pub state: PathBuf,
    /// One JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let words =
        "an IP address of this host and a UDP port: write it as in [::]:7447 or 192.0.2.2:7447";
    text.parse().map_err(|_| words.to_owned())
}
