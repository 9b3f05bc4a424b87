//! Tracking of a real child process that writes pages and says which.
//!
//! The child is this test binary again, told by an environment variable to be a target; its commands come as
//! lines on stdin.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test may panic, and its numbers are small"
)]

mod target;

use std::fs;
use std::io::{BufRead, BufReader, IoSlice};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use target::{Op, PAGE, Target};
use vmferry_memtrack::{
    Backing, MemoryRange, MemoryRun, ProcessHandle, RemoteMemory, TrackError, Tracker,
};

/// Becomes the target when asked to; an empty test otherwise.
#[test]
fn target_entry() {
    target::run_if_asked();
}

/// Becomes an agent that tracks a target until it is killed, when asked to; an empty test otherwise.
#[test]
fn agent_entry() {
    let Ok(job) = std::env::var(target::AGENT) else {
        return;
    };
    let (pid, start) = job.split_once(' ').unwrap();
    let handle = ProcessHandle::open(pid.parse().unwrap()).unwrap();
    let range = MemoryRange {
        start: start.parse().unwrap(),
        len: target::PAGES * PAGE,
    };
    let memory = Arc::new(RemoteMemory::open(handle, &[range]).unwrap());
    let mut tracker = Tracker::attach(memory).unwrap();
    tracker.take_written(0).unwrap();
    println!("tracking {}", tracker.target_fd());
    loop {
        tracker.take_written(0).unwrap();
        println!("took");
    }
}

fn open(target: &Target) -> Arc<RemoteMemory> {
    let handle = ProcessHandle::open(target.pid()).unwrap();
    Arc::new(RemoteMemory::open(handle, &[target.range()]).unwrap())
}

