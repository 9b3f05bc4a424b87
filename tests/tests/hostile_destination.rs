//! A hostile destination against the real source agent: whatever it says, and when, the migration ends with a coded error, the guest
//! runs on at the source, whole and untracked, and moves to an honest destination afterwards.
//!
//! The impostor has a good certificate, plays an honest destination up to a moment, and then says something else instead of
//! what is due. What a hostile *source* can do is shown by the destination's own tests.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use vmferry_common::endpoint::{self, TransportTuning};
use vmferry_common::identity::Identity;
use vmferry_common::lanes;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{Encoding, lane_of};
use vmferry_proto::geometry::{RegionLen, WindowIndex};
use vmferry_proto::ids::{Attempt, FrameSeq, Incarnation, Lane, RegionId, RegisterId};
use vmferry_proto::message::{
    AttemptKey, Compared, Digests, Hello, LaneProgress, Outcome, PrepareTiming, Prepared, Ready,
    ToDestination, ToSource, Verdict, Welcome, WindowDigest,
};
use vmferry_proto::version::{Features, ProtocolVersion};
use vmferry_proto::wire;
use vmferry_tests::harness::process::descriptors;
use vmferry_tests::harness::{SimGuest, SimSpec, Stage};

const PROGRAMS: &str = env!("CARGO_BIN_EXE_vmferry-demo");
const END: Duration = Duration::from_secs(60);
/// The guest must stop within this, or the cutover does not begin.
const PATIENT: [&str; 2] = ["--max-downtime", "5s"];
const REGISTER: RegisterId = RegisterId::from_bytes([7; 16]);

/// After which of the source's messages the impostor misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Hello,
    Offer,
    /// Some frames have come.
    Copy,
    OpenAttempt,
    /// The guest stands still.
    Final,
    DeviceState,
}

/// What it does.
enum Deed {
    Say(ToSource),
    /// These bytes.
    Bytes(Vec<u8>),
    /// These bytes, and no more.
    Cut(Vec<u8>),
}

/// What the impostor knows.
struct Facts {
    hello: Hello,
    attempt: Attempt,
    /// What has come, by lane.
    applied: Arc<Mutex<Vec<FrameSeq>>>,
}

impl Facts {
    fn key(&self) -> AttemptKey {
        AttemptKey {
            migration: self.hello.migration,
            attempt: self.attempt,
            register: REGISTER,
        }
    }

    fn welcome(&self) -> Welcome {
        Welcome {
            version: ProtocolVersion(1),
            features: Features::default(),
            register: REGISTER,
            session: self.hello.session,
            agent: "impostor".to_owned(),
        }
    }

    /// Progress of all lanes, `change` made to it.
    fn progress(&self, change: impl Fn(&mut LaneProgress)) -> ToSource {
        let applied = self.applied.lock().unwrap();
        let lanes = (0u8..).zip(applied.iter()).map(|(lane, seq)| {
            let mut progress = LaneProgress {
                lane: Lane(lane),
                applied: *seq,
                flushed: *seq,
            };
            change(&mut progress);
            progress
        });
        ToSource::Progress(lanes.collect())
    }

    fn committed(&self, attempt: Attempt) -> ToSource {
        ToSource::Outcome(Outcome {
            key: AttemptKey {
                attempt,
                ..self.key()
            },
            verdict: Verdict::Committed {
                record_us: 1,
                start_us: 1,
            },
        })
    }
}

/// Frames with data that came to any impostor, and those of them that refer to what a destination has. It never said that it can.
static FRAMES: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

