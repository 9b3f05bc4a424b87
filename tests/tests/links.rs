//! The emulated link carries what it says, and a guest moves over one.
//!
//! Nothing is asserted of how fast anything is: what is compared are totals, with room for a busy machine.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::path::Path;
use std::time::Duration;

use vmferry_tests::harness::role::Programs;
use vmferry_tests::harness::{Hosts, SimGuest, SimSpec};
use vmferry_tests::link::calibrate::{self, Flow};
use vmferry_tests::link::{Link, LinkSpec};

const MBIT: u64 = 1_000_000;

#[test]
fn a_link_has_the_rate_the_delay_and_the_loss_that_it_was_made_with() {
    let spec = LinkSpec::new(50 * MBIT, Duration::from_millis(20)).lossy(0.01);
    let Some(link) = Link::get(spec).unwrap() else {
        return;
    };
    let rtt = calibrate::round_trip(&link).unwrap();
    assert!(rtt >= spec.rtt, "{rtt:?}");
    let before = link.forth();
    let lost = calibrate::loss(&link).unwrap();
    let carried = link.forth();
    println!("round trip {rtt:?}, {lost} lost, {carried:?}");
    assert!((0.005..0.02).contains(&lost), "{lost}");
    let (bytes, packets) = (
        carried.bytes - before.bytes,
        carried.packets - before.packets,
    );
    // Of 200 bytes with headers each, but for a few that say the end.
    assert!(packets > 20_000 && (226..=228).contains(&(bytes / packets)));
    assert!(carried.no_room == 0, "half the rate fills no queue");
}

#[test]
fn a_link_carries_no_more_than_its_rate_and_nothing_while_it_is_cut() {
    let spec = LinkSpec::new(50 * MBIT, Duration::from_millis(2));
    let Some(link) = Link::get(spec).unwrap() else {
        return;
    };
    let flow = Flow {
        warm_up: Duration::from_millis(300),
        counted: Duration::from_secs(2),
    };
    let share = calibrate::tcp_rate(&link, flow).unwrap() / spec.rate as f64;
    println!("{share} of the rate, {:?}", link.forth());
    // From above it is exact; from below a busy machine decides.
    assert!((0.3..1.02).contains(&share), "{share}");
    link.cut();
    assert!(calibrate::round_trip(&link).is_err());
    assert!(link.forth().cut_off > 0);
    link.restore();
    calibrate::round_trip(&link).unwrap();
}

#[test]
fn a_cable_has_no_limit_and_counts_what_it_carries() {
    if Link::get(LinkSpec::new(MBIT, Duration::ZERO))
        .unwrap()
        .is_none()
    {
        return;
    }
    let link = Link::cable().unwrap();
    let flow = Flow {
        warm_up: Duration::ZERO,
        counted: Duration::from_millis(500),
    };
    let payload = calibrate::tcp_rate(&link, flow).unwrap() / 8.0 * 0.5;
    let (forth, back) = (link.forth(), link.back());
    println!("{payload} bytes in {forth:?}, {back:?}");
    // What the receiver counted in half a second, and what was on the way besides.
    assert!(forth.bytes as f64 > payload * 0.9);
    assert!(0 < back.bytes && back.bytes < forth.bytes / 10);
}

/// Long enough for the source to notice that the line is dead, short of giving up.
const OUTAGE: Duration = Duration::from_secs(12);
const PATIENCE: Duration = Duration::from_secs(120);

#[test]
fn a_guest_moves_over_a_lossy_line_that_is_cut_and_restored_while_it_is_copied() {
    let spec = LinkSpec::new(100 * MBIT, Duration::from_millis(20)).lossy(0.001);
    let Some(link) = Link::get(spec).unwrap() else {
        return;
    };
    let programs = Programs::played_by(Path::new(env!("CARGO_BIN_EXE_vmferry-demo")));
    let hosts = Hosts::new(programs).unwrap();
    let alpha = hosts.host_at("alpha", &link.alpha).unwrap();
    let beta = hosts.host_at("beta", &link.beta).unwrap();
    let agent = beta.serve(&[]).unwrap();
    let guest = SimGuest::start(
        SimSpec {
            content: "random",
            dirty_rate: 1 << 20,
            ..SimSpec::small("traveller")
        },
        &alpha,
    )
    .unwrap();
    guest.expect_at(&beta, &["alpha"]).unwrap();

    // Uncompressed, so that the first pass is far from done when a quarter of it is.
    let options = [
        "--compress",
        "off",
        "--max-downtime",
        "5s",
        "--verify",
        "full",
    ];
    let mut source = alpha
        .start_migrate_to(guest.name(), &agent.to(), &options)
        .unwrap();
    let quarter = 12 << 20;
    source
        .wait_for("a quarter of the copy", PATIENCE, |_, _| {
            (link.forth().bytes > quarter).then_some(())
        })
        .unwrap();
    link.cut();
    std::thread::sleep(OUTAGE);
    guest.wait_for_beats(20).unwrap();
    assert!(!source.has_ended().unwrap(), "{}", source.stderr());
    link.restore();
    let done = source.wait(PATIENCE).unwrap();

    println!(
        "{}\nforth {:?}\nback {:?}",
        done.stderr,
        link.forth(),
        link.back()
    );
    assert_eq!(done.code(), 0, "{}", agent.process.stderr());
    let report = done.json().unwrap();
    assert!(report["sessions"].as_u64().unwrap() >= 2, "{report}");
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&beta).unwrap();
    guest.beats().unwrap().check().unwrap();
    assert!(!guest.is_on(&alpha));
    assert!(link.forth().lost > 0 && link.forth().cut_off > 0);
}
