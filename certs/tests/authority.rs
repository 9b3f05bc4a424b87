//! What the command and the library leave on the disk, and what they refuse.

#![allow(clippy::unwrap_used, reason = "a test may panic, its helpers too")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use vmferry_certs::{CertificateAuthority, CertsError, HostRequest, SubjectName, Validity};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn request(name: &str, addresses: &[&str]) -> HostRequest {
    HostRequest {
        name: name.to_owned(),
        addresses: addresses
            .iter()
            .map(|a| SubjectName::from_str(a).unwrap())
            .collect(),
        validity: Validity::days(30).unwrap(),
    }
}

fn certs(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_vmferry-certs"))
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.success(), text)
}

#[test]
fn the_command_makes_a_ca_and_identities_and_never_overwrites() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, out) = (dir.path().join("pki/ca"), dir.path().join("alpha"));
    let (ca_text, out_text) = (ca.to_str().unwrap(), out.to_str().unwrap());
    let (done, text) = certs(&["init", ca_text]);
    assert!(done, "{text}");
    assert!(
        text.contains("wrote") && text.contains("ca.key") && text.contains("UTC"),
        "{text}"
    );
    assert_eq!((mode(&ca.join("ca.key")), mode(&ca)), (0o600, 0o700));
    let before = fs::read(ca.join("ca.key")).unwrap();
    let (done, text) = certs(&["init", ca_text]);
    assert!(!done && text.contains("never overwritten"), "{text}");
    assert_eq!(fs::read(ca.join("ca.key")).unwrap(), before);

    let issue = [
        "issue",
        ca_text,
        "--name",
        "alpha",
        "--address",
        "192.0.2.7",
        "--address",
        "alpha.example.net",
        "--out",
        out_text,
    ];
    let (done, text) = certs(&issue);
    assert!(done, "{text}");
    assert_eq!(mode(&out.join("key.pem")), 0o600);
    let before = fs::read(out.join("key.pem")).unwrap();
    let (done, text) = certs(&issue);
    assert!(!done && text.contains("never overwritten"), "{text}");
    assert_eq!(fs::read(out.join("key.pem")).unwrap(), before);
    let (done, text) = certs(&["issue", out_text, "--name", "x", "--out", ca_text]);
    assert!(!done && text.contains("vmferry-certs init"), "{text}");
}

fn parse_pem(path: &Path) -> Vec<u8> {
    let text = fs::read(path).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&text).unwrap();
    pem.contents
}

