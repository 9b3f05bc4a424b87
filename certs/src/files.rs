//! The files of a CA and of an identity, and how they are written.
//!
//! Every file is made with `O_EXCL`, keys with mode 0600 from the first moment. Either all files of one
//! command are there afterwards, or none of them.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::CertsError;

/// Certificate of the CA, in its own folder and in every identity.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// Key of the CA.
pub const CA_KEY: &str = "ca.key";
/// Certificate of a host.
pub const HOST_CERTIFICATE: &str = "cert.pem";
/// Key of a host.
pub const HOST_KEY: &str = "key.pem";

/// A file to be written.
pub(crate) struct NewFile<'a> {
    pub(crate) name: &'static str,
    pub(crate) content: &'a str,
    pub(crate) secret: bool,
}

/// Writes all `files` into `dir`, which is made (mode 0700) where it is missing, or none of them.
pub(crate) fn write_all(dir: &Path, files: &[NewFile<'_>]) -> Result<Vec<PathBuf>, CertsError> {
    refuse_existing(dir, files)?;
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| io_error("create folder", dir, source))?;
    let mut written = Vec::new();
    for file in files {
        let path = dir.join(file.name);
        match write_new(&path, file) {
            Ok(()) => written.push(path),
            Err(error) => {
                // What this call made itself; nobody can have used it yet.
                written.iter().for_each(|path| drop(fs::remove_file(path)));
                return Err(error);
            }
        }
    }
    let sync = fs::File::open(dir).and_then(|folder| folder.sync_all());
    sync.map_err(|source| io_error("write folder", dir, source))?;
    Ok(written)
}

fn refuse_existing(dir: &Path, files: &[NewFile<'_>]) -> Result<(), CertsError> {
    for file in files {
        let path = dir.join(file.name);
        // symlink_metadata: a dangling link is in the way as well.
        if fs::symlink_metadata(&path).is_ok() {
            return Err(CertsError::Exists { path });
        }
    }
    Ok(())
}

fn write_new(path: &Path, file: &NewFile<'_>) -> Result<(), CertsError> {
    let mode = if file.secret { 0o600 } else { 0o644 };
    let mut open = OpenOptions::new();
    open.write(true).create_new(true).mode(mode);
    let mut handle = open.open(path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CertsError::Exists {
            path: path.to_owned(),
        },
        _ => io_error("create", path, source),
    })?;
    let result = handle
        .write_all(file.content.as_bytes())
        .and_then(|()| handle.sync_all());
    result.map_err(|source| {
        drop(fs::remove_file(path));
        io_error("write", path, source)
    })
}

/// Reads the CA's two files: certificate and key.
pub(crate) fn read_authority(dir: &Path) -> Result<(String, String), CertsError> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => CertsError::NoAuthority {
                dir: dir.to_owned(),
                source,
            },
            _ => io_error("read", &path, source),
        })
    };
    let certificate = read(CA_CERTIFICATE)?;
    let key_path = dir.join(CA_KEY);
    let key = read(CA_KEY)?;
    let mode = fs::metadata(&key_path)
        .map_err(|source| io_error("read", &key_path, source))?
        .permissions()
        .mode()
        & 0o777;
    if mode & 0o077 != 0 {
        return Err(CertsError::KeyExposed {
            path: key_path,
            mode,
        });
    }
    Ok((certificate, key))
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> CertsError {
    CertsError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}
