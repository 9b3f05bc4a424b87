//! One Linux guest under QEMU, moved by vmferry and by QEMU itself over the same link.
//!
//! Each run boots the guest anew, with the same content, writers and disk, and the destination's QEMU waiting, which no
//! system is charged for, on a machine that was made ready. A guest that has read its disk has it in its page cache, as guests
//! come to have theirs: "modern operating systems use the better part of the physical memory to cache data from secondary
//! storage" (Jo et al., "Efficient Live Migration of Virtual Machines Using Shared Storage", VEE 2013). The gap is the longest between two beats of the guest on this machine's clock; the judge then
//! looks at every page and block. CPU time is that of agents and QEMUs without the emulated processors; what the kernel
//! does for the network is the relay's where it receives.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use vmferry_tests::bench::cpu::{CpuMeter, Watched};
use vmferry_tests::bench::native::{self, Party, Variant};
use vmferry_tests::bench::picture::{COLUMNS, Panel, Row, draw};
use vmferry_tests::bench::ready::make_ready;
use vmferry_tests::bench::{Series, Target};
use vmferry_tests::harness::qemu::{self, committed};
use vmferry_tests::harness::role::Programs;
use vmferry_tests::lab::{BeatRecorder, Content, Disk, Guest, JudgeParams, Lab, Qemu, Start};
use vmferry_tests::link::calibrate::{Flow, calibrate};
use vmferry_tests::link::{Link, LinkSpec};

use super::{Args, PROGRAMS};

const RUNS: u32 = 1;
/// A migration that takes longer has no figure.
const RUN_LIMIT: Duration = Duration::from_secs(90);
/// From this round trip on QEMU's mirror lets the guest's writes wait: they come so often that it would never be ready.
const FAR: Duration = Duration::from_millis(10);
/// The longest stop that both are told.
const DOWNTIME: Duration = Duration::from_millis(300);
const BEATS_AFTER: usize = 200;
const BEAT_LIMIT: Duration = Duration::from_secs(60);
const MIB: f64 = 1_048_576.0;
const FLOW: Flow = Flow {
    warm_up: Duration::from_secs(2),
    counted: Duration::from_secs(3),
};
/// In the tests' folder, so that a checkout has it.
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/links.svg");

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum System {
    Vmferry,
    VmferryRaw,
    Qemu(Variant),
}

impl System {
    const ALL: [Self; 5] = [
        Self::Vmferry,
        Self::VmferryRaw,
        Self::Qemu(Variant::Tls),
        Self::Qemu(Variant::MultifdTls),
        Self::Qemu(Variant::MultifdZstdTls),
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Vmferry => "vmferry",
            Self::VmferryRaw => "vmferry, not compressed",
            Self::Qemu(Variant::Tls) => "QEMU, TLS",
            Self::Qemu(Variant::MultifdTls) => "QEMU, multifd, TLS",
            Self::Qemu(Variant::MultifdZstdTls) => "QEMU, multifd, zstd, TLS",
        }
    }

    const fn is_ours(self) -> bool {
        match self {
            Self::Vmferry | Self::VmferryRaw => true,
            Self::Qemu(_) => false,
        }
    }
}

/// A guest on a link.
struct Case {
    name: &'static str,
    /// Whether the guest has read its disk.
    cached: bool,
    /// What it is like; `None` for a cable without limit.
    spec: Option<LinkSpec>,
    /// What vmferry's total time may be to QEMU's best there.
    total: Option<Target>,
}

impl Case {
    fn link(&self) -> Result<Link> {
        self.spec.map_or_else(Link::cable, Link::new)
    }
}

fn cases() -> [Case; 6] {
    let case = |name, mbit: u64, micros, loss, most| Case {
        name,
        cached: false,
        spec: Some(LinkSpec::new(mbit * 1_000_000, Duration::from_micros(micros)).lossy(loss)),
        total: Some(Target::AtMost(most)),
    };
    [
        case("1gbit", 1000, 200, 0.0, 0.8),
        Case {
            cached: true,
            ..case("1gbit, read", 1000, 200, 0.0, 0.8)
        },
        case("100mbit", 100, 20_000, 0.0, 0.9),
        Case {
            cached: true,
            ..case("100mbit, read", 100, 20_000, 0.0, 0.9)
        },
        Case {
            name: "cable",
            cached: false,
            spec: None,
            total: None,
        },
        case("lossy", 100, 80_000, 0.001, 0.9),
    ]
}

