//! The embedded guest's real process, and the `sim` driver on it: a copy made by hand as an engine makes it.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a test may panic, and its numbers are small"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use vmferry_common::process::ProcessIdentity;
use vmferry_hypervisor::config::{SourceConfig, TargetConfig};
use vmferry_hypervisor::launch::{LaunchJournal, Recorded};
use vmferry_hypervisor::memory::{MemoryBlock, ProcessMemory};
use vmferry_hypervisor::open::{TargetOptions, open_source, open_target};
use vmferry_hypervisor::{GuestError, GuestLife, Settlement, SourceGuest, TargetGuest};
use vmferry_proto::geometry::Run;
use vmferry_proto::ids::RegionId;
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::RunState;
use vmferry_simguest::protocol::State;
use vmferry_simguest::{Client, Content, Workload};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmferry-simguest");
const START_LIMIT: Duration = Duration::from_secs(30);
const RAM: RegionId = RegionId(0);
const DISK: RegionId = RegionId(1);

/// There is no agent here whose death could leave a process.
#[derive(Debug)]
struct Journal;

#[async_trait::async_trait]
impl LaunchJournal for Journal {
    async fn record(&self, process: &ProcessIdentity) -> Result<Recorded, GuestError> {
        Ok(Recorded::durably(process.clone()))
    }
}

/// A folder with a source guest in it, ended with the test.
struct Source {
    folder: tempfile::TempDir,
    child: Child,
}

impl Source {
    fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new(PROGRAM)
            .args(["run", "--name", "g", "--socket"])
            .arg(folder.path().join("a.sock"))
            .args(arguments)
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let source = Self { folder, child };
        source.client();
        source
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn client(&self) -> Client {
        Client::connect_within(&self.path("a.sock"), START_LIMIT).unwrap()
    }

    fn config(&self) -> SourceConfig {
        let socket = self.path("a.sock");
        toml::from_str(&format!(
            "name = \"g\"\ndriver = \"sim\"\nsocket = {socket:?}"
        ))
        .unwrap()
    }

    /// A guest file that launches the destination with `arguments`.
    fn target(&self, arguments: &[&str]) -> TargetConfig {
        let socket = self.path("b.sock");
        let mut launch = vec![PROGRAM, "run", "--name", "g", "--incoming", "--socket"];
        launch.push(socket.to_str().unwrap());
        launch.extend(arguments);
        let text =
            format!("name = \"g\"\ndriver = \"sim\"\nsocket = {socket:?}\nlaunch = {launch:?}");
        toml::from_str(&text).unwrap()
    }

