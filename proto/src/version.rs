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

/// Frames of encoding 1 may be sent.
pub const ZSTD: &str = "zstd";
/// `Compare` may be asked (`[WIRE-49]`).
pub const COMPARE: &str = "compare";
/// Frames of encoding 2 may be sent (`[WIRE-52]`).
pub const DIFFERENCE: &str = "difference";
/// Frames of encoding 3 may be sent (`[WIRE-54]`).
pub const DUPLICATE: &str = "duplicate";

/// A set of optional features; unknown names are ignored by the side that does not have them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features(pub std::collections::BTreeSet<String>);

impl Features {
    /// Features of this build.
    #[must_use]
    pub fn supported() -> Self {
        Self(
            [COMPARE, DIFFERENCE, DUPLICATE, ZSTD]
                .map(str::to_owned)
                .into(),
        )
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

#[cfg(test)]
mod tests {
    use super::*;

    fn range(min: u32, max: u32) -> VersionRange {
        VersionRange {
            min: ProtocolVersion(min),
            max: ProtocolVersion(max),
        }
    }

    /// `[WIRE-45]`
    #[test]
    fn the_newest_common_version_is_agreed() {
        for (a, b, agreed) in [
            (range(1, 1), range(1, 1), Some(1)),
            (range(1, 3), range(2, 5), Some(3)),
            (range(2, 2), range(1, 9), Some(2)),
            (range(1, 2), range(3, 4), None),
            (range(1, 1), range(2, 2), None),
        ] {
            assert_eq!(a.agree(b), agreed.map(ProtocolVersion), "{a:?} {b:?}");
            assert_eq!(b.agree(a), agreed.map(ProtocolVersion), "{b:?} {a:?}");
        }
    }

    /// `[WIRE-46]`
    #[test]
    fn only_common_features_are_used() {
        let theirs = Features(["later", "zstd"].map(str::to_owned).into());
        let common = Features::supported().common(&theirs);
        assert!(common.has("zstd") && !common.has("later"));
        assert!(!Features::default().common(&theirs).has("zstd"));
    }
}
