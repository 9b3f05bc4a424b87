//! The private certificate authority of a vmferry installation and the identities of its hosts.
//!
//! Owns how a CA and host certificates are made and how they are laid out in a folder; it does not use
//! them: that is `vmferry-common`'s identity module. Invariants: a private key is never readable by
//! others, not even for a moment, and no file is ever overwritten.

mod authority;
mod error;
mod files;

pub use authority::{
    Authority, CA_LIFETIME, CertificateAuthority, HOST_LIFETIME, HostRequest, Issued, SubjectName,
    Validity,
};
pub use error::CertsError;
pub use files::{CA_CERTIFICATE, CA_KEY, HOST_CERTIFICATE, HOST_KEY};
