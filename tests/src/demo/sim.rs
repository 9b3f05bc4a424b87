//! The demo with the embedded guest: there, in milliseconds, and back, with everything compared.

use anyhow::ensure;
use vmferry_common::units::Size;

use super::{VERIFIED, check_verified, migrate, millis, say, set_the_stage, start_destination};
use crate::harness::Host;
use crate::harness::sim::{SimGuest, SimSpec};

/// Shows it.
pub(super) fn show(memory: u64) -> anyhow::Result<()> {
    let stage = set_the_stage()?;
    let (alpha, beta) = (&stage.alpha, &stage.beta);
    let spec = SimSpec {
        ram: memory,
        disk: 64 << 20,
        dirty_rate: 32 << 20,
        working_set: (memory / 8).max(1 << 20),
        disk_rate: 4 << 20,
        ..SimSpec::small("demo")
    };
    let words = format!(
        "{} of memory and a disk of {}, writing 32 MiB/s and 4 MiB/s",
        Size(spec.ram),
        Size(spec.disk)
    );
    let guest = SimGuest::start(spec, alpha)?;
    say(
        "guest",
        &format!(
            "vmferry-simguest on alpha, process {}: {words}",
            guest.first_pid()
        ),
    );
    guest.expect_at(beta, &["alpha"])?;
    guest.expect_at(alpha, &["beta"])?;
    let to_beta = start_destination(beta)?;
    let to_alpha = start_destination(alpha)?;
    guest.wait_for_beats(200)?;

    migrate(alpha, &to_beta, "demo", &[])?;
    arrived(&guest, alpha, beta)?;
    println!();
    let report = migrate(beta, &to_alpha, "demo", &VERIFIED)?;
    check_verified(&report)?;
    arrived(&guest, beta, alpha)?;
    println!();
    say(
        "verified",
        "every block of memory and disk was compared on both sides; the guest runs and finds nothing wrong",
    );
    Ok(())
}

/// The guest runs on `here` and no longer on `there`, with all of its content, and has not missed a beat.
fn arrived(guest: &SimGuest, there: &Host, here: &Host) -> anyhow::Result<()> {
    guest.wait_for_beats(200)?;
    guest.verify_on(here)?;
    ensure!(
        !guest.is_on(there),
        "the guest is still on {}",
        there.name()
    );
    let beats = guest.beats()?;
    beats.check()?;
    let gap = beats.handovers();
    let last = gap
        .last()
        .ok_or_else(|| anyhow::anyhow!("the guest did not move"))?;
    println!();
    say(
        "guest",
        &format!(
            "runs on {}: every page and disk block is what it wrote",
            here.name()
        ),
    );
    say(
        "heartbeat",
        &format!(
            "{} beats, none missing; {} between the last on {} and the first on {}",
            beats.list.len(),
            millis(*last),
            there.name(),
            here.name()
        ),
    );
    Ok(())
}
