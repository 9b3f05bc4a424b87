//! For how long a guest stands still: from its last beat at the source to its first at the destination.
//!
//! An idle embedded guest, then (where QEMU is there) an idle Linux under QEMU, over loopback. The parts are those that the source
//! agent reports; beside them, how long the running guest was held at most by scan, re-arm and barrier.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use vmferry_tests::bench::{self, Moved, Pair, Series, Target};
use vmferry_tests::harness::qemu;
use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::lab::{BeatRecorder, Disk, JudgeParams, Lab};

const RUNS: u32 = 20;

const PARTS: [&str; 12] = [
    "pause",
    "barrier",
    "last_set",
    "verify",
    "state_save",
    "send",
    "flush",
    "load",
    "journal",
    "hooks",
    "start",
    "other",
];

fn main() -> ExitCode {
    bench::main(|| {
        embedded()?;
        match Lab::find() {
            Ok(lab) => real(lab),
            Err(missing) => {
                println!("an idle Linux under QEMU: SKIPPED: {missing}");
                Ok(())
            }
        }
    })
}

/// What is measured of every migration.
struct Table {
    gap: Series,
    /// What of it sending the last set at the copy's rate does not explain; a round trip of loopback is nothing.
    beyond: Series,
    downtime: Series,
    parts: Vec<Series>,
    /// The yardstick: what a journal's record costs on this disk, at this moment.
    durable: Series,
    stall: Series,
    hold: Series,
    barrier: Series,
}

impl Table {
    fn new() -> Self {
        Self {
            gap: Series::new("last beat there to first here", "ms"),
            beyond: Series::new("  beyond last set / rate", "ms"),
            downtime: Series::new("downtime as reported", "ms"),
            parts: PARTS
                .iter()
                .map(|part| Series::new(&format!("  {part}"), "ms"))
                .collect(),
            durable: Series::new("one small file made durable", "ms"),
            stall: Series::new("longest stall between beats", "ms"),
            hold: Series::new("longest hold by scan and re-arm", "ms"),
            barrier: Series::new("longest barrier", "ms"),
        }
    }

    fn push(&mut self, moved: &Moved, gap: Duration, stall: Duration) -> anyhow::Result<()> {
        self.gap.push(millis(gap));
        self.beyond.push(millis(gap) - last_set(moved)?);
        self.stall.push(millis(stall));
        self.downtime.push(moved.millis("downtime_ms")?);
        for (part, series) in PARTS.iter().zip(&mut self.parts) {
            series.push(moved.millis(&format!("downtime_parts/{part}_ms"))?);
        }
        self.hold.push(moved.millis("guest_stall_ms")?);
        self.barrier.push(moved.millis("barrier_stall_ms")?);
        Ok(())
    }

    /// Takes the yardstick on the disk of `folder`.
    fn measure_disk(&mut self, folder: &Path) -> anyhow::Result<()> {
        let began = Instant::now();
        let path = folder.join("yardstick");
        let mut file = File::create(&path)?;
        file.write_all(&[0x5a; 300])?;
        file.sync_all()?;
        std::fs::rename(&path, folder.join("yardstick.done"))?;
        File::open(folder)?.sync_all()?;
        self.durable.push(millis(began.elapsed()));
        Ok(())
    }

    fn journal(&self) -> &Series {
        let at = PARTS.iter().position(|part| *part == "journal");
        &self.parts[at.unwrap_or_default()]
    }

    fn print(&self, beyond: Target) {
        println!("{}\n{}\n{}", self.gap, self.beyond, self.downtime);
        for part in &self.parts {
            println!("{part}");
        }
        println!(
            "{}\n{}\n{}\n{}",
            self.durable, self.stall, self.hold, self.barrier
        );
        println!(
            "the journals' share of the downtime: {:.0} % (one record at each side: two fsyncs)",
            100.0 * self.journal().median() / self.downtime.median()
        );
        beyond.judge("gap beyond last set / rate", self.beyond.median(), "ms");
        Target::AtMost(2.0).judge(
            "scan and re-arm hold the guest, at most",
            self.hold.max(),
            "ms",
        );
    }
}

/// Milliseconds that the last set takes at the rate of the first round.
fn last_set(moved: &Moved) -> anyhow::Result<f64> {
    let rounds = moved.report["rounds"].as_array().context("no rounds")?;
    let last = rounds.len().checked_sub(1).context("no rounds")?;
    let bytes = |round: usize| moved.bytes(&format!("rounds/{round}/wire_bytes"));
    Ok(bytes(last)? as f64 / bytes(0)? as f64 * moved.millis("rounds/0/elapsed_ms")?)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn embedded() -> anyhow::Result<()> {
    let mut pair = Pair::new(env!("CARGO_BIN_EXE_vmferry-demo"))?;
    let spec = SimSpec {
        ram: 256 << 20,
        dirty_rate: 0,
        disk_rate: 0,
        ..SimSpec::small("idle")
    };
    let mut table = Table::new();
    for _ in 0..bench::runs(RUNS) {
        table.measure_disk(&pair.alpha.path("images"))?;
        let moved = pair.move_one(&spec, &[])?;
        table.push(&moved, moved.gap()?, moved.beats.longest_within())?;
    }
    println!("downtime of an idle embedded guest of 256 MiB");
    table.print(Target::AtMost(8.0));
    Ok(())
}

/// One Linux goes there and back again until it has moved often enough.
fn real(lab: &'static Lab) -> anyhow::Result<()> {
    let guest = lab
        .guest("idle")
        .disk(Disk::raw(64 << 20).prefilled(16 << 20))
        .judge(JudgeParams {
            memory: 64 << 20,
            dirty: 0,
            disk: 0,
            ..JudgeParams::default()
        })
        .build()?;
    let programs = Programs::played_by(env!("CARGO_BIN_EXE_vmferry-demo").as_ref());
    let pair = qemu::Pair::new(programs, guest)?;
    pair.expect_launched()?;
    let _first = pair.boot()?;
    let mut table = Table::new();
    for run in 0..bench::runs(RUNS) {
        let (from, to) = if run % 2 == 0 {
            (&pair.alpha, &pair.beta)
        } else {
            (&pair.beta, &pair.alpha)
        };
        table.measure_disk(from.place.folder())?;
        let agent = to.host.serve(&[])?;
        let began = Instant::now();
        let moved = pair.move_guest((from, to), &agent, &[])?;
        let beats = pair.guest.beats().report(1)?;
        let gap = beats.handovers.last().context("no handover")?.length;
        let moved = Moved {
            report: moved.report,
            beats: Default::default(),
        };
        table.push(&moved, gap, longest_stall(pair.guest.beats(), began))?;
    }
    pair.unbroken(1)?;
    println!("downtime of an idle Linux of 256 MiB under QEMU (TCG)");
    table.print(Target::AtMost(15.0));
    Ok(())
}

/// The longest time between two beats of one process since `began`.
fn longest_stall(beats: &BeatRecorder, began: Instant) -> Duration {
    let streams = beats.streams();
    let pairs = streams.iter().flat_map(|stream| stream.beats.windows(2));
    pairs
        .filter(|pair| pair[0].at >= began)
        .map(|pair| pair[1].at.saturating_duration_since(pair[0].at))
        .max()
        .unwrap_or_default()
}
