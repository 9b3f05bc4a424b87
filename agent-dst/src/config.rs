//! The guest files of this host: which guests may arrive here, from whom, and how each is launched.
//!
//! Owns finding and reading the files (one file, or a folder of `*.toml`); their format belongs to
//! `vmferry_hypervisor::config`. The files are read again for each guest that knocks, so an edit counts without a
//! restart. A name that two files claim is refused, whichever file was read first.

use std::io;
use std::path::{Path, PathBuf};

use vmferry_hypervisor::config::{DriverKind, TargetConfig};
use vmferry_proto::ids::GuestName;

/// Most guest files that are read from one folder: a wrong `--guests /` ends here and not in the whole disk.
const MAX_FILES: usize = 4096;
/// Longest guest file that is read.
const MAX_FILE_LEN: u64 = 1 << 20;

/// Where the guest files are: one file, or a folder of them.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    path: PathBuf,
}

/// A guest file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file or folder cannot be read.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not a guest file.
    #[error("{} is not a guest file", path.display())]
    Malformed {
        /// Which one.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The file is far too long for a guest file.
    #[error("{} is {len} bytes long; a guest file has at most {MAX_FILE_LEN}", path.display())]
    TooLong {
        /// Which one.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
    /// The folder holds too many files.
    #[error("{} holds more than {MAX_FILES} guest files; name the folder that holds only those", path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
    /// A key that the driver needs is not there.
    #[error("{}: driver {driver:?} needs the key {key:?}; add it", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The driver.
        driver: DriverKind,
    },
    /// `launch = []`.
    #[error("{}: `launch` is empty; name a program, or leave it out if the hypervisor is already there", path.display())]
    EmptyLaunch {
        /// The file.
        path: PathBuf,
    },
    /// Two files claim one name.
    #[error("guest {name} is in both {} and {}; remove one", first.display(), second.display())]
    Duplicate {
        /// The guest.
        name: GuestName,
        /// One file.
        first: PathBuf,
        /// The other one.
        second: PathBuf,
    },
}

/// What the guest files say of one name.
#[derive(Debug)]
pub enum Lookup {
    /// Exactly one file has it.
    Found(Box<TargetConfig>),
    /// No file has it; `unusable` files could not be read, and may be the reason.
    Unknown {
        /// Files that could not be used.
        unusable: Vec<ConfigError>,
    },
}

impl GuestFiles {
    /// Guest files at `path`; nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where they are.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads all of them.
    ///
    /// # Errors
    /// The first file that cannot be used, or two that claim one name.
    pub fn load(&self) -> Result<Vec<TargetConfig>, ConfigError> {
        let mut seen: Vec<(PathBuf, TargetConfig)> = Vec::new();
        for path in self.paths()? {
            let guest = read(&path)?;
            if let Some((first, _)) = seen.iter().find(|(_, other)| other.name == guest.name) {
                return Err(duplicate(&guest.name, first, &path));
            }
            seen.push((path, guest));
        }
        Ok(seen.into_iter().map(|(_, guest)| guest).collect())
    }

    /// Reads them again and finds `name`. A file of another guest that cannot be used does not stand in the way.
    ///
    /// # Errors
    /// The folder cannot be read, or two files claim this name.
    pub fn find(&self, name: &GuestName) -> Result<Lookup, ConfigError> {
        let mut unusable = Vec::new();
        let mut found: Option<(PathBuf, TargetConfig)> = None;
        for path in self.paths()? {
            match (read(&path), &found) {
                (Err(error), _) => unusable.push(error),
                (Ok(guest), _) if guest.name != *name => {}
                (Ok(_), Some((first, _))) => return Err(duplicate(name, first, &path)),
                (Ok(guest), None) => found = Some((path, guest)),
            }
        }
        Ok(match found {
            Some((_, guest)) => Lookup::Found(Box::new(guest)),
            None => Lookup::Unknown { unusable },
        })
    }

    /// The files, sorted by name, so that messages are the same from run to run.
    fn paths(&self) -> Result<Vec<PathBuf>, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable {
            path: self.path.clone(),
            source,
        };
        if !std::fs::metadata(&self.path).map_err(unreadable)?.is_dir() {
            return Ok(vec![self.path.clone()]);
        }
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if is_guest_file(&path) {
                paths.push(path);
            }
            if paths.len() > MAX_FILES {
                return Err(ConfigError::TooMany {
                    path: self.path.clone(),
                });
            }
        }
        paths.sort();
        Ok(paths)
    }
}

