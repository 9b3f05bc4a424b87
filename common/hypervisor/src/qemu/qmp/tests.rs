//! The client against a server of this file that says what a test makes it say.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Event, EventTally, Qmp, QmpError, Touch};

struct Fake {
    folder: tempfile::TempDir,
    listener: UnixListener,
}

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \"package\": \"\"}, \"capabilities\": [\"oob\"]}}\r\n";

impl Fake {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("q")).unwrap();
        Self { folder, listener }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("q")
    }

    /// Accepts a client and gets it through the greeting.
    async fn connected(&self) -> (Qmp, BufReader<UnixStream>) {
        let path = self.path();
        let client = tokio::spawn(async move { Qmp::connect(&path).await.unwrap() });
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut server = BufReader::new(stream);
        server.write_all(GREETING.as_bytes()).await.unwrap();
        let hello = next(&mut server).await;
        assert_eq!(hello["execute"], "qmp_capabilities");
        say(&mut server, &json!({"return": {}, "id": hello["id"]})).await;
        (client.await.unwrap(), server)
    }
}

async fn next(server: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    server.read_line(&mut line).await.unwrap();
    serde_json::from_str(&line).unwrap()
}

async fn say(server: &mut BufReader<UnixStream>, what: &Value) {
    server
        .write_all(format!("{what}\r\n").as_bytes())
        .await
        .unwrap();
}

#[tokio::test]
async fn answers_find_their_command_by_id_and_events_their_listeners() {
    let fake = Fake::new();
    let (qmp, mut server) = fake.connected().await;
    assert_eq!(qmp.version().to_string(), "10.0.2");
    assert_eq!(qmp.peer_pid(), std::process::id());
    let mut events = qmp.events();
    let (a, b) = (qmp.clone(), qmp.clone());
    let first = tokio::spawn(async move { a.execute("one", json!({})).await });
    let one = next(&mut server).await;
    let second = tokio::spawn(async move { b.execute("two", json!({"x": u64::MAX})).await });
    let two = next(&mut server).await;
    assert_eq!(two["arguments"]["x"], u64::MAX);
    say(&mut server, &json!({"event": "RESUME", "timestamp": {}})).await;
    say(
        &mut server,
        &json!({"error": {"class": "GenericError", "desc": "no"}, "id": two["id"]}),
    )
    .await;
    say(&mut server, &json!({"return": 5, "id": one["id"]})).await;
    assert_eq!(first.await.unwrap().unwrap(), 5);
    let error = second.await.unwrap().unwrap_err();
    assert!(matches!(&error, QmpError::Refused { description, .. } if description == "no"));
    assert!(error.had_no_effect());
    assert_eq!(events.recv().await.unwrap().name, "RESUME");
    assert_eq!(qmp.tally().resume, 1);
}

