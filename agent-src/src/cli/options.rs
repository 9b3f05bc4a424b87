//! Checked options of a migration: what the engine gets, and why arguments are refused.
//!
//! Owns the rules that one argument alone cannot show, and the reading of the guest file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmferry_common::compress::CompressMode;
use vmferry_common::congestion::Congestion;
use vmferry_common::endpoint::HostPort;
use vmferry_common::units::{Rate, Span};
use vmferry_hypervisor::config::{DriverKind, SourceConfig};
use vmferry_proto::ids::GuestName;
use vmferry_proto::limits::DEFAULT_LANES;

use super::{DEFAULT_GUESTS, MigrateArgs};
use crate::policy::{Cutover, Limits, OnStall};

/// Longest duration that is taken: adding it to any clock cannot overflow, and nobody means more.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest downtime that is taken; longer is a cold migration.
pub const LONGEST_DOWNTIME: Duration = Duration::from_secs(3600);
/// A guest file is some lines; more is another file.
const MAX_GUEST_FILE: u64 = 1 << 20;

/// A migration as the user wants it; everything in it is checked.
#[derive(Debug, Clone)]
pub struct MigrateOptions {
    /// The guest and how to reach it.
    pub guest: SourceConfig,
    /// The agent at the destination.
    pub to: HostPort,
    /// Folder with certificate, key and CA.
    pub identity: PathBuf,
    /// Folder of the journals.
    pub state: PathBuf,
    /// Folder of the hook scripts; it need not exist.
    pub hooks: PathBuf,
    /// What the convergence policy may do.
    pub limits: Limits,
    /// Most that is sent, in bytes per second; `None` is without bound.
    pub max_bandwidth: Option<Rate>,
    /// Data streams, at least as many as connections.
    pub lanes: u8,
    /// QUIC connections.
    pub connections: u8,
    /// How the sender finds out what the link carries.
    pub congestion: Congestion,
    /// Compression.
    pub compress: CompressMode,
    /// How much is compared before the decision.
    pub verify: Verify,
    /// Whether the result goes to stdout as a JSON object.
    pub json: bool,
}

/// How much of the copy is compared by digest while the guest is paused.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verify {
    /// Nothing: completeness is still checked.
    #[default]
    Off,
    /// Some windows of every region.
    Sample,
    /// Every region, whole.
    Full,
}

/// Arguments or a guest file that cannot be used. Exit code 2; nothing was touched.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// A duration is zero or beyond reason.
    #[error("{option} {} is out of range: use more than 0 and at most {}", Span(*given), Span(*most))]
    Duration {
        /// The option.
        option: &'static str,
        /// Its value.
        given: Duration,
        /// The most that is taken.
        most: Duration,
    },
    /// An attempt would be rolled back before it is late.
    #[error(
        "--pause-timeout {} is shorter than --max-downtime {}: every longer cutover that is allowed would be rolled back",
        Span(*pause_timeout),
        Span(*max_downtime)
    )]
    PauseTimeout {
        /// `--pause-timeout`.
        pause_timeout: Duration,
        /// `--max-downtime`.
        max_downtime: Duration,
    },
    /// A connection would carry nothing.
    #[error("--connections {connections} needs at least as many --lanes, and those are {lanes}")]
    Lanes {
        /// `--connections`.
        connections: u8,
        /// `--lanes`.
        lanes: u8,
    },
    /// Neither a guest file nor `--qmp` with `--name`.
    #[error("say which guest: a guest file, its name, or --qmp PATH with --name NAME")]
    NoGuest,
    /// The guest argument is neither a file nor a name.
    #[error("{0:?} is neither a guest file (with a slash or ending in .toml) nor a guest's name")]
    GuestArgument(String),
    /// The guest file cannot be read.
    #[error("guest file {} cannot be read{}", path.display(), hint(source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest file is too long to be one.
    #[error("{} is no guest file: it is longer than 1 MiB", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The guest file is not understood.
    #[error("guest file {} is not understood", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The guest file does not say how to reach the guest.
    #[error("guest file {} has driver = {driver:?} but no {key}: add {key} = \"PATH\"", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// Its driver.
        driver: &'static str,
        /// What is missing.
        key: &'static str,
    },
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => ": there is none; create it, or use --qmp PATH with --name NAME",
        io::ErrorKind::PermissionDenied => ": vmferry-src usually runs as root",
        _ => "",
    }
}

