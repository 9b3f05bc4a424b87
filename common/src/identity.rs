//! The identity of this host: certificate, key and CA, and the TLS configurations made of them.
//!
//! Owns how the folder of `--identity` is read and judged. Invariants: TLS 1.3 only, both sides show a
//! certificate of the private CA, the ALPN is `vmferry/1`, and there is no resumption, ticket or 0-RTT:
//! they would skip the check of the certificate.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Application protocol of the connection.
pub const ALPN: &[u8] = b"vmferry/1";
/// Certificate of this host within the folder.
pub const CERTIFICATE_FILE: &str = "cert.pem";
/// Its key.
pub const KEY_FILE: &str = "key.pem";
/// Certificate of the CA.
pub const CA_FILE: &str = "ca.pem";
/// From when on the end of a certificate is told: a month leaves time to issue a new one.
const EXPIRY_WARNING_SECS: u64 = 30 * 24 * 3600;

/// Name of a host, as its certificate says it; in lower case.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerName(String);

impl PeerName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `listed`, as somebody wrote it into a guest file, is this name.
    #[must_use]
    pub fn is(&self, listed: &str) -> bool {
        self.0.eq_ignore_ascii_case(listed.trim())
    }

    /// The name in this certificate: its first DNS name, else its common name.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, CertificateNameError> {
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|_| CertificateNameError::Unreadable)?;
        let alternative = parsed.subject_alternative_name().ok().flatten();
        let dns = alternative.and_then(|names| {
            names
                .value
                .general_names
                .iter()
                .find_map(|name| match name {
                    GeneralName::DNSName(dns) => Some((*dns).to_owned()),
                    _ => None,
                })
        });
        let common = || {
            let mut names = parsed.subject().iter_common_name();
            names
                .next()
                .and_then(|cn| cn.as_str().ok())
                .map(str::to_owned)
        };
        let name = dns.or_else(common).ok_or(CertificateNameError::Nameless)?;
        if name.is_empty() || name.len() > 253 || name.chars().any(char::is_control) {
            return Err(CertificateNameError::Nameless);
        }
        Ok(Self(name.to_ascii_lowercase()))
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A certificate without a usable name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateNameError {
    /// It cannot be parsed.
    #[error("the certificate cannot be read")]
    Unreadable,
    /// It names nobody.
    #[error(
        "the certificate has neither a DNS name nor a common name: issue it with `vmferry-certs issue`"
    )]
    Nameless,
}

