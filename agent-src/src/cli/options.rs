//! Checked options of a migration: what the engine gets, and why arguments are refused.
//!
//! Owns the rules that one argument alone cannot show, and the reading of the guest file.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use vmferry_common::units::{Rate, Span};
use vmferry_hypervisor::config::{DriverKind, SourceConfig};
use vmferry_proto::ids::GuestName;

use super::{DEFAULT_GUESTS, MigrateArgs};
use crate::policy::Limits;

/// Longest duration that is taken: adding it to any clock cannot overflow, and nobody means more.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest downtime that is taken; longer is a cold migration.
const LONGEST_DOWNTIME: Duration = Duration::from_secs(3600);
/// Lowest and highest zstd level: above 19 each frame would need over 100 MiB.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
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
    /// Compression.
    pub compress: Compress,
    /// How much is compared before the decision.
    pub verify: Verify,
    /// Whether the result goes to stdout as a JSON object.
    pub json: bool,
}

/// How data is compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Compress {
    /// Where it makes the copy faster.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, at this zstd level.
    Level(i32),
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

/// A host, by name or address, and a UDP port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// Text that is not `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not HOST:PORT: write it as in beta:7447, 192.0.2.7:7447 or [2001:db8::7]:7447")]
pub struct InvalidHostPort(String);

/// Text that is not a way to compress.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not auto, off or a zstd level from -7 to 19 without 0")]
pub struct InvalidCompress(String);

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

impl HostPort {
    /// Name or address, without brackets: what the destination's certificate must bear.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// UDP port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for HostPort {
    type Err = InvalidHostPort;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_host_port(text).ok_or_else(|| InvalidHostPort(text.chars().take(80).collect()))
    }
}

fn parse_host_port(text: &str) -> Option<HostPort> {
    let (host, port) = text.rsplit_once(':')?;
    // `u16::from_str` takes a sign.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let host = match bracketed {
        Some(address) => address.parse::<Ipv6Addr>().ok().map(|a| a.to_string())?,
        None => Some(host).filter(|host| is_host(host))?.to_owned(),
    };
    Some(HostPort { host, port })
}

/// An IPv4 address or a DNS name, as far as its letters go.
fn is_host(host: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.len() <= 253 && host.split('.').all(label)
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse::<IpAddr>() {
            Ok(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            Ok(IpAddr::V4(_)) | Err(_) => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Compress {
    type Err = InvalidCompress;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            level => match level.parse() {
                Ok(level) if level != 0 && LEVELS.contains(&level) => Ok(Self::Level(level)),
                Ok(_) | Err(_) => Err(InvalidCompress(text.chars().take(80).collect())),
            },
        }
    }
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Level(level) => write!(f, "{level}"),
        }
    }
}
