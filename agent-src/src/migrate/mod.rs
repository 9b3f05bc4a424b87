//! One migration at the source, from the first connection to its end.
//!
//! Owns the guest, the ledger, the session and the handover machine, all in one task: there is no lock
//! over any of it. The script is short (`drive`): connect, copy until it is time, cut over, and once more
//! from the copy if the attempt was rolled back for a passing reason. The handover machine says what may be done
//! to the guest and when; this module carries it out (`act`) and reports what came of it.
//!
//! ```text
//! drive ── copy  (compare, rounds, ledger, policy) agent's own decisions
//!       └─ act   (record, pause, resume, release)  the machine's decisions
//!          └─ flight (last blocks, Final, digests, device state)
//! ```

mod act;
mod compare;
mod copy;
mod flight;
mod inputs;
mod limits;
mod link;
mod show;
mod stats;
mod teller;
mod verify;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use vmferry_common::causes::chain;
use vmferry_common::hooks::Hooks;
use vmferry_common::journal::RecordFile;
use vmferry_common::local::Events;
use vmferry_common::pace::Pacer;
use vmferry_common::phase::Phase;
use vmferry_hypervisor::{GuestLife, GuestPaused, RegionReader, SourceGuest};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{SourceAction, SourceEnd, SourceEvent, SourceHandover, SourceRecord};
use vmferry_proto::ledger::Ledger;
use vmferry_proto::spec::{RegionSpec, RunState};

use crate::cli::MigrateOptions;
use crate::durable::{Begun, DurableFiles, Keeping, NotWritten};
use crate::error::{LinkError, MigrateError};
use crate::lanes::LaneCounters;
use crate::local::{Command, Waiter};
use crate::progress::Progress;
use crate::session::{Dialer, Session};

use inputs::Timers;
pub use stats::Stats;
use teller::Teller;

/// Attempts that may be rolled back for a passing reason (lost link, time-out) before the migration gives up:
/// each of them cost the guest a pause.
const MAX_ATTEMPTS: u32 = 3;

/// A migration under way.
#[derive(Debug)]
pub struct Migration {
    options: MigrateOptions,
    guest: Box<dyn SourceGuest>,
    life: watch::Receiver<GuestLife>,
    readers: Vec<Arc<dyn RegionReader>>,
    paused: Option<GuestPaused>,
    /// State of the guest when the copy began.
    run_state: RunState,
    tracking: bool,
    ledger: Ledger,
    /// Whether the destination may have what the ledger takes for dirty, since it knows nothing of an earlier agent's copy.
    to_compare: bool,
    /// Files from which a later agent can go on, where they are kept.
    durable: Option<DurableFiles>,
    counters: Arc<LaneCounters>,
    pacer: Pacer,
    dialer: Dialer,
    session: Option<Session>,
    handover: SourceHandover,
    events: VecDeque<SourceEvent>,
    /// `Prepared` that came while the flight was still under way here.
    prepared_early: Option<SourceEvent>,
    journal: RecordFile<SourceRecord>,
    timers: Timers,
    commands: mpsc::Receiver<Command>,
    waiters: Vec<Waiter>,
    triggered: bool,
    rolled_back: u32,
    last_rollback: Option<WireError>,
    phase: Phase,
    hooks: Hooks,
    listeners: Events,
    teller: Teller,
    progress: Progress,
    stats: Stats,
    began: Instant,
    ticker: Interval,
    /// Why the last try to connect failed, whole: the machine keeps only its short form.
    connect_error: Option<MigrateError>,
    end: Option<SourceEnd>,
    /// The migration ends here, and the destination is being told: nothing but a person's wish cuts that short.
    parting: bool,
    /// Set where the process is told to stop while only the destination knows the outcome.
    left_in_doubt: bool,
    /// When a process that was told to stop leaves although it is in doubt.
    leave_at: Option<Instant>,
    only_recover: bool,
}

