//! A migration is cancelled, or does not converge, at every moment before the decision: the guest runs on where it was, the
//! destination is as if nothing had been sent, and the next migration succeeds.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::net::UdpSocket;
use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::process::{Finished, Running, descriptors};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Host, Proxy, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const PATIENT: [&str; 2] = ["--max-downtime", "5s"];
const END: Duration = Duration::from_secs(60);

fn small() -> SimSpec {
    SimSpec {
        ram: 32 << 20,
        disk: 8 << 20,
        ..SimSpec::small("web")
    }
}

/// How somebody cancels.
#[derive(Debug, Clone, Copy)]
enum By {
    CtrlC,
    Command,
}

impl By {
    fn cancel(self, host: &Host, running: Running) -> Finished {
        match self {
            Self::CtrlC => {
                running.signal(Signal::INT).unwrap();
                running.wait(END).unwrap()
            }
            Self::Command => {
                let asked = host.ask(Role::Source, "cancel", "web", &[]).unwrap();
                let done = running.wait(END).unwrap();
                println!("cancel: {}{}", asked.stdout, asked.stderr);
                assert_eq!(asked.code(), 4, "{}\n{}", asked.stderr, done.stderr);
                assert!(asked.stdout.contains("cancelled"), "{}", asked.stdout);
                done
            }
        }
    }
}

fn phase(host: &Host) -> Option<String> {
    let status = host.ask(Role::Source, "status", "web", &["--json"]).ok()?;
    Some(status.json().ok()?["phase"].as_str()?.to_owned())
}

/// The end of a cancelled migration, and another one that succeeds.
fn expect_cancelled(stage: &Stage, guest: &SimGuest, done: &Finished, before: &[String]) {
    println!("{}", done.stderr);
    stage.expect_code(done, 4);
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "cancelled");
    assert_eq!(report["guest_now"], "runs-at-source");
    assert_eq!(report["error"]["code"], "cancelled");
    stage.expect_stayed(guest);
    stage.expect_traceless(guest, before);
    let owner = stage.alpha.ask(Role::Source, "owner", "web", &[]).unwrap();
    assert_eq!(owner.code(), 0, "{}", owner.stdout);
    stage.expect_moves(guest, &PATIENT);
}

/// Cancels while `at` stands in the hooks of `phase`.
fn cancel_in_hook(at: fn(&Stage) -> &Host, phase: &str, by: By) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let gate = at(&stage).gate(phase).unwrap();
    let mut running = stage.begin(&guest, &PATIENT);
    gate.wait_reached(&mut running).unwrap();
    let done = by.cancel(&stage.alpha, running);
    // The script was killed, not waited for.
    stage.expect_clean(&guest);
    gate.remove().unwrap();
    expect_cancelled(&stage, &guest, &done, &before);
}

fn alpha(stage: &Stage) -> &Host {
    &stage.alpha
}

fn beta(stage: &Stage) -> &Host {
    &stage.beta
}

#[test]
fn while_the_destination_does_not_answer() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let mute = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    for by in [By::CtrlC, By::Command] {
        let running = stage.alpha.start_migrate("web", port, &[]).unwrap();
        assert!(soon(|| phase(&stage.alpha).as_deref() == Some("negotiate")));
        let done = by.cancel(&stage.alpha, running);
        stage.expect_code(&done, 4);
    }
    let running = stage.alpha.start_migrate("web", port, &[]).unwrap();
    assert!(soon(|| phase(&stage.alpha).as_deref() == Some("negotiate")));
    let done = By::CtrlC.cancel(&stage.alpha, running);
    expect_cancelled(&stage, &guest, &done, &before);
}

#[test]
fn in_negotiation_at_the_destination() {
    cancel_in_hook(beta, "negotiate", By::Command);
}

#[test]
fn in_negotiation_at_the_source() {
    cancel_in_hook(alpha, "negotiate", By::CtrlC);
}

#[test]
fn while_the_copy_is_prepared() {
    cancel_in_hook(beta, "prepare", By::CtrlC);
}

#[test]
fn before_the_copy() {
    cancel_in_hook(beta, "copy", By::Command);
}

#[test]
fn in_the_copy() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let before = descriptors(guest.first_pid());
    let mut running = stage.begin(&guest, &["--max-bandwidth", "2MiB/s"]);
    let seen = running.wait_for("the copy", END, |_, _| {
        let status = stage
            .alpha
            .ask(Role::Source, "status", "web", &["--json"])
            .ok()?;
        (status.json().ok()?["bytes_done"].as_u64()? > 1 << 20).then_some(())
    });
    seen.unwrap();
    let done = By::Command.cancel(&stage.alpha, running);
    expect_cancelled(&stage, &guest, &done, &before);
}

