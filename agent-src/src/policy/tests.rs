//! The policy against tables of situations and against simulated guests.

use std::time::Duration;

use proptest::prelude::*;
use vmferry_common::units::Rate;
use vmferry_proto::error::ErrorCode;

use super::{
    Cutover, Decision, FixedCosts, Flight, GiveUp, Left, Limits, OnStall, PredictedDowntime,
    RoundStats, Situation, bytes_in, decide, goodput, predict,
};

const MIB: u64 = 1 << 20;
const LINK: Rate = Rate(100 * MIB);

const NO_COSTS: FixedCosts = FixedCosts {
    pause: Duration::ZERO,
    barrier: Duration::ZERO,
    final_scan: Duration::ZERO,
    state_save: Duration::ZERO,
    state_load: Duration::ZERO,
    round_trips: Duration::ZERO,
    journal: Duration::ZERO,
    hooks: Duration::ZERO,
    verify: Duration::ZERO,
};

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn limits() -> Limits {
    Limits {
        max_downtime: ms(300),
        pause_timeout: None,
        timeout: Duration::from_secs(3600),
        on_stall: OnStall::Abort,
        cutover: Cutover::Auto,
    }
}

/// Rounds over a link of 100 MiB/s: the first sends `first` MiB, each later one what was left; `left` MiB after each.
fn rounds(first: u64, left: &[u64]) -> Vec<RoundStats> {
    let mut sent = first;
    let mut all = Vec::new();
    for (number, left) in (1..).zip(left) {
        all.push(RoundStats {
            number,
            elapsed: LINK.time_for(sent * MIB),
            idle: Duration::ZERO,
            raw_bytes_sent: sent * MIB,
            zero_bytes: 0,
            wire_bytes: sent * MIB,
            dirtied_bytes: left * MIB,
            left_bytes: left * MIB,
        });
        sent = *left;
    }
    all
}

fn situation(rounds: &[RoundStats]) -> Situation<'_> {
    Situation {
        rounds,
        evidence_after: 0,
        left: Left {
            memory: rounds.last().map_or(1 << 30, |round| round.left_bytes),
            disk: 0,
        },
        last_flight: None,
        fixed: NO_COSTS,
        limits: limits(),
        elapsed: rounds.iter().fold(Duration::ZERO, |sum, round| {
            sum.saturating_add(round.elapsed)
        }),
        triggered: false,
        guest_runs: true,
    }
}

/// One word per decision, for tables.
fn word(decision: &Decision) -> &'static str {
    match decision {
        Decision::Continue { warning: None, .. } => "continue",
        Decision::Continue {
            warning: Some(_), ..
        } => "warn",
        Decision::AwaitTrigger { .. } => "await",
        Decision::CutOver { .. } => "cut",
        Decision::ForceCutOver { .. } => "force",
        Decision::GiveUp(GiveUp::NotConverging(_)) => "stall",
        Decision::GiveUp(GiveUp::FixedCosts { .. }) => "fixed",
        Decision::GiveUp(GiveUp::ForcedPauseTooLong { .. }) => "too-long",
        Decision::GiveUp(GiveUp::TimedOut { .. }) => "timeout",
    }
}

/// The decision after each of these rounds, up to the first that ends the copy.
fn story(first: u64, left: &[u64]) -> String {
    let rounds = rounds(first, left);
    let mut words = Vec::new();
    for count in 1..=rounds.len() {
        let decision = decide(&situation(&rounds[..count]));
        words.push(word(&decision));
        if !matches!(decision, Decision::Continue { .. }) {
            break;
        }
    }
    words.join(" ")
}

#[test]
fn what_is_left_round_by_round_decides() {
    // 300 ms at 100 MiB/s are 30 MiB.
    for (name, left, expected) in [
        ("idle", &[0_u64][..], "cut"),
        ("fits after one round", &[30], "cut"),
        ("just does not fit", &[31], "continue"),
        (
            "halves",
            &[400, 200, 100, 50, 25],
            "continue continue continue continue cut",
        ),
        (
            "faster than the link",
            &[900, 900, 900],
            "continue warn stall",
        ),
        (
            "hot working set that is too large",
            &[200, 200, 200],
            "continue warn stall",
        ),
        ("hot working set that fits", &[25, 25, 25], "cut"),
        ("grows", &[100, 150, 250], "continue warn stall"),
        (
            "shrinks by a twentieth only",
            &[400, 380, 361],
            "continue warn stall",
        ),
        (
            "shrinks by a fifth",
            &[100, 80, 64, 51, 41, 33, 26],
            "continue continue continue continue continue continue cut",
        ),
        (
            "one burst",
            &[200, 100, 180, 120, 60, 29],
            "continue continue warn warn continue cut",
        ),
        (
            "stalls later",
            &[400, 200, 190, 195, 200],
            "continue continue warn warn stall",
        ),
        (
            "swings",
            &[100, 60, 95, 62, 90],
            "continue continue warn warn stall",
        ),
    ] {
        assert_eq!(story(1000, left), expected, "{name}");
    }
}

