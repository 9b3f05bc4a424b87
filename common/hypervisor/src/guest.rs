//! The guest as the engine sees it: the traits behind which every hypervisor stands.
//!
//! Owns the contracts; a driver owns how they are kept. The rules that make a copy right (arm, barrier,
//! read; completeness) are kept by the engine, which calls these in that order.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use vmferry_common::process::ProcessIdentity;
use vmferry_proto::geometry::{RegionBits, Run};
use vmferry_proto::handover::RunPermit;
use vmferry_proto::ids::{Incarnation, RegionId};
use vmferry_proto::message::PopulatedWindows;
use vmferry_proto::spec::{GuestSpec, RunState};

use crate::error::GuestError;
use crate::marks::{MarkLog, TrackingLeft};

/// A device state that is being saved.
pub type SavingDeviceState = BoxFuture<'static, Result<Vec<u8>, GuestError>>;

/// A running guest that is to leave this host.
#[async_trait]
pub trait SourceGuest: Send + std::fmt::Debug {
    /// What was found at attach.
    fn spec(&self) -> &GuestSpec;

    /// Handle for reading `region`, usable from several tasks at once; `None` for an id that is not in the spec.
    fn reader(&self, region: RegionId) -> Option<Arc<dyn RegionReader>>;

    /// Memory of which the guest has every page: what a destination may touch ahead. A hint; none is right too.
    async fn populated(&mut self) -> Vec<PopulatedWindows> {
        Vec::new()
    }

    /// Begins to track writes to every region. After it, no write is missed: each shows in a later
    /// [`take_dirty`](Self::take_dirty) or the first one.
    async fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// Writes what is taken into `log` from here on, before anybody can lose it. Called before the tracking begins or goes on.
    /// A driver that does not leaves a later agent nothing to go on with.
    fn keep_marks(&mut self, _log: Arc<dyn MarkLog>) {}

    /// What a later agent needs to go on with the tracking; `None` where there is none, or no way to.
    fn tracking(&self) -> Option<TrackingLeft> {
        None
    }

    /// Goes on with the tracking that an earlier agent left, instead of beginning one. The marks that were taken are in the log of
    /// [`keep_marks`](Self::keep_marks). On an error [`stop_tracking`](Self::stop_tracking) removes what is left.
    async fn resume_tracking(&mut self, _left: &TrackingLeft) -> Result<(), GuestError> {
        Err(GuestError::Refused {
            command: "going on with a tracking".to_owned(),
            answer: "this driver cannot".to_owned(),
        })
    }

    /// Ends tracking, also one that an earlier agent left, and removes every trace from the hypervisor (descriptors,
    /// exports, bitmaps). Idempotent.
    async fn stop_tracking(&mut self) -> Result<(), GuestError>;

    /// Takes the dirty marks of the whole region and re-arms them, atomically per block. Everything is dirty the
    /// first time. The guest is never held longer than a bounded piece of this takes.
    ///
    /// Until [`settle`](Self::settle) says otherwise the driver keeps what it needs to put the marks back.
    async fn take_dirty(&mut self, region: RegionId) -> Result<Taken, GuestError>;

    /// Tells the driver that the blocks of the last `take_dirty` of this region are safe at the destination
    /// (`Acknowledged`), or that they count as dirty again (`PutBack`).
    async fn settle(&mut self, region: RegionId, outcome: Settlement) -> Result<(), GuestError>;

    /// Returns when all device I/O in flight at the call has completed, with the time for which it held the guest.
    /// Zero, at once, where no disk bypasses the page cache.
    async fn io_barrier(&mut self) -> Result<Duration, GuestError>;

    /// Whether the guest runs or is paused, asked right now.
    async fn run_state(&mut self) -> Result<RunState, GuestError>;

    /// Pauses the guest and checks that it is still the guest of [`spec`](Self::spec): RAM blocks, devices, disk sizes.
    /// On an error the guest may be paused; the caller rolls back with a permit as after any failed attempt.
    async fn pause(&mut self) -> Result<GuestPaused, PauseError>;

    /// Fails if anybody resumed, reset or shut down the guest since the pause (`[HAND-10]`).
    async fn still_paused(&mut self, paused: &GuestPaused) -> Result<(), GuestError>;

    /// After the last read of the disks: closes what stands in the way of the device state and saves it (at QEMU: exports deleted,
    /// `blocked-reasons` asked again, then saved), both beside whatever the caller does meanwhile with memory. What is returned is to be
    /// waited for before the guest is asked anything else.
    async fn begin_device_state(
        &mut self,
        paused: &GuestPaused,
    ) -> Result<SavingDeviceState, GuestError>;

    /// The same, waited for.
    async fn save_device_state(&mut self, paused: &GuestPaused) -> Result<Vec<u8>, GuestError> {
        self.begin_device_state(paused).await?.await
    }

    /// Brings the guest back to the state `to` it had before the pause.
    async fn resume(&mut self, permit: RunPermit, to: RunState) -> Result<(), GuestError>;

    /// Lets the copy go after the commit: the process ends, images stay. Idempotent.
    async fn release(&mut self) -> Result<(), GuestError>;

    /// Whether the guest still lives: changes once, when it is shut down or its hypervisor is gone.
    fn life(&self) -> watch::Receiver<GuestLife>;

