//! Clocks that jump: no decision looks at the wall clock, so there is nothing to jump.
//!
//! A test cannot set the clock of the machine it shares, and a time namespace shifts only the monotonic clocks, which do not jump. So this shows
//! the cause instead of the effect: the programs take the wall clock in hand where people are told the time, and nowhere else. (Certificates
//! have dates, of course: a host whose clock is off by days is refused, and says so.)

use std::fs;
use std::path::{Path, PathBuf};

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
