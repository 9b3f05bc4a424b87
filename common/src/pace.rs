//! The limit of `--max-bandwidth`: a token bucket that may be changed while it runs.
//!
//! Owns the arithmetic and the waiting; the caller says how many bytes it is about to send, and afterwards what
//! the link really carried, headers and retransmissions included: the difference is paid back. The bucket runs
//! into debt instead of splitting a frame: a taker larger than the bucket goes at once and the next waits
//! until the debt is paid. Over any second the rate is exceeded by at most the burst, a fiftieth of a
//! second's worth, or by one frame where that is larger.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::units::Rate;

/// What may be saved up: 20 ms, long enough for the timer's grain and short enough to keep 3 % per second.
const BURST: Duration = Duration::from_millis(20);

/// Most that is taken at once, so that a second's figure is not off by a whole frame.
const MOST_PIECE: usize = 32 << 10;
/// Least: a packet.
const LEAST_PIECE: usize = 1200;
/// In between, the share of a second that may go at once, as a divisor: with the burst it stays below 3 %.
const PIECES_A_SECOND: u64 = 200;

/// A limit of bytes per second, shared by all senders of a migration.
#[derive(Debug, Clone)]
pub struct Pacer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Notify,
    /// Serves takers in the order in which they came.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    limit: Option<Rate>,
    /// Bytes that may go now; negative: debt.
    tokens: f64,
    filled: Instant,
    /// Bytes seen on the wire less bytes taken, never above zero: more is paid back at once. What was taken and
    /// has not gone yet is the rest.
    balance: f64,
    /// Last count of each link.
    links: Vec<(usize, u64)>,
}

/// Links that are remembered: more than a session has connections.
const MAX_LINKS: usize = 64;

