//! What came of many runs, counted.
//!
//! Owns the words for ends and for what was met on the way, so that it can be seen that a number of runs reached all of them.

use std::collections::BTreeMap;

use vmferry_src::report::GuestNow;

use super::facts::{Birth, Fact, What};
use super::world::STAGED;

/// The end of a run in words, and what was met on the way.
pub(super) fn classify(facts: &[Fact]) -> (&'static str, Vec<&'static str>) {
    let mut seen = Vec::new();
    let mut last = None;
    let mut meet = |word: &'static str| {
        if !seen.contains(&word) {
            seen.push(word);
        }
    };
    for fact in facts {
        match &fact.what {
            What::Note(text) => meet_note(text, &mut meet),
            What::Reported {
                outcome,
                guest_now,
                kept,
                duplicates,
            } => {
                if *kept > 0 {
                    meet("found equal at the destination, the ledger lost");
                }
                if *duplicates > 0 {
                    meet("sent as references to other blocks");
                }
                if *guest_now == GuestNow::InDoubt {
                    meet("left in doubt");
                }
                last = Some((*outcome, *guest_now));
            }
            What::Ended { fault: true, .. } => meet("hypervisor died"),
            What::Ended { how: STAGED, .. } => {
                meet("launched, and its agent killed before it was recorded");
            }
            What::Appeared {
                birth: Birth::Booted,
                ..
            } => meet("booted by `owner`'s word"),
            What::GoneForGood => meet("destination lost for good"),
            What::Appeared { .. }
            | What::Ran { .. }
            | What::Stood { .. }
            | What::Submitted { .. }
            | What::Wrote { .. }
            | What::Loaded { .. }
            | What::Synced { .. }
            | What::Ended { .. }
            | What::Quiet
            | What::AgentStarted { .. }
            | What::Settled { .. } => {}
        }
    }
    let word = match last {
        Some((outcome, _)) => outcome,
        None => "never reported",
    };
    (word, seen)
}

fn meet_note(text: &str, meet: &mut impl FnMut(&'static str)) {
    for (begins, word) in [
        ("fault at Alpha: KillAgent", "source agent killed"),
        ("fault at Beta: KillAgent", "destination agent killed"),
        ("fault at Alpha: KillBoth", "both agents killed"),
        ("fault at Beta: KillBoth", "both agents killed"),
        ("fault at Alpha: Power", "power cut"),
        ("fault at Beta: Power", "power cut"),
        ("fault at Alpha: CutLink", "link cut"),
        ("fault at Beta: CutLink", "link cut"),
        ("fault at Alpha: Fail", "an order or a disk failed"),
        ("fault at Beta: Fail", "an order or a disk failed"),
        (
            "fault at Alpha: KillAgentAndNotes",
            "source agent killed, its ledger lost",
        ),
        (
            "fault at Alpha: KillAgentAndVm",
            "agent and hypervisor killed",
        ),
        (
            "fault at Beta: KillAgentAndVm",
            "agent and hypervisor killed",
        ),
        (
            "an agent before this one was killed in the copy: going on",
            "gone on with the source's ledger",
        ),
        (
            "an agent before this one was killed and cannot be gone on with",
            "copy begun again, its ledger of no use",
        ),
        (
            "the destination's agent fills its copy on",
            "gone on with the destination's copy",
        ),
        (
            "the destination's agent keeps the disk of its copy",
            "gone on with the disks that the destination flushed",
        ),
        (
            "the destination's agent takes its loaded copy again",
            "started by a later agent",
        ),
        ("the source's agent finds COMMITTING", "restarted in doubt"),
        ("the source's agent finds PAUSING", "restarted while paused"),
        ("Cancel", "cancelled by hand"),
        ("the guest reset itself in the pause", "reset in the pause"),
    ] {
        if text.starts_with(begins) {
            meet(word);
        }
    }
}

/// Counts over many runs.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Runs.
    pub runs: u64,
    /// By their end.
    pub ends: BTreeMap<&'static str, u64>,
    /// By what was met on the way.
    pub seen: BTreeMap<&'static str, u64>,
    /// Seeds that broke a rule, with the rule.
    pub broken: Vec<(u64, super::check::Broken)>,
}

impl Tally {
    /// Counts a run.
    pub fn add(&mut self, seed: u64, outcome: &super::Outcome) {
        self.runs += 1;
        *self.ends.entry(outcome.word).or_default() += 1;
        for word in &outcome.seen {
            *self.seen.entry(word).or_default() += 1;
        }
        if let Err(broken) = &outcome.verdict {
            self.broken.push((seed, broken.clone()));
        }
    }

    /// Adds the counts of another.
    pub fn merge(&mut self, other: Self) {
        self.runs += other.runs;
        for (word, count) in other.ends {
            *self.ends.entry(word).or_default() += count;
        }
        for (word, count) in other.seen {
            *self.seen.entry(word).or_default() += count;
        }
        self.broken.extend(other.broken);
        self.broken.sort_by_key(|(seed, _)| *seed);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "ends of {} runs:", self.runs)?;
        for (word, count) in &self.ends {
            writeln!(f, "  {count:>8}  {word}")?;
        }
        writeln!(f, "met on the way:")?;
        for (word, count) in &self.seen {
            writeln!(f, "  {count:>8}  {word}")?;
        }
        Ok(())
    }
}
