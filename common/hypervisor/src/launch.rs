//! The launch of hypervisors, which outlive the agent, such that none is ever forgotten.
//!
//! Owns the launch: own session, own cgroup where the host lets us, output to a file, and the *stage*. What is launched first waits
//! on a pipe from the agent and becomes its program only when it is let go, which takes the proof ([`Recorded`]) that the journal
//! names it. An agent that dies before that closes the pipe with its death, and the process ends by itself without having been
//! anything. Does not own what is launched: the argument list comes from the host's own guest file.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};

use async_trait::async_trait;
use rustix::fs::Access;
use rustix::io::Errno;
use vmferry_common::process::ProcessIdentity;

use crate::error::GuestError;
use crate::watched::{Watched, io_error};

/// What a process does on its stage: it waits for a line, and becomes the program that its arguments name. The pid, the start time, the
/// session and the cgroup stay; the pipe does not. Without the line, which is how the agent's death looks, it ends.
const STAGE: &str = "read -r go && exec \"$@\" </dev/null";
/// The stage's name in what its shell says, should the program not be one after all.
const STAGE_NAME: &str = "vmferry-launch";
/// Where programs are looked for if the environment does not say: as `sh` does.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Who writes down in the journal which processes are this host's.
#[async_trait]
pub trait LaunchJournal: Send + Sync + fmt::Debug {
    /// Makes it durable that `process` holds the guest's copy from here on.
    async fn record(&self, process: &ProcessIdentity) -> Result<Recorded, GuestError>;
}

/// Proof that a process is named durably in the journal.
#[derive(Debug)]
pub struct Recorded(ProcessIdentity);

impl Recorded {
    /// Only the keeper of the journal calls this, behind a record that is durable.
    #[must_use]
    pub const fn durably(process: ProcessIdentity) -> Self {
        Self(process)
    }

    /// Whether it is `process` that the record names.
    #[must_use]
    pub fn names(&self, process: &ProcessIdentity) -> bool {
        self.0 == *process
    }
}

/// Starts `argv` with its output appended to the file `log`, in a session and, where possible, a cgroup of its own, so that
/// neither Ctrl-C nor a service manager that stops the agent ends it. It begins only once `journal` has its name; where that fails, or
/// this is dropped before, nothing of it is left. Needs a tokio runtime.
pub async fn launch(
    argv: &[String],
    log: &Path,
    journal: &dyn LaunchJournal,
) -> Result<Watched, GuestError> {
    let staged = Staged::start(argv, log)?;
    match journal.record(staged.identity()).await {
        Ok(recorded) => staged.let_go(&recorded),
        Err(error) => {
            staged.end().await;
            Err(error)
        }
    }
}

/// A launched process that waits to be let go. Dropped, it ends by itself.
#[derive(Debug)]
#[must_use = "dropped, it ends without having begun"]
pub struct Staged {
    program: String,
    process: Watched,
    gate: ChildStdin,
}

