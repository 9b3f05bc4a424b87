//! Folders named after the process that made them, so that what a killed one left behind can be found.
//!
//! Owns the names and the sweep: before a process makes its first folder, folders of processes that are no more are
//! removed, and whatever runs with such a folder in its command line is ended. Guests outlive the agents that launched
//! them, so a test that is killed leaves some. Namespaces, devices and sockets the kernel removes by itself.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Once;

use tempfile::TempDir;

use super::process;

/// A folder of this process that goes with its guard; `kind` says what for.
///
/// # Errors
/// The disk.
pub fn folder(kind: &str) -> io::Result<TempDir> {
    static SWEPT: Once = Once::new();
    SWEPT.call_once(|| sweep(&std::env::temp_dir()));
    TempDir::with_prefix(format!("vmferry-{kind}-{}-", std::process::id()))
}

/// Removes what processes that have ended left in `parent`.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            end_of(&entry.path());
        }
    }
}

/// Ends what still runs for `folder` and removes it.
fn end_of(folder: &Path) {
    let mark = format!("{}/", folder.display());
    for pid in process::with_words(&mark) {
        process::kill(pid);
    }
    // Another process may sweep at the same time.
    let _ = fs::remove_dir_all(folder);
}

/// The process that made a folder of this name.
fn owner(name: &str) -> Option<u32> {
    let (_kind, rest) = name.strip_prefix("vmferry-")?.split_once('-')?;
    rest.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_the_dead_go_and_those_of_the_living_stay() {
        let parent = TempDir::new().unwrap();
        let own = format!("vmferry-hosts-{}-a1", std::process::id());
        // No process has this number: it is above the largest.
        let dead = "vmferry-lab-4194305-b2";
        for name in [own.as_str(), dead, "vmferry-XyZ", "other-lab-4194305-c3"] {
            fs::create_dir_all(parent.path().join(name).join("inner")).unwrap();
        }
        sweep(parent.path());
        assert!(!parent.path().join(dead).exists());
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_process_that_was_started_for_a_dead_one_is_ended() {
        let parent = TempDir::new().unwrap();
        let folder = parent.path().join("vmferry-hosts-4194305-a1");
        fs::create_dir(&folder).unwrap();
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read word", folder.join("x").to_str().unwrap()])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        sweep(parent.path());
        assert!(!child.wait().unwrap().success());
        assert!(!folder.exists());
    }
}
