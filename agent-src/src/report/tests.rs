//! The object's field names, and what the summary says.

use std::time::Duration;

use serde_json::Value;
use vmferry_common::phase::{Ending, Phase};
use vmferry_proto::error::{ErrorCode, WireError};

use super::summary::render;
use super::{DowntimeParts, End, GuestNow, Millis, Peer, Report, Verified};
use crate::cli::Verify;
use crate::policy::RoundStats;

fn millis(micros: u64) -> Millis {
    Millis(Duration::from_micros(micros))
}

fn report(
    outcome: Ending,
    guest_now: GuestNow,
    error: Option<(WireError, Option<Phase>)>,
) -> Report {
    let peer = Peer {
        address: "beta:7447".into(),
        agent: Some("vmferry-dst 0.1.0".into()),
    };
    let end = End {
        outcome,
        guest_now,
        error,
    };
    Report::new("0123".repeat(8), "web-1".into(), peer, end)
}

fn committed() -> Report {
    let mut report = report(Ending::Committed, GuestNow::RunsAtDestination, None);
    let rounds = [
        RoundStats {
            number: 1,
            elapsed: Duration::from_secs(8),
            idle: Duration::ZERO,
            raw_bytes_sent: 2 << 30,
            zero_bytes: 1 << 30,
            wire_bytes: 1 << 30,
            dirtied_bytes: 100 << 20,
            left_bytes: 100 << 20,
        },
        RoundStats {
            number: 2,
            elapsed: Duration::from_millis(800),
            idle: Duration::ZERO,
            raw_bytes_sent: 100 << 20,
            zero_bytes: 0,
            wire_bytes: 100 << 20,
            dirtied_bytes: 4096,
            left_bytes: 4096,
        },
    ];
    let last_set = RoundStats {
        number: 3,
        elapsed: Duration::from_millis(5),
        raw_bytes_sent: 4096,
        wire_bytes: 4096,
        ..RoundStats::default()
    };
    report.set_rounds(&rounds, Some(&last_set));
    report.raw_bytes = (2 << 30) + (100 << 20) + 4096;
    report.wire_bytes = (1 << 30) + (100 << 20) + 4096;
    report.zero_blocks = 1 << 18;
    let parts = DowntimeParts {
        pause_ms: millis(4_100),
        load_ms: millis(30_000),
        ..DowntimeParts::default()
    };
    report.set_downtime(Duration::from_micros(40_100), parts);
    report.total_ms = millis(9_000_000);
    report.attempts = 1;
    report.sessions = 1;
    report.memory_bytes = 1 << 30;
    report.disk_bytes = 1 << 30;
    report.device_state_bytes = 32 << 10;
    report.guest_stall_ms = millis(1_500);
    report.barrier_stall_ms = millis(700);
    report.verified = Verified {
        mode: Verify::Full,
        windows: 1024,
        bytes: 2 << 30,
        resent_discarded: 0,
    };
    report
}

#[test]
fn the_object_has_the_fields_that_scripts_rely_on() {
    let value = serde_json::to_value(committed()).unwrap();
    let names =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(
        names(&value).join(" "),
        "attempts barrier_stall_ms device_state_bytes difference_blocks disk_bytes downtime_ms downtime_parts duplicate_blocks error exit_code guest \
         guest_now guest_stall_ms kept_bytes memory_bytes migration_id outcome peer raw_bytes resent_blocks rounds \
         sessions total_ms unchanged_blocks verified what_is_true_now what_to_do wire_bytes zero_blocks"
    );
    assert_eq!(
        names(&value["downtime_parts"]).join(" "),
        "barrier_ms flush_ms hooks_ms journal_ms last_set_ms load_ms other_ms pause_ms send_ms start_ms state_save_ms \
         verify_ms"
    );
    assert_eq!(
        names(&value["rounds"][0]).join(" "),
        "dirtied_bytes elapsed_ms idle_ms left_bytes number paused raw_bytes wire_bytes zero_bytes"
    );
    assert_eq!(
        names(&value["verified"]).join(" "),
        "bytes mode resent_discarded windows"
    );
    assert_eq!(names(&value["peer"]).join(" "), "address agent");
    assert_eq!(value["outcome"], "committed");
    assert_eq!(value["guest_now"], "runs-at-destination");
    assert_eq!(value["exit_code"], 0);
    assert_eq!(value["error"], Value::Null);
    assert_eq!(value["downtime_ms"], 40.1);
    assert_eq!(value["downtime_parts"]["other_ms"], 6.0);
    assert_eq!(value["verified"]["mode"], "full");
    // The round after the pause is told from the others, and its bytes are in the sums.
    let paused = |round: usize| value["rounds"][round]["paused"].as_bool();
    assert_eq!(
        [paused(0), paused(1), paused(2), paused(3)],
        [Some(false), Some(false), Some(true), None]
    );
    let sum: u64 = (0..3)
        .filter_map(|round| value["rounds"][round]["wire_bytes"].as_u64())
        .sum();
    assert_eq!(value["wire_bytes"].as_u64(), Some(sum));
}

