//! The paused phase of one attempt, as a straight script: `Final`, completeness, digests, device state.
//!
//! Owns the order in which these are done and answered. It gets its orders through a queue and is dropped when the
//! attempt ends any other way; nothing in it needs unwinding. Invariant: the device state is handed on only when every
//! lane stands exactly at the number that the last `Final` named and every block of every region is accounted for.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::lanes::IncomingStream;
use vmferry_common::phase::Phase;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::ids::{Attempt, MigrationId};
use vmferry_proto::message::{Final, PrepareTiming, ToSource};
use vmferry_proto::spec::RunState;

use crate::board::Board;
use crate::flusher::flush_once;
use crate::hooks::Hooks;
use crate::session::Outgoing;
use crate::sink::Sink;
use crate::status::Tracker;
use crate::verify::{self, Plan, VerifyError};

/// Orders that may wait: a source that does not wait for `Complete` sends two, one that sends again two more.
const ORDERS: usize = 8;
/// Pieces of digests made ahead of what the control stream takes.
const PIECES: usize = 2;

/// What the source orders.
#[derive(Debug)]
pub(crate) enum Order {
    /// Nothing follows on the lanes after these numbers.
    Final(Final),
    /// All windows agree: this is announced on the device state's stream.
    DeviceState {
        /// Its length.
        len: u64,
        /// Its digest.
        digest: u128,
    },
}

/// Everything of an attempt is here.
#[derive(Debug)]
pub(crate) struct Received {
    /// The attempt.
    pub(crate) attempt: Attempt,
    /// State in which the guest is to arrive.
    pub(crate) to: RunState,
    /// The device state.
    pub(crate) state: Vec<u8>,
    /// What the time went to so far.
    pub(crate) timing: PrepareTiming,
}

/// An attempt failed: who is to blame decides what follows.
#[derive(Debug)]
pub(crate) enum ReceiptError {
    /// The peer broke the protocol.
    Violation(WireError),
    /// It cannot succeed, but another may.
    Attempt(WireError),
    /// The connection is gone; the session tells.
    Lost,
}

/// What the script works with.
#[derive(Debug, Clone)]
pub(crate) struct ReceiptContext {
    pub(crate) migration: MigrationId,
    pub(crate) attempt: Attempt,
    pub(crate) sink: Arc<Sink>,
    pub(crate) board: Arc<Board>,
    pub(crate) outgoing: Outgoing,
    pub(crate) hooks: Hooks,
    pub(crate) tracker: Arc<Tracker>,
}

/// The queues into a running script.
#[derive(Debug)]
pub(crate) struct ReceiptHandle {
    pub(crate) attempt: Attempt,
    orders: mpsc::Sender<Order>,
    streams: mpsc::Sender<IncomingStream>,
}

impl ReceiptHandle {
    /// Queues an order; an error is the peer's fault.
    pub(crate) fn order(&self, order: Order) -> Result<(), WireError> {
        self.orders
            .try_send(order)
            .map_err(|_| flood("Final and DeviceState messages"))
    }

    /// Queues the device state's stream; an error is the peer's fault.
    pub(crate) fn stream(&self, stream: IncomingStream) -> Result<(), WireError> {
        self.streams
            .try_send(stream)
            .map_err(|_| flood("device state streams"))
    }
}

fn flood(what: &str) -> WireError {
    WireError::new(
        ErrorCode::ProtocolViolation,
        format!("too many {what} in one attempt"),
    )
}

/// Begins to receive an attempt: the queues into it, and the script, which does nothing until it is polled.
pub(crate) fn begin(
    context: ReceiptContext,
) -> (
    ReceiptHandle,
    impl Future<Output = Result<Received, ReceiptError>> + Send,
) {
    let (orders, orders_in) = mpsc::channel(ORDERS);
    let (streams, streams_in) = mpsc::channel(1);
    let handle = ReceiptHandle {
        attempt: context.attempt,
        orders,
        streams,
    };
    let script = Script {
        context,
        timing: PrepareTiming::default(),
        last: None,
    };
    (handle, script.run(orders_in, streams_in))
}

#[derive(Debug)]
struct Script {
    context: ReceiptContext,
    timing: PrepareTiming,
    /// The last `Final` that was answered with `Complete`.
    last: Option<Final>,
}

