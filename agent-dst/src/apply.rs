//! One task per lane: frames from the wire into the guest, strictly one after the other.
//!
//! Owns reading, checking, decoding and writing of frames, differences to what the guest has and duplicates of it (`origins`) among
//! them. Does not own positions (`board`) nor coverage. Invariant:
//! nothing is written for a frame whose header, payload and digest have not all been checked, and a frame is either
//! written whole or, if its lane is stopped, not begun. A lane holds one frame at a time, so memory is bounded by the
//! number of lanes.

use std::io::IoSlice;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use vmferry_common::causes::chain;
use vmferry_common::codec::{self, CodecError, Decoder};
use vmferry_common::lanes::{LaneError, LaneReceiver, Payload};
use vmferry_hypervisor::GuestError;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::frame::{Bases, Encoding, FrameError, FrameHeader};
use vmferry_proto::ids::{FrameSeq, Lane};
use vmferry_proto::spec::RegionKind;

use crate::board::Board;
use crate::error::guest_to_wire;
use crate::meter::Meter;
use crate::origins::{self, Unreadable};
use crate::session::SessionEvent;
use crate::sink::{Sink, Target};

/// Why a lane stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    /// The stream broke, or brought a header that breaks a rule.
    #[error("the lane broke")]
    Receive(#[source] LaneError),
    /// The payload is not what the header says.
    #[error("the payload of frame {seq} is wrong")]
    Payload {
        /// The frame.
        seq: FrameSeq,
        /// Why.
        #[source]
        source: CodecError,
    },
    /// What the guest has could not be read.
    #[error("region {region} cannot be read")]
    Read {
        /// The region's name.
        region: String,
        /// Why.
        #[source]
        source: GuestError,
    },
    /// The guest could not be written.
    #[error("region {region} cannot be written")]
    Write {
        /// The region's name.
        region: String,
        /// Why.
        #[source]
        source: GuestError,
    },
}

/// A lane stopped with an error.
#[derive(Debug)]
pub(crate) struct LaneFailed {
    lane: Lane,
    error: ApplyError,
}

/// What all lanes of a session share.
#[derive(Debug, Clone)]
pub(crate) struct LaneContext {
    /// Where frames end up.
    pub(crate) sink: Arc<Sink>,
    /// Where positions are noted.
    pub(crate) board: Arc<Board>,
    /// Where bytes are counted.
    pub(crate) meter: Arc<Meter>,
    /// Ends every lane at its next frame boundary.
    pub(crate) stop: CancellationToken,
    /// Told of the error that ended a lane.
    pub(crate) failures: mpsc::UnboundedSender<LaneFailed>,
}

impl LaneFailed {
    /// What it means for the session; `None` where the connection broke, which the control stream tells better.
    pub(crate) fn event(&self) -> Option<SessionEvent> {
        match &self.error {
            ApplyError::Receive(error) => error.to_wire().map(SessionEvent::Violation),
            ApplyError::Payload { source, .. } => {
                let detail = format!("lane {}: {}", self.lane, chain(&self.error));
                Some(match source {
                    CodecError::OtherBases | CodecError::OtherOrigins => {
                        SessionEvent::GivenUp(WireError::new(ErrorCode::LinkLost, detail))
                    }
                    _ => SessionEvent::Violation(WireError::new(ErrorCode::BadFrame, detail)),
                })
            }
            ApplyError::Read { source, .. } | ApplyError::Write { source, .. } => {
                let doing = self.error.to_string();
                Some(SessionEvent::GuestFailed(guest_to_wire(source, &doing)))
            }
        }
    }
}

/// Starts the task of a lane. It ends when the stream ends, the context is stopped or a frame is wrong.
pub(crate) fn spawn(receiver: LaneReceiver, context: LaneContext) -> JoinHandle<()> {
    let applier = Applier {
        receiver,
        decoder: Decoder::new(),
        here: Vec::new(),
        context,
    };
    tokio::spawn(applier.run())
}

#[derive(Debug)]
struct Applier {
    receiver: LaneReceiver,
    decoder: Decoder,
    /// What the guest has of what a frame refers to; kept for its memory.
    here: Vec<u8>,
    context: LaneContext,
}

impl Applier {
    async fn run(mut self) {
        if let Err(error) = self.apply_all().await {
            let lane = self.receiver.lane();
            // A session that is already gone no longer wants to know.
            let _ = self.context.failures.send(LaneFailed { lane, error });
        }
    }

