//! `vmferry-src explain CODE`: what each end of a migration and each error code means, where the guest runs
//! now, and what to do next.
//!
//! Three kinds of codes say together how a migration ended: its outcome, the error that led there, and where the guest is where neither of
//! them tells (`guest_now`). PROTOCOL.md has them all in a table, which a test compares.
//!
//! Owns the texts, which the closing summary and the `--json` object quote as well. Each is read by somebody who
//! was woken for it: one sentence each, nothing that needs the manual. A new ending or error code without an
//! entry does not compile.

use std::fmt::Write as _;

use vmferry_common::phase::Ending;
use vmferry_proto::error::ErrorCode;

use crate::report::GuestNow;

/// What there is to say of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The word that logs, `--json` and the summary show.
    pub code: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What is true now: where the guest runs.
    pub now: &'static str,
    /// What to do.
    pub todo: &'static str,
}

/// What every error before the decision has in common.
const RUNS_HERE: &str = "The guest runs on at the source, as before the migration; the destination has thrown its copy away.";
const REFUSED: &str = "Nothing was copied, and the guest runs on at the source.";

/// What there is to say of a migration that ended like this.
#[must_use]
pub const fn of_ending(ending: Ending) -> Entry {
    let (meaning, now, todo) = match ending {
        Ending::Committed => (
            "The guest has moved.",
            "The guest belongs to the destination; the source has let its copy go and kept its disk images.",
            "Nothing; delete the source's disk images when you no longer want them.",
        ),
        Ending::RolledBack => (
            "The guest was paused for the cutover, which failed before the decision.",
            "The guest runs on at the source; it stood still for the downtime shown, and lost nothing.",
            "Read the error, remove its cause, and migrate again.",
        ),
        Ending::Cancelled => (
            "Somebody cancelled the migration (vmferry-src cancel, Ctrl-C or SIGTERM).",
            RUNS_HERE,
            "Nothing; migrate again whenever you like.",
        ),
        Ending::Failed => (
            "The migration failed before the guest was paused.",
            "The guest runs on at the source, and was never paused by vmferry.",
            "Read the error, remove its cause, and migrate again.",
        ),
        Ending::InDoubt => (
            "The decision to move was made, and the destination's answer did not arrive.",
            "The guest is paused at the source, and may be running at the destination; the source resumes it only if \
             the destination says that it has given up.",
            "Bring the destination's agent back, then run vmferry-src recover NAME; if that host is lost for good and \
             cannot write to the disks, vmferry-src resolve NAME --destination-is-fenced.",
        ),
    };
    Entry {
        code: ending.name(),
        meaning,
        now,
        todo,
    }
}

/// What there is to say of a guest that is where its ending does not tell; `None` where the ending says it.
#[must_use]
pub const fn of_guest_now(now: GuestNow) -> Option<Entry> {
    let (code, meaning, todo) = match now {
        GuestNow::RunsAtDestination
        | GuestNow::RunsAtSource
        | GuestNow::PausedAtSource
        | GuestNow::InDoubt => return None,
        GuestNow::PausedAtDestination => (
            "paused-at-destination",
            "The guest was paused when its migration began, and has moved as it was.",
            "Resume it there whenever you like.",
        ),
        GuestNow::StuckAtSource => (
            "stuck-at-source",
            "The attempt was given up, and the guest could not be resumed, or the rollback could not be recorded.",
            "Remove the cause of the error, then run vmferry-src recover NAME: it resumes the guest here.",
        ),
        GuestNow::Ended => (
            "ended",
            "The guest was shut down, its process is gone, or an operator resolved a doubt about a guest with a shared disk.",
            "Boot it afresh where it belongs: vmferry-src owner NAME says whether that is this host.",
        ),
    };
    Some(Entry {
        code,
        meaning,
        now: now.sentence(),
        todo,
    })
}

