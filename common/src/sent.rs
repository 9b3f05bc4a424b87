//! What a lane has sent of each block, by digest: what was dirtied and is as before need not go again.
//!
//! Owns one 64-bit digest per block that was sent, 2 MiB per GiB of guest, up to a bound; a window beyond it is sent as ever. A
//! window always travels on one lane, whose frames are applied in their order, so what was sent last is what the destination will have
//! when the next frame is applied. Invariant: it lives no longer than its lane; what a lost session left behind is not known here.
//!
//! The digest is XXH3 with a secret of this process's making, which no guest sees and all lanes of a session share: two contents of one digest are an accident
//! (1 in 2^64 for each block that is looked at) and nothing that a guest can prepare.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use vmferry_proto::geometry::{WINDOW_BLOCKS, WindowBits, WindowRef};
use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::xxh3_64_with_secret;

/// Windows that are remembered by all lanes of a session: 64 MiB of digests, 32 GiB of guest.
const MOST_WINDOWS: usize = 16_384;
/// In place of a digest: never sent.
const UNKNOWN: u64 = 0;
/// In place of a digest: sent as zero.
const ZERO: u64 = 1;

/// Bytes of the secret.
const SECRET_LEN: usize = 192;

/// What makes the digests of one session ones that nobody else can make.
#[derive(Clone)]
pub struct Secret(Arc<[u8; SECRET_LEN]>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secret").finish_non_exhaustive()
    }
}

impl Default for Secret {
    fn default() -> Self {
        Self::new()
    }
}

impl Secret {
    /// A fresh one.
    #[must_use]
    pub fn new() -> Self {
        let mut seed = [0; 8];
        // Without random bytes digests are still right, only not secret; and nothing else of a session works without them.
        let _ = getrandom::fill(&mut seed);
        let secret = const_custom_default_secret(u64::from_le_bytes(seed));
        Self(Arc::new(secret))
    }
}

/// What one lane has sent.
pub struct SentBlocks {
    secret: Secret,
    windows: HashMap<WindowRef, Box<[u64; WINDOW_BLOCKS as usize]>>,
    most: usize,
}

/// What was sent of one window; nothing where it is one too many.
pub(crate) struct SentWindow<'a> {
    secret: &'a [u8; SECRET_LEN],
    digests: Option<&'a mut [u64; WINDOW_BLOCKS as usize]>,
}

impl fmt::Debug for SentBlocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SentBlocks")
            .field("windows", &self.windows.len())
            .finish_non_exhaustive()
    }
}

impl SentBlocks {
    /// For one of `lanes` lanes, which have this secret together.
    #[must_use]
    pub fn of_one(lanes: usize, secret: Secret) -> Self {
        Self {
            secret,
            windows: HashMap::new(),
            most: MOST_WINDOWS.div_ceil(lanes.max(1)),
        }
    }

    pub(crate) fn window(&mut self, window: WindowRef) -> SentWindow<'_> {
        let room = self.windows.len() < self.most || self.windows.contains_key(&window);
        let digests = room.then(|| {
            let new = || Box::new([UNKNOWN; WINDOW_BLOCKS as usize]);
            self.windows.entry(window).or_insert_with(new).as_mut()
        });
        SentWindow {
            secret: &self.secret.0,
            digests,
        }
    }

    /// Whether any of these blocks is known to have been sent.
    #[must_use]
    pub fn has_any(&self, window: WindowRef, blocks: &WindowBits) -> bool {
        self.digests(window, blocks)
            .any(|(_, digest)| digest != UNKNOWN)
    }

    /// Those of these blocks of which content is known to have been sent, with its digest.
    pub(crate) fn contents(
        &self,
        window: WindowRef,
        blocks: &WindowBits,
    ) -> impl Iterator<Item = (u32, u64)> {
        self.digests(window, blocks)
            .filter(|(_, digest)| *digest > ZERO)
    }

    fn digests(&self, window: WindowRef, blocks: &WindowBits) -> impl Iterator<Item = (u32, u64)> {
        let known = self.windows.get(&window).into_iter();
        known.flat_map(|known| {
            let digest = |block: u32| known.get(block as usize).map(|digest| (block, *digest));
            blocks.iter().filter_map(digest)
        })
    }
}

impl SentWindow<'_> {
    /// Notes that `block` is sent with this content. Returns whether it was so before.
    pub(crate) fn is_as_before(&mut self, block: u32, content: &[u8]) -> bool {
        let secret = self.secret;
        self.note(block, || xxh3_64_with_secret(content, secret).max(ZERO + 1))
    }

    /// The same for a block of zeros.
    pub(crate) fn is_zero_as_before(&mut self, block: u32) -> bool {
        self.note(block, || ZERO)
    }

    fn note(&mut self, block: u32, digest: impl FnOnce() -> u64) -> bool {
        let digests = self.digests.as_deref_mut();
        let Some(known) = digests.and_then(|all| all.get_mut(block as usize)) else {
            return false;
        };
        let digest = digest();
        std::mem::replace(known, digest) == digest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_proto::geometry::WindowIndex;
    use vmferry_proto::ids::RegionId;

    fn at(window: u32) -> WindowRef {
        WindowRef {
            region: RegionId(0),
            window: WindowIndex(window),
        }
    }

    #[test]
    fn only_what_is_as_it_was_sent_last_is_known() {
        let mut sent = SentBlocks::of_one(16, Secret::new());
        let mut window = sent.window(at(3));
        assert!(!window.is_as_before(7, b"one"));
        assert!(window.is_as_before(7, b"one"));
        assert!(!window.is_as_before(8, b"one"), "another block");
        assert!(!window.is_as_before(7, b"two"));
        assert!(!window.is_as_before(7, b"one"), "not the last");
        assert!(!window.is_zero_as_before(7));
        assert!(window.is_zero_as_before(7));
        assert!(!window.is_as_before(7, &[0; 4096]));
        assert!(!sent.window(at(4)).is_as_before(7, &[0; 4096]));
        assert!(sent.window(at(3)).is_as_before(7, &[0; 4096]));
    }

    #[test]
    fn windows_beyond_the_bound_are_not_remembered() {
        let mut sent = SentBlocks::of_one(MOST_WINDOWS / 2, Secret::new());
        for window in 0..3 {
            assert!(!sent.window(at(window)).is_as_before(0, b"x"));
        }
        assert!(sent.window(at(1)).is_as_before(0, b"x"));
        assert!(!sent.window(at(2)).is_as_before(0, b"x"));
        assert_eq!(sent.windows.len(), 2);
    }

    #[test]
    fn every_session_has_a_secret_of_its_own() {
        assert_ne!(Secret::new().0, Secret::new().0);
    }

    #[test]
    fn what_was_sent_is_known_by_block() {
        let mut sent = SentBlocks::of_one(1, Secret::new());
        let mut window = sent.window(at(3));
        window.is_as_before(7, b"one");
        window.is_zero_as_before(8);
        let any = |window, from, to| sent.has_any(at(window), &WindowBits::span(from, to));
        assert!(any(3, 0, 8) && any(3, 8, 9));
        assert!(!any(3, 9, 512) && !any(4, 0, 512));
        let contents = sent.contents(at(3), &WindowBits::FULL);
        let blocks: Vec<u32> = contents.map(|(block, _)| block).collect();
        assert_eq!(blocks, [7]);
    }
}
