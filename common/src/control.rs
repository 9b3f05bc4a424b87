//! The control stream: typed messages over quinn's bidirectional stream.
//!
//! Owns the I/O; framing and checks are `vmferry_proto::wire`'s. Sending is not cancel safe and belongs into a
//! task of its own or a place that is not dropped half way; receiving is cancel safe: what has come in is kept
//! in the receiver.

use std::marker::PhantomData;

use bytes::{Buf, Bytes};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use vmferry_proto::error::WireError;
use vmferry_proto::message::{ToDestination, ToSource};
use vmferry_proto::wire::{self, ControlMessage, Decoder, WireDecodeError, WireEncodeError};

use crate::link::LinkError;

/// Priority of the control stream: a Commit must never wait behind data.
const CONTROL_PRIORITY: i32 = 100;
/// Most bytes taken from quinn at once.
const READ_CHUNK: usize = 64 << 10;

/// A control message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The connection is gone or was refused.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The peer broke the protocol.
    #[error("{peer} broke the protocol on the control stream")]
    Broken {
        /// The peer.
        peer: String,
        /// How.
        #[source]
        source: WireDecodeError,
    },
    /// This side was about to break the protocol: a bug here.
    #[error("a control message cannot be sent")]
    Unsendable(#[source] WireEncodeError),
}

impl ControlError {
    /// What the peer is to be told; `None` where it can hear nothing, or is not to blame.
    #[must_use]
    pub fn to_wire(&self) -> Option<WireError> {
        match self {
            Self::Broken { source, .. } => Some(source.clone().into()),
            Self::Link(_) | Self::Unsendable(_) => None,
        }
    }

    /// Whether the link was lost, so that another session can go on.
    #[must_use]
    pub const fn is_lost_link(&self) -> bool {
        match self {
            Self::Link(link) => link.is_lost_link(),
            Self::Broken { .. } | Self::Unsendable(_) => false,
        }
    }
}

/// Sends control messages.
#[derive(Debug)]
pub struct ControlSender<M> {
    stream: SendStream,
    peer: String,
    sends: PhantomData<fn(M)>,
}

/// Receives control messages.
#[derive(Debug)]
pub struct ControlReceiver<M> {
    stream: RecvStream,
    peer: String,
    decoder: Decoder<M>,
    /// Came in and not yet decoded.
    pending: Bytes,
}

/// Opens the control stream, as the source does. `peer` names the other side in errors. The peer learns of the
/// stream with the first message.
pub async fn open(
    connection: &Connection,
    peer: &str,
) -> Result<(ControlSender<ToDestination>, ControlReceiver<ToSource>), ControlError> {
    let (send, recv) = connection
        .open_bi()
        .await
        .map_err(|error| LinkError::of(&error, peer))?;
    Ok((
        ControlSender::new(send, peer),
        ControlReceiver::new(recv, peer),
    ))
}

/// Waits for the control stream, as the destination does. Cancel safe.
pub async fn accept(
    connection: &Connection,
    peer: &str,
) -> Result<(ControlSender<ToSource>, ControlReceiver<ToDestination>), ControlError> {
    let (send, recv) = connection
        .accept_bi()
        .await
        .map_err(|error| LinkError::of(&error, peer))?;
    Ok((
        ControlSender::new(send, peer),
        ControlReceiver::new(recv, peer),
    ))
}

impl<M: ControlMessage> ControlSender<M> {
    fn new(stream: SendStream, peer: &str) -> Self {
        // It fails only on a stream that is closed, which the first send tells better.
        drop(stream.set_priority(CONTROL_PRIORITY));
        Self {
            stream,
            peer: peer.to_owned(),
            sends: PhantomData,
        }
    }

    /// Sends a message. Returns when it is handed to the transport, which says nothing about its arrival.
    /// **Not** cancel safe: a dropped call may leave half a message.
    pub async fn send(&mut self, message: &M) -> Result<(), ControlError> {
        let bytes = wire::encode(message).map_err(ControlError::Unsendable)?;
        self.stream
            .write_chunk(Bytes::from(bytes))
            .await
            .map_err(|error| LinkError::of_write(&error, &self.peer).into())
    }

    /// Ends this direction: the peer reads the end after the last message.
    pub fn finish(&mut self) {
        // An error means that the stream has ended already.
        drop(self.stream.finish());
    }
}

impl<M: ControlMessage> ControlReceiver<M> {
    fn new(stream: RecvStream, peer: &str) -> Self {
        Self {
            stream,
            peer: peer.to_owned(),
            decoder: Decoder::new(),
            pending: Bytes::new(),
        }
    }

    /// The next message; `None` when the peer ended its direction between two messages. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<M>, ControlError> {
        loop {
            if let Some(message) = self.decode()? {
                return Ok(Some(message));
            }
            // The only await: nothing is held outside `self` when it is dropped.
            let chunk = self.stream.read_chunk(READ_CHUNK, true).await;
            match chunk.map_err(|error| LinkError::of_read(&error, &self.peer))? {
                Some(chunk) => self.pending = chunk.bytes,
                None => {
                    return match self.decoder.finish() {
                        Ok(()) => Ok(None),
                        Err(source) => Err(self.broken(source)),
                    };
                }
            }
        }
    }

    fn decode(&mut self) -> Result<Option<M>, ControlError> {
        if self.pending.is_empty() {
            return Ok(None);
        }
        let mut input: &[u8] = &self.pending;
        let result = self.decoder.next_message(&mut input);
        let used = self.pending.len() - input.len();
        self.pending.advance(used);
        result.map_err(|source| self.broken(source))
    }

    fn broken(&self, source: WireDecodeError) -> ControlError {
        ControlError::Broken {
            peer: self.peer.clone(),
            source,
        }
    }

    /// Tells the peer that nothing more of it will be read.
    pub fn stop(&mut self) {
        drop(self.stream.stop(VarInt::from_u32(0)));
    }
}

/// Closes the connection with a coded error: the code's number and the detail as the reason.
pub fn close(connection: &Connection, error: &WireError) {
    let reason = error.detail.as_bytes();
    // A close frame must fit one packet; a cut character is replaced when it is shown.
    let short = reason.get(..900).unwrap_or(reason);
    connection.close(VarInt::from_u32(error.code.number()), short);
}
