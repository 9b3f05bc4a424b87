//! The data lanes: one task each, from a frame's description to its bytes on the wire.
//!
//! Owns reading, encoding and sending of the frames that the engine has decided on, in their order. A
//! lane holds one frame at a time, so memory is bounded by the number of lanes. Guest memory is copied
//! into a buffer of the lane's before anything else looks at it: what QUIC may have to send again must
//! not change under it. Owns neither the ledger nor any decision.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use vmferry_common::budget::SendBudget;
use vmferry_common::codec::{
    Before, Blocks, CodecError, Elsewhere, Encoded, Encoder, EncoderPool, KeptBefore,
};
use vmferry_common::compress::Effort;
use vmferry_common::cores::Cores;
use vmferry_common::duplicates::Duplicates;
use vmferry_common::kept::KeptBlocks;
use vmferry_common::lanes::{LaneError as StreamError, LaneSender};
use vmferry_common::pace::Pacer;
use vmferry_common::sent::{Secret, SentBlocks};
use vmferry_hypervisor::{GuestError, RegionReader};
use vmferry_proto::frame::Encoding;
use vmferry_proto::geometry::{RegionLen, WindowRef};
use vmferry_proto::ids::Lane;
use vmferry_proto::ledger::FrameJob;
use vmferry_proto::message::LaneProgress;
use vmferry_proto::spec::RegionKind;
use vmferry_proto::version::{DIFFERENCE, DUPLICATE, Features};

mod counters;

pub use counters::LaneCounters;

/// Frames waiting at a lane. Enough that a lane never idles while the engine looks at its neighbours;
/// they are descriptions only, the data is read when their turn comes.
const QUEUE: usize = 8;
/// A lane asks for more when it has so few left, the one just done included.
const REFILL: usize = QUEUE / 2;

