//! The helper process: stop, one system call, everything put back, go.
//!
//! Between fork and exit this code allocates nothing, takes no lock and cannot panic: no indexing, no formatting, no
//! arithmetic that overflows. Its whole answer is one small write to a pipe. From `exchange` on it returns
//! only when the target's registers and signal mask are as they were, or the target is dead.

use std::io;
use std::mem::{MaybeUninit, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::null_mut;
use std::time::Duration;

use libc::{c_int, c_uint, pid_t, sigset_t, user_regs_struct};

/// What the helper is to do; made complete before the fork.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job {
    pub(super) pid: pid_t,
    pub(super) number: u64,
    pub(super) args: [u64; 3],
    /// Address of a system call instruction for a target that was stopped elsewhere; 0 for none.
    pub(super) spare_syscall: u64,
    pub(super) stop_limit: Duration,
}

/// How far the helper came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The call was made.
    Done,
    /// PTRACE_SEIZE was refused.
    Seize,
    /// The target did not stop in time.
    NotStopped,
    /// The target ended.
    Died,
    /// It does not run 64-bit code.
    NotSixtyFourBit,
    /// Its seccomp filter raised SIGSYS.
    Seccomp,
    /// There is no instruction to make the call with.
    NoSyscallInstruction,
    /// Some ptrace request before the registers were changed failed.
    Prepare,
}

/// The helper's answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outcome {
    pub(super) stage: Stage,
    pub(super) errno: c_int,
    pub(super) value: i64,
    pub(super) stopped_ns: u64,
}

const OUTCOME_LEN: usize = 24;
const STAGES: [Stage; 8] = [
    Stage::Done,
    Stage::Seize,
    Stage::NotStopped,
    Stage::Died,
    Stage::NotSixtyFourBit,
    Stage::Seccomp,
    Stage::NoSyscallInstruction,
    Stage::Prepare,
];

impl Outcome {
    const fn at(stage: Stage, errno: c_int) -> Self {
        Self {
            stage,
            errno,
            value: 0,
            stopped_ns: 0,
        }
    }

    /// Reads what [`words`](Self::words) wrote; `None` for anything else.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != OUTCOME_LEN {
            return None;
        }
        let word = |at: usize| Some(i64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        let head = word(0)?;
        Some(Self {
            stage: *STAGES.get(usize::try_from(head >> 32).ok()?)?,
            errno: c_int::try_from(head & 0xffff_ffff).ok()?,
            value: word(8)?,
            stopped_ns: word(16)?.cast_unsigned(),
        })
    }

    const fn words(self) -> [i64; 3] {
        [
            ((self.stage as i64) << 32) | self.errno as i64,
            self.value,
            self.stopped_ns.cast_signed(),
        ]
    }
}

/// Forks the helper: its pid and the pipe on which it answers.
pub(super) fn start(job: &Job) -> io::Result<(pid_t, OwnedFd)> {
    let mut ends = [0 as c_int; 2];
    // SAFETY: pipe2 writes two descriptors into the array.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both descriptors were just made and nobody else owns them.
    let (reader, writer) =
        unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
    // SAFETY: all-zero bytes are a valid sigset_t, and the calls below write it anyway.
    let (mut all, mut before): (sigset_t, sigset_t) = unsafe { (zeroed(), zeroed()) };
    // SAFETY: both sets live across the calls. Signals are blocked before the fork so that the child never has a
    // moment in which one could end it. The child runs `child_main`, which keeps to async-signal-safe calls, and never returns.
    let child = unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let child = libc::fork();
        if child == 0 {
            child_main(job, writer.as_raw_fd());
        }
        child
    };
    let error = io::Error::last_os_error();
    // SAFETY: puts this thread's signal mask back as it was.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, null_mut()) };
    if child < 0 {
        return Err(error);
    }
    Ok((child, reader))
}

/// Waits for the end of a helper that has answered or closed its pipe. One that has not answered in time stays behind until
/// it has put its target right; it is then reaped by whoever reaps this process.
pub(super) fn reap(child: pid_t) {
    for _ in 0..200 {
        let mut status = 0;
        // SAFETY: waitpid writes one int. The helper is our child and only we wait for it by its pid.
        let done = unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG | libc::__WALL) };
        if done != 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The child's life.
///
/// # Safety
/// Only in a freshly forked child, with all signals blocked.
unsafe fn child_main(job: &Job, answer_fd: c_int) -> ! {
    // SAFETY: system calls on integers. Descriptors are closed so that a lock file or socket of an agent that
    // is killed meanwhile is not held by this process.
    unsafe {
        libc::setsid();
        close_all_but(answer_fd);
    }
    // SAFETY: the caller's promise.
    let outcome = unsafe { work(job) }.words();
    // SAFETY: writes the 24 bytes of a local array; then ends without running anything of the parent's.
    unsafe {
        libc::write(answer_fd, outcome.as_ptr().cast(), OUTCOME_LEN);
        libc::_exit(0)
    }
}

