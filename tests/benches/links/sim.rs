//! A busy embedded guest on a link: the stop that it was promised, what is sent twice, and how much the copy slows it down.
//!
//! One link, 1 Gbit/s and 0.2 ms; content is random and not compressed, so that the writer's rate means what it says.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmferry_tests::bench::{Moved, Pair, Series, Target};
use vmferry_tests::harness::SimGuest;
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::link::calibrate::{Flow, calibrate};
use vmferry_tests::link::{Link, LinkSpec};

use super::{Args, PROGRAMS};

const RATE: u64 = 1_000_000_000;
const RTT: Duration = Duration::from_micros(200);
const MIB: u64 = 1 << 20;
const BLOCK: f64 = 4096.0;
const RUN_LIMIT: Duration = Duration::from_secs(90);
const STOPS: u32 = 20;
const LONGEST_STOP: Duration = Duration::from_millis(50);
const RUNS: u32 = 3;
const RAW: [&str; 2] = ["--compress", "off"];
const FLOW: Flow = Flow {
    warm_up: Duration::from_secs(1),
    counted: Duration::from_secs(2),
};

fn link() -> Result<Link> {
    let link = Link::new(LinkSpec::new(RATE, RTT))?;
    println!("{}", calibrate(&link, FLOW)?.line(&link));
    Ok(link)
}

/// A guest that writes at `percent` of the line's rate, all over a tenth of its RAM.
fn guest(ram_mib: u64, percent: u64) -> SimSpec {
    SimSpec {
        ram: ram_mib * MIB,
        disk: 0,
        disk_rate: 0,
        fill: 100,
        content: "random",
        dirty_rate: RATE / 8 * percent / 100,
        working_set: ram_mib * MIB / 10,
        ..SimSpec::small("writer")
    }
}

/// Moves a guest; where that fails says why, and the table goes on without a figure.
fn moved(pair: &mut Pair, guest: &SimSpec, options: &[&str]) -> Option<Moved> {
    let failed = match pair.move_one(guest, options) {
        Ok(moved) => return Some(moved),
        Err(error) => format!("{error:#}"),
    };
    let why = failed.lines().find(|line| line.contains("was not moved"));
    println!("  {}", why.unwrap_or(&failed));
    None
}

/// How often the guest stands still for no longer than it was promised.
pub(super) fn stop(args: &Args) -> Result<()> {
    let link = link()?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let mut gaps = Series::new("last beat there to first here", "ms");
    let (mut kept, runs) = (0, args.runs.unwrap_or(STOPS));
    let limit = format!("{}ms", LONGEST_STOP.as_millis());
    let options = [&RAW[..], &["--max-downtime", &limit]].concat();
    for _ in 0..runs {
        // One that was refused as not converging did not keep its promise either.
        if let Some(moved) = moved(&mut pair, &guest(128, 50), &options) {
            let gap = moved.gap()?;
            gaps.push(gap.as_secs_f64() * 1e3);
            kept += u32::from(gap <= LONGEST_STOP);
        }
    }
    println!("{gaps}");
    let share = f64::from(kept) / f64::from(runs);
    Target::AtLeast(0.99).judge("share of runs in which 50 ms were kept", share, "");
    Ok(())
}

/// Blocks sent to distinct blocks, at three rates.
pub(super) fn resend(args: &Args) -> Result<()> {
    let link = link()?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let ram = if args.quick { 128 } else { 384 };
    for (percent, most) in [(25, 1.10), (50, 1.25), (80, 1.7)] {
        let what = format!("writer at {percent} % of the rate");
        let mut sent = Series::new(&what, "");
        for _ in 0..args.runs.unwrap_or(RUNS) {
            if let Some(moved) = moved(&mut pair, &guest(ram, percent), &RAW) {
                let distinct = moved.bytes("memory_bytes")? as f64 / BLOCK;
                sent.push(1.0 + moved.bytes("resent_blocks")? as f64 / distinct);
            }
        }
        println!("{sent}");
        Target::AtMost(most).judge(&what, sent.median(), "");
    }
    Ok(())
}

/// What a writer gets done while it is copied, to what it gets done otherwise, and its longest stall.
pub(super) fn slowdown(args: &Args) -> Result<()> {
    let link = link()?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let mut slower = Series::new("slow-down in pre-copy", "%");
    let mut stall = Series::new("longest stall in pre-copy", "ms");
    let mut usual = Series::new("longest stall before", "ms");
    for _ in 0..args.runs.unwrap_or(RUNS) {
        let writer = pair.guest(&guest(384, 30))?;
        let alone = watch(&writer, &pair, |began| {
            began.elapsed() > Duration::from_secs(2)
        })?;
        let options = [&RAW[..], &["--cutover", "manual"]].concat();
        let source = pair
            .alpha
            .start_migrate_to(writer.name(), &pair.agent.to(), &options)?;
        let copied = watch(&writer, &pair, |began| {
            source.stderr().contains(" converged") || began.elapsed() > RUN_LIMIT
        })?;
        slower.push((1.0 - copied.rate / alone.rate) * 100.0);
        stall.push(copied.stall.as_secs_f64() * 1e3);
        usual.push(alone.stall.as_secs_f64() * 1e3);
        source.signal(rustix::process::Signal::INT)?;
        source.wait(RUN_LIMIT)?;
    }
    println!("{slower}\n{usual}\n{stall}");
    Target::AtMost(5.0).judge("slow-down", slower.median(), "%");
    Target::AtMost(2.0).judge("longest stall", stall.median(), "ms");
    Ok(())
}

struct Watched {
    /// Pages written per second.
    rate: f64,
    /// Longest time between two beats.
    stall: Duration,
}

/// Watches `writer` until `over`.
fn watch(writer: &SimGuest, pair: &Pair, mut over: impl FnMut(Instant) -> bool) -> Result<Watched> {
    let mut client = writer.client(&pair.alpha)?;
    let beats = writer.beats()?.list.len();
    let (began, steps) = (Instant::now(), client.status()?.steps);
    while !over(began) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let written = client.status()?.steps - steps;
    let rate = written as f64 / began.elapsed().as_secs_f64();
    let list = writer.beats()?.list;
    let gaps = list[beats..]
        .windows(2)
        .map(|two| two[1].at.saturating_sub(two[0].at));
    Ok(Watched {
        rate,
        stall: gaps.max().context("the writer did not beat")?,
    })
}
