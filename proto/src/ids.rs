//! Names and numbers that identify things on the wire and in the journals.
//!
//! Owns the newtypes and their parsing rules. Nothing here draws a random number or reads a clock:
//! the agents pass ids in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name([u8; 16]);

        impl $name {
            /// Wraps sixteen bytes that the caller drew at random.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The sixteen bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

random_id! {
    /// One migration, from `negotiate` to its end, over any number of sessions.
    MigrationId
}
random_id! {
    /// The outcome register of one destination state folder (`[HAND-2]`).
    RegisterId
}
random_id! {
    /// One life of the destination's copy of a region; a changed one makes the region wholly dirty.
    Incarnation
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number! {
    /// One pause of the guest: counted from 1 within a migration.
    Attempt(u32)
}
number! {
    /// Durable, increasing number of a session of one migration, counted from 1.
    SessionNumber(u64)
}
number! {
    /// Ownership generation of a guest: raised by every migration (`[HAND-11]`).
    Generation(u64)
}
number! {
    /// A region of the guest: an index into [`crate::spec::GuestSpec::regions`].
    RegionId(u16)
}
number! {
    /// A unidirectional data stream, source to destination: 0 up to the lane count.
    Lane(u8)
}
number! {
    /// Position of a frame within its (session, lane), counted from 1; 0 means "none yet".
    FrameSeq(u64)
}

impl Attempt {
    /// The attempt after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl SessionNumber {
    /// The session after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl FrameSeq {
    /// The sequence number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Name of a guest: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`. Names become paths, so nothing else is let in.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestName(String);

/// A guest name that breaks the rule of [`GuestName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a guest name: use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
)]
pub struct InvalidGuestName(String);

impl GuestName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for GuestName {
    type Err = InvalidGuestName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let first = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric());
        let rest = text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if first && rest && text.len() <= 64 {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidGuestName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for GuestName {
    type Error = InvalidGuestName;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<GuestName> for String {
    fn from(name: GuestName) -> Self {
        name.0
    }
}

impl fmt::Display for GuestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::GuestName;

    #[test]
    fn guest_names_cannot_leave_their_folder() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-x",
            ".hidden",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(bad.parse::<GuestName>().is_err(), "{bad:?} was accepted");
        }
        for good in ["a", "web-1", "0.x_Y", &"x".repeat(64)] {
            assert!(good.parse::<GuestName>().is_ok(), "{good:?} was refused");
        }
    }
}
