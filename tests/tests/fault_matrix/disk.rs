//! A destination whose disk cannot take a record: full, or read-only.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{SimSpec, Stage};

use super::PROGRAMS;

/// A small file system of its own, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn at(path: &Path) -> Self {
        mount(&["-t", "tmpfs", "-o", "size=256k", "tmpfs"], path);
        Self(path.to_owned())
    }

    fn remount(&self, how: &str) {
        mount(&["-o", &format!("remount,{how}")], &self.0);
    }
}

fn mount(args: &[&str], at: &Path) {
    let done = Command::new("mount").args(args).arg(at).status().unwrap();
    assert!(done.success(), "mount {args:?} at {}", at.display());
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // It goes with the test's folder in any event.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    assert!(
        root || std::env::var("CI").as_deref() != Ok("true"),
        "CI must be root"
    );
    if !root {
        println!("skipped: mounting a small file system needs root");
    }
    root
}

/// With the journals of beta on a file system of their own: the attempt meets it as `spoil` makes it, then `mend` mends it.
fn with_a_journal_that_fails(spoil: impl Fn(&Mounted), mend: impl Fn(&Mounted)) {
    if !is_root() {
        return;
    }
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        ..SimSpec::small("web")
    });
    let journals = Mounted::at(&stage.beta.path("state/guests"));
    let gate = stage.alpha.gate("pause").unwrap();
    let mut migration = stage.begin(&guest, &["--max-downtime", "3s"]);
    gate.wait_reached(&mut migration).unwrap();
    spoil(&journals);
    gate.remove().unwrap();
    // The attempt cannot be opened, and its end cannot be recorded: the guest runs on meanwhile.
    guest.wait_for_beats(100).unwrap();
    let owner = stage.alpha.ask(
        vmferry_tests::harness::role::Role::Source,
        "owner",
        "web",
        &[],
    );
    assert_eq!(owner.unwrap().code(), 0);
    let told = soon(|| stage.agent_log().contains("journal cannot be written"));
    assert!(told, "{}", stage.agent_log());
    mend(&journals);
    let done = migration.wait(std::time::Duration::from_secs(180)).unwrap();
    println!("{}\n--- beta\n{}", done.stderr, stage.agent_log());
    if done.code() != 0 {
        stage.expect_code(&done, 1);
        stage.expect_stayed(&guest);
        let again = stage.migrate(&guest, &["--max-downtime", "3s"]);
        stage.expect_code(&again, 0);
    }
    stage.expect_moved(&guest);
}

#[test]
fn the_state_folder_of_the_destination_is_read_only_for_a_while() {
    with_a_journal_that_fails(|disk| disk.remount("ro"), |disk| disk.remount("rw"));
}

#[test]
fn the_state_folder_of_the_destination_is_full_for_a_while() {
    let filler = |disk: &Mounted| disk.0.join("filler");
    with_a_journal_that_fails(
        |disk| {
            let filled = std::fs::write(filler(disk), vec![1; 1 << 20]);
            assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        },
        |disk| std::fs::remove_file(filler(disk)).unwrap(),
    );
}
