//! Links that are lost for long or again and again, and sources whose address changes: the copy goes on, and nothing that arrived is sent again.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::ensure;
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::stage::wait_for_bytes;
use vmferry_tests::harness::{Hosts, Proxy, SimGuest, SimSpec, Stage};
use vmferry_tests::link::{Link, LinkSpec};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(400);
const PATIENT: [&str; 2] = ["--max-downtime", "10s"];
const PAUSE_TIMEOUT: Duration = Duration::from_secs(4);

/// Content that does not compress, in a guest that writes nothing: what is sent twice was lost on the way.
fn still(ram: u64) -> SimSpec {
    SimSpec {
        ram,
        disk: 4 << 20,
        dirty_rate: 0,
        disk_rate: 0,
        fill: 100,
        content: "random",
        ..SimSpec::small("web")
    }
}

fn applied(stage: &Stage) -> u64 {
    let status = stage
        .beta
        .ask(Role::Destination, "status", "web", &["--json"])
        .unwrap();
    let status = status.json().unwrap();
    status["migrations"][0]["applied_bytes"].as_u64().unwrap()
}

/// Bytes that this guest takes on the wire where nothing is lost.
fn undisturbed() -> u64 {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(still(64 << 20));
    let done = stage.migrate(&guest, &["--compress", "off", "--lanes", "2"]);
    stage.expect_code(&done, 0);
    done.json().unwrap()["wire_bytes"].as_u64().unwrap()
}

/// Cuts the link so often in one pre-copy, and leaves it so for `more` after the source has noticed. What goes over the wire again is what the source had handed to the transport and the destination
/// had not applied when the link was cut, and nothing else. (The blocks that only waited for their lane are not on the wire, though
/// `resent_blocks` counts them.)
fn cut_again_and_again(cuts: usize, more: Duration) {
    let once = undisturbed();
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(still(64 << 20));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let slow = [
        "--max-bandwidth",
        "8MiB/s",
        "--compress",
        "off",
        "--lanes",
        "2",
    ];
    let begun = stage
        .alpha
        .start_migrate("web", proxy.port(), &[&slow[..], &PATIENT].concat());
    let mut running = begun.unwrap();
    for cut in 1..=cuts {
        let share = (60 << 20) * cut as u64 / (cuts as u64 + 1);
        wait_for_bytes(&stage.alpha, "web", &mut running, share);
        proxy.cut();
        let noticed = running.wait_for("the loss", END, |_, said| {
            (said.matches("connecting again").count() >= cut).then_some(())
        });
        noticed.unwrap();
        std::thread::sleep(more);
        proxy.restore();
        let back = running.wait_for("the link", END, |_, said| {
            (said.matches("connected again").count() >= cut).then_some(())
        });
        back.unwrap();
    }
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    let number = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(number("sessions"), cuts as u64 + 1, "{report}");
    let again = number("wire_bytes").saturating_sub(once);
    let in_flight = number("wire_bytes").saturating_sub(applied(&stage));
    let allowed = in_flight + in_flight / 100;
    println!(
        "{cuts} cuts: {again} bytes over the wire again, {in_flight} were in flight when the link was cut: {:.3}",
        again as f64 / in_flight as f64
    );
    let longest = guest.beats().unwrap().longest_within();
    println!("longest time without a beat of one process {longest:.1?}");
    assert!(again <= allowed, "{again} of {allowed}");
    assert!(longest <= PAUSE_TIMEOUT, "{longest:?}");
    stage.expect_moved(&guest);
}

#[test]
fn what_is_sent_again_after_cuts_was_in_flight() {
    cut_again_and_again(3, Duration::ZERO);
}

/// Some four minutes, since a lost link is noticed after ten seconds; with the next one: `cargo test -p vmferry-tests --test sim_link -- --ignored --nocapture`.
#[test]
#[ignore = "takes minutes; its short form runs always"]
fn twenty_cuts_in_one_copy() {
    cut_again_and_again(20, Duration::ZERO);
}

#[test]
#[ignore = "takes minutes; its short form runs always"]
fn five_minutes_without_a_link_in_one_copy() {
    cut_again_and_again(1, Duration::from_secs(300));
}

#[test]
fn a_link_that_is_lost_for_a_minute_while_converged_comes_back_and_the_trigger_still_works() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let manual = ["--cutover", "manual", "--max-downtime", "10s"];
    let begun = stage.alpha.start_migrate("web", proxy.port(), &manual);
    let mut running = begun.unwrap();
    let converged = running.wait_for("converged", END, |_, said| {
        said.contains(" converged, round ").then_some(())
    });
    converged.unwrap();
    proxy.cut();
    let cut = Instant::now();
    // The guest runs on all the time.
    while cut.elapsed() < Duration::from_secs(60) {
        guest.wait_for_beats(20).unwrap();
        std::thread::sleep(Duration::from_secs(1));
    }
    proxy.restore();
    let back = running.wait_for("the link", END, |_, said| {
        said.contains("connected again").then_some(())
    });
    back.unwrap();
    let asked = stage
        .alpha
        .ask(Role::Source, "cutover", "web", &[])
        .unwrap();
    assert_eq!(asked.code(), 0, "{}", asked.stderr);
    let done = running.wait(END).unwrap();
    stage.expect_code(&done, 0);
    assert!(guest.beats().unwrap().longest_within() <= PAUSE_TIMEOUT);
    stage.expect_moved(&guest);
}

