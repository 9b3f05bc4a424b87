//! A guest arrives: an embedded guest is read through its driver and sent to the real agent, which commits and starts it.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use support::{Client, DISK, RAM, Site, hello, simguest};
use vmferry_common::digest;
use vmferry_hypervisor::config::SourceConfig;
use vmferry_hypervisor::open::open_source;
use vmferry_hypervisor::{GuestPaused, SourceGuest};
use vmferry_proto::frame::StreamKind;
use vmferry_proto::geometry::{WindowBits, WindowIndex};
use vmferry_proto::ids::{Attempt, RegisterId, SessionNumber};
use vmferry_proto::message::{AttemptKey, Offer, ToDestination, ToSource, Verdict};

/// Starts a guest that works and waits until it listens.
async fn start_source(site: &Site) -> Box<dyn SourceGuest> {
    let socket = site.path("source.sock");
    let mut child = Command::new(simguest())
        .args([
            "run",
            "--name",
            "web-1",
            "--ram",
            &format!("{RAM}B"),
            "--dirty-rate",
            "4MiB",
        ])
        .args(["--disk-size", &format!("{DISK}B"), "--disk-rate", "64KiB"])
        .arg("--socket")
        .arg(&socket)
        .arg("--disk")
        .arg(site.path("source.img"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::spawn(move || child.wait());
    site.until("the source guest", |_| {
        std::os::unix::net::UnixStream::connect(&socket).is_ok()
    })
    .await;
    let config: SourceConfig = toml::from_str(&format!(
        "name = 'web-1'\ndriver = 'sim'\nsocket = '{}'",
        socket.display()
    ))
    .unwrap();
    open_source(&config).await.unwrap()
}

/// Sends all of the paused guest and its device state.
async fn send_guest(client: &mut Client, guest: &mut dyn SourceGuest, paused: &GuestPaused) {
    for spec in guest.spec().regions.clone() {
        let reader = guest.reader(spec.id).unwrap();
        for window in (0..spec.len.windows()).map(WindowIndex) {
            for from in (0..512).step_by(128) {
                let blocks = spec
                    .len
                    .all_of(window)
                    .and(&WindowBits::span(from, from + 128));
                if blocks.is_empty() {
                    continue;
                }
                let mut bytes = vec![0; spec.len.bytes_of(window, &blocks) as usize];
                reader
                    .read(&spec.len.runs(window, &blocks), &mut bytes)
                    .await
                    .unwrap();
                let frame = client.frame_of(spec.id.0, spec.len, window, blocks, &bytes);
                client.send_frame(frame).await;
            }
        }
    }
    let attempt = Attempt(1);
    let state = Bytes::from(guest.save_device_state(paused).await.unwrap());
    client.say(ToDestination::Final(client.last(attempt))).await;
    let (len, digest) = (state.len() as u64, digest::plain(&state));
    client
        .say(ToDestination::DeviceState {
            attempt,
            len,
            digest,
        })
        .await;
    let header = client
        .stream_header(StreamKind::DeviceState { attempt })
        .encode();
    let mut stream = client.open_raw(&header).await;
    stream.write_all(&state).await.unwrap();
    stream.finish().unwrap();
}

/// What the embedded guest answers to this command.
fn ask(socket: &Path, command: &str) -> (bool, String) {
    let output = Command::new(simguest())
        .args([command, "--json", "--socket"])
        .arg(socket)
        .output();
    let output = output.unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

fn quit(socket: &Path) -> bool {
    let status = Command::new(simguest())
        .args(["quit", "--socket"])
        .arg(socket)
        .status();
    status.unwrap().success()
}

/// State that the embedded guest says it is in.
fn state(socket: &Path) -> String {
    let status: serde_json::Value = serde_json::from_str(&ask(socket, "status").1).unwrap();
    status["state"].as_str().unwrap().to_owned()
}

async fn committed(site: &Site, session: u64, key: AttemptKey) {
    let mut again = hello(1);
    again.session = SessionNumber(session);
    let mut client = Client::welcome(site, again).await;
    client.say(ToDestination::Commit(key)).await;
    let ToSource::Outcome(outcome) = client.hear().await else {
        panic!("no outcome");
    };
    assert_eq!(outcome.key, key);
    assert_eq!(
        outcome.verdict,
        Verdict::Committed {
            record_us: 0,
            start_us: 0
        }
    );
    client.say(ToDestination::Goodbye).await;
}

/// Takes the guest of `site` up to `Prepared`.
async fn prepare(site: &Site) -> (Client, Box<dyn SourceGuest>, RegisterId) {
    let mut guest = start_source(site).await;
    let mut client = Client::greet(site, "alpha", hello(1)).await;
    let register = client.expect_welcome().await.register;
    client
        .say(ToDestination::Offer(Offer {
            populated: Vec::new(),
            spec: guest.spec().clone(),
        }))
        .await;
    assert!(matches!(client.hear().await, ToSource::Ready(_)));
    client.open_attempt(1).await;
    let paused = guest.pause().await.unwrap();
    send_guest(&mut client, &mut *guest, &paused).await;
    client.expect_complete().await;
    let ToSource::Prepared(prepared) = client.hear().await else {
        panic!("not Prepared; log: {}", site.logs());
    };
    assert_eq!(
        prepared.key,
        AttemptKey {
            migration: hello(1).migration,
            attempt: Attempt(1),
            register
        }
    );
    (client, guest, register)
}

#[tokio::test]
async fn a_committed_guest_runs_here_and_outlives_the_agent() {
    let mut site = Site::new();
    let told = site.path("told");
    for phase in ["load", "commit", "start", "release"] {
        site.write_hook(phase, &format!("echo $2 >> {}", told.display()));
    }
    let (mut client, mut guest, register) = prepare(&site).await;
    let arrived = site.path("web-1.sock");
    assert_eq!(
        state(&arrived),
        "paused",
        "it must not run before the commit"
    );

    let key = AttemptKey {
        migration: hello(1).migration,
        attempt: Attempt(1),
        register,
    };
    client.say(ToDestination::Commit(key)).await;
    let ToSource::Outcome(outcome) = client.hear().await else {
        panic!("no outcome");
    };
    assert!(
        matches!(outcome.verdict, Verdict::Committed { .. }),
        "{outcome:?}"
    );
    guest.release().await.unwrap();
    client.say(ToDestination::Goodbye).await;

    assert_eq!(state(&arrived), "running");
    let (good, verdict) = ask(&arrived, "verify");
    assert!(good, "{verdict}");
    assert_eq!(site.command(&["owner", "web-1"]).status.code(), Some(0));

    // The register answers the same for ever: in a later session, and by the next agent, which starts nothing twice.
    committed(&site, 2, key).await;
    assert_eq!(site.stop_agent(), Some(0), "{}", site.logs());
    assert_eq!(site.guests_alive().len(), 1);
    site.start();
    committed(&site, 3, key).await;
    assert!(ask(&arrived, "verify").0);
    let told = std::fs::read_to_string(told).unwrap();
    assert_eq!(told, "load\ncommit\nstart\nrelease\n");

    // A guest that is this host's is not taken again.
    let mut next = Client::greet(&site, "alpha", hello(2)).await;
    next.expect_error(vmferry_proto::error::ErrorCode::GuestBusy)
        .await;
    assert!(
        !site.logs().contains("panicked") && !site.logs().contains("internal:"),
        "{}",
        site.logs()
    );
    assert!(quit(&arrived));
}

#[tokio::test]
async fn a_prepared_guest_that_is_given_up_never_runs_and_the_next_attempt_arrives() {
    let site = Site::new();
    let (client, mut guest, register) = prepare(&site).await;
    // The source loses its link while prepared, and goes on copying: its offer settles the attempt.
    client.connection.close(0u32.into(), b"the link is cut");
    let mut again = hello(1);
    again.session = SessionNumber(2);
    let mut second = Client::welcome(&site, again.clone()).await;
    second
        .say(ToDestination::Offer(Offer {
            populated: Vec::new(),
            spec: guest.spec().clone(),
        }))
        .await;
    let ToSource::Outcome(outcome) = second.hear().await else {
        panic!("no outcome; log: {}", site.logs());
    };
    assert!(
        matches!(outcome.verdict, Verdict::Aborted(_)),
        "{outcome:?}"
    );
    let ToSource::Ready(ready) = second.hear().await else {
        panic!("not Ready; log: {}", site.logs());
    };
    assert_eq!(ready.incarnations.len(), 2);
    let key = AttemptKey {
        migration: hello(1).migration,
        attempt: Attempt(1),
        register,
    };
    assert_eq!(site.guests_alive().len(), 1, "the used copy is replaced");
    assert_eq!(state(&site.path("web-1.sock")), "incoming");
    second
        .say(ToDestination::Cancel {
            reason: support::cancelled(),
        })
        .await;
    second.expect_cancelled_after_outcome().await;
    drop(second);
    // Its register remembers, though nothing else of it is left.
    again.session = SessionNumber(3);
    let mut third = Client::welcome(&site, again).await;
    third.say(ToDestination::Query(key)).await;
    let ToSource::Outcome(outcome) = third.hear().await else {
        panic!("no outcome");
    };
    assert!(
        matches!(outcome.verdict, Verdict::Aborted(_)),
        "{outcome:?}"
    );
    third.say(ToDestination::Goodbye).await;
    drop(third);
    guest.release().await.unwrap();
    site.still_serves().await;
}
