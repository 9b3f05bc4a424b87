//! A destination whose disk cannot take a record: full, or read-only.

use std::time::Duration;

use vmferry_tests::harness::qemu::Pair;
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{SimSpec, SmallDisk, Stage};
use vmferry_tests::lab::{Disk, JudgeParams, Lab};

use super::PROGRAMS;
use super::qemu::Scene;

const END: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;

/// With the journals of beta on a file system of their own: the attempt meets it as `spoil` makes it, then `mend` mends it.
fn with_a_journal_that_fails(spoil: impl Fn(&SmallDisk), mend: impl Fn(&SmallDisk)) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        ..SimSpec::small("web")
    });
    let Some(journals) = SmallDisk::mount(&stage.beta.path("state/guests"), "256k") else {
        return;
    };
    let gate = stage.alpha.gate("pause").unwrap();
    let mut migration = stage.begin(&guest, &["--max-downtime", "3s"]);
    gate.wait_reached(&mut migration).unwrap();
    spoil(&journals);
    gate.remove().unwrap();
    // The attempt cannot be opened, and its end cannot be recorded: the guest runs on meanwhile.
    guest.wait_for_beats(100).unwrap();
    let owner = stage.alpha.ask(Role::Source, "owner", "web", &[]);
    assert_eq!(owner.unwrap().code(), 0);
    let told = soon(|| stage.agent_log().contains("journal cannot be written"));
    assert!(told, "{}", stage.agent_log());
    mend(&journals);
    let done = migration.wait(END).unwrap();
    println!("{}\n--- beta\n{}", done.stderr, stage.agent_log());
    if done.code() != 0 {
        stage.expect_code(&done, 1);
        stage.expect_stayed(&guest);
        let again = stage.migrate(&guest, &["--max-downtime", "3s"]);
        stage.expect_code(&again, 0);
    }
    stage.expect_moved(&guest);
}

#[test]
fn the_state_folder_of_the_destination_is_read_only_for_a_while() {
    with_a_journal_that_fails(|disk| disk.remount("ro"), |disk| disk.remount("rw"));
}

#[test]
fn the_state_folder_of_the_destination_is_full_for_a_while() {
    with_a_journal_that_fails(SmallDisk::fill, SmallDisk::empty);
}

#[test]
fn the_state_folder_of_a_real_guests_destination_is_read_only_for_a_while() {
    let Some(lab) = Lab::get() else { return };
    let mut scene = Scene::set(lab, "read-only", "pause");
    let journals = scene.pair.beta.host.path("state/guests");
    let Some(journals) = SmallDisk::mount(&journals, "256k") else {
        return;
    };
    scene.begin();
    journals.remount("ro");
    scene.hold.take().unwrap().release().unwrap();
    scene.pair.guest.wait_for_beats(100).unwrap();
    let told = soon(|| {
        scene
            .agent
            .process
            .stderr()
            .contains("journal cannot be written")
    });
    assert!(told, "{}", scene.agent.process.stderr());
    assert_ne!(scene.recorded(Role::Source), "COMMITTING");
    journals.remount("rw");
    scene.told();
}

#[test]
fn the_images_of_a_real_guests_destination_have_no_room_left() {
    let Some(lab) = Lab::get() else { return };
    let guest = lab.guest("no-room").memory_mib(128);
    let guest = guest.disk(Disk::raw(32 * MIB).prefilled(16 * MIB));
    let guest = guest.judge(JudgeParams {
        memory: 32 * MIB,
        ..JudgeParams::default()
    });
    let guest = guest.build();
    let programs = Programs::played_by(PROGRAMS.as_ref());
    let pair = Pair::new(programs, guest.unwrap()).unwrap();
    pair.expect_launched().unwrap();
    let Some(images) = SmallDisk::mount(pair.beta.place.folder(), "64m") else {
        return;
    };
    let empty = std::fs::File::create(pair.beta.place.image(0));
    empty.unwrap().set_len(32 * MIB).unwrap();
    let source = pair.boot().unwrap();
    let agent = pair.beta.host.serve(&[]).unwrap();

    let hold = pair.beta.hold_at("copy").unwrap();
    let begun = pair
        .alpha
        .host
        .start_migrate(pair.guest.name(), agent.port, &[]);
    let mut migration = begun.unwrap();
    hold.wait_reached(&mut migration).unwrap();
    images.fill();
    hold.release().unwrap();
    let done = migration.wait(END).unwrap();
    println!("{}", done.stderr);
    assert_eq!(done.code(), 1, "{}", agent.process.stderr());
    let report = done.json().unwrap();
    assert_eq!(report["error"]["code"], "no-space", "{report}");
    assert_eq!(report["guest_now"], "runs-at-source", "{report}");
    pair.stayed(source.pid(), &pair.beta).unwrap();
    pair.guest.verify_now().unwrap();

    images.empty();
    pair.move_guest((&pair.alpha, &pair.beta), &agent, &[])
        .unwrap();
    assert_eq!(pair.unbroken(1).unwrap().handovers.len(), 1);
}
