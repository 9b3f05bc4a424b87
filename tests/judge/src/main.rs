//! Init program of the real test guest: works on memory and disks, checks both, beats.
//!
//! Owns the order of the start and the wiring of the threads: one for memory, one per disk, one for the beats, one
//! for commands, and the main thread, which reports. Formats and parameters are in the library beside it.
//! Invariant: whatever goes wrong is said on the console with the word CORRUPT or FAILED, never passed over.

mod beating;
mod command;
mod disk;
mod memory;
mod pace;
mod report;
mod setup;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::system::RebootCommand;
use vmferry_judge::params::Params;

use crate::report::{Failure, Report};

/// What a worker can be told.
enum Order {
    /// Check everything now, then answer.
    Verify(Sender<Verdict>),
    /// Write so many bytes per second from now on.
    Rate(u64),
    /// Discard so many bytes from the start on, then answer as to a check of everything. Disks only.
    Discard(u64, Sender<Verdict>),
}

/// Answer of a worker that has checked everything.
struct Verdict {
    name: String,
    units: u64,
    bad: u64,
}

/// A worker as the command thread sees it.
struct Worker {
    is_disk: bool,
    orders: Sender<Order>,
}

fn main() {
    let failure = match run() {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    println!("judge: FAILED: {failure}");
    // A dead init program makes the kernel panic, and that would bury the message.
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}

fn run() -> Result<std::convert::Infallible, Failure> {
    setup::mount_all()?;
    setup::load_modules()?;
    let params: Params = setup::command_line()?.parse()?;
    let beat_port = setup::port(vmferry_judge::BEAT_PORT)?;
    let control_port = setup::port(vmferry_judge::CONTROL_PORT)?;
    let report = Arc::new(Report::new(&control_port)?);
    let boot = setup::boot_number()?;
    // The first beat comes before the filling: a boot is seen outside as soon as it can be.
    let beats = beating::start(beat_port, boot, params.beat, Arc::clone(&report));
    let (ready, all_ready) = channel();
    let workers = start_workers(&params, &report, &ready)?;
    for _ in &workers {
        all_ready
            .recv()
            .map_err(|_| Failure::new("a worker ended before it was ready"))?;
    }
    report.ready(boot);
    command::start(control_port, workers, Arc::clone(&report));
    let begin = Instant::now();
    loop {
        thread::sleep(Duration::from_secs(1));
        report.statistics(beats.sent());
        end_in_time(&params, begin.elapsed(), &report)?;
    }
}

fn start_workers(
    params: &Params,
    report: &Arc<Report>,
    ready: &Sender<()>,
) -> Result<Vec<Worker>, Failure> {
    let (orders, inbox) = channel();
    let mut workers = vec![Worker {
        is_disk: false,
        orders,
    }];
    let memory = memory::Memory::new(params);
    spawn(ready, report, inbox, move |ready, report, inbox| {
        memory.work(&ready, &report, &inbox);
    });
    for name in &params.disks {
        let (orders, inbox) = channel();
        workers.push(Worker {
            is_disk: true,
            orders,
        });
        let disk = disk::Disk::open(name, params)?;
        spawn(ready, report, inbox, move |ready, report, inbox| {
            disk.work(&ready, &report, &inbox);
        });
    }
    Ok(workers)
}

fn spawn(
    ready: &Sender<()>,
    report: &Arc<Report>,
    inbox: Receiver<Order>,
    work: impl FnOnce(Sender<()>, Arc<Report>, Receiver<Order>) + Send + 'static,
) {
    let (ready, report) = (ready.clone(), Arc::clone(report));
    thread::spawn(move || {
        setup::be_nice(10);
        work(ready, report, inbox);
    });
}

fn end_in_time(params: &Params, up: Duration, report: &Report) -> Result<(), Failure> {
    if params.shutdown_after.is_some_and(|after| up >= after) {
        setup::end(RebootCommand::PowerOff, report)?;
    }
    if params.reboot_after.is_some_and(|after| up >= after) {
        setup::end(RebootCommand::Restart, report)?;
    }
    Ok(())
}
