//! When a packet that is offered to a link comes out of it, or why it does not.
//!
//! Pure: the time is an argument, losses come from a seed. One [`Schedule`] is one direction: a drop-tail queue in front
//! of a line of fixed rate, then a delay, then random loss. A lost packet took its time on the line, as on a real one.
//! Rate and queue are not simulated packet by packet: the time until which the line is busy says both (a virtual clock).

use std::time::Duration;

/// How far the line may be idle in the past and still make up for it: the relay is woken late, the sender was not.
/// Any stretch of time carries at most the rate times (stretch + this).
pub const CREDIT: Duration = Duration::from_millis(1);

/// What one direction of a link is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Bits per second, headers from IP on included.
    pub rate: u64,
    /// From the end of sending to arrival.
    pub delay: Duration,
    /// Share of packets that are lost at random.
    pub loss: f64,
    /// Bytes that may wait; what comes on top is dropped.
    pub queue: u64,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It arrives at this time.
    Arrives(Duration),
    /// It took its turn on the line and did not arrive.
    Lost,
    /// The queue had no room for it.
    NoRoom,
}

/// One direction of a link.
#[derive(Debug, Clone)]
pub struct Schedule {
    shape: Shape,
    busy_until: Duration,
    chance: fastrand::Rng,
}

impl Schedule {
    /// An idle direction; equal seeds lose the same packets.
    #[must_use]
    pub fn new(shape: Shape, seed: u64) -> Self {
        Self {
            shape,
            busy_until: Duration::ZERO,
            chance: fastrand::Rng::with_seed(seed),
        }
    }

    /// A packet of `bytes` is offered at `now`; calls must come in the order of time.
    pub fn offer(&mut self, now: Duration, bytes: usize) -> Fate {
        let bytes = bytes as u64;
        if self.waiting(now) + bytes > self.shape.queue {
            return Fate::NoRoom;
        }
        let free = self.busy_until.max(now.saturating_sub(CREDIT));
        self.busy_until = free + self.time_on_line(bytes);
        if self.chance.f64() < self.shape.loss {
            return Fate::Lost;
        }
        Fate::Arrives(self.busy_until.max(now) + self.shape.delay)
    }

    /// Bytes that are yet to go out.
    fn waiting(&self, now: Duration) -> u64 {
        let busy = self.busy_until.saturating_sub(now).as_nanos();
        let bytes = busy * u128::from(self.shape.rate) / 8 / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    fn time_on_line(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 8 * 1_000_000_000 / u128::from(self.shape.rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: usize = 1500;
    const MBIT: u64 = 1_000_000;

    fn shape() -> Shape {
        Shape {
            rate: 12 * MBIT,
            delay: Duration::from_millis(10),
            loss: 0.0,
            queue: 15_000,
        }
    }

    fn at(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn a_lone_packet_arrives_after_the_delay_once_it_is_out() {
        let mut line = Schedule::new(shape(), 1);
        // 1,500 bytes take a millisecond, and the idle line makes up for one.
        assert_eq!(line.offer(at(100), MTU), Fate::Arrives(at(110)));
        assert_eq!(line.offer(at(100), MTU), Fate::Arrives(at(111)));
        assert_eq!(line.offer(at(100), MTU), Fate::Arrives(at(112)));
    }

    #[test]
    fn what_waits_goes_out_at_the_rate_and_what_does_not_fit_is_dropped() {
        let mut line = Schedule::new(shape(), 1);
        let fates: Vec<Fate> = (0..20).map(|_| line.offer(at(0), MTU)).collect();
        let room = fates.iter().filter(|fate| **fate != Fate::NoRoom).count();
        assert_eq!(room, 10);
        assert_eq!(fates[9], Fate::Arrives(at(20)));
        assert_eq!(line.offer(at(5), MTU), Fate::Arrives(at(21)));
    }

    #[test]
    fn an_idle_line_saves_up_no_more_than_its_credit() {
        let mut line = Schedule::new(shape(), 1);
        line.offer(at(0), MTU);
        let mut last = Duration::ZERO;
        for _ in 0..10 {
            if let Fate::Arrives(time) = line.offer(at(1000), MTU) {
                last = last.max(time);
            }
        }
        assert_eq!(last, at(1000 + 10 + 9));
    }

    #[test]
    fn a_loaded_line_carries_its_rate_whenever_it_is_asked() {
        let mut line = Schedule::new(shape(), 1);
        let (mut now, mut carried) = (Duration::ZERO, 0);
        let end = Duration::from_secs(10);
        while now < end {
            // More than fits, at uneven times.
            for _ in 0..4 {
                if line.offer(now, MTU) != Fate::NoRoom {
                    carried += MTU;
                }
            }
            now += Duration::from_micros(900 + 700 * (carried as u64 % 3));
        }
        let share = carried as f64 / (12e6 / 8.0 * 10.0);
        assert!((0.999..1.01).contains(&share), "{share}");
    }

    #[test]
    fn losses_are_as_many_as_set_and_come_from_the_seed() {
        let lossy = Shape {
            loss: 0.01,
            queue: u64::MAX / 2,
            ..shape()
        };
        let run = |seed| {
            let mut line = Schedule::new(lossy, seed);
            (0..100_000)
                .map(|_| line.offer(at(0), MTU) == Fate::Lost)
                .collect::<Vec<bool>>()
        };
        let lost = run(7).iter().filter(|lost| **lost).count();
        assert!((900..1100).contains(&lost), "{lost}");
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn a_lost_packet_takes_its_time_on_the_line() {
        let mut line = Schedule::new(
            Shape {
                loss: 1.0,
                ..shape()
            },
            1,
        );
        for _ in 0..10 {
            assert_eq!(line.offer(at(0), MTU), Fate::Lost);
        }
        assert_eq!(line.offer(at(0), MTU), Fate::NoRoom);
    }

    #[test]
    fn arrivals_never_overtake() {
        let mut line = Schedule::new(shape(), 3);
        let (mut now, mut last) = (Duration::ZERO, Duration::ZERO);
        for step in 0..10_000_u64 {
            now += Duration::from_micros(step * 37 % 2_500);
            if let Fate::Arrives(time) = line.offer(now, 60 + (step * 131 % 1441) as usize) {
                assert!(time >= last);
                last = time;
            }
        }
    }
}