unsafe fn close_all_but(keep: c_int) {
    let keep = keep.cast_unsigned();
    // SAFETY: close_range takes integers; nothing in the child uses another descriptor afterwards.
    unsafe {
        if keep > 0 {
            libc::syscall(libc::SYS_close_range, 0 as c_uint, keep - 1, 0 as c_uint);
        }
        libc::syscall(libc::SYS_close_range, keep + 1, c_uint::MAX, 0 as c_uint);
    }
}

/// Seize, stop, call, restore, detach.
unsafe fn work(job: &Job) -> Outcome {
    let pid = job.pid;
    // SAFETY (of all ptrace requests in this file): the target is another process; the kernel checks it and
    // every request, and data pointers are to locals of the size that the request names.
    unsafe {
        if request(
            libc::PTRACE_SEIZE,
            pid,
            0,
            libc::PTRACE_O_TRACESYSGOOD as usize,
        ) != 0
        {
            return Outcome::at(Stage::Seize, errno());
        }
        if request(libc::PTRACE_INTERRUPT, pid, 0, 0) != 0 {
            return Outcome::at(Stage::Prepare, errno());
        }
        match first_stop(pid, job.stop_limit) {
            Stop::Event => {}
            Stop::Died => return Outcome::at(Stage::Died, 0),
            Stop::Syscall | Stop::Signal(_) | Stop::None => {
                // Not stopped: leaving detaches by itself, and nothing was changed.
                return Outcome::at(Stage::NotStopped, 0);
            }
        }
        let began = now_ns();
        let mut outcome = exchange(job);
        request(libc::PTRACE_DETACH, pid, 0, 0);
        outcome.stopped_ns = now_ns().saturating_sub(began);
        outcome
    }
}

/// The call itself, on a target in an event stop; it is in one again afterwards, as it was.
unsafe fn exchange(job: &Job) -> Outcome {
    let pid = job.pid;
    // SAFETY: see `work`.
    unsafe {
        let mut regs = MaybeUninit::<user_regs_struct>::uninit();
        if request(libc::PTRACE_GETREGS, pid, 0, regs.as_mut_ptr() as usize) != 0 {
            return Outcome::at(Stage::Prepare, errno());
        }
        let saved = regs.assume_init();
        const USER_CODE_64: u64 = 0x33;
        if saved.cs != USER_CODE_64 {
            return Outcome::at(Stage::NotSixtyFourBit, 0);
        }
        let Some(instruction) = syscall_instruction(pid, saved.rip, job.spare_syscall) else {
            return Outcome::at(Stage::NoSyscallInstruction, 0);
        };
        let mut mask = 0u64;
        if request(libc::PTRACE_GETSIGMASK, pid, 8, &raw mut mask as usize) != 0 {
            return Outcome::at(Stage::Prepare, errno());
        }
        let quiet = all_but_faults();
        if request(libc::PTRACE_SETSIGMASK, pid, 8, &raw const quiet as usize) != 0 {
            return Outcome::at(Stage::Prepare, errno());
        }
        let ours = registers_for(job, saved, instruction);
        let mut ran = Ran::default();
        if request(libc::PTRACE_SETREGS, pid, 0, &raw const ours as usize) == 0 {
            ran = run_call(pid);
        } else {
            ran.errno = errno();
        }
        if ran.died {
            return Outcome::at(Stage::Died, 0);
        }
        request(libc::PTRACE_SETREGS, pid, 0, &raw const saved as usize);
        request(libc::PTRACE_SETSIGMASK, pid, 8, &raw const mask as usize);
        if ran.stop_wanted {
            // A SIGSTOP came in between and was swallowed: it is sent again, to be acted on after the detach.
            libc::kill(pid, libc::SIGSTOP);
        }
        match (ran.seccomp, ran.errno) {
            (true, _) => Outcome::at(Stage::Seccomp, 0),
            (false, 0) => Outcome {
                value: ran.value,
                ..Outcome::at(Stage::Done, 0)
            },
            (false, errno) => Outcome::at(Stage::Prepare, errno),
        }
    }
}

/// What came of letting the target make the call.
#[derive(Debug, Clone, Copy, Default)]
struct Ran {
    value: i64,
    errno: c_int,
    died: bool,
    seccomp: bool,
    stop_wanted: bool,
}

/// Runs the target into its call, out of it, and into an event stop, where the kernel looks at an interrupted
/// system call again once the saved registers are back. Does not return before that, or the target's death.
unsafe fn run_call(pid: pid_t) -> Ran {
    let mut ran = Ran::default();
    // SAFETY: see `work`.
    unsafe {
        // Entry, then exit.
        for _ in 0..2 {
            if !advance(pid, libc::PTRACE_SYSCALL, Want::Syscall, &mut ran) {
                return ran;
            }
        }
        let mut regs = MaybeUninit::<user_regs_struct>::uninit();
        if request(libc::PTRACE_GETREGS, pid, 0, regs.as_mut_ptr() as usize) == 0 {
            ran.value = regs.assume_init().rax.cast_signed();
        } else {
            ran.errno = errno();
        }
        request(libc::PTRACE_INTERRUPT, pid, 0, 0);
        advance(pid, libc::PTRACE_CONT, Want::Event, &mut ran);
    }
    ran
}

