//! What share of a line a copy fills, how soon, and what CPU time it takes.
//!
//! An embedded guest full of random content, not compressed, so that what arrives is what was sent. Two shares of the ceiling
//! (what a line of full packets carries of payload): over the whole first pass, and the steady one, which leaves the start and the
//! end away. The line's own counters say when.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmferry_tests::bench::cpu::{CpuMeter, Watched};
use vmferry_tests::bench::{Moved, Pair, Series, Target};
use vmferry_tests::harness::Running;
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::link::calibrate::{Flow, calibrate};
use vmferry_tests::link::{Link, LinkSpec, MTU};

use super::{Args, PROGRAMS};

const RUNS: u32 = 1;
/// IP and UDP headers 28, QUIC short header 13, tag 16, stream frame 9 at most.
const HEADERS: f64 = 66.0;
/// Cubic on a lossy line would take hours.
const RUN_LIMIT: Duration = Duration::from_secs(40);
const LOOK: Duration = Duration::from_millis(1);
/// The handshake is over when so much is on the line.
const HANDSHAKE: u64 = 20_000;
/// Shortest stretch over which a rate says something on a busy machine.
const SHORTEST: Duration = Duration::from_millis(10);
const MIB: u64 = 1 << 20;
const GIB: f64 = 1_073_741_824.0;
const FLOW: Flow = Flow {
    warm_up: Duration::from_secs(2),
    counted: Duration::from_secs(2),
};

struct Case {
    name: String,
    spec: LinkSpec,
    /// Of the guest's RAM.
    ram: u64,
    share: Target,
}

fn cases(args: &Args) -> Vec<Case> {
    let mut all = Vec::new();
    for (name, mbit, ram) in [("100mbit", 100, 96), ("1gbit", 1000, 768)] {
        for rtt in [200, 20_000, 80_000] {
            for (loss, least) in [(0.0, 0.95), (0.001, 0.92), (0.01, 0.88)] {
                let spec = LinkSpec::new(mbit * 1_000_000, Duration::from_micros(rtt)).lossy(loss);
                all.push(Case {
                    name: format!("{name} {spec}"),
                    spec,
                    ram: if args.quick { ram / 2 } else { ram } * MIB,
                    share: Target::AtLeast(least),
                });
            }
        }
    }
    all.retain(|case| case.name.contains(&args.link));
    all
}

/// The controllers that the agent knows; none where it has no choice.
fn controllers() -> Result<Vec<Option<&'static str>>> {
    let mut command = Programs::played_by(PROGRAMS.as_ref()).command(Role::Source);
    let help = command.args(["migrate", "--help"]).output()?;
    let choice = String::from_utf8_lossy(&help.stdout).contains("--congestion");
    Ok(if choice {
        vec![Some("model"), Some("cubic")]
    } else {
        vec![None]
    })
}

/// Takes the table.
pub(super) fn run(args: &Args) -> Result<()> {
    for case in cases(args) {
        let link = Link::new(case.spec)?;
        println!("{}", calibrate(&link, FLOW)?.line(&link));
        drop(link);
        for controller in controllers()? {
            let name = controller.unwrap_or("the only controller");
            if name.contains(&args.system) {
                figures(args, &case, name, controller)?;
            }
        }
    }
    Ok(())
}

fn figures(args: &Args, case: &Case, name: &str, controller: Option<&str>) -> Result<()> {
    let mut whole = Series::new("whole first pass / ceiling", "");
    let mut steady = Series::new("steady / ceiling", "");
    let mut start = Series::new("90 % of the steady rate after", "RTT");
    let mut cpu = Series::new("CPU of both agents", "s/GiB");
    for _ in 0..args.runs.unwrap_or(RUNS) {
        let Some(run) = one(case, controller)? else {
            println!("  {name}: not done in {RUN_LIMIT:?}");
            return Ok(());
        };
        whole.push(run.whole);
        steady.push(run.steady);
        start.push(run.start);
        cpu.push(run.cpu_per_gib);
    }
    println!("  {name}\n{whole}\n{steady}\n{start}\n{cpu}");
    // The targets are those of our own controller.
    if controller != Some("cubic") {
        case.share.judge("steady / ceiling", steady.median(), "");
        if case.spec.rtt >= SHORTEST {
            Target::AtMost(10.0).judge("90 % of the steady rate", start.median(), "RTT");
        }
        if case.spec.rate >= 1_000_000_000 {
            Target::AtMost(2.1).judge("CPU of both agents", cpu.median(), "s/GiB");
        }
    }
    Ok(())
}

