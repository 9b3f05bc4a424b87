//! The unit files: what they say is what the programs understand, guests survive the agent's unit, and nothing takes away what the agents need.
//!
//! systemd's own reader is asked where it is installed (`systemd-analyze verify`); what a service manager does to an agent (it kills its process group,
//! its session, its control group) is done here by hand, to real agents. `systemd` runs the units for real.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::Parser;
use rustix::process::{Pid, Signal, kill_process_group};
use vmferry_tests::harness::hosts::Agent;
use vmferry_tests::harness::process::with_words;
use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Hosts, SimGuest, SimSpec};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(120);

const DESTINATION: &str = "agent-dst/systemd/vmferry-dst.service";
const RECOVER: &str = "agent-src/systemd/vmferry-src-recover@.service";
const GUARD: &str = "agent-src/systemd/vmferry-owner.conf";

fn path(unit: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(unit)
}

/// Section and key to values.
fn parse(unit: &str) -> BTreeMap<(String, String), String> {
    let mut section = String::new();
    let mut found = BTreeMap::new();
    for line in fs::read_to_string(path(unit)).unwrap().lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if !line.is_empty() && !line.starts_with('#') {
            let (key, value) = line
                .split_once('=')
                .unwrap_or_else(|| panic!("{unit}: {line}"));
            assert!(!section.is_empty(), "{unit}: {line} is in no section");
            let before = found.insert((section.clone(), key.to_owned()), value.to_owned());
            assert_eq!(before, None, "{unit}: {key} is there twice");
        }
    }
    found
}

fn service(unit: &str, key: &str) -> String {
    let key = ("Service".to_owned(), key.to_owned());
    parse(unit)
        .remove(&key)
        .unwrap_or_else(|| panic!("{unit} has no {}", key.1))
}

/// The command line, for guest `web`.
fn words(unit: &str, key: &str) -> Vec<String> {
    let line = service(unit, key).replace("%i", "web");
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn the_command_lines_are_those_of_the_programs() {
    let serve = words(DESTINATION, "ExecStart");
    assert!(serve[0].ends_with("/vmferry-dst"));
    let cli = vmferry_dst::cli::Cli::try_parse_from(&serve).unwrap();
    let vmferry_dst::cli::Command::Serve(args) = cli.command else {
        panic!("{serve:?}");
    };
    // What systemd makes is where the agent looks.
    assert_eq!(
        args.state,
        Path::new("/var/lib").join(service(DESTINATION, "StateDirectory"))
    );
    for (unit, key) in [(RECOVER, "ExecStart"), (GUARD, "ExecCondition")] {
        let words = words(unit, key);
        assert!(words[0].ends_with("/vmferry-src"));
        vmferry_src::cli::Cli::try_parse_from(&words).unwrap();
    }
    let condition = parse(RECOVER)[&("Unit".to_owned(), "ConditionPathExists".to_owned())].clone();
    assert_eq!(condition, "/var/lib/vmferry/guests/%i.source");
}

#[test]
fn guests_survive_the_unit_and_a_crash_starts_it_again() {
    for unit in [DESTINATION, RECOVER] {
        assert_eq!(service(unit, "KillMode"), "process");
        assert_eq!(service(unit, "Restart"), "on-failure");
    }
    assert_eq!(service(DESTINATION, "RuntimeDirectoryPreserve"), "yes");
}

#[test]
fn nothing_that_the_agents_need_is_taken_away() {
    // Each of these would keep an agent from its guests' memory or sockets, or a launched hypervisor from /dev/kvm and its images.
    let forbidden = [
        "CapabilityBoundingSet",
        "DevicePolicy",
        "DynamicUser",
        "InaccessiblePaths",
        "MemoryDenyWriteExecute",
        "PrivateDevices",
        "PrivateNetwork",
        "PrivatePIDs",
        "PrivateTmp",
        "PrivateUsers",
        "ProtectClock",
        "ProtectProc",
        "RestrictNamespaces",
        "SystemCallFilter",
        "User",
    ];
    for unit in [DESTINATION, RECOVER] {
        let keys = parse(unit);
        for key in forbidden {
            assert!(
                !keys.contains_key(&("Service".to_owned(), key.to_owned())),
                "{unit}: {key}"
            );
        }
    }
}

#[test]
fn systemd_understands_the_units() {
    if Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_err()
    {
        println!("systemd is not installed here: the units are checked by the other tests only");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let place = |unit: &str, name: &str| {
        // The programs are not installed where this runs.
        let text = fs::read_to_string(path(unit)).unwrap();
        let text = text
            .replace("/usr/bin/vmferry-dst", PROGRAMS)
            .replace("/usr/bin/vmferry-src", PROGRAMS);
        let at = dir.path().join(name);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::write(&at, text).unwrap();
        at
    };
    place(GUARD, "qemu@.service.d/vmferry-owner.conf");
    let guest = dir.path().join("qemu@.service");
    fs::write(&guest, "[Service]\nExecStart=/bin/true %i\n").unwrap();
    let units = [
        place(DESTINATION, "vmferry-dst.service"),
        place(RECOVER, "vmferry-src-recover@.service"),
        guest,
    ];
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    // It also tells of units of the host itself.
    let ours: Vec<_> = said
        .lines()
        .filter(|line| line.contains(&*dir.path().to_string_lossy()) || line.contains("vmferry"))
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
}

/// Process group and session of a process.
fn group_and_session(pid: u32) -> Option<(i32, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let group = fields.nth(2)?.parse().ok()?;
    Some((group, fields.next()?.parse().ok()?))
}

/// All that is in the agent's process group or session dies, as when a service manager stops a unit.
fn kill_all_of(agent: &Agent) {
    let (group, session) = group_and_session(agent.process.pid()).unwrap();
    kill_process_group(Pid::from_raw(group).unwrap(), Signal::KILL).unwrap();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse::<u32>().ok());
        let of = pid.and_then(group_and_session);
        if let (Some(pid), Some((_, of))) = (pid, of)
            && of == session
        {
            vmferry_tests::harness::process::kill(pid);
        }
    }
}

