//! The memory workload: fills, rewrites and checks memory.
//!
//! Owns the filled memory and the table of its versions; one thread does both writing and checking, so that a page
//! is never looked at while it is being written. The table lies in the guest's memory as well: if it arrives stale,
//! the pages do not fit it.

use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread;

use vmferry_judge::content::{Content, Stamp, UNIT, describe, mix};
use vmferry_judge::params::Params;

use crate::pace::{Pace, TICK};
use crate::report::Report;
use crate::{Order, Verdict};

const NAME: &str = "mem";

pub(crate) struct Memory {
    bytes: Vec<u8>,
    /// Where the first whole page begins.
    start: usize,
    versions: Vec<u32>,
    content: Content,
    seed: u64,
    random: u64,
    working_set: u64,
    dirty: Pace,
    verify: Pace,
    /// Where checking goes on.
    cursor: usize,
}

impl Memory {
    pub(crate) fn new(params: &Params) -> Self {
        let pages = usize::try_from(params.memory).unwrap_or(0) / UNIT;
        let bytes = vec![0; (pages + 1) * UNIT];
        let start = bytes.as_ptr().addr().next_multiple_of(UNIT) - bytes.as_ptr().addr();
        let working_set = (params.working_set / UNIT as u64).clamp(1, pages.max(1) as u64);
        Self {
            bytes,
            start,
            versions: vec![0; pages],
            content: params.content,
            seed: mix(params.seed),
            random: params.seed,
            working_set,
            dirty: Pace::new(params.dirty, UNIT),
            verify: Pace::new(params.verify, UNIT),
            cursor: 0,
        }
    }

    pub(crate) fn work(mut self, ready: &Sender<()>, report: &Report, orders: &Receiver<Order>) {
        for page in 0..self.versions.len() {
            self.write(page, 0);
        }
        report.count(NAME, 0, self.versions.len() as u64 * UNIT as u64);
        if ready.send(()).is_err() {
            return;
        }
        loop {
            let working = report.working();
            match orders.try_recv() {
                Ok(Order::Verify(answer)) => self.verify_all(report, &answer),
                Ok(Order::Rate(rate)) => self.dirty.set_rate(rate),
                // Memory is not discarded; whoever asked hears nothing of it.
                Ok(Order::Discard(..)) => {}
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            self.rewrite_due(report);
            self.check_due(report);
            drop(working);
            thread::sleep(TICK);
        }
    }

    fn rewrite_due(&mut self, report: &Report) {
        if self.versions.is_empty() {
            return;
        }
        let due = self.dirty.due();
        for _ in 0..due {
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let page = usize::try_from(mix(self.random) % self.working_set).unwrap_or(0);
            let version = self.versions[page].wrapping_add(1);
            self.write(page, version);
        }
        report.count(NAME, 0, due * UNIT as u64);
    }

    fn check_due(&mut self, report: &Report) {
        for _ in 0..self.verify.due() {
            if self.cursor >= self.versions.len() {
                self.cursor = 0;
                report.count(NAME, 1, 0);
                return;
            }
            self.check(self.cursor, report);
            self.cursor += 1;
        }
    }

    fn verify_all(&self, report: &Report, answer: &Sender<Verdict>) {
        let bad = (0..self.versions.len())
            .filter(|&page| !self.check(page, report))
            .count();
        report.count(NAME, 1, 0);
        // The one who asked may have gone: the mismatches were reported in any case.
        let _ = answer.send(Verdict {
            name: NAME.into(),
            units: self.versions.len() as u64,
            bad: bad as u64,
        });
    }

    fn write(&mut self, page: usize, version: u32) {
        self.versions[page] = version;
        let stamp = self.stamp(page);
        let at = self.start + page * UNIT;
        self.content.fill(stamp, &mut self.bytes[at..at + UNIT]);
    }

    fn check(&self, page: usize, report: &Report) -> bool {
        let stamp = self.stamp(page);
        let at = self.start + page * UNIT;
        let unit = &self.bytes[at..at + UNIT];
        let Some(word) = self.content.first_difference(stamp, unit) else {
            return true;
        };
        report.corrupt(&format!(
            "mem page {page} version {} seed {:#x}: differs from word {word} on; found {}",
            stamp.version,
            stamp.seed,
            describe(unit)
        ));
        false
    }

    fn stamp(&self, page: usize) -> Stamp {
        Stamp {
            seed: self.seed,
            index: page as u64,
            version: self.versions[page],
        }
    }
}
