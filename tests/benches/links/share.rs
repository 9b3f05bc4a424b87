//! What share of a line a copy takes beside one TCP flow of the kernel's Cubic, each way round: who came first matters little if
//! both are fair.
//!
//! The flow says what it received; the rest of what the line carried is the copy's.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use vmferry_tests::bench::{Pair, Series, Target};
use vmferry_tests::harness::sim::SimSpec;
use vmferry_tests::link::calibrate::{self, Flow};
use vmferry_tests::link::{Link, LinkSpec};

use super::{Args, PROGRAMS, interrupt};

const RATE: u64 = 100_000_000;
const RUNS: u32 = 1;
/// Both have so long to find their share.
const SETTLE: Duration = Duration::from_secs(10);
/// And it is measured for so long.
const COUNTED: Duration = Duration::from_secs(10);
/// The first has the line for itself for so long.
const HEAD_START: Duration = Duration::from_secs(2);

/// Takes the table.
pub(super) fn run(args: &Args) -> Result<()> {
    for millis in [0, 20, 80] {
        // On the shortest path a round trip counts as 10 ms.
        for (queue, halves) in [("half a", 1), ("one", 2), ("two", 4)] {
            let mut spec = LinkSpec::new(RATE, Duration::from_millis(millis));
            spec.queue = spec.queue * halves / 2;
            let name = format!("{spec}, queue of {queue} round trip");
            if name.contains(&args.link) {
                shares(args, &name, spec)?;
            }
        }
    }
    Ok(())
}

fn shares(args: &Args, name: &str, spec: LinkSpec) -> Result<()> {
    println!("  {name}");
    for (order, copy_first) in [("copy first", true), ("TCP first", false)] {
        let mut share = Series::new(order, "of the line");
        let mut all = Series::new("both together", "of the line");
        for _ in 0..args.runs.unwrap_or(RUNS) {
            let (copy, tcp) = one(spec, copy_first)?;
            share.push(copy);
            all.push(copy + tcp);
        }
        println!("{share}\n{all}");
        Target::AtLeast(0.3).judge(order, share.median(), "");
        Target::AtMost(0.7).judge(order, share.median(), "");
    }
    Ok(())
}

/// Shares of the copy and of the flow.
fn one(spec: LinkSpec, copy_first: bool) -> Result<(f64, f64)> {
    let link = Link::new(spec)?;
    let mut pair = Pair::on_link(PROGRAMS, &link)?;
    let guest = pair.guest(&SimSpec {
        fill: 100,
        ..SimSpec::still("large", 512 << 20)
    })?;
    let start = || {
        let to = pair.agent.to();
        pair.alpha
            .start_migrate_to(guest.name(), &to, &["--compress", "off"])
    };
    let flow = Flow {
        warm_up: SETTLE
            + if copy_first {
                Duration::ZERO
            } else {
                HEAD_START
            },
        counted: COUNTED,
    };
    let mut source = copy_first.then(&start).transpose()?;
    if copy_first {
        thread::sleep(HEAD_START);
    }
    let (tcp, carried) = thread::scope(|scope| {
        let tcp = scope.spawn(|| calibrate::tcp_rate(&link, flow));
        let began = Instant::now();
        if !copy_first {
            thread::sleep(HEAD_START);
            source = Some(start()?);
        }
        thread::sleep(flow.warm_up.saturating_sub(began.elapsed()));
        let (before, since) = (link.forth().bytes, Instant::now());
        thread::sleep(flow.counted);
        let bytes = link.forth().bytes - before;
        let carried = bytes as f64 * 8.0 / since.elapsed().as_secs_f64();
        let tcp = tcp.join().map_err(|_| anyhow::anyhow!("the TCP flow"))??;
        anyhow::Ok((tcp, carried))
    })?;
    source.map_or(Ok(()), interrupt)?;
    let line = spec.rate as f64;
    Ok(((carried - tcp) / line, tcp / line))
}
