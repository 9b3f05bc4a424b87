//! The verbs of `vmferry-src`: each from its arguments to an exit code.
//!
//! Owns what is printed where: results and `--json` on stdout, everything else on stderr.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};
use vmferry_common::causes::chain;
use vmferry_common::local::{self as socket, LocalError};
use vmferry_common::ownership;
use vmferry_common::phase::Ending;
use vmferry_common::state::StateDir;
use vmferry_common::telemetry::LogArgs;
use vmferry_common::units::Span;

use crate::cli::{
    Cli, Command, EXIT_USAGE, GuestArgs, MigrateOptions, RecoverArgs, ResolveArgs, SetArgs,
};
use crate::explain;
use crate::local::socket_path;
use crate::progress::Progress;
use crate::report::{Report, summary};
use crate::run::{self, NotBegun};
use crate::settings::Setting;

/// A status is answered between two steps of the migration, and the longest step is an I/O barrier.
const STATUS_LIMIT: Duration = Duration::from_secs(30);
/// Who triggers or cancels waits for the end, which the migration's own limits bound.
const END_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// Runs the command line `args`, program name first.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Printing fails only where nobody reads.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 });
        }
    };
    if let Err(error) = cli.log.init_to(crate::progress::LogWriter::default) {
        return usage(&chain(&error));
    }
    match cli.command {
        Command::Migrate(args) => {
            let say = Say::new(&cli.log, args.json);
            match args.into_options() {
                Ok(options) => migrate(options, &cli.log, say),
                Err(error) => usage(&chain(&error)),
            }
        }
        Command::Status(args) => status(&args),
        Command::Set(args) => set(&args),
        Command::Cutover(args) => ask_and_wait("cutover", &args),
        Command::Cancel(args) => ask_and_wait("cancel", &args),
        Command::Owner(args) => owner(&args),
        Command::Recover(args) => recover(args, &cli.log),
        Command::Resolve(args) => resolve(&args, &cli.log),
        Command::Explain { code } => explain_code(code.as_deref()),
    }
}

fn usage(text: &str) -> ExitCode {
    eprintln!("error: {text}");
    ExitCode::from(EXIT_USAGE)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    // Lanes read, and hash what goes raw, on the workers; with fewer than four, they would hold up QUIC and the control socket.
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.max(4))
        .enable_all()
        .build()
}

fn migrate(options: MigrateOptions, log: &LogArgs, say: Say) -> ExitCode {
    let progress = Progress::new(options.guest.name.as_str(), log);
    finish(on_runtime(run::migrate(options, progress)), say)
}

/// How the end is told.
#[derive(Debug, Clone, Copy)]
struct Say {
    /// As an object on stdout.
    json: bool,
    /// On stderr only what went wrong.
    quiet: bool,
}

impl Say {
    const fn new(log: &LogArgs, json: bool) -> Self {
        Self {
            json,
            quiet: log.quiet > 0,
        }
    }
}

fn on_runtime<T>(work: impl Future<Output = Result<T, NotBegun>>) -> Result<T, NotBegun> {
    match runtime() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => Err(NotBegun::runtime(&error)),
    }
}

/// Prints a report, or why there is none, and says how to exit.
fn finish(result: Result<Report, NotBegun>, say: Say) -> ExitCode {
    let json = say.json;
    match result {
        Ok(report) => {
            // Nobody reads stderr: then nobody misses it.
            let _ = if say.quiet {
                summary::print_trouble(&report)
            } else {
                summary::print(&report)
            };
            print_report(&report, json)
        }
        Err(NotBegun { usage: true, error }) => usage(&error.detail),
        Err(NotBegun {
            usage: false,
            error,
        }) => {
            eprintln!(
                "error: {} ({})\nNothing was done to the guest.",
                error.detail, error.code
            );
            if json {
                println!(
                    "{}",
                    json!({"outcome": Ending::Failed, "exit_code": 1, "error": error})
                );
            }
            ExitCode::from(Ending::Failed.exit_code())
        }
    }
}

fn print_report(report: &Report, json: bool) -> ExitCode {
    if json && let Err(error) = report.print_json() {
        eprintln!("error: the result could not be written to stdout: {error}");
    }
    ExitCode::from(report.exit_code)
}

/// Asks the agent that migrates the guest.
fn ask(command: &str, args: &GuestArgs, limit: Duration) -> Result<Value, LocalError> {
    ask_with(command, json!({}), args, limit)
}

fn ask_with(
    command: &str,
    arguments: Value,
    args: &GuestArgs,
    limit: Duration,
) -> Result<Value, LocalError> {
    let path = socket_path(&args.state, args.name.as_str());
    let runtime = runtime().map_err(|source| LocalError::Io {
        action: "start a runtime for",
        path: path.clone(),
        source,
    })?;
    runtime.block_on(socket::call(&path, command, arguments, limit))
}

