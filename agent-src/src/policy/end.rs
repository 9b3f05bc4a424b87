//! Why the policy gave a migration up, told with numbers and with what to do about it.
//!
//! Owns the sentences; [`super::decide`] owns when they are said.

use std::fmt;
use std::time::Duration;

use vmferry_common::units::{Rate, Size, Span};
use vmferry_proto::error::ErrorCode;

use super::PredictedDowntime;

/// A guest that does not converge, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stall {
    /// Rounds so far.
    pub rounds: u32,
    /// Bytes left.
    pub left: u64,
    /// What the guest dirtied per second in the last round.
    pub dirty_rate: Rate,
    /// What a cutover now would take.
    pub predicted: PredictedDowntime,
    /// What it may take.
    pub max_downtime: Duration,
}

impl fmt::Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "after {} {} {} are left and no longer shrink: the guest dirties {} and {} get across, so a cutover now \
             would take {}, and --max-downtime is {}",
            self.rounds,
            if self.rounds == 1 { "round" } else { "rounds" },
            Size(self.left),
            self.dirty_rate,
            self.predicted.goodput,
            self.predicted,
            Span(self.max_downtime),
        )
    }
}

/// Why a migration is given up. The guest runs on at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveUp {
    /// The guest dirties faster than the link carries.
    NotConverging(Stall),
    /// What a cutover costs even with nothing left to send exceeds `max_downtime`.
    FixedCosts {
        /// The prediction, with its parts.
        predicted: PredictedDowntime,
        /// What it may take.
        max_downtime: Duration,
    },
    /// `--on-stall force` would pause the guest for longer than `--pause-timeout` allows.
    ForcedPauseTooLong {
        /// The guest that does not converge.
        stall: Stall,
        /// What an attempt may take.
        pause_timeout: Duration,
    },
    /// `--timeout` is over.
    TimedOut {
        /// The limit.
        timeout: Duration,
        /// Whether the guest was converged and only the trigger was missing.
        awaiting_trigger: bool,
        /// Bytes left.
        left: u64,
        /// What a cutover would have taken, if that was known.
        predicted: Option<PredictedDowntime>,
    },
}

impl GiveUp {
    /// The code under which it is reported.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::NotConverging(_) | Self::FixedCosts { .. } | Self::ForcedPauseTooLong { .. } => {
                ErrorCode::NotConverging
            }
            Self::TimedOut { .. } => ErrorCode::TimedOut,
        }
    }
}

impl fmt::Display for GiveUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConverging(stall) => write!(
                f,
                "the guest does not converge: {stall}; try again when it is less busy, with --max-downtime {} or \
                 more, or with --on-stall force",
                enough(stall.predicted.total())
            ),
            Self::FixedCosts {
                predicted,
                max_downtime,
            } => write!(
                f,
                "the cutover takes {} besides sending what is left ({}), and --max-downtime is {}; use --max-downtime \
                 {} or more",
                Span(predicted.fixed.total()),
                longest_fixed(predicted),
                Span(*max_downtime),
                enough(predicted.total())
            ),
            Self::ForcedPauseTooLong {
                stall,
                pause_timeout,
            } => write!(
                f,
                "the guest does not converge: {stall}; --on-stall force would move it, but --pause-timeout is {}: \
                 leave that out, or use {} or more",
                Span(*pause_timeout),
                enough(stall.predicted.total())
            ),
            Self::TimedOut {
                timeout,
                awaiting_trigger: true,
                ..
            } => write!(
                f,
                "no cutover was triggered within --timeout {}; the guest was ready for it: run vmferry-src cutover \
                 sooner, or use a longer --timeout",
                Span(*timeout)
            ),
            Self::TimedOut {
                timeout,
                awaiting_trigger: false,
                left,
                predicted,
            } => timed_out(f, *timeout, *left, predicted.as_ref()),
        }
    }
}

fn timed_out(
    f: &mut fmt::Formatter<'_>,
    timeout: Duration,
    left: u64,
    predicted: Option<&PredictedDowntime>,
) -> fmt::Result {
    write!(
        f,
        "--timeout {} is over with {} left",
        Span(timeout),
        Size(left)
    )?;
    if let Some(predicted) = predicted {
        write!(f, "; a cutover now would take {predicted}")?;
    }
    write!(
        f,
        "; use a longer --timeout, or find out why the copy is slow (--max-bandwidth, link, disks)"
    )
}

/// A quarter above the prediction, rounded up to two digits, as an argument: one that has a chance.
fn enough(predicted: Duration) -> String {
    let millis = u64::try_from(predicted.as_millis())
        .unwrap_or(u64::MAX)
        .saturating_mul(5)
        / 4
        + 1;
    let step = 10_u64.pow(millis.ilog10().saturating_sub(1));
    let millis = millis.div_ceil(step).saturating_mul(step);
    if millis < 10_000 {
        format!("{millis}ms")
    } else {
        format!("{}s", millis.div_ceil(1000))
    }
}

fn longest_fixed(predicted: &PredictedDowntime) -> String {
    let mut parts = predicted.fixed.parts();
    parts.sort_by_key(|(_, part)| std::cmp::Reverse(*part));
    parts
        .iter()
        .filter(|(_, part)| !part.is_zero())
        .take(3)
        .map(|(name, part)| format!("{name} {}", Span(*part)))
        .collect::<Vec<_>>()
        .join(", ")
}
