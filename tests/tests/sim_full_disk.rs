//! The destination's file system is full: the source says so, its guest runs on, and once there is room the guest moves.

#![allow(clippy::unwrap_used, reason = "a test may unwrap")]

use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::sim::{SimGuest, SimSpec};
use vmferry_tests::harness::{Hosts, SmallDisk};

#[test]
fn a_full_disk_at_the_destination_is_named_and_harms_nothing() {
    let programs = Programs::played_by(env!("CARGO_BIN_EXE_vmferry-demo").as_ref());
    let hosts = Hosts::new(programs).unwrap();
    let (alpha, beta) = (hosts.host("alpha").unwrap(), hosts.host("beta").unwrap());
    let agent = beta.serve(&[]).unwrap();
    let spec = SimSpec {
        disk: 32 << 20,
        content: "random",
        ..SimSpec::small("web")
    };
    let guest = SimGuest::start(spec, &alpha).unwrap();
    guest.expect_at(&beta, &["alpha"]).unwrap();

    let no_space = |words: &str| {
        let done = alpha.migrate("web", agent.port, &[]).unwrap();
        println!("{}", done.stderr);
        assert_eq!(done.code(), 1, "{}", done.stderr);
        let report = done.json().unwrap();
        assert_eq!(report["error"]["code"], "no-space", "{report}");
        assert!(done.stderr.contains(words), "{}", done.stderr);
        guest.wait_for_beats(50).unwrap();
        guest.verify_on(&alpha).unwrap();
        assert!(!guest.is_on(&beta));
        report
    };

    // Too small from the beginning: nothing is copied.
    let images = beta.path("images");
    let Some(small) = SmallDisk::mount(&images, "2m") else {
        return;
    };
    let report = no_space("disk disk0 needs");
    assert_eq!(report["rounds"], serde_json::json!([]), "{report}");
    assert_eq!(report["error"]["phase"], "prepare", "{report}");
    drop(small);

    // Large enough, until somebody else fills it while the guest is copied.
    let filled = SmallDisk::mount(&images, "64m").unwrap();
    let fill = format!(
        "head -c 64M /dev/zero >'{}' 2>/dev/null; exit 0",
        filled.filler().display()
    );
    let hook = beta.hook("copy", &fill).unwrap();
    no_space("no space left");
    std::fs::remove_file(hook).unwrap();
    drop(filled);

    let done = alpha.migrate("web", agent.port, &[]).unwrap();
    assert_eq!(
        done.code(),
        0,
        "{}\n{}",
        done.stderr,
        agent.process.stderr()
    );
    guest.wait_for_beats(50).unwrap();
    guest.verify_on(&beta).unwrap();
    guest.beats().unwrap().check().unwrap();
}
