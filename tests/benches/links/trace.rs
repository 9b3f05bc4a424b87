//! What a line carried, moment by moment.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmferry_tests::link::Link;

const LOOK: Duration = Duration::from_millis(1);
/// The handshake is over when so much is on the line.
const HANDSHAKE: u64 = 20_000;
/// Shortest stretch over which a rate says something on a busy machine.
pub(super) const SHORTEST: Duration = Duration::from_millis(10);

/// Bytes that were on the line, looked at again and again.
pub(super) struct Trace {
    points: Vec<(Duration, u64)>,
}

impl Trace {
    /// Looks from alpha to beta until it is `over`; `None` if that takes longer than `limit`.
    pub(super) fn take(
        link: &Link,
        limit: Duration,
        mut over: impl FnMut() -> Result<bool>,
    ) -> Result<Option<Self>> {
        let (began, before) = (Instant::now(), link.forth().bytes);
        let mut points = Vec::new();
        while !over()? {
            if began.elapsed() > limit {
                return Ok(None);
            }
            points.push((began.elapsed(), link.forth().bytes - before));
            thread::sleep(LOOK);
        }
        Ok(Some(Self { points }))
    }

    pub(super) fn total(&self) -> u64 {
        self.points.last().map_or(0, |(_, bytes)| *bytes)
    }

    /// When `bytes` were on the line.
    fn when(&self, bytes: u64) -> Result<Duration> {
        let reached = self.points.iter().find(|(_, so_far)| *so_far >= bytes);
        Ok(reached.context("the line carried less")?.0)
    }

    /// Bytes per second between 30 and 90 % of all bytes.
    pub(super) fn steady(&self) -> Result<f64> {
        let (from, to) = (self.total() * 3 / 10, self.total() * 9 / 10);
        let took = self.when(to)?.saturating_sub(self.when(from)?);
        Ok((to - from) as f64 / took.as_secs_f64())
    }

    /// From the end of the handshake until a round trip carries 90 % of the steady rate.
    pub(super) fn start(&self, steady: f64, rtt: Duration) -> Result<Duration> {
        let (begin, stretch) = (self.when(HANDSHAKE)?, rtt.max(SHORTEST));
        let least = steady * 0.9 * stretch.as_secs_f64();
        let mut later = self.points.iter().peekable();
        for (at, bytes) in &self.points {
            while later.next_if(|(then, _)| *then < *at + stretch).is_some() {}
            let Some((_, then)) = later.peek() else { break };
            if *at >= begin && (then - bytes) as f64 >= least {
                return Ok(*at - begin);
            }
        }
        anyhow::bail!("the rate was never steady")
    }

    /// Bytes per second of every second that begins between `from` and `to`, in steps of a hundredth.
    pub(super) fn seconds(&self, from: Duration, to: Duration) -> Vec<f64> {
        const SECOND: Duration = Duration::from_secs(1);
        const STEP: Duration = Duration::from_millis(10);
        let mut rates = Vec::new();
        let mut next = from;
        for (index, (at, bytes)) in self.points.iter().enumerate() {
            if *at < next || *at > to {
                continue;
            }
            let later = &self.points[index..];
            let end = later.partition_point(|(then, _)| *then < *at + SECOND);
            let Some((then, more)) = later.get(end) else {
                break;
            };
            rates.push((more - bytes) as f64 / (*then - *at).as_secs_f64());
            next = *at + STEP;
        }
        rates
    }
}
