//! What can go wrong when certificates are made, told with the next step.

use std::io;
use std::path::PathBuf;

/// A certificate or CA could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A file that would be written is there already.
    #[error("{path} exists and is never overwritten: choose another folder, or remove it if nothing uses it any more", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The folder holds no CA.
    #[error("{dir} holds no certificate authority: make one with `vmferry-certs init {dir}`", dir = dir.display())]
    NoAuthority {
        /// The folder.
        dir: PathBuf,
        /// What is missing.
        #[source]
        source: io::Error,
    },
    /// A file or folder cannot be read or written.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The CA's key can be read by others.
    #[error("{path} has mode {mode:03o}: others may have read the CA's key; if they have not, run `chmod 600 {path}`, else make a new CA", path = path.display())]
    KeyExposed {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The CA's files do not hold what they should.
    #[error("{path} {problem}", path = path.display())]
    BadAuthority {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The CA's certificate has expired or is not valid yet.
    #[error("the CA in {dir} is valid from {from} to {to}: make a new one in another folder and issue every host anew", dir = dir.display())]
    AuthorityExpired {
        /// The folder.
        dir: PathBuf,
        /// Begin of validity.
        from: String,
        /// End of validity.
        to: String,
    },
    /// A host name that cannot be a DNS name.
    #[error(
        "{name:?} cannot name a host: use letters, digits, - and . as in `alpha` or `alpha.example.net`"
    )]
    InvalidName {
        /// The name.
        name: String,
    },
    /// Validity that ends before it begins, or beyond what a certificate can say.
    #[error("a validity of {days} days is not possible: use 1 to {max}")]
    InvalidDays {
        /// What was asked.
        days: u32,
        /// The most.
        max: u32,
    },
    /// The validity asked for ends before it begins, or begins after the CA has ended.
    #[error("a certificate valid from {from} to {to} would never be valid")]
    NeverValid {
        /// Begin.
        from: String,
        /// End.
        to: String,
    },
    /// The cryptographic library refused.
    #[error("cannot make {what}")]
    Crypto {
        /// What was being made.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: rcgen::Error,
    },
}