/// The identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is missing.
    #[error("{path} is missing: issue this host's identity with `vmferry-certs issue CADIR --name HOST --out {dir}`, or name its folder with --identity", path = path.display(), dir = dir.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The folder.
        dir: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no {what} in PEM form", path = path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// Others may read or change the key.
    #[error("{path} has mode {mode:03o}: anybody who read it can pose as this host; if nobody has, run `chmod 600 {path}`, else issue a new identity", path = path.display())]
    KeyExposed {
        /// The key.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The certificate has no usable name.
    #[error("{path} cannot be used", path = path.display())]
    Name {
        /// The certificate.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: CertificateNameError,
    },
    /// The certificate is not valid at this time.
    #[error("{path} is valid from {from} to {to}: {advice}", path = path.display())]
    NotValidNow {
        /// The certificate.
        path: PathBuf,
        /// Begin.
        from: String,
        /// End.
        to: String,
        /// What to do.
        advice: &'static str,
    },
    /// Certificate, key and CA do not belong together.
    #[error("the identity in {dir} does not hold together: issue it anew with `vmferry-certs issue`", dir = dir.display())]
    Unfit {
        /// The folder.
        dir: PathBuf,
        /// What does not fit.
        #[source]
        source: rustls::Error,
    },
    /// The CA's certificate cannot be used.
    #[error("{path} holds no usable CA certificate: {reason}", path = path.display())]
    BadAuthority {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Certificate, key and CA of this host.
pub struct Identity {
    dir: PathBuf,
    name: PeerName,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
    not_before: u64,
    not_after: u64,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("dir", &self.dir)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// Reads DIR/{cert.pem,key.pem,ca.pem} and refuses an identity that the peer would refuse: one that
    /// has expired, does not hold together or whose key others may have read. An end that is near is logged.
    pub fn load(dir: &Path) -> Result<Self, IdentityError> {
        let identity = Self::read(dir)?;
        identity.check(UnixTime::now())?;
        let left = identity.not_after.saturating_sub(UnixTime::now().as_secs());
        if left < EXPIRY_WARNING_SECS {
            tracing::warn!(
                certificate = %dir.join(CERTIFICATE_FILE).display(),
                expires = %moment(identity.not_after),
                "this host's certificate expires soon: issue a new one with `vmferry-certs issue`"
            );
        }
        Ok(identity)
    }

    /// Reads the three files without judging whether the peer will accept them.
    pub fn read(dir: &Path) -> Result<Self, IdentityError> {
        let certificate_path = dir.join(CERTIFICATE_FILE);
        let chain = certificates(dir, CERTIFICATE_FILE)?;
        let key_path = dir.join(KEY_FILE);
        let key_pem = read_file(dir, KEY_FILE)?;
        check_mode(&key_path)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| IdentityError::NotPem {
            path: key_path,
            what: "private key",
        })?;
        let roots = roots(dir)?;
        let name_error = |source| IdentityError::Name {
            path: certificate_path.clone(),
            source,
        };
        // `certificates` never returns an empty chain.
        let own = chain
            .first()
            .ok_or_else(|| name_error(CertificateNameError::Unreadable))?;
        let name = PeerName::of_certificate(own).map_err(name_error)?;
        let (not_before, not_after) =
            validity(own).ok_or_else(|| name_error(CertificateNameError::Unreadable))?;
        Ok(Self {
            dir: dir.to_owned(),
            name,
            chain,
            key,
            roots: Arc::new(roots),
            not_before,
            not_after,
        })
    }

    /// Judges the identity as a peer would at `now`.
    pub fn check(&self, now: UnixTime) -> Result<(), IdentityError> {
        let advice = if now.as_secs() < self.not_before {
            Some("it is not valid yet: check this host's clock")
        } else if now.as_secs() > self.not_after {
            Some("it has expired: issue a new one with `vmferry-certs issue`")
        } else {
            None
        };
        if let Some(advice) = advice {
            return Err(IdentityError::NotValidNow {
                path: self.dir.join(CERTIFICATE_FILE),
                from: moment(self.not_before),
                to: moment(self.not_after),
                advice,
            });
        }
        let unfit = |source| IdentityError::Unfit {
            dir: self.dir.clone(),
            source,
        };
        let signing = provider()
            .key_provider
            .load_private_key(self.key.clone_key())
            .map_err(unfit)?;
        let pair = rustls::sign::CertifiedKey::new(self.chain.clone(), signing);
        pair.keys_match().map_err(unfit)?;
        let verifier = self.client_verifier()?;
        if let Some((own, between)) = self.chain.split_first() {
            verifier
                .verify_client_cert(own, between, now)
                .map_err(unfit)?;
        }
        Ok(())
    }

    /// Name of this host.
    #[must_use]
    pub const fn name(&self) -> &PeerName {
        &self.name
    }

    /// Folder that it was read from.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// When the certificate expires, as text.
    #[must_use]
    pub fn expires(&self) -> String {
        moment(self.not_after)
    }

    /// A secret that nobody can tell without this host's key, and that is the same after a restart. `purpose` is a text that no other
    /// caller has.
    pub(crate) fn secret_for(&self, purpose: &'static str, of: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(self.key.secret_der());
        hasher.update(of);
        *hasher.finalize().as_bytes()
    }

    /// TLS configuration of the side that listens: every client must show a certificate of the CA.
    pub fn tls_server(&self) -> Result<rustls::ServerConfig, IdentityError> {
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.unfit(source))?
            .with_client_cert_verifier(self.client_verifier()?)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|source| self.unfit(source))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(config)
    }

    /// TLS configuration of the side that connects: it shows its certificate, and checks that of the server
    /// against the CA and the name that it connects to.
    pub fn tls_client(&self) -> Result<rustls::ClientConfig, IdentityError> {
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), provider())
                .build()
                .map_err(|error| self.bad_authority(&error))?;
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| self.unfit(source))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|source| self.unfit(source))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        Ok(config)
    }

    fn client_verifier(
        &self,
    ) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>, IdentityError> {
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), provider())
            .build()
            .map_err(|error| self.bad_authority(&error))
    }

    fn unfit(&self, source: rustls::Error) -> IdentityError {
        IdentityError::Unfit {
            dir: self.dir.clone(),
            source,
        }
    }

    fn bad_authority(&self, error: &dyn std::error::Error) -> IdentityError {
        IdentityError::BadAuthority {
            path: self.dir.join(CA_FILE),
            reason: error.to_string(),
        }
    }
}

/// The one cryptographic provider: named everywhere, since the process default is ambiguous as soon as
/// another dependency brings a second one. AES-128 comes first: every packet is encrypted, and AES-256 takes four rounds to its ten more.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    let first = |suite: &rustls::SupportedCipherSuite| {
        suite.suite() != rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
    };
    provider.cipher_suites.sort_by_key(first);
    Arc::new(provider)
}

fn read_file(dir: &Path, name: &str) -> Result<Vec<u8>, IdentityError> {
    let path = dir.join(name);
    fs::read(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => IdentityError::Missing {
            path,
            dir: dir.to_owned(),
        },
        _ => IdentityError::Io { path, source },
    })
}

fn certificates(dir: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read_file(dir, name)?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match parsed {
        Ok(list) if !list.is_empty() => Ok(list),
        Ok(_) | Err(_) => Err(IdentityError::NotPem {
            path: dir.join(name),
            what: "certificate",
        }),
    }
}

fn roots(dir: &Path) -> Result<RootCertStore, IdentityError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(dir, CA_FILE)? {
        roots
            .add(certificate)
            .map_err(|error| IdentityError::BadAuthority {
                path: dir.join(CA_FILE),
                reason: error.to_string(),
            })?;
    }
    Ok(roots)
}

/// A group may read the key (agents may run under a group of their own); nobody else may, and only the owner writes.
fn check_mode(path: &Path) -> Result<(), IdentityError> {
    let metadata = fs::metadata(path).map_err(|source| IdentityError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o037 == 0 {
        return Ok(());
    }
    Err(IdentityError::KeyExposed {
        path: path.to_owned(),
        mode,
    })
}

/// Begin and end in seconds since 1970; before that counts as 1970.
fn validity(certificate: &CertificateDer<'_>) -> Option<(u64, u64)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let seconds = |at: i64| u64::try_from(at).unwrap_or(0);
    let validity = parsed.validity();
    Some((
        seconds(validity.not_before.timestamp()),
        seconds(validity.not_after.timestamp()),
    ))
}

fn moment(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok())
        .map_or_else(
            || "far in the future".to_owned(),
            |at| at.strftime("%Y-%m-%d %H:%M UTC").to_string(),
        )
}