/// Takes the table, and draws it if asked.
pub(super) fn run(args: &Args) -> Result<()> {
    let lab = match Lab::find() {
        Ok(lab) => lab,
        Err(missing) => {
            println!("SKIPPED: {missing}");
            return Ok(());
        }
    };
    let mut panels = Vec::new();
    for case in cases() {
        // On the lossy line QEMU's flows crawl to the time limit: only where it is asked for.
        let asked =
            case.name.contains(&args.link) && !(args.link.is_empty() && case.name == "lossy");
        if asked {
            let panel = panel(args, lab, &case)?;
            println!("{panel}");
            judge(&case, &panel);
            panels.push(panel);
        }
    }
    if args.write {
        let note = format!(
            "Medians of {} runs on one 2-core machine, emulated link, TCG guest; cargo bench -p vmferry-tests --bench links",
            args.runs.unwrap_or(RUNS)
        );
        fs::write(PICTURE, draw(&panels, &note)).context(PICTURE)?;
        println!("wrote {PICTURE}");
    }
    Ok(())
}

fn panel(args: &Args, lab: &'static Lab, case: &Case) -> Result<Panel> {
    let link = case.link()?;
    let title = format!("{}, {}", link.spec, guest_words(args, case));
    if case.spec.is_some() {
        println!("{}", calibrate(&link, FLOW)?.line(&link));
    }
    drop(link);
    let systems = System::ALL
        .into_iter()
        .filter(|system| system.name().contains(&args.system));
    let mut table: Vec<(System, Vec<Series>)> = systems
        .map(|system| {
            let columns = COLUMNS.iter().map(|_| Series::new(system.name(), ""));
            (system, columns.collect())
        })
        .collect();
    let mut failed = Vec::new();
    // Turn and turn about: what else the machine does hits all of them.
    for _ in 0..args.runs.unwrap_or(RUNS) {
        for (system, series) in &mut table {
            // What takes too long once does so again.
            if failed.contains(system) {
                continue;
            }
            match one(args, lab, case, *system) {
                Ok(figures) => {
                    for (series, figure) in series.iter_mut().zip(figures) {
                        series.push(figure);
                    }
                }
                Err(error) => {
                    println!("  {}: {error:#}", system.name());
                    failed.push(*system);
                }
            }
        }
    }
    Ok(Panel {
        title,
        rows: table.iter().map(row).collect(),
    })
}

fn row((system, series): &(System, Vec<Series>)) -> Row {
    let mut figures = [f64::NAN; COLUMNS.len()];
    for (figure, series) in figures.iter_mut().zip(series) {
        *figure = series.median();
    }
    Row {
        name: system.name().to_owned(),
        ours: system.is_ours(),
        figures,
    }
}

fn guest_words(args: &Args, case: &Case) -> String {
    let params = params(args, case);
    format!(
        "guest of {} MiB with {} MiB of mixed content, rewriting {} MiB/s, and a disk{}",
        memory_mib(args),
        params.memory >> 20,
        params.dirty >> 20,
        if case.cached { " that it has read" } else { "" }
    )
}

const fn memory_mib(args: &Args) -> u64 {
    if args.quick { 256 } else { 384 }
}

fn params(args: &Args, case: &Case) -> JudgeParams {
    JudgeParams {
        memory: if args.quick { 64 << 20 } else { 192 << 20 },
        content: Content::Mixed,
        dirty: 2 << 20,
        working_set: 32 << 20,
        disk: 512 << 10,
        cached: case.cached,
        ..JudgeParams::default()
    }
}

/// One migration: total seconds, longest gap in ms, MiB on the wire, CPU seconds, sent to distinct.
fn one(
    args: &Args,
    lab: &'static Lab,
    case: &Case,
    system: System,
) -> Result<[f64; COLUMNS.len()]> {
    let link = case.link()?;
    let guest = lab
        .guest("moved")
        .memory_mib(memory_mib(args))
        .disk(Disk::raw(64 << 20).prefilled(32 << 20))
        .judge(params(args, case))
        .build()?;
    let programs = Programs::played_by(Path::new(PROGRAMS));
    let pair = qemu::Pair::on_link(programs, guest, &link)?;
    let source = pair.boot()?;
    let how = match system {
        System::Vmferry | System::VmferryRaw => Start::Incoming,
        System::Qemu(_) => Start::IncomingRunning,
    };
    let target = pair.beta.start(how)?;
    make_ready()?;
    let meter = CpuMeter::start();
    meter.watch(without_vcpus(&source)?);
    meter.watch(without_vcpus(&target)?);
    let (wire, began) = (on_wire(&link), Instant::now());
    let (total, sent) = match system {
        System::Vmferry => by_vmferry(&pair, &meter, &[])?,
        System::VmferryRaw => by_vmferry(&pair, &meter, &["--compress", "off"])?,
        System::Qemu(variant) => by_qemu(&pair, (&source, &target), variant, case)?,
    };
    let (wire, cpu) = (on_wire(&link) - wire, meter.used());
    pair.guest
        .beats()
        .wait_for_from(target.pid(), BEATS_AFTER, BEAT_LIMIT)?;
    let gap = longest_gap(&pair.guest, began)?;
    pair.guest.verify_now()?;
    Ok([
        total.as_secs_f64(),
        gap.as_secs_f64() * 1e3,
        wire / MIB,
        cpu.as_secs_f64(),
        sent,
    ])
}