impl Script {
    async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        mut streams: mpsc::Receiver<IncomingStream>,
    ) -> Result<Received, ReceiptError> {
        loop {
            match orders.recv().await {
                None => return Err(ReceiptError::Lost),
                Some(Order::Final(order)) => self.on_final(order).await?,
                Some(Order::DeviceState { len, digest }) => {
                    return self.on_device_state(len, digest, &mut streams).await;
                }
            }
        }
    }

    async fn on_final(&mut self, order: Final) -> Result<(), ReceiptError> {
        if self.last.is_none() {
            self.run_hook(Phase::Final).await?;
        }
        let began = Instant::now();
        self.await_lanes(&order).await?;
        self.context.sink.coverage().check().map_err(|gap| {
            ReceiptError::Attempt(WireError::new(ErrorCode::NotIdentical, gap.to_string()))
        })?;
        self.timing.apply_us += micros(began);
        self.flush_ahead();
        let began = Instant::now();
        self.send_digests(&order).await?;
        self.timing.verify_us += micros(began);
        let attempt = self.context.attempt;
        self.say(ToSource::Complete { attempt }).await?;
        self.last = Some(order);
        Ok(())
    }

    /// Begins to flush while the source saves the device state: the flush before the load, which counts, finds little left.
    fn flush_ahead(&self) {
        let ReceiptContext { sink, board, .. } = &self.context;
        if board.unflushed() == 0 {
            return;
        }
        let (sink, board) = (sink.clone(), board.clone());
        tokio::spawn(async move {
            if let Err(error) = flush_once(&sink, &board).await {
                tracing::debug!(
                    "the flush beside the device state failed: {}",
                    chain(&error)
                );
            }
        });
    }

    /// Waits until every lane is where `order` says, and says so at once.
    async fn await_lanes(&self, order: &Final) -> Result<(), ReceiptError> {
        let board = &self.context.board;
        let lanes = board.lanes();
        if order.lanes.len() != lanes {
            return Err(violation(format!(
                "Final names {} lanes in a session of {lanes}",
                order.lanes.len()
            )));
        }
        board.reached(&order.lanes).await;
        self.check_stopped(order)?;
        if self.context.outgoing.send_progress(board).await {
            Ok(())
        } else {
            Err(ReceiptError::Lost)
        }
    }

    /// Between two `Final`s blocks may be sent again; what follows the last one must not exist.
    fn check_stopped(&self, order: &Final) -> Result<(), ReceiptError> {
        match self.context.board.overrun(&order.lanes) {
            None => Ok(()),
            Some(lane) => Err(violation(format!(
                "lane {lane} went on after the number that Final named"
            ))),
        }
    }

    async fn send_digests(&self, order: &Final) -> Result<(), ReceiptError> {
        if order.verify.is_empty() {
            return Ok(());
        }
        let ReceiptContext {
            migration,
            attempt,
            sink,
            ..
        } = &self.context;
        let plan = Plan::new(sink, &order.verify).map_err(|error| on_verify(&error))?;
        let (pieces, mut ready) = mpsc::channel(PIECES);
        let forward = async {
            while let Some(piece) = ready.recv().await {
                self.say(ToSource::Digests(piece)).await?;
            }
            Ok(())
        };
        let make = async {
            // Owned here, so that the forwarding ends when the last piece is made.
            let pieces = pieces;
            verify::run(plan, *migration, *attempt, &pieces).await
        };
        let (made, forwarded) = tokio::join!(make, forward);
        made.map_err(|error| on_verify(&error))?;
        forwarded
    }

    async fn on_device_state(
        mut self,
        len: u64,
        digest: u128,
        streams: &mut mpsc::Receiver<IncomingStream>,
    ) -> Result<Received, ReceiptError> {
        let Some(order) = self.last.take() else {
            return Err(violation("DeviceState came before Final".to_owned()));
        };
        self.check_stopped(&order)?;
        let stream = streams.recv().await.ok_or(ReceiptError::Lost)?;
        let state = stream
            .read_device_state(len, digest)
            .await
            .map_err(|error| {
                error
                    .to_wire()
                    .map_or(ReceiptError::Lost, ReceiptError::Violation)
            })?;
        self.run_hook(Phase::Load).await?;
        self.check_stopped(&order)?;
        Ok(Received {
            attempt: self.context.attempt,
            to: order.run_state,
            state,
            timing: self.timing,
        })
    }

    async fn run_hook(&self, phase: Phase) -> Result<(), ReceiptError> {
        self.context.tracker.enter(phase);
        let asked = self.context.hooks.ask(phase).await;
        asked.map_err(ReceiptError::Attempt)
    }

    async fn say(&self, message: ToSource) -> Result<(), ReceiptError> {
        if self.context.outgoing.send_when_free(message).await {
            Ok(())
        } else {
            Err(ReceiptError::Lost)
        }
    }
}

fn violation(text: String) -> ReceiptError {
    ReceiptError::Violation(WireError::new(ErrorCode::ProtocolViolation, text))
}

fn on_verify(error: &VerifyError) -> ReceiptError {
    match error {
        VerifyError::NoSuchRegion(_) | VerifyError::ZeroStride(_) => violation(error.to_string()),
        VerifyError::Flush(_) | VerifyError::Read(_) | VerifyError::Worker(_) => {
            ReceiptError::Attempt(WireError::new(ErrorCode::Hypervisor, chain(error)))
        }
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
