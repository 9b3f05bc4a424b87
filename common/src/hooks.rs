//! Hook scripts: what an administrator wants to happen, or to forbid, at each phase and end of a migration.
//!
//! Owns finding, running and bounding them: `hooks/<phase>` and then `hooks/<phase>.d/*` in alphabetical order,
//! argv NAME PHASE, JSON on stdin, a time limit for each. The first that fails ends the run; whether that vetoes
//! the migration is the phase's business. A script never outlives its limit: its whole process group is killed.
//! What it leaves in the background when it ends in time is its own.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use vmferry_proto::ids::GuestName;

use crate::phase::HookPoint;

/// Most bytes of a script's output that are kept; the rest is read and dropped, so that it never blocks on us.
const MAX_OUTPUT: usize = 16 << 10;
/// How long the output may stay open after the script has ended (a daemon it started holds it).
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// The hooks of one side.
#[derive(Debug, Clone)]
pub struct Hooks {
    dir: Option<PathBuf>,
    limit: Duration,
}

/// What ran.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HookReport {
    /// The scripts that ran, with the time that each took.
    pub scripts: Vec<(PathBuf, Duration)>,
}

impl HookReport {
    /// Time of all scripts.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.scripts.iter().map(|(_, time)| *time).sum()
    }
}

/// A hook failed.
#[derive(Debug, thiserror::Error)]
pub enum HookFailure {
    /// It said no.
    #[error("hook {script} refused phase {phase} ({how}): {words}", script = script.display())]
    Refused {
        /// The script.
        script: PathBuf,
        /// The phase.
        phase: HookPoint,
        /// Exit code or signal.
        how: String,
        /// Its last line.
        words: String,
    },
    /// It did not end in time and was killed.
    #[error("hook {script} did not end within {} in phase {phase} and was killed: {words}", crate::units::Span(*limit), script = script.display())]
    TimedOut {
        /// The script.
        script: PathBuf,
        /// The phase.
        phase: HookPoint,
        /// The limit.
        limit: Duration,
        /// Its last line.
        words: String,
    },
    /// It cannot be run.
    #[error("hook {script} cannot be run in phase {phase}: is its first line right?", script = script.display())]
    NotRun {
        /// The script.
        script: PathBuf,
        /// The phase.
        phase: HookPoint,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The folder cannot be read.
    #[error("the hooks of phase {phase} in {dir} cannot be read", dir = dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// The phase.
        phase: HookPoint,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Hooks {
    /// Hooks in `dir` (`dir/<phase>`, `dir/<phase>.d/*`), each with this time limit; no folder, no hooks.
    #[must_use]
    pub const fn new(dir: Option<PathBuf>, limit: Duration) -> Self {
        Self { dir, limit }
    }

    /// Runs the scripts of `phase` one after the other until one fails.
    ///
    /// `json` is one object: what is known of the migration. A dropped call kills the script that runs.
    pub async fn run(
        &self,
        phase: impl Into<HookPoint>,
        name: &GuestName,
        json: &serde_json::Value,
    ) -> Result<HookReport, HookFailure> {
        let mut report = HookReport::default();
        let phase = phase.into();
        let scripts = self.scripts(phase)?;
        if scripts.is_empty() {
            return Ok(report);
        }
        let mut input = json.to_string();
        input.push('\n');
        for script in scripts {
            let started = Instant::now();
            self.run_one(&script, phase, name, &input).await?;
            let took = started.elapsed();
            tracing::info!(guest = %name, %phase, script = %script.display(), took_ms = took.as_millis(), "hook ran");
            report.scripts.push((script, took));
        }
        Ok(report)
    }

    /// What would run in `phase`, in order.
    pub fn scripts(&self, phase: impl Into<HookPoint>) -> Result<Vec<PathBuf>, HookFailure> {
        let Some(dir) = &self.dir else {
            return Ok(Vec::new());
        };
        let phase = phase.into();
        let mut scripts = Vec::new();
        let single = dir.join(phase.name());
        if is_executable(&single) {
            scripts.push(single);
        }
        let folder = dir.join(format!("{phase}.d"));
        let failed = |source| HookFailure::Folder {
            dir: folder.clone(),
            phase,
            source,
        };
        match fs::read_dir(&folder) {
            Ok(entries) => {
                let paths: Result<Vec<_>, _> =
                    entries.map(|entry| entry.map(|e| e.path())).collect();
                let mut paths = paths.map_err(failed)?;
                paths.retain(|path| !is_hidden(path) && is_executable(path));
                // By bytes: the same order whatever the locale.
                paths.sort();
                scripts.extend(paths);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        Ok(scripts)
    }

    async fn run_one(
        &self,
        script: &Path,
        phase: HookPoint,
        name: &GuestName,
        input: &str,
    ) -> Result<(), HookFailure> {
        let not_run = |source| HookFailure::NotRun {
            script: script.to_owned(),
            phase,
            source,
        };
        let (mut child, says) = spawn(script, phase, name).map_err(not_run)?;
        // From here on the group is killed however this function is left.
        let mut group = Group::of(&child);
        let (output, ended) = attend(&mut child, &mut group, says, input, self.limit).await;
        drop(group);
        let words = last_line(&output);
        log_output(script, phase, &output);
        match ended {
            Ended::InTime(Ok(status)) if status.success() => Ok(()),
            Ended::InTime(Ok(status)) => Err(HookFailure::Refused {
                script: script.to_owned(),
                phase,
                how: status.to_string(),
                words,
            }),
            Ended::InTime(Err(source)) => Err(not_run(source)),
            Ended::TooLate => {
                // Reaped, so that no zombie is left; SIGKILL cannot be refused.
                drop(child.wait().await);
                Err(HookFailure::TimedOut {
                    script: script.to_owned(),
                    phase,
                    limit: self.limit,
                    words,
                })
            }
        }
    }
}

enum Ended {
    InTime(io::Result<std::process::ExitStatus>),
    TooLate,
}

/// Starts the script. Both its output streams are one pipe, so that its lines keep their order.
fn spawn(script: &Path, phase: HookPoint, name: &GuestName) -> io::Result<(Child, pipe::Receiver)> {
    let (reader, writer) = io::pipe()?;
    let mut command = Command::new(script);
    command
        .arg(name.as_str())
        .arg(phase.name())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .kill_on_drop(true);
    let child = command.spawn()?;
    // With `command` this side's ends for writing go: the pipe ends with the script.
    Ok((child, pipe::Receiver::from_owned_fd(reader.into())?))
}

/// Feeds the script, reads what it says, and waits for its end.
async fn attend(
    child: &mut Child,
    group: &mut Group,
    says: pipe::Receiver,
    input: &str,
    limit: Duration,
) -> (Vec<u8>, Ended) {
    let output = Mutex::new(Vec::new());
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A script that does not read its input is fine.
            drop(stdin.write_all(input.as_bytes()).await);
        }
    };
    let talk = async {
        tokio::join!(feed, collect(says, &output));
    };
    tokio::pin!(talk);
    let wait = async {
        tokio::select! {
            status = child.wait() => {
                group.reaped();
                // What it said last is still in the pipes; a daemon that holds them open is not waited for.
                drop(tokio::time::timeout(DRAIN_LIMIT, &mut talk).await);
                status
            }
            () = &mut talk => {
                let status = child.wait().await;
                group.reaped();
                status
            }
        }
    };
    let ended = match tokio::time::timeout(limit, wait).await {
        Ok(status) => Ended::InTime(status),
        Err(_) => Ended::TooLate,
    };
    let said = output.lock().map(|mut kept| std::mem::take(&mut *kept));
    (said.unwrap_or_default(), ended)
}

/// Reads to the end and keeps the last `MAX_OUTPUT` bytes.
async fn collect(mut says: pipe::Receiver, output: &Mutex<Vec<u8>>) {
    let mut chunk = [0; 4096];
    while let Ok(len @ 1..) = says.read(&mut chunk).await {
        let Ok(mut kept) = output.lock() else {
            return;
        };
        kept.extend_from_slice(&chunk[..len]);
        let surplus = kept.len().saturating_sub(MAX_OUTPUT);
        kept.drain(..surplus);
    }
}

/// The process group of a script: killed when this is dropped before the script was reaped. Afterwards its
/// number may belong to somebody else.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        Self(pid.and_then(Pid::from_raw))
    }