/// First word of a page, read from outside.
fn word(memory: &RemoteMemory, page: u64) -> u64 {
    let mut bytes = [0; 8];
    let run = MemoryRun {
        offset: page * PAGE,
        len: 8,
    };
    memory.read(0, &[run], &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// A copy that is kept as a migration keeps it: only from what the tracker tells.
struct Mirror(Vec<u64>);

impl Mirror {
    fn take(&mut self, tracker: &mut Tracker) {
        let scan = tracker.take_written(0).unwrap();
        assert!(scan.zero.minus(&scan.written).is_empty());
        for page in 0..self.0.len() as u64 {
            if scan.zero.contains(page) {
                self.0[page as usize] = 0;
            } else if scan.written.contains(page) {
                self.0[page as usize] = word(tracker.memory(), page);
            }
        }
    }
}

fn op() -> impl Strategy<Value = Op> {
    let page = 0..target::PAGES;
    prop_oneof![
        6 => page.clone().prop_map(Op::Write),
        2 => page.clone().prop_map(Op::KernelWrite),
        2 => page.clone().prop_map(Op::Read),
        1 => page.clone().prop_map(|first| Op::Discard(first, 1)),
        1 => page.prop_map(|first| Op::Discard(first / 512 * 512, 512)),
    ]
}

fn rounds() -> impl Strategy<Value = Vec<Vec<Op>>> {
    prop::collection::vec(prop::collection::vec(op(), 0..40), 1..6)
}

/// Runs `rounds` of operations in a child; after each, a copy kept by the tracker's word must equal the child's memory.
fn no_write_is_missed(kind: &str, rounds: &[Vec<Op>]) {
    let mut target = Target::start(kind);
    let memory = open(&target);
    let mut oracle = vec![0u64; target::PAGES as usize];
    let mut mirror = Mirror(vec![u64::MAX; target::PAGES as usize]);
    let mut tracker = Tracker::attach(memory).unwrap();
    for ops in rounds {
        let mut discarded = vec![false; target::PAGES as usize];
        for op in ops {
            match *op {
                // The one gap that the tracker's text names.
                Op::Read(page) if kind == "memfd" && discarded[page as usize] => continue,
                Op::Discard(first, count) => {
                    discarded[first as usize..(first + count) as usize].fill(true);
                }
                Op::Read(_) | Op::Write(_) | Op::KernelWrite(_) => {}
            }
            target.perform(*op, &mut oracle);
        }
        mirror.take(&mut tracker);
        assert!(mirror.0 == oracle, "the copy differs ({kind})");
    }
    tracker.detach().unwrap();
    target.quit();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_write_to_anonymous_memory_is_missed(rounds in rounds()) {
        no_write_is_missed("anon", &rounds);
    }

    #[test]
    fn no_write_to_shared_memory_is_missed(rounds in rounds()) {
        no_write_is_missed("memfd", &rounds);
    }
}

#[test]
fn a_scan_names_just_the_pages_that_were_written() {
    for kind in ["anon", "memfd"] {
        let mut target = Target::start(kind);
        let mut oracle = vec![0; target::PAGES as usize];
        for page in 0..target::PAGES {
            target.perform(Op::Write(page), &mut oracle);
        }
        let mut tracker = Tracker::attach(open(&target)).unwrap();
        assert_eq!(
            tracker.take_written(0).unwrap().written.count(),
            target::PAGES
        );
        // Let the first writes after the arm split huge pages.
        assert!(
            tracker.take_written(0).unwrap().written.is_empty(),
            "{kind}"
        );
        for page in [3, 4, 700, target::PAGES - 1] {
            target.perform(Op::Write(page), &mut oracle);
        }
        target.perform(Op::KernelWrite(9), &mut oracle);
        target.perform(Op::Read(11), &mut oracle);
        let scan = tracker.take_written(0).unwrap();
        let last = target::PAGES * PAGE;
        let expected = vec![
            3 * PAGE..5 * PAGE,
            9 * PAGE..10 * PAGE,
            700 * PAGE..701 * PAGE,
            last - PAGE..last,
        ];
        assert_eq!(
            scan.written.ranges().collect::<Vec<_>>(),
            expected,
            "{kind}"
        );
        assert!(scan.zero.is_empty());
        tracker.detach().unwrap();
        target.quit();
    }
}

#[test]
fn untouched_memory_is_known_to_be_zero_and_stays_untouched() {
    for kind in ["anon", "memfd"] {
        let mut target = Target::start(kind);
        let mut oracle = vec![0; target::PAGES as usize];
        target.perform(Op::Write(600), &mut oracle);
        let memory = open(&target);
        let all = 0..target::PAGES * PAGE;
        let populated = memory.populated(0, all.clone()).unwrap();
        assert!(populated.iter().any(|part| part.contains(&(600 * PAGE))));
        let bytes: u64 = populated.iter().map(|part| part.end - part.start).sum();
        assert!(bytes <= 512 * PAGE, "{kind}: {bytes}");
        let mut tracker = Tracker::attach(Arc::clone(&memory)).unwrap();
        let scan = tracker.take_written(0).unwrap();
        assert_eq!(scan.written.count(), target::PAGES);
        assert!(scan.zero.count() >= target::PAGES - 512);
        assert_eq!(memory.populated(0, all).unwrap(), populated, "{kind}");
        assert!(
            tracker.take_written(0).unwrap().written.is_empty(),
            "{kind}"
        );
        tracker.detach().unwrap();
        target.quit();
    }
}

/// What attach and detach could disturb, as /proc shows it.
fn footprint(pid: u32) -> (Vec<String>, String, String) {
    let mut fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let link = fs::read_link(&path).map(|link| link.display().to_string());
            format!("{} -> {}", path.display(), link.unwrap_or_default())
        })
        .collect();
    fds.sort();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let signals = status
        .lines()
        // Not SigQ, which counts for the whole user.
        .filter(|line| {
            [
                "SigPnd",
                "SigBlk",
                "SigIgn",
                "SigCgt",
                "ShdPnd",
                "TracerPid",
            ]
            .iter()
            .any(|name| line.starts_with(name))
        })
        .collect::<Vec<_>>()
        .join("\n");
    (fds, maps, signals)
}