/// Everything that a migration is made of.
#[derive(Debug)]
pub struct Parts {
    /// What the user wants.
    pub options: MigrateOptions,
    /// The guest, attached and checked.
    pub guest: Box<dyn SourceGuest>,
    /// How sessions are made.
    pub dialer: Dialer,
    /// The machine, new or recovered.
    pub handover: SourceHandover,
    /// What is kept for a later agent, and what one before this one kept.
    pub keeping: Option<Keeping>,
    /// Where its records go.
    pub journal: RecordFile<SourceRecord>,
    /// What people at other terminals ask.
    pub commands: mpsc::Receiver<Command>,
    /// Scripts at the phases.
    pub hooks: Hooks,
    /// Listeners at the control socket.
    pub events: Events,
    /// Where progress is shown.
    pub progress: Progress,
    /// When the program began.
    pub began: Instant,
    /// Whether only an earlier agent's work is to be finished.
    pub only_recover: bool,
}

/// What went over the wire.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// Bytes of guest content accounted for.
    pub raw_bytes: u64,
    /// Bytes handed to the transport.
    pub wire_bytes: u64,
    /// Blocks that were zero.
    pub zero_blocks: u64,
    /// Blocks sent more than once.
    pub resent_blocks: u64,
    /// Blocks that were dirtied and not sent, since they were as before.
    pub unchanged_blocks: u64,
    /// Blocks sent as differences to what was sent before.
    pub difference_blocks: u64,
    /// Blocks sent as duplicates of others.
    pub duplicate_blocks: u64,
}

/// What a migration came to.
#[derive(Debug)]
pub struct Ended {
    /// Whether only the destination knows the outcome.
    pub in_doubt: bool,
    /// Whether the guest has ended at this side (by itself, or after a commit).
    pub guest_is_gone: bool,
    /// What went over the wire.
    pub sent: Sent,
    /// The phase that was reached.
    pub phase: Phase,
    /// How, as the machine says; `None` means in doubt.
    pub end: Option<SourceEnd>,
    /// Why the last attempt was rolled back, if one was.
    pub rolled_back: Option<WireError>,
    /// What was measured.
    pub stats: Stats,
    /// Who waits for the end at a control socket.
    pub waiters: Vec<Waiter>,
}

