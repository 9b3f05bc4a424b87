//! Unidirectional streams: data lanes and the device state.
//!
//! Owns their I/O; layouts and checks are `vmferry_proto::frame`'s. Invariants: what is handed to the transport
//! is a buffer that never changes any more (a retransmission carries the same bytes), and a header is checked
//! against every cap before anything is allocated for its payload.

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{Connection, ReadExactError, RecvStream, SendStream};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{
    Encoding, FrameError, FrameHeader, StreamHeader, StreamHeaderError, StreamKind,
};
use vmferry_proto::geometry::RegionLen;
use vmferry_proto::ids::{Attempt, FrameSeq, Lane};
use vmferry_proto::limits::{MAX_DEVICE_STATE, MAX_FRAME_PAYLOAD};

use crate::budget::Path;
use crate::digest;
use crate::link::LinkError;
use crate::pace::Pacer;

mod pieces;

use pieces::{Gathered, PieceReader};

/// Priority of lanes: below the control stream and the device state.
const LANE_PRIORITY: i32 = 0;
/// The same once a frame is written, for packets of it that get lost: what nobody sent yet would be sent before them, and it is the
/// frame that lacks one packet for which the peer and the [send budget](crate::budget) wait.
const LOST_PRIORITY: i32 = 10;
/// Priority of the device state: the guest is paused while it is under way.
const DEVICE_STATE_PRIORITY: i32 = 50;
/// IPv4 and UDP headers of a packet, which quinn does not count.
const PACKET_HEADERS: u64 = 20 + 8;
/// Most bytes of a device state that are taken from the transport at once.
const STATE_PIECE: usize = 256 << 10;

/// A lane or the device state could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// The connection is gone.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A frame header breaks a rule.
    #[error("{peer} sent a bad frame on lane {lane}")]
    Frame {
        /// The peer.
        peer: String,
        /// The lane.
        lane: Lane,
        /// What is wrong.
        #[source]
        source: FrameError,
    },
    /// A stream header breaks a rule.
    #[error("{peer} opened a stream that does not belong here")]
    Stream {
        /// The peer.
        peer: String,
        /// What is wrong.
        #[source]
        source: StreamHeaderError,
    },
    /// A stream ended in the middle of something.
    #[error("{peer} ended a stream in the middle of {what}")]
    Truncated {
        /// The peer.
        peer: String,
        /// Of what.
        what: &'static str,
    },
    /// The device state is not what was announced.
    #[error("{peer} sent a device state that is not the announced one: {problem}")]
    DeviceState {
        /// The peer.
        peer: String,
        /// How it differs.
        problem: String,
    },
    /// A frame whose header does not fit its payload was about to be sent: a bug here.
    #[error("a frame of {announced} bytes with a payload of {payload} was about to be sent")]
    OwnFrame {
        /// What the header says.
        announced: u32,
        /// What there is.
        payload: usize,
    },
}

impl LaneError {
    /// What the peer is to be told; `None` where it can hear nothing, or is not to blame.
    #[must_use]
    pub fn to_wire(&self) -> Option<WireError> {
        match self {
            Self::Frame { source, .. } => Some(source.clone().into()),
            Self::Stream { source, .. } => Some(source.clone().into()),
            Self::Truncated { .. } => Some(WireError::new(
                ErrorCode::ProtocolViolation,
                self.to_string(),
            )),
            Self::DeviceState { .. } => Some(WireError::new(ErrorCode::BadFrame, self.to_string())),
            Self::Link(_) | Self::OwnFrame { .. } => None,
        }
    }

    /// Whether the link was lost, so that another session can go on.
    #[must_use]
    pub const fn is_lost_link(&self) -> bool {
        match self {
            Self::Link(link) => link.is_lost_link(),
            Self::Frame { .. }
            | Self::Stream { .. }
            | Self::Truncated { .. }
            | Self::DeviceState { .. }
            | Self::OwnFrame { .. } => false,
        }
    }
}

async fn open_stream(
    connection: &Connection,
    header: &StreamHeader,
    priority: i32,
    peer: &str,
) -> Result<SendStream, LinkError> {
    let mut stream = connection
        .open_uni()
        .await
        .map_err(|error| LinkError::of(&error, peer))?;
    drop(stream.set_priority(priority));
    let bytes = Bytes::copy_from_slice(&header.encode());
    let written = stream.write_chunk(bytes).await;
    written.map_err(|error| LinkError::of_write(&error, peer))?;
    Ok(stream)
}