#[test]
fn a_guest_faster_than_the_link_is_recognised_at_the_third_round_with_numbers() {
    let rounds = rounds(1000, &[900, 900, 900]);
    let Decision::GiveUp(reason) = decide(&situation(&rounds)) else {
        panic!("not given up");
    };
    assert_eq!(reason.code(), ErrorCode::NotConverging);
    assert_eq!(
        reason.to_string(),
        "the guest does not converge: after 3 rounds 900 MiB are left and no longer shrink: the guest dirties 839 Mbit/s \
         and 839 Mbit/s get across, so a cutover now would take 9 s (transfer 9 s), and --max-downtime is 300 ms; try \
         again when it is less busy, with --max-downtime 12s or more, or with --on-stall force"
    );
}

#[test]
fn a_hiccup_of_the_link_is_not_held_against_the_guest() {
    let mut rounds = rounds(1000, &[100, 110, 105, 100]);
    // The link carried next to nothing for two rounds, in which the guest dirtied little per second.
    for round in &mut rounds[1..3] {
        round.elapsed = Duration::from_secs(20);
        round.idle = Duration::from_secs(18);
    }
    for count in 2..=3 {
        let decision = decide(&situation(&rounds[..count]));
        assert_eq!(word(&decision), "continue", "after round {count}");
    }
}

#[test]
fn evidence_before_a_trigger_or_a_lost_link_does_not_count() {
    let rounds = rounds(1000, &[400, 200, 200, 200, 200]);
    let mut now = situation(&rounds[..5]);
    assert_eq!(word(&decide(&now)), "stall");
    now.evidence_after = 2;
    assert_eq!(
        word(&decide(&now)),
        "stall",
        "three rounds are evidence enough"
    );
    now.evidence_after = 3;
    assert_eq!(word(&decide(&now)), "warn");
    now.evidence_after = 4;
    assert_eq!(word(&decide(&now)), "continue");
}

#[test]
fn force_moves_what_abort_gives_up_unless_the_pause_is_bounded() {
    let rounds = rounds(1000, &[200, 200, 200]);
    let mut now = situation(&rounds);
    now.limits.on_stall = OnStall::Force;
    let Decision::ForceCutOver { predicted, stall } = decide(&now) else {
        panic!("not forced");
    };
    assert_eq!(predicted.total(), ms(2000));
    assert_eq!(stall.rounds, 3);
    assert_eq!(now.limits.pause_limit(predicted.total()), ms(6000));
    now.limits.pause_timeout = Some(ms(1900));
    assert_eq!(word(&decide(&now)), "too-long");
    now.limits.pause_timeout = Some(ms(2000));
    assert_eq!(word(&decide(&now)), "force");
}

#[test]
fn fixed_costs_count_and_are_named_when_they_alone_are_too_much() {
    let rounds = rounds(1000, &[20]);
    let mut now = situation(&rounds);
    assert_eq!(word(&decide(&now)), "cut", "200 ms fit into 300 ms");
    now.fixed.state_load = ms(101);
    assert_eq!(word(&decide(&now)), "continue", "301 ms do not");
    now.fixed.verify = ms(250);
    let decision = decide(&now);
    assert_eq!(word(&decision), "fixed");
    let Decision::GiveUp(reason) = decision else {
        panic!("not given up");
    };
    assert_eq!(
        reason.to_string(),
        "the cutover takes 351 ms besides sending what is left (verify 250 ms, state load 101 ms), and --max-downtime is \
         300 ms; use --max-downtime 690ms or more"
    );
}

#[test]
fn force_with_too_high_fixed_costs_moves_once_rounds_gain_nothing() {
    let rounds = rounds(1000, &[200, 30, 3]);
    let mut words = Vec::new();
    for count in 1..=3 {
        let mut now = situation(&rounds[..count]);
        now.limits.on_stall = OnStall::Force;
        now.fixed.verify = ms(400);
        words.push(word(&decide(&now)));
    }
    assert_eq!(words, ["continue", "continue", "force"]);
}

