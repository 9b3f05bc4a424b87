//! Whether `--max-bandwidth` is what the wire carries, over any second, also when it is changed on the way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vmferry_tests::bench::{Pair, Series, Target};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::link::{Link, LinkSpec};

use super::trace::Trace;
use super::{Args, PROGRAMS, interrupt};

const RATE: u64 = 1_000_000_000;
/// Given first, and from the change on, in Mbit/s.
const LIMITS: [u32; 2] = [100, 50];
const CHANGE: Duration = Duration::from_secs(6);
const WATCHED: Duration = Duration::from_secs(12);
/// The handshake, and what was handed over before the change.
const SETTLE: Duration = Duration::from_millis(500);
const SECOND: Duration = Duration::from_secs(1);
const RUNS: u32 = 1;
const END: Duration = Duration::from_secs(30);

/// Takes the table.
pub(super) fn run(args: &Args) -> Result<()> {
    for (micros, loss) in [(200, 0.0), (20_000, 0.01)] {
        let spec = LinkSpec::new(RATE, Duration::from_micros(micros)).lossy(loss);
        println!("  {spec}");
        let mut over = Series::new("fastest second above the limit", "%");
        let mut under = Series::new("slowest second below the limit", "%");
        for _ in 0..args.runs.unwrap_or(RUNS) {
            for (rates, mbit) in one(spec)?.iter().zip(LIMITS) {
                let limit = f64::from(mbit) * 1e6 / 8.0;
                let share = |rate: &f64| (rate / limit - 1.0) * 100.0;
                let rates = rates.iter().map(share);
                let most = rates.clone().fold(f64::NEG_INFINITY, f64::max);
                over.push(most);
                under.push(-rates.fold(f64::INFINITY, f64::min));
            }
        }
        println!("{over}\n{under}");
        Target::AtMost(3.0).judge("worst of all above", over.max(), "%");
        Target::AtMost(3.0).judge("worst of all below", under.max(), "%");
    }
    Ok(())
}

/// Bytes per second over all seconds under each limit.
fn one(spec: LinkSpec) -> Result<[Vec<f64>; 2]> {
    let link = Link::new(spec)?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let guest = pair.guest(&SimSpec {
        fill: 100,
        ..SimSpec::still("limited", 256 << 20)
    })?;
    let [first, later] = LIMITS.map(|mbit| format!("{mbit}Mbit"));
    let options = ["--compress", "off", "--max-bandwidth", &first];
    let source = pair
        .alpha
        .start_migrate_to(guest.name(), &pair.agent.to(), &options)?;
    let began = Instant::now();
    let mut changed = None;
    let trace = Trace::take(&link, END, || {
        if changed.is_none() && began.elapsed() >= CHANGE {
            let setting = format!("max-bandwidth={later}");
            let done = pair
                .alpha
                .ask(Role::Source, "set", guest.name(), &[&setting])?;
            ensure!(done.code() == 0, "{}", done.stderr);
            changed = Some(began.elapsed());
        }
        Ok(began.elapsed() >= WATCHED)
    })?;
    interrupt(source)?;
    let trace = trace.context("watched for too long")?;
    let changed = changed.context("never changed")?;
    Ok([
        // The change was asked for some time before it was answered.
        trace.seconds(SETTLE, CHANGE.saturating_sub(SECOND)),
        trace.seconds(changed + SETTLE, WATCHED - SECOND),
    ])
}
