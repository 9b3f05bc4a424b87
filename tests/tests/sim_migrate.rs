//! The embedded guest moves between real agents: the whole of the main job, on any Linux with a new enough kernel.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use vmferry_tests::harness::process::{Finished, Running};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Host, SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");

/// Long enough for a loaded machine: these tests are about what arrives, not when.
const PATIENT: [&str; 2] = ["--max-downtime", "5s"];

fn stage() -> Stage {
    Stage::set(PROGRAMS)
}

fn number(report: &Value, name: &str) -> f64 {
    report[name]
        .as_f64()
        .unwrap_or_else(|| panic!("{name} is no number: {report}"))
}

/// Every field that scripts may rely on, with what makes sense in it after a commit.
fn check_report(done: &Finished, spec: &SimSpec) {
    let report = done.json().unwrap();
    assert_eq!(report["outcome"], "committed");
    assert_eq!(report["exit_code"], 0);
    assert_eq!(report["guest"], spec.name.as_str());
    assert_eq!(report["migration_id"].as_str().unwrap().len(), 32);
    assert_eq!(number(&report, "memory_bytes"), spec.ram as f64);
    assert_eq!(number(&report, "disk_bytes"), spec.disk as f64);
    let (downtime, total) = (number(&report, "downtime_ms"), number(&report, "total_ms"));
    assert!(0.0 < downtime && downtime < total, "{downtime} of {total}");
    let parts = report["downtime_parts"].as_object().unwrap();
    let sum: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
    assert!(
        (sum - downtime).abs() < downtime / 10.0 + 1.0,
        "{sum} in parts of {downtime}: {parts:?}"
    );
    let rounds = report["rounds"].as_array().unwrap();
    assert!(!rounds.is_empty());
    let raw = number(&report, "raw_bytes");
    assert!(raw >= (spec.ram + spec.disk) as f64, "{raw}");
    assert!(number(&report, "wire_bytes") > 0.0);
    assert!(number(&report, "zero_blocks") > 0.0);
    assert!(number(&report, "device_state_bytes") > 0.0);
    for field in ["resent_blocks", "guest_stall_ms", "barrier_stall_ms"] {
        assert!(number(&report, field) >= 0.0);
    }
    let agent = report["peer"]["agent"].as_str().unwrap();
    assert!(agent.starts_with("vmferry-dst "), "{agent}");
}

#[test]
fn a_busy_guest_moves_and_nothing_is_wrong() {
    let stage = stage();
    let spec = SimSpec::small("web");
    let guest = stage.guest(spec.clone());
    let done = stage.migrate(&guest, &["--verify", "full", "--max-downtime", "5s"]);
    stage.expect_code(&done, 0);
    check_report(&done, &spec);
    let verified = &done.json().unwrap()["verified"];
    assert_eq!(verified["mode"], "full");
    assert_eq!(number(verified, "bytes"), (spec.ram + spec.disk) as f64);
    stage.expect_moved(&guest);
    println!("{}", done.stderr);
    let gaps = guest.beats().unwrap().handovers();
    println!("handover gap {gaps:?}");
    assert_eq!(gaps.len(), 1);
    for (host, role, code) in [
        (&stage.alpha, Role::Source, 1),
        (&stage.beta, Role::Destination, 0),
    ] {
        let owner = host.ask(role, "owner", "web", &[]).unwrap();
        println!("{}: {}", host.name(), owner.stdout);
        assert_eq!(owner.code(), code, "{}{}", owner.stdout, owner.stderr);
    }
}