#[test]
fn manual_waits_converged_and_moves_when_triggered() {
    let rounds = rounds(1000, &[100, 10]);
    let mut now = situation(&rounds);
    now.limits.cutover = Cutover::Manual;
    let Decision::AwaitTrigger {
        predicted,
        recheck_after,
    } = decide(&now)
    else {
        panic!("does not wait");
    };
    assert_eq!(predicted.total(), ms(100));
    // 200 ms are spare, half of that is 10 MiB, and the guest dirties 10 MiB per second.
    assert_eq!(recheck_after, Duration::from_secs(1));
    now.triggered = true;
    assert_eq!(word(&decide(&now)), "cut");
}

#[test]
fn the_wait_between_two_looks_is_bounded() {
    let mut rounds = rounds(1000, &[30]);
    for (dirtied, expected) in [
        (0, Duration::from_secs(5)),
        (u64::MAX, ms(100)),
        (MIB, Duration::from_secs(5)),
    ] {
        rounds[0].dirtied_bytes = dirtied;
        let mut now = situation(&rounds);
        now.limits.cutover = Cutover::Manual;
        now.left.memory = 10 * MIB;
        let Decision::AwaitTrigger { recheck_after, .. } = decide(&now) else {
            panic!("does not wait");
        };
        assert_eq!(recheck_after, expected, "{dirtied} bytes dirtied");
    }
}

#[test]
fn a_burst_while_waiting_for_the_trigger_is_sat_out() {
    let rounds = rounds(1000, &[100, 20, 200, 200, 200, 200]);
    let mut now = situation(&rounds);
    now.limits.cutover = Cutover::Manual;
    assert_eq!(word(&decide(&now)), "warn", "it was converged once");
    now.triggered = true;
    assert_eq!(word(&decide(&now)), "stall");
    now.evidence_after = 6;
    assert_eq!(word(&decide(&now)), "continue", "the trigger starts afresh");
}

#[test]
fn a_manual_guest_that_never_converged_is_given_up_like_any_other() {
    let rounds = rounds(1000, &[200, 200, 200]);
    let mut now = situation(&rounds);
    now.limits.cutover = Cutover::Manual;
    assert_eq!(word(&decide(&now)), "stall");
}

#[test]
fn the_timeout_ends_everything_and_says_whether_the_guest_was_ready() {
    for (cutover, left, on_stall, ready) in [
        (Cutover::Auto, 900, OnStall::Abort, false),
        (Cutover::Auto, 900, OnStall::Force, false),
        (Cutover::Manual, 900, OnStall::Abort, false),
        (Cutover::Manual, 10, OnStall::Abort, true),
    ] {
        let rounds = rounds(1000, &[left]);
        let mut now = situation(&rounds);
        now.limits.cutover = cutover;
        now.limits.on_stall = on_stall;
        now.elapsed = now.limits.timeout;
        let Decision::GiveUp(reason) = decide(&now) else {
            panic!("goes on");
        };
        assert_eq!(reason.code(), ErrorCode::TimedOut);
        let text = reason.to_string();
        assert_eq!(text.contains("the guest was ready"), ready, "{text}");
        assert_eq!(text.contains("900 MiB left"), left == 900, "{text}");
    }
}

#[test]
fn a_paused_guest_needs_one_round_and_has_no_downtime_to_lose() {
    let rounds = rounds(1000, &[0]);
    let mut now = situation(&rounds);
    now.guest_runs = false;
    now.fixed.verify = Duration::from_secs(10);
    assert_eq!(word(&decide(&now)), "cut");
    now.rounds = &[];
    assert_eq!(word(&decide(&now)), "continue");
}

#[test]
fn nothing_is_decided_before_the_first_round() {
    let now = situation(&[]);
    assert_eq!(
        decide(&now),
        Decision::Continue {
            predicted: None,
            warning: None
        }
    );
}

#[test]
fn goodput_is_of_the_last_rounds_and_without_zeros() {
    assert_eq!(goodput(&[], None), None);
    let mut two = rounds(1000, &[500, 100]);
    assert_eq!(goodput(&two, None), Some(LINK));
    two[1].elapsed *= 2;
    assert_eq!(
        goodput(&two, None),
        Some(Rate(50 * MIB)),
        "the last 32 MiB count"
    );
    two[1].idle = two[1].elapsed / 2;
    assert_eq!(goodput(&two, None), Some(LINK), "idle time does not");
    two[1].zero_bytes = 250 * MIB;
    assert_eq!(goodput(&two, None), Some(Rate(50 * MIB)), "zeros do not");
}