/// What there is to say of an error with this code.
#[must_use]
pub const fn of_error(code: ErrorCode) -> Entry {
    let (meaning, now, todo) = error_texts(code);
    Entry {
        code: code.name(),
        meaning,
        now,
        todo,
    }
}

/// Meaning, what is true now, what to do.
type Texts = (&'static str, &'static str, &'static str);

const fn error_texts(code: ErrorCode) -> Texts {
    match code {
        ErrorCode::ProtocolViolation => PROTOCOL_VIOLATION,
        ErrorCode::Hypervisor => HYPERVISOR,
        ErrorCode::BadFrame => BAD_FRAME,
        ErrorCode::NotIdentical => NOT_IDENTICAL,
        ErrorCode::TimedOut => TIMED_OUT,
        ErrorCode::Cancelled => CANCELLED,
        ErrorCode::Journal => JOURNAL,
        ErrorCode::GuestChanged => GUEST_CHANGED,
        ErrorCode::Internal => INTERNAL,
        ErrorCode::NotConverging => NOT_CONVERGING,
        ErrorCode::ShuttingDown => SHUTTING_DOWN,
        ErrorCode::LinkLost => LINK_LOST,
        ErrorCode::GuestReset => GUEST_RESET,
        ErrorCode::VersionMismatch => VERSION_MISMATCH,
        ErrorCode::NotAuthorized => NOT_AUTHORIZED,
        ErrorCode::UnknownGuest => UNKNOWN_GUEST,
        ErrorCode::GuestBusy => GUEST_BUSY,
        ErrorCode::StaleSession => STALE_SESSION,
        ErrorCode::Incompatible => INCOMPATIBLE,
        ErrorCode::NoSpace => NO_SPACE,
        ErrorCode::HookVeto => HOOK_VETO,
    }
}

const PROTOCOL_VIOLATION: Texts = (
    "A message broke the rules of the protocol.",
    RUNS_HERE,
    "Run the same release of vmferry on both hosts; if it comes again, report it with both logs.",
);
const HYPERVISOR: Texts = (
    "A hypervisor refused a command or broke off.",
    RUNS_HERE,
    "The detail has the command and its answer: look into the log of that QEMU, at the side that is named.",
);
const BAD_FRAME: Texts = (
    "A frame of data arrived damaged, or outside the guest's regions; it was not applied.",
    RUNS_HERE,
    "Run the same version on both hosts; if it comes again, suspect memory or network card of a host, and \
     report it with both logs.",
);
const NOT_IDENTICAL: Texts = (
    "The copy was not complete, or its digests differ from the source's.",
    RUNS_HERE,
    "Look whether anything else writes to the destination's disks or QEMU, then migrate again; if it comes \
     again, report it with both logs.",
);
const TIMED_OUT: Texts = (
    "A limit of time passed.",
    RUNS_HERE,
    "The detail names the limit: raise it (--timeout, --pause-timeout, a hook's), or find out what was slow.",
);
const CANCELLED: Texts = (
    "Somebody cancelled the migration.",
    RUNS_HERE,
    "Nothing; migrate again whenever you like.",
);
const JOURNAL: Texts = (
    "A journal could not be written or read.",
    "Before the decision the guest runs on at the source, or stays paused there if even the rollback could not \
     be recorded; vmferry-src status NAME tells.",
    "Make room in the state folder that is named, or mend its disk, then run vmferry-src recover NAME.",
);
const GUEST_CHANGED: Texts = (
    "The guest ended, or somebody else resumed, reset or changed it during the migration.",
    "The guest is as that somebody left it, at the source; the destination has thrown its copy away.",
    "Keep other tools (libvirt, scripts, watchdogs) away from the guest while it is moved, then migrate again.",
);
const INTERNAL: Texts = (
    "vmferry has a bug, or met something that it did not foresee.",
    "Before the decision the guest runs on at the source; vmferry-src status NAME tells what is recorded.",
    "Report it with the logs of both agents (run with -v).",
);
const NOT_CONVERGING: Texts = (
    "The guest dirties memory or disks faster than they can be copied within the downtime allowed.",
    RUNS_HERE,
    "Migrate when it is less busy, allow a longer --max-downtime, give it a faster link, or use --on-stall force.",
);
const SHUTTING_DOWN: Texts = (
    "An agent was told to stop.",
    RUNS_HERE,
    "Start that agent again, then migrate again.",
);
const LINK_LOST: Texts = (
    "The connection to the destination was lost and did not come back in time.",
    "Before the decision the guest runs on at the source; after it, it is paused there, in doubt: \
     vmferry-src status NAME tells.",
    "See that UDP gets through to the destination's port and that vmferry-dst runs there, then migrate again, \
     or run vmferry-src recover NAME if in doubt.",
);
const GUEST_RESET: Texts = (
    "The guest rebooted just as it was paused for the cutover, in each of several attempts.",
    RUNS_HERE,
    "Look whether the guest reboots again and again; once it stays up, migrate it again.",
);
const VERSION_MISMATCH: Texts = (
    "The two agents have no version of the protocol in common.",
    REFUSED,
    "Install the same release of vmferry on both hosts.",
);
const NOT_AUTHORIZED: Texts = (
    "One host does not accept the other's certificate, or the destination does not let this host send this guest.",
    REFUSED,
    "If the error speaks of a certificate, issue that one anew with vmferry-certs; else add this host's name to `from` in \
     the guest file at the destination, or continue the migration from the host that began it.",
);
const UNKNOWN_GUEST: Texts = (
    "The destination has no guest file of this name.",
    REFUSED,
    "Put a guest file with this name into the folder that vmferry-dst serves with --guests.",
);
const GUEST_BUSY: Texts = (
    "Another migration of this guest is under way on one of the hosts, or was left unfinished.",
    "That other migration goes on; this one copied nothing.",
    "Wait for it, or look at it with vmferry-src status NAME there, then cancel or recover it.",
);
const STALE_SESSION: Texts = (
    "The other side has already seen a newer session or a newer owner of this guest.",
    "This agent does nothing more with the guest; the newer session or owner holds.",
    "Ask both hosts with vmferry-src owner NAME and vmferry-dst owner NAME: the highest generation counts.",
);
const INCOMPATIBLE: Texts = (
    "Guest and destination do not match, or the guest has something that cannot be moved.",
    REFUSED,
    "The detail names the difference: change the guest or the destination's configuration accordingly.",
);
const NO_SPACE: Texts = (
    "The destination has not enough free memory or disk space.",
    RUNS_HERE,
    "Make room there: the detail says how much is missing, and where.",
);
const HOOK_VETO: Texts = (
    "A hook script refused.",
    RUNS_HERE,
    "The detail has the script and what it printed: satisfy it, or take it away.",
);

/// Every entry: the endings, where the guest is beside them, then the error codes.
pub fn entries() -> impl Iterator<Item = Entry> {
    let endings = Ending::ALL.iter().map(|&ending| of_ending(ending));
    let errors = ErrorCode::ALL.iter().map(|&code| of_error(code));
    let guests = GuestNow::ALL.iter().filter_map(|&now| of_guest_now(now));
    // `cancelled` is both, and says the same.
    endings
        .chain(guests)
        .chain(errors.filter(|entry| entry.code != Ending::Cancelled.name()))
}

/// A code that nothing is known of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code:?} is not a code of vmferry; these are:\n{known}")]
pub struct UnknownCode {
    code: String,
    known: String,
}

/// The text that `vmferry-src explain CODE` prints.
pub fn explain(code: &str) -> Result<String, UnknownCode> {
    let wanted = code.trim().to_ascii_lowercase().replace('_', "-");
    entries()
        .find(|entry| entry.code == wanted)
        .map(|entry| render(&entry))
        .ok_or_else(|| UnknownCode {
            code: code.chars().take(80).collect(),
            known: list(),
        })
}

fn render(entry: &Entry) -> String {
    format!(
        "{}: {}\nnow:  {}\ndo:   {}\n",
        entry.code, entry.meaning, entry.now, entry.todo
    )
}

/// All codes with their meanings, aligned.
#[must_use]
pub fn list() -> String {
    let width = entries().map(|entry| entry.code.len()).max().unwrap_or(0);
    entries().fold(String::new(), |mut text, entry| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:width$}  {}", entry.code, entry.meaning);
        text
    })
}

