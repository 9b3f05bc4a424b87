//! Guests that cannot move, or not to there: refused with the reason, before anything is copied, and unharmed.

use std::time::Duration;

use serde_json::json;
use vmferry_tests::harness::hosts::Agent;
use vmferry_tests::harness::qemu::{Pair, ended};
use vmferry_tests::lab::{Disk, Lab, Qmp, Start};

use super::guests::{MIB, VERIFIED, pair, small};

/// The guest is refused with a message that has all of `words`, nothing is copied, and the guest goes on.
fn refused(pair: &Pair, agent: &Agent, pid: u32, words: &[&str]) {
    let name = pair.guest.name();
    let done = pair.alpha.host.migrate(name, agent.port, &[]).unwrap();
    let report = ended(&done, 1, "failed").unwrap();
    let error = report["error"].to_string();
    println!("{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error}");
        assert!(
            done.stderr.contains(word),
            "{word:?} is not in {}",
            done.stderr
        );
    }
    let rounds = report["rounds"].as_array();
    assert!(rounds.is_none_or(Vec::is_empty), "{report}");
    pair.stayed(pid, &pair.beta).unwrap();
}

#[test]
fn a_guest_with_a_device_that_cannot_be_saved_is_refused_by_its_name_and_lives() {
    let Some(lab) = Lab::get() else { return };
    let device = [
        "-blockdev",
        "driver=null-co,node-name=spare,size=16777216,read-zeroes=on",
        "-device",
        "nvme,serial=vmferry,drive=spare,id=fast",
    ];
    let pair = pair(small(lab, "blocked").extra(&device).build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    refused(&pair, &agent, source.pid(), &["nvme"]);
    pair.guest.verify_now().unwrap();
    pair.unbroken(1).unwrap();
}

#[test]
fn a_destination_that_does_not_fit_is_refused_with_each_difference() {
    let Some(lab) = Lab::get() else { return };
    let pair = pair(small(lab, "unfit").disk(Disk::raw(16 * MIB)).build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let fit = pair.beta.place.argv(Start::Incoming);
    let with = |old: &str, new: &str| -> Vec<String> {
        let launch: Vec<_> = fit.iter().map(|word| word.replace(old, new)).collect();
        assert_ne!(launch, fit, "{old:?} is not in the command line");
        launch
    };
    let short = pair.beta.place.folder().join("short.raw");
    std::fs::File::create(&short)
        .unwrap()
        .set_len(8 * MIB)
        .unwrap();
    let image = pair.beta.place.image(1).display().to_string();
    let mut without_port = fit.clone();
    let port = without_port
        .iter()
        .position(|word| word.contains("virtserialport") && word.contains("control"))
        .unwrap();
    without_port.drain(port - 1..=port);
    let smp = fit.iter().position(|word| word == "-smp").unwrap() + 1;
    let mut two_vcpus = fit.clone();
    two_vcpus[smp] = "2".into();
    let uuid = fit.iter().position(|word| word == "-uuid").unwrap() + 1;
    let mut other_uuid = fit.clone();
    other_uuid[uuid] = "00000000-0000-4000-8000-000000000001".into();

    let ram = |mib: u64| (mib * MIB).to_string();
    let cases: [(Vec<String>, &[&str]); 9] = [
        (with("q35", "pc-q35-8.2"), &["machine type", "pc-q35-8.2"]),
        (with("192M", "256M"), &["RAM block", &ram(192), &ram(256)]),
        (
            two_vcpus,
            &["number of virtual CPUs", "1 at the source and 2 here"],
        ),
        (with("qemu64", "Nehalem"), &["CPU model", "Nehalem"]),
        (other_uuid, &["UUID", "00000000000040008000000000000001"]),
        (
            with(&image, &short.display().to_string()),
            &["disk vdb", &ram(16), &ram(8)],
        ),
        (without_port, &["virtserialport", "missing here"]),
        (with("defer", "tcp:127.0.0.1:0"), &["migration already"]),
        (
            with("-nodefaults", "-no-such-option"),
            &["did not come up", "no-such-option"],
        ),
    ];
    for (launch, words) in cases {
        pair.expect_at(&pair.beta, "alpha", Some(launch)).unwrap();
        refused(&pair, &agent, source.pid(), words);
    }
    pair.expect_at(&pair.beta, "gamma", Some(fit)).unwrap();
    refused(&pair, &agent, source.pid(), &["alpha", "from"]);
    pair.guest.verify_now().unwrap();
    pair.unbroken(1).unwrap();
}

#[test]
fn a_guest_whose_qemu_others_work_with_is_refused_until_they_are_done() {
    let Some(lab) = Lab::get() else { return };
    let pair = pair(small(lab, "in-use").build());
    pair.expect_launched().unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();
    let qmp_path = pair.alpha.place.qmp_path();

    let other = Qmp::connect(&qmp_path, Duration::from_secs(10)).unwrap();
    let path = qmp_path.display().to_string();
    refused(
        &pair,
        &agent,
        source.pid(),
        &["another program is connected", &path],
    );
    drop(other);

    let socket = pair
        .alpha
        .place
        .folder()
        .join("backup")
        .display()
        .to_string();
    let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
    let order = |command: &str, arguments| source.qmp().execute(command, arguments).unwrap();
    order("nbd-server-start", address);
    refused(
        &pair,
        &agent,
        source.pid(),
        &["NBD server is in use by another program"],
    );
    let export = json!({ "type": "nbd", "id": "backup", "node-name": "vda" });
    order("block-export-add", export);
    refused(&pair, &agent, source.pid(), &["block export backup"]);
    order("nbd-server-stop", json!({}));

    let moved = pair.move_guest((&pair.alpha, &pair.beta), &agent, &VERIFIED);
    moved.unwrap();
    pair.unbroken(1).unwrap();
}
