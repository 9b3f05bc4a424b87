//! When to stop copying rounds and move the guest: the convergence policy, as a pure function.
//!
//! [`decide`] is asked after each round with everything measured so far and answers what to do next. It owns the
//! formulas and their constants. It reads no clock, keeps nothing between calls and knows nothing of guests or
//! links: the engine measures, and carries the answer out. The parts of a downtime are in `downtime`.
//!
//! Invariant: the guest is never paused for longer than the user allowed on the strength of an assumption about
//! what is left (only `--on-stall force` overrides it), and no sequence of measurements makes a migration go on
//! for ever: see [`decide`] for the bound.

mod downtime;
mod end;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmferry_common::units::Rate;

use downtime::bytes_in;
pub use downtime::{FixedCosts, Flight, Left, PredictedDowntime, goodput};
pub use end::{GiveUp, Stall};

/// A round shrinks what is left if it leaves at most this share (in percent) of the smaller of the two rounds
/// before it. A guest that stays above it needs over ten times the time of its first round to converge, on a link
/// with less than a tenth to spare: the next neighbour on the link would undo it.
const SHRINKS_TO_PERCENT: u64 = 90;
/// A round does not count against the guest while the guest dirties less than this share (in percent) of what the
/// link carries, whatever is left: then the link or the host hiccuped, not the guest.
const CALM_PERCENT: u64 = 50;
/// Rounds by which a stall that was there from the beginning is recognised.
const EARLY_ROUNDS: usize = 3;
/// Rounds in a row without progress that are a stall later on. Two are a burst: a guest that has shown that it
/// converges gets one more.
const STALLED_ROUNDS: usize = 3;
/// Rounds without a new smallest rest that are a stall even if no three in a row were: a guest that swings.
const ROUNDS_WITHOUT_BEST: usize = 10;
/// Bounds of the time between two rounds while a converged guest waits for its trigger.
const RECHECK_MIN: Duration = Duration::from_millis(100);
const RECHECK_MAX: Duration = Duration::from_secs(5);

/// What a finished round did. A round ends with the scan that says what the guest dirtied during it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// Counted from 1; round 1 sends everything.
    pub number: u32,
    /// From the scan before the round to the scan at its end.
    pub elapsed: Duration,
    /// The part of `elapsed` in which nothing could be sent: waits for the trigger, lost link.
    pub idle: Duration,
    /// Bytes of guest content accounted for at the destination, zero blocks included.
    pub raw_bytes_sent: u64,
    /// Those of them that were zero and took no payload.
    pub zero_bytes: u64,
    /// Bytes handed to the transport: headers and payload after compression.
    pub wire_bytes: u64,
    /// Bytes found dirty by the scan at the end.
    pub dirtied_bytes: u64,
    /// Bytes left to send after that scan: dirtied ones, and those of this round not yet acknowledged.
    pub left_bytes: u64,
}

/// What to do with a guest that does not converge.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum OnStall {
    /// Give up; the guest runs on at the source.
    #[default]
    Abort,
    /// Move it all the same, with a longer downtime than `--max-downtime`.
    Force,
}

/// Who starts the cutover.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Cutover {
    /// The agent, as soon as the downtime fits.
    #[default]
    Auto,
    /// Somebody else, with `vmferry-src cutover NAME`; until then the guest is kept converged.
    Manual,
}

/// What the user allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest downtime that the cutover may be predicted to take.
    pub max_downtime: Duration,
    /// Longest pause of an attempt before it is rolled back, where the user named one.
    pub pause_timeout: Option<Duration>,
    /// Longest time of the whole migration up to the cutover.
    pub timeout: Duration,
    /// What to do with a guest that does not converge.
    pub on_stall: OnStall,
    /// Who starts the cutover.
    pub cutover: Cutover,
}

impl Limits {
    /// The pause after which an attempt with this prediction is rolled back.
    ///
    /// Unless the user says otherwise it is five times `max_downtime`, and at least one second. A rollback costs
    /// the guest the whole pause for nothing, so it must not be the answer to a prediction that was off by half
    /// (a slow fsync, a busy host); five times over, something is broken and waiting longer will not mend it.
    /// Below a second the noise of a host is larger than any bound worth setting. A forced cutover, which
    /// is longer than `max_downtime` by intention, gets three times its own prediction.
    #[must_use]
    pub fn pause_limit(&self, predicted: Duration) -> Duration {
        const FLOOR: Duration = Duration::from_secs(1);
        self.pause_timeout.unwrap_or_else(|| {
            FLOOR
                .max(self.max_downtime.saturating_mul(5))
                .max(predicted.saturating_mul(3))
        })
    }
}

