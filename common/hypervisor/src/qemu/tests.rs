//! The driver against real QEMUs.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::geometry::{RegionBits, RegionLen, Run};
use vmferry_proto::ids::RegionId;
use vmferry_proto::spec::{RegionKind, RunState};

use super::qmp::{Qmp, QmpError};
use super::testing::{COUNTER, Host, Running};
use super::{QemuSource, QemuTarget};
use crate::config::{DiskConfig, DiskMode, DriverKind, SourceConfig, TargetConfig};
use crate::error::GuestError;
use crate::guest::{GuestLife, RegionReader, Settlement, SourceGuest, TargetGuest};
use crate::launch::{LaunchJournal, Recorded};
use crate::open::TargetOptions;

fn source_config(host: &Host) -> SourceConfig {
    SourceConfig {
        name: "web-1".parse().unwrap(),
        driver: DriverKind::Qemu,
        qmp: Some(host.path("qmp")),
        socket: None,
        disks: Vec::new(),
        from: Vec::new(),
        launch: None,
    }
}

fn target_config(host: &Host, launch: Option<Vec<String>>) -> TargetConfig {
    TargetConfig {
        name: "web-1".parse().unwrap(),
        driver: DriverKind::Qemu,
        qmp: Some(host.path("qmp")),
        socket: None,
        from: vec!["alpha".to_owned()],
        launch,
        disks: Vec::new(),
    }
}

/// There is no agent here whose death could leave a process.
#[derive(Debug)]
struct Journal;

#[async_trait::async_trait]
impl LaunchJournal for Journal {
    async fn record(&self, process: &ProcessIdentity) -> Result<Recorded, GuestError> {
        Ok(Recorded::durably(process.clone()))
    }
}

fn options(host: &Host) -> TargetOptions {
    TargetOptions {
        run_dir: host.folder().to_owned(),
        journal: Arc::new(Journal),
        populated: Arc::default(),
    }
}

async fn attach(host: &Host) -> QemuSource {
    QemuSource::attach(&source_config(host)).await.unwrap()
}

fn region(source: &QemuSource, name: &str) -> RegionId {
    let regions = &source.spec().regions;
    regions
        .iter()
        .find(|region| region.name == name)
        .unwrap()
        .id
}

/// The counter that the boot sector keeps.
async fn counter(reader: &Arc<dyn RegionReader>) -> u32 {
    let mut bytes = [0; 4096];
    let run = Run {
        offset: COUNTER,
        len: 4096,
    };
    reader.read(&[run], &mut bytes).await.unwrap();
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

/// Waits until the boot sector counts.
async fn wait_for_work(reader: &Arc<dyn RegionReader>) {
    for _ in 0..1500 {
        if counter(reader).await > 20 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the boot sector does not run");
}

/// A source whose guest is at work.
async fn at_work(host: &Host, extra: &[&str]) -> (Running, QemuSource) {
    let running = host.start(extra).await;
    let source = attach(host).await;
    let memory = source.reader(region(&source, "pc.ram")).unwrap();
    wait_for_work(&memory).await;
    (running, source)
}

/// Copies the dirty blocks of every region; returns how many.
async fn copy_round(source: &mut QemuSource, target: &QemuTarget) -> u64 {
    let ids: Vec<RegionId> = source
        .spec()
        .regions
        .iter()
        .map(|region| region.id)
        .collect();
    let mut taken = Vec::new();
    for id in ids {
        taken.push((id, source.take_dirty(id).await.unwrap()));
    }
    source.io_barrier().await.unwrap();
    let mut blocks = 0;
    for (id, taken) in taken {
        blocks += taken.dirty.count();
        copy(source, target, id, &taken.dirty, &taken.zero).await;
        source.settle(id, Settlement::Acknowledged).await.unwrap();
    }
    blocks
}

async fn copy(
    source: &QemuSource,
    target: &QemuTarget,
    id: RegionId,
    dirty: &RegionBits,
    zero: &RegionBits,
) {
    let (reader, writer) = (source.reader(id).unwrap(), target.writer(id).unwrap());
    let len = dirty.region_len();
    for (window, bits) in dirty.iter() {
        let known = bits.and(&zero.get(window));
        writer.zero(&len.runs(window, &known)).await.unwrap();
        let rest = bits.minus(&known);
        let runs = len.runs(window, &rest);
        let mut data = vec![0; len.bytes_of(window, &rest) as usize];
        reader.read(&runs, &mut data).await.unwrap();
        writer.write(&runs, &data).await.unwrap();
    }
}

async fn content(reader: &dyn RegionReader, len: RegionLen) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(len.0).unwrap()];
    let run = Run {
        offset: 0,
        len: u32::try_from(len.0).unwrap(),
    };
    reader.read(&[run], &mut data).await.unwrap();
    data
}