#[tokio::test]
async fn an_event_is_counted_before_the_answer_behind_it() {
    let fake = Fake::new();
    let (qmp, mut server) = fake.connected().await;
    let before = qmp.tally();
    let asked = qmp.clone();
    let status = tokio::spawn(async move {
        asked.execute("query-status", json!({})).await.unwrap();
        asked.tally()
    });
    let command = next(&mut server).await;
    say(
        &mut server,
        &json!({"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}),
    )
    .await;
    say(&mut server, &json!({"return": {}, "id": command["id"]})).await;
    let touched = status.await.unwrap().touched_since(&before).unwrap();
    assert_eq!(touched, Touch::ShutDown("guest-shutdown".to_owned()));
}

#[test]
fn a_reset_counts_against_a_pause_only_once_the_cpus_are_stopped() {
    let event = |name: &str, guest: bool| Event {
        name: name.to_owned(),
        data: json!({ "guest": guest }),
    };
    let before = EventTally::default();
    let after = |events: &[Event]| {
        let mut tally = before.clone();
        events.iter().for_each(|event| tally.count(event));
        tally
    };
    let (rebooted, reset) = (event("RESET", true), event("RESET", false));
    let stop = event("STOP", false);
    let ran = after(&[rebooted.clone(), reset.clone(), stop.clone()]);
    assert_eq!(ran.touched_since(&ran.at_stop_since(&before)), None);
    for (late, touch) in [(rebooted, Touch::Rebooted), (reset, Touch::Reset)] {
        let in_pause = after(&[stop.clone(), late.clone()]);
        let at_stop = in_pause.at_stop_since(&before);
        assert_eq!(in_pause.touched_since(&at_stop), Some(touch.clone()));
        // It was paused already, so nothing says when.
        let unstopped = after(&[late]);
        let at_stop = unstopped.at_stop_since(&before);
        assert_eq!(unstopped.touched_since(&at_stop), Some(touch));
    }
}

#[tokio::test]
async fn a_late_answer_disturbs_nobody() {
    let fake = Fake::new();
    let (qmp, mut server) = fake.connected().await;
    let limit = Duration::from_millis(20);
    let late = qmp
        .execute_within("slow", json!({}), limit)
        .await
        .unwrap_err();
    assert!(matches!(late, QmpError::TimedOut { .. }) && !late.had_no_effect());
    let slow = next(&mut server).await;
    say(&mut server, &json!({"return": "late", "id": slow["id"]})).await;
    let asked = qmp.clone();
    let quick = tokio::spawn(async move { asked.execute("quick", json!({})).await });
    let command = next(&mut server).await;
    say(
        &mut server,
        &json!({"return": "quick", "id": command["id"]}),
    )
    .await;
    assert_eq!(quick.await.unwrap().unwrap(), "quick");
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_wait_and_later_commands_are_not_sent() {
    let fake = Fake::new();
    let (qmp, mut server) = fake.connected().await;
    let asked = qmp.clone();
    let waiting = tokio::spawn(async move { asked.execute("cont", json!({})).await });
    next(&mut server).await;
    drop(server);
    let error = waiting.await.unwrap().unwrap_err();
    assert!(
        matches!(error, QmpError::Closed { .. }) && !error.had_no_effect(),
        "{error}"
    );
    let error = qmp.execute("cont", json!({})).await.unwrap_err();
    assert!(
        matches!(error, QmpError::NotSent { .. }) && error.had_no_effect(),
        "{error}"
    );
    assert!(qmp.closed().borrow().is_some());
}

#[tokio::test]
async fn what_is_not_json_ends_the_connection_with_its_reason() {
    let fake = Fake::new();
    let (qmp, mut server) = fake.connected().await;
    let asked = qmp.clone();
    let waiting = tokio::spawn(async move { asked.execute("x", json!({})).await });
    next(&mut server).await;
    server.write_all(b"nonsense\n").await.unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert!(error.to_string().contains("not JSON"), "{error}");
}

#[tokio::test]
async fn a_socket_that_serves_another_client_is_told_as_busy() {
    let fake = Fake::new();
    let error = Qmp::connect_within(&fake.path(), Duration::from_millis(50))
        .await
        .unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    assert!(error.to_string().contains("another program"), "{error}");
}

#[tokio::test]
async fn a_socket_without_listener_names_the_cure() {
    let folder = tempfile::tempdir().unwrap();
    let error = Qmp::connect(&folder.path().join("none")).await.unwrap_err();
    assert!(error.to_string().contains("server=on,wait=off"), "{error}");
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let fake = Fake::new();
    let (qmp, server) = fake.connected().await;
    let server = server.into_inner().into_std().unwrap();
    server.set_nonblocking(false).unwrap();
    let file = tempfile::tempfile().unwrap();
    let mut ours = file.try_clone().unwrap();
    let fd = OwnedFd::from(file);
    let asked = tokio::spawn(async move {
        qmp.execute_with_fd("getfd", json!({"fdname": "f"}), fd)
            .await
    });
    let received = tokio::task::spawn_blocking(move || {
        let mut bytes = [0; 4096];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            server.as_fd(),
            &mut [std::io::IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::empty(),
        )
        .unwrap();
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let command: Value = serde_json::from_slice(&bytes[..got.bytes]).unwrap();
        let reply = json!({"return": {}, "id": command["id"]}).to_string() + "\n";
        (&server).write_all(reply.as_bytes()).unwrap();
        (fds, server)
    })
    .await
    .unwrap();
    asked.await.unwrap().unwrap();
    let (fds, _server) = received;
    ours.write_all(b"same file").unwrap();
    let through = std::fs::File::from(fds.into_iter().next().expect("no descriptor came"));
    assert_eq!(through.metadata().unwrap().len(), 9);
}
