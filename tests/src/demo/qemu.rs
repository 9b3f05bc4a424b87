//! The demo with a real Linux guest under QEMU.

use std::time::Duration;

use anyhow::{anyhow, ensure};
use toml::{Table, Value};
use vmferry_common::units::Size;

use super::{
    Stage, VERIFIED, check_verified, migrate, millis, say, set_the_stage, start_destination,
};
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
    let to_beta = start_destination(&stage.beta)?;
    let to_alpha = start_destination(&stage.alpha)?;

    migrate(&stage.alpha, &to_beta, "demo", &[])?;
    let there = arrived(&guest, &[source.pid()], "beta")?;
    println!();
    let report = migrate(&stage.beta, &to_alpha, "demo", &VERIFIED)?;
    check_verified(&report)?;
    arrived(&guest, &[source.pid(), there], "alpha")?;
    println!();
    say(
        "verified",
        "every block of memory and disks was compared on both sides; the guest runs and finds nothing wrong",
    );
    Ok(())
}

/// One file on each host serves both agents there.
fn write_guest_files(stage: &Stage, alpha: &Place, beta: &Place) -> anyhow::Result<()> {
    for (host, place, from) in [(&stage.alpha, alpha, "beta"), (&stage.beta, beta, "alpha")] {
        let launch = place
            .argv(Start::Incoming)
            .into_iter()
            .map(Value::from)
            .collect();
        let mut table = Table::new();
        table.insert("name".into(), "demo".into());
        table.insert("driver".into(), "qemu".into());
        table.insert("qmp".into(), place.qmp_path().display().to_string().into());
        table.insert("from".into(), Value::Array(vec![from.into()]));
        table.insert("launch".into(), Value::Array(launch));
        host.write_guest("demo", &table)?;
    }
    Ok(())
}

/// The guest runs in another process than `before`, with all of its content, and has not missed a beat. Returns that process.
fn arrived(guest: &Guest, before: &[u32], host: &str) -> anyhow::Result<u32> {
    let process = guest
        .beats()
        .wait_for_other(before, Duration::from_secs(30))?;
    guest.wait_for_beats(300)?;
    let verdict = guest.verify_now()?;
    guest.check_no_corrupt()?;
    let report = guest.beats().report(1)?;
    let gap = report
        .handovers
        .last()
        .ok_or_else(|| anyhow!("the guest did not move"))?;
    println!();
    say(
        "guest",
        &format!(
            "runs on {host}, process {process}, and has checked all of its memory and disks: {verdict}"
        ),
    );
    say(
        "heartbeat",
        &format!(
            "{} beats stamped outside, none missing; {} between the last there and the first on {host}",
            report.beats,
            millis(gap.length)
        ),
    );
    Ok(process)
}