/// Sends the frames of one lane.
#[derive(Debug)]
pub struct LaneSender {
    stream: SendStream,
    connection: Connection,
    peer: String,
    lane: Lane,
}

impl LaneSender {
    /// Opens `lane`; `header` says of which session and migration, its kind is set here.
    pub async fn open(
        connection: &Connection,
        header: StreamHeader,
        lane: Lane,
        peer: &str,
    ) -> Result<Self, LaneError> {
        let header = StreamHeader {
            kind: StreamKind::Lane { lane },
            ..header
        };
        Ok(Self {
            stream: open_stream(connection, &header, LANE_PRIORITY, peer).await?,
            connection: connection.clone(),
            peer: peer.to_owned(),
            lane,
        })
    }

    /// The lane.
    #[must_use]
    pub const fn lane(&self) -> Lane {
        self.lane
    }

    /// The connection, by a number of its own in this process.
    #[must_use]
    pub fn connection_id(&self) -> usize {
        self.connection.stable_id()
    }

    /// What the connection knows of its path.
    #[must_use]
    pub fn path(&self) -> Path {
        let path = self.connection.stats().path;
        Path {
            window: path.cwnd,
            sent: path.sent_packets,
            lost: path.lost_packets,
        }
    }

    /// Sends a frame. Waits while the stream's or connection's window is full. **Not** cancel safe: after a
    /// dropped call the lane is of no use any more.
    pub async fn send(&mut self, header: &FrameHeader, payload: Bytes) -> Result<(), LaneError> {
        check_own(header, &payload)?;
        let head = Bytes::copy_from_slice(&header.encode());
        self.set_priority(LANE_PRIORITY);
        self.write(&mut [head, payload]).await?;
        self.set_priority(LOST_PRIORITY);
        Ok(())
    }

    /// As [`send`](Self::send), but asks `pacer` before each piece goes and tells it what the connection carried.
    pub async fn send_paced(
        &mut self,
        header: &FrameHeader,
        mut payload: Bytes,
        pacer: &Pacer,
    ) -> Result<(), LaneError> {
        if pacer.limit().is_none() {
            return self.send(header, payload).await;
        }
        check_own(header, &payload)?;
        self.set_priority(LANE_PRIORITY);
        pacer.take(FrameHeader::ENCODED_LEN as u64).await;
        let head = Bytes::copy_from_slice(&header.encode());
        self.write(&mut [head]).await?;
        while !payload.is_empty() {
            let piece = payload.split_to(payload.len().min(pacer.piece()));
            pacer.take(piece.len() as u64).await;
            self.write(&mut [piece]).await?;
            self.account(pacer);
        }
        self.set_priority(LOST_PRIORITY);
        Ok(())
    }

    /// Tells the pacer what the connection has carried, after each piece: what is sent again must not wait for a frame's end.
    fn account(&self, pacer: &Pacer) {
        let sent = self.connection.stats().udp_tx;
        pacer.on_wire(
            self.connection.stable_id(),
            sent.bytes + sent.datagrams * PACKET_HEADERS,
        );
    }

    /// Of what the lane has to send from its next turn on. A frame's first turn is that of its writing; it keeps it.
    fn set_priority(&self, priority: i32) {
        // An error means that the stream has ended: the next write says so.
        drop(self.stream.set_priority(priority));
    }

    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<(), LaneError> {
        let written = self.stream.write_all_chunks(pieces).await;
        written.map_err(|error| LinkError::of_write(&error, &self.peer).into())
    }

    /// Ends the lane: the peer reads the end after the last frame.
    pub fn finish(&mut self) {
        // An error means that the stream has ended already.
        drop(self.stream.finish());
    }
}

fn check_own(header: &FrameHeader, payload: &Bytes) -> Result<(), LaneError> {
    if payload.len() == header.payload_len as usize {
        return Ok(());
    }
    Err(LaneError::OwnFrame {
        announced: header.payload_len,
        payload: payload.len(),
    })
}

/// A unidirectional stream that came in, its header read and not yet checked.
#[derive(Debug)]
pub struct IncomingStream {
    /// What it says it is: see [`StreamHeader::check`].
    pub header: StreamHeader,
    stream: RecvStream,
    peer: String,
}