#[test]
fn the_object_can_be_read_back() {
    for report in [
        committed(),
        report(
            Ending::Failed,
            GuestNow::Ended,
            Some((
                WireError::new(ErrorCode::GuestChanged, "it was shut down"),
                Some(Phase::Copy),
            )),
        ),
    ] {
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
    let odd = millis(123_456_789_001);
    let text = serde_json::to_string(&odd).unwrap();
    assert_eq!(text, "123456789.001");
    assert_eq!(serde_json::from_str::<Millis>(&text).unwrap(), odd);
    assert!(serde_json::from_str::<Millis>("-1").is_err());
}

#[test]
fn exit_codes_are_those_of_the_manual() {
    for (outcome, guest_now, code) in [
        (Ending::Committed, GuestNow::RunsAtDestination, 0),
        (Ending::Failed, GuestNow::RunsAtSource, 1),
        (Ending::RolledBack, GuestNow::RunsAtSource, 1),
        (Ending::InDoubt, GuestNow::InDoubt, 3),
        (Ending::Cancelled, GuestNow::RunsAtSource, 4),
    ] {
        assert_eq!(report(outcome, guest_now, None).exit_code, code);
    }
}

#[test]
fn the_summary_of_a_success_begins_with_it_and_lines_up() {
    let text = render(&committed(), false);
    let expected = "
web-1 has moved to beta:7447 in 9 s; it stood still for 40.1 ms.

   round    time     sent  on the wire         rate  dirtied  dirty rate     left
       1     8 s    2 GiB        1 GiB  1.07 Gbit/s  100 MiB  105 Mbit/s  100 MiB
       2  800 ms  100 MiB      100 MiB  1.05 Gbit/s    4 KiB   41 kbit/s    4 KiB
  paused    5 ms    4 KiB        4 KiB  6.55 Mbit/s        –           –        –

  downtime 40.1 ms
    pause       4.1 ms  10 %
    load         30 ms  74 %
    other         6 ms  14 %

  guest        1 GiB memory, 1 GiB disk
  sent         2.1 GiB of content (1.1 GiB without zeros), 1.1 GiB on the wire at 1.07 Gbit/s
  blocks       262144 zero, 0 sent again
  device state 32 KiB
  guest stall  1.5 ms at most while running (barrier 700 µs)
  verified     everything: 1024 windows, 2 GiB compared and equal
  total time   9 s
";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn a_failure_says_why_where_the_guest_is_and_what_to_do() {
    let error = WireError::new(
        ErrorCode::NoSpace,
        "d0 needs 20 GiB and beta has 3 GiB free",
    );
    let text = render(
        &report(
            Ending::Failed,
            GuestNow::RunsAtSource,
            Some((error, Some(Phase::Prepare))),
        ),
        false,
    );
    assert!(
        text.starts_with(
            "\nweb-1 was not moved to beta:7447: d0 needs 20 GiB and beta has 3 GiB free (no-space, in phase prepare).\n  \
             now: The guest runs here, at the source.\n  do:  Make room there"
        ),
        "{text}"
    );
    assert!(!text.contains("downtime"), "{text}");
}

#[test]
fn a_guest_that_ended_is_not_said_to_run() {
    let error = WireError::new(ErrorCode::GuestChanged, "it was shut down from inside");
    let report = report(Ending::Failed, GuestNow::Ended, Some((error, None)));
    assert!(report.what_is_true_now.contains("runs nowhere"));
}

#[test]
fn in_doubt_and_stuck_name_the_command_with_the_guest() {
    let error = || {
        Some((
            WireError::new(ErrorCode::LinkLost, "beta does not answer"),
            Some(Phase::Commit),
        ))
    };
    let doubt = report(Ending::InDoubt, GuestNow::InDoubt, error());
    assert!(
        doubt.what_to_do.contains("vmferry-src recover web-1"),
        "{}",
        doubt.what_to_do
    );
    assert!(doubt.what_is_true_now.contains("PAUSED"));
    let stuck = report(Ending::RolledBack, GuestNow::StuckAtSource, error());
    assert!(
        stuck.what_to_do.contains("vmferry-src recover web-1"),
        "{}",
        stuck.what_to_do
    );
}

#[test]
fn colour_is_only_where_it_is_wanted() {
    for (outcome, code) in [
        (Ending::Committed, "\x1b[1;32m"),
        (Ending::Cancelled, "\x1b[1;33m"),
        (Ending::InDoubt, "\x1b[1;31m"),
    ] {
        let report = report(outcome, GuestNow::RunsAtSource, None);
        assert!(render(&report, true).contains(code));
        assert!(!render(&report, false).contains('\x1b'));
    }
}

#[test]
fn many_rounds_are_shown_by_the_first_and_the_last() {
    let rounds: Vec<RoundStats> = (1..=100)
        .map(|number| RoundStats {
            number,
            ..RoundStats::default()
        })
        .collect();
    let mut report = committed();
    report.set_rounds(&rounds, None);
    let text = render(&report, false);
    let shown: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| *word == "…" || word.parse::<u32>().is_ok())
        .collect();
    assert_eq!(
        shown.join(" "),
        "1 2 3 4 … 89 90 91 92 93 94 95 96 97 98 99 100"
    );
    assert_eq!(report.rounds.len(), 100);
}

#[test]
fn parts_never_exceed_the_downtime_they_explain() {
    let mut report = committed();
    let parts = DowntimeParts {
        load_ms: millis(90_000),
        ..DowntimeParts::default()
    };
    report.set_downtime(Duration::from_millis(80), parts);
    assert_eq!(report.downtime_parts.other_ms, Millis::default());
}
