//! Records the judge's beats and says whether they are one unbroken sequence.
//!
//! Owns the stamps: each beat gets this host's clock when it is read, because a stopped guest's own clock stands
//! still. Every QEMU process of the guest is one stream; all streams together must be one sequence, in which a
//! handover is nothing but a gap. Invariant: a beat is never dropped here; an unreadable stream is a fault.

use std::fmt;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use vmferry_judge::beat::{BEAT_LEN, Beat};

use super::port::{Peer, Port};

/// A beat with the time at which it came out of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StampedBeat {
    /// This host's clock.
    pub at: Instant,
    /// What the guest said.
    pub beat: Beat,
}

/// The beats of one QEMU process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatStream {
    /// Its process.
    pub pid: u32,
    /// In the order in which they came.
    pub beats: Vec<StampedBeat>,
    /// Bytes at the end that are no beat.
    pub garbled: bool,
}

/// Time between two beats that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// How long it was.
    pub length: Duration,
    /// Sequence number of the beat before it.
    pub after: u64,
    /// QEMU process of the beat before it.
    pub from_pid: u32,
    /// QEMU process of the beat behind it.
    pub to_pid: u32,
}

/// An unbroken sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeatReport {
    /// How many beats.
    pub beats: usize,
    /// How often the guest booted.
    pub boots: usize,
    /// Longest gap within a boot.
    pub longest: Option<Gap>,
    /// Gaps at which the guest went from one process to another, in order.
    pub handovers: Vec<Gap>,
}

/// Why a sequence is not unbroken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BeatFault {
    /// Numbers are left out.
    #[error("beats {first} to {last} are missing (QEMU {pid})")]
    Missing {
        /// First number left out.
        first: u64,
        /// Last number left out.
        last: u64,
        /// Process that left them out.
        pid: u32,
    },
    /// A number came again, or a smaller one than before: the guest ran twice, or went back.
    #[error("beat {got} came when {expected} was due (QEMU {pid})")]
    Backwards {
        /// Number that came.
        got: u64,
        /// Number that should have come.
        expected: u64,
        /// Process that sent it.
        pid: u32,
    },
    /// The guest's own clock went back.
    #[error("the guest's clock went back at beat {sequence} (QEMU {pid})")]
    ClockBackwards {
        /// Number of the beat.
        sequence: u64,
        /// Process that sent it.
        pid: u32,
    },
    /// Bytes that are no beat.
    #[error("QEMU {0} sent bytes that are no beat")]
    Garbled(u32),
    /// Another number of boots than expected.
    #[error("the guest booted {got} times instead of {expected}")]
    Boots {
        /// How often it did.
        got: usize,
        /// How often it should have.
        expected: usize,
    },
}

impl fmt::Display for Gap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} ms after beat {}",
            self.length.as_secs_f64() * 1e3,
            self.after
        )?;
        if self.from_pid != self.to_pid {
            write!(f, ", QEMU {} to {}", self.from_pid, self.to_pid)?;
        }
        Ok(())
    }
}

impl fmt::Display for BeatReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} beats, none missing, repeated or backwards",
            self.beats
        )?;
        if let Some(longest) = &self.longest {
            write!(f, "; longest gap {longest}")?;
        }
        for handover in &self.handovers {
            write!(f, "; handover {handover}")?;
        }
        Ok(())
    }
}

/// Whether `streams` are one sequence, in `boots` boots.
pub(crate) fn analyse(streams: &[BeatStream], boots: usize) -> Result<BeatReport, BeatFault> {
    let mut streams: Vec<_> = streams
        .iter()
        .filter(|stream| !stream.beats.is_empty() || stream.garbled)
        .collect();
    streams.sort_by_key(|stream| stream.beats.first().map(|first| first.at));
    let mut report = BeatReport {
        beats: 0,
        boots: 0,
        longest: None,
        handovers: Vec::new(),
    };
    let mut last: Option<(u32, StampedBeat)> = None;
    for stream in streams {
        for &next in &stream.beats {
            report.follow(last, (stream.pid, next))?;
            last = Some((stream.pid, next));
        }
        if stream.garbled {
            return Err(BeatFault::Garbled(stream.pid));
        }
    }
    if report.boots != boots {
        return Err(BeatFault::Boots {
            got: report.boots,
            expected: boots,
        });
    }
    Ok(report)
}

