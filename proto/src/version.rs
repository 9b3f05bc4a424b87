//! Protocol versions and features, and how two sides agree on them.

/// A version of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProtocolVersion(pub u32);

/// Versions that a side speaks, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct VersionRange {
    /// Oldest.
    pub min: ProtocolVersion,
    /// Newest.
    pub max: ProtocolVersion,
}

/// Versions that this build speaks.
pub const SUPPORTED: VersionRange = VersionRange {
    min: ProtocolVersion(1),
    max: ProtocolVersion(1),
};

impl VersionRange {
    /// The newest version in both ranges.
    #[must_use]
    pub fn agree(self, other: Self) -> Option<ProtocolVersion> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }
}

/// A set of optional features; unknown names are ignored by the side that does not have them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features(pub std::collections::BTreeSet<String>);

impl Features {
    /// Features of this build.
    #[must_use]
    pub fn supported() -> Self {
        Self(["zstd"].into_iter().map(str::to_owned).collect())
    }

    /// Features that both sides have.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        Self(self.0.intersection(&other.0).cloned().collect())
    }

    /// Whether the feature is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}
