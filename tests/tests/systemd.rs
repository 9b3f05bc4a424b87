//! The unit files under a systemd of the test's own: a guest outlives its agent's restart, crash and stop, and the boot guard asks the journals.
//!
//! systemd is started as the first process of namespaces (processes, mounts, control groups), with private folders where the units expect
//! theirs. It knows no other units, and everything but the test's own folders is read-only to it, since units of a system (`systemd-tmpfiles`)
//! would take the machine for their own.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use tempfile::TempDir;
use vmferry_tests::harness::hosts::Host;
use vmferry_tests::harness::process::{Running, kill, with_words};
use vmferry_tests::harness::qemu::Pair;
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::stage::soon;
use vmferry_tests::lab::{Content, Disk, JudgeParams, Lab};
use vmferry_tests::skip::skipped;

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
const SYSTEMD: &str = "/lib/systemd/systemd";
/// Slow enough that the agent can be restarted in the middle of the copy.
const SLOW: [&str; 6] = [
    "--max-bandwidth",
    "16MiB/s",
    "--compress",
    "off",
    "--max-downtime",
    "10s",
];
/// $1: a new control group, of which the namespace sees nothing else; $2: what lies over /etc and /usr/bin; $3: systemd; $4, $5: folders to
/// be written.
const BECOME_INIT: &str = r#"
set -e
mkdir "$1"
echo $$ >"$1/cgroup.procs"
exec unshare --fork --kill-child --pid --mount --cgroup --ipc --uts --mount-proc sh -c '
    set -e
    mount --make-rprivate /
    for folder in "$2" "$4" "$5"; do mount --bind "$folder" "$folder"; done
    mount -t tmpfs tmpfs /run
    mount -t tmpfs tmpfs /var/lib
    mount -t overlay overlay -o "lowerdir=$2/etc:/etc" /etc
    mount -t overlay overlay -o "lowerdir=$2/bin:/usr/bin" /usr/bin
    umount --recursive /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -o remount,bind,ro /
    export container=docker SYSTEMD_UNIT_PATH=/etc/systemd/vmferry SYSTEMD_GENERATOR_PATH=/etc/systemd/vmferry/none
    exec "$3" --system --unit=multi-user.target --log-target=console --show-status=no
' sh "$@"
"#;
/// None of the machine's own units is known there: these are all there are, besides the project's.
const TARGETS: [&str; 5] = [
    "basic",
    "multi-user",
    "network-online",
    "shutdown",
    "sysinit",
];
const TARGET: &str = "[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n";
const GUEST_UNIT: &str = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n";

/// A systemd that runs the units of the project for one host.
struct Systemd {
    /// What waits for it, and would kill it.
    _namespaces: Running,
    init: u32,
    group: PathBuf,
    _folder: TempDir,
}

impl Systemd {
    /// For the second host of `pair`. `None`, with the reason printed, where it cannot be had.
    fn start(pair: &Pair, port: u16) -> Option<Self> {
        let group = match control_groups() {
            Ok(groups) => groups.join(format!("vmferry-test-{}", std::process::id())),
            Err(reason) => {
                skipped(reason);
                return None;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        furnish(folder.path(), &pair.beta.host, port);
        let mut command = Command::new("sh");
        command.args(["-c", BECOME_INIT, "sh"]).arg(&group);
        command.arg(folder.path()).arg(SYSTEMD).arg(pair.dir());
        command.arg(pair.beta.place.folder().parent().unwrap());
        let namespaces = Running::start("systemd", command, folder.path()).unwrap();
        let (mut init, mut state) = (None, String::new());
        let is_up = soon(|| {
            init = child_of(namespaces.pid());
            if let Some(init) = init {
                let asked = inside(init, &["systemctl", "is-system-running"]);
                state = text(&asked.stdout) + &text(&asked.stderr);
            }
            state.trim() == "running"
        });
        assert!(is_up, "{state}{}", namespaces.stderr());
        Some(Self {
            _namespaces: namespaces,
            init: init.unwrap(),
            group,
            _folder: folder,
        })
    }

    /// Runs a command where the units are.
    fn run(&self, words: &[&str]) -> Output {
        inside(self.init, words)
    }

    fn systemctl(&self, words: &[&str]) {
        let done = self.run(&[&["systemctl"], words].concat());
        assert!(
            done.status.success(),
            "systemctl {words:?}: {}",
            text(&done.stderr)
        );
    }

    fn property(&self, unit: &str, name: &str) -> String {
        let said = self.run(&["systemctl", "show", "--value", "-p", name, unit]);
        text(&said.stdout).trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // With it everything that runs under it.
        kill(self.init);
        let empty = || {
            let command = ["-depth", "-type", "d", "-delete"];
            let done = Command::new("find").arg(&self.group).args(command).output();
            done.is_ok_and(|done| done.status.success())
        };
        if !soon(empty) {
            eprintln!("{} is left", self.group.display());
        }
    }
}

fn child_of(parent: u32) -> Option<u32> {
    let line = format!("PPid:\t{parent}");
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status"));
        status.is_ok_and(|status| status.lines().any(|found| found == line))
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn inside(init: u32, words: &[&str]) -> Output {
    let mut command = Command::new("nsenter");
    command.args(["-t", &init.to_string(), "-m", "-p", "--"]);
    command.args(words).output().unwrap()
}

/// Where control groups of the second version are made, or why no systemd can be had.
fn control_groups() -> Result<PathBuf, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("namespaces for a systemd need root".to_owned());
    }
    if !Path::new(SYSTEMD).exists() {
        return Err(format!("{SYSTEMD} is not installed"));
    }
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let place = fields.find_map(|mut fields| {
        let place = fields.nth(1)?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(place))
    });
    place.ok_or_else(|| "no cgroup2 is mounted here".to_owned())
}