/// Waits for the next unidirectional stream and reads its header. Cancel safe only before a stream has come;
/// a stream whose header never comes holds this call, so give it a task or a time limit.
pub async fn accept(connection: &Connection, peer: &str) -> Result<IncomingStream, LaneError> {
    let stream = accept_raw(connection, peer).await?;
    read_header(stream, peer).await
}

/// Waits for the next unidirectional stream. Cancel safe.
pub async fn accept_raw(connection: &Connection, peer: &str) -> Result<RecvStream, LaneError> {
    let accepted = connection.accept_uni().await;
    Ok(accepted.map_err(|error| LinkError::of(&error, peer))?)
}

/// Reads the header of a stream from [`accept_raw`].
pub async fn read_header(mut stream: RecvStream, peer: &str) -> Result<IncomingStream, LaneError> {
    let mut bytes = [0; StreamHeader::ENCODED_LEN];
    let read = stream.read_exact(&mut bytes).await;
    read.map_err(|error| read_error(&error, peer, "a stream header"))?;
    let header = StreamHeader::decode(&bytes).map_err(|source| LaneError::Stream {
        peer: peer.to_owned(),
        source,
    })?;
    Ok(IncomingStream {
        header,
        stream,
        peer: peer.to_owned(),
    })
}

fn read_error(error: &ReadExactError, peer: &str, what: &'static str) -> LaneError {
    match error {
        ReadExactError::FinishedEarly(_) => LaneError::Truncated {
            peer: peer.to_owned(),
            what,
        },
        ReadExactError::ReadError(error) => LinkError::of_read(error, peer).into(),
    }
}

impl IncomingStream {
    /// As a lane of a session with `lanes` lanes, for a guest whose regions have these lengths; `None` for another kind.
    /// The caller has checked the header.
    #[must_use]
    pub fn into_lane(
        self,
        geometry: std::sync::Arc<[RegionLen]>,
        lanes: u8,
    ) -> Option<LaneReceiver> {
        match self.header.kind {
            StreamKind::Lane { lane } => Some(LaneReceiver {
                stream: PieceReader::new(self.stream),
                peer: self.peer,
                lane,
                lanes,
                geometry,
                last: FrameSeq::default(),
                buffer: BytesMut::new(),
            }),
            StreamKind::DeviceState { .. } => None,
        }
    }

    /// The attempt whose device state follows; `None` for a lane.
    #[must_use]
    pub const fn device_state_of(&self) -> Option<Attempt> {
        match self.header.kind {
            StreamKind::DeviceState { attempt } => Some(attempt),
            StreamKind::Lane { .. } => None,
        }
    }

    /// Reads a device state of exactly `len` bytes whose XXH3-128 is `digest`. Memory grows only with what comes.
    pub async fn read_device_state(mut self, len: u64, digest: u128) -> Result<Vec<u8>, LaneError> {
        let wrong = |problem: String| LaneError::DeviceState {
            peer: self.peer.clone(),
            problem,
        };
        if len > MAX_DEVICE_STATE {
            return Err(wrong(format!(
                "{len} bytes announced, {MAX_DEVICE_STATE} allowed"
            )));
        }
        let mut state = Vec::new();
        loop {
            let chunk = self.stream.read_chunk(STATE_PIECE, true).await;
            let Some(chunk) = chunk.map_err(|error| LinkError::of_read(&error, &self.peer))? else {
                break;
            };
            if (state.len() + chunk.bytes.len()) as u64 > len {
                return Err(wrong(format!("longer than {len} bytes")));
            }
            state.extend_from_slice(&chunk.bytes);
        }
        if state.len() as u64 != len {
            return Err(wrong(format!("{} bytes instead of {len}", state.len())));
        }
        if digest::plain(&state) != digest {
            return Err(wrong("its digest differs".to_owned()));
        }
        Ok(state)
    }
}

/// Receives the frames of one lane.
#[derive(Debug)]
pub struct LaneReceiver {
    stream: PieceReader,
    peer: String,
    lane: Lane,
    lanes: u8,
    geometry: std::sync::Arc<[RegionLen]>,
    last: FrameSeq,
    /// Holds a payload that is to be in one piece, and the next such one once the caller has dropped that.
    buffer: BytesMut,
}

