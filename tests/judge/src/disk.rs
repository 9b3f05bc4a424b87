//! The disk workload: writes, zeroes and flushes blocks of one disk, and reads all of it back.
//!
//! Owns the disk and the table of what each block must hold: what was found at the start, a version, or zero. Reading
//! bypasses the guest's page cache, so that the disk is checked and not its copy in memory; where the cache is to hold the disk,
//! that copy is checked as well.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::thread;

use rustix::fs::{FallocateFlags, OFlags, SeekFrom, fallocate, seek};
use vmferry_judge::content::{Content, Stamp, UNIT, describe, hash, mix};
use vmferry_judge::params::Params;

use crate::pace::{Pace, TICK};
use crate::report::{Failure, Report};
use crate::{Order, Verdict, setup};

/// Largest transfer in blocks.
const CHUNK: usize = 64;
/// Blocks of the longest write.
const LONGEST_WRITE: u64 = 16;
/// One write in so many is a zeroing.
const ZEROING: u64 = 16;
/// Writes between two flushes.
const FLUSH_EVERY: u64 = 32;

/// Where a block is read.
#[derive(Clone, Copy)]
enum Via {
    Disk,
    /// Through the guest's page cache.
    Cache,
}

/// What a block must hold.
#[derive(Clone, Copy)]
enum Expected {
    /// What was there before the work began, by its hash.
    Found(u64),
    /// This version.
    Version(u32),
    /// Zeroes, by a zeroing after this version.
    Zero(u32),
}

impl Expected {
    const fn next_version(self) -> u32 {
        match self {
            Self::Found(_) => 1,
            Self::Version(version) | Self::Zero(version) => version.wrapping_add(1),
        }
    }
}

pub(crate) struct Disk {
    name: String,
    /// For writing: direct or through the page cache, as the parameters say.
    writer: File,
    reader: File,
    /// For reading through the page cache, where it is to hold the disk.
    cached: Option<File>,
    buffer: Aligned,
    expected: Vec<Expected>,
    content: Content,
    seed: u64,
    random: u64,
    write: Pace,
    verify: Pace,
    writes: u64,
    cursor: usize,
}

impl Disk {
    pub(crate) fn open(name: &str, params: &Params) -> Result<Self, Failure> {
        let path = setup::disk(name)?;
        let open = |direct: bool| {
            let flags = if direct {
                OFlags::DIRECT
            } else {
                OFlags::empty()
            };
            OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(flags.bits().cast_signed())
                .open(&path)
                .map_err(|e| Failure::of(name, e))
        };
        let (writer, reader) = (open(params.direct)?, open(true)?);
        let cached = params.cached.then(|| open(false)).transpose()?;
        let size = seek(&reader, SeekFrom::End(0)).map_err(|e| Failure::of(name, e))?;
        let blocks = usize::try_from(size).unwrap_or(0) / UNIT;
        if blocks == 0 {
            return Err(Failure::new(format!("{name} is smaller than one block")));
        }
        let seed = mix(params.seed ^ hash_name(name));
        Ok(Self {
            name: name.into(),
            writer,
            reader,
            cached,
            buffer: Aligned::new(CHUNK * UNIT),
            expected: vec![Expected::Found(0); blocks],
            content: params.content,
            seed,
            random: seed,
            write: Pace::new(params.disk, UNIT),
            verify: Pace::new(params.disk_verify, UNIT),
            writes: 0,
            cursor: 0,
        })
    }

