//! What the tests of the destination share: a CA, a real `vmferry-dst` with an embedded guest behind it, and a client
//! that speaks the protocol as far as a test wants and breaks it where a test wants.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of each test program, which uses its part"
)]
#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use vmferry_certs::{CertificateAuthority, HostRequest, SubjectName, Validity};
use vmferry_common::codec::{Blocks, Encoder};
use vmferry_common::endpoint::{self, HostPort, TransportTuning};
use vmferry_common::identity::Identity;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{FrameHeader, StreamHeader, StreamKind, lane_of};
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::{
    Attempt, FrameSeq, Generation, Lane, MigrationId, RegionId, SessionNumber,
};
use vmferry_proto::message::{Final, Hello, Offer, Ready, ToDestination, ToSource, Welcome};
use vmferry_proto::spec::{GuestSpec, RegionKind, RegionSpec, RunState};
use vmferry_proto::version::{Features, SUPPORTED};
use vmferry_proto::wire;

/// Longest time for anything to happen: far beyond what it takes, so that only a hang fails.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Size of the guest's RAM.
pub const RAM: u64 = 8 << 20;
/// Size of the guest's disk; its last block is a whole one, its last window is not.
pub const DISK: u64 = (3 << 20) + 4096;
/// Lanes of the sessions here.
pub const LANES: u8 = 2;

/// The embedded guest's program. A test run of the whole workspace has built it; of this package alone, it is built here.
pub fn simguest() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let program =
            Path::new(env!("CARGO_BIN_EXE_vmferry-dst")).with_file_name("vmferry-simguest");
        if !program.exists() {
            let built = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "--package", "vmferry-simguest"])
                .status()
                .unwrap();
            assert!(built.success(), "the embedded guest cannot be built");
        }
        assert!(program.exists(), "{} was not built", program.display());
        program
    })
}

/// A destination host: its agent, its guest files, and a CA with hosts that may and may not send.
pub struct Site {
    pub dir: tempfile::TempDir,
    agent: Option<Child>,
    pub address: String,
    starts: u32,
}

impl Site {
    /// A running agent that expects guest `web-1` from `alpha` and `gamma`.
    pub fn new() -> Self {
        let mut site = Self::prepared();
        site.start();
        site
    }

    /// The same, not started.
    pub fn prepared() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        CertificateAuthority::create(&ca, Validity::days(10).unwrap()).unwrap();
        let site = Self {
            dir,
            agent: None,
            address: String::new(),
            starts: 0,
        };
        for name in ["beta", "alpha", "gamma", "mallory"] {
            let request = HostRequest {
                name: name.to_owned(),
                addresses: vec!["127.0.0.1".parse::<SubjectName>().unwrap()],
                validity: Validity::days(5).unwrap(),
            };
            let ca = CertificateAuthority::load(&ca).unwrap();
            ca.issue(&request, &site.path(name)).unwrap();
        }
        std::fs::create_dir(site.path("guests")).unwrap();
        site.write_guest("from = ['alpha', 'gamma']");
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn disk(&self) -> PathBuf {
        self.path("web-1.img")
    }

    /// Writes the guest file of `web-1` with these further lines.
    pub fn write_guest(&self, lines: &str) {
        let (socket, disk) = (self.path("web-1.sock"), self.disk());
        let text = format!(
            "name = 'web-1'\ndriver = 'sim'\nsocket = '{socket}'\n{lines}\n\
             launch = ['{program}', 'run', '--name', 'web-1', '--incoming', '--socket', '{socket}', \
             '--ram', '{RAM}B', '--disk', '{disk}', '--disk-size', '{DISK}B']\n",
            socket = socket.display(),
            disk = disk.display(),
            program = simguest().display(),
        );
        std::fs::write(self.path("guests").join("web.toml"), text).unwrap();
    }

