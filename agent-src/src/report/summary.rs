//! The closing summary: what a person reads when the migration is over.
//!
//! Owns layout and words only; every number is the report's. The outcome comes first, then where the guest is and
//! what to do if it did not move, then the rounds, the downtime in its parts, the totals. Goes to stderr; colour only
//! on a terminal, and not with NO_COLOR.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::time::Duration;

use vmferry_common::phase::Ending;
use vmferry_common::units::{Rate, Size, Span};

use super::{GuestNow, Report, RoundReport};
use crate::cli::Verify;

/// Rounds that are shown in full; of more, the first and the last ones are.
const MAX_ROWS: usize = 16;
/// Of those, the first ones.
const FIRST_ROWS: usize = 4;

/// Prints the summary on stderr.
pub fn print(report: &Report) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    let text = render(report, colour_wanted(&stderr));
    stderr.write_all(text.as_bytes())?;
    stderr.flush()
}

/// Prints what went wrong, if anything did, and what to do: all that is left of the summary with `-q`.
pub fn print_trouble(report: &Report) -> io::Result<()> {
    if report.outcome == Ending::Committed {
        return Ok(());
    }
    let mut stderr = io::stderr().lock();
    let colour = colour_wanted(&stderr);
    stderr.write_all(trouble(report, colour).as_bytes())?;
    stderr.flush()
}

fn trouble(report: &Report, colour: bool) -> String {
    let mut text = paint(&headline(report), report.outcome, colour);
    text.push('\n');
    line(&mut text, "  now: ", &report.what_is_true_now);
    line(&mut text, "  do:  ", &report.what_to_do);
    text
}

fn colour_wanted(stderr: &io::StderrLock<'_>) -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stderr.is_terminal() && !refused
}

/// The summary as text.
#[must_use]
pub fn render(report: &Report, colour: bool) -> String {
    let mut text = String::from("\n");
    if report.outcome == Ending::Committed {
        line(
            &mut text,
            "",
            paint(&headline(report), report.outcome, colour),
        );
    } else {
        text.push_str(&trouble(report, colour));
    }
    if !report.rounds.is_empty() {
        text.push('\n');
        text.push_str(&rounds(&report.rounds));
    }
    if let Some(downtime) = report.downtime_ms {
        text.push('\n');
        text.push_str(&parts(downtime.0, report));
    }
    text.push('\n');
    text.push_str(&totals(report));
    text
}

/// Writing to a String cannot fail: the one place where that is said.
fn line(text: &mut String, name: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "{name}{value}");
}

fn paint(text: &str, outcome: Ending, colour: bool) -> String {
    let code = match outcome {
        Ending::Committed => "1;32",
        Ending::Cancelled => "1;33",
        Ending::Failed | Ending::RolledBack | Ending::InDoubt => "1;31",
    };
    if colour {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

fn headline(report: &Report) -> String {
    let Report { guest, peer, .. } = report;
    let total = Span(report.total_ms.0);
    let still = match (report.downtime_ms, report.guest_now) {
        (Some(_), GuestNow::PausedAtDestination) => "; it was paused and arrived paused".to_owned(),
        (Some(downtime), _) => format!("; it stood still for {}", Span(downtime.0)),
        (None, _) => String::new(),
    };
    let why = report.error.as_ref().map_or_else(String::new, |error| {
        let phase = error
            .phase
            .map_or_else(String::new, |phase| format!(", in phase {phase}"));
        format!(": {} ({}{phase})", error.detail, error.code)
    });
    match report.outcome {
        Ending::Committed => format!("{guest} has moved to {} in {total}{still}.", peer.address),
        Ending::RolledBack => format!(
            "{guest} was not moved to {}, the cutover was rolled back{why}{still}.",
            peer.address
        ),
        Ending::Cancelled => format!(
            "{guest} was not moved to {}: cancelled after {total}.",
            peer.address
        ),
        Ending::Failed => format!("{guest} was not moved to {}{why}.", peer.address),
        Ending::InDoubt => format!(
            "{guest} is IN DOUBT between this host and {}{why}.",
            peer.address
        ),
    }
}

const HEADS: [&str; 8] = [
    "round",
    "time",
    "sent",
    "on the wire",
    "rate",
    "dirtied",
    "dirty rate",
    "left",
];

fn rounds(rounds: &[RoundReport]) -> String {
    let mut rows: Vec<[String; 8]> = vec![HEADS.map(str::to_owned)];
    let skipped = rounds.len().saturating_sub(MAX_ROWS);
    for (index, round) in rounds.iter().enumerate() {
        if skipped > 0 && (FIRST_ROWS..FIRST_ROWS + skipped).contains(&index) {
            if index == FIRST_ROWS {
                rows.push(std::array::from_fn(|_| "…".to_owned()));
            }
            continue;
        }
        rows.push(row(round));
    }
    align(&rows)
}

fn row(round: &RoundReport) -> [String; 8] {
    let sending = round.elapsed_ms.0.saturating_sub(round.idle_ms.0);
    let while_it_ran = |value: String| {
        if round.paused {
            "–".to_owned()
        } else {
            value
        }
    };
    [
        if round.paused {
            "paused".to_owned()
        } else {
            round.number.to_string()
        },
        Span(round.elapsed_ms.0).to_string(),
        Size(round.raw_bytes).to_string(),
        Size(round.wire_bytes).to_string(),
        Rate::of(round.wire_bytes, sending).to_string(),
        while_it_ran(Size(round.dirtied_bytes).to_string()),
        while_it_ran(Rate::of(round.dirtied_bytes, round.elapsed_ms.0).to_string()),
        while_it_ran(Size(round.left_bytes).to_string()),
    ]
}

/// Rows of cells as lines, every column as wide as its widest cell, flush right.
fn align<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    rows.iter().fold(String::new(), |mut text, row| {
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(text, "  {cell:>width$}");
        }
        text.push('\n');
        text
    })
}

