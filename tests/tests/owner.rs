//! `owner` of both programs, from the journals alone: no agent runs and no network is needed, and a file that cannot be trusted is named.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use vmferry_common::ownership::{destination_file, source_file};
use vmferry_common::state::StateDir;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    DestinationRecord, DestinationState, Peer, ProcessRecord, SourceRecord, SourceState,
};
use vmferry_proto::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use vmferry_proto::message::AttemptKey;
use vmferry_proto::spec::RunState;
use vmferry_tests::harness::role::{Programs, Role};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const ROLES: [Role; 2] = [Role::Source, Role::Destination];
const ONE: Attempt = Attempt(1);

fn web() -> GuestName {
    "web".parse().unwrap()
}

fn key() -> AttemptKey {
    AttemptKey {
        migration: MigrationId::from_bytes([1; 16]),
        attempt: ONE,
        register: RegisterId::from_bytes([2; 16]),
    }
}

fn why() -> WireError {
    WireError::new(ErrorCode::LinkLost, "the link was lost")
}

fn source(generation: u64, state: SourceState) -> SourceRecord {
    SourceRecord {
        guest: web(),
        migration: key().migration,
        generation: Generation(generation),
        session: SessionNumber(1),
        peer: Peer {
            address: "beta:7447".to_owned(),
            identity: "beta".to_owned(),
        },
        process: ProcessRecord {
            pid: 1,
            start_ticks: 1,
            boot_id: "an earlier boot".to_owned(),
        },
        shared_disks: false,
        run_state_before: RunState::Running,
        state,
    }
}

fn destination(generation: u64, state: DestinationState) -> DestinationRecord {
    DestinationRecord {
        guest: web(),
        migration: MigrationId::from_bytes([3; 16]),
        generation: Generation(generation),
        session: SessionNumber(1),
        sender: "gamma".to_owned(),
        register: key().register,
        process: None,
        state,
        earlier: Vec::new(),
    }
}

/// What somebody does to a file.
type Spoil<'a> = &'a dyn Fn(&Path);

/// A state folder that no agent works in.
struct Journals {
    dir: tempfile::TempDir,
    state: StateDir,
}

impl Journals {
    fn new(source: Option<SourceRecord>, destination: Option<DestinationRecord>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(&dir.path().join("state")).unwrap();
        if let Some(record) = source {
            source_file(&state, &web()).write(&record).unwrap();
        }
        if let Some(record) = destination {
            destination_file(&state, &web()).write(&record).unwrap();
        }
        Self { dir, state }
    }

    fn source_path(&self) -> PathBuf {
        source_file(&self.state, &web()).path().to_owned()
    }

    fn destination_path(&self) -> PathBuf {
        destination_file(&self.state, &web()).path().to_owned()
    }

    /// In a namespace without any network, where that can be had.
    fn ask(&self, role: Role, more: &[&str]) -> Output {
        owner(&self.dir.path().join("state"), role, more)
    }
}

fn owner(state: &Path, role: Role, more: &[&str]) -> Output {
    let words = Programs::played_by(PROGRAMS.as_ref()).words(role);
    let root = rustix::process::geteuid().is_root();
    let mut command = if root {
        let mut alone = Command::new("unshare");
        alone.arg("--net").arg(&words[0]);
        alone
    } else {
        Command::new(&words[0])
    };
    command.args(&words[1..]).args(["owner", "web", "--state"]);
    command.arg(state).args(more).output().unwrap()
}

fn owned(to: RunState, started: bool) -> DestinationState {
    DestinationState::Owned {
        attempt: ONE,
        to,
        started,
    }
}