type Misdeed = (&'static str, Moment, fn(&Facts) -> Deed);

/// One connection, played by the impostor.
struct Play {
    facts: Facts,
    sender: SendStream,
    messages: mpsc::UnboundedReceiver<ToDestination>,
    connection: Connection,
    /// Kept so that its tasks end with the play.
    _reader: Owned,
    lanes: Option<Owned>,
}

struct Owned(JoinHandle<()>);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads messages until there are no more.
async fn read(mut stream: RecvStream, messages: mpsc::UnboundedSender<ToDestination>) {
    loop {
        let mut prefix = [0; 4];
        if stream.read_exact(&mut prefix).await.is_err() {
            return;
        }
        let mut body = vec![0; wire::body_len(prefix).unwrap()];
        if stream.read_exact(&mut body).await.is_err() {
            return;
        }
        if messages.send(wire::decode_body(&body).unwrap()).is_err() {
            return;
        }
    }
}

/// Takes everything that comes on lanes, and notes how far each is.
async fn take_lanes(
    connection: Connection,
    geometry: Arc<[RegionLen]>,
    applied: Arc<Mutex<Vec<FrameSeq>>>,
) {
    let (mut tasks, mut device_states) = (Vec::new(), Vec::new());
    while let Ok(stream) = lanes::accept_raw(&connection, "alpha").await {
        // One that the source has given up already is no reason to give up the others.
        let Ok(stream) = lanes::read_header(stream, "alpha").await else {
            continue;
        };
        // A stream that is dropped is refused, and a source may hear of that before it hears the misdeed.
        if stream.device_state_of().is_some() {
            device_states.push(stream);
            continue;
        }
        let count = u8::try_from(applied.lock().unwrap().len()).unwrap();
        let Some(mut lane) = stream.into_lane(geometry.clone(), count) else {
            continue;
        };
        let applied = applied.clone();
        tasks.push(Owned(tokio::spawn(async move {
            while let Ok(Some((header, _))) = lane.next().await {
                let refers = match header.encoding {
                    Encoding::Raw | Encoding::Zstd => 0,
                    Encoding::Difference | Encoding::Duplicate => 1,
                };
                FRAMES[refers].fetch_add(1, Ordering::Relaxed);
                let lane = usize::from(lane_of(header.window, count).0);
                applied.lock().unwrap()[lane] = header.seq;
            }
        })));
    }
}

impl Play {
    async fn begin(connection: Connection) -> Option<Self> {
        let (sender, receiver) = connection.accept_bi().await.ok()?;
        let (queue, mut messages) = mpsc::unbounded_channel();
        let reader = Owned(tokio::spawn(read(receiver, queue)));
        let Some(ToDestination::Hello(hello)) = messages.recv().await else {
            return None;
        };
        let applied = vec![FrameSeq(0); usize::from(hello.lanes)];
        Some(Self {
            facts: Facts {
                hello,
                attempt: Attempt(0),
                applied: Arc::new(Mutex::new(applied)),
            },
            sender,
            messages,
            connection,
            _reader: reader,
            lanes: None,
        })
    }

    async fn say(&mut self, message: &ToSource) {
        // A source that has gone is what this is about.
        let _ = self.sender.write_all(&wire::encode(message).unwrap()).await;
    }

    async fn commit(&mut self, deed: Deed) {
        match deed {
            Deed::Say(message) => self.say(&message).await,
            Deed::Bytes(bytes) => drop(self.sender.write_all(&bytes).await),
            Deed::Cut(bytes) => {
                let _ = self.sender.write_all(&bytes).await;
                let _ = self.sender.finish();
            }
        }
    }

    /// Plays on; instead of what is due at the misdeed's moment comes the misdeed, and nothing after it.
    async fn play(mut self, misdeed: Option<Misdeed>) {
        let at = misdeed.map(|(_, at, _)| at);
        if at == Some(Moment::Hello) {
            return self.misbehave(misdeed).await;
        }
        self.say(&ToSource::Welcome(self.facts.welcome())).await;
        let mut tick = tokio::time::interval(Duration::from_millis(10));
        loop {
            let message = tokio::select! {
                message = self.messages.recv() => message,
                _ = tick.tick() => {
                    let begun = self.facts.applied.lock().unwrap().iter().any(|seq| seq.0 > 0);
                    if begun && at == Some(Moment::Copy) {
                        return self.misbehave(misdeed).await;
                    }
                    if self.lanes.is_some() {
                        self.say(&self.facts.progress(|_| {})).await;
                    }
                    continue;
                }
            };
            let Some(message) = message else { return };
            let (moment, answer) = match message {
                ToDestination::Offer(offer) => {
                    let regions = &offer.spec.regions;
                    let geometry = regions.iter().map(|region| region.len).collect();
                    let applied = self.facts.applied.clone();
                    let lanes = take_lanes(self.connection.clone(), geometry, applied);
                    self.lanes = Some(Owned(tokio::spawn(lanes)));
                    let fresh = (1u8..).map(|n| Incarnation::from_bytes([n; 16]));
                    let ready = Ready {
                        incarnations: fresh.take(regions.len()).collect(),
                        resume: None,
                    };
                    (Moment::Offer, Some(ToSource::Ready(ready)))
                }
                ToDestination::OpenAttempt { attempt } => {
                    self.facts.attempt = attempt;
                    let opened = ToSource::AttemptOpened { attempt };
                    (Moment::OpenAttempt, Some(opened))
                }
                ToDestination::Final(last) => {
                    let attempt = last.attempt;
                    (Moment::Final, Some(ToSource::Complete { attempt }))
                }
                ToDestination::DeviceState { .. } => (Moment::DeviceState, None),
                ToDestination::Cancel { .. } => {
                    self.say(&ToSource::Cancelled).await;
                    continue;
                }
                ToDestination::Hello(_)
                | ToDestination::Converged
                | ToDestination::Compare(_)
                | ToDestination::Commit(_)
                | ToDestination::Query(_)
                | ToDestination::Abort { .. }
                | ToDestination::Goodbye
                | ToDestination::Error(_) => continue,
            };
            if at == Some(moment) {
                return self.misbehave(misdeed).await;
            }
            if let Some(answer) = answer {
                self.say(&answer).await;
            }
        }
    }

    async fn misbehave(mut self, misdeed: Option<Misdeed>) {
        let (_, _, deed) = misdeed.unwrap();
        self.commit(deed(&self.facts)).await;
        // From now on only a farewell is answered: a source waits for that, for a bounded time.
        while let Some(message) = self.messages.recv().await {
            if matches!(message, ToDestination::Cancel { .. }) {
                self.say(&ToSource::Cancelled).await;
            }
        }
        self.connection.closed().await;
    }
}

/// Plays the destination: the first connection with the misdeed, those that follow without.
async fn impostor(endpoint: Endpoint, misdeed: Misdeed) {
    let mut misdeed = Some(misdeed);
    while let Some(incoming) = endpoint.accept().await {
        let accepted = endpoint::accept(incoming, &TransportTuning::default()).await;
        let Ok((connection, _)) = accepted else {
            continue;
        };
        if let Some(play) = Play::begin(connection).await {
            play.play(misdeed.take()).await;
        }
    }
}

/// Each misdeed ends the migration with `codes`, and harms nothing.
fn endure(misdeeds: &[Misdeed], codes: &[&str]) {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        ram: 8 << 20,
        disk: 4 << 20,
        dirty_rate: 1 << 20,
        working_set: 1 << 20,
        ..SimSpec::small("web")
    });
    let before = descriptors(guest.first_pid());
    for misdeed in misdeeds {
        suffer(&stage, &guest, *misdeed, codes);
        stage.expect_traceless(&guest, &before);
    }
    stage.expect_moves(&guest, &PATIENT);
}

