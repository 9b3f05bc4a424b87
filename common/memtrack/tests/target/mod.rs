//! A process with memory that does as it is told: the test binary itself, started again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use vmferry_memtrack::{GuestRam, MemoryRange};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// Pages of the target's memory: 8 MiB, so that whole page tables can be discarded.
pub(crate) const PAGES: u64 = 2048;

/// Tells this test binary to be an agent: a pid, an address.
pub(crate) const AGENT: &str = "VMFERRY_MEMTRACK_TEST_AGENT";

const ROLE: &str = "VMFERRY_MEMTRACK_TEST_TARGET";

/// Something the target does to a page.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    /// Stores a new value.
    Write(u64),
    /// Has the kernel store a new value with read(2).
    KernelWrite(u64),
    /// Reads it.
    Read(u64),
    /// Gives pages back, from the first on, so many.
    Discard(u64, u64),
}

/// The running target.
pub(crate) struct Target {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    start: u64,
    value: u64,
}

impl Target {
    /// Starts one with `anon` or `memfd` memory.
    pub(crate) fn start(kind: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "target_entry", "--nocapture", "--test-threads=1"])
            .env(ROLE, kind)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut target = Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
            start: 0,
            value: 0,
        };
        target.start = target.answer("ready ").parse().unwrap();
        target
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn range(&self) -> MemoryRange {
        MemoryRange {
            start: self.start,
            len: PAGES * PAGE,
        }
    }

    /// Has `op` done, and does it to the oracle, which holds each page's first word.
    pub(crate) fn perform(&mut self, op: Op, oracle: &mut [u64]) {
        self.value += 1;
        let value = self.value;
        let line = match op {
            Op::Write(page) => {
                oracle[page as usize] = value;
                format!("write {page} {value}")
            }
            Op::KernelWrite(page) => {
                oracle[page as usize] = value;
                format!("kernel {page} {value}")
            }
            Op::Read(page) => format!("read {page} {}", oracle[page as usize]),
            Op::Discard(first, count) => {
                oracle[first as usize..(first + count) as usize].fill(0);
                format!("discard {first} {count}")
            }
        };
        writeln!(self.stdin, "{line}").unwrap();
        assert_eq!(self.answer("did "), line);
    }

    /// Has it spin without a system call, counting in the page after `page`, until `value` is found in `page`.
    pub(crate) fn spin(&mut self, page: u64, value: u64) {
        writeln!(self.stdin, "spin {page} {value}").unwrap();
        self.answer("spinning");
    }

    /// Waits until it is done with spinning.
    pub(crate) fn spun(&mut self) {
        assert!(self.answer("did ").starts_with("spin"));
    }

    /// Ends it; it must still be well.
    pub(crate) fn quit(mut self) {
        writeln!(self.stdin, "quit 0 0").unwrap();
        assert!(self.child.wait().unwrap().success());
    }

    /// The rest of the next line that begins so; the test harness prints others.
    fn answer(&mut self, prefix: &str) -> String {
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert!(read > 0, "the target ended");
            if let Some(at) = line.find(prefix) {
                return line[at + prefix.len()..].trim_end().to_owned();
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lives as a target until told to quit, if the environment says so.
pub(crate) fn run_if_asked() {
    let Ok(kind) = std::env::var(ROLE) else {
        return;
    };
    let len = (PAGES * PAGE) as usize;
    let mut ram = match kind.as_str() {
        "anon" => GuestRam::anonymous(len).unwrap(),
        "memfd" => GuestRam::memfd("target", len).unwrap(),
        other => panic!("no memory of kind {other}"),
    };
    println!("ready {}", ram.address());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let (page, value): (usize, u64) = (words[1].parse().unwrap(), words[2].parse().unwrap());
        let at = page * PAGE as usize;
        match words[0] {
            "write" => ram.write(at, &value.to_le_bytes()),
            "kernel" => {
                let mut file = tempfile::tempfile().unwrap();
                file.write_all(&value.to_le_bytes()).unwrap();
                assert_eq!(ram.read_from_file(at, 8, &file, 0).unwrap(), 8);
            }
            "read" => {
                let mut bytes = [0; 8];
                ram.read(at, &mut bytes);
                assert_eq!(u64::from_le_bytes(bytes), value);
            }
            "discard" => ram.discard(at, value as usize * PAGE as usize).unwrap(),
            // Without a system call, until somebody writes to its memory from outside.
            "spin" => {
                println!("spinning");
                let mut bytes = [0; 8];
                let mut turns = 0u64;
                while bytes != value.to_le_bytes() {
                    turns += 1;
                    ram.write(at + PAGE as usize, &turns.to_le_bytes());
                    ram.read(at, std::hint::black_box(&mut bytes));
                }
            }
            "quit" => return,
            other => panic!("unknown command {other}"),
        }
        println!("did {line}");
    }
}
