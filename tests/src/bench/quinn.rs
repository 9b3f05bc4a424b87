//! The yardstick of the copy: bytes from one process to another over bare quinn.
//!
//! Owns a sender and a receiver that do nothing but move bytes: the transport settings, the number of streams and the
//! size of the pieces are those of the product, every piece is the same buffer, and what arrives is dropped. A
//! benchmark's executable becomes either when its arguments say so ([`run_if_asked`]).

use std::env;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use quinn::Connection;
use vmferry_common::endpoint::{self, HostPort, TransportTuning};
use vmferry_common::identity::Identity;

use super::cpu::{CpuMeter, Watched, per_gib};
use crate::harness::{Host, Running};

const RECEIVE: &str = "--yardstick-receive";
const SEND: &str = "--yardstick-send";
const STREAMS: u64 = 16;
const PIECE: usize = 512 << 10;
const LIMIT: Duration = Duration::from_secs(120);

/// Becomes the sender or the receiver, if the arguments ask for one.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let args: Vec<String> = env::args().collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match *args.get(1..)? {
        [RECEIVE, identity, at, bytes] => play(receive(identity.as_ref(), at, bytes)),
        [SEND, identity, to, bytes] => play(send(identity.as_ref(), to, bytes)),
        _ => return None,
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

/// What a transfer took.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Bytes per second.
    pub speed: f64,
    /// CPU seconds of both sides per GiB.
    pub cpu_per_gib: f64,
}

/// Moves `bytes` from `alpha` to `beta`, two processes of this executable.
///
/// # Errors
/// One of them fails.
pub fn transfer(alpha: &Host, beta: &Host, bytes: u64) -> anyhow::Result<Transfer> {
    let meter = CpuMeter::start();
    let start = |name, host: &Host, arguments: [String; 3]| {
        let mut command = Command::new(env::current_exe()?);
        command.arg(arguments[0].as_str());
        command.arg(host.path("identity")).args(&arguments[1..]);
        let running = host.run(|| Running::start(name, command, &host.path("logs")))?;
        meter.watch(Watched::whole(running.pid()));
        anyhow::Ok(running)
    };
    let at = |port: u16| SocketAddr::from((beta.address(), port)).to_string();
    let amount = bytes.to_string();
    let receiver = [RECEIVE.to_owned(), at(0), amount.clone()];
    let mut receiver = start("receiver", beta, receiver)?;
    let port: u16 = receiver.wait_for("port", LIMIT, |out, _| {
        out.strip_suffix('\n').and_then(|line| line.parse().ok())
    })?;
    let sender = start("sender", alpha, [SEND.to_owned(), at(port), amount])?;
    let done = sender.wait(LIMIT)?;
    ensure!(done.code() == 0, "the yardstick failed: {}", done.stderr);
    Ok(Transfer {
        speed: done.stdout.trim().parse()?,
        cpu_per_gib: per_gib(meter.used(), bytes),
    })
}

fn play(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(work)
}

async fn receive(identity: &Path, at: &str, bytes: &str) -> anyhow::Result<()> {
    let bytes: u64 = bytes.parse()?;
    let tuning = TransportTuning::default();
    let identity = Identity::load(identity)?;
    let endpoint = endpoint::bind_server(at.parse()?, &identity, &tuning)?;
    println!("{}", endpoint.local_addr()?.port());
    let incoming = endpoint.accept().await.context("nobody came")?;
    let (connection, _) = endpoint::accept(incoming, &tuning).await?;
    let mut tasks = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = connection.accept_uni().await?;
        tasks.push(tokio::spawn(async move {
            let mut got = 0;
            while let Some(chunk) = stream.read_chunk(PIECE, true).await? {
                got += chunk.bytes.len() as u64;
            }
            anyhow::Ok(got)
        }));
    }
    let mut got = 0;
    for task in tasks {
        got += task.await??;
    }
    ensure!(got == bytes, "{got} bytes came instead of {bytes}");
    let mut answer = connection.open_uni().await?;
    answer.write_all(b"all").await?;
    answer.finish()?;
    connection.closed().await;
    Ok(())
}

async fn send(identity: &Path, to: &str, bytes: &str) -> anyhow::Result<()> {
    let bytes: u64 = bytes.parse()?;
    let to: HostPort = to.parse()?;
    let tuning = TransportTuning::default();
    let identity = Identity::load(identity)?;
    let (endpoint, connection) = endpoint::connect(&to, &identity, &tuning).await?;
    let took = send_all(&connection, bytes).await?;
    connection.close(0u32.into(), b"done");
    endpoint.wait_idle().await;
    println!("{}", per_second(bytes, took));
    Ok(())
}

/// Sends and waits for the receiver's word that it has everything.
async fn send_all(connection: &Connection, bytes: u64) -> anyhow::Result<Duration> {
    let piece = Bytes::from(vec![0x5a; PIECE]);
    let began = Instant::now();
    for stream in 0..STREAMS {
        let mut left = bytes / STREAMS + u64::from(stream < bytes % STREAMS);
        let (mut lane, piece) = (connection.open_uni().await?, piece.clone());
        tokio::spawn(async move {
            while left > 0 {
                let len = left.min(PIECE as u64);
                lane.write_chunk(piece.slice(..usize::try_from(len)?))
                    .await?;
                left -= len;
            }
            lane.finish()?;
            // Kept until the peer has everything: a dropped stream would be reset.
            lane.stopped().await?;
            anyhow::Ok(())
        });
    }
    let answer = connection.accept_uni().await?.read_to_end(16).await?;
    if answer != b"all" {
        bail!("the receiver did not say that it has everything");
    }
    Ok(began.elapsed())
}

/// Bytes per second.
#[allow(
    clippy::cast_precision_loss,
    reason = "a rate for people; 2^53 bytes are far above any run"
)]
#[must_use]
pub fn per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / took.as_secs_f64()
}
