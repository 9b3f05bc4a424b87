//! The names of a migration's phases and ends: the same in status, events, hooks, journals and tests.
//!
//! Owns the words and their order, nothing else.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $unknown:ident, $what:literal; $($(#[$vdoc:meta])* $variant:ident = $text:literal,)*) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name {
            $($(#[$vdoc])* $variant,)*
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name that people, scripts and the journal see.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        #[doc = concat!("A word that is not ", $what, ".")]
        #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
        #[error("{0:?} is not {what}", what = $what)]
        pub struct $unknown(String);

        impl FromStr for $name {
            type Err = $unknown;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::ALL
                    .iter()
                    .copied()
                    .find(|one| one.name() == text)
                    .ok_or_else(|| $unknown(text.chars().take(80).collect()))
            }
        }
    };
}

words! {
    /// A phase of a migration, in the order in which they come.
    Phase, UnknownPhase, "a phase";
    /// The two sides find out whether they fit.
    Negotiate = "negotiate",
    /// The destination gets its copy of the guest ready.
    Prepare = "prepare",
    /// The guest runs and is copied.
    Copy = "copy",
    /// What is left fits into the downtime; `--cutover manual` waits here.
    Converged = "converged",
    /// The guest is being paused.
    Pause = "pause",
    /// The last blocks and the device state go over.
    Final = "final",
    /// The destination loads the device state.
    Load = "load",
    /// The decision is being recorded: from here the source never resumes by itself.
    Commit = "commit",
    /// The destination starts the guest.
    Start = "start",
    /// The source lets its copy go.
    Release = "release",
}

words! {
    /// How a migration ended.
    Ending, UnknownEnding, "an ending";
    /// The guest is the destination's.
    Committed = "committed",
    /// An attempt failed after the pause and the guest runs at the source again.
    RolledBack = "rolled-back",
    /// Somebody cancelled; the guest runs at the source.
    Cancelled = "cancelled",
    /// It failed before any pause; the guest runs at the source.
    Failed = "failed",
    /// Nobody knows yet who has the guest; it is paused at the source.
    InDoubt = "in-doubt",
}

/// What hook scripts are told of: a phase, or the end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HookPoint {
    /// The phase begins (before the decision) or is over (after it).
    Phase(Phase),
    /// The migration has ended this way.
    Ending(Ending),
}

impl HookPoint {
    /// Name of the script.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Phase(phase) => phase.name(),
            Self::Ending(ending) => ending.name(),
        }
    }
}

impl From<Phase> for HookPoint {
    fn from(phase: Phase) -> Self {
        Self::Phase(phase)
    }
}

impl From<Ending> for HookPoint {
    fn from(ending: Ending) -> Self {
        Self::Ending(ending)
    }
}

impl fmt::Display for HookPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Phase {
    /// Whether a hook that fails in this phase stops the migration: only before the decision can anything.
    #[must_use]
    pub fn can_veto(self) -> bool {
        self < Self::Commit
    }
}

impl Ending {
    /// Exit code of a source that ended this way.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Committed => 0,
            Self::Failed | Self::RolledBack => 1,
            Self::InDoubt => 3,
            Self::Cancelled => 4,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Ending, Phase};

    #[test]
    fn the_names_are_those_of_scripts_and_in_order() {
        let phases: Vec<_> = Phase::ALL.iter().map(|phase| phase.name()).collect();
        assert_eq!(
            phases.join(" "),
            "negotiate prepare copy converged pause final load commit start release"
        );
        let ends: Vec<_> = Ending::ALL.iter().map(|end| end.name()).collect();
        assert_eq!(
            ends.join(" "),
            "committed rolled-back cancelled failed in-doubt"
        );
    }

    #[test]
    fn display_parse_and_serde_use_one_name() {
        for phase in Phase::ALL {
            assert_eq!(phase.to_string().parse(), Ok(*phase));
            assert_eq!(
                serde_json::to_string(phase).unwrap(),
                format!("\"{phase}\"")
            );
        }
        for end in Ending::ALL {
            assert_eq!(end.to_string().parse(), Ok(*end));
            assert_eq!(serde_json::to_string(end).unwrap(), format!("\"{end}\""));
        }
        assert!("Copy".parse::<Phase>().is_err());
    }

    #[test]
    fn only_phases_before_the_decision_can_be_vetoed() {
        assert!(Phase::Load.can_veto());
        assert!(!Phase::Commit.can_veto());
        assert!(!Phase::Release.can_veto());
    }
}