impl MigrateOptions {
    /// What finishing an earlier agent's migration needs; nothing is copied with these.
    #[must_use]
    pub fn to_recover(
        guest: SourceConfig,
        to: HostPort,
        identity: PathBuf,
        state: PathBuf,
        hooks: PathBuf,
    ) -> Self {
        Self {
            guest,
            to,
            identity,
            state,
            hooks,
            limits: Limits {
                max_downtime: LONGEST_DOWNTIME,
                pause_timeout: None,
                timeout: LONGEST,
                on_stall: OnStall::Abort,
                cutover: Cutover::Auto,
            },
            max_bandwidth: None,
            lanes: DEFAULT_LANES,
            connections: 1,
            congestion: Congestion::default(),
            compress: CompressMode::Auto,
            verify: Verify::Off,
            json: false,
        }
    }
}

impl MigrateArgs {
    /// Checks the arguments and reads the guest file.
    pub fn into_options(self) -> Result<MigrateOptions, UsageError> {
        let limits = self.limits()?;
        if self.connections > self.lanes {
            return Err(UsageError::Lanes {
                connections: self.connections,
                lanes: self.lanes,
            });
        }
        let guest = match (self.guest, self.qmp, self.name) {
            (Some(argument), None, None) => {
                load(&guest_file(&argument, Path::new(DEFAULT_GUESTS))?)?
            }
            (None, Some(qmp), Some(name)) => by_socket(qmp, name),
            _ => return Err(UsageError::NoGuest),
        };
        Ok(MigrateOptions {
            guest,
            to: self.to,
            identity: self.identity,
            state: self.state,
            hooks: self.hooks,
            limits,
            max_bandwidth: self.max_bandwidth,
            lanes: self.lanes,
            connections: self.connections,
            congestion: self.congestion,
            compress: self.compress,
            verify: self.verify,
            json: self.json,
        })
    }

    fn limits(&self) -> Result<Limits, UsageError> {
        in_range("--max-downtime", self.max_downtime, LONGEST_DOWNTIME)?;
        in_range("--timeout", self.timeout, LONGEST)?;
        if let Some(pause_timeout) = self.pause_timeout {
            in_range("--pause-timeout", pause_timeout, LONGEST)?;
            if pause_timeout < self.max_downtime {
                return Err(UsageError::PauseTimeout {
                    pause_timeout,
                    max_downtime: self.max_downtime,
                });
            }
        }
        Ok(Limits {
            max_downtime: self.max_downtime,
            pause_timeout: self.pause_timeout,
            timeout: self.timeout,
            on_stall: self.on_stall,
            cutover: self.cutover,
        })
    }
}

fn in_range(option: &'static str, given: Duration, most: Duration) -> Result<(), UsageError> {
    if given.is_zero() || given > most {
        return Err(UsageError::Duration {
            option,
            given,
            most,
        });
    }
    Ok(())
}

fn by_socket(qmp: PathBuf, name: GuestName) -> SourceConfig {
    SourceConfig {
        name,
        driver: DriverKind::Qemu,
        qmp: Some(qmp),
        socket: None,
        disks: Vec::new(),
        from: Vec::new(),
        launch: None,
    }
}

/// The file that the argument GUEST means.
pub(super) fn guest_file(argument: &str, guests: &Path) -> Result<PathBuf, UsageError> {
    if argument.contains('/') || argument.ends_with(".toml") {
        return Ok(PathBuf::from(argument));
    }
    match argument.parse::<GuestName>() {
        Ok(name) => Ok(guests.join(format!("{name}.toml"))),
        Err(_) => Err(UsageError::GuestArgument(
            argument.chars().take(80).collect(),
        )),
    }
}

/// Reads and checks a guest file.
pub(super) fn load(path: &Path) -> Result<SourceConfig, UsageError> {
    let unreadable = |source| UsageError::Unreadable {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(unreadable)?.len() > MAX_GUEST_FILE {
        return Err(UsageError::TooLong {
            path: path.to_owned(),
        });
    }
    let text = fs::read_to_string(path).map_err(unreadable)?;
    let config: SourceConfig = toml::from_str(&text).map_err(|source| UsageError::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let (driver, key, there) = match config.driver {
        DriverKind::Qemu => ("qemu", "qmp", config.qmp.is_some()),
        DriverKind::Sim => ("sim", "socket", config.socket.is_some()),
    };
    if there {
        return Ok(config);
    }
    Err(UsageError::MissingKey {
        path: path.to_owned(),
        driver,
        key,
    })
}