#[test]
fn a_tiny_last_round_says_nothing_of_the_link() {
    let mut two = rounds(1000, &[1, 0]);
    two[1].elapsed = ms(100);
    let rate = goodput(&two, None).unwrap();
    assert!(rate.0 > LINK.0 * 98 / 100, "{rate}");
}

#[test]
fn a_sparse_guest_is_not_judged_by_the_time_its_zeros_took() {
    // 64 GiB of zeros took 13 s beside 100 MiB of data; then 10 MiB a round at 1 GiB/s, again and again.
    let mut all = rounds(100, &[10, 10]);
    all[0].raw_bytes_sent = 64 << 30;
    all[0].zero_bytes = (64 << 30) - 100 * MIB;
    all[0].elapsed = Duration::from_secs(13);
    all[1].elapsed = ms(10);
    assert_eq!(word(&decide(&situation(&all[..1]))), "continue");
    assert_eq!(goodput(&all, None), Some(Rate(1000 * MIB)));
    assert_eq!(word(&decide(&situation(&all))), "cut");
}

#[test]
fn what_is_dirtied_until_the_pause_counts_unless_it_is_hot() {
    // Ten seconds of the guest: 200 MiB, so 20 MiB per second.
    let grows = rounds(1000, &[200, 40, 8]);
    let mut now = situation(&grows);
    now.fixed.round_trips = FixedCosts::round_trips_at(ms(70));
    now.fixed.journal = ms(10);
    let transfer = |now: &Situation<'_>| predict(now).unwrap().transfer;
    assert_eq!(
        transfer(&now),
        LINK.time_for(8 * MIB + 20 * MIB * 80 / 1000)
    );
    // A working set of 20 MiB that is written all the time was 20 MiB after ten seconds, too.
    let hot = rounds(1000, &[20, 20]);
    now.rounds = &hot;
    now.left.memory = 20 * MIB;
    assert_eq!(transfer(&now), ms(200));
    now.rounds = &[];
    assert_eq!(predict(&now), None);
}

#[test]
fn a_last_flight_can_only_lower_the_goodput_and_only_if_it_is_long_enough() {
    let two = rounds(1000, &[500, 100]);
    for (mib, expected) in [(1, 100), (3, 100), (4, 4), (50, 50), (400, 100)] {
        let flight = Flight {
            bytes: mib * MIB,
            elapsed: Duration::from_secs(1),
        };
        assert_eq!(
            goodput(&two, Some(flight)),
            Some(Rate(expected * MIB)),
            "{mib} MiB"
        );
    }
}

#[test]
fn a_guest_of_zeros_gets_a_careful_goodput_and_still_converges() {
    let mut one = rounds(1000, &[1]);
    one[0].zero_bytes = one[0].raw_bytes_sent;
    assert_eq!(goodput(&one, None), Some(Rate(12_500_000)));
    assert_eq!(word(&decide(&situation(&one))), "cut");
    one[0].raw_bytes_sent = 0;
    one[0].zero_bytes = 0;
    assert_eq!(goodput(&one, None), Some(Rate(12_500_000)));
}

#[test]
fn memory_and_disk_are_one_sum_and_round_trips_are_two_and_a_half() {
    let mut fixed = NO_COSTS;
    fixed.round_trips = FixedCosts::round_trips_at(ms(80));
    let left = Left {
        memory: 10 * MIB,
        disk: 5 * MIB,
    };
    let predicted = PredictedDowntime::new(left.total(), LINK, fixed);
    assert_eq!(predicted.total(), ms(350));
    assert_eq!(
        predicted.to_string(),
        "350 ms (round trips 200 ms, transfer 150 ms)"
    );
}

#[test]
fn the_default_pause_limit_is_five_downtimes_and_a_second_at_least() {
    let mut limits = limits();
    assert_eq!(limits.pause_limit(ms(200)), ms(1500));
    limits.max_downtime = ms(50);
    assert_eq!(limits.pause_limit(ms(40)), ms(1000));
    assert_eq!(super::give_up_pause_after(ms(1000)), ms(950));
    assert_eq!(super::give_up_pause_after(ms(60_000)), ms(59_750));
    limits.pause_timeout = Some(ms(70));
    assert_eq!(limits.pause_limit(ms(5000)), ms(70));
}

