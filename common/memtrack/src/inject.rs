//! One system call inside another process, made by a short-lived helper process.
//!
//! Owns ptrace. The helper is a plain fork of this process that calls nothing but system calls (other threads may hold
//! locks at the moment of the fork), so no binary has to be prepared for it. It has its own session and blocks all
//! signals: when the agent is killed, or Ctrl-C is pressed, it goes on, puts the target's registers and signal mask back and ends.
//! Once registers are changed it gives up for no reason but the end of the target.
//!
//! What nobody can cure: a SIGKILL of the helper itself within those microseconds (`KillMode=control-group` of a service
//! manager, an OOM kill). PTRACE_O_EXITKILL is not set: it would make such a kill the target's certain death.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::TrackError;
use crate::maps;
use crate::process::{ProcessHandle, status_field, tracer_of};
use crate::sys::{RemotePiece, read_remote};

mod helper;

use helper::{Outcome, Stage};

/// How long a target may take to come to its first stop; it waits in the kernel meanwhile.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long the helper's answer is waited for: the stop, and far more than the microseconds of the rest.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A system call for the target.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    pub(crate) number: i64,
    pub(crate) args: [u64; 3],
}

/// What an injected call came to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    /// Return value, not negative.
    pub(crate) value: i64,
    /// How long the target's main thread stood still.
    pub(crate) stopped: Duration,
}

/// Makes `call` inside `target`'s main thread.
pub(crate) fn inject(target: &ProcessHandle, call: &Call) -> Result<Answer, TrackError> {
    let pid = target.pid();
    target.check_alive()?;
    check_traceable(pid)?;
    let job = helper::Job {
        pid: pid.cast_signed(),
        number: call.number.cast_unsigned(),
        args: call.args,
        spare_syscall: vdso_syscall(pid)?,
        stop_limit: STOP_LIMIT,
    };
    let (child, answers) = helper::start(&job)
        .map_err(|source| TrackError::from_os(pid, "start the tracing helper for", source))?;
    let answer = await_answer(answers, pid);
    helper::reap(child);
    outcome_of(&answer?, pid, call)
}

/// The refusals that /proc can tell before anything is done.
fn check_traceable(pid: u32) -> Result<(), TrackError> {
    if let Some(tracer) = tracer_of(pid) {
        return Err(TrackError::AlreadyTraced { pid, tracer });
    }
    const ELFCLASS32: u8 = 1;
    let mut header = [0u8; 5];
    let read = std::fs::File::open(format!("/proc/{pid}/exe"))
        .and_then(|mut exe| exe.read_exact(&mut header));
    match read {
        Ok(()) if header[4] == ELFCLASS32 => Err(TrackError::ThirtyTwoBit { pid }),
        // A program that cannot be looked at is judged by its code segment when it is stopped.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Address of a `syscall` instruction in the target's vDSO; 0 where it has none.
fn vdso_syscall(pid: u32) -> Result<u64, TrackError> {
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    let maps = maps::read(pid)?;
    let Some(vdso) = maps.iter().find(|vma| vma.path == "[vdso]") else {
        return Ok(0);
    };
    let len = usize::try_from(vdso.end - vdso.start).unwrap_or(0);
    let mut code = vec![0; len];
    let piece = RemotePiece {
        addr: vdso.start,
        len,
    };
    let read = read_remote(pid, &[piece], &mut code)
        .map_err(|source| TrackError::from_os(pid, "read the memory of", source))?;
    let found = code[..read].windows(2).position(|bytes| bytes == SYSCALL);
    Ok(found.map_or(0, |at| vdso.start + at as u64))
}

/// Reads the helper's one answer.
fn await_answer(answers: OwnedFd, pid: u32) -> Result<Outcome, TrackError> {
    let failed = |source| TrackError::Os {
        pid,
        what: "the tracing helper's answer could not be read",
        source,
    };
    let deadline = Instant::now() + ANSWER_LIMIT;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TrackError::NotStopped {
                pid,
                seconds: ANSWER_LIMIT.as_secs(),
            });
        }
        let mut fds = [PollFd::new(&answers, PollFlags::IN)];
        let left = Timespec::try_from(left).map_err(|_| failed(io::ErrorKind::TimedOut.into()))?;
        match poll(&mut fds, Some(&left)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => break,
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    let mut bytes = Vec::new();
    std::fs::File::from(answers)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Outcome::from_bytes(&bytes).ok_or(TrackError::HelperLost { pid })
}

/// Gives the helper's answer its meaning.
fn outcome_of(outcome: &Outcome, pid: u32, call: &Call) -> Result<Answer, TrackError> {
    let os = || io::Error::from_raw_os_error(outcome.errno);
    match outcome.stage {
        Stage::Done if outcome.value < 0 => Err(TrackError::CallFailed {
            pid,
            call: call.name,
            source: io::Error::from_raw_os_error(i32::try_from(-outcome.value).unwrap_or(0)),
        }),
        Stage::Done => Ok(Answer {
            value: outcome.value,
            stopped: Duration::from_nanos(outcome.stopped_ns),
        }),
        Stage::Seize => Err(seize_refused(pid, os())),
        Stage::NotStopped => Err(TrackError::NotStopped {
            pid,
            seconds: STOP_LIMIT.as_secs(),
        }),
        Stage::Died => Err(TrackError::Gone { pid }),
        Stage::NotSixtyFourBit => Err(TrackError::ThirtyTwoBit { pid }),
        Stage::Seccomp => Err(TrackError::SeccompRefused {
            pid,
            call: call.name,
        }),
        Stage::NoSyscallInstruction => Err(TrackError::BadRange {
            pid,
            start: 0,
            len: 0,
            why: "no system call instruction was found in it (no vDSO)".to_owned(),
        }),
        Stage::Prepare => Err(TrackError::from_os(pid, "stop and inspect", os())),
    }
}

/// EPERM of PTRACE_SEIZE has several causes; the most telling one is named.
fn seize_refused(pid: u32, source: io::Error) -> TrackError {
    if let Some(tracer) = tracer_of(pid) {
        return TrackError::AlreadyTraced { pid, tracer };
    }
    if status_field(pid, "State").is_none_or(|state| state.starts_with(['Z', 'X'])) {
        return TrackError::Gone { pid };
    }
    TrackError::from_os(pid, "trace", source)
}