fn by_vmferry(pair: &qemu::Pair, meter: &CpuMeter, options: &[&str]) -> Result<(Duration, f64)> {
    pair.expect_waiting()?;
    let agent = pair.beta.host.serve(&[])?;
    meter.watch(Watched::whole(agent.process.pid()));
    let downtime = format!("{}ms", DOWNTIME.as_millis());
    let mut all = vec!["--max-downtime", &downtime];
    all.extend(options);
    let began = Instant::now();
    let name = pair.guest.name();
    let source = pair.alpha.host.start_migrate_to(name, &agent.to(), &all)?;
    meter.watch(Watched::whole(source.pid()));
    let done = source.wait(RUN_LIMIT)?;
    let total = began.elapsed();
    let report = committed(&done, &agent)?;
    let number = |name: &str| report[name].as_f64().with_context(|| name.to_owned());
    let blocks = (number("memory_bytes")? + number("disk_bytes")?) / 4096.0;
    Ok((total, 1.0 + number("resent_blocks")? / blocks))
}

fn by_qemu(
    pair: &qemu::Pair,
    (source, target): (&Qemu, &Qemu),
    variant: Variant,
    case: &Case,
) -> Result<(Duration, f64)> {
    let migration = native::Migration {
        variant,
        source: Party {
            side: &pair.alpha,
            qemu: source,
        },
        target: Party {
            side: &pair.beta,
            qemu: target,
        },
        disks: &["vda"],
        writes_wait: case.spec.is_some_and(|spec| spec.rtt >= FAR),
        downtime: DOWNTIME,
        limit: RUN_LIMIT,
    };
    let moved = migration.run()?;
    Ok((moved.total, moved.sent_to_distinct))
}

fn without_vcpus(qemu: &Qemu) -> Result<Watched> {
    let cpus = qemu.qmp().execute("query-cpus-fast", json!({}))?;
    let threads = cpus.as_array().into_iter().flatten();
    let ids = threads.filter_map(|cpu| u32::try_from(cpu["thread-id"].as_u64()?).ok());
    Ok(Watched {
        pid: qemu.pid(),
        without: ids.collect(),
    })
}

fn on_wire(link: &Link) -> f64 {
    (link.forth().bytes + link.back().bytes) as f64
}

/// The longest time between two beats since `began`, whoever sent them; all of them must be one sequence.
fn longest_gap(guest: &Guest, began: Instant) -> Result<Duration> {
    let beats: &BeatRecorder = guest.beats();
    beats.report(1)?;
    let streams = beats.streams();
    let mut times: Vec<Instant> = streams
        .iter()
        .flat_map(|stream| stream.beats.iter().map(|beat| beat.at))
        .filter(|at| *at >= began)
        .collect();
    times.sort_unstable();
    let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
    gaps.max().context("no beats")
}

/// Whether the targets are met, where all that they speak of was measured.
fn judge(case: &Case, panel: &Panel) {
    const TOTAL: usize = 0;
    const WIRE: usize = 2;
    let figure = |system: System, column: usize| {
        let row = panel.rows.iter().find(|row| row.name == system.name());
        row.map_or(f64::NAN, |row| row.figures[column])
    };
    let verdict = |what: &str, target: Target, ours: f64, theirs: f64| {
        if ours.is_finite() && theirs.is_finite() {
            target.judge(what, ours / theirs, "");
        }
    };
    let [tls, multifd, zstd] =
        [Variant::Tls, Variant::MultifdTls, Variant::MultifdZstdTls].map(System::Qemu);
    if let Some(target) = case.total {
        let best = [tls, multifd, zstd]
            .map(|system| figure(system, TOTAL))
            .into_iter()
            .fold(f64::NAN, f64::min);
        let ours = figure(System::Vmferry, TOTAL);
        verdict("total time to the best of QEMU's", target, ours, best);
        verdict(
            "wire bytes to QEMU multifd zstd",
            Target::AtMost(0.85),
            figure(System::Vmferry, WIRE),
            figure(zstd, WIRE),
        );
        return;
    }
    // Without a limit it is a matter of cores: not compressed against not compressed.
    for (system, most) in [(tls, 0.45), (multifd, 0.75)] {
        verdict(
            &format!("total time, not compressed, to {}", system.name()),
            Target::AtMost(most),
            figure(System::VmferryRaw, TOTAL),
            figure(system, TOTAL),
        );
    }
}
