//! The unidirectional streams of a session: accepted, their headers read and checked, handed to the migration.
//!
//! Owns one task per connection. Invariant: a stream that is handed on belongs to this migration, this session and this
//! connection; whose lane it is and whether it is due is the session's to judge.

use std::time::Duration;

use quinn::Connection;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vmferry_common::causes::chain;
use vmferry_common::lanes::{self, IncomingStream, LaneError};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::StreamKind;
use vmferry_proto::ids::{MigrationId, SessionNumber};

/// How long the 32 bytes of a stream header may take behind the stream itself: they share its first packet.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// What a connection brought.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// A stream of this session.
    Stream(IncomingStream),
    /// One that does not belong here.
    Violation(WireError),
    /// The connection is gone; the loss of one ends the session.
    Lost(String),
}

/// Which streams belong here.
#[derive(Debug, Clone)]
pub(crate) struct StreamContext {
    pub(crate) peer: String,
    pub(crate) migration: MigrationId,
    pub(crate) session: SessionNumber,
    pub(crate) lanes: u8,
    pub(crate) connections: u8,
}

/// Accepts the streams of `connection`, the one in position `position`, until `stop`.
pub(crate) fn spawn(
    connection: Connection,
    position: u8,
    context: StreamContext,
    arrivals: mpsc::Sender<Arrival>,
    stop: CancellationToken,
) {
    tokio::spawn(async move {
        let accept_all = async {
            loop {
                let arrival = accept(&connection, position, &context).await;
                let last = !matches!(arrival, Arrival::Stream(_));
                if arrivals.send(arrival).await.is_err() || last {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = accept_all => {}
        }
    });
}

async fn accept(connection: &Connection, position: u8, context: &StreamContext) -> Arrival {
    let stream = match lanes::accept_raw(connection, &context.peer).await {
        Ok(stream) => stream,
        Err(error) => return failed(&error),
    };
    let header = lanes::read_header(stream, &context.peer);
    let stream = match tokio::time::timeout(HEADER_TIME, header).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return failed(&error),
        Err(_) => {
            return Arrival::Violation(WireError::new(
                ErrorCode::ProtocolViolation,
                format!(
                    "a stream was opened without a header within {} s",
                    HEADER_TIME.as_secs()
                ),
            ));
        }
    };
    match check(&stream, position, context) {
        Ok(()) => Arrival::Stream(stream),
        Err(error) => Arrival::Violation(error),
    }
}

fn failed(error: &LaneError) -> Arrival {
    match error.to_wire() {
        Some(wire) => Arrival::Violation(wire),
        None => Arrival::Lost(chain(error)),
    }
}

fn check(stream: &IncomingStream, position: u8, context: &StreamContext) -> Result<(), WireError> {
    let header = &stream.header;
    header.check(context.migration, context.session, context.lanes)?;
    let belongs = match header.kind {
        StreamKind::Lane { lane } => lane.0 % context.connections.max(1),
        StreamKind::DeviceState { .. } => 0,
    };
    if belongs == position {
        return Ok(());
    }
    Err(WireError::new(
        ErrorCode::ProtocolViolation,
        format!(
            "a stream that belongs on connection {belongs} was opened on connection {position}"
        ),
    ))
}