    fn options(&self) -> TargetOptions {
        TargetOptions {
            run_dir: self.folder.path().to_owned(),
            journal: Arc::new(Journal),
            populated: Arc::default(),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Ok(mut client) = Client::connect(&self.path("b.sock")) {
            let _ = client.quit();
        }
    }
}

/// One round for all regions: take, barrier, read, write. Returns (blocks sent, blocks told as zero).
async fn round(source: &mut dyn SourceGuest, target: &dyn TargetGuest) -> (u64, u64) {
    let regions = source.spec().regions.clone();
    let (mut sent, mut zeroed) = (0, 0);
    for region in &regions {
        let taken = source.take_dirty(region.id).await.unwrap();
        source.io_barrier().await.unwrap();
        let reader = source.reader(region.id).unwrap();
        let writer = target.writer(region.id).unwrap();
        for (window, dirty) in taken.dirty.iter() {
            let zero = dirty.and(&taken.zero.get(window));
            let data = dirty.minus(&zero);
            writer.zero(&region.len.runs(window, &zero)).await.unwrap();
            let runs = region.len.runs(window, &data);
            let mut bytes = vec![0; region.len.bytes_of(window, &data) as usize];
            reader.read(&runs, &mut bytes).await.unwrap();
            writer.write(&runs, &bytes).await.unwrap();
            sent += u64::from(data.count());
            zeroed += u64::from(zero.count());
        }
        let done = source.settle(region.id, Settlement::Acknowledged).await;
        done.unwrap();
    }
    (sent, zeroed)
}

fn whole(len: u64) -> [Run; 1] {
    [Run {
        offset: 0,
        len: len as u32,
    }]
}

/// Bytes of the whole region at the destination.
async fn content(guest: &dyn TargetGuest, region: RegionId, len: u64) -> Vec<u8> {
    let mut bytes = vec![1; len as usize];
    let reader = guest.writer(region).unwrap();
    reader.read(&whole(len), &mut bytes).await.unwrap();
    bytes
}

async fn assert_alike(source: &dyn SourceGuest, target: &dyn TargetGuest) {
    for region in &source.spec().regions {
        let mut bytes = vec![2; region.len.0 as usize];
        let reader = source.reader(region.id).unwrap();
        reader.read(&whole(region.len.0), &mut bytes).await.unwrap();
        let there = content(target, region.id, region.len.0).await;
        assert!(bytes == there, "{} differs", region.name);
    }
}

fn fds_of(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

async fn moves(kind: &str) {
    let sizes = ["--ram", "48MiB", "--ram-kind", kind, "--disk-size", "16MiB"];
    let busy = "--dirty-rate 40MiB/s --working-set 8MiB --disk-rate 4MiB/s --disk a.img --heartbeat beats --fill 60%";
    let busy: Vec<&str> = busy.split(' ').collect();
    let here = Source::start(&[&sizes[..], &busy].concat());
    // The destination's image held something else before.
    let (image, beats) = (here.path("b.img"), here.path("beats"));
    std::fs::write(&image, vec![0xa5; 16 << 20]).unwrap();
    let (image, beats) = (image.to_str().unwrap(), beats.to_str().unwrap());
    let mut source = open_source(&here.config()).await.unwrap();
    let spec = source.spec().clone();
    assert_eq!((spec.run_state, spec.regions.len()), (RunState::Running, 2));
    let config = here.target(&[&sizes[..], &["--disk", image, "--heartbeat", beats]].concat());
    let mut target = open_target(&config, &spec, &here.options()).await.unwrap();
    let fds = fds_of(source.process().pid);

    source.start_tracking().await.unwrap();
    let (sent, zeroed) = round(&mut *source, &*target).await;
    let all: u64 = spec.regions.iter().map(|region| region.len.blocks()).sum();
    assert_eq!(
        sent + zeroed,
        all,
        "the first pass accounts for every block"
    );
    assert!(
        zeroed > all / 8,
        "untouched memory and holes were not known: {zeroed} of {all}"
    );
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        let (sent, zeroed) = round(&mut *source, &*target).await;
        assert!(
            sent > 0 && sent + zeroed < all / 2,
            "{sent} and {zeroed} of {all}"
        );
    }
    let paused = source.pause().await.unwrap();
    assert_eq!(paused.before(), RunState::Running);
    round(&mut *source, &*target).await;
    let more = round(&mut *source, &*target).await;
    assert_eq!(more, (0, 0), "a paused guest wrote");
    assert_alike(&*source, &*target).await;
    target.flush().await.unwrap();
    let state = source.save_device_state(&paused).await.unwrap();
    target.load_device_state(&state).await.unwrap();
    source.still_paused(&paused).await.unwrap();

    let left = here.client().status().unwrap();
    let mut after = Client::connect(&here.path("b.sock")).unwrap();
    let arrived = after.status().unwrap();
    assert_eq!((arrived.state, arrived.steps), (State::Paused, left.steps));
    assert!(after.verify().unwrap().ok);
    after.cont().unwrap();
    source.stop_tracking().await.unwrap();
    let now = fds_of(source.process().pid);
    // The client of this test may still be connected, or not any more.
    assert!(now <= fds + 1, "tracking left something in the guest");
    source.release().await.unwrap();
    while after.status().unwrap().steps < left.steps + 1000 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let verdict = after.verify().unwrap();
    assert!(verdict.ok, "{verdict:?}");
    let status = after.status().unwrap();
    assert_eq!((status.corrupt, status.beats_lost), (0, 0));
    assert!(status.beats > left.beats);
    after.quit().unwrap();
    check_beats(Path::new(beats));
    assert!(here.path("a.img").exists(), "an image was deleted");
}

/// The beats of both processes are one series: none missing, repeated or out of order.
fn check_beats(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut pids = Vec::new();
    let (mut expected, mut last) = (1, 0);
    for line in text.lines() {
        let words: Vec<u64> = line.split(' ').map(|word| word.parse().unwrap()).collect();
        assert_eq!(words[0], expected, "beat {expected} is missing or repeated");
        assert!(
            words[1] >= last,
            "beat {expected} came before its predecessor"
        );
        (expected, last) = (expected + 1, words[1]);
        if pids.last() != Some(&words[2]) {
            pids.push(words[2]);
        }
    }
    assert_eq!(pids.len(), 2, "both processes beat, one after the other");
}

#[tokio::test]
async fn a_busy_guest_with_anonymous_memory_moves() {
    moves("anon").await;
}

#[tokio::test]
async fn a_busy_guest_with_shared_memory_moves() {
    moves("memfd").await;
}

/// Bytes of a process's memory that the system has given.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    kib << 10
}

