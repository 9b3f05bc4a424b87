//! What a source agent leaves for the one that comes after it, should it be killed in the copy.
//!
//! Owns two files of the run folder: the mapped ledger (`ledger_file`), which holds what is dirty or in flight at every
//! moment, and a record that says what it belongs to: migration, process, regions, and the tracking descriptor inside the
//! hypervisor. The record is written when the tracking has begun, so a ledger without one counts for nothing. Whether what
//! is found may be used is decided here and told by name; the fallback (a fresh tracking) is the caller's.
//!
//! The files survive the death of a process, not of the machine, and need not: that takes the guest with it.
//!
//! A mapping was chosen over plain writes, as each frame and each piece of a scan changes a few words in several places: a few stores
//! here, and as many system calls there.

mod ledger_file;
mod words;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmferry_common::causes::chain;
use vmferry_common::journal::{JournalError, JournalReadError, RecordFile};
use vmferry_common::state::{new_incarnation, run_dir};
use vmferry_common::storage::{Files, Storage};
use vmferry_common::units::Size;
use vmferry_hypervisor::{SourceGuest, TrackingLeft};
use vmferry_proto::handover::{ProcessRecord, SourceRecord};
use vmferry_proto::ids::{GuestName, MigrationId};
use vmferry_proto::ledger::{Ledger, LedgerError};
use vmferry_proto::spec::RegionSpec;

pub use ledger_file::LedgerFile;

/// Layout version of the record and of the ledger that it speaks of.
const VERSION: u32 = 1;

/// What a ledger belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Belonging {
    migration: MigrationId,
    process: ProcessRecord,
    regions: Vec<RegionSpec>,
    tracking: TrackingLeft,
    /// Drawn for this ledger: it begins with the same.
    ledger: [u8; 16],
}

/// Where the files of a guest are.
#[derive(Debug, Clone)]
pub struct DurableFiles {
    storage: Arc<dyn Storage>,
    ledger: PathBuf,
    record: RecordFile<Belonging>,
}

/// A ledger that is being written down, not in force before [`DurableFiles::put_in_force`].
#[derive(Debug)]
pub struct Begun {
    /// The file.
    pub file: Arc<LedgerFile>,
    id: [u8; 16],
}

/// What an agent keeps for one that comes after it, and was left by one before.
#[derive(Debug)]
pub struct Keeping {
    /// Where it is kept.
    pub files: DurableFiles,
    /// The ledger of an agent before this one, whose tracking was taken over.
    pub taken_over: Option<Ledger>,
    /// What people should know of that.
    pub about: Option<String>,
}

/// Takes over what was left, if anything was looked for, or says why not; then the tracking begins again, and
/// what the destination kept is compared.
pub async fn take_over(
    files: DurableFiles,
    left: Option<Result<Left, NotUsable>>,
    guest: &mut dyn SourceGuest,
) -> Keeping {
    let taken = match left {
        None => {
            return Keeping {
                files,
                taken_over: None,
                about: None,
            };
        }
        Some(Ok(left)) => left.take_over(guest).await,
        Some(Err(error)) => Err(error),
    };
    let (taken_over, about) = match taken {
        Ok(ledger) => {
            // What was under way may have arrived: the destination says so later.
            let under_way = ledger.in_flight().amount.bytes + ledger.unflushed().amount.bytes;
            let left = Size(ledger.dirty(None).all.bytes + under_way);
            let text = format!(
                "an agent before this one was killed in the copy: going on with what it left, at most {left} to send"
            );
            (Some(ledger), text)
        }
        Err(error) => {
            let text = format!(
                "an agent before this one was killed and cannot be gone on with ({}): everything is looked at again",
                chain(&error)
            );
            (None, text)
        }
    };
    Keeping {
        files,
        taken_over,
        about: Some(about),
    }
}

/// What an earlier agent left.
#[derive(Debug)]
pub struct Left {
    belonging: Belonging,
    file: Arc<LedgerFile>,
}