/// The footprint of a process that has come to rest: its first thread starts the one that plays the target, and the C
/// library blocks all signals while a thread is made.
fn footprint_at_rest(pid: u32) -> (Vec<String>, String, String) {
    for _ in 0..1000 {
        let now = footprint(pid);
        if now.2.contains("SigBlk:\t0000000000000000") {
            return now;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the target never unblocked its signals");
}

#[test]
fn attach_and_detach_leave_the_process_as_it_was() {
    for kind in ["anon", "memfd"] {
        let mut target = Target::start(kind);
        let mut oracle = vec![0; target::PAGES as usize];
        target.perform(Op::Write(1), &mut oracle);
        let before = footprint_at_rest(target.pid());
        for _ in 0..5 {
            let mut tracker = Tracker::attach(open(&target)).unwrap();
            tracker.take_written(0).unwrap();
            let now = footprint(target.pid());
            assert_eq!(now.0.len(), before.0.len() + 1);
            tracker.detach().unwrap();
            assert_eq!(footprint(target.pid()), before, "{kind}");
        }
        target.perform(Op::Write(2), &mut oracle);
        target.quit();
    }
}

#[test]
fn a_second_tracker_is_told_who_holds_the_memory() {
    let target = Target::start("anon");
    let first = Tracker::attach(open(&target)).unwrap();
    let fds = footprint(target.pid()).0.len();
    let error = Tracker::attach(open(&target)).unwrap_err();
    let TrackError::RangeTaken { descriptors, .. } = &error else {
        panic!("{error:?}");
    };
    assert_eq!(*descriptors, first.target_fd().to_string());
    assert_eq!(
        footprint(target.pid()).0.len(),
        fds,
        "the refused attempt left a descriptor"
    );
    first.detach().unwrap();
    Tracker::attach(open(&target)).unwrap().detach().unwrap();
    target.quit();
}

#[test]
fn a_later_tracker_finds_the_marks_of_an_earlier_one() {
    for kind in ["anon", "memfd"] {
        let mut target = Target::start(kind);
        let mut oracle = vec![0; target::PAGES as usize];
        for page in 0..target::PAGES {
            target.perform(Op::Write(page), &mut oracle);
        }
        let mut first = Tracker::attach(open(&target)).unwrap();
        first.take_written(0).unwrap();
        let fd = first.target_fd();
        // Without detach: as an agent that died.
        drop(first);
        target.perform(Op::Write(77), &mut oracle);
        let mut second = Tracker::reattach(open(&target), fd).unwrap();
        target.perform(Op::Write(78), &mut oracle);
        let scan = second.take_written(0).unwrap();
        assert_eq!(
            scan.written.ranges().collect::<Vec<_>>(),
            vec![77 * PAGE..79 * PAGE],
            "{kind}"
        );
        second.detach().unwrap();
        let error = Tracker::reattach(open(&target), fd).unwrap_err();
        assert!(
            matches!(error, TrackError::DescriptorLost { .. }),
            "{error:?}"
        );
        target.quit();
    }
}

#[test]
fn errors_name_their_cause() {
    let target = Target::start("anon");
    let pid = target.pid();
    let range = target.range();
    let open =
        |ranges: &[MemoryRange]| RemoteMemory::open(ProcessHandle::open(pid).unwrap(), ranges);
    let unmapped = MemoryRange {
        start: 0x1000,
        len: 0x1000,
    };
    assert!(matches!(
        open(&[unmapped]),
        Err(TrackError::BadRange { .. })
    ));
    let crooked = MemoryRange {
        start: range.start + 8,
        len: 4096,
    };
    assert!(matches!(open(&[crooked]), Err(TrackError::BadRange { .. })));
    let memory = open(&[range]).unwrap();
    let beyond = MemoryRun {
        offset: range.len - 4,
        len: 8,
    };
    assert!(matches!(
        memory.write(0, &[beyond], &[0; 8]),
        Err(TrackError::BadRange { .. })
    ));
    assert!(matches!(
        memory.read(1, &[], &mut []),
        Err(TrackError::BadRange { .. })
    ));
    target.quit();
    assert!(matches!(
        memory.read(0, &[MemoryRun { offset: 0, len: 8 }], &mut [0; 8]),
        Err(TrackError::Gone { .. })
    ));
    assert!(matches!(
        Tracker::attach(Arc::new(memory)),
        Err(TrackError::Gone { .. })
    ));
}

#[test]
fn many_runs_are_read_and_written_at_once() {
    for kind in ["anon", "memfd"] {
        let target = Target::start(kind);
        let memory = open(&target);
        let expected = if kind == "anon" {
            Backing::Anonymous
        } else {
            Backing::Shared
        };
        assert_eq!(memory.backing(0), Some(expected));
        // More runs than one call takes, of odd lengths.
        let runs: Vec<MemoryRun> = (0..2500)
            .map(|index| MemoryRun {
                offset: index * 1000 + 3,
                len: 500 + index as usize % 7,
            })
            .collect();
        let len = runs.iter().map(|run| run.len).sum();
        let data: Vec<u8> = (0..len).map(|at: usize| (at * 31 % 251) as u8).collect();
        memory.write(0, &runs, &data).unwrap();
        let mut back = vec![0; len];
        memory.read(0, &runs, &mut back).unwrap();
        assert!(back == data, "{kind}");
        // Parts whose ends are not those of the runs, and more of them than one call takes.
        let data: Vec<u8> = data.iter().map(|byte| byte ^ 0xff).collect();
        let parts: Vec<IoSlice<'_>> = data.chunks(77).map(IoSlice::new).collect();
        assert!(parts.len() > 2048);
        memory.write_vectored(0, &runs, &parts).unwrap();
        memory.read(0, &runs, &mut back).unwrap();
        assert!(back == data, "{kind}, in parts");
        assert!(memory.write_vectored(0, &runs, &parts[1..]).is_err());
        let mut between = [1u8; 4];
        memory
            .read(
                0,
                &[MemoryRun {
                    offset: 999,
                    len: 4,
                }],
                &mut between,
            )
            .unwrap();
        assert_eq!(between, [0, 0, 0, 0]);
        target.quit();
    }
}

/// Starts an agent for `target` and returns it with what it prints.
fn start_agent(target: &Target) -> (Child, BufReader<ChildStdout>) {
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent_entry", "--nocapture", "--test-threads=1"])
        .env(
            target::AGENT,
            format!("{} {}", target.pid(), target.range().start),
        )
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(agent.stdout.take().unwrap());
    (agent, output)
}

#[test]
fn a_killed_agent_harms_nothing_and_its_marks_are_found() {
    for kind in ["anon", "memfd"] {
        let mut target = Target::start(kind);
        let mut oracle = vec![0; target::PAGES as usize];
        for page in 0..target::PAGES {
            target.perform(Op::Write(page), &mut oracle);
        }
        let (mut agent, output) = start_agent(&target);
        let fd = output
            .lines()
            .find_map(|line| line.unwrap().split_once("tracking ")?.1.parse::<i32>().ok())
            .unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
        for page in [5, 6, 1000] {
            target.perform(Op::Write(page), &mut oracle);
        }
        let mut tracker = Tracker::reattach(open(&target), fd).unwrap();
        let scan = tracker.take_written(0).unwrap();
        for page in [5, 6, 1000] {
            assert!(scan.written.contains(page), "{kind}: page {page}");
        }
        assert!(scan.written.count() < target::PAGES / 2, "{kind}");
        tracker.detach().unwrap();
        target.quit();
    }
}

/// An agent that dies at any moment of the attach, the injection included: the target goes on, and a new one can attach.
#[test]
fn an_agent_killed_while_it_attaches_harms_nothing() {
    let mut target = Target::start("anon");
    let mut oracle = vec![0; target::PAGES as usize];
    for step in 0..40u64 {
        let (mut agent, _output) = start_agent(&target);
        std::thread::sleep(Duration::from_micros(step * 300));
        agent.kill().unwrap();
        agent.wait().unwrap();
        for page in 0..8 {
            target.perform(Op::Write(page), &mut oracle);
            target.perform(Op::KernelWrite(page), &mut oracle);
        }
    }
    // A killed agent's helper may be at its work for a moment longer, and its registration stays with the process.
    let leftover = fs::read_dir(format!("/proc/{}/fd", target.pid()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|link| link.to_string_lossy().contains("userfaultfd"))
        .count();
    eprintln!("{leftover} descriptors were left by killed agents");
    for page in 0..8 {
        target.perform(Op::Read(page), &mut oracle);
    }
    target.quit();
}

#[test]
fn a_target_in_user_code_and_under_a_storm_of_signals_is_tracked() {
    let mut target = Target::start("anon");
    let (flag, counter, value) = (5, 6, 99u64);
    target.spin(flag, value);
    let pid = rustix::process::Pid::from_raw(target.pid() as i32).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let storm = {
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // Ignored by default, but seen by a tracer.
                rustix::process::kill_process(pid, rustix::process::Signal::WINCH).unwrap();
                std::thread::sleep(Duration::from_micros(20));
            }
        })
    };
    let mut last = 0;
    for _ in 0..100 {
        let mut tracker = Tracker::attach(open(&target)).unwrap();
        tracker.take_written(0).unwrap();
        let now = word(tracker.memory(), counter);
        assert!(now >= last);
        last = now;
        tracker.detach().unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    let memory = open(&target);
    let run = MemoryRun {
        offset: flag * PAGE,
        len: 8,
    };
    memory.write(0, &[run], &value.to_le_bytes()).unwrap();
    target.spun();
    target.quit();
}