    pub(crate) fn work(mut self, ready: &Sender<()>, report: &Report, orders: &Receiver<Order>) {
        self.look_at_what_is_there(report);
        self.check_cached(report);
        report.count(&self.name, 0, 0);
        if ready.send(()).is_err() {
            return;
        }
        loop {
            let working = report.working();
            match orders.try_recv() {
                Ok(Order::Verify(answer)) => self.verify_all(report, &answer),
                Ok(Order::Rate(rate)) => self.write.set_rate(rate),
                Ok(Order::Discard(length, answer)) => {
                    self.discard(length, report);
                    self.verify_all(report, &answer);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
            self.write_due(report);
            self.check_due(report);
            drop(working);
            thread::sleep(TICK);
        }
    }

    fn look_at_what_is_there(&mut self, report: &Report) {
        for first in (0..self.expected.len()).step_by(CHUNK) {
            let blocks = CHUNK.min(self.expected.len() - first);
            if !self.read(Via::Disk, first, blocks, report) {
                continue;
            }
            let found = self
                .buffer
                .bytes(blocks * UNIT)
                .chunks_exact(UNIT)
                .map(hash);
            for (expected, hash) in self.expected[first..].iter_mut().zip(found) {
                *expected = Expected::Found(hash);
            }
        }
    }

    fn write_due(&mut self, report: &Report) {
        let mut due = self.write.due();
        let blocks = self.expected.len() as u64;
        while due > 0 {
            let length = (1 + self.random() % LONGEST_WRITE).min(due).min(blocks);
            let first = self.random() % (blocks - length + 1);
            let (first, length) = (index(first), index(length));
            let done = if self.random().is_multiple_of(ZEROING) {
                self.zero(first, length)
            } else {
                self.rewrite(first, length)
            };
            self.said(&done, "write", first, report);
            self.writes += 1;
            if self.writes.is_multiple_of(FLUSH_EVERY) {
                let done = self.writer.sync_data();
                self.said(&done, "flush", first, report);
            }
            due -= length as u64;
            report.count(&self.name, 0, (length * UNIT) as u64);
        }
    }

    fn rewrite(&mut self, first: usize, blocks: usize) -> std::io::Result<()> {
        for block in first..first + blocks {
            let version = self.expected[block].next_version();
            self.expected[block] = Expected::Version(version);
            let stamp = self.stamp(block, version);
            let at = (block - first) * UNIT;
            let unit = &mut self.buffer.bytes_mut(CHUNK * UNIT)[at..at + UNIT];
            self.content.fill(stamp, unit);
        }
        let bytes = self.buffer.bytes(blocks * UNIT);
        self.writer.write_all_at(bytes, offset(first))
    }

    /// Gives back so many bytes from the start on, to be read as zeroes.
    fn discard(&mut self, length: u64, report: &Report) {
        let blocks = index(length / UNIT as u64).min(self.expected.len());
        for expected in &mut self.expected[..blocks] {
            *expected = Expected::Zero(expected.next_version());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let done = fallocate(&self.writer, hole, 0, offset(blocks));
        self.said(&done.map_err(Into::into), "discard", 0, report);
    }

    fn zero(&mut self, first: usize, blocks: usize) -> std::io::Result<()> {
        for expected in &mut self.expected[first..first + blocks] {
            *expected = Expected::Zero(expected.next_version());
        }
        let length = offset(blocks);
        fallocate(
            &self.writer,
            FallocateFlags::ZERO_RANGE,
            offset(first),
            length,
        )?;
        Ok(())
    }

    fn check_due(&mut self, report: &Report) {
        let due = index(self.verify.due());
        let blocks = due.min(CHUNK).min(self.expected.len() - self.cursor);
        if blocks == 0 {
            return;
        }
        self.check(Via::Disk, self.cursor, blocks, report);
        self.cursor += blocks;
        if self.cursor == self.expected.len() {
            self.cursor = 0;
            report.count(&self.name, 1, 0);
        }
    }

    fn verify_all(&mut self, report: &Report, answer: &Sender<Verdict>) {
        let bad = self.check_all(Via::Disk, report) + self.check_cached(report);
        report.count(&self.name, 1, 0);
        // The one who asked may have gone: the mismatches were reported in any case.
        let _ = answer.send(Verdict {
            name: self.name.clone(),
            units: self.expected.len() as u64,
            bad,
        });
    }

    /// Reads the page cache's copy of the disk, or brings it there; returns how many blocks of it are not as expected.
    fn check_cached(&mut self, report: &Report) -> u64 {
        if self.cached.is_none() {
            return 0;
        }
        self.check_all(Via::Cache, report)
    }

    fn check_all(&mut self, via: Via, report: &Report) -> u64 {
        let blocks = self.expected.len();
        (0..blocks)
            .step_by(CHUNK)
            .map(|first| self.check(via, first, CHUNK.min(blocks - first), report))
            .sum()
    }

    /// Reads `blocks` blocks and returns how many are not as expected.
    fn check(&mut self, via: Via, first: usize, blocks: usize, report: &Report) -> u64 {
        if !self.read(via, first, blocks, report) {
            return blocks as u64;
        }
        let units = self.buffer.bytes(blocks * UNIT).chunks_exact(UNIT);
        let mut bad = 0;
        for (block, unit) in (first..).zip(units) {
            if let Some(what) = self.mismatch(block, unit) {
                report.corrupt(&format!(
                    "{} block {block}: expected {what}; found {}",
                    self.name,
                    describe(unit)
                ));
                bad += 1;
            }
        }
        bad
    }

    fn mismatch(&self, block: usize, unit: &[u8]) -> Option<String> {
        match self.expected[block] {
            Expected::Found(before) => {
                (hash(unit) != before).then(|| "what was there at the start".into())
            }
            Expected::Zero(version) => unit
                .iter()
                .any(|&byte| byte != 0)
                .then(|| format!("zeroes since version {version}")),
            Expected::Version(version) => self
                .content
                .first_difference(self.stamp(block, version), unit)
                .map(|word| format!("version {version} (differs from word {word} on)")),
        }
    }

    fn read(&mut self, via: Via, first: usize, blocks: usize, report: &Report) -> bool {
        let bytes = self.buffer.bytes_mut(blocks * UNIT);
        let file = match via {
            Via::Disk => &self.reader,
            Via::Cache => self.cached.as_ref().unwrap_or(&self.reader),
        };
        let done = file.read_exact_at(bytes, offset(first));
        self.said(&done, "read", first, report)
    }

    fn said(&self, done: &std::io::Result<()>, what: &str, block: usize, report: &Report) -> bool {
        if let Err(error) = done {
            report.corrupt(&format!(
                "{} block {block}: {what} failed: {error}",
                self.name
            ));
        }
        done.is_ok()
    }

    fn stamp(&self, block: usize, version: u32) -> Stamp {
        Stamp {
            seed: self.seed,
            index: block as u64,
            version,
        }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.random)
    }
}

/// A buffer whose beginning is aligned to a unit, as direct I/O wants it.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new(length: usize) -> Self {
        let bytes = vec![0; length + UNIT];
        let address = bytes.as_ptr().addr();
        Self {
            start: address.next_multiple_of(UNIT) - address,
            bytes,
        }
    }

    fn bytes(&self, length: usize) -> &[u8] {
        &self.bytes[self.start..self.start + length]
    }

    fn bytes_mut(&mut self, length: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + length]
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

const fn offset(blocks: usize) -> u64 {
    (blocks * UNIT) as u64
}

fn hash_name(name: &str) -> u64 {
    name.bytes()
        .fold(0, |hash, byte| mix(hash ^ u64::from(byte)))
}