#[test]
fn while_converged_and_waiting() {
    for by in [By::CtrlC, By::Command] {
        let stage = Stage::set(PROGRAMS);
        let guest = stage.guest(small());
        let before = descriptors(guest.first_pid());
        let running = stage.begin(&guest, &["--cutover", "manual", "--max-downtime", "5s"]);
        assert!(soon(|| phase(&stage.alpha).as_deref() == Some("converged")));
        let done = by.cancel(&stage.alpha, running);
        expect_cancelled(&stage, &guest, &done, &before);
    }
}

#[test]
fn before_the_pause_at_the_source() {
    cancel_in_hook(alpha, "pause", By::Command);
}

#[test]
fn before_the_pause_at_the_destination() {
    cancel_in_hook(beta, "pause", By::CtrlC);
}

#[test]
fn in_the_final_copy_at_the_source() {
    cancel_in_hook(alpha, "final", By::CtrlC);
}

#[test]
fn in_the_final_copy_at_the_destination() {
    cancel_in_hook(beta, "final", By::Command);
}

#[test]
fn before_the_load() {
    cancel_in_hook(beta, "load", By::CtrlC);
}

/// Dirties six times as much as the link carries.
fn restless() -> SimSpec {
    SimSpec {
        ram: 24 << 20,
        disk: 0,
        disk_rate: 0,
        fill: 50,
        content: "random",
        dirty_rate: 48 << 20,
        working_set: 8 << 20,
        ..SimSpec::small("web")
    }
}

const NARROW: [&str; 4] = ["--max-bandwidth", "8MiB/s", "--compress", "off"];

#[test]
fn a_guest_that_does_not_converge_is_recognised_within_three_rounds() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(restless());
    let before = descriptors(guest.first_pid());
    let done = stage.migrate(&guest, &NARROW);
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "not-converging");
    let rounds = report["rounds"].as_array().unwrap().len();
    assert!(rounds <= 3, "{rounds} rounds");
    let detail = report["error"]["detail"].as_str().unwrap();
    for word in ["the guest dirties", "--max-downtime", "--on-stall force"] {
        assert!(detail.contains(word), "{detail}");
    }
    stage.expect_stayed(&guest);
    stage.expect_traceless(&guest, &before);
    // Forced, it moves.
    let done = stage.migrate(&guest, &[&NARROW[..], &["--on-stall", "force"]].concat());
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn a_copy_that_cannot_be_done_in_time_ends() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let done = stage.migrate(&guest, &["--max-bandwidth", "1MiB/s", "--timeout", "2s"]);
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "timed-out");
    assert_eq!(report["guest_now"], "runs-at-source");
    stage.expect_stayed(&guest);
}

#[test]
fn waiting_for_the_trigger_ends_with_the_timeout() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(small());
    let more = [
        "--cutover",
        "manual",
        "--max-downtime",
        "5s",
        "--timeout",
        "3s",
    ];
    let done = stage.migrate(&guest, &more);
    println!("{}", done.stderr);
    stage.expect_code(&done, 1);
    assert_eq!(done.json().unwrap()["error"]["code"], "timed-out");
    stage.expect_stayed(&guest);
}

#[test]
fn max_bandwidth_bounds_what_goes_over_the_wire() {
    const RATE: f64 = (8 << 20) as f64;
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        content: "random",
        ..small()
    });
    let proxy = Proxy::to(stage.agent.port).unwrap();
    let more = [
        "--max-bandwidth",
        "8MiB/s",
        "--compress",
        "off",
        "--max-downtime",
        "5s",
    ];
    let done = stage.alpha.migrate("web", proxy.port(), &more).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    let seconds = report["total_ms"].as_f64().unwrap() / 1e3;
    let (wire, content) = (
        proxy.bytes_there() as f64,
        report["wire_bytes"].as_f64().unwrap(),
    );
    println!(
        "{:.2} of the bandwidth allowed; {:.3} of the bytes sent were headers and the like",
        wire / RATE / seconds,
        1.0 - content / wire
    );
    assert!(wire >= content, "{wire} {content}");
    assert!(
        wire <= RATE * seconds + (4 << 20) as f64,
        "{wire} bytes in {seconds} s"
    );
    stage.expect_moved(&guest);
}
