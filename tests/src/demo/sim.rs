//! The demo with the embedded guest.

use anyhow::ensure;
use vmferry_common::units::Size;

use super::{migrate, millis, say, set_the_stage, start_destination};
use crate::harness::sim::{SimGuest, SimSpec};

/// Shows it.
pub(super) fn show(memory: u64) -> anyhow::Result<()> {
    let stage = set_the_stage()?;
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
    let guest = SimGuest::start(spec, &stage.alpha)?;
    say(
        "guest",
        &format!(
            "vmferry-simguest on alpha, process {}: {words}",
            guest.first_pid()
        ),
    );
    guest.expect_at(&stage.beta, &["alpha"])?;
    let agent = start_destination(&stage)?;
    guest.wait_for_beats(200)?;

    migrate(&stage, &agent, "demo")?;

    guest.wait_for_beats(200)?;
    guest.verify_on(&stage.beta)?;
    ensure!(!guest.is_on(&stage.alpha), "the guest is still on alpha");
    let beats = guest.beats()?;
    beats.check()?;
    let gap = beats.handovers();
    ensure!(gap.len() == 1, "{} handovers instead of one", gap.len());
    println!();
    say(
        "verified",
        "every page and disk block on beta is what the guest wrote, and alpha's copy is gone",
    );
    say(
        "heartbeat",
        &format!(
            "{} beats in one unbroken sequence; {} between the last on alpha and the first on beta",
            beats.list.len(),
            millis(gap[0])
        ),
    );
    say(
        "note",
        "--verify full compares everything while the guest stands still; without it the stop is some milliseconds",
    );
    guest.end_on(&stage.beta);
    drop(agent);
    drop(stage.hosts);
    Ok(())
}