async fn assert_alike(source: &QemuSource, target: &QemuTarget) {
    for region in &source.spec().regions {
        let here = content(&*source.reader(region.id).unwrap(), region.len).await;
        let there = content(&*target.writer(region.id).unwrap(), region.len).await;
        let differs = here.iter().zip(&there).position(|(a, b)| a != b);
        assert_eq!(differs, None, "region {} differs", region.name);
    }
}

fn assert_images_alike(a: &Host, b: &Host) {
    for (format, name) in [("raw", "d0.raw"), ("qcow2", "d1.qcow2")] {
        let output = std::process::Command::new("qemu-img")
            .args(["compare", "-U", "-f", format, "-F", format])
            .args([a.path(name), b.path(name)])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {said}");
    }
}

/// What this driver could leave in a QEMU: exports, server, bitmaps, descriptor sets, a userfaultfd.
async fn assert_no_trace(running: &Running) {
    assert_eq!(
        running.ask("query-block-exports", json!({})).await,
        json!([])
    );
    assert_eq!(running.ask("query-fdsets", json!({})).await, json!([]));
    let nodes = running
        .ask("query-named-block-nodes", json!({"flat": true}))
        .await;
    assert!(
        !nodes.to_string().contains("dirty-bitmaps"),
        "a bitmap is left"
    );
    let objects = running.ask("qom-list", json!({"path": "/objects"})).await;
    assert!(
        !objects.to_string().contains("vmferry"),
        "a mark is left: {objects}"
    );
    let refused = running.admin().execute("nbd-server-stop", json!({})).await;
    assert!(refused.is_err(), "an NBD server is left");
    for entry in std::fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap() {
        let link = std::fs::read_link(entry.unwrap().path()).unwrap_or_default();
        assert!(
            !link.to_string_lossy().contains("userfaultfd"),
            "a userfaultfd is left"
        );
    }
}

