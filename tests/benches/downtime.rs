//! For how long a guest stands still: from its last beat at the source to its first at the destination.
//!
//! An idle embedded guest, then (where QEMU is there) an idle Linux under QEMU, over loopback. The parts are those that the source
//! agent reports; beside them, how long the running guest was held at most by scan, re-arm and barrier.

use std::process::ExitCode;

use vmferry_tests::bench::{self, Moved, Pair, Series, Target};
use vmferry_tests::harness::sim::SimSpec;

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
    bench::main(|| embedded())
}

/// What is measured of every migration.
struct Table {
    gap: Series,
    downtime: Series,
    parts: Vec<Series>,
    stall: Series,
    hold: Series,
    barrier: Series,
}

impl Table {
    fn new() -> Self {
        Self {
            gap: Series::new("last beat there to first here", "ms"),
            downtime: Series::new("downtime as reported", "ms"),
            parts: PARTS
                .iter()
                .map(|part| Series::new(&format!("  {part}"), "ms"))
                .collect(),
            stall: Series::new("longest stall between beats", "ms"),
            hold: Series::new("longest hold by scan and re-arm", "ms"),
            barrier: Series::new("longest barrier", "ms"),
        }
    }

    fn push(&mut self, moved: &Moved) -> anyhow::Result<()> {
        self.gap.push(moved.gap()?.as_secs_f64() * 1e3);
        self.stall
            .push(moved.beats.longest_within().as_secs_f64() * 1e3);
        self.push_report(moved)
    }

    fn push_report(&mut self, moved: &Moved) -> anyhow::Result<()> {
        self.downtime.push(moved.millis("downtime_ms")?);
        for (part, series) in PARTS.iter().zip(&mut self.parts) {
            series.push(moved.millis(&format!("downtime_parts/{part}_ms"))?);
        }
        self.hold.push(moved.millis("guest_stall_ms")?);
        self.barrier.push(moved.millis("barrier_stall_ms")?);
        Ok(())
    }

    fn print(&self, gap: Target) {
        println!("{}\n{}", self.gap, self.downtime);
        for part in &self.parts {
            println!("{part}");
        }
        println!("{}\n{}\n{}", self.stall, self.hold, self.barrier);
        gap.judge("downtime, median", self.gap.median(), "ms");
        Target::AtMost(2.0).judge(
            "scan and re-arm hold the guest, at most",
            self.hold.max(),
            "ms",
        );
    }
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
        table.push(&pair.move_one(&spec, &[])?)?;
    }
    println!("downtime of an idle embedded guest of 256 MiB");
    table.print(Target::AtMost(10.0));
    Ok(())
}
