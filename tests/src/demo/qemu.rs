//! The demo with a real Linux guest under QEMU.

use std::time::Duration;

use anyhow::{anyhow, ensure};
use toml::{Table, Value};
use vmferry_common::units::Size;

use super::{Stage, migrate, millis, say, set_the_stage, start_destination};
use crate::lab::{Disk, Guest, Images, JudgeParams, Lab, Place, Start};

/// Shows it.
pub(super) fn show(memory: u64) -> anyhow::Result<()> {
    let lab = Lab::find().map_err(|missing| anyhow!("{missing}"))?;
    let stage = set_the_stage()?;
    let mebibytes = memory >> 20;
    ensure!(
        mebibytes >= 192,
        "a Linux guest needs --memory of at least 192MiB"
    );
    let guest = lab
        .guest("demo")
        .memory_mib(mebibytes)
        .disk(Disk::raw(64 << 20))
        .disk(Disk::qcow2(64 << 20))
        .judge(JudgeParams {
            memory: memory / 2,
            dirty: 8 << 20,
            disk: 1 << 20,
            ..JudgeParams::default()
        })
        .build()?;
    let (alpha, beta) = (
        guest.place("alpha")?,
        guest.place_with("beta", Images::Blank)?,
    );
    write_guest_files(&stage, &alpha, &beta)?;
    let source = alpha.start(Start::Boot)?;
    say(
        "guest",
        &format!(
            "Linux under {} on alpha, process {}: {} of memory, a raw and a qcow2 disk, all being written",
            lab.qemu().display(),
            source.pid(),
            Size(memory)
        ),
    );
    guest.wait_ready()?;
    let agent = start_destination(&stage)?;

    migrate(&stage, &agent, "demo")?;

    conclude(&guest, source.pid())?;
    drop(agent);
    drop(stage.hosts);
    Ok(())
}

fn write_guest_files(stage: &Stage, alpha: &Place, beta: &Place) -> anyhow::Result<()> {
    let table = |place: &Place| {
        let mut table = Table::new();
        table.insert("name".into(), "demo".into());
        table.insert("driver".into(), "qemu".into());
        table.insert("qmp".into(), place.qmp_path().display().to_string().into());
        table
    };
    stage.alpha.write_guest("demo", &table(alpha))?;
    let mut there = table(beta);
    let launch = beta
        .argv(Start::Incoming)
        .into_iter()
        .map(Value::from)
        .collect();
    there.insert("from".into(), Value::Array(vec!["alpha".into()]));
    there.insert("launch".into(), Value::Array(launch));
    stage.beta.write_guest("demo", &there)?;
    Ok(())
}

fn conclude(guest: &Guest, source: u32) -> anyhow::Result<()> {
    guest
        .beats()
        .wait_for_other(&[source], Duration::from_secs(30))?;
    guest.wait_for_beats(300)?;
    let verdict = guest.verify_now()?;
    guest.check_no_corrupt()?;
    let report = guest.beats().report(1)?;
    let gap = report
        .handovers
        .first()
        .ok_or_else(|| anyhow!("the guest did not move"))?;
    println!();
    say(
        "verified",
        &format!("the guest has checked all of its memory and disks on beta: {verdict}"),
    );
    say(
        "heartbeat",
        &format!(
            "{} beats in one unbroken sequence, stamped outside; {} between the last on alpha and the first on beta",
            report.beats,
            millis(gap.length)
        ),
    );
    say(
        "note",
        "--verify full compares everything while the guest stands still; without it the stop is some milliseconds",
    );
    Ok(())
}
