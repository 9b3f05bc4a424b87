//! The words of the tables.

/// What is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    /// SIGKILL of `vmferry-src`; then `recover`.
    SourceAgent,
    /// SIGKILL of `vmferry-dst`; then it is started again.
    DestinationAgent,
    /// Both of it.
    BothAgents,
    /// SIGKILL of the guest's process at the source.
    SourceGuest,
    /// SIGKILL of the guest's process at the destination.
    DestinationGuest,
    /// Every datagram is lost for a while.
    Link,
}

/// Where the guest must be when all is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// At the source: alpha.
    Alpha,
    /// At the destination: beta.
    Beta,
    /// Wherever the exit code of the source agent says, which runs on: at beta after 0, at alpha after 1.
    AsTold,
    /// Its process was killed where it lived: it may be booted at the source.
    DiedAtAlpha,
    /// The same at the destination.
    DiedAtBeta,
}

/// The phases, in their order.
pub(crate) const PHASES: [&str; 10] = [
    "negotiate",
    "prepare",
    "copy",
    "converged",
    "pause",
    "final",
    "load",
    "commit",
    "start",
    "release",
];

/// Whether the source has not written COMMITTING yet: afterwards a doubt lasts as long as the two sides do not hear of each other.
pub(crate) fn is_before_the_decision(phase: &str) -> bool {
    PHASES
        .iter()
        .take_while(|known| **known != "commit")
        .any(|known| *known == phase)
}

impl Victim {
    /// Where the guest must be after this fault in `phase`; `None` where there is nothing to strike.
    pub(crate) fn leaves_it(self, phase: &str) -> Option<Place> {
        let at = PHASES.iter().position(|known| *known == phase)?;
        let row: [Option<Place>; 10] = match self {
            //                          negotiate prepare copy converged pause final load commit start release
            Self::SourceAgent => [A, A, A, A, A, A, A, B, B, B],
            Self::DestinationAgent => [T, T, T, T, T, T, T, T, B, B],
            Self::BothAgents => [A, A, A, A, A, A, A, A, B, B],
            Self::SourceGuest => [X, X, X, X, X, X, X, B, B, B],
            Self::DestinationGuest => [N, N, A, A, A, A, A, A, Y, Y],
            Self::Link => [T, T, T, T, T, T, T, B, B, B],
        };
        row[at]
    }
}

const A: Option<Place> = Some(Place::Alpha);
const B: Option<Place> = Some(Place::Beta);
const T: Option<Place> = Some(Place::AsTold);
const X: Option<Place> = Some(Place::DiedAtAlpha);
const Y: Option<Place> = Some(Place::DiedAtBeta);
const N: Option<Place> = None;