    /// Makes `PHASE` a hook script with this shell text.
    pub fn write_hook(&self, phase: &str, text: &str) {
        use std::os::unix::fs::PermissionsExt;
        let hooks = self.path("hooks");
        std::fs::create_dir_all(&hooks).unwrap();
        let path = hooks.join(phase);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn log(&self, start: u32) -> PathBuf {
        self.path(&format!("agent-{start}.log"))
    }

    /// Starts the agent and waits until it listens.
    pub fn start(&mut self) {
        self.starts += 1;
        let log = std::fs::File::create(self.log(self.starts)).unwrap();
        let mut agent = Command::new(env!("CARGO_BIN_EXE_vmferry-dst"))
            .args(["serve", "--listen", "127.0.0.1:0", "-v"])
            .arg("--identity")
            .arg(self.path("beta"))
            .arg("--guests")
            .arg(self.path("guests"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--hooks")
            .arg(self.path("hooks"))
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(agent.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let address = line.trim().strip_prefix("listening on ");
        self.address = address
            .unwrap_or_else(|| panic!("no address; log: {}", self.logs()))
            .to_owned();
        self.agent = Some(agent);
    }

    /// Kills the agent as a crash would.
    pub fn kill_agent(&mut self) {
        let mut agent = self.agent.take().unwrap();
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// Stops the agent in good order; returns its exit code.
    pub fn stop_agent(&mut self) -> Option<i32> {
        let mut agent = self.agent.take().unwrap();
        self.signal_agent_pid(agent.id());
        agent.wait().unwrap().code()
    }

    /// Sends SIGTERM to the agent and does not wait.
    pub fn terminate_agent(&self) {
        self.signal_agent_pid(self.agent.as_ref().unwrap().id());
    }

    /// Waits for the end of an agent that was told to stop.
    pub fn await_agent(&mut self) -> Option<i32> {
        self.agent.take().unwrap().wait().unwrap().code()
    }

    fn signal_agent_pid(&self, pid: u32) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    }

    /// Everything that the agents of this site have logged.
    pub fn logs(&self) -> String {
        (1..=self.starts)
            .map(|start| std::fs::read_to_string(self.log(start)).unwrap_or_default())
            .collect()
    }

    /// Runs `vmferry-dst` with these arguments and this site's state folder.
    pub fn command(&self, arguments: &[&str]) -> std::process::Output {
        Command::new(env!("CARGO_BIN_EXE_vmferry-dst"))
            .args(arguments)
            .arg("--state")
            .arg(self.path("state"))
            .output()
            .unwrap()
    }

    /// Processes that were started from this site's folder and still live.
    pub fn guests_alive(&self) -> Vec<String> {
        let socket = self.path("web-1.sock").display().to_string();
        let mut alive = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&socket) && line.contains("--incoming") {
                alive.push(line);
            }
        }
        alive
    }

    /// Waits until `check` holds.
    pub async fn until(&self, what: &str, check: impl Fn(&Self) -> bool) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !check(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(
            waited.await.is_ok(),
            "{what} did not come; log: {}",
            self.logs()
        );
    }

    /// Nothing of a migration is left: no process, no socket, no folder.
    pub async fn is_clean(&self) {
        self.until("the end of the guest", |site| {
            site.guests_alive().is_empty()
        })
        .await;
        self.until("the end of its files", |site| {
            !site.path("web-1.sock").exists() && !site.path("state/run/guests/web-1").exists()
        })
        .await;
    }

    /// The agent has cleaned up, lives, has not panicked, and receives the next guest.
    pub async fn still_serves(&self) {
        self.is_clean().await;
        self.still_serves_with(200).await;
    }

    /// The agent receives the guest in migration `number`, whatever was before.
    pub async fn still_serves_with(&self, number: u8) {
        Client::ready(self, number).await.cancel().await;
        self.is_clean().await;
        assert!(!self.logs().contains("panicked"), "{}", self.logs());
        assert!(!self.logs().contains("internal:"), "{}", self.logs());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        // A failed test leaves its guest behind; it ends by its own socket.
        if self.path("web-1.sock").exists() {
            let _ = Command::new(simguest())
                .args(["quit", "--socket"])
                .arg(self.path("web-1.sock"))
                .stderr(Stdio::null())
                .status();
        }
    }
}

pub fn cancelled() -> WireError {
    WireError::new(ErrorCode::Cancelled, "the test cancels")
}

/// The guest as a source would describe it.
pub fn spec() -> GuestSpec {
    let region = |id, name: &str, kind, len| RegionSpec {
        id: RegionId(id),
        name: name.to_owned(),
        kind,
        len: RegionLen(len),
    };
    GuestSpec {
        name: "web-1".parse().unwrap(),
        uuid: None,
        driver: "sim".to_owned(),
        hypervisor_version: env!("CARGO_PKG_VERSION").to_owned(),
        machine: "sim".to_owned(),
        cpu_model: "sim".to_owned(),
        vcpus: 1,
        run_state: RunState::Running,
        regions: vec![
            region(0, "ram", RegionKind::Memory, RAM),
            region(1, "disk0", RegionKind::Disk, DISK),
        ],
        shared_disks: Vec::new(),
        devices: Vec::new(),
    }
}

/// A source that does what a test says.
pub struct Client {
    _endpoint: Endpoint,
    pub connection: Connection,
    sender: SendStream,
    receiver: RecvStream,
    pub hello: Hello,
    pub lanes: Vec<Option<SendStream>>,
    pub seqs: Vec<FrameSeq>,
}

/// What a `Hello` of the migration number `number` says.
pub fn hello(number: u8) -> Hello {
    Hello {
        versions: SUPPORTED,
        features: Features::supported(),
        guest: "web-1".parse().unwrap(),
        migration: MigrationId::from_bytes([number; 16]),
        generation: Generation(u64::from(number)),
        session: SessionNumber(1),
        lanes: LANES,
        connections: 1,
        connection: 0,
    }
}

/// A connection as the host `name` of the site.
pub async fn connect(site: &Site, name: &str) -> (Endpoint, Connection) {
    let identity = Identity::load(&site.path(name)).unwrap();
    let to: HostPort = site.address.parse().unwrap();
    endpoint::connect(&to, &identity, &TransportTuning::default())
        .await
        .unwrap()
}

impl Client {
    /// A connection on which nothing was said, as the host `name`.
    pub async fn silent(site: &Site, name: &str, hello: Hello) -> Self {
        let (endpoint, connection) = connect(site, name).await;
        let (sender, receiver) = connection.open_bi().await.unwrap();
        Self {
            _endpoint: endpoint,
            connection,
            sender,
            receiver,
            lanes: (0..hello.lanes).map(|_| None).collect(),
            seqs: vec![FrameSeq(0); usize::from(hello.lanes)],
            hello,
        }
    }

    /// `Hello` said as `name`.
    pub async fn greet(site: &Site, name: &str, hello: Hello) -> Self {
        let mut client = Self::silent(site, name, hello.clone()).await;
        client.say(ToDestination::Hello(hello)).await;
        client
    }

    /// Let in, as `alpha`.
    pub async fn welcome(site: &Site, hello: Hello) -> Self {
        let mut client = Self::greet(site, "alpha", hello).await;
        client.expect_welcome().await;
        client
    }

    /// Let in with migration `number`, the guest offered and prepared for.
    pub async fn ready(site: &Site, number: u8) -> Self {
        let mut client = Self::welcome(site, hello(number)).await;
        client.offer().await;
        client
    }

    pub async fn offer(&mut self) -> Ready {
        self.say(ToDestination::Offer(Offer {
            spec: spec(),
            populated: Vec::new(),
        }))
        .await;
        match self.hear().await {
            ToSource::Ready(ready) => ready,
            other => panic!("not Ready: {other:?}"),
        }
    }

    pub async fn say(&mut self, message: ToDestination) {
        self.say_raw(&wire::encode(&message).unwrap()).await;
    }

    /// Bytes on the control stream, whatever they are.
    pub async fn say_raw(&mut self, bytes: &[u8]) {
        // A destination that has parted already is for the next read to tell.
        let _ = self.sender.write_all(bytes).await;
    }

    /// The next message but for `Progress`.
    pub async fn hear(&mut self) -> ToSource {
        loop {
            match self.hear_any().await {
                ToSource::Progress(_) => {}
                other => return other,
            }
        }
    }

    /// The next message.
    pub async fn hear_any(&mut self) -> ToSource {
        let heard = tokio::time::timeout(PATIENCE, async {
            let mut prefix = [0; 4];
            self.receiver
                .read_exact(&mut prefix)
                .await
                .expect("an answer");
            let mut body = vec![0; wire::body_len(prefix).unwrap()];
            self.receiver
                .read_exact(&mut body)
                .await
                .expect("a whole answer");
            wire::decode_body(&body).unwrap()
        });
        heard.await.expect("an answer in time")
    }

    pub async fn expect_welcome(&mut self) -> Welcome {
        match self.hear().await {
            ToSource::Welcome(welcome) => welcome,
            other => panic!("not Welcome: {other:?}"),
        }
    }

    /// An error, after whatever the destination had said before; then the end.
    pub async fn expect_error(&mut self, code: ErrorCode) -> WireError {
        loop {
            match self.hear().await {
                ToSource::Error(error) => {
                    assert_eq!(error.code, code, "{error}");
                    return error;
                }
                ToSource::Outcome(_) | ToSource::Complete { .. } | ToSource::Compared(_) => {}
                other => panic!("not an error: {other:?}"),
            }
        }
    }

    /// Any progress of `lane` beyond the last frame but one that was sent on it.
    pub async fn expect_progress(&mut self, lane: Lane) {
        self.expect_progress_of(lane, self.seqs[usize::from(lane.0)])
            .await;
    }

    /// Progress of `lane` up to `seq` at least.
    pub async fn expect_progress_of(&mut self, lane: Lane, seq: FrameSeq) {
        loop {
            if let ToSource::Progress(lanes) = self.hear_any().await
                && lanes.iter().any(|at| at.lane == lane && at.applied >= seq)
            {
                return;
            }
        }
    }

    /// `Cancelled`, behind the outcome of the attempt that was open.
    pub async fn expect_cancelled_after_outcome(&mut self) {
        loop {
            match self.hear().await {
                ToSource::Cancelled => return,
                ToSource::Outcome(_) => {}
                other => panic!("not Cancelled: {other:?}"),
            }
        }
    }

    pub async fn expect_cancelled(&mut self) {
        match self.hear().await {
            ToSource::Cancelled => {}
            other => panic!("not Cancelled: {other:?}"),
        }
    }

    /// Cancels the migration and hears the answer.
    pub async fn cancel(mut self) {
        self.say(ToDestination::Cancel {
            reason: cancelled(),
        })
        .await;
        self.expect_cancelled().await;
    }

    pub async fn open_attempt(&mut self, number: u32) -> Attempt {
        let attempt = Attempt(number);
        self.say(ToDestination::OpenAttempt { attempt }).await;
        match self.hear().await {
            ToSource::AttemptOpened { attempt: opened } => assert_eq!(opened, attempt),
            other => panic!("not AttemptOpened: {other:?}"),
        }
        attempt
    }

    /// Header of a stream of this session.
    pub fn stream_header(&self, kind: StreamKind) -> StreamHeader {
        StreamHeader {
            kind,
            session: self.hello.session,
            migration: self.hello.migration,
        }
    }

    /// A unidirectional stream that begins with these bytes.
    pub async fn open_raw(&self, bytes: &[u8]) -> SendStream {
        let mut stream = self.connection.open_uni().await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream
    }

    async fn lane(&mut self, lane: Lane) -> &mut SendStream {
        let at = usize::from(lane.0);
        if self.lanes[at].is_none() {
            let header = self.stream_header(StreamKind::Lane { lane }).encode();
            self.lanes[at] = Some(self.open_raw(&header).await);
        }
        self.lanes[at].as_mut().unwrap()
    }

    /// Sends these bytes on a lane, whatever they are.
    pub async fn send_raw(&mut self, lane: Lane, header: &FrameHeader, payload: &[u8]) {
        let stream = self.lane(lane).await;
        // A destination that stopped reading is for the control stream to tell.
        let _ = stream.write_all(&header.encode()).await;
        let _ = stream.write_all(payload).await;
    }

    /// Sends a good frame.
    pub async fn send_frame(&mut self, frame: (FrameHeader, Bytes)) {
        let lane = lane_of(frame.0.window, self.hello.lanes);
        self.send_raw(lane, &frame.0, &frame.1).await;
    }

    /// The next frame of its lane, with these blocks filled with `fill`.
    pub fn frame(
        &mut self,
        region: u16,
        window: u32,
        blocks: WindowBits,
        fill: u8,
    ) -> (FrameHeader, Bytes) {
        let len = spec().regions[usize::from(region)].len;
        let window = WindowIndex(window);
        let bytes = vec![fill; len.bytes_of(window, &blocks) as usize];
        self.frame_of(region, len, window, blocks, &bytes)
    }

    pub fn frame_of(
        &mut self,
        region: u16,
        len: RegionLen,
        window: WindowIndex,
        read: WindowBits,
        bytes: &[u8],
    ) -> (FrameHeader, Bytes) {
        let at = usize::from(lane_of(window, self.hello.lanes).0);
        self.seqs[at] = self.seqs[at].next();
        let blocks = Blocks {
            window: WindowRef {
                region: RegionId(region),
                window,
            },
            region: len,
            read,
            known_zero: WindowBits::EMPTY,
            bytes,
        };
        let encoded = Encoder::new().encode(&blocks, None).unwrap();
        (encoded.header(self.seqs[at]), encoded.payload)
    }

    /// Sends the whole guest, every byte of it `fill`.
    pub async fn send_all(&mut self, fill: u8) {
        for (region, kind) in (0u16..).zip(spec().regions) {
            for window in 0..kind.len.windows() {
                let all = kind.len.all_of(WindowIndex(window));
                for from in (0..512).step_by(128) {
                    let part = all.and(&WindowBits::span(from, from + 128));
                    if !part.is_empty() {
                        let frame = self.frame(region, window, part, fill);
                        self.send_frame(frame).await;
                    }
                }
            }
        }
    }

    /// A `Final` for what was sent so far.
    pub fn last(&self, attempt: Attempt) -> Final {
        Final {
            attempt,
            lanes: self.seqs.clone(),
            verify: Vec::new(),
            run_state: RunState::Running,
        }
    }

    pub async fn expect_complete(&mut self) {
        match self.hear().await {
            ToSource::Complete { .. } => {}
            other => panic!("not Complete: {other:?}"),
        }
    }
}

/// A block's worth of this byte.
pub fn block(fill: u8) -> Vec<u8> {
    vec![fill; BLOCK_SIZE as usize]
}