/// The folders of a host where its packages would have put everything, as overlays of /etc and /usr/bin.
fn furnish(folder: &Path, host: &Host, port: u16) {
    let put = |to: &str, content: &[u8], mode: u32| {
        let to = folder.join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::write(&to, content).unwrap();
        fs::set_permissions(&to, fs::Permissions::from_mode(mode)).unwrap();
    };
    let units = "etc/systemd/vmferry";
    let unit = |path: &str| fs::read(repository().join(path)).unwrap();
    for name in TARGETS {
        put(&format!("{units}/{name}.target"), TARGET.as_bytes(), 0o644);
    }
    let destination = unit("agent-dst/systemd/vmferry-dst.service");
    put(&format!("{units}/vmferry-dst.service"), &destination, 0o644);
    let recover = unit("agent-src/systemd/vmferry-src-recover@.service");
    put(
        &format!("{units}/vmferry-src-recover@.service"),
        &recover,
        0o644,
    );
    put(
        &format!("{units}/qemu@.service"),
        GUEST_UNIT.as_bytes(),
        0o644,
    );
    let guard = unit("agent-src/systemd/vmferry-owner.conf");
    put(
        &format!("{units}/qemu@.service.d/vmferry-owner.conf"),
        &guard,
        0o644,
    );
    let here = format!(
        "[Service]\nExecStart=\nExecStart=/usr/bin/vmferry-dst serve --listen 127.0.0.1:{port}\n"
    );
    put(
        &format!("{units}/vmferry-dst.service.d/here.conf"),
        here.as_bytes(),
        0o644,
    );
    for role in [Role::Source, Role::Destination] {
        let name = role.name();
        let program = format!("#!/bin/sh\nexec '{PROGRAMS}' --as {name} \"$@\"\n");
        put(&format!("bin/{name}"), program.as_bytes(), 0o755);
    }
    for kind in ["identity", "guests"] {
        for entry in fs::read_dir(host.path(kind)).unwrap() {
            let from = entry.unwrap().path();
            let name = from.file_name().unwrap().to_str().unwrap();
            let mode = fs::metadata(&from).unwrap().permissions().mode();
            put(
                &format!("etc/vmferry/{kind}/{name}"),
                &fs::read(&from).unwrap(),
                mode,
            );
        }
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn free_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[test]
fn a_guest_outlives_the_restart_the_crash_and_the_stop_of_its_agents_unit() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab
        .guest("unit")
        .memory_mib(128)
        .disk(Disk::qcow2(16 * MIB))
        .judge(JudgeParams {
            memory: 32 * MIB,
            content: Content::Random,
            ..JudgeParams::default()
        });
    let pair = Pair::new(
        Programs::played_by(PROGRAMS.as_ref()),
        guest.build().unwrap(),
    )
    .unwrap();
    pair.expect_launched().unwrap();
    let port = free_port();
    let Some(systemd) = Systemd::start(&pair, port) else {
        return;
    };
    let source = pair.boot().unwrap();
    systemd.systemctl(&["start", "vmferry-dst"]);

    // Restarted in the middle of the copy: the QEMU that it launched is taken in hand again.
    let begun = pair.alpha.host.start_migrate("unit", port, &SLOW);
    let mut migration = begun.unwrap();
    let copying = migration.wait_for("the copy", END, |_, said| {
        said.contains(" copy, round ").then_some(())
    });
    copying.unwrap();
    let folder = pair.beta.place.folder().display().to_string();
    let launched = with_words(&folder);
    assert_eq!(launched.len(), 1, "{launched:?}");
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", launched[0])).unwrap();
    assert!(!groups.contains("vmferry-dst.service"), "{groups}");
    systemd.systemctl(&["restart", "vmferry-dst"]);
    let done = migration.wait(END).unwrap();
    println!("{}", done.stderr);
    assert_eq!(done.code(), 0, "{}", done.stderr);
    let report = done.json().unwrap();
    assert!(report["sessions"].as_u64().unwrap() > 1, "{report}");
    let moved = pair.arrived(source.pid(), &pair.beta, &done, report);
    assert_eq!(moved.unwrap().pid, launched[0]);

    // Killed: systemd starts it again. Stopped: nobody does. The guest does not care.
    let before = systemd.property("vmferry-dst", "MainPID");
    systemd.systemctl(&["kill", "--signal", "KILL", "vmferry-dst"]);
    let again = soon(|| {
        systemd.property("vmferry-dst", "ActiveState") == "active"
            && systemd.property("vmferry-dst", "MainPID") != before
    });
    assert!(again, "{}", systemd.property("vmferry-dst", "ActiveState"));
    systemd.systemctl(&["stop", "vmferry-dst"]);
    pair.guest.wait_for_beats(200).unwrap();
    assert_eq!(pair.guest.running_pid().unwrap(), launched[0]);

    // The boot guard lets the owner start, and nobody else.
    let boot = |expected: &str| {
        systemd.systemctl(&["start", "qemu@unit"]);
        assert_eq!(systemd.property("qemu@unit", "ActiveState"), expected);
        systemd.systemctl(&["stop", "qemu@unit"]);
    };
    boot("active");
    let back = pair.alpha.host.serve(&[]).unwrap();
    let to = back.to();
    let file = "/etc/vmferry/guests/unit.toml";
    let done = systemd.run(&["vmferry-src", "migrate", file, "--to", &to]);
    println!("{}", text(&done.stderr));
    assert!(done.status.success(), "{}", text(&done.stderr));
    boot("inactive");
    pair.guest.wait_for_beats(200).unwrap();
    pair.guest.verify_now().unwrap();
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 2);
}
