//! How fast the copy is, against bare quinn without compression and against one core's zstd with it.
//!
//! A guest of 1 GiB, three quarters of it not zero, over loopback. Each run takes the yardstick and the migration one
//! after the other; the ratio is that of a run, the figure its median. The destination's
//! guest has its RAM from the system before the copy begins, since the yardstick writes to no fresh memory either. What it is
//! without that is printed beside it, with the speed at which this system gives memory to anybody: a virtual machine
//! whose host takes free memory back may give it more slowly than any of the rest.

use std::process::ExitCode;
use std::time::Instant;

use vmferry_tests::bench::cpu::per_gib;
use vmferry_tests::bench::{self, Pair, Series, Target, quinn, zstd};
use vmferry_tests::harness::sim::SimSpec;

const RUNS: u32 = 5;
const MIB: f64 = 1_048_576.0;
const LEVEL: i32 = 1;

fn main() -> ExitCode {
    bench::main(|| {
        let mut pair = Pair::new(env!("CARGO_BIN_EXE_vmferry-demo"))?;
        raw(&mut pair)?;
        raw_untouched(&mut pair)?;
        compressed(&mut pair)
    })
}

fn idle(name: &str, content: &'static str) -> SimSpec {
    SimSpec {
        content,
        ..SimSpec::still(name, 1 << 30)
    }
}

/// The destination's guest has all of its RAM from the system before the copy begins.
fn raw(pair: &mut Pair) -> anyhow::Result<()> {
    let spec = SimSpec {
        prealloc: true,
        ..idle("raw", "random")
    };
    let ratio = against_quinn(pair, &spec, |_| Ok(()))?;
    Target::AtLeast(0.6).judge("goodput to bare quinn", ratio.median(), "");
    Ok(())
}

/// Its RAM comes from the system as it is written.
fn raw_untouched(pair: &mut Pair) -> anyhow::Result<()> {
    println!("the same into RAM that nobody touched before");
    let mut touch = Series::new("first touch of memory, one core", "MiB/s");
    against_quinn(pair, &idle("untouched", "random"), |bytes| {
        touch.push(first_touch(bytes)? / MIB);
        Ok(())
    })?;
    println!("{touch}");
    Ok(())
}

fn against_quinn(
    pair: &mut Pair,
    spec: &SimSpec,
    mut also: impl FnMut(u64) -> anyhow::Result<()>,
) -> anyhow::Result<Series> {
    let mut bare = Series::new("bare quinn", "MiB/s");
    let mut copy = Series::new("copy, --compress off", "MiB/s");
    let mut ratio = Series::new("ratio", "");
    let mut bare_cpu = Series::new("CPU of bare quinn, both sides", "s/GiB");
    let mut cpu = Series::new("CPU of both agents", "s/GiB");
    for _ in 0..bench::runs(RUNS) {
        let (moved, used) = pair.move_metered(spec, &["--compress", "off"])?;
        let content = moved.content()?;
        let yardstick = quinn::transfer(&pair.alpha, &pair.beta, content)?;
        also(content)?;
        let goodput = moved.goodput()?;
        bare.push(yardstick.speed / MIB);
        copy.push(goodput / MIB);
        ratio.push(goodput / yardstick.speed);
        bare_cpu.push(yardstick.cpu_per_gib);
        cpu.push(per_gib(used, content));
    }
    println!("copy of 1 GiB, three quarters random, against bare quinn between two processes");
    println!("{bare}\n{copy}\n{ratio}\n{bare_cpu}\n{cpu}");
    Target::AtMost(2.1).judge("CPU of both agents", cpu.median(), "s/GiB");
    Ok(ratio)
}

/// Bytes per second that the system gives to one who touches fresh memory.
fn first_touch(bytes: u64) -> anyhow::Result<f64> {
    let len = usize::try_from(bytes)?;
    let began = Instant::now();
    std::hint::black_box(vec![1_u8; len]);
    Ok(quinn::per_second(bytes, began.elapsed()))
}

fn compressed(pair: &mut Pair) -> anyhow::Result<()> {
    let mut alone = Series::new("zstd, one core", "MiB/s");
    let mut copy = Series::new("copy, --compress 1", "MiB/s");
    let mut ratio = Series::new("ratio", "");
    let (sample, level) = (zstd::text()?, LEVEL.to_string());
    let spec = SimSpec {
        prealloc: true,
        ..idle("text", "text")
    };
    for _ in 0..bench::runs(RUNS) {
        let moved = pair.move_one(&spec, &["--compress", &level])?;
        let yardstick = zstd::one_core(&sample, LEVEL)?;
        let goodput = moved.goodput()?;
        alone.push(yardstick / MIB);
        copy.push(goodput / MIB);
        ratio.push(goodput / yardstick);
    }
    println!("copy of 1 GiB, three quarters text, against one core's zstd at level {LEVEL}");
    println!("{alone}\n{copy}\n{ratio}");
    Target::AtLeast(0.9).judge("input bytes to one core's zstd", ratio.median(), "");
    Ok(())
}
