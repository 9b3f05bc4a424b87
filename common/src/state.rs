//! The state folder of an agent: where its journal, locks and register id live.
//!
//! Owns the folder's layout and the locks per guest name; the records' content is `vmferry-proto`'s. Invariants:
//! the register id is drawn once and never changes while the folder lives, and one process at a time holds a
//! guest's name on a host.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmferry_proto::ids::{GuestName, Incarnation, MigrationId, RegisterId};

use crate::journal::{JournalError, JournalReadError, RecordFile};
use crate::storage::{Files, Held, Locked, Patience, Storage};

/// Version of the register id's file.
const REGISTER_VERSION: u32 = 1;

/// The state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The folder or a file in it cannot be made or read.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The register id cannot be read.
    #[error("the register id of this state folder cannot be read")]
    RegisterUnreadable(#[from] JournalReadError),
    /// The register id cannot be written.
    #[error("the register id of this state folder cannot be written")]
    RegisterUnwritable(#[from] JournalError),
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    Random(#[source] io::Error),
}

/// A guest's name cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("guest {name} is busy here: {holder} has it; wait for it, or cancel its migration")]
    Held {
        /// The guest.
        name: GuestName,
        /// Who.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock {path}", path = path.display())]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// An agent's state folder.
#[derive(Debug, Clone)]
pub struct StateDir {
    storage: Arc<dyn Storage>,
    path: PathBuf,
}

impl StateDir {
    /// The folder, made with mode 0700 where it is missing.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        Self::open_on(Arc::new(Files), path)
    }

    /// As [`open`](Self::open), in `storage`.
    pub fn open_on(storage: Arc<dyn Storage>, path: &Path) -> Result<Self, StateError> {
        let make = |path: &Path| {
            storage.make_folder(path).map_err(|source| StateError::Io {
                action: "create the state folder",
                path: path.to_owned(),
                source,
            })
        };
        make(path)?;
        for sub in ["guests", "locks"] {
            make(&path.join(sub))?;
        }
        Ok(Self {
            storage,
            path: path.to_owned(),
        })
    }

    /// The folder, which must be there: for commands that only look.
    pub fn existing(path: &Path) -> Result<Self, StateError> {
        let io = |source| StateError::Io {
            action: "read the state folder (is --state right, and did an agent ever run here?)",
            path: path.to_owned(),
            source,
        };
        let storage = Files;
        storage.list(&path.join("guests")).map_err(io)?;
        Ok(Self {
            storage: Arc::new(storage),
            path: path.to_owned(),
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The register id of this folder: drawn at random the first time, durable before it is returned.
    pub fn register(&self) -> Result<RegisterId, StateError> {
        // Under a lock, since two agents that start at once would draw two.
        let path = self.path.join("locks/register.lock");
        let locked = self.storage.lock(&path, Patience::Wait);
        let _lock = locked.map_err(|source| StateError::Io {
            action: "lock",
            path,
            source,
        })?;
        let file = RecordFile::on(
            self.storage.clone(),
            self.path.join("register"),
            REGISTER_VERSION,
        );
        if let Some(id) = file.read()? {
            return Ok(id);
        }
        let id = RegisterId::from_bytes(random_bytes()?);
        file.write(&id)?;
        Ok(id)
    }

    /// The record `kind` (such as `source` or `register`) of a guest.
    #[must_use]
    pub fn record<T: Serialize + DeserializeOwned>(
        &self,
        name: &GuestName,
        kind: &str,
        version: u32,
    ) -> RecordFile<T> {
        RecordFile::on(
            self.storage.clone(),
            self.path.join("guests").join(format!("{name}.{kind}")),
            version,
        )
    }

    /// Names of the guests that have a record of this kind, sorted. Files of other names are left alone.
    pub fn guests_with(&self, kind: &str) -> Result<Vec<GuestName>, StateError> {
        let dir = self.path.join("guests");
        let io = |source| StateError::Io {
            action: "read",
            path: dir.clone(),
            source,
        };
        let suffix = format!(".{kind}");
        let mut names = Vec::new();
        for file_name in self.storage.list(&dir).map_err(io)? {
            let stem = file_name
                .to_str()
                .and_then(|name| name.strip_suffix(&suffix));
            names.extend(stem.and_then(|stem| stem.parse::<GuestName>().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Takes the guest's name on this host for this process.
    pub fn lock(&self, name: &GuestName) -> Result<GuestLock, LockError> {
        GuestLock::take(self, name)
    }
}

/// The right to work on a guest of this name; given back when dropped, or when the process ends however it ends.
#[derive(Debug)]
pub struct GuestLock {
    name: GuestName,
    _held: Box<dyn Held>,
}

impl GuestLock {
    /// Takes the name, or says who has it.
    pub fn take(state: &StateDir, name: &GuestName) -> Result<Self, LockError> {
        let path = state.path.join("locks").join(format!("{name}.lock"));
        let io = |source| LockError::Io {
            path: path.clone(),
            source,
        };
        match state.storage.lock(&path, Patience::Try).map_err(io)? {
            Locked::Taken(held) => Ok(Self {
                name: name.clone(),
                _held: held,
            }),
            Locked::HeldBy(process) => Err(LockError::Held {
                name: name.clone(),
                holder: holder(process),
            }),
        }
    }

    /// The guest.
    #[must_use]
    pub const fn name(&self) -> &GuestName {
        &self.name
    }
}

fn holder(process: Option<u32>) -> String {
    match process {
        Some(pid) if pid == std::process::id() => "another migration of this agent".to_owned(),
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

fn random_bytes() -> Result<[u8; 16], StateError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| StateError::Random(io::Error::other(error.to_string())))?;
    Ok(bytes)
}

/// State folder for which sockets and logs are under `/run/vmferry`.
const DEFAULT_STATE: &str = "/var/lib/vmferry";
/// Folder of the sockets and logs of the default state folder.
const DEFAULT_RUN: &str = "/run/vmferry";

/// Where the agents of this state folder keep sockets and logs: of the default one under /run, else beside the journals.
#[must_use]
pub fn run_dir(state: &Path) -> PathBuf {
    if state == Path::new(DEFAULT_STATE) {
        PathBuf::from(DEFAULT_RUN)
    } else {
        state.join("run")
    }
}

/// A migration id that nobody else has.
pub fn new_migration_id() -> Result<MigrationId, StateError> {
    random_bytes().map(MigrationId::from_bytes)
}

/// An incarnation that no copy had before.
pub fn new_incarnation() -> Result<Incarnation, StateError> {
    random_bytes().map(Incarnation::from_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_register_id_is_drawn_once_per_folder() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/state");
        let state = StateDir::open(&path).unwrap();
        let id = state.register().unwrap();
        assert_eq!(StateDir::open(&path).unwrap().register().unwrap(), id);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let other = StateDir::open(&dir.path().join("b")).unwrap();
        assert_ne!(other.register().unwrap(), id);
        // A damaged one is named and never replaced: its answers would no longer count.
        fs::write(path.join("register"), b"vmferryJ").unwrap();
        assert!(matches!(
            state.register(),
            Err(StateError::RegisterUnreadable(_))
        ));
    }

    #[test]
    fn agents_that_start_at_once_agree_on_the_register_id() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let ids: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| state.register().unwrap()))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
    }

    #[test]
    fn one_holder_per_guest_name() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let (web, db) = ("web".parse().unwrap(), "db".parse().unwrap());
        let lock = state.lock(&web).unwrap();
        let error = state.lock(&web).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("another migration of this agent"),
            "{error}"
        );
        let _other = state.lock(&db).unwrap();
        drop(lock);
        state.lock(&web).unwrap();
    }

    #[test]
    fn another_process_that_holds_a_guest_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let web: GuestName = "web".parse().unwrap();
        let path = dir.path().join("locks/web.lock");
        let mut child = std::process::Command::new("flock")
            .arg(&path)
            .args(["sh", "-c", "echo 4242 > \"$0\"; echo ready; read x"])
            .arg(&path)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut ready)
            .unwrap();
        let error = state.lock(&web).unwrap_err();
        assert!(error.to_string().contains("process 4242 has it"), "{error}");
        drop(child.stdin.take());
        child.wait().unwrap();
        state.lock(&web).unwrap();
    }

    #[test]
    fn guests_are_listed_by_kind_of_record() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        for name in ["web", "db.1"] {
            let file = state.record::<u32>(&name.parse().unwrap(), "source", 1);
            file.write(&7).unwrap();
        }
        state
            .record::<u32>(&"x".parse().unwrap(), "target", 1)
            .write(&1)
            .unwrap();
        fs::write(dir.path().join("guests/.odd.source"), "").unwrap();
        let names: Vec<_> = state.guests_with("source").unwrap();
        assert_eq!(
            names.iter().map(GuestName::as_str).collect::<Vec<_>>(),
            ["db.1", "web"]
        );
        assert!(StateDir::existing(&dir.path().join("nowhere")).is_err());
    }
}
