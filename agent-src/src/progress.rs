//! Progress while a migration runs: a bar on a terminal, lines elsewhere, nothing with `-q`. Always on stderr.
//!
//! Owns how a [`Snapshot`] is shown and how often. It measures nothing and keeps no clock: the snapshot carries the
//! time. A progress that cannot be written (a closed stderr) never disturbs the migration.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use vmferry_common::phase::Phase;
use vmferry_common::telemetry::{LogArgs, LogFormat};
use vmferry_common::units::{Rate, Size, Span};

/// Time between two lines within a phase: slow enough for a log, fast enough for a person.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Bars are drawn at most this often a second.
const DRAWS_PER_SECOND: u8 = 8;

/// The bar on the terminal, if there is one: there is one terminal per process.
static ON_TERMINAL: Mutex<Option<ProgressBar>> = Mutex::new(None);

fn on_terminal() -> MutexGuard<'static, Option<ProgressBar>> {
    ON_TERMINAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far a migration is, at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The phase.
    pub phase: Phase,
    /// Since the migration began.
    pub elapsed: Duration,
    /// The round, from 1; 0 outside of the copy.
    pub round: u32,
    /// Bytes of guest content that this round has to account for.
    pub bytes_total: u64,
    /// Bytes that it has accounted for.
    pub bytes_done: u64,
    /// Bytes left to send, as of the last scan.
    pub left_bytes: u64,
    /// What goes over the wire now, bytes per second.
    pub rate: Rate,
    /// What the guest dirtied per second in the last round, once there was one.
    pub dirty_rate: Option<Rate>,
    /// What a cutover now would take, once that is known.
    pub predicted_downtime: Option<Duration>,
    /// Something out of the ordinary that lasts: the link is lost, the guest does not converge.
    pub note: Option<String>,
}

impl Snapshot {
    /// A snapshot of a phase in which nothing is copied.
    #[must_use]
    pub const fn of_phase(phase: Phase, elapsed: Duration) -> Self {
        Self {
            phase,
            elapsed,
            round: 0,
            bytes_total: 0,
            bytes_done: 0,
            left_bytes: 0,
            rate: Rate(0),
            dirty_rate: None,
            predicted_downtime: None,
            note: None,
        }
    }

    /// The snapshot as a line for a person.
    #[must_use]
    pub fn to_line(&self, guest: &str) -> String {
        let figures = figures(self);
        let colon = if figures.is_empty() { "" } else { ": " };
        format!("{}{colon}{figures}", heading(guest, self))
    }

    /// The snapshot as an object, for logs in JSON and for the answer to `status`.
    #[must_use]
    pub fn to_json(&self, guest: &str) -> serde_json::Value {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        serde_json::json!({
            "guest": guest,
            "phase": self.phase,
            "elapsed_ms": millis(self.elapsed),
            "round": self.round,
            "bytes_total": self.bytes_total,
            "bytes_done": self.bytes_done,
            "left_bytes": self.left_bytes,
            "bytes_per_second": self.rate.0,
            "dirty_bytes_per_second": self.dirty_rate.map(|rate| rate.0),
            "predicted_downtime_ms": self.predicted_downtime.map(millis),
            "note": self.note,
        })
    }
}

/// Shows snapshots. Update it as often as you like: it decides what is worth showing.
pub struct Progress {
    guest: String,
    shown: Shown,
}

enum Shown {
    Silent,
    Bar(ProgressBar),
    Lines(Lines),
}

struct Lines {
    out: Box<dyn Write + Send>,
    json: bool,
    last: Option<Snapshot>,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shown = match self.shown {
            Shown::Silent => "silent",
            Shown::Bar(_) => "bar",
            Shown::Lines(_) => "lines",
        };
        f.debug_struct("Progress")
            .field("guest", &self.guest)
            .field("shown", &shown)
            .finish()
    }
}

impl Progress {
    /// As `log` and stderr want it: `-q` silent, a terminal a bar (unless it logs JSON or every step), else lines.
    #[must_use]
    pub fn new(guest: &str, log: &LogArgs) -> Self {
        let json = log.log_format == LogFormat::Json;
        if log.quiet > 0 {
            Self::silent(guest)
        } else if io::stderr().is_terminal() && !json && log.verbose == 0 {
            Self::bar(guest)
        } else {
            Self::lines(guest, Box::new(io::stderr()), json)
        }
    }

