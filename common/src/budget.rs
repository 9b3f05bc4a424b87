//! How much of the guest is held in memory on its way to the transport.
//!
//! Owns one count per connection: bytes that are being read and encoded, and bytes that were handed over and are not yet
//! acknowledged. The bound follows the congestion window: what is read further ahead than the path can carry only grows stale, waits
//! before what is more urgent, and hides from the choice of compression what it did. Where packets get lost it is wider, since a frame
//! is held until the last of its packets was sent again. Invariant: nothing is counted twice,
//! and a dropped payload is counted no more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use vmferry_proto::limits::MAX_FRAME_PAYLOAD;

use crate::waits::{LinkWaits, Waiting};

/// Windows held: one under way and one ready behind it, so that the path never waits for a reader.
const WINDOWS: u64 = 2;
/// The same where packets get lost: of a line that loses a hundredth most frames lack a packet, find it out a round trip later, and are
/// held for one more.
const WINDOWS_LOSSY: u64 = 4;
/// One of so many packets lost makes a path one where packets get lost.
const LOSSY: u64 = 500;
/// So many packets are judged together.
const JUDGED: u64 = 4096;
/// Frames held for each worker whatever the window: one at work and one ready.
const FRAMES_PER_WORKER: u64 = 2;
/// Frames held besides: one with the transport and one acknowledged but not yet dropped.
const FRAMES: u64 = 2;
/// A window that grows wakes nobody: who waits looks again after this long.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The count of one connection.
#[derive(Debug)]
pub struct SendBudget {
    least: u64,
    held: Mutex<Held>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Held {
    preparing: u64,
    sent: u64,
    loss: Loss,
}

/// What the transport knows of a path.
#[derive(Debug, Clone, Copy, Default)]
pub struct Path {
    /// Congestion window: bytes that may be under way.
    pub window: u64,
    /// Packets sent since the beginning.
    pub sent: u64,
    /// Those of them that were lost.
    pub lost: u64,
}

/// Whether packets get lost, by the last ones.
#[derive(Debug, Default)]
struct Loss {
    /// Packets sent and lost when the judged ones began.
    before: (u64, u64),
    lossy: bool,
}

/// The answer to one who wants room.
enum Admission {
    /// Counted; whether a whole frame fits besides.
    Granted { more: bool },
    /// No room; whether most of what is held waits for the link.
    Full { of_link: bool },
}

/// Room for a frame that is being read and encoded. Dropping it gives the room back.
#[derive(Debug)]
pub struct Reserved {
    budget: Arc<SendBudget>,
    bytes: u64,
    sent: bool,
}

/// A payload that gives its room back when the transport has let it go.
struct Sent {
    payload: Bytes,
    _room: Reserved,
}

impl AsRef<[u8]> for Sent {
    fn as_ref(&self) -> &[u8] {
        &self.payload
    }
}

impl SendBudget {
    /// For `workers` threads that read and encode at once.
    #[must_use]
    pub fn new(workers: usize) -> Arc<Self> {
        let frames = FRAMES + FRAMES_PER_WORKER * workers as u64;
        Arc::new(Self {
            least: frames * u64::from(MAX_FRAME_PAYLOAD),
            held: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Waits for room for `bytes`, of which there is always some where nothing is held; `path` is asked anew whenever there may be
    /// room: who began to wait when its window was small must not be held to that while others go on with what it has become. While
    /// the link is what it waits for, `waits` is told. Cancel safe.
    pub async fn reserve(
        self: &Arc<Self>,
        bytes: u64,
        path: impl Fn() -> Path,
        waits: &LinkWaits,
    ) -> Reserved {
        let mut waiting: Option<Waiting<'_>> = None;
        loop {
            match self.admit(bytes, path()) {
                Admission::Granted { more } => {
                    // The next in the queue fits too. Where it may not, it is left asleep: what is held wakes it when it is let go.
                    if more {
                        self.freed.notify_one();
                    }
                    break;
                }
                Admission::Full { of_link } => {
                    waiting = of_link.then(|| waiting.unwrap_or_else(|| waits.begin()));
                    // Freed or not, it looks again.
                    let _ = tokio::time::timeout(LOOK_AGAIN, self.freed.notified()).await;
                }
            }
        }
        Reserved {
            budget: self.clone(),
            bytes,
            sent: false,
        }
    }

    /// Counts `bytes` if they fit.
    fn admit(&self, bytes: u64, path: Path) -> Admission {
        let mut held = self.held();
        let most = self.least.max(held.loss.bound(path));
        let all = held.preparing + held.sent;
        if bytes > 0 && all > 0 && all + bytes > most {
            let of_link = held.sent > held.preparing;
            return Admission::Full { of_link };
        }
        held.preparing += bytes;
        let more = all + bytes + u64::from(MAX_FRAME_PAYLOAD) <= most;
        Admission::Granted { more }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Loss {
    /// Bytes that may be held for `path`. Losses tell at once; that there are none, only after a while.
    const fn bound(&mut self, path: Path) -> u64 {
        let sent = path.sent.saturating_sub(self.before.0);
        let lost = path.lost.saturating_sub(self.before.1);
        if sent >= JUDGED {
            self.lossy = lost > sent / LOSSY;
            self.before = (path.sent, path.lost);
        } else if lost > JUDGED / LOSSY {
            self.lossy = true;
        }
        let windows = if self.lossy { WINDOWS_LOSSY } else { WINDOWS };
        path.window.saturating_mul(windows)
    }
}

impl Reserved {
    /// Ties the room to `payload`, which is what was made of the frame: counted by its length until the last copy of it is dropped.
    #[must_use]
    pub fn send(mut self, payload: Bytes) -> Bytes {
        let len = payload.len() as u64;
        {
            let mut held = self.budget.held();
            held.preparing -= self.bytes;
            held.sent += len;
        }
        let shorter = len < self.bytes;
        self.bytes = len;
        self.sent = true;
        if shorter {
            self.budget.freed.notify_one();
        }
        if payload.is_empty() {
            return payload;
        }
        Bytes::from_owner(Sent {
            payload,
            _room: self,
        })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        {
            let mut held = self.budget.held();
            if self.sent {
                held.sent -= self.bytes;
            } else {
                held.preparing -= self.bytes;
            }
        }
        self.budget.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Instant;

    const FRAME: u64 = MAX_FRAME_PAYLOAD as u64;

    /// A path that loses nothing.
    fn clean(window: u64) -> Path {
        Path {
            window,
            ..Path::default()
        }
    }

    async fn fits(budget: &Arc<SendBudget>, bytes: u64, window: u64) -> Option<Reserved> {
        let waits = LinkWaits::default();
        let reserve = budget.reserve(bytes, || clean(window), &waits);
        let answer = tokio::time::timeout(Duration::from_millis(20), reserve).await;
        answer.ok()
    }

    async fn fill(budget: &Arc<SendBudget>, window: u64) -> Vec<Reserved> {
        let mut held = Vec::new();
        while let Some(room) = fits(budget, FRAME, window).await {
            held.push(room);
        }
        held
    }

    #[tokio::test]
    async fn two_windows_are_held_and_never_less_than_the_workers_need() {
        let budget = SendBudget::new(3);
        assert_eq!(fill(&budget, 0).await.len(), 8);
        assert_eq!(fill(&budget, 10 * FRAME).await.len(), 20);
        assert_eq!(budget.pair(), (0, 0), "all given back");
    }

    #[tokio::test]
    async fn who_began_to_wait_when_the_window_was_small_is_let_in_when_it_has_grown() {
        let budget = SendBudget::new(1);
        let window = Arc::new(AtomicU64::new(0));
        let mut held = fill(&budget, 0).await;
        let waiter = {
            let (budget, window) = (budget.clone(), window.clone());
            let now = move || clean(window.load(Ordering::Relaxed));
            tokio::spawn(async move { budget.reserve(FRAME, now, &LinkWaits::default()).await })
        };
        tokio::task::yield_now().await;
        window.store(10 * FRAME, Ordering::Relaxed);
        // Others have taken more meanwhile: there never is room again by what the window was.
        held.extend(fill(&budget, 5 * FRAME).await);
        held.pop();
        let room = tokio::time::timeout(Duration::from_secs(10), waiter)
            .await
            .expect("it is let in")
            .unwrap();
        assert_eq!(room.bytes, FRAME);
    }

    #[tokio::test]
    async fn who_waits_is_let_in_when_the_window_grows_though_nothing_was_freed() {
        let budget = SendBudget::new(1);
        let _held = fill(&budget, 0).await;
        let began = Instant::now();
        let grows = || clean(10 * FRAME * u64::from(began.elapsed() > LOOK_AGAIN / 2));
        let waits = LinkWaits::default();
        let reserve = budget.reserve(FRAME, grows, &waits);
        tokio::time::timeout(Duration::from_secs(10), reserve)
            .await
            .expect("it is let in");
    }

    #[test]
    fn more_is_held_while_packets_get_lost() {
        let mut loss = Loss::default();
        let mut windows = |sent, lost| {
            let window = 1000;
            loss.bound(Path { window, sent, lost }) / window
        };
        assert_eq!(windows(100, 1), WINDOWS);
        assert_eq!(windows(1000, 10), WINDOWS_LOSSY, "seen at once");
        assert_eq!(windows(5000, 50), WINDOWS_LOSSY);
        assert_eq!(windows(9000, 51), WINDOWS_LOSSY, "not over yet");
        assert_eq!(windows(10_000, 52), WINDOWS, "two of the last 5000");
        assert_eq!(windows(10_001, 52), WINDOWS);
    }

    #[tokio::test]
    async fn a_payload_is_counted_by_its_length_until_its_last_copy_is_dropped() {
        let budget = SendBudget::new(1);
        let mut held = fill(&budget, 0).await;
        let payload = held.pop().unwrap().send(Bytes::from(vec![7; 1000]));
        assert_eq!(budget.pair(), (3 * FRAME, 1000));
        let copy = payload.slice(10..20);
        drop(payload);
        assert!(fits(&budget, FRAME, 0).await.is_none());
        assert!(fits(&budget, FRAME - 1000, 0).await.is_some());
        drop(copy);
        assert!(fits(&budget, FRAME, 0).await.is_some());
    }

    #[tokio::test]
    async fn zero_blocks_wait_for_nobody_and_nobody_for_ever() {
        let budget = SendBudget::new(1);
        let held = fill(&budget, 0).await;
        assert!(fits(&budget, 0, 0).await.is_some());
        drop(held);
        let waits = LinkWaits::default();
        let large = budget.reserve(100 * FRAME, Path::default, &waits).await;
        assert!(fits(&budget, 1, 0).await.is_none());
        assert!(large.send(Bytes::new()).is_empty());
        assert!(fits(&budget, FRAME, 0).await.is_some());
    }

    #[tokio::test]
    async fn the_link_was_waited_for_where_it_holds_most() {
        let budget = SendBudget::new(1);
        let mut held = fill(&budget, 0).await;
        let waiter = |budget: &Arc<SendBudget>| {
            let budget = budget.clone();
            tokio::spawn(async move {
                let waits = LinkWaits::default();
                drop(budget.reserve(FRAME, Path::default, &waits).await);
                waits.total()
            })
        };
        let encoders = waiter(&budget);
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(held.pop());
        assert_eq!(encoders.await.unwrap(), Duration::ZERO);
        let bytes = Bytes::from(vec![7; MAX_FRAME_PAYLOAD as usize]);
        let mut sent: Vec<Bytes> = Vec::new();
        for room in held {
            sent.push(room.send(bytes.clone()));
        }
        sent.push(fits(&budget, FRAME, 0).await.unwrap().send(bytes));
        let link = waiter(&budget);
        tokio::time::sleep(Duration::from_millis(20)).await;
        drop(sent);
        assert!(link.await.unwrap() >= Duration::from_millis(10));
    }

    impl SendBudget {
        fn pair(&self) -> (u64, u64) {
            let held = self.held();
            (held.preparing, held.sent)
        }
    }
}