/// All of it as the table of PROTOCOL.md.
#[must_use]
pub fn table() -> String {
    let head =
        "| code | what happened | what is true now | what to do |\n| --- | --- | --- | --- |\n";
    entries().fold(head.to_owned(), |mut text, entry| {
        let Entry {
            code,
            meaning,
            now,
            todo,
        } = entry;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| `{code}` | {meaning} | {now} | {todo} |");
        text
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{entries, explain, of_ending, of_error, of_guest_now, table};
    use crate::report::GuestNow;
    use vmferry_common::phase::Ending;
    use vmferry_proto::error::ErrorCode;

    #[test]
    fn every_ending_and_every_error_code_is_explained_by_its_name() {
        let names = (Ending::ALL.iter().map(|ending| ending.name()))
            .chain(ErrorCode::ALL.iter().map(|code| code.name()));
        for name in names {
            let text = explain(name).unwrap();
            assert!(text.starts_with(&format!("{name}: ")), "{text}");
            assert!(
                text.contains("\nnow:  ") && text.contains("\ndo:   "),
                "{text}"
            );
        }
    }

    #[test]
    fn codes_are_unique_and_every_text_is_a_sentence() {
        let mut seen = BTreeSet::new();
        for entry in entries() {
            assert!(seen.insert(entry.code), "{} is there twice", entry.code);
            for text in [entry.meaning, entry.now, entry.todo] {
                assert!(
                    text.ends_with('.') && text.len() > 10,
                    "{}: {text}",
                    entry.code
                );
                assert!(!text.contains("  "), "{}: {text}", entry.code);
            }
        }
        let beside = 3;
        assert_eq!(
            seen.len(),
            Ending::ALL.len() + beside + ErrorCode::ALL.len() - 1
        );
    }

    #[test]
    fn only_a_violation_is_explained_as_one() {
        let violation = of_error(ErrorCode::ProtocolViolation);
        for code in ErrorCode::ALL {
            let same = of_error(*code).meaning == violation.meaning;
            assert_eq!(same, *code == ErrorCode::ProtocolViolation, "{code}");
        }
    }

    #[test]
    fn in_doubt_never_tells_to_resume_by_hand() {
        let entry = of_ending(Ending::InDoubt);
        assert!(entry.now.contains("paused at the source"));
        assert!(entry.todo.contains("recover") && entry.todo.contains("fenced"));
    }

    #[test]
    fn the_protocol_has_this_very_table() {
        let protocol = include_str!("../../proto/PROTOCOL.md");
        let section = protocol
            .split_once("\n### Every way to end\n")
            .map(|(_, rest)| rest.split("\n#").next().unwrap_or_default());
        let rows: String = section
            .unwrap()
            .lines()
            .filter(|line| line.starts_with('|'))
            .flat_map(|line| [line, "\n"])
            .collect();
        assert_eq!(
            rows,
            table(),
            "the table of PROTOCOL.md must be\n{}",
            table()
        );
    }

    #[test]
    fn what_the_report_says_of_a_guest_is_explained_by_its_word() {
        for &now in GuestNow::ALL {
            let word = serde_json::to_value(now).unwrap();
            if let Some(entry) = of_guest_now(now) {
                assert_eq!(word, entry.code);
            }
        }
    }

    #[test]
    fn an_unknown_code_lists_all() {
        let text = explain("no-such").unwrap_err().to_string();
        for entry in entries() {
            assert!(text.contains(entry.code), "{} is missing", entry.code);
        }
        assert!(explain("IN_DOUBT").is_ok());
    }
}
