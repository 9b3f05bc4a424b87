//! Tests of the local control socket: good and bad clients against a real server on a real socket.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::server::{MAX_CLIENTS, in_group};
use super::*;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::sync::Notify;

/// Answers `echo`, refuses `no`, waits for ever at `wait` and tells when that is dropped.
#[derive(Default)]
struct Sample {
    started: Notify,
    dropped: Arc<Notify>,
}

struct TellDrop(Arc<Notify>);

impl Drop for TellDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

#[async_trait]
impl Commands for Sample {
    async fn execute(
        &self,
        caller: Caller,
        command: &str,
        arguments: Value,
    ) -> Result<Value, CommandError> {
        assert_eq!(caller.uid, rustix::process::getuid().as_raw());
        match command {
            "echo" => Ok(arguments),
            "no" => Err(CommandError::new("NotNow", "the guest is being paused")),
            "slow" => {
                tokio::time::sleep(Duration::from_millis(500)).await;
                Ok(json!("done"))
            }
            "wait" => {
                let _tell = TellDrop(Arc::clone(&self.dropped));
                self.started.notify_one();
                std::future::pending().await
            }
            other => Err(CommandError::not_found(other)),
        }
    }
}

struct Running {
    _dir: tempfile::TempDir,
    path: PathBuf,
    sample: Arc<Sample>,
    events: Events,
    _serving: tokio::task::JoinHandle<()>,
}

fn start() -> Running {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/src-web.sock");
    let server = LocalServer::bind(&path).unwrap();
    let (sample, events) = (Arc::new(Sample::default()), Events::new());
    let serving = tokio::spawn({
        let (sample, events) = (Arc::clone(&sample), events.clone());
        async move { server.serve(sample, events).await }
    });
    Running {
        _dir: dir,
        path,
        sample,
        events,
        _serving: serving,
    }
}

const LONG: Duration = Duration::from_secs(60);

async fn raw(path: &Path, send: &[u8]) -> Vec<Value> {
    let (read, mut write) = UnixStream::connect(path).await.unwrap().into_split();
    // The server may close before all is written.
    drop(write.write_all(send).await);
    drop(write.shutdown().await);
    let mut lines = BufReader::new(read).lines();
    let mut answers = Vec::new();
    while let Ok(Some(line)) = lines.next_line().await {
        answers.push(serde_json::from_str(&line).unwrap());
    }
    answers
}

#[tokio::test]
async fn a_command_is_answered_and_a_refusal_has_its_class() {
    let running = start();
    let value = call(&running.path, "echo", json!({"a": 1}), LONG)
        .await
        .unwrap();
    assert_eq!(value, json!({"a": 1}));
    let error = call(&running.path, "no", json!({}), LONG)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, LocalError::Refused(e) if e.class == "NotNow"),
        "{error}"
    );
    let error = call(&running.path, "nothing", json!({}), LONG)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("CommandNotFound"), "{error}");
}

#[tokio::test]
async fn it_is_shaped_like_qmp() {
    let running = start();
    let mut stream = UnixStream::connect(&running.path).await.unwrap();
    stream
        .write_all(b"{\"execute\":\"echo\",\"id\":\"x\"}\n\n{\"execute\":\"no\"}\n")
        .await
        .unwrap();
    let mut lines = BufReader::new(stream).lines();
    let mut next = async || -> Value {
        serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap()
    };
    assert_eq!(next().await, json!({"return": {}, "id": "x"}));
    assert_eq!(
        next().await,
        json!({"error": {"class": "NotNow", "desc": "the guest is being paused"}})
    );
    running.events.send("PHASE", json!({"phase": "copy"}));
    let event = next().await;
    assert_eq!(event["event"], "PHASE");
    assert_eq!(event["data"], json!({"phase": "copy"}));
    assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_700_000_000);
}

#[tokio::test]
async fn garbage_is_answered_and_long_lines_end_the_client() {
    let running = start();
    for garbage in [
        "hello\n",
        "{}\n",
        "[1]\n",
        "{\"execute\":1}\n",
        "\u{1}\u{2}\n",
        "{\"execute\":\"echo\",\"arguments\":[]}\n",
        "{\"execute\":\"echo\",\"more\":1}\n",
    ] {
        let answers = raw(&running.path, garbage.as_bytes()).await;
        assert_eq!(answers.len(), 1, "{garbage:?}");
        assert_eq!(answers[0]["error"]["class"], "GenericError", "{garbage:?}");
    }
    assert!(raw(&running.path, b"\xff\xfe\n").await[0]["error"].is_object());
    assert!(raw(&running.path, b"no end of line").await.is_empty());
    let mut line = vec![b'x'; MAX_LINE + 100];
    line.extend_from_slice(b"\n{\"execute\":\"echo\"}\n");
    let answers = raw(&running.path, &line).await;
    assert_eq!(answers.len(), 1);
    assert!(
        answers[0]["error"]["desc"]
            .as_str()
            .unwrap()
            .contains("longer than")
    );
    // And others are served as before.
    call(&running.path, "echo", json!({}), LONG).await.unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_command() {
    let running = start();
    let calling = tokio::spawn({
        let path = running.path.clone();
        async move { call(&path, "wait", json!({}), LONG).await }
    });
    running.sample.started.notified().await;
    calling.abort();
    running.sample.dropped.notified().await;
    let limit = Duration::from_millis(20);
    let error = call(&running.path, "wait", json!({}), limit)
        .await
        .unwrap_err();
    assert!(matches!(error, LocalError::TimedOut { .. }), "{error}");
}

#[tokio::test]
async fn a_client_that_only_closed_its_sending_side_gets_its_answer() {
    let running = start();
    let (read, mut write) = UnixStream::connect(&running.path)
        .await
        .unwrap()
        .into_split();
    let line = b"{\"execute\":\"slow\",\"id\":4}\n";
    write.write_all(line).await.unwrap();
    write.shutdown().await.unwrap();
    let mut lines = BufReader::new(read).lines();
    let answer = lines.next_line().await.unwrap().unwrap();
    assert_eq!(answer, "{\"id\":4,\"return\":\"done\"}");
}

#[tokio::test]
async fn the_socket_is_private_and_removed_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let server = LocalServer::bind(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o660
    );
    assert!(matches!(
        LocalServer::bind(&path),
        Err(LocalError::InUse { .. })
    ));
    drop(server);
    assert!(!path.exists());
    let error = call(&path, "echo", json!({}), LONG).await.unwrap_err();
    assert!(matches!(error, LocalError::NobodyListens { .. }), "{error}");
}

#[tokio::test]
async fn only_a_stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "the file of a dead agent is left behind");
    let server = LocalServer::bind(&path).unwrap();
    // A later agent's file is not removed by this one.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(server);
    assert!(matches!(
        LocalServer::bind(&path),
        Err(LocalError::NotASocket { .. })
    ));
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[tokio::test]
async fn more_clients_than_places_are_served_in_turn() {
    let running = start();
    let idle: Vec<_> = futures_of(MAX_CLIENTS, &running.path).await;
    let waiting = tokio::spawn({
        let path = running.path.clone();
        async move { call(&path, "echo", json!({"n": 1}), LONG).await }
    });
    tokio::task::yield_now().await;
    drop(idle);
    assert_eq!(waiting.await.unwrap().unwrap(), json!({"n": 1}));
}

async fn futures_of(count: usize, path: &Path) -> Vec<UnixStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(UnixStream::connect(path).await.unwrap());
    }
    streams
}

#[test]
fn other_users_are_turned_away() {
    assert!(!in_group(None, 0));
    assert!(!in_group(Some(1), u32::MAX));
}