#[test]
fn no_measurement_however_absurd_panics() {
    let absurd = RoundStats {
        number: u32::MAX,
        elapsed: Duration::MAX,
        idle: Duration::MAX,
        raw_bytes_sent: u64::MAX,
        zero_bytes: u64::MAX,
        wire_bytes: u64::MAX,
        dirtied_bytes: u64::MAX,
        left_bytes: u64::MAX,
    };
    let slow = RoundStats {
        idle: Duration::ZERO,
        zero_bytes: 0,
        ..absurd
    };
    let empty = RoundStats::default();
    for set in [[absurd; 3], [slow; 3], [empty; 3], [empty, slow, absurd]] {
        let mut now = situation(&set);
        now.left = Left {
            memory: u64::MAX,
            disk: u64::MAX,
        };
        now.elapsed = Duration::ZERO;
        for fixed in [
            NO_COSTS,
            FixedCosts {
                verify: Duration::MAX,
                pause: Duration::MAX,
                ..NO_COSTS
            },
        ] {
            now.fixed = fixed;
            if let Decision::GiveUp(reason) = decide(&now) {
                assert!(!reason.to_string().is_empty());
            }
        }
    }
}

/// A guest that writes: every page of a hot set again and again, and on top new pages at a constant rate.
#[derive(Debug, Clone, Copy)]
struct Model {
    total: u64,
    hot: u64,
    hot_rate: u64,
    cold_rate: u64,
    /// From, to, rate of a burst, in seconds and bytes per second.
    burst: (f64, f64, u64),
}

impl Model {
    /// Distinct bytes dirtied between two moments.
    fn dirtied(&self, from: f64, to: f64) -> u64 {
        let amount =
            |rate: u64, seconds: f64| bytes_in(Rate(rate), Duration::from_secs_f64(seconds));
        let burst = (to.min(self.burst.1) - from.max(self.burst.0)).max(0.0);
        amount(self.hot_rate, to - from)
            .min(self.hot)
            .saturating_add(amount(self.cold_rate, to - from))
            .saturating_add(amount(self.burst.2, burst))
            .min(self.total)
    }

    /// Runs a migration over a link with noise; returns the last word, the number of rounds and the time.
    fn migrate(&self, limits: Limits, link: impl Fn(u32) -> f64) -> (&'static str, u32, f64) {
        let mut rounds: Vec<RoundStats> = Vec::new();
        let (mut clock, mut left) = (0.0, self.total);
        loop {
            let now = Situation {
                left: Left {
                    memory: left,
                    disk: 0,
                },
                elapsed: Duration::from_secs_f64(clock),
                fixed: FixedCosts::default(),
                limits,
                ..situation(&rounds)
            };
            let number = u32::try_from(rounds.len()).unwrap() + 1;
            let idle = match decide(&now) {
                Decision::Continue { .. } => 0.0,
                Decision::AwaitTrigger { recheck_after, .. } => recheck_after.as_secs_f64(),
                other => return (word(&other), number - 1, clock),
            };
            // 3 ms of scan, barrier and round trip.
            let elapsed = idle + left as f64 / link(number) + 0.003;
            let dirtied = self.dirtied(clock, clock + elapsed);
            rounds.push(RoundStats {
                number,
                elapsed: Duration::from_secs_f64(elapsed),
                idle: Duration::from_secs_f64(idle),
                raw_bytes_sent: left,
                zero_bytes: 0,
                wire_bytes: left,
                dirtied_bytes: dirtied,
                left_bytes: dirtied,
            });
            clock += elapsed;
            left = dirtied;
        }
    }
}

const QUIET: Model = Model {
    total: 2048 * MIB,
    hot: 0,
    hot_rate: 0,
    cold_rate: 0,
    burst: (0.0, 0.0, 0),
};

#[test]
fn simulated_guests_end_as_they_should() {
    let steady = |_| 100.0 * MIB as f64;
    for (name, model, expected, most_rounds) in [
        ("idle", QUIET, "cut", 1),
        (
            "half of the link",
            Model {
                cold_rate: 50 * MIB,
                ..QUIET
            },
            "cut",
            8,
        ),
        (
            "four fifths of the link",
            Model {
                cold_rate: 80 * MIB,
                ..QUIET
            },
            "cut",
            25,
        ),
        (
            "twice the link",
            Model {
                cold_rate: 200 * MIB,
                ..QUIET
            },
            "stall",
            3,
        ),
        (
            "just above the link",
            Model {
                cold_rate: 105 * MIB,
                ..QUIET
            },
            "stall",
            3,
        ),
        (
            "small hot set",
            Model {
                hot: 20 * MIB,
                hot_rate: 4096 * MIB,
                ..QUIET
            },
            "cut",
            2,
        ),
        (
            "large hot set",
            Model {
                hot: 300 * MIB,
                hot_rate: 4096 * MIB,
                ..QUIET
            },
            "stall",
            3,
        ),
        (
            "burst of two seconds",
            Model {
                cold_rate: 20 * MIB,
                burst: (26.0, 28.0, 300 * MIB),
                ..QUIET
            },
            "cut",
            12,
        ),
    ] {
        let (end, rounds, _) = model.migrate(limits(), steady);
        assert_eq!(end, expected, "{name}: after {rounds} rounds");
        assert!(rounds <= most_rounds, "{name}: {rounds} rounds");
    }
}