    async fn apply_all(&mut self) -> Result<(), ApplyError> {
        let stop = self.context.stop.clone();
        loop {
            // Dropping a half-read frame is right: a stopped lane is never read again, and what was not applied is not
            // acknowledged.
            let received = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                received = self.receiver.next() => received.map_err(ApplyError::Receive)?,
            };
            let Some((header, payload)) = received else {
                return Ok(());
            };
            self.apply(&header, payload).await?;
        }
    }

    async fn apply(&mut self, header: &FrameHeader, payload: Payload) -> Result<(), ApplyError> {
        let sink = Arc::clone(&self.context.sink);
        // The header was checked against the lengths of these very regions.
        let Some(target) = sink.target(header.region) else {
            return Ok(());
        };
        match payload {
            Payload::Raw(pieces) => {
                codec::check_raw(header, &pieces).map_err(|source| wrong(header, source))?;
                let data: Vec<IoSlice<'_>> =
                    pieces.iter().map(|piece| IoSlice::new(piece)).collect();
                write(&target, header, &data).await?;
            }
            Payload::Encoded(payload) => {
                let data = self.decode(&sink, &target, header, &payload).await?;
                write(&target, header, &[IoSlice::new(data)]).await?;
            }
        }
        sink.note(header.region, header.window, &header.present);
        let LaneContext { board, meter, .. } = &self.context;
        meter.add(u64::from(header.payload_len) + FrameHeader::ENCODED_LEN as u64);
        let bytes = target.len.bytes_of(header.window, &header.present);
        let lane = self.receiver.lane();
        board.note_applied(lane, header.seq, target.kind, u64::from(bytes));
        Ok(())
    }

    /// The blocks that an encoded frame comes to, their digest checked.
    async fn decode<'a>(
        &'a mut self,
        sink: &Sink,
        target: &Target<'_>,
        header: &FrameHeader,
        payload: &'a [u8],
    ) -> Result<&'a [u8], ApplyError> {
        let Self { decoder, here, .. } = self;
        let decoded = match header.encoding {
            Encoding::Raw | Encoding::Zstd => decoder.decode(header, payload),
            Encoding::Difference => {
                read_bases(target, header, payload, here).await?;
                decoder.decode_differences(header, payload, target.len, here)
            }
            Encoding::Duplicate => {
                let origins = origins::of(sink, header, payload);
                let origins = origins.map_err(|source| wrong(header, source))?;
                origins::read(sink, &origins.places, here).await?;
                decoder.decode_duplicates(header, &origins, target.len, here)
            }
        };
        decoded.map_err(|source| wrong(header, source))
    }
}

impl From<Unreadable> for ApplyError {
    fn from(Unreadable { region, source }: Unreadable) -> Self {
        Self::Read { region, source }
    }
}

const fn wrong(header: &FrameHeader, source: CodecError) -> ApplyError {
    ApplyError::Payload {
        seq: header.seq,
        source,
    }
}

/// Reads into `here` what the guest has in the blocks to which a frame has differences (`[WIRE-52]`). At most what the frame itself
/// decodes to, since they are blocks of it.
async fn read_bases(
    target: &Target<'_>,
    header: &FrameHeader,
    payload: &[u8],
    here: &mut Vec<u8>,
) -> Result<(), ApplyError> {
    let of_memory = match target.kind {
        RegionKind::Memory => Ok(()),
        RegionKind::Disk => Err(FrameError::Bases),
    };
    let (bases, _) = of_memory
        .and_then(|()| Bases::split(header, payload))
        .map_err(|error| wrong(header, CodecError::Bases(error)))?;
    let runs = target.len.runs(header.window, &bases.blocks);
    here.resize(
        target.len.bytes_of(header.window, &bases.blocks) as usize,
        0,
    );
    target
        .writer
        .read(&runs, here)
        .await
        .map_err(|source| ApplyError::Read {
            region: target.name.to_owned(),
            source,
        })
}

async fn write(
    target: &Target<'_>,
    header: &FrameHeader,
    data: &[IoSlice<'_>],
) -> Result<(), ApplyError> {
    let write = async {
        let runs = header.data_runs(target.len);
        if !runs.is_empty() {
            target.writer.write_vectored(&runs, data).await?;
        }
        let zeros = header.zero_runs(target.len);
        if !zeros.is_empty() {
            target.writer.zero(&zeros).await?;
        }
        Ok(())
    };
    write.await.map_err(|source| ApplyError::Write {
        region: target.name.to_owned(),
        source,
    })
}