/// What follows a frame's header.
#[derive(Debug)]
pub enum Payload {
    /// The blocks themselves, one behind the other, in the pieces in which they came: a copy less.
    Raw(Vec<Bytes>),
    /// What they are to be made of.
    Encoded(Bytes),
}

impl LaneReceiver {
    /// The lane.
    #[must_use]
    pub const fn lane(&self) -> Lane {
        self.lane
    }

    /// Sequence number of the last frame returned.
    #[must_use]
    pub const fn last(&self) -> FrameSeq {
        self.last
    }

    /// The next frame, its header checked; `None` when the lane ended between two frames.
    /// **Not** cancel safe: it belongs into a task of its own; after an error or a dropped call the lane is of no use.
    pub async fn next(&mut self) -> Result<Option<(FrameHeader, Payload)>, LaneError> {
        let Some(bytes) = self.header_bytes().await? else {
            return Ok(None);
        };
        let expected = self.last.next();
        let header = FrameHeader::decode(&bytes)
            .and_then(|header| {
                header.check(&self.geometry, self.lane, self.lanes, expected)?;
                Ok(header)
            })
            .map_err(|source| LaneError::Frame {
                peer: self.peer.clone(),
                lane: self.lane,
                source,
            })?;
        let len = header.payload_len.min(MAX_FRAME_PAYLOAD) as usize;
        let payload = match header.encoding {
            Encoding::Raw => Payload::Raw(self.pieces(len).await?),
            Encoding::Zstd | Encoding::Difference | Encoding::Duplicate => {
                Payload::Encoded(self.whole(len).await?)
            }
        };
        self.last = expected;
        Ok(Some((header, payload)))
    }

    async fn header_bytes(&mut self) -> Result<Option<[u8; FrameHeader::ENCODED_LEN]>, LaneError> {
        let mut bytes = [0; FrameHeader::ENCODED_LEN];
        let mut room = &mut bytes[..];
        while !room.is_empty() {
            let Some(piece) = self.piece(room.len()).await? else {
                return if room.len() == FrameHeader::ENCODED_LEN {
                    Ok(None)
                } else {
                    Err(self.truncated("a frame header"))
                };
            };
            room.put_slice(&piece);
        }
        Ok(Some(bytes))
    }

    /// The next `len` bytes as they came.
    async fn pieces(&mut self, len: usize) -> Result<Vec<Bytes>, LaneError> {
        let mut pieces = Gathered::default();
        let mut missing = len;
        while missing > 0 {
            let piece = self.piece_of_frame(missing).await?;
            missing -= piece.len();
            pieces.push(piece);
        }
        Ok(pieces.into_pieces())
    }

    /// The next `len` bytes one behind the other, in memory that was not cleared first.
    async fn whole(&mut self, len: usize) -> Result<Bytes, LaneError> {
        self.buffer.clear();
        // The same memory again where the payload before was dropped: no page faults of fresh memory.
        self.buffer.reserve(len);
        while self.buffer.len() < len {
            let piece = self.piece_of_frame(len - self.buffer.len()).await?;
            self.buffer.extend_from_slice(&piece);
        }
        Ok(self.buffer.split().freeze())
    }

    async fn piece_of_frame(&mut self, most: usize) -> Result<Bytes, LaneError> {
        let piece = self.piece(most).await?;
        piece.ok_or_else(|| self.truncated("a frame"))
    }

    async fn piece(&mut self, most: usize) -> Result<Option<Bytes>, LaneError> {
        let piece = self.stream.next(most).await;
        piece.map_err(|error| LinkError::of_read(&error, &self.peer).into())
    }

    fn truncated(&self, what: &'static str) -> LaneError {
        LaneError::Truncated {
            peer: self.peer.clone(),
            what,
        }
    }
}

/// Sends the device state of an attempt on a stream of its own. `header` says of which session and migration.
pub async fn send_device_state(
    connection: &Connection,
    header: StreamHeader,
    attempt: Attempt,
    state: Bytes,
    peer: &str,
) -> Result<(), LaneError> {
    let header = StreamHeader {
        kind: StreamKind::DeviceState { attempt },
        ..header
    };
    let mut stream = open_stream(connection, &header, DEVICE_STATE_PRIORITY, peer).await?;
    let written = stream.write_chunk(state).await;
    written.map_err(|error| LinkError::of_write(&error, peer))?;
    // It fails only where the stream has ended, which the write would have told.
    drop(stream.finish());
    Ok(())
}