impl Migration {
    /// Puts a migration together; nothing has happened to the guest yet. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`MigrateError::Internal`] where the driver has no reader for a region that it listed.
    pub fn new(parts: Parts) -> Result<Self, MigrateError> {
        let Parts {
            options,
            guest,
            dialer,
            handover,
            keeping,
            journal,
            commands,
            hooks,
            events,
            progress,
            began,
            only_recover,
        } = parts;
        let spec = guest.spec();
        let readers = spec
            .regions
            .iter()
            .map(|region| guest.reader(region.id))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| MigrateError::Internal("a region has no reader".to_owned()))?;
        let (durable, taken_over) =
            keeping.map_or((None, None), |kept| (Some(kept.files), kept.taken_over));
        let tracking = taken_over.is_some();
        let ledger = taken_over.unwrap_or_else(|| Ledger::new(&spec.regions));
        let stats = Stats::new(spec, options.verify);
        let (spec_name, run_state) = (spec.name.clone(), spec.run_state);
        Ok(Self {
            life: guest.life(),
            readers,
            paused: None,
            run_state,
            tracking,
            ledger,
            to_compare: false,
            durable,
            counters: Arc::new(LaneCounters::new(options.compress)),
            ticker: ticker(),
            connect_error: None,
            pacer: Pacer::new(options.max_bandwidth),
            dialer,
            session: None,
            handover,
            events: VecDeque::new(),
            prepared_early: None,
            journal,
            timers: Timers::default(),
            commands,
            waiters: Vec::new(),
            triggered: false,
            rolled_back: 0,
            last_rollback: None,
            phase: Phase::Negotiate,
            teller: Teller::start(hooks.clone(), spec_name),
            hooks,
            listeners: events,
            progress,
            stats,
            began,
            end: None,
            parting: false,
            left_in_doubt: false,
            leave_at: None,
            only_recover,
            guest,
            options,
        })
    }

    /// Runs the migration to its end. The guest runs on one side when this returns, or is paused here and in doubt.
    /// `actions` are what a recovered machine wants done first.
    pub async fn run(mut self, actions: Vec<SourceAction>) -> Ended {
        // The record of a migration that is over leaves nothing to do.
        self.end = self.handover.end().cloned();
        self.settle_the_past(actions).await;
        if self.end.is_none() && !self.left_in_doubt {
            let life = self.life.borrow().clone();
            if life != GuestLife::Alive {
                self.give_up(&MigrateError::GuestEnded(life)).await;
            } else if self.only_recover {
                self.give_up(&MigrateError::Recovered).await;
            } else {
                self.drive().await;
            }
        }
        self.leave_guest().await;
        self.progress.finish();
        self.teller.finish().await;
        let counters = self.ledger.counters();
        Ended {
            in_doubt: self.left_in_doubt || self.handover.is_in_doubt(),
            guest_is_gone: *self.life.borrow() != GuestLife::Alive,
            sent: Sent {
                raw_bytes: counters.bytes,
                wire_bytes: self.counters.wire(),
                zero_blocks: self.counters.zero(),
                resent_blocks: counters
                    .resent_blocks()
                    .saturating_sub(self.counters.unchanged()),
                unchanged_blocks: self.counters.unchanged(),
                difference_blocks: self.counters.differences(),
                duplicate_blocks: self.counters.duplicates(),
            },
            end: self.end,
            rolled_back: self.last_rollback,
            phase: self.phase,
            stats: self.stats,
            waiters: self.waiters,
        }
    }

    /// What an earlier agent left: a paused guest is resumed, a doubt is settled, before anything new.
    async fn settle_the_past(&mut self, actions: Vec<SourceAction>) {
        if actions.is_empty() {
            return;
        }
        self.progress
            .note("an earlier agent left this migration unfinished: settling that first");
        for action in actions {
            self.act(action).await;
        }
        self.feed_queued().await;
        while self.end.is_none() && !self.left_in_doubt && !self.handover.is_copying() {
            if let Some(event) = self.attend_handover().await {
                self.feed(event).await;
            }
        }
    }

    async fn drive(&mut self) {
        let mut step = self.negotiate().await;
        while self.end.is_none() && !self.left_in_doubt {
            step = match step {
                Ok(()) => self.copy_and_cut_over().await,
                Err(error) if error.is_passing() && self.tracking => self.reconnect(error).await,
                Err(error) => {
                    self.give_up(&error).await;
                    return;
                }
            };
        }
    }

    /// First session: the destination knows the guest, and its copy is prepared.
    async fn negotiate(&mut self) -> Result<(), MigrateError> {
        self.enter(Phase::Negotiate).await?;
        // An earlier agent's pause may have been undone since the guest was attached.
        self.run_state = self.guest.run_state().await?;
        self.connect().await?;
        self.enter(Phase::Prepare).await?;
        self.offer().await?;
        if self.tracking {
            // An earlier agent's, taken over.
            return Ok(());
        }
        self.begin_tracking().await
    }

    /// Begins to track the guest, so that a later agent can go on from any moment of it.
    async fn begin_tracking(&mut self) -> Result<(), MigrateError> {
        let regions = self.guest.spec().regions.clone();
        let begun = self.durable.as_ref().map(|files| files.begin(&regions));
        if let Some(Ok(begun)) = &begun {
            self.guest.keep_marks(begun.file.clone());
        }
        self.guest.start_tracking().await?;
        self.tracking = true;
        let kept = begun.map(|begun| self.put_in_force(&begun?, &regions));
        if let Some(Err(error)) = kept {
            self.progress.note(&format!(
                "should this agent be killed, the copy will begin again: {}",
                chain(&error)
            ));
        }
        Ok(())
    }

    fn put_in_force(&mut self, begun: &Begun, regions: &[RegionSpec]) -> Result<(), NotWritten> {
        self.ledger.write_down(Box::new(begun.file.writer()))?;
        let (Some(files), Some(tracking)) = (&self.durable, self.guest.tracking()) else {
            return Ok(());
        };
        files.put_in_force(begun, &self.handover.record(), regions, tracking)
    }

    async fn copy_and_cut_over(&mut self) -> Result<(), MigrateError> {
        self.copy_until_time().await?;
        self.cut_over().await
    }

    /// One attempt: `Ok` also when it was rolled back and another one may follow.
    async fn cut_over(&mut self) -> Result<(), MigrateError> {
        self.enter(Phase::Pause).await?;
        // Their table is given back while the guest runs, and no frame of the stop refers to another block.
        if let Some(lanes) = self.session.as_ref().and_then(Session::lanes) {
            lanes.end_duplicates();
        }
        let run_state = self.guest.run_state().await?;
        self.feed(SourceEvent::BeginCutover { run_state }).await;
        while self.end.is_none() && !self.left_in_doubt && !self.handover.is_copying() {
            if let Some(event) = self.attend_handover().await {
                self.feed(event).await;
            }
        }
        if self.end.is_some() || self.left_in_doubt {
            return Ok(());
        }
        self.after_rollback()
    }

    /// The guest goes on here after an attempt: is there any sense in another one?
    fn after_rollback(&mut self) -> Result<(), MigrateError> {
        let reason = self.last_rollback.clone().unwrap_or_else(|| {
            WireError::new(
                ErrorCode::Internal,
                "an attempt was rolled back without a reason",
            )
        });
        let passing = matches!(
            reason.code,
            ErrorCode::LinkLost
                | ErrorCode::TimedOut
                | ErrorCode::ShuttingDown
                | ErrorCode::GuestReset
        );
        let ended = *self.life.borrow() != GuestLife::Alive;
        if !passing || ended || self.rolled_back >= MAX_ATTEMPTS {
            return Err(MigrateError::RolledBack(reason));
        }
        self.progress
            .note(&format!("rolled back, trying again: {reason}"));
        self.phase = Phase::Copy;
        // The destination may have halted its lanes for the load, so a new attempt begins with a new session (`[WIRE-14]`).
        self.session = None;
        Err(MigrateError::SessionLost(LinkError::RolledBack))
    }

    /// Ends the migration at this side for a reason that no new session mends.
    async fn give_up(&mut self, error: &MigrateError) {
        tracing::debug!(error = %chain(error), "the migration ends here");
        self.parting = true;
        if self.session.is_none() && self.handover.is_connected() {
            // Nobody is there to confirm the end, so it is not waited for.
            let reason = error.to_wire();
            self.feed(SourceEvent::ConnectionLost { reason }).await;
        }
        let tell = match error {
            MigrateError::RolledBack(_) | MigrateError::Recovered => true,
            MigrateError::GuestEnded(_) => !self.tracking,
            _ => false,
        };
        if tell && self.session.is_none() {
            // A rollback closed the session, or a killed agent left none. The destination is to let its copy go now, and not when it
            // has waited for long enough; where it cannot be told, it does that.
            if let Err(unreachable) = self.connect().await {
                tracing::info!(error = %chain(&unreachable), "the destination cannot be told of the end");
            }
        }
        self.feed(SourceEvent::Cancel {
            reason: error.to_wire(),
        })
        .await;
        while self.end.is_none() && !self.left_in_doubt {
            if let Some(event) = self.attend_handover().await {
                self.feed(event).await;
            }
        }
    }

    /// Removes every trace from the hypervisor, where the guest is still ours.
    async fn leave_guest(&mut self) {
        self.session = None;
        let ours = !matches!(self.end, Some(SourceEnd::Committed) | None);
        if self.tracking
            && ours
            && let Err(error) = self.guest.stop_tracking().await
        {
            tracing::warn!(%error, "tracking could not be ended cleanly: `vmferry-src recover` tries again");
        }
        if let (Some(_), Some(files)) = (&self.end, &self.durable) {
            files.remove();
        }
    }
}

/// How often progress is shown and the compression policy is told of the link.
fn ticker() -> Interval {
    const EVERY: Duration = Duration::from_millis(25);
    let mut ticker = tokio::time::interval(EVERY);
    ticker.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticker
}
