//! What can go wrong with a guest, told so that an administrator can act on it.

use std::io;

/// A guest or its hypervisor failed, or does not fit.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest's process is gone.
    #[error("the guest's process has ended: {0}")]
    Gone(String),
    /// The guest was shut down from inside or by somebody.
    #[error("the guest was shut down ({0})")]
    ShutDown(String),
    /// Somebody else resumed, reset or changed the guest while it was paused for the cutover.
    #[error("somebody else touched the guest: {0}")]
    Touched(String),
    /// The guest reset itself so shortly before the pause that the reset fell into it.
    #[error("the guest rebooted in the moment of the pause")]
    Rebooted,
    /// This guest cannot be migrated, or the two sides do not match; nothing was copied.
    #[error("{0}")]
    Incompatible(String),
    /// No memory or disk space.
    #[error("{0}")]
    NoSpace(String),
    /// The hypervisor answered with an error or not as expected.
    #[error("{command}: {answer}")]
    Refused {
        /// What was asked.
        command: String,
        /// What it said.
        answer: String,
    },
    /// The hypervisor did not answer in time.
    #[error("{command} was not answered within {seconds} s")]
    TimedOut {
        /// What was asked.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// Talking to the hypervisor or its disks failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Dirty-page tracking failed.
    #[error("dirty-page tracking failed")]
    Tracking(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The guest file is wrong.
    #[error("{0}")]
    Config(String),
}
