//! The controller on a simulated link: quinn's own state machines at both ends, in simulated time, seeded.
//!
//! Everything between two applications is quinn's (pacing, acknowledgements, loss detection, flow control with the transport
//! settings of the agents); only the wire and the clock are not real. The other flow is quinn's Cubic behind the same trait.
#![allow(
    clippy::unwrap_used,
    clippy::cast_precision_loss,
    reason = "figures of tests"
)]

mod flow;
mod link;
mod world;

use std::time::Duration;

use self::link::LinkPlan;
use self::world::{World, ceiling};
use super::Congestion::{Cubic, Model};
use crate::endpoint::MAX_MTU;

const ENDLESS: u64 = 1 << 50;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// What one flow of ours makes of a link.
#[derive(Debug)]
struct Alone {
    /// Of the payload's ceiling, the best of the first ten round trips after the handshake; at least 20 ms are looked at,
    /// since timers are coarser than a short round trip.
    early: f64,
    /// The same over what follows.
    steady: f64,
    /// Mean wait in the queue then.
    wait: Duration,
}

fn alone(plan: LinkPlan) -> Alone {
    let (rtt, top) = (plan.rtt, ceiling(plan.rate) as f64);
    let mut world = World::new(plan);
    world.add(Model, ENDLESS);
    world.run(rtt);
    let trips = (0..10).map(|_| world.rates(rtt.max(ms(2)))[0]);
    let early = trips.max().unwrap() as f64 / top;
    world.run(rtt * 10);
    world.link.take_mean_wait();
    let steady = world.rates((rtt * 10).max(ms(600)))[0] as f64 / top;
    let wait = world.link.take_mean_wait();
    let result = Alone {
        early,
        steady,
        wait,
    };
    println!("{result:?}");
    result
}

/// `mbit`, RTT in µs, loss in parts of a million, and what share of the ceiling is asked for.
fn fills(mbit: u64, rtt_us: u64, loss_ppm: u64, steady: f64) {
    let rtt = Duration::from_micros(rtt_us);
    let plan = LinkPlan {
        loss_ppm,
        ..LinkPlan::new(mbit, rtt, 100)
    };
    let got = alone(plan);
    assert!(got.steady >= steady, "{got:?}");
    assert!(got.early >= 0.9 * got.steady, "{got:?}");
    assert!(got.wait <= rtt / 5 + ms(3), "{got:?}");
}

#[test]
fn fills_100_mbit_at_any_distance() {
    fills(100, 200, 0, 0.95);
    fills(100, 20_000, 0, 0.95);
    fills(100, 80_000, 0, 0.95);
}

#[test]
fn fills_100_mbit_under_loss() {
    fills(100, 20_000, 1_000, 0.92);
    fills(100, 80_000, 1_000, 0.92);
    fills(100, 200, 10_000, 0.88);
    fills(100, 80_000, 10_000, 0.88);
}

#[test]
fn fills_1_gbit_at_any_distance() {
    fills(1000, 200, 0, 0.95);
    fills(1000, 20_000, 0, 0.95);
    fills(1000, 80_000, 0, 0.95);
}

#[test]
fn fills_1_gbit_under_loss() {
    fills(1000, 20_000, 1_000, 0.92);
    fills(1000, 80_000, 10_000, 0.88);
}

#[test]
fn a_busy_host_that_looks_now_and_then_does_not_slow_it_down() {
    let plan = LinkPlan {
        grain: ms(5),
        ..LinkPlan::new(1000, Duration::from_micros(200), 10_000)
    };
    let mut world = World::new(plan);
    world.add(Model, ENDLESS);
    world.run(ms(1000));
    let rate = world.rates(ms(1000))[0] as f64 / ceiling(world.link.plan.rate) as f64;
    println!("{rate:.3} of the line");
    assert!(rate >= 0.9, "{rate}");
}

/// The least share of the line, of some runs of a second after ten round trips.
fn least_share(plans: impl Iterator<Item = LinkPlan>) -> f64 {
    let share = |plan: LinkPlan| {
        let (rtt, top) = (plan.rtt, ceiling(plan.rate) as f64);
        let mut world = World::new(plan);
        world.add(Model, ENDLESS);
        world.run(rtt * 10);
        world.rates(ms(1000))[0] as f64 / top
    };
    let least = plans.map(share).min_by(f64::total_cmp).unwrap();
    println!("{least:.3} of the line at least");
    least
}