struct Run {
    whole: f64,
    steady: f64,
    start: f64,
    cpu_per_gib: f64,
}

fn one(case: &Case, controller: Option<&str>) -> Result<Option<Run>> {
    let link = Link::new(case.spec)?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let guest = pair.guest(&SimSpec {
        ram: case.ram,
        disk: 0,
        dirty_rate: 0,
        disk_rate: 0,
        content: "random",
        ..SimSpec::small("full")
    })?;
    let mut options = vec!["--compress", "off"];
    if let Some(controller) = controller {
        options.extend(["--congestion", controller]);
    }
    let meter = CpuMeter::start();
    meter.watch(Watched::whole(pair.agent.process.pid()));
    let mut source = pair
        .alpha
        .start_migrate_to(guest.name(), &pair.agent.to(), &options)?;
    meter.watch(Watched::whole(source.pid()));
    let Some(trace) = Trace::take(&link, &mut source)? else {
        return Ok(None);
    };
    let cpu = meter.used();
    let done = source.wait(RUN_LIMIT)?;
    let moved = pair.conclude(&guest, &done)?;
    judge(&link, &moved, &trace, cpu).map(Some)
}

fn judge(link: &Link, moved: &Moved, trace: &Trace, cpu: Duration) -> Result<Run> {
    let ceiling = link.spec.rate as f64 / 8.0 * (1.0 - HEADERS / f64::from(MTU));
    let content = moved.content()? as f64;
    let steady = trace.steady()?;
    let of_line = content / trace.total() as f64;
    Ok(Run {
        whole: moved.goodput()? / ceiling,
        steady: steady * of_line / ceiling,
        start: trace.start(steady, link.spec.rtt)?.as_secs_f64() / link.spec.rtt.as_secs_f64(),
        cpu_per_gib: cpu.as_secs_f64() / (content / GIB),
    })
}

/// Bytes that were on the line, looked at again and again.
struct Trace {
    points: Vec<(Duration, u64)>,
}

impl Trace {
    /// Looks until the source ends; `None` if that takes too long.
    fn take(link: &Link, source: &mut Running) -> Result<Option<Self>> {
        let (began, before) = (Instant::now(), link.forth().bytes);
        let mut points = Vec::new();
        while !source.has_ended()? {
            if began.elapsed() > RUN_LIMIT {
                return Ok(None);
            }
            points.push((began.elapsed(), link.forth().bytes - before));
            thread::sleep(LOOK);
        }
        Ok(Some(Self { points }))
    }

    fn total(&self) -> u64 {
        self.points.last().map_or(0, |(_, bytes)| *bytes)
    }

    /// When `bytes` were on the line.
    fn when(&self, bytes: u64) -> Result<Duration> {
        let reached = self.points.iter().find(|(_, so_far)| *so_far >= bytes);
        Ok(reached.context("the line carried less")?.0)
    }

    /// Bytes per second between 30 and 90 % of all bytes.
    fn steady(&self) -> Result<f64> {
        let (from, to) = (self.total() * 3 / 10, self.total() * 9 / 10);
        let took = self.when(to)?.saturating_sub(self.when(from)?);
        Ok((to - from) as f64 / took.as_secs_f64())
    }

    /// From the end of the handshake until a round trip carries 90 % of the steady rate.
    fn start(&self, steady: f64, rtt: Duration) -> Result<Duration> {
        let (begin, stretch) = (self.when(HANDSHAKE)?, rtt.max(SHORTEST));
        let least = steady * 0.9 * stretch.as_secs_f64();
        let mut later = self.points.iter().peekable();
        for (at, bytes) in &self.points {
            while later.next_if(|(then, _)| *then < *at + stretch).is_some() {}
            let Some((_, then)) = later.peek() else { break };
            if *at >= begin && (then - bytes) as f64 >= least {
                return Ok(*at - begin);
            }
        }
        anyhow::bail!("the rate was never steady")
    }
}