impl Staged {
    /// Launches `argv` as far as its stage.
    pub fn start(argv: &[String], log: &Path) -> Result<Self, GuestError> {
        let program = argv.first().ok_or_else(|| {
            GuestError::Config("launch: the command is empty; name the program first".to_owned())
        })?;
        let cannot_start = |source| io_error(format!("cannot start {program}"), source);
        // The shell on the stage would say so only in the log, and only when it is let go.
        check_program(program).map_err(cannot_start)?;
        let (out, err) = open_log(log).map_err(|source| {
            io_error(format!("cannot write the log {}", log.display()), source)
        })?;
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", STAGE, STAGE_NAME])
            .args(argv)
            .stdin(Stdio::piped())
            .stdout(out)
            .stderr(err);
        let mut child = vmferry_memtrack::process::in_new_session(&mut command)
            .spawn()
            .map_err(cannot_start)?;
        leave_cgroup(child.id());
        let gate = child.stdin.take();
        let process = Watched::launched(child, log)?;
        let gate = gate.ok_or_else(|| cannot_start(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self {
            program: program.clone(),
            process,
            gate,
        })
    }

    /// The process, which stays the same when it is let go.
    #[must_use]
    pub const fn identity(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    /// Lets it become its program.
    pub fn let_go(mut self, recorded: &Recorded) -> Result<Watched, GuestError> {
        if recorded.0 != *self.identity() {
            return Err(GuestError::Refused {
                command: format!("launch of {}", self.program),
                answer: format!("the journal names another process than {}", self.identity()),
            });
        }
        self.gate
            .write_all(b"go\n")
            .map_err(|source| io_error(format!("cannot start {}", self.program), source))?;
        Ok(self.process)
    }

    /// Ends it where it is.
    async fn end(self) {
        drop(self.gate);
        if let Err(error) = self.process.kill().await {
            tracing::warn!(program = %self.program, %error, "what was to be launched is left, and ends by itself");
        }
    }
}

fn open_log(log: &Path) -> io::Result<(File, File)> {
    let out = OpenOptions::new().create(true).append(true).open(log)?;
    Ok((out.try_clone()?, out))
}

/// Fails as the start of `program` would: it is not there, or nothing that can be executed.
fn check_program(program: &str) -> io::Result<()> {
    if program.is_empty() || program.contains('/') {
        return check_file(Path::new(program)).map_err(io::Error::from);
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut worst = Errno::NOENT;
    for folder in path.as_bytes().split(|byte| *byte == b':') {
        let folder = Path::new(std::ffi::OsStr::from_bytes(folder));
        match check_file(&folder.join(program)) {
            Ok(()) => return Ok(()),
            Err(Errno::ACCESS) => worst = Errno::ACCESS,
            Err(_) => {}
        }
    }
    Err(worst.into())
}

fn check_file(path: &Path) -> Result<(), Errno> {
    rustix::fs::access(path, Access::EXEC_OK)?;
    if path.is_dir() {
        return Err(Errno::ACCESS);
    }
    Ok(())
}

/// Moves `pid` out of this agent's cgroup: a service manager that stops the agent's would end the guest with it.
fn leave_cgroup(pid: u32) {
    // Unified hierarchy, hybrid one, and the name=systemd hierarchy of version 1.
    let roots = [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup/systemd",
    ];
    let usable = roots
        .iter()
        .filter(|root| Path::new(root).join("cgroup.procs").exists());
    let mut tried = false;
    for root in usable {
        tried = true;
        let group = Path::new(root).join("vmferry-guests");
        let moved = make_folder(&group)
            .and_then(|()| fs::write(group.join("cgroup.procs"), pid.to_string()));
        if let Err(error) = moved {
            tracing::warn!(pid, group = %group.display(), %error, "the guest stays in the agent's cgroup: a service manager that stops the agent may end it (KillMode=process avoids that)");
        }
    }
    if !tried {
        tracing::debug!(pid, "no cgroup hierarchy found");
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::*;

    /// Writes nothing down.
    #[derive(Debug)]
    enum Journal {
        Says,
        NamesAnother,
        Fails,
    }

    #[async_trait]
    impl LaunchJournal for Journal {
        async fn record(&self, process: &ProcessIdentity) -> Result<Recorded, GuestError> {
            match self {
                Self::Says => Ok(Recorded::durably(process.clone())),
                Self::NamesAnother => Ok(Recorded::durably(ProcessIdentity {
                    start_ticks: process.start_ticks + 1,
                    ..process.clone()
                })),
                Self::Fails => Err(GuestError::NoSpace("the disk is full".to_owned())),
            }
        }
    }

    struct Place(tempfile::TempDir);

    impl Place {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn log(&self) -> PathBuf {
            self.0.path().join("log")
        }

        fn said(&self) -> String {
            fs::read_to_string(self.log()).unwrap_or_default()
        }
    }

    fn shell(body: &str) -> Vec<String> {
        ["sh", "-c", body, "sh", "two words", "*"]
            .map(str::to_owned)
            .into()
    }

    async fn gone(process: &ProcessIdentity) {
        for _ in 0..1000 {
            if !process.is_alive().unwrap() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{process} lives");
    }

    #[tokio::test]
    async fn what_is_let_go_is_the_process_that_was_recorded() {
        let place = Place::new();
        let body = "echo $$ $(cut -d' ' -f6 /proc/$$/stat) \"$1\" \"$2\"; read x || echo nothing; exec sleep 60";
        let staged = Staged::start(&shell(body), &place.log()).unwrap();
        let identity = staged.identity().clone();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(place.said(), "", "it began on its stage");
        let process = staged.let_go(&Recorded::durably(identity.clone())).unwrap();
        // Its own session, its words as they were given, nothing on its standard input.
        let pid = identity.pid;
        let wanted = format!("{pid} {pid} two words *\nnothing\n");
        for _ in 0..1000 {
            if place.said() == wanted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(place.said(), wanted);
        assert_eq!(ProcessIdentity::of(pid).unwrap(), identity);
        process.kill().await.unwrap();
        gone(&identity).await;
    }

    #[tokio::test]
    async fn what_is_not_let_go_ends_by_itself() {
        let place = Place::new();
        let staged = Staged::start(&shell("echo ran"), &place.log()).unwrap();
        let identity = staged.identity().clone();
        assert!(identity.is_alive().unwrap());
        drop(staged);
        gone(&identity).await;
        assert_eq!(place.said(), "");
    }

    #[tokio::test]
    async fn what_the_journal_does_not_name_never_begins() {
        let place = Place::new();
        for (journal, words) in [
            (Journal::Fails, "the disk is full"),
            (Journal::NamesAnother, "the journal names another process"),
        ] {
            let launched = launch(&shell("echo ran"), &place.log(), &journal).await;
            let error = launched.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(place.said(), "");
    }

    #[tokio::test]
    async fn a_program_that_cannot_be_executed_is_named_before_anything_is_recorded() {
        let place = Place::new();
        let plain = place.0.path().join("plain");
        fs::write(&plain, "").unwrap();
        for (program, kind) in [
            ("vmferry-no-such-program", io::ErrorKind::NotFound),
            ("/no/such/program", io::ErrorKind::NotFound),
            ("", io::ErrorKind::NotFound),
            (plain.to_str().unwrap(), io::ErrorKind::PermissionDenied),
            ("/", io::ErrorKind::PermissionDenied),
        ] {
            let error = launch(&[program.to_owned()], &place.log(), &Journal::Fails).await;
            let GuestError::Io { what, source } = error.unwrap_err() else {
                panic!("{program}");
            };
            assert_eq!(what, format!("cannot start {program}"));
            assert_eq!(source.kind(), kind, "{program}");
        }
        assert!(matches!(
            launch(&[], &place.log(), &Journal::Fails).await,
            Err(GuestError::Config(_))
        ));
    }

    #[tokio::test]
    async fn a_program_that_turns_out_to_be_none_is_told_with_its_shells_words() {
        let place = Place::new();
        let script = place.0.path().join("script");
        fs::write(&script, "#!/no/such/interpreter\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&script, mode).unwrap();
        let program = script.display().to_string();
        let launched = launch(std::slice::from_ref(&program), &place.log(), &Journal::Says).await;
        let how = launched.unwrap().ended().await;
        assert!(how.contains(STAGE_NAME) && how.contains(&program), "{how}");
    }
}