    /// The hypervisor's process, for the journal.
    fn process(&self) -> ProcessIdentity;
}

/// A fresh copy of a guest that waits for its content.
#[async_trait]
pub trait TargetGuest: Send + std::fmt::Debug {
    /// Handle for writing `region`, usable from several tasks at once; `None` for an id that is not in the spec.
    fn writer(&self, region: RegionId) -> Option<Arc<dyn RegionWriter>>;

    /// Incarnations of the regions' copies, in order of id.
    fn incarnations(&self) -> Vec<Incarnation>;

    /// Says that the content of `region` is that of an earlier copy of this incarnation: a disk whose image is the same one.
    /// A driver that does not take it has it sent again.
    fn keep_incarnation(&mut self, _region: RegionId, _incarnation: Incarnation) {}

    /// Makes everything written to the disks durable as far as `start` needs it: called once, complete, before the load.
    async fn flush(&mut self) -> Result<(), GuestError>;

    /// Loads the device state. The guest must not run afterwards; the driver makes sure of it and ends the
    /// hypervisor process if it does.
    async fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Starts the guest, or leaves it paused where `to` says so.
    async fn start(&mut self, permit: RunPermit, to: RunState) -> Result<(), StartError>;

    /// Ends this copy and removes what was made for it. Disk images are never deleted. Idempotent.
    async fn discard(&mut self) -> Result<(), GuestError>;

    /// Whether an attempt that failed after the load can be followed by another: makes a fresh copy (memory from zero,
    /// disks kept). An error where there is no way to (an administrator-started QEMU).
    async fn renew(&mut self) -> Result<(), GuestError>;

    /// Whether the hypervisor still lives: changes once.
    fn life(&self) -> watch::Receiver<GuestLife>;

    /// The hypervisor's process, for the journal.
    fn process(&self) -> ProcessIdentity;
}

/// Whether a guest is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestLife {
    /// It is (running or paused).
    Alive,
    /// It was shut down, by itself or by somebody; the text says how.
    ShutDown(String),
    /// Its process is gone; the text says what is known.
    Gone(String),
}

/// Reads a region. Methods may block for as long as a copy of the bytes takes.
#[async_trait]
pub trait RegionReader: Send + Sync + std::fmt::Debug {
    /// Reads `runs`, one behind the other, into `buf`, which is exactly as long as they are together.
    async fn read(&self, runs: &[Run], buf: &mut [u8]) -> Result<(), GuestError>;
}

/// Writes a region.
#[async_trait]
pub trait RegionWriter: RegionReader {
    /// Writes `data`, which is exactly as long as the runs together.
    async fn write(&self, runs: &[Run], data: &[u8]) -> Result<(), GuestError>;

    /// As [`write`](Self::write), of parts that stand anywhere. Where a driver has no way to write those, they are put together first.
    async fn write_vectored(&self, runs: &[Run], data: &[IoSlice<'_>]) -> Result<(), GuestError> {
        if let [whole] = data {
            return self.write(runs, whole).await;
        }
        let mut whole = Vec::with_capacity(data.iter().map(|part| part.len()).sum());
        data.iter().for_each(|part| whole.extend_from_slice(part));
        self.write(runs, &whole).await
    }

    /// Makes `runs` read as zero; does nothing where they are known to, and leaves holes where it can.
    async fn zero(&self, runs: &[Run]) -> Result<(), GuestError>;

    /// Makes what was written before this call survive the hypervisor's death (`Ok` at once for memory).
    async fn flush(&self) -> Result<(), GuestError>;
}

/// Dirty blocks that were taken and re-armed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The dirty blocks.
    pub dirty: RegionBits,
    /// Those of them that are known to read as zero without being read: holes, pages never touched.
    /// True at some moment after the re-arm, and no device transfer into them was in flight: it would land without a mark.
    pub zero: RegionBits,
    /// Longest time for which one step of taking them held the guest.
    pub longest_hold: Duration,
}

/// What became of taken blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settlement {
    /// All of them are safe at the destination, or will be re-sent from the agent's own ledger.
    Acknowledged,
    /// They are dirty again: the next `take_dirty` reports them.
    PutBack,
}

/// Proof that the guest is paused by this agent; made by [`SourceGuest::pause`] only.
#[derive(Debug)]
pub struct GuestPaused {
    before: RunState,
}

impl GuestPaused {
    /// Only a driver calls this, after its hypervisor has confirmed the pause.
    #[must_use]
    pub const fn confirmed_by_driver(before: RunState) -> Self {
        Self { before }
    }

    /// The state before the pause.
    #[must_use]
    pub const fn before(&self) -> RunState {
        self.before
    }
}

/// A pause that failed.
#[derive(Debug, thiserror::Error)]
#[error("the guest could not be paused cleanly")]
pub struct PauseError {
    /// State before the pause, where it was learnt: `None` means that nothing was done to the guest.
    pub before: Option<RunState>,
    /// Why.
    #[source]
    pub source: GuestError,
}

/// A start that failed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The guest provably never ran: no start was sent, or it was answered with an error (`[HAND-6]`).
    #[error("the guest was not started")]
    NeverRan(#[source] GuestError),
    /// The guest may have run.
    #[error("it is not known whether the guest started")]
    MayHaveRun(#[source] GuestError),
}