impl BeatReport {
    fn follow(
        &mut self,
        last: Option<(u32, StampedBeat)>,
        (pid, next): (u32, StampedBeat),
    ) -> Result<(), BeatFault> {
        let same_boot = last.filter(|(_, last)| last.beat.boot == next.beat.boot);
        let expected = same_boot.map_or(0, |(_, last)| last.beat.sequence + 1);
        let got = next.beat.sequence;
        if got < expected {
            return Err(BeatFault::Backwards { got, expected, pid });
        }
        if got > expected {
            return Err(BeatFault::Missing {
                first: expected,
                last: got - 1,
                pid,
            });
        }
        self.beats += 1;
        let Some((from_pid, last)) = same_boot else {
            self.boots += 1;
            return Ok(());
        };
        if next.beat.guest_nanos < last.beat.guest_nanos {
            return Err(BeatFault::ClockBackwards { sequence: got, pid });
        }
        let gap = Gap {
            // Two reading threads may stamp in the wrong order by a hair.
            length: next.at.saturating_duration_since(last.at),
            after: last.beat.sequence,
            from_pid,
            to_pid: pid,
        };
        if self
            .longest
            .is_none_or(|longest| gap.length > longest.length)
        {
            self.longest = Some(gap);
        }
        if from_pid != pid {
            self.handovers.push(gap);
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Shared {
    streams: Mutex<Vec<Recorded>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Recorded {
    peer: Peer,
    stream: BeatStream,
}

/// Listens for the beats of all QEMU processes of a guest.
#[derive(Debug)]
pub struct BeatRecorder {
    shared: Arc<Shared>,
    _port: Port,
}

impl BeatRecorder {
    pub(crate) fn listen(path: &Path) -> Result<Self> {
        let shared = Arc::<Shared>::default();
        let recording = Arc::clone(&shared);
        let port = Port::listen(path, move |stream, peer| recording.record(stream, peer))?;
        Ok(Self {
            shared,
            _port: port,
        })
    }

    /// What was recorded so far, process by process.
    #[must_use]
    pub fn streams(&self) -> Vec<BeatStream> {
        self.shared
            .lock()
            .iter()
            .map(|recorded| recorded.stream.clone())
            .collect()
    }

    /// How many beats there are so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.shared
            .lock()
            .iter()
            .map(|recorded| recorded.stream.beats.len())
            .sum()
    }

    /// How many beats came from process `pid`.
    #[must_use]
    pub fn count_from(&self, pid: u32) -> usize {
        self.shared
            .lock()
            .iter()
            .filter(|recorded| recorded.stream.pid == pid)
            .map(|recorded| recorded.stream.beats.len())
            .sum()
    }

    /// The process whose beat came last: the one that runs the guest.
    #[must_use]
    pub fn running_pid(&self) -> Option<u32> {
        self.shared
            .lock()
            .iter()
            .filter_map(|recorded| Some((recorded.stream.beats.last()?.at, recorded.stream.pid)))
            .max()
            .map(|(_, pid)| pid)
    }

    /// Waits until `more` beats have come after this call, from whatever process.
    pub fn wait_for(&self, more: usize, limit: Duration) -> Result<()> {
        let goal = self.count() + more;
        self.wait_until("beats", limit, |streams| {
            streams
                .iter()
                .map(|recorded| recorded.stream.beats.len())
                .sum::<usize>()
                >= goal
        })
    }

    /// Waits until process `pid` has sent `beats` beats in all.
    pub fn wait_for_from(&self, pid: u32, beats: usize, limit: Duration) -> Result<()> {
        self.wait_until("beats of one process", limit, |streams| {
            streams
                .iter()
                .any(|recorded| recorded.stream.pid == pid && recorded.stream.beats.len() >= beats)
        })
    }

    /// Waits until a process that is none of `known` beats, and returns its pid.
    pub fn wait_for_other(&self, known: &[u32], limit: Duration) -> Result<u32> {
        let mut found = 0;
        self.wait_until("beats of another process", limit, |streams| {
            let other = streams.iter().find(|recorded| {
                !known.contains(&recorded.stream.pid) && !recorded.stream.beats.is_empty()
            });
            found = other.map_or(0, |recorded| recorded.stream.pid);
            other.is_some()
        })?;
        Ok(found)
    }

    /// Whether all beats so far are one unbroken sequence in `boots` boots.
    pub fn report(&self, boots: usize) -> Result<BeatReport, BeatFault> {
        analyse(&self.streams(), boots)
    }

    /// Processes that connected, whether they beat or not.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        self.shared
            .lock()
            .iter()
            .map(|recorded| recorded.stream.pid)
            .collect()
    }

    pub(crate) fn kill_all(&self) {
        for recorded in self.shared.lock().iter() {
            recorded.peer.kill();
        }
    }

    pub(crate) fn all_ended_within(&self, limit: Duration) -> bool {
        self.shared
            .lock()
            .iter()
            .all(|recorded| recorded.peer.ended_within(limit))
    }

    fn wait_until(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&[Recorded]) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        let mut streams = self.shared.lock();
        while !done(&streams) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let counts: Vec<_> = streams
                    .iter()
                    .map(|recorded| {
                        format!(
                            "QEMU {}: {}",
                            recorded.stream.pid,
                            recorded.stream.beats.len()
                        )
                    })
                    .collect();
                bail!(
                    "{what} did not come within {limit:?} ({})",
                    counts.join(", ")
                );
            }
            streams = self
                .shared
                .changed
                .wait_timeout(streams, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Recorded>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, mut stream: UnixStream, peer: Peer) {
        let mine = {
            let mut streams = self.lock();
            let pid = peer.pid;
            streams.push(Recorded {
                peer,
                stream: BeatStream {
                    pid,
                    beats: Vec::new(),
                    garbled: false,
                },
            });
            streams.len() - 1
        };
        let mut buffer = [0; 64 * BEAT_LEN];
        let mut kept = 0;
        // An error is the end as much as end of file is: the process was killed.
        while let Ok(read @ 1..) = stream.read(&mut buffer[kept..]) {
            let at = Instant::now();
            let have = kept + read;
            let mut streams = self.lock();
            let recorded = &mut streams[mine].stream;
            let whole = have - have % BEAT_LEN;
            for bytes in buffer[..whole].chunks_exact(BEAT_LEN) {
                match bytes.try_into().ok().and_then(Beat::decode) {
                    Some(beat) => recorded.beats.push(StampedBeat { at, beat }),
                    None => recorded.garbled = true,
                }
            }
            drop(streams);
            self.changed.notify_all();
            buffer.copy_within(whole..have, 0);
            kept = have - whole;
        }
        if kept > 0 {
            self.lock()[mine].stream.garbled = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(pid: u32, begin: Instant, beats: &[(u64, u64, u64)]) -> BeatStream {
        let beats = beats
            .iter()
            .map(|&(boot, sequence, millis)| StampedBeat {
                at: begin + Duration::from_millis(millis),
                beat: Beat {
                    boot,
                    sequence,
                    guest_nanos: sequence,
                },
            })
            .collect();
        BeatStream {
            pid,
            beats,
            garbled: false,
        }
    }

    #[test]
    fn a_handover_is_a_gap_and_nothing_else() {
        let begin = Instant::now();
        let streams = [
            stream(2, begin, &[(7, 3, 45), (7, 4, 46)]),
            stream(3, begin, &[]),
            stream(1, begin, &[(7, 0, 0), (7, 1, 1), (7, 2, 2)]),
        ];
        let report = analyse(&streams, 1).unwrap();
        assert_eq!(report.beats, 5);
        let gap = Gap {
            length: Duration::from_millis(43),
            after: 2,
            from_pid: 1,
            to_pid: 2,
        };
        assert_eq!(report.longest, Some(gap));
        assert_eq!(report.handovers, [gap]);
    }

    #[test]
    fn there_and_back_again_is_two_handovers() {
        let begin = Instant::now();
        let streams = [
            stream(1, begin, &[(7, 0, 0)]),
            stream(2, begin, &[(7, 1, 5)]),
            stream(3, begin, &[(7, 2, 9)]),
        ];
        assert_eq!(analyse(&streams, 1).unwrap().handovers.len(), 2);
    }

    #[test]
    fn a_missing_beat_is_found() {
        let begin = Instant::now();
        let streams = [
            stream(1, begin, &[(7, 0, 0), (7, 1, 1)]),
            stream(2, begin, &[(7, 4, 5)]),
        ];
        let fault = BeatFault::Missing {
            first: 2,
            last: 3,
            pid: 2,
        };
        assert_eq!(analyse(&streams, 1), Err(fault));
    }

    #[test]
    fn a_repeated_beat_is_found() {
        let begin = Instant::now();
        let streams = [
            stream(1, begin, &[(7, 0, 0), (7, 1, 1)]),
            stream(2, begin, &[(7, 1, 5)]),
        ];
        let fault = BeatFault::Backwards {
            got: 1,
            expected: 2,
            pid: 2,
        };
        assert_eq!(analyse(&streams, 1), Err(fault));
    }

    #[test]
    fn two_that_run_at_once_are_found() {
        let begin = Instant::now();
        let streams = [
            stream(1, begin, &[(7, 0, 0), (7, 1, 1), (7, 2, 6)]),
            stream(2, begin, &[(7, 2, 5), (7, 3, 6)]),
        ];
        let fault = BeatFault::Backwards {
            got: 2,
            expected: 3,
            pid: 2,
        };
        assert_eq!(analyse(&streams, 1), Err(fault));
    }

    #[test]
    fn a_clock_that_goes_back_is_found() {
        let begin = Instant::now();
        let mut one = stream(1, begin, &[(7, 0, 0), (7, 1, 1)]);
        one.beats[0].beat.guest_nanos = 5;
        let fault = BeatFault::ClockBackwards {
            sequence: 1,
            pid: 1,
        };
        assert_eq!(analyse(&[one], 1), Err(fault));
    }

    #[test]
    fn a_reboot_is_a_boot_and_must_be_expected() {
        let begin = Instant::now();
        let streams = [stream(
            1,
            begin,
            &[(7, 0, 0), (7, 1, 1), (9, 0, 2000), (9, 1, 2001)],
        )];
        let fault = BeatFault::Boots {
            got: 2,
            expected: 1,
        };
        assert_eq!(analyse(&streams, 1), Err(fault));
        let report = analyse(&streams, 2).unwrap();
        let longest = report.longest.unwrap().length;
        assert_eq!(
            longest,
            Duration::from_millis(1),
            "the time between boots is no gap"
        );
    }

    #[test]
    fn bytes_that_are_no_beat_are_found() {
        let mut one = stream(1, Instant::now(), &[]);
        one.garbled = true;
        assert_eq!(analyse(&[one], 0), Err(BeatFault::Garbled(1)));
    }
}