impl Pacer {
    /// With this limit, or none.
    #[must_use]
    pub fn new(limit: Option<Rate>) -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    limit,
                    tokens: 0.0,
                    filled: Instant::now(),
                    balance: 0.0,
                    links: Vec::new(),
                }),
                changed: Notify::new(),
                turn: tokio::sync::Mutex::new(()),
            }),
        }
    }

    /// The limit now.
    #[must_use]
    pub fn limit(&self) -> Option<Rate> {
        self.state().limit
    }

    /// How much to take at once.
    #[must_use]
    pub fn piece(&self) -> usize {
        let share = self.limit().map(|rate| rate.0 / PIECES_A_SECOND);
        let share = share.and_then(|share| usize::try_from(share).ok());
        share.map_or(MOST_PIECE, |share| share.clamp(LEAST_PIECE, MOST_PIECE))
    }

    /// Changes the limit; those who wait are served by the new one at once.
    pub fn set_limit(&self, limit: Option<Rate>) {
        {
            let mut state = self.state();
            state.refill();
            state.limit = limit;
        }
        self.shared.changed.notify_waiters();
    }

    /// Waits until `bytes` may go. Cancel safe: a waiter that is dropped has taken nothing.
    pub async fn take(&self, bytes: u64) {
        let _turn = self.shared.turn.lock().await;
        loop {
            // Registered before the look, so that a change in between is not missed.
            let changed = self.shared.changed.notified();
            let wait = match self.state().try_take(bytes) {
                Ok(()) => return,
                Err(wait) => wait,
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// Says that link `link` has carried `total` bytes so far. What went without asking (headers,
    /// retransmissions) is paid back: those who ask next wait the longer. Of a later link
    /// the first count is where it begins.
    pub fn on_wire(&self, link: usize, total: u64) {
        let mut state = self.state();
        state.refill();
        let fresh = state.carried_since(link, total);
        state.balance += as_f64(fresh);
        if state.balance > 0.0 {
            if state.limit.is_some() {
                state.tokens -= state.balance;
            }
            state.balance = 0.0;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half way; a poisoned lock holds a sound state.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn refill(&mut self) {
        let now = Instant::now();
        let passed = now.duration_since(self.filled);
        self.filled = now;
        match self.limit {
            Some(rate) => {
                let rate = as_f64(rate.0);
                let most = rate * BURST.as_secs_f64();
                self.tokens = (self.tokens + rate * passed.as_secs_f64()).min(most);
            }
            None => self.tokens = 0.0,
        }
    }

    /// Bytes that this link carried since its last count.
    fn carried_since(&mut self, link: usize, total: u64) -> u64 {
        if let Some((_, last)) = self.links.iter_mut().find(|(id, _)| *id == link) {
            let fresh = total.saturating_sub(*last);
            *last = total.max(*last);
            return fresh;
        }
        if self.links.len() >= MAX_LINKS {
            self.links.remove(0);
        }
        let first = self.links.is_empty();
        self.links.push((link, total));
        if first {
            return total;
        }
        // What was taken for a link that is gone will never be seen.
        self.balance = 0.0;
        0
    }

    /// Takes, or says how long to wait.
    fn try_take(&mut self, bytes: u64) -> Result<(), Duration> {
        self.refill();
        let Some(rate) = self.limit else {
            return Ok(());
        };
        if self.tokens >= 0.0 {
            self.tokens -= as_f64(bytes);
            self.balance -= as_f64(bytes);
            return Ok(());
        }
        let seconds = -self.tokens / as_f64(rate.0.max(1));
        // At least the timer's grain: a shorter sleep would only spin.
        Err(Duration::try_from_secs_f64(seconds)
            .unwrap_or(Duration::from_secs(1))
            .clamp(Duration::from_millis(1), Duration::from_secs(1)))
    }
}

#[allow(
    clippy::cast_precision_loss,
    reason = "2^53 bytes are far above any frame or rate"
)]
fn as_f64(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::Pacer;
    use crate::units::Rate;
    use std::time::Duration;
    use tokio::time::Instant;

    /// Takes frames for `seconds` of the paused clock and returns the bytes of each second.
    async fn seconds_of(pacer: &Pacer, frame: u64, seconds: usize) -> Vec<u64> {
        let start = Instant::now();
        let mut per_second = vec![0; seconds];
        loop {
            pacer.take(frame).await;
            let second = usize::try_from(start.elapsed().as_secs()).unwrap();
            match per_second.get_mut(second) {
                Some(bytes) => *bytes += frame,
                None => return per_second,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn any_second_is_within_three_percent() {
        let rate = 125_000_000;
        let pacer = Pacer::new(Some(Rate(rate)));
        for bytes in seconds_of(&pacer, 524_288, 5).await {
            assert!(bytes.abs_diff(rate) <= rate * 3 / 100, "{bytes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn any_second_of_a_slow_limit_is_within_three_percent_too() {
        for rate in [100_000, 1_000_000] {
            let pacer = Pacer::new(Some(Rate(rate)));
            for bytes in seconds_of(&pacer, pacer.piece() as u64, 5).await {
                assert!(bytes.abs_diff(rate) <= rate * 3 / 100 + 1200, "{bytes}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_time_is_not_saved_up() {
        let pacer = Pacer::new(Some(Rate(1_000_000)));
        tokio::time::sleep(Duration::from_secs(60)).await;
        let first = seconds_of(&pacer, 1_000, 1).await[0];
        assert!(first <= 1_030_000, "{first}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_limit_serves_those_who_wait() {
        let pacer = Pacer::new(Some(Rate(1)));
        pacer.take(1_000_000).await;
        let waiting = tokio::spawn({
            let pacer = pacer.clone();
            async move { pacer.take(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        let before = Instant::now();
        pacer.set_limit(None);
        waiting.await.unwrap();
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn headers_and_retransmissions_count() {
        let rate = 10_000_000;
        let pacer = Pacer::new(Some(Rate(rate)));
        let start = Instant::now();
        let mut wire = 0;
        let mut payload = 0;
        while start.elapsed() < Duration::from_secs(10) {
            pacer.take(32_768).await;
            payload += 32_768;
            // A tenth more goes on the wire, and the count lags behind by what waits in queues.
            wire = (payload - 32_768) * 11 / 10;
            pacer.on_wire(1, wire);
        }
        assert!(wire.abs_diff(rate * 10) <= rate * 10 * 3 / 100, "{wire}");
        // A second link of a new session begins at its own count.
        pacer.on_wire(2, 1 << 40);
        let before = Instant::now();
        pacer.take(1).await;
        assert!(before.elapsed() <= Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_taken_and_not_yet_seen_is_no_credit() {
        let pacer = Pacer::new(Some(Rate(1_000_000)));
        pacer.on_wire(1, 0);
        pacer.take(1_000_000).await;
        pacer.on_wire(1, 1_500_000);
        // Half a second's worth more than was asked for, behind the million.
        let before = Instant::now();
        pacer.take(1).await;
        let waited = before.elapsed();
        assert!(waited >= Duration::from_millis(1_490), "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_waiter_has_taken_nothing() {
        let pacer = Pacer::new(Some(Rate(1_000)));
        pacer.take(1_000).await;
        let dropped = tokio::time::timeout(Duration::from_millis(10), pacer.take(1_000_000)).await;
        assert!(dropped.is_err());
        let before = Instant::now();
        pacer.take(1).await;
        assert!(before.elapsed() <= Duration::from_millis(1_000));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_nobody_waits() {
        let pacer = Pacer::new(None);
        let before = Instant::now();
        for _ in 0..1000 {
            pacer.take(u64::MAX / 4096).await;
        }
        assert_eq!(before.elapsed(), Duration::ZERO);
    }
}