/// Round trips that vary by the host's pauses are neither others' queue nor a slower path, also where start-up runs over.
#[test]
fn a_host_of_coarse_timers_is_not_taken_for_a_shared_line() {
    for (mbit, grain_us, least) in [
        (1000, 1000, 0.95),
        (1000, 2500, 0.9),
        (100, 1000, 0.95),
        (100, 2500, 0.9),
    ] {
        let plans = (1..=6).map(|seed| LinkPlan {
            grain: Duration::from_micros(grain_us),
            loss_ppm: 1_000,
            seed,
            ..LinkPlan::new(mbit, Duration::from_micros(20_000 + 74 * seed), 100)
        });
        let got = least_share(plans);
        assert!(got >= least, "{mbit} Mbit/s, {grain_us} µs: {got}");
    }
}

#[test]
fn a_round_trip_that_is_read_too_short_now_and_then_does_not_slow_it_down() {
    let plans = (1..=6).map(|seed| LinkPlan {
        early_ppm: 20,
        seed,
        ..LinkPlan::new(1000, ms(20), 100)
    });
    let got = least_share(plans);
    assert!(got >= 0.95, "{got}");
}

#[test]
fn a_busy_host_on_a_fast_cable_is_soon_at_its_rate() {
    for (mbit, grain) in [(1000, 5), (5000, 4), (10_000, 4)] {
        let plan = LinkPlan {
            grain: ms(grain),
            mtu: MAX_MTU,
            ..LinkPlan::new(mbit, Duration::from_micros(130), 100_000)
        };
        let mut world = World::new(plan);
        world.add(Model, ENDLESS);
        world.run(ms(40));
        let rate = world.rates(ms(20))[0] as f64 / ceiling(world.link.plan.rate) as f64;
        println!("{mbit} Mbit/s: {rate:.3} of the line after 40 ms");
        assert!(rate >= 0.9, "{mbit}: {rate}");
    }
}

#[test]
fn a_short_queue_is_not_flooded() {
    let mut world = World::new(LinkPlan::new(100, ms(40), 10));
    world.add(Model, ENDLESS);
    world.run(ms(2000));
    let before = (world.link.overflowed, world.sent(0));
    let rate = world.rates(ms(3000))[0] as f64 / ceiling(world.link.plan.rate) as f64;
    let lost = (world.link.overflowed - before.0) as f64 / (world.sent(0) - before.1) as f64;
    println!("{rate:.3} of the line, {lost:.4} lost");
    assert!(rate >= 0.9 && lost <= 0.03, "{rate} {lost}");
}

#[test]
fn a_path_that_becomes_faster_or_slower_is_followed() {
    let mut world = World::new(LinkPlan::new(50, ms(40), 400));
    world.add(Model, ENDLESS);
    world.run(ms(2000));
    for mbit in [200, 50] {
        world.set_rate(mbit);
        world.run(ms(2000));
        world.link.take_mean_wait();
        let rate = world.rates(ms(1000))[0] as f64 / ceiling(mbit * 125_000) as f64;
        let wait = world.link.take_mean_wait();
        println!("{mbit} Mbit/s: {rate:.3} of the line, {wait:?} in the queue");
        assert!(rate >= 0.9, "{mbit}: {rate}");
        assert!(wait <= ms(20), "{mbit}: {wait:?}");
    }
}

/// Sends `bytes` at once and returns how long that took, as a multiple of what the line and half a round trip need.
fn flight(world: &mut World, bytes: u64) -> f64 {
    let (rate, rtt) = (world.link.plan.rate, world.link.plan.rtt);
    let target = world.received(0) + world.flows[0][0].backlog + bytes;
    world.give(0, bytes);
    let took = world.run_to(0, target, ms(20_000)).unwrap();
    let least = bytes as f64 / ceiling(rate) as f64 + rtt.as_secs_f64() / 2.0;
    took.as_secs_f64() / least
}

#[test]
fn the_last_flight_after_an_idle_time_is_warm() {
    let mut world = World::new(LinkPlan::new(200, ms(40), 100));
    world.add(Model, 40_000_000);
    world.run(ms(30_000));
    let warm = flight(&mut world, 5_000_000);
    world.run(ms(20_000));
    let again = flight(&mut world, 5_000_000);
    println!("{warm:.2} and {again:.2} of the least time");
    assert!(warm <= 1.25 && again <= 1.25, "{warm} {again}");
}

