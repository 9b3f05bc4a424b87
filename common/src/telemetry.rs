//! Logging, set up alike in both agents.
//!
//! Owns the switches `-v`, `-q`, `--log-format` and how they and RUST_LOG become a subscriber. Log lines go
//! to stderr, so that stdout carries nothing but results. RUST_LOG wins over the switches.

use std::io::{self, IsTerminal};

use clap::{ArgAction, Args, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Switches that every program has.
#[derive(Debug, Clone, Default, Args)]
pub struct LogArgs {
    /// Say more: -v tells of single steps, -vv of every message (RUST_LOG wins over both).
    #[arg(short, long, action = ArgAction::Count, global = true)]
    pub verbose: u8,
    /// Say less: -q only warnings, -qq only errors.
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "verbose")]
    pub quiet: u8,
    /// How log lines are written to stderr.
    #[arg(long, value_enum, default_value_t, global = true)]
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// RUST_LOG cannot be understood.
    #[error("RUST_LOG={value:?} is not understood: use for example RUST_LOG=vmferry=debug")]
    Filter {
        /// What it says.
        value: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Logging was set up before.
    #[error("logging is set up already")]
    Twice,
}

impl LogArgs {
    /// Level of our own crates, and of others: quinn and rustls speak only when it matters.
    fn directives(&self) -> &'static str {
        match i16::from(self.verbose) - i16::from(self.quiet) {
            ..=-2 => "error",
            -1 => "warn",
            0 => {
                "warn,vmferry=info,vmferry_src=info,vmferry_dst=info,vmferry_common=info,vmferry_hypervisor=info,vmferry_memtrack=info"
            }
            1 => {
                "warn,vmferry=debug,vmferry_src=debug,vmferry_dst=debug,vmferry_common=debug,vmferry_hypervisor=debug,vmferry_memtrack=debug"
            }
            2.. => {
                "debug,vmferry=trace,vmferry_src=trace,vmferry_dst=trace,vmferry_common=trace,vmferry_hypervisor=trace,vmferry_memtrack=trace"
            }
        }
    }

    fn filter(&self, rust_log: Option<&str>) -> Result<EnvFilter, TelemetryError> {
        match rust_log.filter(|value| !value.is_empty()) {
            Some(value) => EnvFilter::try_new(value).map_err(|source| TelemetryError::Filter {
                value: value.to_owned(),
                source: Box::new(source),
            }),
            None => Ok(EnvFilter::new(self.directives())),
        }
    }

    /// Sets logging up for the whole process.
    pub fn init(&self) -> Result<(), TelemetryError> {
        self.init_to(io::stderr)
    }

    /// The same, by way of a writer that ends at stderr: one that moves a progress bar aside for each line.
    pub fn init_to<W>(&self, writer: W) -> Result<(), TelemetryError>
    where
        W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
    {
        let rust_log = std::env::var("RUST_LOG").ok();
        let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let builder = tracing_subscriber::fmt()
            .with_env_filter(self.filter(rust_log.as_deref())?)
            .with_writer(writer)
            .with_ansi(colour);
        let result = match self.log_format {
            LogFormat::Text => builder.with_target(false).try_init(),
            LogFormat::Json => builder.json().flatten_event(true).try_init(),
        };
        result.map_err(|_| TelemetryError::Twice)
    }
}

#[cfg(test)]
mod tests {
    use super::{LogArgs, LogFormat, TelemetryError};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        log: LogArgs,
    }

    #[test]
    fn switches_choose_the_level_and_rust_log_wins() {
        let parse = |args: &[&str]| Program::try_parse_from(args).unwrap().log;
        assert_eq!(parse(&["x", "-qq"]).directives(), "error");
        assert!(parse(&["x"]).directives().contains("vmferry=info"));
        assert!(parse(&["x", "-vv"]).directives().contains("vmferry=trace"));
        let json = parse(&["x", "--log-format", "json"]);
        assert_eq!(json.log_format, LogFormat::Json);
        let filter = json.filter(Some("warn,vmferry=off")).unwrap().to_string();
        assert!(filter.contains("vmferry=off"), "{filter}");
        assert!(matches!(
            json.filter(Some("vmferry=loud")),
            Err(TelemetryError::Filter { .. })
        ));
        assert!(Program::try_parse_from(["x", "-v", "-q"]).is_err());
    }

    #[test]
    fn every_level_is_a_valid_filter() {
        for args in [
            ["-qq"].as_slice(),
            &["-q"],
            &[],
            &["-v"],
            &["-vv"],
            &["-vvvv"],
        ] {
            let mut all = vec!["x"];
            all.extend(args);
            let log = Program::try_parse_from(all).unwrap().log;
            tracing_subscriber::EnvFilter::try_new(log.directives()).unwrap();
        }
    }
}
