//! Digests of both copies, compared while the guest is paused and before anything is committed.
//!
//! Owns which windows are compared and what a difference means. One difference is legitimate: a page of a shared
//! RAM block that was discarded (a balloon punched a hole) and reads as zero at the source, since punching leaves no
//! dirty mark. Such blocks are sent again as zero and counted; any other difference ends the attempt.

use std::sync::Arc;

use tokio::time::Instant;
use vmferry_common::digest::WindowHasher;
use vmferry_hypervisor::RegionReader;
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::{Attempt, RegionId};
use vmferry_proto::message::{Digests, ToSource, VerifyWindows, WindowDigest};
use vmferry_proto::spec::RegionKind;

use super::Migration;
use super::flight::Grounded;
use crate::cli::Verify;
use crate::error::MigrateError;

/// Of so many windows `--verify sample` compares one.
pub(super) const SAMPLE_STRIDE: u32 = 32;

impl Migration {
    /// The windows whose digests this migration compares.
    pub(super) fn windows_to_verify(&self) -> Vec<VerifyWindows> {
        let stride = match self.options.verify {
            Verify::Off => return Vec::new(),
            Verify::Sample => SAMPLE_STRIDE,
            Verify::Full => 1,
        };
        let regions = &self.guest.spec().regions;
        regions
            .iter()
            .filter(|region| region.len.windows() > 0)
            .map(|region| {
                let span = stride.min(region.len.windows());
                VerifyWindows {
                    region: region.id,
                    first: WindowIndex(sample_start(self.began, region.id.0) % span),
                    stride,
                }
            })
            .collect()
    }

    /// Digests both copies and returns the windows that differ.
    pub(super) async fn compare_digests(
        &mut self,
        attempt: Attempt,
        verify: &[VerifyWindows],
    ) -> Result<Vec<WindowRef>, Grounded> {
        let mine = self.own_digests(verify).await?;
        let theirs = self.their_digests(attempt, mine.len()).await?;
        let mut differing = Vec::new();
        for (mine, theirs) in mine.iter().zip(&theirs) {
            if (mine.region, mine.window) != (theirs.region, theirs.window) {
                let error = WireError::new(
                    ErrorCode::ProtocolViolation,
                    "digests of other windows than those that were asked for",
                );
                return Err(MigrateError::Protocol(error).into());
            }
            if mine.digest != theirs.digest {
                differing.push(WindowRef {
                    region: mine.region,
                    window: mine.window,
                });
            }
        }
        let region_len = |of: &WindowDigest| {
            let spec = self.guest.spec().region(of.region)?;
            Some(u64::from(
                spec.len.bytes_of(of.window, &spec.len.all_of(of.window)),
            ))
        };
        let bytes = mine.iter().filter_map(region_len).sum();
        self.stats.on_compared(mine.len() as u64, bytes);
        Ok(differing)
    }

    async fn own_digests(
        &self,
        verify: &[VerifyWindows],
    ) -> Result<Vec<WindowDigest>, MigrateError> {
        let hasher = Arc::new(WindowHasher::new(self.dialer.migration));
        let mut digests = Vec::new();
        for asked in verify {
            let (Some(reader), Some(spec)) = (
                self.readers.get(usize::from(asked.region.0)),
                self.guest.spec().region(asked.region),
            ) else {
                continue;
            };
            digests.extend(digest_region(reader.clone(), hasher.clone(), spec.len, *asked).await?);
        }
        Ok(digests)
    }

