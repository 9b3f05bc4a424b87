//! `vmferry-simulate`: many runs, or one again.
//!
//! Owns arguments and output. Seeds are taken one after the other from `--seed`, by as many threads as there are cores; each run is one
//! thread's alone.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use clap::Parser;
use vmferry_common::telemetry::LogArgs;

use super::run::{Ground, run};
use super::tally::Tally;

/// Runs both agents' own drive loops on a simulated guest, clock, link and disk, and judges what came of it.
#[derive(Debug, Parser)]
#[command(name = "vmferry-simulate", version)]
struct Args {
    /// How many runs.
    #[arg(long, default_value_t = 10_000)]
    runs: u64,
    /// The first seed; the others follow it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs this one seed again and prints its log.
    #[arg(long, conflicts_with_all = ["runs", "seed"])]
    replay: Option<u64>,
    /// Threads; one for each core unless said otherwise.
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    log: LogArgs,
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.replay.is_some() && args.log.verbose > 0 {
        // Both agents' own words between the facts.
        if let Err(error) = args.log.init_to(std::io::stdout) {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    }
    let ground = match Ground::new() {
        Ok(ground) => Arc::new(ground),
        Err(error) => {
            eprintln!("error: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    match args.replay {
        Some(seed) => replay(seed, &ground),
        None => many(&args, &ground),
    }
}

fn replay(seed: u64, ground: &Arc<Ground>) -> ExitCode {
    let outcome = run(seed, None, ground);
    for fact in &outcome.facts {
        println!("{fact}");
    }
    match outcome.verdict {
        Ok(()) => {
            println!("seed {seed}: {}; every rule was kept", outcome.word);
            ExitCode::SUCCESS
        }
        Err(broken) => {
            println!("seed {seed}: {broken}");
            ExitCode::FAILURE
        }
    }
}

fn many(args: &Args, ground: &Arc<Ground>) -> ExitCode {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = args.threads.unwrap_or(cores).max(1);
    let began = Instant::now();
    let tally = runs(args.seed, args.runs, threads, ground);
    let seconds = began.elapsed().as_secs_f64();
    print!("{tally}");
    #[allow(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = tally.runs as f64 / seconds;
    println!(
        "{} runs from seed {} in {seconds:.1} s with {threads} threads: {rate:.1} runs per second",
        tally.runs, args.seed
    );
    if tally.broken.is_empty() {
        println!("every rule was kept in every run");
        return ExitCode::SUCCESS;
    }
    for (seed, broken) in &tally.broken {
        println!("seed {seed}: {broken}\n    see `vmferry-simulate --replay {seed}`");
    }
    ExitCode::FAILURE
}

/// Runs `count` seeds from `first` on.
///
/// # Panics
/// A thread of it panicked, which a run never does.
#[must_use]
pub fn runs(first: u64, count: u64, threads: usize, ground: &Arc<Ground>) -> Tally {
    let next = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let work = || {
        let mut tally = Tally::default();
        while !stop.load(Ordering::Relaxed) {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            let seed = first.wrapping_add(number);
            tally.add(seed, &run(seed, None, ground));
            if tally.broken.len() >= MOST_BROKEN {
                stop.store(true, Ordering::Relaxed);
            }
        }
        tally
    };
    let mut all = Tally::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            match worker.join() {
                Ok(tally) => all.merge(tally),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    all
}

/// After so many broken runs of a thread the rest would tell nothing new.
const MOST_BROKEN: usize = 20;
