//! Limits are changed while a migration runs, and what cannot be changed is refused in words.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::time::Duration;

use serde_json::Value;
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(60);

fn set(stage: &Stage, settings: &[&str]) -> (i32, String) {
    let done = stage
        .alpha
        .ask(Role::Source, "set", "web", settings)
        .unwrap();
    (done.code(), done.stdout.clone() + &done.stderr)
}

fn limits(stage: &Stage) -> Option<Value> {
    let status = stage
        .alpha
        .ask(Role::Source, "status", "web", &["--json"])
        .ok()?;
    Some(status.json().ok()?.get("limits")?.clone())
}

#[test]
fn a_migration_too_slow_to_end_ends_after_its_limits_are_raised() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        ram: 64 << 20,
        content: "random",
        ..SimSpec::small("web")
    });
    let (code, said) = set(&stage, &["max-bandwidth=1Gbit"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("no migration of web is under way"), "{said}");

    let slow = [
        "--max-bandwidth",
        "256KiB/s",
        "--max-downtime",
        "2s",
        "--compress",
        "off",
    ];
    let running = stage.begin(&guest, &slow);
    assert!(soon(|| limits(&stage).is_some()));
    assert_eq!(limits(&stage).unwrap()["max_bandwidth"], 256 << 10);
    for (setting, code, part) in [
        ("lanes=3", 2, "max-bandwidth and max-downtime can"),
        ("max-downtime=soon", 2, "a duration"),
        ("max-downtime=0ms", 2, "more than 0"),
    ] {
        let (got, said) = set(&stage, &[setting]);
        assert_eq!(got, code, "{setting}: {said}");
        assert!(said.contains(part), "{setting}: {said}");
    }
    // At the first limit it would take minutes, more than END.
    let (code, said) = set(&stage, &["max-bandwidth=1GiB/s", "max-downtime=5s"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("max-downtime 5 s"), "{said}");
    assert!(limits(&stage).is_none_or(|limits| limits["max_bandwidth"] == 1 << 30));
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}
