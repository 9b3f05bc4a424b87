//! Digests: the keyed one by which two sides compare a window, and the plain one of frames and files.
//!
//! Owns the choice of function and key. The window digest is keyed with the migration id, so that a guest
//! cannot prepare two contents with one digest; the plain one only finds accidents.

use vmferry_proto::ids::MigrationId;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Makes the digests by which both sides compare windows: while the guest is paused, and where a ledger was lost.
#[derive(Debug, Clone)]
pub struct WindowHasher {
    key: [u8; 32],
}

impl WindowHasher {
    /// For this migration: the key is its id, twice.
    #[must_use]
    pub fn new(migration: MigrationId) -> Self {
        let mut key = [0; 32];
        key[..16].copy_from_slice(migration.as_bytes());
        key[16..].copy_from_slice(migration.as_bytes());
        Self { key }
    }

    /// Digest of a window's content: BLAKE3 with that key, first 16 bytes.
    #[must_use]
    pub fn digest(&self, content: &[u8]) -> [u8; 16] {
        let full = blake3::keyed_hash(&self.key, content);
        let mut short = [0; 16];
        short.copy_from_slice(&full.as_bytes()[..16]);
        short
    }
}

/// XXH3-128 of `bytes`: for frames and device state, where only accidents must be found.
#[must_use]
pub fn plain(bytes: &[u8]) -> u128 {
    xxh3_128(bytes)
}

/// The same over several pieces.
#[derive(Clone, Default)]
pub struct PlainDigest(Xxh3);

impl PlainDigest {
    /// Nothing hashed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a piece.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Digest of all pieces, as [`plain`] of them in one.
    #[must_use]
    pub fn finish(&self) -> u128 {
        self.0.digest128()
    }
}

impl std::fmt::Debug for PlainDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlainDigest").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::{PlainDigest, WindowHasher, plain};
    use vmferry_proto::ids::MigrationId;

    #[test]
    fn the_window_digest_depends_on_content_and_migration() {
        let (a, b) = (
            WindowHasher::new(MigrationId::from_bytes([1; 16])),
            WindowHasher::new(MigrationId::from_bytes([2; 16])),
        );
        assert_eq!(a.digest(b"x"), a.clone().digest(b"x"));
        assert_ne!(a.digest(b"x"), a.digest(b"y"));
        assert_ne!(a.digest(b"x"), b.digest(b"x"));
        // Golden: both sides may be of different versions.
        let mut key = [0u8; 32];
        key.fill(1);
        assert_eq!(
            a.digest(b"x"),
            blake3::keyed_hash(&key, b"x").as_bytes()[..16]
        );
    }

    #[test]
    fn pieces_digest_like_the_whole() {
        let mut pieces = PlainDigest::new();
        pieces.update(b"ab");
        pieces.update(b"");
        pieces.update(b"c");
        assert_eq!(pieces.finish(), plain(b"abc"));
    }
}