fn parts(downtime: Duration, report: &Report) -> String {
    let mut text = String::new();
    line(&mut text, "  downtime ", Span(downtime));
    let rows: Vec<[String; 3]> = report
        .downtime_parts
        .named()
        .iter()
        .filter(|(_, part)| !part.is_zero())
        .map(|(name, part)| {
            [
                format!("  {name:<10}"),
                Span(*part).to_string(),
                share(*part, downtime),
            ]
        })
        .collect();
    text.push_str(&align(&rows));
    text
}

/// `part` of `whole` in percent.
fn share(part: Duration, whole: Duration) -> String {
    match (part.as_micros() * 100).checked_div(whole.as_micros()) {
        Some(percent) => format!("{percent} %"),
        None => String::new(),
    }
}

fn totals(report: &Report) -> String {
    let mut text = String::new();
    let mut total = |name: &str, value: String| line(&mut text, &format!("  {name:<13}"), value);
    total(
        "guest",
        format!(
            "{} memory, {} disk",
            Size(report.memory_bytes),
            Size(report.disk_bytes)
        ),
    );
    total("sent", sent(report));
    let counts = [
        report.zero_blocks,
        report.resent_blocks,
        report.unchanged_blocks,
        report.duplicate_blocks,
    ];
    if counts.iter().any(|count| *count > 0) {
        let mut blocks = format!(
            "{} zero, {} sent again",
            report.zero_blocks, report.resent_blocks
        );
        if report.unchanged_blocks > 0 {
            let _ = write!(
                blocks,
                ", {} written but as before",
                report.unchanged_blocks
            );
        }
        if report.difference_blocks > 0 {
            let _ = write!(blocks, ", {} as differences", report.difference_blocks);
        }
        if report.duplicate_blocks > 0 {
            let _ = write!(blocks, ", {} as duplicates", report.duplicate_blocks);
        }
        total("blocks", blocks);
    }
    if report.device_state_bytes > 0 {
        total("device state", Size(report.device_state_bytes).to_string());
    }
    if !report.guest_stall_ms.0.is_zero() {
        total(
            "guest stall",
            format!(
                "{} at most while running (barrier {})",
                Span(report.guest_stall_ms.0),
                Span(report.barrier_stall_ms.0)
            ),
        );
    }
    if report.kept_bytes > 0 {
        total(
            "kept",
            format!("{} found equal at the destination", Size(report.kept_bytes)),
        );
    }
    if report.sessions > 1 || report.attempts > 1 {
        total(
            "sessions",
            format!("{}, cutovers tried {}", report.sessions, report.attempts),
        );
    }
    total("verified", verified(report));
    total("total time", Span(report.total_ms.0).to_string());
    total("migration", report.migration_id.clone());
    text
}

fn sent(report: &Report) -> String {
    let busy = report.rounds.iter().fold(Duration::ZERO, |sum, round| {
        sum.saturating_add(round.elapsed_ms.0.saturating_sub(round.idle_ms.0))
    });
    let zero = report.rounds.iter().map(|round| round.zero_bytes).sum();
    let data = report.raw_bytes.saturating_sub(zero);
    let mut text = format!(
        "{} of content ({} without zeros), {} on the wire",
        Size(report.raw_bytes),
        Size(data),
        Size(report.wire_bytes)
    );
    if !busy.is_zero() {
        let _ = write!(text, " at {}", Rate::of(report.wire_bytes, busy));
    }
    text
}

fn verified(report: &Report) -> String {
    let verified = &report.verified;
    let compared = || {
        format!(
            "{} windows, {} compared and equal{}",
            verified.windows,
            Size(verified.bytes),
            match verified.resent_discarded {
                0 => String::new(),
                pages => format!(", {pages} discarded pages sent again"),
            }
        )
    };
    match (verified.mode, verified.windows) {
        (Verify::Off, _) if report.outcome == Ending::Committed => {
            "complete, contents not compared (--verify off)".to_owned()
        }
        (Verify::Off, _) | (Verify::Sample | Verify::Full, 0) => {
            "nothing: it did not come to that".to_owned()
        }
        (Verify::Sample, _) => format!("a sample: {}", compared()),
        (Verify::Full, _) => format!("everything: {}", compared()),
    }
}