#[test]
fn both_programs_read_both_journals_and_the_highest_generation_counts() {
    let rolled_back = SourceState::RolledBack {
        attempt: ONE,
        reason: why(),
    };
    let ended = DestinationState::Ended {
        last: ONE,
        reason: why(),
    };
    let released = || SourceState::Released { key: key() };
    let running = || owned(RunState::Running, true);
    let table = [
        // What the two journals say; whether the guest may run here, and the record that decides.
        (None, None, true, None),
        (
            Some(source(1, SourceState::Copying { last: ONE })),
            None,
            true,
            Some("COPYING"),
        ),
        (
            Some(source(1, SourceState::Pausing { attempt: ONE })),
            None,
            false,
            Some("PAUSING"),
        ),
        (
            Some(source(1, SourceState::Committing { key: key() })),
            None,
            false,
            Some("COMMITTING"),
        ),
        (
            Some(source(1, rolled_back)),
            None,
            true,
            Some("ROLLED_BACK"),
        ),
        (Some(source(1, released())), None, false, Some("RELEASED")),
        (
            None,
            Some(destination(1, DestinationState::Receiving)),
            false,
            Some("RECEIVING"),
        ),
        (
            None,
            Some(destination(1, DestinationState::Opened { attempt: ONE })),
            false,
            Some("OPENED"),
        ),
        (
            None,
            Some(destination(1, owned(RunState::Running, false))),
            true,
            Some("OWNED"),
        ),
        (None, Some(destination(1, ended)), false, Some("ENDED")),
        // There, and back, and there again.
        (
            Some(source(1, released())),
            Some(destination(2, running())),
            true,
            Some("OWNED"),
        ),
        (
            Some(source(3, released())),
            Some(destination(2, running())),
            false,
            Some("RELEASED"),
        ),
        (
            Some(source(3, SourceState::Committing { key: key() })),
            Some(destination(2, running())),
            false,
            Some("COMMITTING"),
        ),
    ];
    for (source, destination, may_run, state) in table {
        let journals = Journals::new(source, destination);
        for role in ROLES {
            let said = journals.ask(role, &["--json"]);
            let text = String::from_utf8_lossy(&said.stdout).into_owned();
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(said.status.code(), Some(i32::from(!may_run)), "{text}");
            assert_eq!(json["may_run"], may_run, "{text}");
            assert_eq!(json["state"].as_str(), state, "{text}");
            // For which attempt, since when, and of which generation.
            assert_eq!(json["generation"].is_u64(), state.is_some(), "{text}");
            assert_eq!(json["attempt"].is_u64(), state.is_some(), "{text}");
            assert_eq!(
                json["since"].as_u64().is_some_and(|at| at > 1_600_000_000),
                state.is_some(),
                "{text}"
            );
        }
    }
}

#[test]
fn a_doubt_says_what_settles_it() {
    let doubts = [
        (
            Some(source(2, SourceState::Committing { key: key() })),
            None,
            "vmferry-src recover web",
        ),
        (
            Some(source(2, SourceState::Pausing { attempt: ONE })),
            None,
            "vmferry-src recover web",
        ),
        (
            None,
            Some(destination(2, DestinationState::Opened { attempt: ONE })),
            "vmferry-src status web` on gamma",
        ),
    ];
    for (source, destination, next) in doubts {
        let journals = Journals::new(source, destination);
        for role in ROLES {
            let said = journals.ask(role, &[]);
            let text = String::from_utf8_lossy(&said.stdout);
            assert!(text.contains("must NOT run here"), "{text}");
            assert!(text.contains("generation 2, since 20"), "{text}");
            assert!(
                text.contains("to settle it: ") && text.contains(next),
                "{text}"
            );
        }
    }
}

#[test]
fn a_file_that_cannot_be_trusted_is_named_and_never_taken_for_a_yes() {
    let here = || {
        Journals::new(
            Some(source(1, SourceState::Copying { last: ONE })),
            Some(destination(2, owned(RunState::Running, true))),
        )
    };
    let torn = |path: &Path| {
        let whole = fs::read(path).unwrap();
        fs::write(path, &whole[..whole.len() / 2]).unwrap();
    };
    let foreign = |path: &Path| fs::write(path, "{\"owner\": \"me\"}").unwrap();
    let flipped = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let spoils: [(Spoil<'_>, &str); 3] = [
        (&torn, "is damaged"),
        (&foreign, "is not a vmferry record"),
        (&flipped, "is damaged"),
    ];
    for (spoil, word) in spoils {
        for of_source in [true, false] {
            let journals = here();
            let path = if of_source {
                journals.source_path()
            } else {
                journals.destination_path()
            };
            spoil(&path);
            for role in ROLES {
                let said = journals.ask(role, &[]);
                let text = String::from_utf8_lossy(&said.stderr);
                assert_ne!(said.status.code(), Some(0), "{text}");
                assert!(
                    text.contains(word) && text.contains(&*path.to_string_lossy()),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn a_state_folder_that_is_not_there_is_no_yes() {
    for role in ROLES {
        let said = owner(Path::new("/nowhere/at/all"), role, &[]);
        assert_ne!(said.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&said.stderr).contains("/nowhere/at/all"));
    }
}