fn suffer(stage: &Stage, guest: &SimGuest, misdeed: Misdeed, codes: &[&str]) {
    let identity = Identity::load(&stage.beta.path("identity")).unwrap();
    let runtime = Runtime::new().unwrap();
    let (port, playing) = runtime.block_on(async {
        let listen = "127.0.0.1:0".parse().unwrap();
        let tuning = TransportTuning::default();
        let endpoint = endpoint::bind_server(listen, &identity, &tuning).unwrap();
        let port = endpoint.local_addr().unwrap().port();
        (port, tokio::spawn(impostor(endpoint, misdeed)))
    });
    let running = stage.alpha.start_migrate("web", port, &PATIENT).unwrap();
    let done = running.wait(END).unwrap();
    assert!(!playing.is_finished(), "the impostor itself failed");
    let (what, at, _) = misdeed;
    println!("--- {what}, after {at:?}\n{}", done.stderr);
    stage.expect_code(&done, 1);
    let report = done.json().unwrap();
    let code = report["error"]["code"].as_str().unwrap();
    assert!(codes.contains(&code), "{what}: {report}");
    assert_eq!(report["guest_now"], "runs-at-source", "{what}");
    assert!(!done.stderr.contains("panicked"), "{what}: {}", done.stderr);
    guest.wait_for_beats(20).unwrap();
    guest.verify_on(&stage.alpha).unwrap();
    guest.beats().unwrap().check().unwrap();
}