fn two_hosts() -> Option<(Host, Host)> {
    Some((Host::source()?, Host::destination()?))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_is_described_and_left_as_it_was() {
    let Some(host) = Host::source() else { return };
    std::fs::write(host.path("cd.iso"), vec![1; 1 << 20]).unwrap();
    let cd = format!(
        "if=ide,media=cdrom,id=cd0,readonly=on,file={}",
        host.path("cd.iso").display()
    );
    let running = host.start(&["-drive", &cd]).await;
    let mut source = attach(&host).await;
    let spec = source.spec().clone();
    assert_eq!((spec.machine.as_str(), spec.vcpus), ("pc-q35-8.0", 2));
    assert_eq!(spec.cpu_model, "qemu64-x86_64-cpu");
    assert_eq!(spec.uuid.unwrap()[..4], [0x12, 0x34, 0x56, 0x78]);
    assert_eq!(spec.run_state, RunState::Running);
    let disks: Vec<(&str, u64)> = spec
        .regions
        .iter()
        .filter(|region| region.kind == RegionKind::Disk)
        .map(|region| (region.name.as_str(), region.len.0))
        .collect();
    assert_eq!(disks, [("disk0", 24 << 20), ("old1", 24 << 20)]);
    assert_eq!(
        spec.regions
            .iter()
            .find(|region| region.name == "pc.ram")
            .unwrap()
            .len
            .0,
        48 << 20
    );
    assert!(
        spec.devices
            .iter()
            .any(|device| device.kind == "read-only, 1048576 bytes")
    );
    assert!(
        spec.devices
            .iter()
            .any(|device| device.kind == "virtio-rng-pci")
    );
    assert!(
        spec.devices
            .iter()
            .any(|device| device.path.ends_with("/vd0"))
    );
    assert_eq!(source.process().pid, running.pid());
    source.start_tracking().await.unwrap();
    source.stop_tracking().await.unwrap();
    source.stop_tracking().await.unwrap();
    assert_no_trace(&running).await;
    assert_eq!(running.status().await, "running");
}

/// A whole migration of the guest at `from` to `target`; the target is not started yet.
async fn migrate(source: &mut QemuSource, target: &mut QemuTarget, rounds: usize) {
    source.start_tracking().await.unwrap();
    for _ in 0..rounds {
        copy_round(source, target).await;
    }
    let paused = source.pause().await.unwrap();
    copy_round(source, target).await;
    assert_eq!(
        copy_round(source, target).await,
        0,
        "a paused guest dirtied something"
    );
    source.still_paused(&paused).await.unwrap();
    assert_alike(source, target).await;
    let state = source.save_device_state(&paused).await.unwrap();
    source.still_paused(&paused).await.unwrap();
    target.flush().await.unwrap();
    target.load_device_state(&state).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_memory_and_disks_moves_and_goes_on() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let (mut there, mut source) = at_work(&alpha, &[]).await;
    // Without -S: only the rewritten run state keeps it paused.
    let waiting = beta.start(&["-incoming", "defer"]).await;
    let config = target_config(&beta, None);
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    // An early `cont` by somebody.
    waiting.ask("cont", json!({})).await;
    migrate(&mut source, &mut target, 3).await;
    assert_images_alike(&alpha, &beta);
    let memory = target.writer(region(&source, "pc.ram")).unwrap();
    let memory: Arc<dyn RegionReader> = memory;
    let at_pause = counter(&memory).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(waiting.status().await, "paused");
    assert_eq!(counter(&memory).await, at_pause, "it ran before its start");
    target.start_permitted(RunState::Running).await.unwrap();
    for _ in 0..500 {
        if counter(&memory).await > at_pause + 20 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(counter(&memory).await > at_pause + 20, "it does not go on");
    assert!(
        target.discard().await.is_err(),
        "a started guest was discarded"
    );
    assert_eq!(waiting.status().await, "running");
    assert_eq!(there.status().await, "paused");
    source.release().await.unwrap();
    source.release().await.unwrap();
    there.wait().await;
    assert!(!matches!(*source.life().borrow(), GuestLife::Alive));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_guest_arrives_paused_on_direct_disks_and_shared_memory() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let lines = [&alpha, &beta].map(|host| {
        let ram = format!(
            "memory-backend-file,id=m0,size=48M,share=on,mem-path={}",
            host.path("ram").display()
        );
        let mut line = host.command_line(&["-object", &ram, "-machine", "memory-backend=m0"]);
        for part in &mut line {
            if part.starts_with("driver=raw") || part.starts_with("driver=file") {
                part.push_str(",cache.direct=on");
            }
        }
        line
    });
    let there = alpha.start_line(&lines[0]).await;
    let mut source = attach(&alpha).await;
    let ram = source.spec().regions[0].clone();
    let memory = source.reader(ram.id).unwrap();
    wait_for_work(&memory).await;
    source.start_tracking().await.unwrap();
    assert!(source.io_barrier().await.unwrap() > Duration::ZERO);
    source.stop_tracking().await.unwrap();
    there.ask("stop", json!({})).await;
    drop((source, memory));
    let mut source = attach(&alpha).await;
    assert_eq!(source.spec().run_state, RunState::Paused);
    let mut config = target_config(&beta, Some(lines[1].clone()));
    config
        .launch
        .as_mut()
        .unwrap()
        .extend(["-incoming", "defer", "-S"].map(str::to_owned));
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    migrate(&mut source, &mut target, 1).await;
    target.start_permitted(RunState::Paused).await.unwrap();
    drop(target);
    // It outlives the agent's handle, and can go back.
    let back = attach(&beta).await;
    assert_eq!(back.spec().run_state, RunState::Paused);
    let mut back = back;
    back.start_tracking().await.unwrap();
    back.stop_tracking().await.unwrap();
    back.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_rolled_back_after_the_save_is_followed_by_one_that_loses_nothing() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let (there, mut source) = at_work(&alpha, &[]).await;
    let mut line = beta.command_line(&["-incoming", "defer", "-S"]);
    line.insert(1, "-S".to_owned());
    let config = target_config(&beta, Some(line));
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    let first = target.process();
    source.start_tracking().await.unwrap();
    copy_round(&mut source, &target).await;
    let paused = source.pause().await.unwrap();
    // Taken in the pause and put back: must come again.
    let disk = region(&source, "disk0");
    let taken = source.take_dirty(disk).await.unwrap();
    source.settle(disk, Settlement::PutBack).await.unwrap();
    let state = source.save_device_state(&paused).await.unwrap();
    // What is not flushed dies with that QEMU.
    target.flush().await.unwrap();
    target.load_device_state(&state).await.unwrap();
    source.resume_permitted(RunState::Running).await.unwrap();
    assert_eq!(there.status().await, "running");
    let before = target.incarnations();
    target.renew().await.unwrap();
    let renewed = target.incarnations();
    assert_ne!(target.process(), first);
    assert_ne!(before[0], renewed[0], "memory keeps its incarnation");
    assert_eq!(before[usize::from(disk.0)], renewed[usize::from(disk.0)]);
    let again = source.take_dirty(disk).await.unwrap();
    let lost: u64 = taken
        .dirty
        .iter()
        .map(|(window, bits)| u64::from(bits.minus(&again.dirty.get(window)).count()))
        .sum();
    assert_eq!(lost, 0, "marks were lost");
    source.settle(disk, Settlement::PutBack).await.unwrap();
    for region in source.spec().regions.clone() {
        if region.kind == RegionKind::Memory {
            copy(
                &source,
                &target,
                region.id,
                &RegionBits::full(region.len),
                &RegionBits::empty(region.len),
            )
            .await;
        }
    }
    copy_round(&mut source, &target).await;
    let paused = source.pause().await.unwrap();
    copy_round(&mut source, &target).await;
    assert_alike(&source, &target).await;
    let state = source.save_device_state(&paused).await.unwrap();
    target.flush().await.unwrap();
    target.load_device_state(&state).await.unwrap();
    assert_images_alike(&alpha, &beta);
    source.resume_permitted(RunState::Running).await.unwrap();
    source.stop_tracking().await.unwrap();
    assert_no_trace(&there).await;
    let process = target.process();
    target.discard().await.unwrap();
    target.discard().await.unwrap();
    assert!(!process.is_alive().unwrap(), "the launched QEMU still runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_touches_the_paused_guest_is_noticed() {
    let Some(host) = Host::source() else { return };
    let (there, mut source) = at_work(&host, &[]).await;
    source.start_tracking().await.unwrap();
    let paused = source.pause().await.unwrap();
    source.still_paused(&paused).await.unwrap();
    there.ask("cont", json!({})).await;
    there.ask("stop", json!({})).await;
    let error = source.still_paused(&paused).await.unwrap_err();
    assert!(
        matches!(&error, GuestError::Touched(what) if what.contains("resumed")),
        "{error}"
    );
    assert!(source.save_device_state(&paused).await.is_err());
    source.resume_permitted(RunState::Running).await.unwrap();
    there
        .ask(
            "device_add",
            json!({"driver": "virtio-rng-pci", "id": "new0", "bus": "rp0"}),
        )
        .await;
    let error = source.pause().await.unwrap_err();
    assert_eq!(error.before, Some(RunState::Running));
    assert!(
        error
            .source
            .to_string()
            .contains("new0 (virtio-rng-pci) is new"),
        "{}",
        error.source
    );
    source.resume_permitted(RunState::Running).await.unwrap();
    there
        .ask(
            "block_resize",
            json!({"node-name": "disk0", "size": 32 << 20}),
        )
        .await;
    let error = source.pause().await.unwrap_err().source.to_string();
    assert!(
        error.contains("disk disk0 (node disk0) of 33554432 bytes is new"),
        "{error}"
    );
    source.resume_permitted(RunState::Running).await.unwrap();
    source.stop_tracking().await.unwrap();
    assert_no_trace(&there).await;
}

/// What a CPU runs first after a reset: asks the keyboard controller for the next one, and waits for it.
///
/// ```text
/// al = 0xfe; out 0x64, al; again: hlt; jmp again
/// ```
const RESET_AGAIN: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_reboots_all_the_time_is_paused_and_nobody_else_is_blamed() {
    let Some(host) = Host::source() else { return };
    let mut firmware = vec![0xf4; 64 << 10];
    let reset_vector = firmware.len() - 16;
    firmware[reset_vector..][..RESET_AGAIN.len()].copy_from_slice(&RESET_AGAIN);
    let file = host.path("firmware");
    std::fs::write(&file, firmware).unwrap();
    let there = host.start(&["-bios", file.to_str().unwrap()]).await;
    let mut source = attach(&host).await;
    source.start_tracking().await.unwrap();
    let resets = || async {
        there.ask("query-status", json!({})).await;
        there.admin().tally().resets.by_guest
    };
    let (mut clean, mut rebooted) = (0, 0);
    for _ in 0..100 {
        let before = resets().await;
        let outcome = match source.pause().await {
            Ok(paused) => source.still_paused(&paused).await,
            Err(error) => Err(error.source),
        };
        match outcome {
            Ok(()) => clean += 1,
            Err(GuestError::Rebooted) => rebooted += 1,
            Err(other) => panic!("{other}"),
        }
        source.resume_permitted(RunState::Running).await.unwrap();
        // It reboots between two pauses, whatever the pause met.
        while resets().await < before + 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    println!("{clean} pauses met no reset, {rebooted} did");
    assert!(clean > 0);
    source.stop_tracking().await.unwrap();
    assert_no_trace(&there).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_shuts_down_or_dies_ends_its_life_once() {
    let Some(host) = Host::source() else { return };
    let there = host.start(&["-no-shutdown"]).await;
    let mut source = attach(&host).await;
    let mut life = source.life();
    source.start_tracking().await.unwrap();
    there.ask("cont", json!({})).await;
    there.admin().human("nmi").await.unwrap();
    assert_eq!(*life.borrow(), GuestLife::Alive);
    drop(there);
    let end = life
        .wait_for(|life| *life != GuestLife::Alive)
        .await
        .unwrap()
        .clone();
    assert!(
        matches!(&end, GuestLife::Gone(how) if how.contains("ended")),
        "{end:?}"
    );
    assert!(source.pause().await.is_err());
    source.stop_tracking().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_nvme_device_is_refused_by_name_and_its_guest_lives() {
    let Some(host) = Host::source() else { return };
    std::fs::File::create(host.path("n.raw"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let drive = format!(
        "if=none,id=n0,format=raw,file={}",
        host.path("n.raw").display()
    );
    let there = host
        .start(&["-drive", &drive, "-device", "nvme,drive=n0,serial=x"])
        .await;
    let error = QemuSource::attach(&source_config(&host)).await.unwrap_err();
    assert!(matches!(error, GuestError::Incompatible(_)));
    assert!(error.to_string().contains("nvme"), "{error}");
    assert_eq!(there.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_was_never_started_is_refused() {
    let Some(host) = Host::source() else { return };
    let _there = host.start(&["-S"]).await;
    let error = QemuSource::attach(&source_config(&host)).await.unwrap_err();
    assert!(error.to_string().contains("prelaunch"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_socket_of_a_real_qemu_is_told() {
    let Some(host) = Host::source() else { return };
    let there = host.start(&[]).await;
    let error = Qmp::connect_within(&host.path("admin"), Duration::from_millis(300))
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    assert_eq!(there.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn anothers_nbd_server_is_neither_used_nor_stopped() {
    let Some(host) = Host::source() else { return };
    let there = host.start(&[]).await;
    let path = host.path("foreign").display().to_string();
    let address = json!({"addr": {"type": "unix", "data": {"path": path}}});
    there.ask("nbd-server-start", address).await;
    let mut source = attach(&host).await;
    let error = source.start_tracking().await.unwrap_err();
    assert!(error.to_string().contains("another program"), "{error}");
    source.stop_tracking().await.unwrap();
    drop(source);
    there
        .ask(
            "block-export-add",
            json!({"type": "nbd", "id": "backup", "node-name": "disk0"}),
        )
        .await;
    let error = QemuSource::attach(&source_config(&host)).await.unwrap_err();
    assert!(error.to_string().contains("block export backup"), "{error}");
    there.ask("nbd-server-stop", json!({})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_agent_left_is_removed_at_the_next_attach() {
    let Some(host) = Host::source() else { return };
    let (there, mut source) = at_work(&host, &[]).await;
    source.start_tracking().await.unwrap();
    let disk = region(&source, "old1");
    source.take_dirty(disk).await.unwrap();
    source.settle(disk, Settlement::Acknowledged).await.unwrap();
    source.take_dirty(disk).await.unwrap();
    source.pause().await.unwrap();
    // The agent dies: nothing of it is asked to tidy up.
    drop(source);
    let left = there
        .ask("query-named-block-nodes", json!({"flat": true}))
        .await;
    assert!(left.to_string().contains("vmferry-bitmap"));
    there.ask("cont", json!({})).await;
    let mut source = attach(&host).await;
    let exports = there.ask("query-block-exports", json!({})).await;
    assert_eq!(exports, json!([]));
    source.start_tracking().await.unwrap();
    assert_eq!(
        source.take_dirty(disk).await.unwrap().dirty.count(),
        (24 << 20) / 4096
    );
    source.stop_tracking().await.unwrap();
    assert_no_trace(&there).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_mismatch_is_named_with_both_values() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let there = alpha.start(&[]).await;
    let source = attach(&alpha).await;
    let mut line = beta.command_line(&[
        "-incoming",
        "defer",
        "-S",
        "-device",
        "virtio-balloon-pci,id=b0",
    ]);
    for (from, to) in [
        ("2", "1"),
        ("48", "64"),
        ("virtio-rng-pci", "virtio-keyboard-pci"),
    ] {
        *line.iter_mut().rfind(|part| *part == from).unwrap() = to.to_owned();
    }
    line.extend(["-cpu", "qemu64,+avx"].map(str::to_owned));
    let config = target_config(&beta, Some(line));
    let error = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap_err()
        .to_string();
    for part in [
        "virtual CPUs is 2 at the source and 1 here",
        "RAM block pc.ram is 50331648 bytes at the source and 67108864 here",
        "is virtio-rng-pci at the source and virtio-keyboard-pci here",
        "b0 (virtio-balloon-pci) is here but not at the source",
        "cpu/feature-word/1.ECX",
    ] {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
    assert!(
        Qmp::connect(&beta.path("qmp")).await.is_err(),
        "the QEMU that does not fit still runs"
    );
    assert_eq!(there.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_administrators_qemu_is_left_when_the_migration_ends_before_the_load() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let there = alpha.start(&[]).await;
    let source = attach(&alpha).await;
    let waiting = beta.start(&["-incoming", "defer", "-S"]).await;
    let config = target_config(&beta, None);
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    target.discard().await.unwrap();
    drop(target);
    assert_eq!(waiting.status().await, "inmigrate");
    assert_no_trace(&waiting).await;
    let mut again = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    let error = again
        .load_device_state(b"QEVM\0\0\0\x03 nonsense")
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("not as QEMU writes it"),
        "{error}"
    );
    assert!(
        again
            .renew()
            .await
            .unwrap_err()
            .to_string()
            .contains("launch")
    );
    let running = target_config(&alpha, None);
    drop(source);
    let error = QemuTarget::prepare(&running, again.spec(), &options(&alpha))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("-incoming defer"), "{error}");
    assert_eq!(there.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_launch_that_fails_shows_qemus_own_words() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let there = alpha.start(&[]).await;
    let source = attach(&alpha).await;
    let mut line = beta.command_line(&["-incoming", "defer", "-S"]);
    line.extend(["-device", "no-such-device"].map(str::to_owned));
    let config = target_config(&beta, Some(line));
    let error = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no-such-device"), "{error}");
    let missing = PathBuf::from("/nonexistent/qemu").display().to_string();
    let config = target_config(&beta, Some(vec![missing]));
    let error = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");
    drop(there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_somebody_else_starts_before_the_commit_is_ended() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    let (there, mut source) = at_work(&alpha, &[]).await;
    let mut waiting = beta.start(&["-incoming", "defer", "-S"]).await;
    let config = target_config(&beta, None);
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    migrate(&mut source, &mut target, 1).await;
    // Whatever it answers: it may be dead before the answer.
    let _ = waiting.admin().execute("cont", json!({})).await;
    waiting.wait().await;
    let mut life = target.life();
    life.wait_for(|life| *life != GuestLife::Alive)
        .await
        .unwrap();
    assert!(target.start_permitted(RunState::Running).await.is_err());
    source.resume_permitted(RunState::Running).await.unwrap();
    assert_eq!(there.status().await, "running");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_disk_is_not_copied_and_changes_hands_with_the_guest() {
    let Some((alpha, beta)) = two_hosts() else {
        return;
    };
    std::fs::remove_file(beta.path("d1.qcow2")).unwrap();
    std::os::unix::fs::symlink(alpha.path("d1.qcow2"), beta.path("d1.qcow2")).unwrap();
    let shared = DiskConfig {
        node: "old1".to_owned(),
        mode: DiskMode::Shared,
    };
    let there = alpha.start(&[]).await;
    let mut config = source_config(&alpha);
    config.disks = vec![shared.clone()];
    let mut source = QemuSource::attach(&config).await.unwrap();
    assert_eq!(source.spec().shared_disks, ["old1"]);
    assert!(
        !source
            .spec()
            .regions
            .iter()
            .any(|region| region.name == "old1")
    );
    let memory = source.reader(region(&source, "pc.ram")).unwrap();
    wait_for_work(&memory).await;
    let waiting = beta.start(&["-incoming", "defer", "-S"]).await;
    let config = target_config(&beta, None);
    let error = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("disk/old1 (shared"), "{error}");
    let mut config = config;
    config.disks = vec![shared];
    let mut target = QemuTarget::prepare(&config, source.spec(), &options(&beta))
        .await
        .unwrap();
    // Rolled back once after the images were let go.
    source.start_tracking().await.unwrap();
    let paused = source.pause().await.unwrap();
    source.save_device_state(&paused).await.unwrap();
    source.resume_permitted(RunState::Running).await.unwrap();
    assert_eq!(there.status().await, "running");
    source.stop_tracking().await.unwrap();
    migrate(&mut source, &mut target, 2).await;
    let memory: Arc<dyn RegionReader> = target.writer(region(&source, "pc.ram")).unwrap();
    let at_pause = counter(&memory).await;
    target.start_permitted(RunState::Running).await.unwrap();
    for _ in 0..500 {
        if counter(&memory).await > at_pause + 20 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(counter(&memory).await > at_pause + 20, "it does not go on");
    assert_eq!(waiting.status().await, "running");
    source.release().await.unwrap();
}
