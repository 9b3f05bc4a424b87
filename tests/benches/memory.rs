//! How much memory the agents take: a large, mostly empty guest and a destination that is slow.
//!
//! The bound for each agent is 256 MiB and 0.1 % of the guest's RAM, whatever the guest's size and the peer's speed. What
//! counts is `VmHWM`, the most that was ever resident.

use std::fs;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use rustix::process::Signal;
use vmferry_tests::bench::{self, Pair, Target};
use vmferry_tests::harness::Running;
use vmferry_tests::harness::sim::SimSpec;

const RAM: u64 = 8 << 30;
const MIB: f64 = 1_048_576.0;
/// The slow destination works for so long, then stands still for so long.
const WORKS: Duration = Duration::from_millis(20);
const STANDS_STILL: Duration = Duration::from_millis(80);

fn main() -> ExitCode {
    bench::main(|| {
        println!("most resident memory with a guest of 8 GiB, 4 % of it not zero");
        for case in [Case::Fast, Case::SlowDestination, Case::LimitedBandwidth] {
            run(case)?;
        }
        Ok(())
    })
}

#[derive(Debug, Clone, Copy)]
enum Case {
    Fast,
    SlowDestination,
    LimitedBandwidth,
}

impl Case {
    const fn name(self) -> &'static str {
        match self {
            Self::Fast => "loopback",
            Self::SlowDestination => "destination stopped for 80 ms of 100",
            Self::LimitedBandwidth => "--max-bandwidth 100MiB/s",
        }
    }
}

fn run(case: Case) -> anyhow::Result<()> {
    let mut pair = Pair::new(env!("CARGO_BIN_EXE_vmferry-demo"))?;
    let guest = pair.guest(&SimSpec {
        fill: 4,
        ..SimSpec::still("large", RAM)
    })?;
    let mut options = vec!["--compress", "off", "--max-downtime", "5s"];
    if let Case::LimitedBandwidth = case {
        options.extend(["--max-bandwidth", "100MiB/s"]);
    }
    let mut source = pair
        .alpha
        .start_migrate(guest.name(), pair.agent.port, &options)?;
    let over = AtomicBool::new(false);
    let peak = thread::scope(|scope| {
        if let Case::SlowDestination = case {
            scope.spawn(|| hold_up(&pair.agent.process, &over));
        }
        let peak = watch(&mut source);
        over.store(true, Ordering::Release);
        peak
    })?;
    let done = source.wait(Duration::from_secs(60))?;
    let destination =
        high_water(pair.agent.process.pid()).context("the destination agent ended")?;
    pair.conclude(&guest, &done)?;
    let bound = Target::AtMost(256.0 + 0.001 * (8192.0));
    bound.judge(&format!("source, {}", case.name()), peak / MIB, "MiB");
    bound.judge(
        &format!("destination, {}", case.name()),
        destination / MIB,
        "MiB",
    );
    Ok(())
}

/// Lets the destination work only now and then, until the source is done.
fn hold_up(agent: &Running, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        thread::sleep(WORKS);
        if agent.signal(Signal::STOP).is_err() {
            return;
        }
        thread::sleep(STANDS_STILL);
        // It is there: it was stopped just now.
        let _ = agent.signal(Signal::CONT);
    }
}

/// The source's peak, read until it ends.
fn watch(source: &mut Running) -> anyhow::Result<f64> {
    let mut peak = None;
    while let Some(bytes) = high_water(source.pid()) {
        peak = Some(bytes);
        if source.has_ended()? {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    peak.context("the source agent ended at once")
}

/// `VmHWM` of a process in bytes; `None` once it has ended.
fn high_water(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024.0)
}
