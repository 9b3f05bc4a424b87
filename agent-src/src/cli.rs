//! The command line of `vmferry-src`: what can be typed, its help, and the typed options that come of it.
//!
//! Owns names, units, defaults and help texts, and the one door from typed text to checked values:
//! [`MigrateArgs::into_options`]. Behind it nobody checks again. It opens no socket; the only file it reads
//! is the guest file. Whatever is wrong here ends with exit code 2 ([`EXIT_USAGE`]) before anything was touched.

mod options;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use vmferry_common::compress::CompressMode;
use vmferry_common::congestion::Congestion;
use vmferry_common::endpoint::HostPort;
use vmferry_common::telemetry::LogArgs;
use vmferry_common::units::{Rate, parse_duration, parse_rate};
use vmferry_proto::ids::GuestName;
use vmferry_proto::limits::{DEFAULT_LANES, MAX_CONNECTIONS, MAX_LANES};

use crate::policy::{Cutover, OnStall};
use crate::settings::Setting;

pub use options::{LONGEST_DOWNTIME, MigrateOptions, UsageError, Verify};

/// Exit code of wrong usage or configuration (clap's own, too).
pub const EXIT_USAGE: u8 = 2;
/// Where certificate, key and CA are unless told otherwise.
pub const DEFAULT_IDENTITY: &str = "/etc/vmferry/identity";
/// Where the journals are unless told otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/vmferry";
/// Where guest files are looked up by name.
pub const DEFAULT_GUESTS: &str = "/etc/vmferry/guests";
/// Where hook scripts are unless told otherwise.
pub const DEFAULT_HOOKS: &str = "/etc/vmferry/hooks";

const EXIT_STATUS: &str = "\
EXIT STATUS
  0  committed: the guest belongs to the destination
  1  failed: the guest runs at the source
  2  wrong usage or configuration: nothing was touched
  3  in doubt: the guest is paused at the source until the destination answers
  4  cancelled: the guest runs at the source
`cutover` and `recover` exit like the migration that they end. `owner` exits 0 only if this host may run the guest.
`vmferry-src explain CODE` says more of every ending and error code.

