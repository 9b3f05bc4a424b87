//! The CA itself: how it is made, read back, and how it issues host identities.
//!
//! Every CA has a name of its own: two CAs of one name make a refused certificate look like a broken
//! signature. Host certificates serve both roles (a host sends today and receives tomorrow), carry the
//! host's name as a DNS name and never outlive their CA.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::{Duration, OffsetDateTime};

use crate::error::CertsError;
use crate::files::{self, CA_CERTIFICATE, CA_KEY, HOST_CERTIFICATE, HOST_KEY, NewFile};

/// How long a CA lives unless told otherwise: ten years.
pub const CA_LIFETIME: Duration = Duration::days(3650);
/// How long a host certificate lives unless told otherwise: one year.
pub const HOST_LIFETIME: Duration = Duration::days(365);
/// Clocks of hosts differ; a certificate issued now must be valid on a host that is a little behind.
const CLOCK_SKEW: Duration = Duration::HOUR;
/// A hundred years: far beyond any use, and well inside what a certificate can express.
const MAX_DAYS: u32 = 36_500;

/// From when to when a certificate is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First moment.
    pub not_before: OffsetDateTime,
    /// Last moment.
    pub not_after: OffsetDateTime,
}

impl Validity {
    /// From an hour ago (clocks differ) until `lifetime` from now.
    #[must_use]
    pub fn from_now(lifetime: Duration) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            not_before: now.saturating_sub(CLOCK_SKEW),
            not_after: now.saturating_add(lifetime),
        }
    }

    /// From an hour ago until `days` days from now.
    pub fn days(days: u32) -> Result<Self, CertsError> {
        if days == 0 || days > MAX_DAYS {
            return Err(CertsError::InvalidDays {
                days,
                max: MAX_DAYS,
            });
        }
        Ok(Self::from_now(Duration::days(i64::from(days))))
    }

    fn checked(self) -> Result<Self, CertsError> {
        if self.not_before < self.not_after {
            Ok(self)
        } else {
            Err(CertsError::NeverValid {
                from: moment(self.not_before),
                to: moment(self.not_after),
            })
        }
    }
}

impl fmt::Display for Validity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} to {}",
            moment(self.not_before),
            moment(self.not_after)
        )
    }
}

/// `2026-11-22 18:05 UTC`.
fn moment(at: OffsetDateTime) -> String {
    let at = at.to_offset(time::UtcOffset::UTC);
    format!("{} {:02}:{:02} UTC", at.date(), at.hour(), at.minute())
}

/// A further name or address under which a host can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubjectName {
    /// A DNS name.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
}

impl FromStr for SubjectName {
    type Err = CertsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        match bare.unwrap_or(text).parse() {
            Ok(ip) => Ok(Self::Ip(ip)),
            Err(_) => host_name(text).map(Self::Dns),
        }
    }
}

impl fmt::Display for SubjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

/// Checks a host name and brings it into lower case, as names are compared without regard to case.
fn host_name(text: &str) -> Result<String, CertsError> {
    let label_fits = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    // All digits and dots would be taken for an (impossible) address by every client.
    let numeric = text
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    if text.len() <= 253 && !numeric && text.split('.').all(label_fits) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(CertsError::InvalidName {
            name: text.chars().take(80).collect(),
        })
    }
}

/// A host for which an identity is wanted.
#[derive(Debug, Clone)]
pub struct HostRequest {
    /// Its name: how other hosts know it (`from = ["NAME"]` in guest files).
    pub name: String,
    /// Further names and addresses under which it is reached.
    pub addresses: Vec<SubjectName>,
    /// From when to when; cut to the CA's end.
    pub validity: Validity,
}

/// What was written and how long it is valid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The files, in the order in which they were written.
    pub files: Vec<PathBuf>,
    /// The certificate's validity.
    pub validity: Validity,
    /// Whether the validity was cut to the CA's end.
    pub cut_to_authority: bool,
}

/// A CA that was just made: the CA and what was written.
#[derive(Debug)]
pub struct Authority {
    /// The CA, ready to issue.
    pub authority: CertificateAuthority,
    /// What was written.
    pub issued: Issued,
}

/// A private CA that can issue.
pub struct CertificateAuthority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
    name: String,
    validity: Validity,
}

impl fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("name", &self.name)
            .field("validity", &self.validity)
            .finish_non_exhaustive()
    }
}

impl CertificateAuthority {
    /// Makes a CA in `dir` (`ca.pem`, `ca.key`); nothing is overwritten.
    pub fn create(dir: &Path, validity: Validity) -> Result<Authority, CertsError> {
        let validity = validity.checked()?;
        let crypto = |source| CertsError::Crypto {
            what: "the CA",
            source,
        };
        let key = KeyPair::generate().map_err(crypto)?;
        let name = authority_name(&key);
        let params = authority_params(&name, validity);
        let certificate = params.self_signed(&key).map_err(crypto)?;
        let certificate_pem = certificate.pem();
        let files = files::write_all(
            dir,
            &[
                NewFile {
                    name: CA_KEY,
                    content: &key.serialize_pem(),
                    secret: true,
                },
                NewFile {
                    name: CA_CERTIFICATE,
                    content: &certificate_pem,
                    secret: false,
                },
            ],
        )?;
        Ok(Authority {
            authority: Self {
                certificate_pem,
                issuer: Issuer::new(params, key),
                name,
                validity,
            },
            issued: Issued {
                files,
                validity,
                cut_to_authority: false,
            },
        })
    }