async fn is_touched_ahead(kind: &str) {
    let sizes = ["--ram", "64MiB", "--ram-kind", kind];
    let here = Source::start(&[&sizes[..], &["--paused", "--fill", "50%"]].concat());
    let mut source = open_source(&here.config()).await.unwrap();
    let spec = source.spec().clone();
    let populated = source.populated().await;
    let windows: u32 = populated
        .iter()
        .map(|it| it.windows.end - it.windows.start)
        .sum();
    assert!(populated.iter().all(|it| it.region == RAM));
    assert!(
        (8..=24).contains(&windows),
        "half of 32 are filled: {populated:?}"
    );

    let config = here.target(&sizes);
    let mut options = here.options();
    let untouched = open_target(&config, &spec, &options).await.unwrap();
    let before = resident(untouched.process().pid);
    let mut untouched = untouched;
    untouched.discard().await.unwrap();
    options.populated = populated.into();
    let target = open_target(&config, &spec, &options).await.unwrap();
    let wanted = before + u64::from(windows) * (2 << 20);
    let begun = std::time::Instant::now();
    while resident(target.process().pid) < wanted - (2 << 20) {
        assert!(
            begun.elapsed() < START_LIMIT,
            "{} of {wanted}",
            resident(target.process().pid)
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let there = content(&*target, RAM, spec.regions[0].len.0).await;
    assert!(
        there.iter().all(|byte| *byte == 0),
        "touching changed content"
    );
    source.start_tracking().await.unwrap();
    round(&mut *source, &*target).await;
    assert_alike(&*source, &*target).await;
}

#[tokio::test]
async fn anonymous_memory_is_touched_ahead_and_nothing_else() {
    is_touched_ahead("anon").await;
}

#[tokio::test]
async fn shared_memory_is_touched_ahead_and_nothing_else() {
    is_touched_ahead("memfd").await;
}

#[tokio::test]
async fn what_is_there_is_not_touched() {
    let here = Source::start(&["--ram", "16MiB", "--paused", "--fill", "50%"]);
    let guest = open_source(&here.config()).await.unwrap();
    let blocks = vec![MemoryBlock {
        region: RAM,
        host_addr: here.client().describe().unwrap().ram_address,
        len: 16 << 20,
    }];
    let memory = ProcessMemory::attach(&guest.process(), blocks).unwrap();
    memory.touch_ahead(&[PopulatedWindows {
        region: RAM,
        windows: 0..8,
    }]);
    let begun = std::time::Instant::now();
    // The other half is.
    while memory
        .populated_windows()
        .await
        .iter()
        .map(|it| it.windows.len())
        .sum::<usize>()
        < 8
    {
        assert!(begun.elapsed() < START_LIMIT);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(memory);
    assert!(here.client().verify().unwrap().ok);
}

#[tokio::test]
async fn a_guest_that_somebody_let_run_is_not_taken_for_paused() {
    let here = Source::start(&["--ram", "16MiB"]);
    let mut source = open_source(&here.config()).await.unwrap();
    let paused = source.pause().await.unwrap();
    source.still_paused(&paused).await.unwrap();
    assert!(here.client().save_state().is_ok());
    here.client().cont().unwrap();
    here.client().stop().unwrap();
    let error = source.still_paused(&paused).await.unwrap_err();
    assert!(matches!(error, GuestError::Touched(_)), "{error:?}");
    assert!(source.save_device_state(&paused).await.is_err());
}

#[tokio::test]
async fn a_paused_guest_is_found_paused() {
    let here = Source::start(&["--ram", "16MiB", "--paused"]);
    let mut source = open_source(&here.config()).await.unwrap();
    assert_eq!(source.spec().run_state, RunState::Paused);
    assert_eq!(source.run_state().await.unwrap(), RunState::Paused);
    assert_eq!(source.pause().await.unwrap().before(), RunState::Paused);
}

#[tokio::test]
async fn the_end_of_a_guest_is_told_with_its_kind() {
    for killed in [false, true] {
        let mut here = Source::start(&["--ram", "16MiB"]);
        let source = open_source(&here.config()).await.unwrap();
        let mut life = source.life();
        assert_eq!(*life.borrow_and_update(), GuestLife::Alive);
        if killed {
            here.child.kill().unwrap();
        } else {
            here.client().shutdown().unwrap();
        }
        life.changed().await.unwrap();
        let end = life.borrow().clone();
        match end {
            GuestLife::ShutDown(_) => assert!(!killed),
            GuestLife::Gone(_) => assert!(killed),
            GuestLife::Alive => panic!("it was ended"),
        }
    }
}

#[tokio::test]
async fn a_copy_that_does_not_fit_is_refused_by_name_and_leaves_nothing() {
    let here = Source::start(&["--ram", "16MiB", "--disk", "a.img", "--disk-size", "8MiB"]);
    let source = open_source(&here.config()).await.unwrap();
    let image = here.path("b.img");
    let disk = ["--disk", image.to_str().unwrap(), "--disk-size", "4MiB"];
    let config = here.target(&[&["--ram", "32MiB"][..], &disk].concat());
    let refused = open_target(&config, source.spec(), &here.options()).await;
    let error = refused.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, GuestError::Incompatible(_)), "{error:?}");
    assert!(
        text.contains("ram is 16 MiB (16777216 bytes) at the source and 32 MiB (33554432 bytes) at the destination"),
        "{text}"
    );
    assert!(
        text.contains("disk0 is 8 MiB (8388608 bytes) at the source and 4 MiB (4194304 bytes) at the destination"),
        "{text}"
    );
    let left = Client::connect(&here.path("b.sock"));
    assert!(left.is_err(), "the refused guest lives");
}

#[tokio::test]
async fn a_launch_that_fails_says_what_the_program_said() {
    let here = Source::start(&["--ram", "16MiB"]);
    let source = open_source(&here.config()).await.unwrap();
    let config = here.target(&["--ram", "nonsense"]);
    let failed = open_target(&config, source.spec(), &here.options()).await;
    let error = failed.unwrap_err();
    assert!(error.to_string().contains("is not a size"), "{error}");
}

#[tokio::test]
async fn a_discarded_copy_is_gone_and_a_renewed_one_is_empty() {
    let here = Source::start(&["--ram", "16MiB", "--dirty-rate", "0"]);
    let mut source = open_source(&here.config()).await.unwrap();
    let config = here.target(&["--ram", "16MiB"]);
    let spec = source.spec().clone();
    let mut target = open_target(&config, &spec, &here.options()).await.unwrap();
    source.start_tracking().await.unwrap();
    round(&mut *source, &*target).await;
    let (first, before) = (target.process(), target.incarnations());
    let is_empty = |bytes: Vec<u8>| bytes.iter().all(|byte| *byte == 0);
    assert!(!is_empty(content(&*target, RAM, 16 << 20).await));
    target.renew().await.unwrap();
    assert_ne!(target.process(), first);
    assert_ne!(target.incarnations(), before);
    assert!(is_empty(content(&*target, RAM, 16 << 20).await));
    let mut waiting = Client::connect(&here.path("b.sock")).unwrap();
    let error = waiting.cont().unwrap_err();
    assert!(
        error.to_string().contains("waits for its content"),
        "{error}"
    );
    target.discard().await.unwrap();
    target.discard().await.unwrap();
    assert!(!here.path("b.sock").exists() && !here.path("g.log").exists());
    assert!(!target.process().is_alive().unwrap());
}

#[tokio::test]
async fn what_is_put_back_is_reported_again() {
    let disk = ["--disk", "a.img", "--disk-size", "8MiB"];
    let here = Source::start(&[&["--ram", "16MiB", "--dirty-rate", "0"][..], &disk].concat());
    let mut source = open_source(&here.config()).await.unwrap();
    source.start_tracking().await.unwrap();
    for region in [RAM, DISK] {
        source.take_dirty(region).await.unwrap();
        source
            .settle(region, Settlement::Acknowledged)
            .await
            .unwrap();
        let taken = source.take_dirty(region).await.unwrap();
        assert!(taken.dirty.is_empty());
    }
    let busy = Workload {
        dirty_rate: 64 << 20,
        working_set: 1 << 20,
        disk_rate: 64 << 20,
        disk_working_set: 1 << 20,
        content: Content::Random,
        beat_us: 0,
    };
    here.client().set_workload(busy).unwrap();
    while here.client().status().unwrap().disk_steps < 2500 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    here.client().stop().unwrap();
    for region in [RAM, DISK] {
        let taken = source.take_dirty(region).await.unwrap().dirty;
        assert!(!taken.is_empty());
        source.settle(region, Settlement::PutBack).await.unwrap();
        assert_eq!(source.take_dirty(region).await.unwrap().dirty, taken);
        source
            .settle(region, Settlement::Acknowledged)
            .await
            .unwrap();
        let taken = source.take_dirty(region).await.unwrap();
        assert!(taken.dirty.is_empty());
    }
}