#[test]
fn sending_little_for_long_does_not_cool_the_model() {
    let mut world = World::new(LinkPlan::new(200, ms(40), 100));
    world.add(Model, 40_000_000);
    world.run(ms(3000));
    // A quarter of the line for 15 s, in the pieces that a slow guest makes.
    for _ in 0..150 {
        world.give(0, 600_000);
        world.run(ms(100));
    }
    let warm = flight(&mut world, 5_000_000);
    println!("{warm:.2} of the least time");
    assert!(warm <= 1.25, "{warm}");
}

#[test]
fn bursts_of_loss_pass() {
    let bursts = vec![
        (ms(2000)..ms(2100), 400_000),
        (ms(4000)..ms(5500), 1_000_000),
    ];
    let plan = LinkPlan {
        bursts,
        ..LinkPlan::new(100, ms(40), 100)
    };
    let top = ceiling(plan.rate) as f64;
    let mut world = World::new(plan);
    world.add(Model, ENDLESS);
    world.run(ms(2300));
    let after_burst = world.rates(ms(1000))[0] as f64 / top;
    // The probes of a silent line are far apart: the first after its return comes within some seconds.
    world.run(ms(4700));
    let after_cut = world.rates(ms(1000))[0] as f64 / top;
    println!("{after_burst:.3} after a burst, {after_cut:.3} after a cut");
    assert!(
        after_burst >= 0.85 && after_cut >= 0.85,
        "{after_burst} {after_cut}"
    );
}

#[test]
fn packets_that_overtake_do_not_slow_it_down() {
    let plan = LinkPlan {
        reorder_ppm: 20_000,
        ..LinkPlan::new(100, ms(20), 100)
    };
    let got = alone(plan);
    assert!(got.steady >= 0.88, "{got:?}");
}

/// Our part of the line in the seconds 10 to 15 beside another flow, where the second comes three seconds after the first.
fn beside(other: super::Congestion, rtt: u64, queue: u64, ours_first: bool) -> f64 {
    beside_after(3000, other, rtt, queue, ours_first)
}

/// The same, where the second comes after so many milliseconds.
fn beside_after(
    head_start: u64,
    other: super::Congestion,
    rtt: u64,
    queue: u64,
    ours_first: bool,
) -> f64 {
    let mut world = World::new(LinkPlan::new(100, ms(rtt), queue));
    let (first, second) = if ours_first {
        (Model, other)
    } else {
        (other, Model)
    };
    world.add(first, ENDLESS);
    world.run(ms(head_start));
    world.add(second, ENDLESS);
    world.run(ms(10_000));
    let rates = world.rates(ms(5000));
    let all: u64 = rates.iter().sum();
    let part = rates[usize::from(!ours_first)] as f64 / all as f64;
    let full = all as f64 / ceiling(world.link.plan.rate) as f64;
    println!(
        "queue {queue} %, ours first {ours_first}: {part:.2} of the line, which is {full:.2} full"
    );
    assert!(full >= 0.95, "{full}");
    part
}

#[test]
fn a_cubic_flow_that_comes_later_gets_its_part() {
    for queue in [50, 100, 200] {
        let part = beside(Cubic, 20, queue, true);
        assert!((0.3..=0.7).contains(&part), "queue {queue} %: {part}");
    }
}

#[test]
fn beside_a_cubic_flow_that_is_there_already_it_gets_its_part() {
    for queue in [50, 100, 200] {
        let part = beside(Cubic, 20, queue, false);
        assert!((0.3..=0.7).contains(&part), "queue {queue} %: {part}");
    }
}

/// Also where its first packets come while the queue runs over.
#[test]
fn far_off_it_gets_its_part_whenever_it_comes() {
    for queue in [150, 200] {
        for head_start in [2000, 2900, 3800, 5600] {
            let part = beside_after(head_start, Cubic, 80, queue, false);
            assert!(
                (0.3..=0.7).contains(&part),
                "queue {queue} %, after {head_start} ms: {part}"
            );
        }
    }
}

#[test]
fn two_of_ours_share() {
    for queue in [50, 200] {
        let part = beside(Model, 20, queue, true);
        assert!((0.4..=0.6).contains(&part), "queue {queue} %: {part}");
    }
}
