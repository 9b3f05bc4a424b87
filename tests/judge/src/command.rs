//! Commands on the control port: one line each, `ID VERB [ARGUMENT]`, answered by one line `ID ok|corrupt|error …`.
//!
//! Owns the verbs: ping, verify, dirty BYTES, disk BYTES, discard BYTES, reboot, shutdown. Waiting for a command never ends the
//! judge, and nothing that comes in can harm the checks.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use rustix::system::RebootCommand;
use vmferry_judge::params::bytes;

use crate::report::Report;
use crate::{Order, Verdict, Worker, setup};

/// Pause after an end of file: nobody is connected at the other end.
const NOBODY_THERE: Duration = Duration::from_millis(10);

pub(crate) fn start(port: File, workers: Vec<Worker>, report: Arc<Report>) {
    thread::spawn(move || {
        let mut port = BufReader::new(port);
        let mut line = String::new();
        loop {
            line.clear();
            match port.read_line(&mut line) {
                Ok(0) => thread::sleep(NOBODY_THERE),
                Ok(_) => {
                    let (id, command) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
                    let answer = obey(command, &workers, &report);
                    report.tell(&format!("{id} {answer}"));
                }
                Err(error) => {
                    report.corrupt(&format!("commands ended: {error}"));
                    return;
                }
            }
        }
    });
}

fn obey(command: &str, workers: &[Worker], report: &Report) -> String {
    let (verb, argument) = command.split_once(' ').unwrap_or((command, ""));
    match verb {
        "ping" => "ok".into(),
        "verify" => verify(workers),
        "discard" => discard(argument, workers),
        "dirty" => set_rate(argument, workers, false),
        "disk" => set_rate(argument, workers, true),
        "reboot" => end(RebootCommand::Restart, report),
        "shutdown" => end(RebootCommand::PowerOff, report),
        _ => format!("error unknown command {verb:?}"),
    }
}

fn verify(workers: &[Worker]) -> String {
    ask(workers.iter(), Order::Verify)
}

fn discard(argument: &str, workers: &[Worker]) -> String {
    match bytes(argument) {
        Ok(length) => {
            let disks = workers.iter().filter(|worker| worker.is_disk);
            ask(disks, |answer| Order::Discard(length, answer))
        }
        Err(why) => format!("error {argument:?} {why}"),
    }
}

/// Gives all of `workers` an order, and says what they answer.
fn ask<'a>(
    workers: impl Iterator<Item = &'a Worker>,
    order: impl Fn(Sender<Verdict>) -> Order,
) -> String {
    let (answer, verdicts) = channel();
    let mut asked = 0;
    for worker in workers {
        asked += 1;
        // A worker that is gone is missing among the verdicts below.
        let _ = worker.orders.send(order(answer.clone()));
    }
    drop(answer);
    let verdicts: Vec<_> = verdicts.iter().collect();
    let good = verdicts.len() == asked && verdicts.iter().all(|verdict| verdict.bad == 0);
    let mut text = String::from(if good { "ok" } else { "corrupt" });
    for verdict in verdicts {
        text += &format!(" {}:{}:{}", verdict.name, verdict.units, verdict.bad);
    }
    text
}

fn set_rate(argument: &str, workers: &[Worker], disks: bool) -> String {
    let rate = match bytes(argument) {
        Ok(rate) => rate,
        Err(why) => return format!("error {argument:?} {why}"),
    };
    for worker in workers.iter().filter(|worker| worker.is_disk == disks) {
        // A worker that is gone shows at the next verify.
        let _ = worker.orders.send(Order::Rate(rate));
    }
    "ok".into()
}

fn end(how: RebootCommand, report: &Report) -> String {
    match setup::end(how, report) {
        Ok(()) => "ok".into(),
        Err(failure) => format!("error {failure}"),
    }
}