/// When a pause that may last for `limit` is given up: early enough that the guest runs again by then, behind one journal record and
/// the resume.
#[must_use]
pub fn give_up_pause_after(limit: Duration) -> Duration {
    const ROLLBACK: Duration = Duration::from_millis(250);
    limit - ROLLBACK.min(limit / 20)
}

/// Everything that the decision rests on.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// All finished rounds, oldest first.
    pub rounds: &'a [RoundStats],
    /// Number of the last round that says nothing about convergence: the one during which the link was lost, the
    /// trigger came or an attempt was rolled back. Zero if there was none. What makes the engine raise it must
    /// itself be bounded, or the bound of [`decide`] rests on the timeout alone.
    pub evidence_after: u32,
    /// What is left to send, as of the last scan.
    pub left: Left,
    /// The last thing that was sent, for how fast the link is now.
    pub last_flight: Option<Flight>,
    /// Parts of the downtime that do not depend on what is left.
    pub fixed: FixedCosts,
    /// What the user allows.
    pub limits: Limits,
    /// Since the migration began.
    pub elapsed: Duration,
    /// Whether `vmferry-src cutover` was called; without meaning for [`Cutover::Auto`].
    pub triggered: bool,
    /// Whether the guest's CPUs run. A paused guest has no downtime to lose and dirties nothing.
    pub guest_runs: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Another round, at once.
    Continue {
        /// What a cutover now would take; `None` before the first round is through.
        predicted: Option<PredictedDowntime>,
        /// The last rounds made no progress: tell the user, with these numbers.
        warning: Option<Stall>,
    },
    /// Converged, but the trigger has not come: wait, then another round to stay converged.
    AwaitTrigger {
        /// What a cutover now would take.
        predicted: PredictedDowntime,
        /// When the next round is due, unless the trigger comes first.
        recheck_after: Duration,
    },
    /// Pause the guest and move it.
    CutOver {
        /// What it is going to take: at most `max_downtime`, for a guest that runs.
        predicted: PredictedDowntime,
    },
    /// Pause the guest and move it although it takes longer than `max_downtime`.
    ForceCutOver {
        /// What it is going to take.
        predicted: PredictedDowntime,
        /// Why it came to that.
        stall: Stall,
    },
    /// End the migration; the guest runs on at the source.
    GiveUp(GiveUp),
}

/// Decides what to do after a round. Asked in this order:
///
/// 1. **Time.** `elapsed >= timeout` gives up, whatever `--on-stall` says: forcing is for guests that do not
///    converge, not for a slow first round. (The engine also ends a round that runs over the timeout.)
/// 2. **Fit.** The predicted downtime ([`PredictedDowntime`]) is `left / goodput + fixed costs`, `left` being what the
///    last scan found and what is added until the pause. If it is within `max_downtime`, the guest is moved, or, in `manual` mode, kept as it is until the trigger.
/// 3. **Fixed costs.** If they alone exceed `max_downtime`, no number of rounds helps: `abort` gives up at once.
/// 4. **Stall.** Round *k* makes no progress if `left_k > 0.9 * min(left_{k-1}, left_{k-2})` while the guest
///    dirties at least half of what the link carries. Copying `left_{k-1}` takes `left_{k-1} / goodput`, in which
///    the guest dirties at most `rate` times that, so `left_k / left_{k-1}` tends to `rate / goodput`
///    or, with a hot working set, to one: both show as a rest that no longer shrinks. It is a stall if rounds 2 and 3
///    made no progress, or later any three in a row (two in a row are a burst), or if the last ten
///    set no new minimum (a guest that swings). A small hot working set that fits is no stall: rule 2 comes first.
///
/// The rule of pre-copy rounds, and that a rest which stops shrinking ends them, is that of Clark et al., *Live
/// Migration of Virtual Machines* (NSDI 2005), section 3.3; QEMU's auto-converge compares the same two numbers.
///
/// **Bound.** With `auto`, or once triggered, every ten rounds at the latest bring a new minimum or an end, and a new
/// minimum is at most 0.9 of the last; so at most `10 * log(total / 1 byte) / log(1 / 0.9)` rounds follow the last
/// `evidence_after`, some 2,600 for a guest of 1 TiB, and mostly under ten. Waiting for the trigger ends with the timeout.
#[must_use]
pub fn decide(now: &Situation<'_>) -> Decision {
    if now.elapsed >= now.limits.timeout {
        return Decision::GiveUp(timed_out(now));
    }
    let Some(predicted) = predict(now) else {
        return Decision::Continue {
            predicted: None,
            warning: None,
        };
    };
    if fits(now, &predicted) {
        return converged(now, predicted);
    }
    if let Some(decision) = fixed_costs_too_high(now, &predicted) {
        return decision;
    }
    let progress = progress(now);
    match progress {
        Progress::Stalled if !keeps_waiting(now) => stalled(now, predicted),
        Progress::Good | Progress::Doubtful | Progress::Stalled => Decision::Continue {
            warning: (progress != Progress::Good).then(|| stall(now, predicted)),
            predicted: Some(predicted),
        },
    }
}

