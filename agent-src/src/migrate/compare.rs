//! A copy without its ledger: what the destination kept of it is compared, and only what differs is sent again.
//!
//! Owns the questions and what an answer makes of the ledger (`[WIRE-49]`). The order is that of the copy: marks armed, barrier, then
//! the window is read and digested here; a later write has its mark, and is found by the next scan. Nothing is sent meanwhile, so
//! the destination's windows stand still. Both sides digest at the same time, some questions ahead of the answers.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;
use vmferry_common::digest::WindowHasher;
use vmferry_common::units::Size;
use vmferry_proto::geometry::{WindowIndex, WindowRef};
use vmferry_proto::ids::RegionId;
use vmferry_proto::limits::{MAX_COMPARE_WINDOWS, MAX_COMPARES};
use vmferry_proto::message::{Compared, ToDestination, ToSource, WindowDigest, WindowRange};
use vmferry_proto::spec::RegionSpec;

use super::Migration;
use super::inputs::Input;
use super::verify::digest_windows;
use crate::error::MigrateError;
use crate::session::Session;

/// Windows that one task digests: the cores share a question's windows, and starting a task costs nothing beside 64 MiB.
const BATCH: usize = 32;

impl Migration {
    /// Where an earlier agent's ledger is lost and the destination has its copy: makes clean what is there already. The marks of
    /// everything are armed.
    ///
    /// # Errors
    /// Whatever interrupts the copy (a lost link: then it is begun again) or ends it.
    pub(super) async fn compare(&mut self) -> Result<(), MigrateError> {
        let able = self.session.as_ref().is_some_and(Session::can_compare);
        if !self.to_compare || !able {
            return Ok(());
        }
        self.progress
            .note("comparing with what the destination kept of this copy");
        let before = self.left().total();
        self.compare_all().await?;
        self.to_compare = false;
        let left = self.left().total();
        self.stats.kept_bytes += before - left;
        self.progress.note(&format!(
            "the destination has {} of {} as they are here, {} to send",
            Size(before - left),
            Size(before),
            Size(left)
        ));
        Ok(())
    }

    async fn compare_all(&mut self) -> Result<(), MigrateError> {
        let mut questions = questions(&self.guest.spec().regions).into_iter();
        let mut asked = VecDeque::with_capacity(MAX_COMPARES);
        loop {
            while asked.len() < MAX_COMPARES
                && let Some(range) = questions.next()
            {
                let windows = self.begin(range);
                if !windows.is_empty() {
                    self.say_to_peer(&ToDestination::Compare(range)).await?;
                    asked.push_back((range.region, windows));
                }
            }
            let Some((region, windows)) = asked.pop_front() else {
                break;
            };
            let answer = self.await_compared().await?;
            self.take_answer(region, &windows, answer).await?;
        }
        self.ledger.end_compare();
        Ok(())
    }

    /// The windows of `range` of which there is something to find out.
    fn begin(&mut self, range: WindowRange) -> Vec<WindowIndex> {
        let region = range.region;
        let begun = |window: &WindowIndex| {
            let window = *window;
            self.ledger.begin_compare(WindowRef { region, window })
        };
        range.windows().filter(begun).collect()
    }

    async fn await_compared(&mut self) -> Result<Compared, MigrateError> {
        loop {
            match self.input().await {
                Input::Peer(ToSource::Compared(compared)) => return Ok(compared),
                other => self.on_input(other)?,
            }
        }
    }

    /// Reads those of the windows that the destination has, and makes clean what is the same.
    async fn take_answer(
        &mut self,
        region: RegionId,
        windows: &[WindowIndex],
        answer: Compared,
    ) -> Result<(), MigrateError> {
        let mut theirs = answer.windows;
        theirs.retain(|digest| windows.contains(&digest.window));
        let windows: Vec<WindowIndex> = theirs.iter().map(|digest| digest.window).collect();
        let mine = self.digests_here(region, &windows).await?;
        for equal in theirs.iter().filter(|digest| mine.contains(digest)) {
            let window = equal.window;
            self.ledger.found_equal(WindowRef { region, window });
        }
        Ok(())
    }

    /// Digests of these windows of a region, in any order.
    async fn digests_here(
        &self,
        region: RegionId,
        windows: &[WindowIndex],
    ) -> Result<Vec<WindowDigest>, MigrateError> {
        let (Some(reader), Some(spec)) = (
            self.readers.get(usize::from(region.0)),
            self.guest.spec().region(region),
        ) else {
            return Ok(Vec::new());
        };
        let hasher = Arc::new(WindowHasher::new(self.dialer.migration));
        let mut tasks = JoinSet::new();
        for batch in windows.chunks(BATCH) {
            let batch = batch.to_vec();
            let reader = reader.clone();
            tasks.spawn(digest_windows(
                reader,
                hasher.clone(),
                spec.len,
                region,
                batch,
            ));
        }
        let mut digests = Vec::with_capacity(windows.len());
        while let Some(done) = tasks.join_next().await {
            let done = done.map_err(|error| MigrateError::Internal(error.to_string()))?;
            digests.extend(done?);
        }
        Ok(digests)
    }
}

/// All windows of all regions, in pieces that a question may have.
fn questions(regions: &[RegionSpec]) -> Vec<WindowRange> {
    let of = |region: &RegionSpec| {
        let (id, windows) = (region.id, region.len.windows());
        (0..windows)
            .step_by(MAX_COMPARE_WINDOWS as usize)
            .map(move |first| WindowRange {
                region: id,
                first: WindowIndex(first),
                count: MAX_COMPARE_WINDOWS.min(windows - first),
            })
    };
    regions.iter().flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use vmferry_proto::geometry::{RegionLen, WINDOW_SIZE};
    use vmferry_proto::spec::RegionKind;

    use super::*;

    #[test]
    fn questions_name_every_window_once() {
        let lens = [1, 256, 257, 1000].map(|windows| windows * u64::from(WINDOW_SIZE) - 5);
        let regions: Vec<RegionSpec> = (0u16..)
            .zip(lens)
            .map(|(id, len)| RegionSpec {
                id: RegionId(id),
                name: format!("r{id}"),
                kind: RegionKind::Memory,
                len: RegionLen(len),
            })
            .collect();
        let asked: Vec<_> = questions(&regions)
            .into_iter()
            .inspect(|range| assert!((1..=MAX_COMPARE_WINDOWS).contains(&range.count)))
            .flat_map(|range| range.windows().map(move |window| (range.region, window)))
            .collect();
        let all: Vec<_> = regions
            .iter()
            .flat_map(|region| (0..region.len.windows()).map(|it| (region.id, WindowIndex(it))))
            .collect();
        assert_eq!(asked, all);
    }
}