/// Why a lane stopped.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The guest could not be read.
    #[error("reading {what}")]
    Read {
        /// Region and window.
        what: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// The connection does not take it.
    #[error("sending")]
    Send(#[from] StreamError),
    /// The frame could not be encoded.
    #[error("encoding a frame")]
    Encode(#[from] CodecError),
}

impl LaneError {
    /// Whether this is a matter of the guest, which no new connection mends.
    #[must_use]
    pub const fn is_guest(&self) -> bool {
        matches!(self, Self::Read { .. })
    }
}

/// Threads that read and encode at once.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// A frame to send and where its bytes are.
#[derive(Debug)]
pub struct LaneJob {
    /// What the ledger decided.
    pub frame: FrameJob,
    /// Length of its region.
    pub len: RegionLen,
    /// Kind of its region.
    pub kind: RegionKind,
    /// Reader of its region.
    pub reader: Arc<dyn RegionReader>,
    /// Whether it is likely to be sent once more.
    pub again: Again,
}

/// Whether the blocks of a frame are likely to be sent once more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// They were written since the migration began.
    Likely,
    /// Nothing is known of them, or the guest stands still.
    Unlikely,
}

/// A lane failed: told to the engine once.
#[derive(Debug)]
pub struct LaneFailed {
    /// Which.
    pub lane: Lane,
    /// Why.
    pub error: LaneError,
}

/// All lanes of a session. Dropping them ends their tasks.
#[derive(Debug)]
pub struct Lanes {
    handles: Vec<LaneHandle>,
    duplicates: Option<Arc<Duplicates>>,
    moved: Arc<Notify>,
}

/// A lane's queue and task.
#[derive(Debug)]
pub struct LaneHandle {
    queue: mpsc::Sender<LaneJob>,
    /// Frames queued or at work.
    pending: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Lanes {
    /// Starts a task for each stream; the guest has so many `blocks`, and both sides have `features`.
    #[must_use]
    pub fn start(
        senders: Vec<LaneSender>,
        pacer: &Pacer,
        counters: &Arc<LaneCounters>,
        features: &Features,
        blocks: u64,
        failed: &mpsc::UnboundedSender<LaneFailed>,
    ) -> Self {
        let moved = Arc::new(Notify::new());
        let pool: Arc<EncoderPool> = Arc::default();
        let (workers, lanes) = (workers(), senders.len());
        let looks = !counters.compress().0.is_off();
        let refers = looks && counters.may_refer();
        let differs = refers && features.has(DIFFERENCE);
        let count = u8::try_from(lanes).unwrap_or(u8::MAX);
        let duplicates =
            (refers && features.has(DUPLICATE)).then(|| Arc::new(Duplicates::new(count, blocks)));
        let secret = Secret::new();
        let cores = Arc::new(Cores::new(workers));
        let mut budgets: HashMap<usize, Arc<SendBudget>> = HashMap::new();
        let start = |sender: LaneSender| {
            let budget = budgets
                .entry(sender.connection_id())
                .or_insert_with(|| SendBudget::new(workers));
            let (queue, jobs) = mpsc::channel(QUEUE);
            let pending = Arc::new(AtomicUsize::new(0));
            let worker = Worker {
                lane: sender.lane(),
                sender,
                encoder: Encoder::of(pool.clone()),
                sent: looks.then(|| SentBlocks::of_one(lanes, secret.clone())),
                kept: differs.then(|| KeptBlocks::of_one(lanes)),
                duplicates: duplicates.clone(),
                budget: budget.clone(),
                cores: cores.clone(),
                pacer: pacer.clone(),
                counters: counters.clone(),
                pending: pending.clone(),
                moved: moved.clone(),
            };
            let task = tokio::spawn(worker.run(jobs, failed.clone()));
            LaneHandle {
                queue,
                pending,
                task,
            }
        };
        let handles = senders.into_iter().map(start).collect();
        Self {
            handles,
            duplicates,
            moved,
        }
    }

    /// The destination said how far it is.
    pub fn on_progress(&self, lanes: &[LaneProgress]) {
        if let Some(duplicates) = &self.duplicates {
            for lane in lanes {
                duplicates.on_applied(lane.lane, lane.applied);
            }
        }
    }

    /// No block goes as a duplicate from here on.
    pub fn end_duplicates(&self) {
        if let Some(duplicates) = &self.duplicates {
            duplicates.close();
        }
    }

    /// The lanes, by number.
    #[must_use]
    pub fn handles(&self) -> &[LaneHandle] {
        &self.handles
    }

    /// Whether any lane has a frame queued or at work.
    #[must_use]
    pub fn are_busy(&self) -> bool {
        self.handles
            .iter()
            .any(|lane| lane.pending.load(Ordering::Acquire) > 0)
    }

    /// Notified after a lane has finished a frame and has few left or none.
    #[must_use]
    pub fn moved(&self) -> Arc<Notify> {
        self.moved.clone()
    }
}

impl LaneHandle {
    /// Whether the queue takes another frame.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.queue.capacity() > 0
    }

    /// Queues a frame. Returns whether the lane took it: only where it [`has_room`](Self::has_room) and its task lives.
    #[must_use]
    pub fn push(&self, job: LaneJob) -> bool {
        self.pending.fetch_add(1, Ordering::AcqRel);
        let taken = self.queue.try_send(job).is_ok();
        if !taken {
            self.pending.fetch_sub(1, Ordering::AcqRel);
        }
        taken
    }
}

impl Drop for LaneHandle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Worker {
    lane: Lane,
    sender: LaneSender,
    encoder: Encoder,
    /// `None` with `--compress off`, which spends no time on bytes.
    sent: Option<SentBlocks>,
    /// `None` as well where the peer does not take differences.
    kept: Option<KeptBlocks>,
    /// `None` as well where the peer does not take duplicates, and from the first block on that is sent for the second time.
    duplicates: Option<Arc<Duplicates>>,
    budget: Arc<SendBudget>,
    cores: Arc<Cores>,
    pacer: Pacer,
    counters: Arc<LaneCounters>,
    pending: Arc<AtomicUsize>,
    moved: Arc<Notify>,
}

impl Worker {
    async fn run(
        mut self,
        mut jobs: mpsc::Receiver<LaneJob>,
        failed: mpsc::UnboundedSender<LaneFailed>,
    ) {
        while let Some(job) = jobs.recv().await {
            if let Err(error) = self.send(&job).await {
                // The engine may be gone: then nobody wants to know.
                let _ = failed.send(LaneFailed {
                    lane: self.lane,
                    error,
                });
                return;
            }
            // The engine is woken once for several frames: waking it costs as much as it does then.
            if self.pending.fetch_sub(1, Ordering::AcqRel) <= REFILL {
                self.moved.notify_one();
            }
        }
    }

    async fn send(&mut self, job: &LaneJob) -> Result<(), LaneError> {
        self.settle_duplicates(&job.frame).await;
        let LaneJob {
            frame, len, reader, ..
        } = job;
        let wanted = frame.blocks.minus(&frame.known_zero);
        let bytes = len.bytes_of(frame.window, &wanted) as usize;
        let link_waits = self.counters.link_waits();
        let path = || self.sender.path();
        let reserved = self.budget.reserve(bytes as u64, path, link_waits).await;
        let room = self.encoder.room(bytes);
        if bytes > 0 {
            let runs = len.runs(frame.window, &wanted);
            reader
                .read(&runs, room)
                .await
                .map_err(|source| LaneError::Read {
                    what: format!("window {} of region {}", frame.window.0, frame.region),
                    source,
                })?;
        }
        let blocks = Blocks {
            window: WindowRef {
                region: frame.region,
                window: frame.window,
            },
            region: *len,
            read: wanted,
            known_zero: frame.known_zero,
            bytes: &[],
        };
        let (effort, refers) = {
            let policy = &mut self.counters.compress().0;
            (policy.next_effort(), policy.refers())
        };
        let cores = self.cores.clone();
        let mut encode = || self.encode(&blocks, job, effort, refers);
        let encoded = match effort {
            Some(_) => cores.work(encode).await?,
            None => encode()?,
        };
        self.counters.count(&encoded);
        let header = encoded.header(frame.seq);
        let _waiting = self.counters.link_waits().begin();
        let payload = reserved.send(encoded.payload);
        self.sender
            .send_paced(&header, payload, &self.pacer)
            .await?;
        Ok(())
    }

    /// What goes for the second time must not be referred to any more. Asked before there is room for the frame: whoever refers goes on.
    async fn settle_duplicates(&mut self, frame: &FrameJob) {
        if self.duplicates.is_none() {
            return;
        }
        let at = WindowRef {
            region: frame.region,
            window: frame.window,
        };
        let sent = self.sent.as_ref();
        if sent.is_some_and(|sent| sent.has_any(at, &frame.blocks))
            && let Some(duplicates) = self.duplicates.take()
        {
            duplicates.end().await;
        }
    }

    /// Encodes what was read, as the policy says, and tells it what came of that.
    fn encode(
        &mut self,
        blocks: &Blocks<'_>,
        job: &LaneJob,
        effort: Option<Effort>,
        refers: bool,
    ) -> Result<Encoded, CodecError> {
        // The destination reads what it has there, which of a disk may take longer than the bytes.
        let of_memory = job.kind == RegionKind::Memory;
        let kept = self.kept.as_mut().filter(|_| of_memory);
        let kept = kept.map(|blocks| KeptBefore {
            blocks,
            again: job.again == Again::Likely,
            differ: refers,
        });
        let duplicates = self.duplicates.as_deref().filter(|_| refers);
        let elsewhere = duplicates.map(|duplicates| Elsewhere {
            duplicates,
            kind: job.kind,
            seq: job.frame.seq,
        });
        let before = self.sent.as_mut().map(|sent| Before {
            sent,
            kept,
            elsewhere,
        });
        let encoded = self.encoder.encode_filled(blocks, effort, before)?;
        if let Some(tried) = &encoded.tried {
            let policy = &mut self.counters.compress().0;
            match encoded.encoding {
                Encoding::Zstd | Encoding::Raw => policy.on_compressed(tried),
                Encoding::Difference | Encoding::Duplicate => policy.on_referring(tried.spent),
            }
        }
        Ok(encoded)
    }
}