/// What a cutover now would take; `None` before the first round is through.
#[must_use]
pub fn predict(now: &Situation<'_>) -> Option<PredictedDowntime> {
    let rate = goodput(now.rounds, now.last_flight)?;
    let left = now.left.total().saturating_add(growth(now));
    Some(PredictedDowntime::new(left, rate, now.fixed))
}

/// Bytes that the guest adds to what is left until it is paused: at most the dirty rate times that time. A hot working set adds
/// nothing, for its blocks are in what is left already; it shows in an earlier round that was longer by at least the
/// delay and yet dirtied no more.
fn growth(now: &Situation<'_>) -> u64 {
    let Some(last) = now.rounds.last() else {
        return 0;
    };
    let until_pause = last.elapsed.saturating_add(now.fixed.before_pause());
    let seen = now
        .rounds
        .iter()
        .filter(|round| round.elapsed >= until_pause)
        .map(|round| round.dirtied_bytes.saturating_sub(last.dirtied_bytes))
        .min()
        .unwrap_or(u64::MAX);
    bytes_in(last.dirty_rate(), now.fixed.before_pause()).min(seen)
}

/// Whether a cutover now would keep the limit with room to spare, everything that is left being sent in it: what the guest writes until
/// it is asked again must not make it too long.
#[must_use]
pub fn rest_fits(now: &Situation<'_>) -> bool {
    let enough = now.limits.max_downtime * 3 / 4;
    now.guest_runs && predict(now).is_some_and(|predicted| predicted.total() <= enough)
}

fn fits(now: &Situation<'_>, predicted: &PredictedDowntime) -> bool {
    !now.guest_runs || predicted.total() <= now.limits.max_downtime
}

fn converged(now: &Situation<'_>, predicted: PredictedDowntime) -> Decision {
    match now.limits.cutover {
        Cutover::Manual if !now.triggered => Decision::AwaitTrigger {
            predicted,
            recheck_after: recheck_after(now, &predicted),
        },
        Cutover::Manual | Cutover::Auto => Decision::CutOver { predicted },
    }
}

/// The time in which the guest dirties about half of what still fits into the downtime, so that it is still
/// converged at the next look, at little cost for the guest and the link.
fn recheck_after(now: &Situation<'_>, predicted: &PredictedDowntime) -> Duration {
    let spare = now.limits.max_downtime.saturating_sub(predicted.total()) / 2;
    dirty_rate(now)
        .time_for(bytes_in(predicted.goodput, spare))
        .clamp(RECHECK_MIN, RECHECK_MAX)
}

/// How fast the guest dirtied memory and disks in the last round.
#[must_use]
pub fn dirty_rate(now: &Situation<'_>) -> Rate {
    now.rounds.last().map_or(Rate(0), RoundStats::dirty_rate)
}

impl RoundStats {
    /// Bytes dirtied per second of the round: each block counts once, so a hot one counts little.
    #[must_use]
    pub fn dirty_rate(&self) -> Rate {
        Rate::of(self.dirtied_bytes, self.elapsed)
    }

    /// Bytes of content accounted for per second in which something was sent.
    #[must_use]
    pub fn raw_rate(&self) -> Rate {
        Rate::of(self.raw_bytes_sent, self.sending())
    }

    /// Bytes put on the wire per second in which something was sent.
    #[must_use]
    pub fn wire_rate(&self) -> Rate {
        Rate::of(self.wire_bytes, self.sending())
    }

    /// The time in which something was sent.
    #[must_use]
    pub fn sending(&self) -> Duration {
        self.elapsed.saturating_sub(self.idle)
    }
}

