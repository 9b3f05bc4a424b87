//! What a source hears that lost its ledger: digests of what the copy still has, so that only the rest is sent again.
//!
//! Owns the answering, one question after the other and apart from the lanes. A window is answered for only if all of it was received
//! for the copy that is here, and its disk is flushed, so that the answer stays true for as long as the incarnation
//! does (`[WIRE-50]`). What cannot be read back is left out: it comes once more.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use vmferry_common::causes::chain;
use vmferry_common::digest::WindowHasher;
use vmferry_proto::geometry::WindowRef;
use vmferry_proto::limits::MAX_COMPARES;
use vmferry_proto::message::{Compared, ToSource, WindowDigest, WindowRange};

use crate::session::Outgoing;
use crate::sink::Sink;
use crate::verify::{self, VerifyError};

/// Answers the questions of one session.
#[derive(Debug)]
pub(crate) struct Comparer {
    sink: Arc<Sink>,
    asked: mpsc::Sender<WindowRange>,
}

impl Comparer {
    /// Starts to answer on `outgoing` until `stop`.
    pub(crate) fn start(
        sink: Arc<Sink>,
        hasher: WindowHasher,
        outgoing: Outgoing,
        stop: CancellationToken,
    ) -> Self {
        // The session lets no more questions through.
        let (asked, questions) = mpsc::channel(MAX_COMPARES);
        let answer_all = answer_all(sink.clone(), hasher, outgoing, questions);
        tokio::spawn(async move {
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = answer_all => {}
            }
        });
        Self { sink, asked }
    }

    /// Queues a question; false if it is about a region that the guest does not have.
    pub(crate) fn ask(&self, range: WindowRange) -> bool {
        self.sink.target(range.region).is_some() && self.asked.try_send(range).is_ok()
    }
}

async fn answer_all(
    sink: Arc<Sink>,
    hasher: WindowHasher,
    outgoing: Outgoing,
    mut questions: mpsc::Receiver<WindowRange>,
) {
    while let Some(range) = questions.recv().await {
        let windows = digests(&sink, range, &hasher).await.unwrap_or_else(|error| {
            tracing::warn!(region = %range.region, "not compared, so sent again: {}", chain(&error));
            Vec::new()
        });
        let answer = ToSource::Compared(Compared { windows });
        if !outgoing.send_when_free(answer).await {
            return;
        }
    }
}

async fn digests(
    sink: &Sink,
    range: WindowRange,
    hasher: &WindowHasher,
) -> Result<Vec<WindowDigest>, VerifyError> {
    let region = range.region;
    let windows: Vec<WindowRef> = range
        .windows()
        .filter(|window| sink.coverage().is_whole(region, *window))
        .map(|window| WindowRef { region, window })
        .collect();
    if windows.is_empty() {
        return Ok(Vec::new());
    }
    sink.flush().await.map_err(VerifyError::Flush)?;
    verify::digests_of(sink, &windows, hasher).await
}
