//! One executable that plays every program of the project.
//!
//! `cargo run --bin vmferry-demo` builds one binary only, and a test knows the path of one binary only; so that both can start
//! real agents as real processes, that binary becomes the program that `--as PROGRAM` names. It calls the same entry
//! point as the program's own `main`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// A program of the project.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `vmferry-src`.
    Source,
    /// `vmferry-dst`.
    Destination,
    /// `vmferry-simguest`.
    SimGuest,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Source, Self::Destination, Self::SimGuest];

    /// Name of the program.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Source => "vmferry-src",
            Self::Destination => "vmferry-dst",
            Self::SimGuest => "vmferry-simguest",
        }
    }

    fn run(self, args: Vec<OsString>) -> ExitCode {
        match self {
            Self::Source => vmferry_src::command::main(args),
            Self::Destination => vmferry_dst::command::main(args),
            Self::SimGuest => vmferry_simguest::command::main(args),
        }
    }
}

/// Becomes the program that the arguments ask for; `None` where they ask for none.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != "--as" {
        return None;
    }
    let name = args.next()?;
    let role = Role::ALL.into_iter().find(|role| name == role.name())?;
    let args = std::iter::once(OsString::from(role.name()))
        .chain(args)
        .collect();
    Some(role.run(args))
}

/// The executable that plays the programs.
#[derive(Debug, Clone)]
pub struct Programs {
    executable: PathBuf,
}

impl Programs {
    /// `executable` calls [`run_if_asked`] first thing.
    #[must_use]
    pub fn played_by(executable: &Path) -> Self {
        Self {
            executable: executable.to_owned(),
        }
    }

    /// A command that becomes `role`.
    #[must_use]
    pub fn command(&self, role: Role) -> Command {
        let mut command = Command::new(&self.executable);
        command.arg("--as").arg(role.name());
        command
    }

    /// The words of that command, for a `launch` list.
    #[must_use]
    pub fn words(&self, role: Role) -> Vec<String> {
        vec![
            self.executable.display().to_string(),
            "--as".to_owned(),
            role.name().to_owned(),
        ]
    }
}