    /// Shows nothing.
    #[must_use]
    pub fn silent(guest: &str) -> Self {
        Self {
            guest: guest.to_owned(),
            shown: Shown::Silent,
        }
    }

    /// Writes lines to `out`, as JSON objects if `json`.
    #[must_use]
    pub fn lines(guest: &str, out: Box<dyn Write + Send>, json: bool) -> Self {
        Self {
            guest: guest.to_owned(),
            shown: Shown::Lines(Lines {
                out,
                json,
                last: None,
            }),
        }
    }

    fn bar(guest: &str) -> Self {
        let bar = ProgressBar::with_draw_target(
            Some(0),
            ProgressDrawTarget::stderr_with_hz(DRAWS_PER_SECOND),
        );
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:24}] {wide_msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        *on_terminal() = Some(bar.clone());
        Self {
            guest: guest.to_owned(),
            shown: Shown::Bar(bar),
        }
    }

    /// Shows how far it is.
    pub fn update(&mut self, snapshot: &Snapshot) {
        match &mut self.shown {
            Shown::Silent => {}
            Shown::Bar(bar) => draw(bar, &self.guest, snapshot),
            Shown::Lines(lines) => lines.update(&self.guest, snapshot),
        }
    }

    /// Says something once, above the bar: a lost link, a resumed copy.
    pub fn note(&mut self, text: &str) {
        match &mut self.shown {
            Shown::Silent => {}
            Shown::Bar(bar) => bar.println(format!("{}: {text}", self.guest)),
            Shown::Lines(lines) => lines.note(&self.guest, text),
        }
    }

    /// Takes the bar away, so that the summary begins on a fresh line. Idempotent.
    pub fn finish(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            on_terminal().take();
            bar.finish_and_clear();
        }
        self.shown = Shown::Silent;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Where log lines go while there may be a bar: stderr, with the bar moved aside for each write. Give it to