#[test]
fn a_hot_set_that_does_not_fit_is_forced_after_three_rounds() {
    let model = Model {
        hot: 300 * MIB,
        hot_rate: 4096 * MIB,
        ..QUIET
    };
    let limits = Limits {
        on_stall: OnStall::Force,
        ..limits()
    };
    let (end, rounds, _) = model.migrate(limits, |_| 100.0 * MIB as f64);
    assert_eq!((end, rounds), ("force", 3));
}

#[test]
fn a_converged_guest_without_a_trigger_ends_with_the_timeout() {
    let model = Model {
        cold_rate: 10 * MIB,
        ..QUIET
    };
    let limits = Limits {
        cutover: Cutover::Manual,
        timeout: Duration::from_secs(600),
        ..limits()
    };
    let (end, rounds, clock) = model.migrate(limits, |_| 100.0 * MIB as f64);
    assert_eq!(end, "timeout");
    assert!((600.0..610.0).contains(&clock), "{clock}");
    assert!(rounds < 2000, "{rounds} rounds are no low frequency");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Whatever guest and link do, an automatic migration ends, and long before its bound on the number of rounds.
    #[test]
    fn every_simulated_migration_ends(
        total in 1_u64..4096,
        hot in 0_u64..4096,
        hot_rate in 0_u64..8192,
        cold_rate in 0_u64..400,
        burst in (0.0..60.0_f64, 0.0..20.0_f64, 0_u64..1000),
        noise in proptest::collection::vec(0.05..3.0_f64, 1..40),
        force in any::<bool>(),
    ) {
        let model = Model {
            total: total * MIB,
            hot: hot * MIB,
            hot_rate: hot_rate * MIB,
            cold_rate: cold_rate * MIB,
            burst: (burst.0, burst.0 + burst.1, burst.2 * MIB),
        };
        let limits = Limits {
            on_stall: if force { OnStall::Force } else { OnStall::Abort },
            timeout: Duration::from_secs(366 * 24 * 3600),
            ..limits()
        };
        let link = |round: u32| 100.0 * MIB as f64 * noise[round as usize % noise.len()];
        let (end, rounds, _) = model.migrate(limits, link);
        prop_assert!(["cut", "stall", "force"].contains(&end), "{end}");
        prop_assert!(rounds < 2600, "{rounds} rounds");
        prop_assert!(!(force && end == "stall"), "force gave up");
    }

    /// A cutover that is not forced is never predicted above the limit.
    #[test]
    fn a_cutover_fits_or_is_forced(
        left in proptest::collection::vec(0_u64..5000, 1..12),
        now_left in 0_u64..5000,
        max_ms in 1_u64..2000,
        force in any::<bool>(),
    ) {
        let rounds = rounds(4000, &left);
        let mut now = situation(&rounds);
        now.left.disk = now_left * MIB;
        now.limits.max_downtime = ms(max_ms);
        now.limits.on_stall = if force { OnStall::Force } else { OnStall::Abort };
        now.fixed = FixedCosts::default();
        match decide(&now) {
            Decision::CutOver { predicted } => prop_assert!(predicted.total() <= ms(max_ms)),
            Decision::ForceCutOver { predicted, .. } => {
                prop_assert!(force);
                prop_assert!(predicted.total() > ms(max_ms));
            }
            Decision::GiveUp(reason) => {
                prop_assert!(!force);
                prop_assert_eq!(reason.code(), ErrorCode::NotConverging);
            }
            Decision::Continue { predicted, .. } => {
                prop_assert!(predicted.is_some_and(|predicted| predicted.total() > ms(max_ms)));
            }
            Decision::AwaitTrigger { .. } => prop_assert!(false, "nobody is waited for"),
        }
    }
}