#[test]
fn a_launched_guest_survives_the_whole_process_group_and_session_of_its_agent() {
    let hosts = Hosts::new(Programs::played_by(PROGRAMS.as_ref())).unwrap();
    let (alpha, beta) = (hosts.host("alpha").unwrap(), hosts.host("beta").unwrap());
    let guest = SimGuest::start(SimSpec::small("web"), &alpha).unwrap();
    guest.expect_at(&beta, &["alpha"]).unwrap();
    let mut agent = beta.serve_in_session(0).unwrap();
    let port = agent.port;

    // Before it is owned: its agent dies in the copy, comes back, and the migration ends well.
    let slow = [
        "--max-bandwidth",
        "8MiB/s",
        "--compress",
        "off",
        "--max-downtime",
        "10s",
    ];
    let mut running = alpha.start_migrate("web", port, &slow).unwrap();
    let copying = running.wait_for("the copy", END, |_, said| {
        said.contains(" copy, round ").then_some(())
    });
    copying.unwrap();
    let socket = beta.path("web.sock").display().to_string();
    let launched = with_words(&socket);
    assert_eq!(launched.len(), 1, "{launched:?}");
    let of_agent = group_and_session(agent.process.pid()).unwrap();
    let of_guest = group_and_session(launched[0]).unwrap();
    assert_eq!(
        of_agent.1,
        i32::try_from(agent.process.pid()).unwrap(),
        "it is no session leader"
    );
    assert!(
        of_agent.0 != of_guest.0 && of_agent.1 != of_guest.1,
        "{of_agent:?} {of_guest:?}"
    );
    kill_all_of(&agent);
    assert!(soon(|| agent.process.has_ended().unwrap()));
    assert_eq!(
        with_words(&socket),
        launched,
        "the guest died with its agent"
    );
    let agent = beta.serve_in_session(port).unwrap();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    if done.code() != 0 {
        let again = alpha.migrate("web", port, &slow).unwrap();
        assert_eq!(
            again.code(),
            0,
            "{}\n{}",
            again.stderr,
            agent.process.stderr()
        );
    }

    // Once it is: it runs on.
    assert!(soon(|| guest.runs_on(&beta)));
    kill_all_of(&agent);
    guest.wait_for_beats(50).unwrap();
    guest.verify_on(&beta).unwrap();
}