    const fn reaped(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It fails only where all of it has ended by itself.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Editors and package managers leave hidden files and copies behind.
fn is_hidden(path: &Path) -> bool {
    let name: OsString = path.file_name().unwrap_or_default().to_owned();
    name.as_bytes().starts_with(b".") || name.as_bytes().ends_with(b"~")
}

fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let line = text
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty());
    let clean =
        |line: &str| -> String { line.chars().filter(|c| !c.is_control()).take(300).collect() };
    line.map_or_else(|| "it said nothing".to_owned(), clean)
}

fn log_output(script: &Path, phase: HookPoint, output: &[u8]) {
    for line in String::from_utf8_lossy(output).lines() {
        tracing::info!(%phase, script = %script.display(), "hook says: {}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phase::Phase;
    use serde_json::json;

    fn script(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        // Written elsewhere and renamed: a fork of another test could hold the file open for writing (ETXTBSY).
        let draft = path.with_extension("draft");
        fs::write(&draft, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&draft, path).unwrap();
    }

    fn hooks(dir: &Path, limit: Duration) -> Hooks {
        Hooks::new(Some(dir.to_owned()), limit)
    }

    const LONG: Duration = Duration::from_secs(60);

    fn web() -> GuestName {
        "web".parse().unwrap()
    }

    #[tokio::test]
    async fn scripts_run_in_order_with_name_phase_and_json() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let line = format!("echo \"$(basename $0) $1 $2 $(cat)\" >> {}", log.display());
        script(&dir.path().join("pause"), &line);
        for name in ["20-b", "10-a", ".hidden", "old~"] {
            script(&dir.path().join("pause.d").join(name), &line);
        }
        fs::write(dir.path().join("pause.d/README"), "not executable").unwrap();
        script(&dir.path().join("commit"), &line);
        let report = hooks(dir.path(), LONG)
            .run(Phase::Pause, &web(), &json!({"round": 3}))
            .await
            .unwrap();
        assert_eq!(report.scripts.len(), 3);
        assert_eq!(
            fs::read_to_string(log).unwrap(),
            "pause web pause {\"round\":3}\n10-a web pause {\"round\":3}\n20-b web pause {\"round\":3}\n"
        );
    }

    #[tokio::test]
    async fn a_refusal_carries_the_last_line_and_ends_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let ran = dir.path().join("ran");
        script(
            &dir.path().join("negotiate.d/1"),
            "echo starting; echo 'backup is running' >&2; exit 7",
        );
        script(
            &dir.path().join("negotiate.d/2"),
            &format!("touch {}", ran.display()),
        );
        let error = hooks(dir.path(), LONG)
            .run(Phase::Negotiate, &web(), &json!({}))
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("refused phase negotiate (exit status: 7): backup is running"),
            "{text}"
        );
        assert!(!ran.exists());
    }

    #[tokio::test]
    async fn a_script_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        script(
            &dir.path().join("copy"),
            &format!(
                "sleep 1000 & echo $! > {}; echo waiting; wait",
                pid_file.display()
            ),
        );
        let error = hooks(dir.path(), Duration::from_secs(5))
            .run(Phase::Copy, &web(), &json!({}))
            .await
            .unwrap_err();
        assert!(matches!(error, HookFailure::TimedOut { .. }), "{error}");
        assert!(error.to_string().contains("waiting"), "{error}");
        let pid: u32 = fs::read_to_string(pid_file)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // The kill was sent; that it is carried out is the kernel's business and takes a moment.
        while crate::process::ProcessIdentity::of(pid).is_ok_and(|p| p.is_alive().unwrap()) {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_flood_of_output_and_unread_input_do_not_block() {
        let dir = tempfile::tempdir().unwrap();
        script(
            &dir.path().join("load"),
            "exec 0<&-; i=0; while [ $i -lt 3000 ]; do echo 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'; i=$((i+1)); done; echo done; exit 1",
        );
        let big = json!({"filler": "y".repeat(1 << 20)});
        let error = hooks(dir.path(), LONG)
            .run(Phase::Load, &web(), &big)
            .await
            .unwrap_err();
        assert!(
            error.to_string().ends_with("(exit status: 1): done"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn what_cannot_be_run_says_so_and_no_hooks_are_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("final");
        script(&path, "");
        fs::write(&path, "#!/nowhere/sh\n").unwrap();
        let error = hooks(dir.path(), LONG)
            .run(Phase::Final, &web(), &json!({}))
            .await;
        assert!(
            matches!(error, Err(HookFailure::NotRun { .. })),
            "{error:?}"
        );
        let none = Hooks::new(None, LONG)
            .run(Phase::Final, &web(), &json!({}))
            .await;
        assert_eq!(none.unwrap(), HookReport::default());
        let missing = hooks(&dir.path().join("nowhere"), LONG)
            .run(Phase::Final, &web(), &json!({}))
            .await;
        assert_eq!(missing.unwrap().total(), Duration::ZERO);
    }
}