/// [`LogArgs::init_to`] as `LogWriter::default`.
#[derive(Debug, Default)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bar = on_terminal().clone();
        let write = || io::stderr().lock().write_all(bytes);
        match bar {
            Some(bar) => bar.suspend(write)?,
            None => write()?,
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn draw(bar: &ProgressBar, guest: &str, snapshot: &Snapshot) {
    bar.set_length(snapshot.bytes_total);
    bar.set_position(snapshot.bytes_done.min(snapshot.bytes_total));
    bar.set_prefix(heading(guest, snapshot));
    bar.set_message(figures(snapshot));
}

fn heading(guest: &str, snapshot: &Snapshot) -> String {
    match snapshot.round {
        0 => format!("{guest} {}", snapshot.phase),
        round => format!("{guest} {}, round {round}", snapshot.phase),
    }
}

/// `120 MiB of 400 MiB at 1.5 Gbit/s, dirties 90 Mbit/s, downtime 84 ms; link lost`.
fn figures(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    if snapshot.bytes_total > 0 {
        let done = snapshot.bytes_done.min(snapshot.bytes_total);
        let _ = write!(
            text,
            "{} of {} at {}",
            Size(done),
            Size(snapshot.bytes_total),
            snapshot.rate
        );
    }
    let mut add = |part: String| {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{part}");
    };
    if snapshot.round > 1 {
        add(format!("{} left", Size(snapshot.left_bytes)));
    }
    if let Some(rate) = snapshot.dirty_rate {
        add(format!("guest dirties {rate}"));
    }
    if let Some(predicted) = snapshot.predicted_downtime {
        add(format!("downtime {}", Span(predicted)));
    }
    if let Some(note) = &snapshot.note {
        let semicolon = if text.is_empty() { "" } else { "; " };
        let _ = write!(text, "{semicolon}{note}");
    }
    text
}

impl Lines {
    fn update(&mut self, guest: &str, snapshot: &Snapshot) {
        if !self.due(snapshot) {
            return;
        }
        let line = if self.json {
            snapshot.to_json(guest).to_string()
        } else {
            format!(
                "[{:>10}] {}",
                Span(snapshot.elapsed),
                snapshot.to_line(guest)
            )
        };
        self.write(&line);
        self.last = Some(snapshot.clone());
    }

    /// A new phase or note at once, everything else every few seconds.
    fn due(&self, snapshot: &Snapshot) -> bool {
        self.last.as_ref().is_none_or(|last| {
            last.phase != snapshot.phase
                || last.note != snapshot.note
                || snapshot.elapsed.saturating_sub(last.elapsed) >= LINE_INTERVAL
        })
    }

    fn note(&mut self, guest: &str, text: &str) {
        let line = if self.json {
            serde_json::json!({ "guest": guest, "note": text }).to_string()
        } else {
            format!("{guest}: {text}")
        };
        self.write(&line);
    }

    /// One write per line, so that lines of several programs do not mix. Nobody is there to be told of a failure.
    fn write(&mut self, line: &str) {
        let _ = self.out.write_all(format!("{line}\n").as_bytes());
        let _ = self.out.flush();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use vmferry_common::phase::Phase;
    use vmferry_common::telemetry::LogArgs;
    use vmferry_common::units::Rate;

    use super::{LogWriter, Progress, Shown, Snapshot};

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn copying(seconds: u64) -> Snapshot {
        Snapshot {
            phase: Phase::Copy,
            elapsed: Duration::from_secs(seconds),
            round: 2,
            bytes_total: 400 << 20,
            bytes_done: 120 << 20,
            left_bytes: 280 << 20,
            rate: Rate(125_000_000),
            dirty_rate: Some(Rate(11_250_000)),
            predicted_downtime: Some(Duration::from_millis(84)),
            note: None,
        }
    }

    #[test]
    fn a_line_has_every_figure_with_its_unit() {
        let out = Shared::default();
        let mut progress = Progress::lines("web-1", Box::new(out.clone()), false);
        progress.update(&Snapshot::of_phase(
            Phase::Negotiate,
            Duration::from_millis(20),
        ));
        progress.update(&copying(12));
        assert_eq!(
            out.text(),
            "[     20 ms] web-1 negotiate\n[      12 s] web-1 copy, round 2: 120 MiB of 400 MiB at 1 Gbit/s, 280 MiB left, \
             guest dirties 90 Mbit/s, downtime 84 ms\n"
        );
    }

    #[test]
    fn lines_come_at_each_phase_note_and_every_few_seconds() {
        let out = Shared::default();
        let mut progress = Progress::lines("web-1", Box::new(out.clone()), false);
        for second in 10..=20 {
            progress.update(&copying(second));
        }
        assert_eq!(out.text().lines().count(), 3, "{}", out.text());
        let mut lost = copying(20);
        lost.note = Some("link lost, trying again".into());
        progress.update(&lost);
        progress.update(&lost);
        assert_eq!(out.text().lines().count(), 4, "{}", out.text());
        assert!(
            out.text()
                .ends_with("downtime 84 ms; link lost, trying again\n")
        );
        progress.update(&Snapshot::of_phase(Phase::Pause, Duration::from_secs(20)));
        progress.note("the guest is paused");
        assert!(
            out.text()
                .ends_with("[      20 s] web-1 pause\nweb-1: the guest is paused\n")
        );
    }

    #[test]
    fn json_lines_are_objects() {
        let out = Shared::default();
        let mut progress = Progress::lines("web-1", Box::new(out.clone()), true);
        progress.update(&copying(12));
        progress.note("resumed");
        for line in out.text().lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value["guest"], "web-1");
        }
        assert!(out.text().contains(r#""phase":"copy""#), "{}", out.text());
        assert!(
            out.text().contains(r#""predicted_downtime_ms":84"#),
            "{}",
            out.text()
        );
    }

    #[test]
    fn quiet_and_finished_progress_say_nothing() {
        let quiet = LogArgs {
            quiet: 1,
            ..LogArgs::default()
        };
        assert!(matches!(
            Progress::new("web-1", &quiet).shown,
            Shown::Silent
        ));
        let out = Shared::default();
        let mut progress = Progress::lines("web-1", Box::new(out.clone()), false);
        progress.finish();
        progress.update(&copying(1));
        progress.note("late");
        assert_eq!(out.text(), "");
    }

    #[test]
    fn a_bar_survives_odd_numbers() {
        let mut progress = Progress::bar("web-1");
        for (done, total) in [(0, 0), (5, 0), (7, 3), (u64::MAX, u64::MAX)] {
            progress.update(&Snapshot {
                bytes_done: done,
                bytes_total: total,
                ..copying(1)
            });
        }
        let Shown::Bar(bar) = &progress.shown else {
            panic!("no bar");
        };
        assert_eq!(bar.position(), u64::MAX);
        let mut log = LogWriter;
        assert_eq!(log.write(b"a log line beside a bar\n").unwrap(), 24);
        progress.finish();
        assert!(super::on_terminal().is_none());
    }
}