const VIOLATION: [&str; 1] = ["protocol-violation"];

/// A length that fits, and a body that is none.
fn rubbish() -> Vec<u8> {
    let mut bytes = 40u32.to_le_bytes().to_vec();
    bytes.extend((0..40u8).map(|n| n.wrapping_mul(151) ^ 0xa5));
    bytes
}

fn truncated() -> Vec<u8> {
    let whole = wire::encode(&ToSource::AttemptOpened {
        attempt: Attempt(1),
    });
    let mut bytes = whole.unwrap();
    bytes.pop();
    bytes
}

#[test]
fn what_is_no_message_ends_the_migration() {
    let misdeeds: [Misdeed; 7] = [
        ("random bytes", Moment::Hello, |_| Deed::Bytes(rubbish())),
        ("an oversized message", Moment::Hello, |_| {
            Deed::Bytes(vec![0xff; 64])
        }),
        ("half a message", Moment::Hello, |_| Deed::Cut(truncated())),
        ("random bytes", Moment::Copy, |_| Deed::Bytes(rubbish())),
        ("an oversized message", Moment::Copy, |_| {
            Deed::Bytes(vec![0xff; 64])
        }),
        ("half a message", Moment::Copy, |_| Deed::Cut(truncated())),
        ("random bytes", Moment::Final, |_| Deed::Bytes(rubbish())),
    ];
    endure(&misdeeds, &VIOLATION);
}

/// `[WIRE-46]` `[WIRE-52]` `[WIRE-54]`
#[test]
fn a_destination_that_does_not_say_that_it_can_gets_no_reference() {
    let stage = Stage::set(PROGRAMS);
    let guest = stage.guest(SimSpec {
        content: "copies",
        disk: 4 << 20,
        dirty_rate: 1 << 20,
        ..SimSpec::still("web", 16 << 20)
    });
    let before = FRAMES[0].load(Ordering::Relaxed);
    let misdeed: Misdeed = ("random bytes", Moment::Final, |_| Deed::Bytes(rubbish()));
    suffer(&stage, &guest, misdeed, &VIOLATION);
    let whole = FRAMES[0].load(Ordering::Relaxed) - before;
    assert!(whole > 20, "{whole}");
    assert_eq!(FRAMES[1].load(Ordering::Relaxed), 0);
}