/// `*.toml`, but not an editor's hidden copy of one.
fn is_guest_file(path: &Path) -> bool {
    let hidden = path
        .file_name()
        .is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden
        && path
            .extension()
            .is_some_and(|extension| extension == "toml")
}

fn read(path: &Path) -> Result<TargetConfig, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let len = std::fs::metadata(path).map_err(unreadable)?.len();
    if len > MAX_FILE_LEN {
        return Err(ConfigError::TooLong {
            path: path.to_owned(),
            len,
        });
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    let guest: TargetConfig = toml::from_str(&text).map_err(|source| ConfigError::Malformed {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    check(path, &guest)?;
    Ok(guest)
}

/// What the format itself cannot say: each driver needs its socket, and a launch needs a program.
fn check(path: &Path, guest: &TargetConfig) -> Result<(), ConfigError> {
    let (key, given) = match guest.driver {
        DriverKind::Qemu => ("qmp", guest.qmp.is_some()),
        DriverKind::Sim => ("socket", guest.socket.is_some()),
    };
    if !given {
        return Err(ConfigError::MissingKey {
            path: path.to_owned(),
            key,
            driver: guest.driver,
        });
    }
    if guest.launch.as_ref().is_some_and(Vec::is_empty) {
        return Err(ConfigError::EmptyLaunch {
            path: path.to_owned(),
        });
    }
    Ok(())
}

fn duplicate(name: &GuestName, first: &Path, second: &Path) -> ConfigError {
    ConfigError::Duplicate {
        name: name.clone(),
        first: first.to_owned(),
        second: second.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, GuestFiles) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        let guests = GuestFiles::new(dir.path());
        (dir, guests)
    }

    const WEB: &str =
        "name = 'web-1'\ndriver = 'sim'\nsocket = '/run/web-1.sock'\nfrom = ['alpha']\n";

    #[test]
    fn an_edit_counts_at_the_next_look() {
        let (dir, guests) = folder(&[]);
        let name = "web-1".parse().unwrap();
        assert!(
            matches!(guests.find(&name).unwrap(), Lookup::Unknown { unusable } if unusable.is_empty())
        );
        std::fs::write(dir.path().join("web.toml"), WEB).unwrap();
        let Lookup::Found(guest) = guests.find(&name).unwrap() else {
            panic!("the new file was not read");
        };
        assert_eq!(guest.from, ["alpha"]);
    }

    #[test]
    fn one_file_is_as_good_as_a_folder() {
        let (dir, _) = folder(&[("web.toml", WEB)]);
        let guests = GuestFiles::new(dir.path().join("web.toml"));
        assert_eq!(guests.load().unwrap().len(), 1);
    }

    #[test]
    fn a_name_in_two_files_is_refused_both_ways() {
        let (_dir, guests) = folder(&[("a.toml", WEB), ("b.toml", WEB)]);
        assert!(matches!(guests.load(), Err(ConfigError::Duplicate { .. })));
        let found = guests.find(&"web-1".parse().unwrap());
        assert!(
            matches!(found, Err(ConfigError::Duplicate { .. })),
            "{found:?}"
        );
    }

    #[test]
    fn a_broken_file_of_another_guest_does_not_stand_in_the_way() {
        let (_dir, guests) = folder(&[("a.toml", "name = "), ("web.toml", WEB)]);
        assert!(guests.load().is_err());
        let found = guests.find(&"web-1".parse().unwrap()).unwrap();
        assert!(matches!(found, Lookup::Found(_)));
        let missing = guests.find(&"db-1".parse().unwrap()).unwrap();
        assert!(matches!(missing, Lookup::Unknown { unusable } if unusable.len() == 1));
    }

    #[test]
    fn only_toml_files_that_are_not_hidden_are_read() {
        let (_dir, guests) = folder(&[("web.toml", WEB), (".web.toml", WEB), ("web.toml~", WEB)]);
        assert_eq!(guests.load().unwrap().len(), 1);
    }

    #[test]
    fn each_driver_needs_its_socket_and_a_launch_its_program() {
        let (_dir, qemu) = folder(&[("a.toml", "name = 'a'\ndriver = 'qemu'\n")]);
        assert!(matches!(
            qemu.load(),
            Err(ConfigError::MissingKey { key: "qmp", .. })
        ));
        let (_dir, empty) = folder(&[("a.toml", &format!("{WEB}launch = []\n"))]);
        assert!(matches!(empty.load(), Err(ConfigError::EmptyLaunch { .. })));
    }
}
