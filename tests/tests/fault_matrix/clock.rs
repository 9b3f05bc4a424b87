//! Clocks that jump: no decision looks at the wall clock, and a certificate is judged by it only when a connection is made.
//!
//! A test cannot set the clock of the machine that it shares, so both agents are given one of their own: a small library that is loaded before
//! libc and adds what a file says. One more test reads the sources: the programs take the wall clock in hand where people are told the
//! time, and nowhere else.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use vmferry_tests::harness::process::Running;
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::{soon, wait_for_bytes};
use vmferry_tests::harness::{Host, Proxy, SimGuest, SimSpec, Stage};

use super::PROGRAMS;

const DAY: i64 = 24 * 3600;
const MIB: u64 = 1 << 20;
const END: Duration = Duration::from_secs(120);
/// Slow enough that a test can act in the middle of the copy.
const SLOW: [&str; 6] = [
    "--max-bandwidth",
    "8MiB/s",
    "--compress",
    "off",
    "--max-downtime",
    "10s",
];

/// A wall clock for both agents.
struct Clock {
    folder: TempDir,
}

impl Clock {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("clock.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fault_matrix/clock.c");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(&library)
            .arg(source)
            .status();
        assert!(built.unwrap().success(), "{source} cannot be compiled");
        let clock = Self { folder };
        clock.jump_to(0);
        clock.write_programs();
        clock
    }

    /// The programs of the project, under this clock.
    fn programs(&self) -> PathBuf {
        self.folder.path().join("programs")
    }

    /// Written by another process, for no descriptor of it may be open in a child of ours when it is executed.
    fn write_programs(&self) {
        let mut writer = Command::new("sh")
            .args(["-c", "cat >\"$1\" && chmod 755 \"$1\"", "sh"])
            .arg(self.programs())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let folder = self.folder.path().display();
        let script = format!(
            "#!/bin/sh\nVMFERRY_CLOCK='{folder}/jump' LD_PRELOAD='{folder}/clock.so' exec '{PROGRAMS}' \"$@\"\n"
        );
        let mut stdin = writer.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        assert!(writer.wait().unwrap().success());
    }

    /// From now on the clock goes by so many seconds.
    fn jump_to(&self, seconds: i64) {
        let (new, file) = (
            self.folder.path().join("new"),
            self.folder.path().join("jump"),
        );
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(new, file).unwrap();
    }
}

/// The date so many days from now.
fn day(from_now: i64) -> String {
    let when = format!("{from_now} days");
    let said = Command::new("date")
        .args(["-u", "-d", &when, "+%F"])
        .output();
    let said = String::from_utf8(said.unwrap().stdout).unwrap();
    said.trim().to_owned()
}

fn owner(host: &Host, role: Role) -> (i32, String) {
    let said = host.ask(role, "owner", "web", &[]).unwrap();
    println!("{}: {}", host.name(), said.stdout.trim_end());
    (said.code(), said.stdout)
}

fn begin(stage: &Stage, proxy: &Proxy) -> (SimGuest, Running) {
    let guest = stage.guest(SimSpec::quiet("web"));
    let begun = stage.alpha.start_migrate("web", proxy.port(), &SLOW);
    let mut running = begun.unwrap();
    wait_for_bytes(&stage.alpha, "web", &mut running, 4 * MIB);
    (guest, running)
}

/// A new session has to be made.
fn cut_and_restore(proxy: &Proxy, running: &mut Running) {
    proxy.cut();
    let noticed = running.wait_for("the loss", END, |_, said| {
        said.contains("connecting again").then_some(())
    });
    noticed.unwrap();
    proxy.restore();
}

#[test]
fn a_clock_that_jumps_by_days_and_back_changes_nothing() {
    let days = [day(3), day(-3)];
    let clock = Clock::new();
    let stage = Stage::set(clock.programs().to_str().unwrap());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let (guest, mut running) = begin(&stage, &proxy);
    clock.jump_to(3 * DAY);
    wait_for_bytes(&stage.alpha, "web", &mut running, 12 * MIB);
    // The clock was seen to jump, and a new session is made under it.
    cut_and_restore(&proxy, &mut running);
    wait_for_bytes(&stage.alpha, "web", &mut running, 20 * MIB);
    clock.jump_to(-3 * DAY);
    assert_eq!(owner(&stage.alpha, Role::Source).0, 0);
    assert_eq!(owner(&stage.beta, Role::Destination).0, 1);
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert_eq!(report["sessions"], 2, "{report}");
    for time in ["total_ms", "downtime_ms", "guest_stall_ms"] {
        let millis = report[time].as_f64().unwrap();
        assert!((0.0..120_000.0).contains(&millis), "{time}: {millis}");
    }
    let log = stage.agent_log();
    for (before, now) in days.iter().zip([day(3), day(-3)]) {
        let logged = log.contains(before) || log.contains(&now);
        assert!(logged, "nothing was logged on {now}: {log}");
    }
    stage.expect_moved(&guest);
    let (code, words) = owner(&stage.alpha, Role::Source);
    assert!(code == 1 && words.contains("must NOT run here"), "{words}");
    let (code, words) = owner(&stage.beta, Role::Destination);
    assert!(code == 0 && words.contains("may run here"), "{words}");
}

#[test]
fn a_certificate_is_judged_when_a_connection_is_made_and_not_later() {
    let clock = Clock::new();
    let stage = Stage::set(clock.programs().to_str().unwrap());
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let (guest, mut running) = begin(&stage, &proxy);
    // All certificates of the stage are long expired; the session goes on.
    clock.jump_to(400 * DAY);
    wait_for_bytes(&stage.alpha, "web", &mut running, 16 * MIB);
    cut_and_restore(&proxy, &mut running);
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "not-authorized", "{report}");
    assert!(done.stderr.contains("expired"), "{}", done.stderr);
    assert_eq!(report["guest_now"], "runs-at-source");
    assert!(soon(|| guest.runs_on(&stage.alpha)));
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&stage.alpha).unwrap();
    assert_eq!(owner(&stage.alpha, Role::Source).0, 0);
    clock.jump_to(0);
    stage.expect_moves(&guest, &["--max-downtime", "10s"]);
}

/// Where the wall clock may be read, and what for.
const TOLD_TO_PEOPLE: [(&str, &str); 2] = [
    ("common/src/ownership.rs", "since when a record is in force"),
    ("common/src/local/mod.rs", "when an event was told"),
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn nothing_decides_by_the_wall_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for folder in [
        "proto/src",
        "common/src",
        "common/hypervisor/src",
        "common/memtrack/src",
        "agent-src/src",
        "agent-dst/src",
    ] {
        sources(&root.join(folder), &mut files);
    }
    assert!(files.len() > 100, "only {} files were found", files.len());
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let reads = [
            "SystemTime",
            "Timestamp::now",
            "Zoned::now",
            "CLOCK_REALTIME",
            "ClockId::Realtime",
        ];
        let read = reads.into_iter().find(|word| code.contains(word));
        let allowed = TOLD_TO_PEOPLE.iter().any(|(path, _)| file.ends_with(path));
        assert!(
            read.is_none() || allowed,
            "{} reads the wall clock: {read:?}",
            file.display()
        );
    }
}