fn fixed_costs_too_high(now: &Situation<'_>, predicted: &PredictedDowntime) -> Option<Decision> {
    let fixed = now.fixed.total();
    if fixed <= now.limits.max_downtime {
        return None;
    }
    match now.limits.on_stall {
        OnStall::Abort => Some(Decision::GiveUp(GiveUp::FixedCosts {
            predicted: *predicted,
            max_downtime: now.limits.max_downtime,
        })),
        // Once the rest takes less than a tenth of what cannot be avoided, further rounds gain nothing.
        OnStall::Force if predicted.transfer <= fixed / 10 && !keeps_waiting(now) => {
            Some(stalled(now, *predicted))
        }
        OnStall::Force => None,
    }
}

fn stalled(now: &Situation<'_>, predicted: PredictedDowntime) -> Decision {
    let stall = stall(now, predicted);
    match (now.limits.on_stall, now.limits.pause_timeout) {
        (OnStall::Abort, _) => Decision::GiveUp(GiveUp::NotConverging(stall)),
        (OnStall::Force, Some(limit)) if predicted.total() > limit => {
            Decision::GiveUp(GiveUp::ForcedPauseTooLong {
                stall,
                pause_timeout: limit,
            })
        }
        (OnStall::Force, _) => Decision::ForceCutOver { predicted, stall },
    }
}

fn stall(now: &Situation<'_>, predicted: PredictedDowntime) -> Stall {
    Stall {
        rounds: now.rounds.last().map_or(0, |round| round.number),
        left: now.left.total(),
        dirty_rate: dirty_rate(now),
        predicted,
        max_downtime: now.limits.max_downtime,
    }
}

fn timed_out(now: &Situation<'_>) -> GiveUp {
    let predicted = predict(now);
    GiveUp::TimedOut {
        timeout: now.limits.timeout,
        awaiting_trigger: !now.triggered
            && now.limits.cutover == Cutover::Manual
            && predicted.is_some_and(|predicted| fits(now, &predicted)),
        left: now.left.total(),
        predicted,
    }
}

/// A guest that waits for its trigger and has been converged before is not given up for a burst: it is copied
/// until it fits again, or the timeout ends the wait. A trigger starts the count afresh (`evidence_after`).
fn keeps_waiting(now: &Situation<'_>) -> bool {
    now.limits.cutover == Cutover::Manual
        && !now.triggered
        && now.rounds.iter().any(|round| {
            goodput(now.rounds, now.last_flight).is_some_and(|rate| {
                fits(
                    now,
                    &PredictedDowntime::new(round.left_bytes, rate, now.fixed),
                )
            })
        })
}

/// Whether the rounds get anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Good,
    Doubtful,
    Stalled,
}

fn progress(now: &Situation<'_>) -> Progress {
    let start = now
        .rounds
        .partition_point(|round| round.number <= now.evidence_after);
    let evidence = &now.rounds[start..];
    let rate = goodput(now.rounds, now.last_flight).unwrap_or(Rate(0));
    let in_a_row = (1..evidence.len())
        .rev()
        .take_while(|&at| no_progress(evidence, at, rate))
        .count();
    let early = in_a_row + 1 == EARLY_ROUNDS && evidence.len() == EARLY_ROUNDS;
    if early || in_a_row >= STALLED_ROUNDS || rounds_since_best(evidence) >= ROUNDS_WITHOUT_BEST {
        Progress::Stalled
    } else if in_a_row > 0 {
        Progress::Doubtful
    } else {
        Progress::Good
    }
}

/// Whether round `at` (not the first) failed to shrink the rest, through the guest's doing.
fn no_progress(rounds: &[RoundStats], at: usize, goodput: Rate) -> bool {
    let before = rounds[at.saturating_sub(2)..at]
        .iter()
        .map(|round| round.left_bytes)
        .min()
        .unwrap_or(u64::MAX);
    let round = &rounds[at];
    !shrinks(round.left_bytes, before)
        && round.dirty_rate().0 >= percent_of(goodput.0, CALM_PERCENT)
}

fn shrinks(left: u64, before: u64) -> bool {
    left <= percent_of(before, SHRINKS_TO_PERCENT) && left < before
}

/// Rounds after the one that last brought the rest to a new minimum worth the name.
fn rounds_since_best(rounds: &[RoundStats]) -> usize {
    let mut best = u64::MAX;
    let mut at = 0;
    for (index, round) in rounds.iter().enumerate() {
        if shrinks(round.left_bytes, best) {
            best = round.left_bytes;
            at = index;
        }
    }
    rounds.len().saturating_sub(at + 1)
}

/// `percent` of `value`, rounded down.
fn percent_of(value: u64, percent: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}
