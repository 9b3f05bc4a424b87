//! The yardstick of compression: what one core makes of the guest's content.
//!
//! Owns a loop around zstd with the frame size of the product; the content is that of the embedded guest's pages.

use std::time::Instant;

use anyhow::ensure;
use vmferry_simguest::content::{self, Entry, Kind, PAGE, Place};

use super::quinn::per_second;

/// Bytes compressed at once: a frame's worth.
const PIECE: usize = 512 << 10;
/// Bytes of content: more than any cache holds.
const SAMPLE: usize = 64 << 20;

/// Text-like content as the embedded guest makes it, `SAMPLE` bytes.
///
/// # Errors
/// The guest's generator does not know its own entry.
pub fn text() -> anyhow::Result<Vec<u8>> {
    let mut sample = vec![0; SAMPLE];
    let entry = Entry::default().next(Kind::Text);
    let (pages, _) = sample.as_chunks_mut::<PAGE>();
    for (number, page) in (0..).zip(pages) {
        let known = content::fill(1, Place::Memory(number), entry, page);
        ensure!(known, "the content of an entry is not known");
    }
    Ok(sample)
}

/// Input bytes per second that one core compresses at `level`.
///
/// # Errors
/// zstd fails.
pub fn one_core(sample: &[u8], level: i32) -> anyhow::Result<f64> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let mut out = vec![0; zstd::zstd_safe::compress_bound(PIECE)];
    let began = Instant::now();
    for piece in sample.chunks(PIECE) {
        compressor.compress_to_buffer(piece, &mut out[..])?;
    }
    Ok(per_second(sample.len() as u64, began.elapsed()))
}