    /// Reads the CA in `dir` and checks that its key is private, belongs to it and is still good.
    pub fn load(dir: &Path) -> Result<Self, CertsError> {
        let (certificate_pem, key_pem) = files::read_authority(dir)?;
        let bad = |file: &str, problem: &str| CertsError::BadAuthority {
            path: dir.join(file),
            problem: problem.to_owned(),
        };
        let key = KeyPair::from_pem(&key_pem)
            .map_err(|_| bad(CA_KEY, "does not hold a private key in PEM form"))?;
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| bad(CA_CERTIFICATE, "does not hold a certificate in PEM form"))?;
        let (name, validity) = inspect_authority(&der, &key).map_err(|p| bad(CA_CERTIFICATE, p))?;
        let now = OffsetDateTime::now_utc();
        if now < validity.not_before || now >= validity.not_after {
            return Err(CertsError::AuthorityExpired {
                dir: dir.to_owned(),
                from: moment(validity.not_before),
                to: moment(validity.not_after),
            });
        }
        let issuer = Issuer::from_ca_cert_der(&der, key)
            .map_err(|_| bad(CA_CERTIFICATE, "does not hold a CA certificate"))?;
        Ok(Self {
            certificate_pem,
            issuer,
            name,
            validity,
        })
    }

    /// The CA's own name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The CA's certificate in PEM form.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Issues an identity for a host into `out` (`cert.pem`, `key.pem`, `ca.pem`); nothing is overwritten.
    pub fn issue(&self, host: &HostRequest, out: &Path) -> Result<Issued, CertsError> {
        let cut_to_authority = host.validity.not_after > self.validity.not_after;
        let validity = Validity {
            not_before: host.validity.not_before,
            not_after: host.validity.not_after.min(self.validity.not_after),
        }
        .checked()?;
        let crypto = |source| CertsError::Crypto {
            what: "the host certificate",
            source,
        };
        let key = KeyPair::generate().map_err(crypto)?;
        let certificate = host_params(host, validity)?
            .signed_by(&key, &self.issuer)
            .map_err(crypto)?;
        let files = files::write_all(
            out,
            &[
                NewFile {
                    name: HOST_KEY,
                    content: &key.serialize_pem(),
                    secret: true,
                },
                NewFile {
                    name: HOST_CERTIFICATE,
                    content: &certificate.pem(),
                    secret: false,
                },
                NewFile {
                    name: CA_CERTIFICATE,
                    content: &self.certificate_pem,
                    secret: false,
                },
            ],
        )?;
        Ok(Issued {
            files,
            validity,
            cut_to_authority,
        })
    }
}

/// A name that no other CA has: it carries the beginning of its public key.
fn authority_name(key: &KeyPair) -> String {
    let raw = key.public_key_raw();
    // The first byte of an uncompressed point is always 4; the coordinates behind it are random.
    let tag: String = raw
        .iter()
        .skip(1)
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect();
    format!("vmferry private CA {tag}")
}

fn authority_params(name: &str, validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    params
}

fn host_params(host: &HostRequest, validity: Validity) -> Result<CertificateParams, CertsError> {
    let name = host_name(&host.name)?;
    let mut names = vec![SubjectName::Dns(name.clone())];
    for address in &host.addresses {
        if !names.contains(address) {
            names.push(address.clone());
        }
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&name);
    params.subject_alt_names = names
        .into_iter()
        .map(alternative_name)
        .collect::<Result<_, _>>()?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    Ok(params)
}

fn alternative_name(name: SubjectName) -> Result<SanType, CertsError> {
    match name {
        SubjectName::Ip(ip) => Ok(SanType::IpAddress(ip)),
        SubjectName::Dns(name) => host_name(&name)?
            .as_str()
            .try_into()
            .map(SanType::DnsName)
            .map_err(|_| CertsError::InvalidName { name }),
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Name and validity of the CA certificate, or what is wrong with it.
fn inspect_authority(
    der: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<(String, Validity), &'static str> {
    let (_, parsed) = x509_parser::parse_x509_certificate(der)
        .map_err(|_| "does not hold a readable certificate")?;
    if !parsed.is_ca() {
        return Err("is not a CA's certificate");
    }
    if parsed.public_key().raw != key.subject_public_key_info() {
        return Err("does not belong to the ca.key beside it");
    }
    let name = parsed
        .subject()
        .iter_common_name()
        .next()
        .and_then(|cn| cn.as_str().ok())
        .ok_or("has no common name")?
        .to_owned();
    let validity = Validity {
        not_before: parsed.validity().not_before.to_datetime(),
        not_after: parsed.validity().not_after.to_datetime(),
    };
    Ok((name, validity))
}
