//! What share of a line a copy fills, how soon, and what CPU time it takes.
//!
//! An embedded guest full of random content, not compressed, so that what arrives is what was sent; the destination's guest has
//! its RAM from the system before the copy begins. CPU time stands beside that of bare quinn on the same line. Two shares of the ceiling
//! (what a line of full packets carries of payload): over the whole first pass, and the steady one, which leaves the start and the
//! end away. The line's own counters say when.

use std::time::Duration;

use anyhow::Result;
use vmferry_tests::bench::cpu::per_gib;
use vmferry_tests::bench::{Moved, Pair, Series, Target, quinn};
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::link::calibrate::{Flow, calibrate};
use vmferry_tests::link::{Link, LinkSpec, MTU};

use super::trace::{SHORTEST, Trace};
use super::{Args, PROGRAMS};

const RUNS: u32 = 1;
/// IP and UDP headers 28, QUIC short header 13, tag 16, stream frame 9 at most.
const HEADERS: f64 = 66.0;
/// Cubic on a lossy line would take hours.
const RUN_LIMIT: Duration = Duration::from_secs(40);
const MIB: u64 = 1 << 20;
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

impl Case {
    const fn is_fast(&self) -> bool {
        self.spec.rate >= 1_000_000_000
    }
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
    let mut bare_cpu = Series::new("CPU of bare quinn, both sides", "s/GiB");
    for _ in 0..args.runs.unwrap_or(RUNS) {
        let Some(run) = one(case, controller)? else {
            println!("  {name}: not done in {RUN_LIMIT:?}");
            return Ok(());
        };
        whole.push(run.whole);
        steady.push(run.steady);
        start.push(run.start);
        cpu.push(run.cpu_per_gib);
        if let Some(figure) = run.bare_cpu_per_gib {
            bare_cpu.push(figure);
        }
    }
    println!("  {name}\n{whole}\n{steady}\n{start}\n{cpu}");
    // The targets are those of our own controller.
    if controller != Some("cubic") {
        case.share.judge("steady / ceiling", steady.median(), "");
        if case.spec.rtt >= SHORTEST {
            Target::AtMost(10.0).judge("90 % of the steady rate", start.median(), "RTT");
        }
        if case.is_fast() {
            println!("{bare_cpu}");
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
    /// Where the line is fast enough that CPU time matters.
    bare_cpu_per_gib: Option<f64>,
}

fn one(case: &Case, controller: Option<&str>) -> Result<Option<Run>> {
    let link = Link::new(case.spec)?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let guest = pair.guest(&SimSpec {
        prealloc: true,
        ..SimSpec::still("full", case.ram)
    })?;
    let mut options = vec!["--compress", "off"];
    if let Some(controller) = controller {
        options.extend(["--congestion", controller]);
    }
    let (mut source, meter) = pair.start_metered(&guest, &options)?;
    let Some(trace) = Trace::take(&link, RUN_LIMIT, || Ok(source.has_ended()?))? else {
        return Ok(None);
    };
    let cpu = meter.used();
    let done = source.wait(RUN_LIMIT)?;
    let moved = pair.conclude(&guest, &done)?;
    let bare_cpu_per_gib = if case.is_fast() {
        let bare = quinn::transfer(&pair.alpha, &pair.beta, moved.content()?)?;
        Some(bare.cpu_per_gib)
    } else {
        None
    };
    judge(&link, &moved, &trace, cpu, bare_cpu_per_gib).map(Some)
}

fn judge(
    link: &Link,
    moved: &Moved,
    trace: &Trace,
    cpu: Duration,
    bare_cpu_per_gib: Option<f64>,
) -> Result<Run> {
    let ceiling = link.spec.rate as f64 / 8.0 * (1.0 - HEADERS / f64::from(MTU));
    let content = moved.content()? as f64;
    let steady = trace.steady()?;
    let of_line = content / trace.total() as f64;
    Ok(Run {
        whole: moved.goodput()? / ceiling,
        steady: steady * of_line / ceiling,
        start: trace.start(steady, link.spec.rtt)?.as_secs_f64() / link.spec.rtt.as_secs_f64(),
        cpu_per_gib: per_gib(cpu, moved.content()?),
        bare_cpu_per_gib,
    })
}