fn status(args: &GuestArgs) -> ExitCode {
    match ask("status", args, STATUS_LIMIT) {
        Ok(status) if args.json => println!("{status}"),
        Ok(status) => print_status(&status),
        Err(LocalError::NobodyListens { .. }) => return status_of_journal(args),
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(1);
        }
    }
    ExitCode::SUCCESS
}

/// What a person reads of a status: the line that its progress shows, and whose it is.
fn print_status(status: &Value) {
    let text = |name: &str| status.get(name).and_then(Value::as_str).unwrap_or("?");
    let number = |name: &str| status.get(name).and_then(Value::as_u64).unwrap_or(0);
    println!(
        "{}\nto {} for {}, session {}, migration {}\n{}",
        text("text"),
        text("to"),
        Span(Duration::from_millis(number("elapsed_ms"))),
        number("sessions"),
        text("migration_id"),
        limits_text(&status["limits"]),
    );
}

fn limits_text(limits: &Value) -> &str {
    limits.get("text").and_then(Value::as_str).unwrap_or("?")
}

fn set(args: &SetArgs) -> ExitCode {
    let SetArgs { guest, settings } = args;
    match ask_with("set", Setting::to_arguments(settings), guest, STATUS_LIMIT) {
        Ok(limits) if guest.json => println!("{limits}"),
        Ok(limits) => println!("{}: {}", guest.name, limits_text(&limits)),
        Err(LocalError::NobodyListens { .. }) => return nothing_under_way(guest),
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(1);
        }
    }
    ExitCode::SUCCESS
}

fn nothing_under_way(args: &GuestArgs) -> ExitCode {
    eprintln!(
        "error: no migration of {} is under way on this host",
        args.name
    );
    ExitCode::from(1)
}

fn status_of_journal(args: &GuestArgs) -> ExitCode {
    match read_ownership(&args.state, args) {
        Ok(ownership) => {
            if args.json {
                println!("{}", json!({"migrating": false, "journal": ownership}));
            } else {
                println!(
                    "no migration of {} is under way here\n{}",
                    args.name,
                    ownership.sentence()
                );
            }
            ExitCode::SUCCESS
        }
        Err(text) => usage(&text),
    }
}

fn read_ownership(state: &Path, args: &GuestArgs) -> Result<ownership::Ownership, String> {
    let state = StateDir::existing(state).map_err(|error| chain(&error))?;
    ownership::of(&state, &args.name).map_err(|error| chain(&error))
}

fn owner(args: &GuestArgs) -> ExitCode {
    match read_ownership(&args.state, args) {
        Ok(ownership) => {
            if args.json {
                println!("{}", json!(ownership));
            } else {
                println!("{}", ownership.sentence());
            }
            ExitCode::from(u8::from(!ownership.may_run))
        }
        Err(text) => usage(&text),
    }
}

/// `cutover` and `cancel`: the wish, then the end of the migration with its exit code.
fn ask_and_wait(command: &str, args: &GuestArgs) -> ExitCode {
    let report = match ask(command, args, END_LIMIT) {
        Ok(report) => report,
        Err(LocalError::NobodyListens { .. }) => return nothing_under_way(args),
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(1);
        }
    };
    if args.json {
        println!("{report}");
    } else {
        let text = |name: &str| {
            report
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or("?")
                .to_owned()
        };
        println!(
            "{}: {}. {}",
            args.name,
            text("outcome"),
            text("what_is_true_now")
        );
    }
    let code = report
        .get("exit_code")
        .and_then(Value::as_u64)
        .and_then(|code| u8::try_from(code).ok());
    ExitCode::from(code.unwrap_or(1))
}

fn recover(args: RecoverArgs, log: &LogArgs) -> ExitCode {
    let progress = Progress::new(args.guest.name.as_str(), log);
    let say = Say::new(log, args.guest.json);
    let RecoverArgs { guest, identity } = args;
    let work =
        async move { run::recover(&guest.state, &guest.name, identity, None, progress).await };
    finish(on_runtime(work), say)
}

/// An agent that is in doubt is told; where none runs, this process settles it by itself.
fn resolve(args: &ResolveArgs, log: &LogArgs) -> ExitCode {
    let ResolveArgs {
        guest,
        destination_is_fenced: true,
    } = args
    else {
        return usage("resolve needs --destination-is-fenced");
    };
    match ask("resolve", guest, END_LIMIT) {
        Err(LocalError::NobodyListens { .. }) => {}
        Ok(report) => {
            println!("{report}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(1);
        }
    }
    let progress = Progress::new(guest.name.as_str(), log);
    let (state, name): (PathBuf, _) = (guest.state.clone(), guest.name.clone());
    let resolve = Some(run::DestinationIsFenced);
    let work = async move { run::recover(&state, &name, None, resolve, progress).await };
    finish(on_runtime(work), Say::new(log, guest.json))
}

fn explain_code(code: Option<&str>) -> ExitCode {
    match code.map_or_else(|| Ok(explain::list()), explain::explain) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => usage(&error.to_string()),
    }
}