/// Why what an earlier agent left is not gone on with.
#[derive(Debug, thiserror::Error)]
pub enum NotUsable {
    /// It left nothing.
    #[error("it left no ledger")]
    Nothing,
    /// The record is torn, foreign or of another version.
    #[error("its record cannot be used")]
    Record(#[from] JournalReadError),
    /// It is of another migration.
    #[error("{path} is of migration {found}", path = path.display())]
    OtherMigration {
        /// The record.
        path: PathBuf,
        /// Its migration.
        found: MigrationId,
    },
    /// The guest's process is another one than then.
    #[error("the guest was process {then} then and is process {now}")]
    OtherProcess {
        /// Then.
        then: u32,
        /// Now.
        now: u32,
    },
    /// The guest's regions are others.
    #[error("the guest's memory or disks are not those of its ledger")]
    OtherRegions,
    /// The ledger cannot be read, or is not the one of the record.
    #[error("{path} cannot be used", path = path.display())]
    Ledger {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It holds what no agent writes.
    #[error("its ledger holds what cannot be")]
    Content(#[from] LedgerError),
    /// The hypervisor's part of it is gone.
    #[error("its tracking cannot be gone on with")]
    Tracking(#[from] vmferry_hypervisor::GuestError),
}

/// A ledger cannot be written down: a killed agent could not be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten {
    /// The file.
    #[error("cannot make {path}: is the file system full?", path = path.display())]
    Ledger {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record.
    #[error(transparent)]
    Record(#[from] JournalError),
    /// Random numbers.
    #[error(transparent)]
    State(#[from] vmferry_common::state::StateError),
    /// The copy has begun already: a bug.
    #[error("the ledger was begun too late")]
    TooLate(#[from] LedgerError),
}

impl DurableFiles {
    /// Those of guest `name` under the state folder `state`.
    #[must_use]
    pub fn new(state: &Path, name: &GuestName) -> Self {
        Self::on(Arc::new(Files), &run_dir(state), name)
    }

    /// Those of guest `name` in `folder`, which is in `storage`.
    #[must_use]
    pub fn on(storage: Arc<dyn Storage>, folder: &Path, name: &GuestName) -> Self {
        let record = folder.join(format!("{name}.source.tracking"));
        Self {
            ledger: folder.join(format!("{name}.source.ledger")),
            record: RecordFile::on(storage.clone(), record, VERSION),
            storage,
        }
    }

    /// What an earlier agent left of the migration that `journal` tells of.
    ///
    /// # Errors
    /// Why it is of no use.
    pub fn find(&self, journal: &SourceRecord) -> Result<Left, NotUsable> {
        let belonging = self.record.read()?.ok_or(NotUsable::Nothing)?;
        if belonging.migration != journal.migration {
            return Err(NotUsable::OtherMigration {
                path: self.record.path().to_owned(),
                found: belonging.migration,
            });
        }
        if belonging.process != journal.process {
            return Err(NotUsable::OtherProcess {
                then: belonging.process.pid,
                now: journal.process.pid,
            });
        }
        let file = LedgerFile::open(
            &*self.storage,
            &self.ledger,
            belonging.ledger,
            &belonging.regions,
        );
        let file = file.map_err(|source| NotUsable::Ledger {
            path: self.ledger.clone(),
            source,
        })?;
        Ok(Left {
            belonging,
            file: Arc::new(file),
        })
    }

    /// Begins a ledger of `regions`; what was left before is not in force any more.
    ///
    /// # Errors
    /// No space, as a rule.
    pub fn begin(&self, regions: &[RegionSpec]) -> Result<Begun, NotWritten> {
        self.record.remove()?;
        let id = *new_incarnation()?.as_bytes();
        let file = LedgerFile::create(&*self.storage, &self.ledger, id, regions);
        let file = file.map_err(|source| NotWritten::Ledger {
            path: self.ledger.clone(),
            source,
        })?;
        Ok(Begun {
            file: Arc::new(file),
            id,
        })
    }

    /// From here on a later agent can go on with `begun`.
    ///
    /// # Errors
    /// The file system.
    pub fn put_in_force(
        &self,
        begun: &Begun,
        journal: &SourceRecord,
        regions: &[RegionSpec],
        tracking: TrackingLeft,
    ) -> Result<(), NotWritten> {
        let belonging = Belonging {
            migration: journal.migration,
            process: journal.process.clone(),
            regions: regions.to_vec(),
            tracking,
            ledger: begun.id,
        };
        Ok(self.record.write(&belonging)?)
    }

    /// Removes both files; those that are not there are no error.
    pub fn remove(&self) {
        if let Err(error) = self.record.remove() {
            tracing::warn!(%error, "a record of the run folder is left");
        }
        match self.storage.remove(&self.ledger) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, path = %self.ledger.display(), "a ledger is left");
            }
            Ok(()) | Err(_) => {}
        }
    }
}

impl Left {
    /// Takes the tracking of `guest` over, and returns the ledger as it was left.
    ///
    /// # Errors
    /// Why that is not possible; then the tracking that was left is ended.
    pub async fn take_over(self, guest: &mut dyn SourceGuest) -> Result<Ledger, NotUsable> {
        let taken = self.try_take_over(guest).await;
        if taken.is_err()
            && let Err(error) = guest.stop_tracking().await
        {
            tracing::warn!(%error, "the tracking that an earlier agent left could not be ended");
        }
        taken
    }

    async fn try_take_over(self, guest: &mut dyn SourceGuest) -> Result<Ledger, NotUsable> {
        let Self { belonging, file } = self;
        let now = guest.process();
        let then = &belonging.process;
        if (now.pid, now.start_ticks, &now.boot_id) != (then.pid, then.start_ticks, &then.boot_id) {
            return Err(NotUsable::OtherProcess {
                then: then.pid,
                now: now.pid,
            });
        }
        if guest.spec().regions != belonging.regions {
            return Err(NotUsable::OtherRegions);
        }
        file.heal();
        let image = file.image();
        let ledger = Ledger::restore(&belonging.regions, image, Box::new(file.writer()))?;
        guest.keep_marks(file);
        guest.resume_tracking(&belonging.tracking).await?;
        Ok(ledger)
    }
}
