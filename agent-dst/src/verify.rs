//! Digests of what really stands in the destination's regions, read back from where it was written.
//!
//! Owns the enumeration of the windows that a `Final` or a `Compare` asks for and the reading, several windows at once; the digest
//! itself is common to both agents. Memory stays bounded: one window's buffer per worker, one piece of answers.

use std::num::NonZeroU32;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use vmferry_common::digest::WindowHasher;
use vmferry_hypervisor::{GuestError, RegionWriter};
use vmferry_proto::geometry::{RegionLen, WindowIndex, WindowRef};
use vmferry_proto::ids::{Attempt, MigrationId, RegionId};
use vmferry_proto::limits::MAX_DIGESTS;
use vmferry_proto::message::{Digests, VerifyWindows, WindowDigest};

use crate::sink::Sink;

/// Windows digested by one worker before its answers are collected: enough that starting a task costs nothing.
const BATCH: usize = 64;

/// The digests cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// The peer asks for what the guest does not have.
    #[error("digests were asked for of region {0}, which the guest does not have")]
    NoSuchRegion(RegionId),
    /// The peer asks for a stride of zero.
    #[error("digests of region {0} were asked for with a stride of 0")]
    ZeroStride(RegionId),
    /// The disks cannot be flushed.
    #[error("the disks cannot be flushed")]
    Flush(#[source] GuestError),
    /// The region cannot be read back.
    #[error("the copy of a region cannot be read back")]
    Read(#[source] GuestError),
    /// A worker ended without an answer.
    #[error("a digest worker ended early: {0}")]
    Worker(String),
}

/// A checked request for digests.
#[derive(Debug)]
pub(crate) struct Plan {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    region: RegionId,
    len: RegionLen,
    reader: Arc<dyn RegionWriter>,
    first: u32,
    stride: NonZeroU32,
}

/// A window to digest.
#[derive(Debug)]
struct Item {
    region: RegionId,
    len: RegionLen,
    reader: Arc<dyn RegionWriter>,
    window: WindowIndex,
}

impl Plan {
    /// What `asked` means for the regions of `sink`.
    ///
    /// # Errors
    /// The peer asks for a region that is not there, or for every zeroth window.
    pub(crate) fn new(sink: &Sink, asked: &[VerifyWindows]) -> Result<Self, VerifyError> {
        let parts = asked.iter().map(|part| {
            let target = sink
                .target(part.region)
                .ok_or(VerifyError::NoSuchRegion(part.region))?;
            let stride =
                NonZeroU32::new(part.stride).ok_or(VerifyError::ZeroStride(part.region))?;
            Ok(Part {
                region: part.region,
                len: target.len,
                reader: target.writer.clone(),
                first: part.first.0,
                stride,
            })
        });
        let parts = parts.collect::<Result<_, _>>()?;
        Ok(Self { parts })
    }

    fn items(self) -> impl Iterator<Item = Item> + Send {
        self.parts.into_iter().flat_map(|part| {
            let mut next = Some(part.first);
            std::iter::from_fn(move || {
                let window = next.filter(|window| *window < part.len.windows())?;
                next = window.checked_add(part.stride.get());
                Some(Item {
                    region: part.region,
                    len: part.len,
                    reader: part.reader.clone(),
                    window: WindowIndex(window),
                })
            })
        })
    }
}

/// Digests of these windows, all of which the sink has; at most [`MAX_DIGESTS`].
///
/// # Errors
/// A region cannot be read back.
pub(crate) async fn digests_of(
    sink: &Sink,
    windows: &[WindowRef],
    hasher: &WindowHasher,
) -> Result<Vec<WindowDigest>, VerifyError> {
    let mut items = windows.iter().filter_map(|at| {
        let target = sink.target(at.region)?;
        Some(Item {
            region: at.region,
            len: target.len,
            reader: target.writer.clone(),
            window: at.window,
        })
    });
    piece(&mut items, hasher).await
}

/// Digests everything that `plan` names, in its order, and hands the pieces to `out` as they are ready; the last one is
/// marked. Returns early if nobody listens any more.
///
/// # Errors
/// A region cannot be read back.
pub(crate) async fn run(
    plan: Plan,
    migration: MigrationId,
    attempt: Attempt,
    out: &mpsc::Sender<Digests>,
) -> Result<(), VerifyError> {
    let hasher = WindowHasher::new(migration);
    let mut items = plan.items().peekable();
    loop {
        let windows = piece(&mut items, &hasher).await?;
        let last = items.peek().is_none();
        let sent = out
            .send(Digests {
                attempt,
                windows,
                last,
            })
            .await;
        if last || sent.is_err() {
            return Ok(());
        }
    }
}

/// The next `MAX_DIGESTS` windows, digested by as many workers as there are cores.
async fn piece(
    items: &mut (impl Iterator<Item = Item> + Send),
    hasher: &WindowHasher,
) -> Result<Vec<WindowDigest>, VerifyError> {
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let mut tasks = JoinSet::new();
    let mut done: Vec<(usize, Vec<WindowDigest>)> = Vec::new();
    for number in 0..MAX_DIGESTS / BATCH {
        let batch: Vec<Item> = items.take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        if tasks.len() >= workers {
            done.extend(next_done(&mut tasks).await?);
        }
        let hasher = hasher.clone();
        tasks.spawn(async move { Ok((number, digest_all(batch, hasher).await?)) });
    }
    while !tasks.is_empty() {
        done.extend(next_done(&mut tasks).await?);
    }
    done.sort_by_key(|(number, _)| *number);
    Ok(done.into_iter().flat_map(|(_, digests)| digests).collect())
}

type BatchDone = (usize, Vec<WindowDigest>);

async fn next_done(
    tasks: &mut JoinSet<Result<BatchDone, GuestError>>,
) -> Result<Option<BatchDone>, VerifyError> {
    match tasks.join_next().await {
        None => Ok(None),
        Some(Ok(Ok(batch))) => Ok(Some(batch)),
        Some(Ok(Err(error))) => Err(VerifyError::Read(error)),
        Some(Err(error)) => Err(VerifyError::Worker(error.to_string())),
    }
}

async fn digest_all(
    batch: Vec<Item>,
    hasher: WindowHasher,
) -> Result<Vec<WindowDigest>, GuestError> {
    let mut buf = Vec::new();
    let mut digests = Vec::with_capacity(batch.len());
    for item in batch {
        let all = item.len.all_of(item.window);
        buf.resize(item.len.bytes_of(item.window, &all) as usize, 0);
        item.reader
            .read(&item.len.runs(item.window, &all), &mut buf)
            .await?;
        digests.push(WindowDigest {
            region: item.region,
            window: item.window,
            digest: hasher.digest(&buf),
        });
    }
    Ok(digests)
}
