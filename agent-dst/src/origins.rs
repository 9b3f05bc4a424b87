//! What the guest has already of a frame of duplicates.
//!
//! Owns the reading of it, from any region. Invariant: only what was received for this copy is read, so that nothing that lay there
//! before, or in memory that nobody wrote, becomes part of a guest or can be guessed at by a peer (`[WIRE-54]`).

use vmferry_common::codec::CodecError;
use vmferry_hypervisor::GuestError;
use vmferry_proto::frame::{BlockRef, FrameError, FrameHeader, Origins};
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen, Run};

use crate::sink::Sink;

/// Bytes of a block that is a duplicate or has one.
const BLOCK: usize = BLOCK_SIZE as usize;

/// A region that could not be read.
#[derive(Debug)]
pub(crate) struct Unreadable {
    pub(crate) region: String,
    pub(crate) source: GuestError,
}

/// The duplicates of a frame, of which each is of a block that was received.
pub(crate) fn of<'a>(
    sink: &Sink,
    header: &FrameHeader,
    payload: &'a [u8],
) -> Result<Origins<'a>, CodecError> {
    let len_of = |region| -> Option<RegionLen> { Some(sink.target(region)?.len) };
    let origins = Origins::split(header, payload, len_of).map_err(CodecError::Origins)?;
    match sink.coverage().missing(&origins.places) {
        None => Ok(origins),
        Some(at) => Err(CodecError::Origins(FrameError::Unreceived(at))),
    }
}

/// Reads what is at `places` into `there`, one block behind the other: at most what the frame itself decodes to.
pub(crate) async fn read(
    sink: &Sink,
    places: &[BlockRef],
    there: &mut Vec<u8>,
) -> Result<(), Unreadable> {
    there.resize(places.len() * BLOCK, 0);
    let mut rest = &mut there[..];
    for places in places.chunk_by(|one, next| one.region == next.region) {
        let (piece, behind) = rest.split_at_mut(places.len() * BLOCK);
        rest = behind;
        let Some(target) = places.first().and_then(|at| sink.target(at.region)) else {
            continue;
        };
        let read = target.writer.read(&runs(places), piece).await;
        read.map_err(|source| Unreadable {
            region: target.name.to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// The byte ranges of `places`, which are of one region, in their order; neighbours are joined.
fn runs(places: &[BlockRef]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for at in places {
        let offset = at.window.offset() + u64::from(at.block) * u64::from(BLOCK_SIZE);
        match runs.last_mut() {
            Some(run) if run.offset + u64::from(run.len) == offset => run.len += BLOCK_SIZE,
            _ => runs.push(Run {
                offset,
                len: BLOCK_SIZE,
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use vmferry_proto::geometry::WindowIndex;
    use vmferry_proto::ids::RegionId;

    use super::*;

    #[test]
    fn neighbours_are_read_together_and_the_order_is_kept() {
        let at = |(window, block)| BlockRef {
            region: RegionId(1),
            block,
            window: WindowIndex(window),
        };
        let places = [(3, 510), (3, 511), (4, 0), (4, 0), (0, 7), (0, 6)].map(at);
        let first = 3 * (2 << 20) + 510 * 4096;
        let found: Vec<_> = runs(&places)
            .iter()
            .map(|run| (run.offset, run.len))
            .collect();
        assert_eq!(
            found,
            [
                (first, 3 * 4096),
                (first + 2 * 4096, 4096),
                (7 * 4096, 4096),
                (6 * 4096, 4096)
            ]
        );
    }
}