#[test]
fn a_host_certificate_says_who_it_is_and_serves_both_roles() {
    let dir = tempfile::tempdir().unwrap();
    let ca =
        CertificateAuthority::create(&dir.path().join("ca"), Validity::days(100).unwrap()).unwrap();
    let out = dir.path().join("alpha");
    let wanted = request(
        "Alpha",
        &["192.0.2.7", "[2001:db8::7]", "alpha.example.net", "alpha"],
    );
    let issued = ca.authority.issue(&wanted, &out).unwrap();
    assert_eq!(issued.files.len(), 3);
    assert!(!issued.cut_to_authority);
    let der = parse_pem(&out.join("cert.pem"));
    let (_, certificate) = X509Certificate::from_der(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    let names: Vec<_> = names
        .value
        .general_names
        .iter()
        .map(|name| match name {
            GeneralName::DNSName(dns) => (*dns).to_owned(),
            GeneralName::IPAddress(bytes) => format!("{} bytes", bytes.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(names, ["alpha", "4 bytes", "16 bytes", "alpha.example.net"]);
    let usage = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.server_auth && usage.client_auth && !usage.any);
    assert!(!certificate.is_ca());
    let ca_der = parse_pem(&out.join("ca.pem"));
    let (_, authority) = X509Certificate::from_der(&ca_der).unwrap();
    certificate
        .verify_signature(Some(authority.public_key()))
        .unwrap();
    let constraints = authority.basic_constraints().unwrap().unwrap().value;
    assert!(constraints.ca);
    assert_eq!(constraints.path_len_constraint, Some(0));
    assert_eq!(certificate.issuer(), authority.subject());
    let key_id = |oid: &str| {
        certificate
            .extensions()
            .iter()
            .any(|e| e.oid.to_id_string() == oid)
    };
    assert!(key_id("2.5.29.35"), "authority key identifier");
    assert!(certificate.raw_serial().len() >= 8);
    let length = certificate.validity().not_after.timestamp()
        - certificate.validity().not_before.timestamp();
    assert_eq!(
        length,
        30 * 86_400 + 3600,
        "thirty days, and an hour for clocks that differ"
    );
}

#[test]
fn two_cas_have_two_names_and_hosts_do_not_outlive_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let one = CertificateAuthority::create(&dir.path().join("1"), Validity::days(3).unwrap())
        .unwrap()
        .authority;
    let two = CertificateAuthority::create(&dir.path().join("2"), Validity::days(3).unwrap())
        .unwrap()
        .authority;
    assert_ne!(one.name(), two.name());
    let loaded = CertificateAuthority::load(&dir.path().join("1")).unwrap();
    assert_eq!(
        (loaded.name(), loaded.certificate_pem()),
        (one.name(), one.certificate_pem())
    );
    let issued = loaded
        .issue(&request("alpha", &[]), &dir.path().join("a"))
        .unwrap();
    assert!(issued.cut_to_authority);
}

#[test]
fn bad_names_and_dates_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create(&dir.path().join("ca"), Validity::days(3).unwrap())
        .unwrap()
        .authority;
    let out = dir.path().join("out");
    for bad in [
        "",
        "a b",
        "-a",
        "a-",
        "a..b",
        ".a",
        "1.2.3.4",
        "ä",
        "a/b",
        "a_b",
        "*",
        &"x".repeat(64),
    ] {
        let error = ca.issue(&request(bad, &[]), &out).unwrap_err();
        assert!(
            matches!(error, CertsError::InvalidName { .. }),
            "{bad:?}: {error}"
        );
    }
    assert!(SubjectName::from_str("a b").is_err());
    assert!(Validity::days(0).is_err() && Validity::days(40_000).is_err());
    let valid = Validity::days(1).unwrap();
    let never = HostRequest {
        validity: Validity {
            not_before: valid.not_after,
            not_after: valid.not_before,
        },
        ..request("alpha", &[])
    };
    assert!(matches!(
        ca.issue(&never, &out),
        Err(CertsError::NeverValid { .. })
    ));
    assert!(!out.exists());
}

#[test]
fn a_partly_written_identity_is_not_left_behind() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::create(&dir.path().join("ca"), Validity::days(3).unwrap())
        .unwrap()
        .authority;
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    // A dangling link: seen by O_EXCL, not by a mere look whether the file exists.
    std::os::unix::fs::symlink("/nowhere/at/all", out.join("ca.pem")).unwrap();
    let error = ca.issue(&request("alpha", &[]), &out).unwrap_err();
    assert!(matches!(error, CertsError::Exists { .. }), "{error}");
    assert!(!out.join("key.pem").exists() && !out.join("cert.pem").exists());
}

#[test]
fn a_ca_whose_key_others_can_read_or_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("1"), dir.path().join("2"));
    CertificateAuthority::create(&one, Validity::days(3).unwrap()).unwrap();
    CertificateAuthority::create(&two, Validity::days(3).unwrap()).unwrap();
    fs::copy(one.join("ca.pem"), two.join("ca.pem")).unwrap();
    let error = CertificateAuthority::load(&two).unwrap_err();
    assert!(
        error.to_string().contains("does not belong to the ca.key"),
        "{error}"
    );
    fs::set_permissions(one.join("ca.key"), fs::Permissions::from_mode(0o640)).unwrap();
    let error = CertificateAuthority::load(&one).unwrap_err();
    assert!(
        matches!(error, CertsError::KeyExposed { mode: 0o640, .. }),
        "{error}"
    );
    fs::set_permissions(one.join("ca.key"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(one.join("ca.pem"), "rubbish").unwrap();
    assert!(matches!(
        CertificateAuthority::load(&one),
        Err(CertsError::BadAuthority { .. })
    ));
}

#[test]
fn an_expired_ca_issues_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let start = Validity::days(1).unwrap().not_before;
    let past = Validity {
        not_before: start - std::time::Duration::from_secs(7200),
        not_after: start - std::time::Duration::from_secs(3600),
    };
    CertificateAuthority::create(dir.path(), past).unwrap();
    let error = CertificateAuthority::load(dir.path()).unwrap_err();
    assert!(
        matches!(error, CertsError::AuthorityExpired { .. }),
        "{error}"
    );
}