/// The stop that is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Syscall,
    Event,
}

/// Resumes the target with `how` until the stop `want`; false if it died.
unsafe fn advance(pid: pid_t, how: c_uint, want: Want, ran: &mut Ran) -> bool {
    loop {
        // SAFETY: see `work`. Signal 0: nothing is delivered while foreign registers are loaded.
        unsafe { request(how, pid, 0, 0) };
        // SAFETY: see `work`.
        match unsafe { wait_stop(pid, 0) } {
            Stop::Died => {
                ran.died = true;
                return false;
            }
            Stop::Syscall if want == Want::Syscall => return true,
            Stop::Event if want == Want::Event => return true,
            Stop::Signal(libc::SIGSYS) => ran.seccomp = true,
            Stop::Signal(libc::SIGSTOP) => ran.stop_wanted = true,
            Stop::Signal(_) | Stop::Syscall | Stop::Event | Stop::None => {}
        }
    }
}

/// Registers with which the target makes the call; `orig_rax` -1 keeps the kernel from restarting the interrupted one now.
const fn registers_for(job: &Job, saved: user_regs_struct, instruction: u64) -> user_regs_struct {
    let [rdi, rsi, rdx] = job.args;
    user_regs_struct {
        rip: instruction,
        rax: job.number,
        orig_rax: u64::MAX,
        rdi,
        rsi,
        rdx,
        ..saved
    }
}

/// The system call instruction behind which the target stands, else the spare one.
unsafe fn syscall_instruction(pid: pid_t, rip: u64, spare: u64) -> Option<u64> {
    let before = rip.wrapping_sub(2);
    // SAFETY: PTRACE_PEEKTEXT reads a word of the target; an unmapped address is answered with an error. The C
    // library's wrapper returns the word.
    let word = unsafe { libc::ptrace(libc::PTRACE_PEEKTEXT, pid, before, 0) };
    if word & 0xffff == 0x050f {
        Some(before)
    } else {
        (spare != 0).then_some(spare)
    }
}

/// Every signal but those that the kernel forces: to block such a one would reset the target's handler for it.
const fn all_but_faults() -> u64 {
    let mut mask = u64::MAX;
    let faults = [
        libc::SIGSYS,
        libc::SIGTRAP,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
    ];
    let mut at = 0;
    while at < faults.len() {
        mask &= !(1 << (faults[at] - 1));
        at += 1;
    }
    mask
}

/// What the target came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Event,
    Syscall,
    Signal(c_int),
    Died,
    None,
}

/// Waits for the stop that PTRACE_INTERRUPT asks for; signals that come before it are passed on.
unsafe fn first_stop(pid: pid_t, limit: Duration) -> Stop {
    // SAFETY: see `work`.
    let deadline = unsafe { now_ns() }.saturating_add(nanos(limit));
    loop {
        // SAFETY: see `work`.
        match unsafe { wait_stop(pid, deadline) } {
            Stop::Signal(signal) => {
                // SAFETY: see `work`; the target's own registers are in place, so its handler may run.
                unsafe { request(libc::PTRACE_CONT, pid, 0, signal.cast_unsigned() as usize) };
            }
            stop @ (Stop::Event | Stop::Syscall | Stop::Died | Stop::None) => return stop,
        }
    }
}

/// Waits for any stop; [`Stop::None`] at `deadline` (0: none).
unsafe fn wait_stop(pid: pid_t, deadline: u64) -> Stop {
    const PTRACE_EVENT_STOP: c_int = 128;
    let flags = if deadline == 0 { 0 } else { libc::WNOHANG };
    loop {
        let mut status = 0;
        // SAFETY: writes one int. The target is not our child but our tracee, for which waitpid works by pid.
        let got = unsafe { libc::waitpid(pid, &raw mut status, flags | libc::__WALL) };
        if got == 0 {
            // SAFETY: reads a clock and sleeps.
            unsafe {
                if now_ns() >= deadline {
                    return Stop::None;
                }
                libc::usleep(50);
            }
            continue;
        }
        if got < 0 {
            // SAFETY: reads errno.
            if unsafe { errno() } == libc::EINTR {
                continue;
            }
            return Stop::Died;
        }
        if !libc::WIFSTOPPED(status) {
            return Stop::Died;
        }
        let signal = libc::WSTOPSIG(status);
        return match status >> 16 {
            PTRACE_EVENT_STOP => Stop::Event,
            _ if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            _ => Stop::Signal(signal),
        };
    }
}

/// One ptrace request by the C library, as 0 or -1.
unsafe fn request(what: c_uint, pid: pid_t, addr: usize, data: usize) -> i64 {
    // SAFETY: the callers' promise about `data`.
    unsafe { libc::ptrace(what, pid, addr, data) }
}

unsafe fn errno() -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() }
}

const fn nanos(duration: Duration) -> u64 {
    duration
        .as_secs()
        .saturating_mul(1_000_000_000)
        .saturating_add(duration.subsec_nanos() as u64)
}

/// The monotonic clock in nanoseconds, by plain system call wrapper.
unsafe fn now_ns() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec
        .cast_unsigned()
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec.cast_unsigned())
}