#[test]
fn a_link_that_is_lost_in_the_final_copy_rolls_back_within_the_pause_timeout() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let gate = stage.beta.gate("final").unwrap();
    let limits = ["--max-downtime", "3s", "--pause-timeout", "4s"];
    let begun = stage.alpha.start_migrate("web", proxy.port(), &limits);
    let mut running = begun.unwrap();
    gate.wait_reached(&mut running).unwrap();
    assert!(guest.is_paused_on(&stage.alpha));
    proxy.cut();
    let paused = Instant::now();
    while !guest.runs_on(&stage.alpha) {
        assert!(paused.elapsed() < PAUSE_TIMEOUT + Duration::from_secs(2));
        std::thread::sleep(Duration::from_millis(5));
    }
    println!("the guest runs again after {:.1?}", paused.elapsed());
    gate.remove().unwrap();
    proxy.restore();
    let done = running.wait(END).unwrap();
    println!("{}", done.stderr);
    // It tries again, since a lost link is nobody's refusal.
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn the_source_is_seen_at_another_address_in_mid_copy_and_the_session_goes_on() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec::quiet("web"));
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let slow = ["--max-bandwidth", "8MiB/s", "--compress", "off"];
    let begun = stage
        .alpha
        .start_migrate("web", proxy.port(), &[&slow[..], &PATIENT].concat());
    let mut running = begun.unwrap();
    for moved in 1..=3 {
        wait_for_bytes(&stage.alpha, "web", &mut running, moved * (6 << 20));
        proxy.move_source();
    }
    let done = running.wait(END).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert_eq!(report["sessions"], 1, "{report}");
    stage.expect_moved(&guest);
}

/// The host has another address from now on, on the device whose address `old` is.
fn renumber(old: Ipv4Addr, new: Ipv4Addr) -> anyhow::Result<()> {
    let ip = |words: &[&str]| {
        let status = Command::new("ip").args(words).status()?;
        ensure!(status.success(), "ip {words:?}: {status}");
        Ok(())
    };
    let list = Command::new("ip").args(["-o", "-4", "addr"]).output()?;
    let list = String::from_utf8(list.stdout)?;
    let line = list.lines().find(|line| line.contains(&format!(" {old}/")));
    let device = line.and_then(|line| line.split_whitespace().nth(1));
    let device = device.unwrap_or_default();
    // The last address first: with it go the routes, and sending fails until the new one is there.
    ip(&["addr", "del", &format!("{old}/24"), "dev", device])?;
    std::thread::sleep(Duration::from_millis(300));
    ip(&["addr", "add", &format!("{new}/24"), "dev", device])
}

#[test]
fn the_source_host_gets_another_address_in_mid_copy_and_the_session_goes_on() {
    let spec = LinkSpec::new(200_000_000, Duration::from_millis(2));
    let Some(link) = Link::get(spec).unwrap() else {
        return;
    };
    let hosts = Hosts::new(Programs::played_by(PROGRAMS.as_ref())).unwrap();
    let alpha = hosts.host_at("alpha", &link.alpha).unwrap();
    let beta = hosts.host_at("beta", &link.beta).unwrap();
    let guest = SimGuest::start(SimSpec::quiet("web"), &alpha).unwrap();
    guest.expect_at(&beta, &["alpha"]).unwrap();
    let agent = beta.serve(&[]).unwrap();
    let slow = ["--max-bandwidth", "8MiB/s", "--compress", "off"];
    let more = [&slow[..], &PATIENT].concat();
    let begun = alpha.start_migrate_to("web", &agent.to(), &more);
    let mut running = begun.unwrap();
    wait_for_bytes(&alpha, "web", &mut running, 8 << 20);
    let other = Ipv4Addr::new(10, 77, 0, 9);
    let change = || renumber(link.alpha.address, other);
    alpha.run(change).unwrap();
    let done = running.wait(END).unwrap();
    assert_eq!(
        done.code(),
        0,
        "{}\n{}",
        done.stderr,
        agent.process.stderr()
    );
    let report = done.json().unwrap();
    assert_eq!(report["sessions"], 1, "{report}");
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&beta).unwrap();
    guest.beats().unwrap().check().unwrap();
}