    async fn their_digests(
        &mut self,
        attempt: Attempt,
        expected: usize,
    ) -> Result<Vec<WindowDigest>, Grounded> {
        let mut digests = Vec::with_capacity(expected);
        let mut last = false;
        loop {
            let input = self.input().await;
            match self.flight_message(input)? {
                Some(ToSource::Digests(Digests {
                    attempt: of,
                    windows,
                    last: end,
                })) if of == attempt => {
                    digests.extend(windows);
                    last = end;
                }
                Some(ToSource::Complete { attempt: of }) if of == attempt && last => break,
                Some(_) | None => {}
            }
            if digests.len() > expected {
                break;
            }
        }
        if digests.len() == expected {
            return Ok(digests);
        }
        let detail = format!(
            "{} digests came where {expected} were asked for",
            digests.len()
        );
        let error = WireError::new(ErrorCode::ProtocolViolation, detail);
        Err(MigrateError::Protocol(error).into())
    }

    /// Of windows that differ, makes the blocks dirty that are zero here: they may have been discarded.
    pub(super) async fn resend_discarded(&mut self, windows: &[WindowRef]) -> Result<(), Grounded> {
        for window in windows {
            let zero = self.zero_blocks(*window).await?;
            let memory = self
                .guest
                .spec()
                .region(window.region)
                .map(|region| region.kind)
                == Some(RegionKind::Memory);
            if !memory || zero.is_empty() {
                return Err(self.differs(window).into());
            }
            self.stats.resent_discarded += u64::from(zero.count());
            self.ledger
                .mark_dirty_window(*window, &zero)
                .map_err(|error| MigrateError::Internal(error.to_string()))?;
        }
        Ok(())
    }

    async fn zero_blocks(&self, at: WindowRef) -> Result<WindowBits, MigrateError> {
        let region = usize::from(at.region.0);
        let (Some(reader), Some(spec)) = (
            self.readers.get(region),
            self.guest.spec().region(at.region),
        ) else {
            return Ok(WindowBits::EMPTY);
        };
        let all = spec.len.all_of(at.window);
        let mut content = vec![0; spec.len.bytes_of(at.window, &all) as usize];
        reader
            .read(&spec.len.runs(at.window, &all), &mut content)
            .await?;
        let mut zero = WindowBits::EMPTY;
        for (block, bytes) in (0u32..).zip(content.chunks(BLOCK_SIZE as usize)) {
            if bytes.iter().all(|byte| *byte == 0) {
                zero.insert(block);
            }
        }
        Ok(zero)
    }

    pub(super) fn differs(&self, at: &WindowRef) -> MigrateError {
        let name = self
            .guest
            .spec()
            .region(at.region)
            .map_or("?", |region| &region.name);
        MigrateError::NotIdentical(format!(
            "region {name}, bytes {} and the 2 MiB behind: the two sides have different digests",
            at.window.offset()
        ))
    }
}

/// A start that differs from migration to migration without a random number generator in the hot path.
fn sample_start(began: Instant, region: u16) -> u32 {
    began.elapsed().subsec_nanos() ^ u32::from(region).wrapping_mul(0x9e37_79b9)
}

async fn digest_region(
    reader: Arc<dyn RegionReader>,
    hasher: Arc<WindowHasher>,
    len: RegionLen,
    asked: VerifyWindows,
) -> Result<Vec<WindowDigest>, MigrateError> {
    let windows = (asked.first.0..len.windows()).step_by(asked.stride.max(1) as usize);
    digest_windows(reader, hasher, len, asked.region, windows.map(WindowIndex)).await
}

/// Digests of these windows of a region, in their order.
pub(super) async fn digest_windows(
    reader: Arc<dyn RegionReader>,
    hasher: Arc<WindowHasher>,
    len: RegionLen,
    region: RegionId,
    windows: impl IntoIterator<Item = WindowIndex>,
) -> Result<Vec<WindowDigest>, MigrateError> {
    let mut digests = Vec::new();
    let mut content = Vec::new();
    for window in windows {
        let all = len.all_of(window);
        content.resize(len.bytes_of(window, &all) as usize, 0);
        reader.read(&len.runs(window, &all), &mut content).await?;
        digests.push(WindowDigest {
            region,
            window,
            digest: hasher.digest(&content),
        });
    }
    Ok(digests)
}
