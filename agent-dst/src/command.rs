//! The verbs of `vmferry-dst`: each from its arguments to output and an exit code. All work is done elsewhere.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use vmferry_common::causes::chain;
use vmferry_common::ownership::{self, Ownership};
use vmferry_common::state::StateDir;

use crate::cli::{Cli, Command, NameArgs, StatusArgs};
use crate::serve;

/// Runs the command line `args`, program name first.
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
    if let Err(error) = cli.log.init() {
        return fail(&error, 2);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    match cli.command {
        Command::Serve(args) => match runtime.block_on(serve::serve(&args)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, error.exit_code()),
        },
        Command::Status(args) => runtime.block_on(status(&args)),
        Command::Owner(args) => show_owner(&args),
    }
}

async fn status(args: &StatusArgs) -> ExitCode {
    match serve::ask_status(&args.state, args.name.as_ref()).await {
        Ok(statuses) => {
            if args.json {
                println!("{}", serde_json::json!({ "migrations": statuses }));
            } else if statuses.is_empty() {
                println!("no migration is under way");
            } else {
                statuses.iter().for_each(|status| println!("{status}"));
            }
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, 1),
    }
}

fn show_owner(args: &NameArgs) -> ExitCode {
    let owner = match read_owner(args) {
        Ok(owner) => owner,
        Err(error) => return fail(&*error, 1),
    };
    if args.json {
        println!("{}", serde_json::json!(owner));
    } else {
        println!("{}", owner.sentence());
    }
    ExitCode::from(u8::from(!owner.may_run))
}

fn read_owner(args: &NameArgs) -> Result<Ownership, Box<dyn std::error::Error>> {
    let state = StateDir::existing(&args.state)?;
    Ok(ownership::of(&state, &args.name)?)
}

fn fail(error: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("error: {}", chain(error));
    ExitCode::from(code)
}