FILES
  /etc/vmferry/identity/      cert.pem, key.pem, ca.pem of this host (made by vmferry-certs issue)
  /etc/vmferry/guests/        NAME.toml, one per guest
  /etc/vmferry/hooks/         PHASE and PHASE.d/*, run at each phase
  /var/lib/vmferry/           journals: keep them, they say who may run which guest";

const EXAMPLES: &str = "\
EXAMPLES
  A guest that has a file in /etc/vmferry/guests, to host beta:
    vmferry-src migrate web-1 --to beta:7447
  A QEMU without a guest file, downtime at most 100 ms, over half of a 1 Gbit/s link:
    vmferry-src migrate --qmp /run/qemu/web-1.qmp --name web-1 --to beta:7447 \\
        --max-downtime 100ms --max-bandwidth 500Mbit
  Keep it ready, and move it when an orchestrator says so:
    vmferry-src migrate web-1 --to beta:7447 --cutover manual &
    vmferry-src cutover web-1
  Give the link back in office hours, while it is copied:
    vmferry-src set web-1 max-bandwidth=200Mbit

UNITS
  durations  300ms, 10s, 5m, 1h 30m
  rates      500Mbit, 1Gbit/s (bits, decimal) or 100MiB/s (bytes)
A bare number is refused.
";

const SET_EXAMPLE: &str = "\
EXAMPLES
  vmferry-src set web-1 max-bandwidth=500Mbit
  vmferry-src set web-1 max-bandwidth=none max-downtime=100ms";

/// Moves running virtual machines to another host, memory and disks, while they keep running.
#[derive(Debug, Parser)]
#[command(name = "vmferry-src", version, after_long_help = EXIT_STATUS)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// How much to say.
    #[command(flatten, next_help_heading = "Logging")]
    pub log: LogArgs,
}

/// What `vmferry-src` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Move a guest to another host.
    #[command(after_help = "See --help for examples, units and exit codes.", after_long_help = long_help())]
    Migrate(Box<MigrateArgs>),
    /// Show how far a migration is, or what the journal says of the last one.
    Status(GuestArgs),
    /// Trigger the cutover of a migration started with `--cutover manual`, and wait for its end.
    Cutover(GuestArgs),
    /// Change limits of a running migration: max-bandwidth=RATE (or none), max-downtime=TIME.
    #[command(after_help = SET_EXAMPLE)]
    Set(SetArgs),
    /// Cancel a migration: the guest runs on here. Refused once the decision to move is made.
    Cancel(GuestArgs),
    /// Tell whether this host may run the guest (exit code 0) or not: usable as a boot guard.
    ///
    /// Reads the journals of this host only, so it works when nothing else does.
    Owner(GuestArgs),
    /// Finish what a killed agent or a rebooted host left behind, as the journal says.
    ///
    /// Resumes a guest that was paused before the decision; asks the destination if the migration is in doubt.
    Recover(RecoverArgs),
    /// End a doubt by hand, when the destination host is lost for good.
    Resolve(ResolveArgs),
    /// Explain an ending or an error code: what is true now, and what to do.
    Explain {
        /// The code, as logs and `--json` show it: in-doubt, not-converging, …; without it, all of them are listed.
        code: Option<String>,
    },
}

fn long_help() -> String {
    format!("{EXAMPLES}\n{EXIT_STATUS}")
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Guest file, or the name of a guest that has one in /etc/vmferry/guests.
    ///
    /// Anything with a slash or ending in .toml is a file, everything else a name: `web-1` means
    /// /etc/vmferry/guests/web-1.toml. The file says: name, driver = "qemu", qmp = "PATH", and optionally `[[disk]]`
    /// with node and mode = "copy" or "shared".
    #[arg(value_name = "GUEST", required_unless_present = "qmp", conflicts_with_all = ["qmp", "name"])]
    pub guest: Option<String>,
    /// QMP socket of a running QEMU that has no guest file; all its disks are copied.
    #[arg(long, value_name = "PATH", requires = "name")]
    pub qmp: Option<PathBuf>,
    /// Name of the guest, the same as at the destination; only with --qmp.
    #[arg(long, requires = "qmp")]
    pub name: Option<GuestName>,
    /// Agent at the destination, such as beta:7447, 192.0.2.7:7447 or `[2001:db8::7]:7447`.
    ///
    /// The host part must be one of the names or addresses in that agent's certificate.
    #[arg(long, value_name = "HOST:PORT")]
    pub to: HostPort,
    /// Folder with cert.pem, key.pem and ca.pem of this host.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_IDENTITY)]
    pub identity: PathBuf,
    /// Folder of the journals.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
    /// Folder of the hook scripts; it need not exist.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_HOOKS)]
    pub hooks: PathBuf,
    /// Who starts the cutover: the agent as soon as it fits, or `vmferry-src cutover NAME`.
    ///
    /// With `manual` the guest is copied until it is converged and then kept so, for as long as --timeout allows.
    #[arg(long, value_enum, default_value_t)]
    pub cutover: Cutover,
    /// Longest time that the guest may stand still, such as 300ms.
    ///
    /// The cutover starts only when its predicted time fits: what is left to send, the device state, round trips,
    /// hooks and --verify, all as measured.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = parse_duration)]
    pub max_downtime: Duration,
    /// Longest pause before a cutover that takes too long is rolled back [default: 5 × --max-downtime, at least 1s].
    ///
    /// A rollback costs the guest the whole pause for nothing, so it should not happen because a prediction was off by
    /// half; five times over, something is broken. Never used once the decision to move is recorded. A cutover
    /// forced by --on-stall gets three times its own predicted time, if that is more.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub pause_timeout: Option<Duration>,
    /// Most that is sent, such as 1Gbit or 100MiB/s [default: as much as the link carries].
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub max_bandwidth: Option<Rate>,
    /// Give up when the guest has not been moved after this time, such as 1h.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    pub timeout: Duration,
    /// What to do with a guest that dirties faster than the link carries.
    #[arg(long, value_enum, default_value_t)]
    pub on_stall: OnStall,
    /// Data streams of the session, 1 to 64: more for long fat links.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_LANES,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_LANES)))]
    pub lanes: u8,
    /// QUIC connections of the session, 1 to 16: more for lossy long-distance links; at most one per lane.
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CONNECTIONS)))]
    pub connections: u8,
    /// How to find out what the link carries: a model of the path, or by loss as TCP does.
    ///
    /// `model` fills lines that lose packets at random, keeps queues short, and shares with TCP. `cubic` is for lines on which
    /// vmferry must give way as an ordinary TCP connection would.
    #[arg(long, value_enum, default_value_t)]
    pub congestion: Congestion,
    /// Compression: auto, off, or a zstd level from -7 (fast) to 19 (small).
    ///
    /// `auto` compresses frame by frame where it makes the copy faster, and does not where it would slow it down.
    #[arg(
        long,
        value_name = "auto|off|LEVEL",
        default_value = "auto",
        allow_negative_numbers = true
    )]
    pub compress: CompressMode,
    /// How much of the copy is compared by digest while the guest is paused, before the decision.
    ///
    /// `full` reads every byte on both sides and lengthens the downtime by about a second per GiB, which --max-downtime
    /// must allow for.
    #[arg(long, value_enum, default_value_t)]
    pub verify: Verify,
    /// Print the result as one JSON object on stdout; progress goes to stderr as ever.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of the commands that concern one guest.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// Name of the guest.
    pub name: GuestName,
    /// Folder of the journals.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
    /// Print the answer as one JSON object on stdout.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    /// Which guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// What to change, as often as there are things to change.
    #[arg(value_name = "KEY=VALUE", required = true)]
    pub settings: Vec<Setting>,
}

/// Arguments of `recover`.
#[derive(Debug, Args)]
pub struct RecoverArgs {
    /// Which guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// Folder with cert.pem, key.pem and ca.pem of this host [default: the one that the migration was given].
    #[arg(long, value_name = "DIR")]
    pub identity: Option<PathBuf>,
}

/// Arguments of `resolve`.
#[derive(Debug, Args)]
pub struct ResolveArgs {
    /// Which guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// I have made sure that the destination host cannot run this guest nor write to its disks, now or later.
    ///
    /// The guest is then resumed here. If that host does run it, there are two of it: switch it off or cut its storage
    /// and network first. A guest with a shared disk is ended instead, to be booted afresh.
    #[arg(long, required = true)]
    pub destination_is_fenced: bool,
}