#[test]
fn shared_memory_moves() {
    let stage = stage();
    let guest = stage.guest(SimSpec {
        ram_kind: "memfd",
        ..SimSpec::small("web")
    });
    let done = stage.migrate(&guest, &["--verify", "full", "--max-downtime", "5s"]);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn a_paused_guest_arrives_paused() {
    let stage = stage();
    let guest = stage.guest(SimSpec {
        paused: true,
        ..SimSpec::small("web")
    });
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    assert_eq!(done.json().unwrap()["guest_now"], "paused-at-destination");
    let mut client = guest.client(&stage.beta).unwrap();
    let status = client.status().unwrap();
    assert_eq!(status.starts, 0, "it was let run: {status:?}");
    guest.verify_on(&stage.beta).unwrap();
    client.cont().unwrap();
    drop(client);
    stage.expect_moved(&guest);
}

#[test]
fn several_guests_move_at_once() {
    let stage = stage();
    let guests: Vec<_> = ["web", "db", "mail"]
        .iter()
        .map(|name| {
            stage.guest(SimSpec {
                ram: 32 << 20,
                ..SimSpec::small(name)
            })
        })
        .collect();
    let running: Vec<_> = guests
        .iter()
        .map(|guest| stage.begin(guest, &PATIENT))
        .collect();
    for (guest, running) in guests.iter().zip(running) {
        let done = running.wait(Duration::from_secs(120)).unwrap();
        stage.expect_code(&done, 0);
        stage.expect_moved(guest);
    }
}

#[test]
fn there_and_back_and_there_again() {
    let stage = stage();
    let guest = stage.guest(SimSpec::small("web"));
    let back = stage.alpha.serve(&[]).unwrap();
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    guest.expect_at(&stage.alpha, &["beta"]).unwrap();
    let done = stage.beta.migrate("web", back.port, &PATIENT).unwrap();
    assert_eq!(done.code(), 0, "{}\n{}", done.stderr, back.process.stderr());
    guest.verify_on(&stage.alpha).unwrap();
    assert!(!guest.is_on(&stage.beta));
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    assert_eq!(guest.beats().unwrap().handovers().len(), 3);
    for (host, role, code) in [
        (&stage.alpha, Role::Source, 1),
        (&stage.alpha, Role::Destination, 1),
        (&stage.beta, Role::Source, 0),
        (&stage.beta, Role::Destination, 0),
    ] {
        let owner = host.ask(role, "owner", "web", &["--json"]).unwrap();
        assert_eq!(owner.code(), code, "{}{}", owner.stdout, owner.stderr);
        assert_eq!(owner.json().unwrap()["generation"], 3);
    }
}

#[test]
fn a_disk_image_that_held_old_data_is_right_afterwards() {
    let stage = stage();
    let spec = SimSpec {
        fill: 20,
        ..SimSpec::small("web")
    };
    let guest = stage.guest(spec.clone());
    let old = guest.disk_on(&stage.beta);
    fs::write(&old, vec![0xa5; usize::try_from(spec.disk).unwrap()]).unwrap();
    let done = stage.migrate(&guest, &["--verify", "full", "--max-downtime", "5s"]);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
}

#[test]
fn a_guest_without_a_disk_moves() {
    let stage = stage();
    let guest = stage.guest(SimSpec {
        disk: 0,
        disk_rate: 0,
        ..SimSpec::small("web")
    });
    let done = stage.migrate(&guest, &PATIENT);
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    assert_eq!(done.json().unwrap()["disk_bytes"], 0);
}

/// Pages of a guest, behind where it keeps what it works with.
struct Pages {
    memory: fs::File,
    at: u64,
    content: Vec<u8>,
}

impl Pages {
    fn of(guest: &SimGuest, host: &Host, pages: u64) -> Self {
        let process = guest.client(host).unwrap().describe().unwrap();
        let mut options = fs::File::options();
        let memory = options.read(true).write(true);
        let memory = memory.open(format!("/proc/{}/mem", process.pid)).unwrap();
        let mut content = vec![0; usize::try_from(pages * 4096).unwrap()];
        let at = process.ram_address + (16 << 20);
        memory.read_exact_at(&mut content, at).unwrap();
        Self {
            memory,
            at,
            content,
        }
    }

    fn write(&self, content: &[u8]) {
        self.memory.write_all_at(content, self.at).unwrap();
    }

    /// Changes a few words of each again and again until `over`, then changes them back.
    fn write_until(&self, over: impl FnMut() -> bool) {
        let written = AtomicBool::new(false);
        let write = || {
            let mut others = self.content.clone();
            while !written.load(Ordering::Relaxed) {
                let words = others.iter_mut().step_by(1000);
                words.for_each(|byte| *byte = byte.wrapping_add(1));
                self.write(&others);
                std::thread::sleep(Duration::from_millis(10));
            }
            self.write(&self.content);
        };
        let is_over = std::thread::scope(|scope| {
            scope.spawn(write);
            let is_over = soon(over);
            written.store(true, Ordering::Relaxed);
            is_over
        });
        assert!(is_over, "it never was over");
    }
}

/// Pages that are written all the time, and a link on which their copy takes longer than the guest may stand still.
const BUSY_PAGES: u64 = 2_000;

fn begin_on_a_narrow_link(stage: &Stage) -> (SimGuest, Running) {
    let guest = stage.guest(SimSpec {
        dirty_rate: 0,
        disk: 0,
        disk_rate: 0,
        fill: 100,
        content: "random",
        ..SimSpec::quiet("web")
    });
    let running = stage.begin(
        &guest,
        &[
            "--cutover",
            "manual",
            "--verify",
            "full",
            "--compress",
            "1",
            "--max-bandwidth",
            "100Mbit",
            "--max-downtime",
            "400ms",
        ],
    );
    (guest, running)
}

fn is_converged(stage: &Stage) -> bool {
    let status = stage.alpha.ask(Role::Source, "status", "web", &["--json"]);
    status.is_ok_and(|status| {
        let status = status.json();
        status.is_ok_and(|status| status["phase"] == "converged")
    })
}

/// What was written in a few words goes as the difference: of whole blocks so many would never fit.
#[test]
fn a_guest_that_writes_a_few_words_converges_by_differences() {
    let stage = stage();
    let (guest, running) = begin_on_a_narrow_link(&stage);
    let pages = Pages::of(&guest, &stage.alpha, BUSY_PAGES);
    pages.write_until(|| is_converged(&stage));
    let cutover = stage.alpha.ask(Role::Source, "cutover", "web", &[]);
    assert_eq!(cutover.unwrap().code(), 0);
    let done = running.wait(Duration::from_secs(60)).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    let differences = number(&report, "difference_blocks");
    assert!(differences >= BUSY_PAGES as f64 / 2.0, "{report}");
    assert_eq!(number(&report, "sessions"), 1.0, "{report}");
    stage.expect_moved(&guest);
}

/// `[WIRE-53]`
#[test]
fn differences_to_what_the_destination_does_not_have_go_whole() {
    let stage = stage();
    let (guest, running) = begin_on_a_narrow_link(&stage);
    let pages = Pages::of(&guest, &stage.alpha, BUSY_PAGES);
    assert!(soon(|| guest.client(&stage.beta).is_ok()));
    let there = Pages::of(&guest, &stage.beta, 1);
    pages.write_until(|| {
        there.write(&[0x5a; 4096]);
        running.stderr().contains("gave the session up")
    });
    assert!(soon(|| is_converged(&stage)));
    let cutover = stage.alpha.ask(Role::Source, "cutover", "web", &[]);
    assert_eq!(cutover.unwrap().code(), 0);
    let done = running.wait(Duration::from_secs(60)).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert!(number(&report, "sessions") > 1.0, "{report}");
    stage.expect_moved(&guest);
}

/// A guest of which every page and block is one of 512, most of them many times there.
fn of_copies() -> SimSpec {
    SimSpec {
        content: "copies",
        fill: 100,
        ..SimSpec::quiet("web")
    }
}

/// `[WIRE-54]`
#[test]
fn what_is_elsewhere_in_the_guest_goes_as_a_reference() {
    let stage = stage();
    let guest = stage.guest(of_copies());
    let options = [
        "--verify",
        "full",
        "--compress",
        "1",
        "--max-bandwidth",
        "200Mbit",
    ];
    let done = stage.migrate(&guest, &[&options[..], &PATIENT].concat());
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    println!("{report}");
    let (duplicates, wire) = (
        number(&report, "duplicate_blocks"),
        number(&report, "wire_bytes"),
    );
    // The disk is filled by a quarter.
    let blocks = (32 + 2) * 256;
    assert!(duplicates > f64::from(blocks) * 0.6, "{report}");
    assert!(wire < f64::from(blocks) * 4096.0 * 0.5, "{report}");
    assert_eq!(number(&report, "sessions"), 1.0, "{report}");
    assert!(done.stderr.contains(" as duplicates"), "{}", done.stderr);
    stage.expect_moved(&guest);
}

/// `[WIRE-56]`
#[test]
fn duplicates_of_what_the_destination_does_not_have_go_whole() {
    let stage = stage();
    let guest = stage.guest(SimSpec {
        dirty_rate: 0,
        disk: 0,
        disk_rate: 0,
        ..of_copies()
    });
    let mut options = vec!["--cutover", "manual", "--verify", "full", "--compress", "1"];
    options.extend(["--max-bandwidth", "4Mbit"]);
    let running = stage.begin(&guest, &[&options[..], &PATIENT].concat());
    assert!(soon(|| guest.client(&stage.beta).is_ok()));
    // Half of the guest, of which most blocks are duplicates of some that have come.
    let here = Pages::of(&guest, &stage.alpha, 4_000);
    let there = Pages::of(&guest, &stage.beta, 1);
    let rubbish = vec![0x5a; here.content.len()];
    assert!(soon(|| {
        there.write(&rubbish);
        running.stderr().contains("gave the session up")
    }));
    let set = stage
        .alpha
        .ask(Role::Source, "set", "web", &["max-bandwidth=none"]);
    assert_eq!(set.unwrap().code(), 0);
    // What was overwritten there is sent once more.
    here.write(&rubbish);
    assert!(soon(|| is_converged(&stage)));
    here.write(&here.content);
    let cutover = stage.alpha.ask(Role::Source, "cutover", "web", &[]);
    assert_eq!(cutover.unwrap().code(), 0);
    let done = running.wait(Duration::from_secs(60)).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert!(number(&report, "sessions") > 1.0, "{report}");
    stage.expect_moved(&guest);
}

#[test]
fn what_was_written_as_it_was_is_not_sent_again() {
    const PAGES: u64 = 2_000;
    let stage = stage();
    let spec = SimSpec {
        dirty_rate: 0,
        disk_rate: 0,
        fill: 100,
        ..SimSpec::small("web")
    };
    let guest = stage.guest(spec);
    let options = ["--cutover", "manual", "--verify", "full"];
    let running = stage.begin(&guest, &[&options[..], &PATIENT].concat());
    let ask = |what: &str, more: &[&str]| stage.alpha.ask(Role::Source, what, "web", more).unwrap();
    assert!(soon(|| ask("status", &["--json"])
        .json()
        .is_ok_and(|status| status["phase"] == "converged")));
    let pages = Pages::of(&guest, &stage.alpha, PAGES);
    pages.write(&pages.content);
    assert_eq!(ask("cutover", &[]).code(), 0);
    let done = running.wait(Duration::from_secs(60)).unwrap();
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    assert!(
        number(&report, "unchanged_blocks") >= PAGES as f64,
        "{report}"
    );
    assert!(number(&report, "resent_blocks") < PAGES as f64, "{report}");
    stage.expect_moved(&guest);
}

/// What a guest writes all the time goes when it stands still, and is not sent again and again until somebody pulls the trigger.
#[test]
fn a_hot_working_set_waits_for_the_last_flight() {
    const HOT_BLOCKS: u64 = 512;
    let stage = stage();
    let guest = stage.guest(SimSpec {
        dirty_rate: 64 << 20,
        working_set: HOT_BLOCKS * 4096,
        disk_rate: 0,
        ..SimSpec::small("web")
    });
    let manual = ["--cutover", "manual", "--max-downtime", "1s"];
    let running = stage.begin(&guest, &manual);
    let status = || stage.alpha.ask(Role::Source, "status", "web", &["--json"]);
    let round = || status().unwrap().json().ok()?["round"].as_u64();
    assert!(soon(|| round().is_some_and(|round| round > 3)));
    let cutover = stage.alpha.ask(Role::Source, "cutover", "web", &[]);
    assert_eq!(cutover.unwrap().code(), 0);
    let done = running.wait(Duration::from_secs(60)).unwrap();
    println!("{}", done.stderr);
    stage.expect_code(&done, 0);
    let report = done.json().unwrap();
    let again = report["resent_blocks"].as_u64().unwrap();
    assert!((1..2 * HOT_BLOCKS).contains(&again), "{report}");
    stage.expect_moved(&guest);
}

#[test]
fn a_manual_cutover_waits_and_a_script_learns_the_end() {
    let stage = stage();
    let guest = stage.guest(SimSpec::small("web"));
    let mut running = stage.begin(&guest, &["--cutover", "manual", "--max-downtime", "5s"]);
    let status = |more: &[&str]| {
        stage
            .alpha
            .ask(Role::Source, "status", "web", more)
            .unwrap()
    };
    assert!(soon(|| status(&["--json"])
        .json()
        .is_ok_and(|status| status["phase"] == "converged")));
    let begun = guest.beats().unwrap().list.len();
    let seen = status(&["--json"]).json().unwrap();
    assert_eq!(seen["guest"], "web");
    assert!(seen["predicted_downtime_ms"].is_number(), "{seen}");
    assert!(seen["round"].as_u64().unwrap() > 1, "{seen}");
    let said = status(&[]);
    println!("{}", said.stdout);
    assert!(said.stdout.contains("converged"), "{}", said.stdout);
    let there = stage
        .beta
        .ask(Role::Destination, "status", "web", &[])
        .unwrap();
    println!("{}", there.stdout);
    assert!(there.stdout.contains("converged"), "{}", there.stdout);
    // It stays converged, and the guest runs, for as long as nobody triggers.
    guest.wait_for_beats(1000).unwrap();
    assert_eq!(status(&["--json"]).json().unwrap()["phase"], "converged");
    assert!(guest.beats().unwrap().list.len() > begun);
    assert!(guest.beats().unwrap().handovers().is_empty());
    let cutover = stage
        .alpha
        .ask(Role::Source, "cutover", "web", &[])
        .unwrap();
    println!("{}", cutover.stdout);
    assert_eq!(cutover.code(), 0, "{}{}", cutover.stdout, cutover.stderr);
    assert!(cutover.stdout.contains("committed"), "{}", cutover.stdout);
    let done = running
        .wait_for("", Duration::ZERO, |_, _| Some(()))
        .and_then(|()| running.wait(Duration::from_secs(60)))
        .unwrap();
    stage.expect_code(&done, 0);
    stage.expect_moved(&guest);
    let after = status(&[]);
    println!("{}", after.stdout);
    assert!(
        after.stdout.contains("no migration of web"),
        "{}",
        after.stdout
    );
    let nobody = stage
        .alpha
        .ask(Role::Source, "cutover", "web", &[])
        .unwrap();
    assert_eq!(nobody.code(), 1);
    assert!(
        nobody
            .stderr
            .contains("no migration of web is under way on this host")
    );
}

#[test]
fn quiet_is_quiet_and_json_is_one_line() {
    let stage = stage();
    let guest = stage.guest(SimSpec::small("web"));
    let done = stage.migrate(&guest, &["-q", "--max-downtime", "5s"]);
    stage.expect_code(&done, 0);
    assert_eq!(done.stderr, "");
    assert_eq!(done.stdout.lines().count(), 1);
    done.json().unwrap();
    // A failure is said all the same.
    guest.write_source_file(&stage.alpha).unwrap();
    let done = stage.migrate(&guest, &["-q"]);
    stage.expect_code(&done, 1);
    println!("{}", done.stderr);
    assert!(done.stderr.starts_with("error: "), "{}", done.stderr);
}

#[test]
fn wrong_words_on_the_command_line_exit_with_2() {
    let stage = stage();
    let guest = stage.guest(SimSpec::small("web"));
    for wrong in [
        &["--frobnicate"][..],
        &["--max-downtime", "300"],
        &["--max-downtime", "0s"],
        &["--lanes", "65"],
        &["--connections", "3", "--lanes", "2"],
        &["--compress", "20"],
        &["--on-stall", "pray"],
        &["--max-bandwidth", "12"],
        &["--max-downtime", "5s", "--pause-timeout", "1s"],
        &["--identity", "/nowhere"],
    ] {
        let done = stage.migrate(&guest, wrong);
        println!("{wrong:?}: {}", done.stderr);
        stage.expect_code(&done, 2);
        assert!(done.stderr.contains("error: "), "{}", done.stderr);
    }
    let missing = stage
        .alpha
        .migrate("nobody", stage.agent.port, &[])
        .unwrap();
    println!("{}", missing.stderr);
    stage.expect_code(&missing, 2);
    stage.expect_stayed(&guest);
}

#[test]
fn a_session_of_several_connections_moves_a_guest() {
    let stage = stage();
    let guest = stage.guest(SimSpec::small("web"));
    let more = [
        "--connections",
        "3",
        "--lanes",
        "4",
        "--verify",
        "full",
        "--max-downtime",
        "2s",
    ];
    let done = stage.alpha.migrate("web", stage.agent.port, &more).unwrap();
    assert_eq!(
        done.code(),
        0,
        "{}\n{}",
        done.stderr,
        stage.agent.process.stderr()
    );
    guest.wait_for_beats(50).unwrap();
    guest.verify_on(&stage.beta).unwrap();
    guest.beats().unwrap().check().unwrap();
}
