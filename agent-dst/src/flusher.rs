//! Flushes the disks from time to time while they are being written.
//!
//! Owns when; what a flush makes true belongs to `board`. Without it the source would have to keep, and after a lost
//! connection send again, every disk block of the whole copy.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vmferry_hypervisor::GuestError;

use crate::board::Board;
use crate::sink::Sink;

/// Longest time for which written disk blocks stay unflushed: what a lost hypervisor costs the link again.
const FLUSH_AFTER: Duration = Duration::from_secs(1);
/// Most bytes that stay unflushed: a fast link must not pile up seconds of write-back for the pause.
const FLUSH_AT_BYTES: u64 = 256 << 20;

/// Flushes until `stop`, then once more if anything is left, so that a resume point says as much as it can.
///
/// # Errors
/// The first flush that failed; nothing counts as flushed after it.
pub(crate) async fn run(
    sink: Arc<Sink>,
    board: Arc<Board>,
    stop: CancellationToken,
) -> Result<(), GuestError> {
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            () = due(&board) => flush_once(&sink, &board).await?,
        }
    }
    if board.unflushed() > 0 {
        flush_once(&sink, &board).await?;
    }
    Ok(())
}

/// One flush of every disk. What was applied before it counts as flushed afterwards.
pub(crate) async fn flush_once(sink: &Sink, board: &Board) -> Result<(), GuestError> {
    let mark = board.begin_flush();
    sink.flush().await?;
    board.end_flush(&mark);
    Ok(())
}

/// Returns when it is time to flush. Cancel safe.
async fn due(board: &Board) {
    unflushed(board, 1).await;
    // The time being over is as good a reason as the bytes.
    let _ = tokio::time::timeout(FLUSH_AFTER, unflushed(board, FLUSH_AT_BYTES)).await;
}

/// Returns when at least `bytes` are unflushed. Cancel safe.
async fn unflushed(board: &Board, bytes: u64) {
    let mut changes = board.watch();
    while board.unflushed() < bytes {
        if changes.changed().await.is_err() {
            // The board lives as long as this borrow, so its sender does too.
            return;
        }
    }
}