#[test]
fn what_is_not_due_before_the_pause_ends_the_migration() {
    let misdeeds: [Misdeed; 12] = [
        ("Cancelled", Moment::Hello, |_| {
            Deed::Say(ToSource::Cancelled)
        }),
        ("another session's Welcome", Moment::Hello, |facts| {
            let mut welcome = facts.welcome();
            welcome.session = welcome.session.next();
            Deed::Say(ToSource::Welcome(welcome))
        }),
        ("a version that was not offered", Moment::Hello, |facts| {
            let mut welcome = facts.welcome();
            welcome.version = ProtocolVersion(77);
            Deed::Say(ToSource::Welcome(welcome))
        }),
        ("Welcome again", Moment::Offer, |facts| {
            Deed::Say(ToSource::Welcome(facts.welcome()))
        }),
        ("progress of nothing", Moment::Offer, |facts| {
            Deed::Say(facts.progress(|_| {}))
        }),
        ("too few regions", Moment::Offer, |_| {
            Deed::Say(ToSource::Ready(Ready {
                incarnations: vec![Incarnation::from_bytes([1; 16])],
                resume: None,
            }))
        }),
        ("progress beyond what was sent", Moment::Copy, |facts| {
            Deed::Say(facts.progress(|lane| lane.applied = FrameSeq(1 << 40)))
        }),
        ("more flushed than applied", Moment::Copy, |_| {
            // Applied 1 and flushed 2 of lane 0: the library refuses to write it.
            let body = [0x1a, 6, 0x0a, 4, 0x10, 1, 0x18, 2];
            let mut bytes = 8u32.to_le_bytes().to_vec();
            bytes.extend(body);
            Deed::Bytes(bytes)
        }),
        (
            "progress of a lane that is not there",
            Moment::Copy,
            |facts| Deed::Say(facts.progress(|lane| lane.lane = Lane(lane.lane.0 + 48))),
        ),
        ("Cancelled, unasked", Moment::Copy, |_| {
            Deed::Say(ToSource::Cancelled)
        }),
        ("the outcome of nothing", Moment::Copy, |facts| {
            Deed::Say(facts.committed(Attempt(1)))
        }),
        ("another attempt opened", Moment::OpenAttempt, |_| {
            Deed::Say(ToSource::AttemptOpened {
                attempt: Attempt(9),
            })
        }),
    ];
    endure(&misdeeds, &VIOLATION);
}

#[test]
fn lies_about_a_paused_guest_bring_it_back() {
    let misdeeds: [Misdeed; 9] = [
        ("committed before it may be", Moment::OpenAttempt, |facts| {
            Deed::Say(facts.committed(facts.attempt))
        }),
        ("committed before it may be", Moment::Final, |facts| {
            Deed::Say(facts.committed(facts.attempt))
        }),
        ("progress beyond what was sent", Moment::Final, |facts| {
            Deed::Say(facts.progress(|lane| lane.applied = FrameSeq(1 << 40)))
        }),
        ("prepared without a state", Moment::Final, |facts| {
            Deed::Say(ToSource::Prepared(Prepared {
                key: AttemptKey {
                    attempt: Attempt(9),
                    ..facts.key()
                },
                timing: PrepareTiming::default(),
            }))
        }),
        ("what was not compared", Moment::Final, |_| {
            Deed::Say(ToSource::Compared(Compared {
                windows: Vec::new(),
            }))
        }),
        ("digests of another attempt", Moment::Final, |_| {
            Deed::Say(ToSource::Digests(Digests {
                attempt: Attempt(9),
                windows: vec![WindowDigest {
                    region: RegionId(0),
                    window: WindowIndex(0),
                    digest: [0; 16],
                }],
                last: true,
            }))
        }),
        ("committed before it may be", Moment::DeviceState, |facts| {
            Deed::Say(facts.committed(facts.attempt))
        }),
        (
            "prepared by another register",
            Moment::DeviceState,
            |facts| {
                Deed::Say(ToSource::Prepared(Prepared {
                    key: AttemptKey {
                        register: RegisterId::from_bytes([8; 16]),
                        ..facts.key()
                    },
                    timing: PrepareTiming::default(),
                }))
            },
        ),
        ("an error of its own", Moment::DeviceState, |_| {
            let error = WireError::new(ErrorCode::Hypervisor, "\x1b[2Jno");
            Deed::Say(ToSource::Error(error))
        }),
    ];
    endure(&misdeeds, &["protocol-violation", "hypervisor"]);
}
