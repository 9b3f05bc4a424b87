//! The values of `--compress`.

use std::fmt;
use std::str::FromStr;

/// Levels that may be asked for.
const LEVELS: std::ops::RangeInclusive<i32> = -7..=19;

/// What `--compress` says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CompressMode {
    /// As it serves the copy, frame by frame.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, at this zstd level.
    Level(i32),
}

/// Text that is no compression mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a way to compress: use auto, off, or a zstd level from -7 to 19 without 0")]
pub struct CompressModeError(String);

impl FromStr for CompressMode {
    type Err = CompressModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            level => level
                .parse()
                .ok()
                .filter(|level| *level != 0 && LEVELS.contains(level))
                .map(Self::Level)
                .ok_or_else(|| CompressModeError(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for CompressMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Level(level) => level.fmt(f),
        }
    }
}
