//! A destination agent that dies between OWNED and the start of a real guest: the one that comes after it finds the loaded QEMU and starts it.

use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vmferry_tests::harness::doubt::write_owned;
use vmferry_tests::harness::process;
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::lab::Lab;

use super::qemu::Scene;

const BEATS: Duration = Duration::from_secs(60);

/// The QEMU that beta's agent launched.
fn incoming(scene: &Scene) -> u32 {
    let folder = scene.pair.beta.place.folder().display().to_string();
    let pids = process::with_words(&folder);
    assert_eq!(pids.len(), 1, "{pids:?}");
    pids[0]
}

fn serve_again(scene: &mut Scene) {
    let again = scene.pair.beta.host.serve_at(scene.agent.port, &[]);
    scene.agent = again.unwrap();
}

/// The order to start is on its way to a QEMU that does not read when its agent dies: nobody knows whether it will.
#[test]
fn a_start_that_nobody_answered_is_repeated() {
    let Some(lab) = Lab::get() else { return };
    let mut scene = Scene::at(lab, "owned-asked", "commit");
    let pid = incoming(&scene);
    let signal = |signal| {
        let raw = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(raw, signal).unwrap();
    };
    signal(Signal::STOP);
    scene.proxy.restore();
    assert!(soon(|| scene.recorded(Role::Destination) == "OWNED"));
    scene.kill_destination_agent();
    assert_eq!(scene.recorded(Role::Source), "COMMITTING");
    signal(Signal::CONT);
    serve_again(&mut scene);
    assert_eq!(incoming(&scene), pid);
    scene.committed();
}

/// The order was never sent: OWNED is the last thing that its agent did.
#[test]
fn a_loaded_qemu_that_is_owned_and_was_never_started_is_started() {
    let Some(lab) = Lab::get() else { return };
    let mut scene = Scene::at(lab, "owned-unasked", "commit");
    let pid = incoming(&scene);
    scene.kill_destination_agent();
    write_owned(&scene.pair.beta.host, scene.name());
    serve_again(&mut scene);
    let beats = scene.pair.guest.beats();
    let runs = beats.wait_for_other(&[scene.source.pid()], BEATS);
    let runs = runs.unwrap_or_else(|error| panic!("{error:#}\n{}", scene.agent.process.stderr()));
    assert_eq!(runs, pid);
    assert_eq!(scene.recorded(Role::Source), "COMMITTING");
    scene.proxy.restore();
    scene.committed();
}
