//! What a destination agent leaves for the one that comes after it, should it be killed.
//!
//! Owns two files in the guest's folder: the record of the copy (whose it is, which incarnations its regions have) and the
//! mapped *applied* file: which blocks were received, and how far each lane of the last session is. A frame is noted
//! there when it is written to the copy, so what is not noted is sent again, and completeness is never claimed for it.
//! Both belong to the copy and go with its folder. They survive the death of the agent, and need not survive
//! the host's: the copy's memory does not.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmferry_common::journal::{JournalReadError, RecordFile};
use vmferry_common::state::new_incarnation;
use vmferry_common::storage::{Storage, Words};
use vmferry_proto::geometry::{RegionBits, WindowBits, WindowIndex};
use vmferry_proto::handover::ProcessRecord;
use vmferry_proto::ids::{FrameSeq, Incarnation, Lane, MigrationId, RegionId, SessionNumber};
use vmferry_proto::limits::MAX_LANES;
use vmferry_proto::message::{LaneProgress, ResumePoint};
use vmferry_proto::spec::{GuestSpec, RegionSpec};

/// Layout version of both files.
const VERSION: u32 = 2;
/// What the applied file begins with.
const MAGIC: u64 = u64::from_le_bytes(*b"vmfAppl1");
const MAGIC_AT: usize = 0;
/// Two words: drawn for this file, and named by the record.
const ID_AT: usize = 1;
const SESSION_AT: usize = 3;
const LANES_AT: usize = 4;
const HEADER: usize = 8;
/// Words of a lane: applied, flushed.
const LANE: usize = 2;
/// Words of a window.
const WINDOW: usize = 8;

/// Whose copy it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopyRecord {
    pub(crate) migration: MigrationId,
    pub(crate) spec: GuestSpec,
    pub(crate) incarnations: Vec<Incarnation>,
    /// The process that holds it. Another one may be at work by now, with the same disks and an empty memory.
    pub(crate) process: Option<ProcessRecord>,
    /// The applied file that belongs to it.
    applied: [u8; 16],
}

/// Why what was left is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotUsable {
    #[error("there is no record of it")]
    Nothing,
    #[error("its record cannot be used")]
    Record(#[from] JournalReadError),
    #[error("it is of migration {0}")]
    OtherMigration(MigrationId),
    #[error("{path} cannot be used", path = path.display())]
    Applied {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// What an earlier agent left of a copy.
#[derive(Debug)]
pub(crate) struct CopyFiles {
    pub(crate) record: CopyRecord,
    pub(crate) applied: Arc<Applied>,
}

/// A guest's folder.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) path: PathBuf,
}

impl Folder {
    fn record(&self) -> RecordFile<CopyRecord> {
        RecordFile::on(self.storage.clone(), self.path.join("copy"), VERSION)
    }

    fn applied(&self) -> PathBuf {
        self.path.join("applied")
    }

    /// Removes the notes of a copy that nobody will go on with. They are small, and harmless where that fails.
    pub(crate) fn remove_notes(&self) {
        if let Err(error) = self.record().remove() {
            tracing::debug!(%error, "the record of a copy is left");
        }
        drop(self.storage.remove(&self.applied()));
    }
}

impl CopyFiles {
    /// Finds what was left in `folder` of `migration`.
    pub(crate) fn find(folder: &Folder, migration: MigrationId) -> Result<Self, NotUsable> {
        let record = folder.record().read()?.ok_or(NotUsable::Nothing)?;
        if record.migration != migration {
            return Err(NotUsable::OtherMigration(record.migration));
        }
        let path = folder.applied();
        match Applied::open(
            &*folder.storage,
            &path,
            record.applied,
            &record.spec.regions,
        ) {
            Ok(applied) => Ok(Self {
                record,
                applied: Arc::new(applied),
            }),
            Err(source) => Err(NotUsable::Applied { path, source }),
        }
    }

    /// Begins the files of a fresh copy; not in force before [`put_in_force`](Self::put_in_force).
    pub(crate) fn begin(
        folder: &Folder,
        migration: MigrationId,
        spec: &GuestSpec,
    ) -> io::Result<Self> {
        folder.record().remove().map_err(io::Error::other)?;
        let id = new_incarnation().map_err(io::Error::other)?;
        let id = *id.as_bytes();
        let applied = Applied::create(&*folder.storage, &folder.applied(), id, &spec.regions)?;
        Ok(Self {
            applied: Arc::new(applied),
            record: CopyRecord {
                migration,
                spec: spec.clone(),
                incarnations: Vec::new(),
                process: None,
                applied: id,
            },
        })
    }

    /// From here on a later agent goes on with the copy in `process`, whose regions are `incarnations` now.
    pub(crate) fn put_in_force(
        &mut self,
        folder: &Folder,
        process: &ProcessRecord,
        incarnations: &[Incarnation],
    ) -> io::Result<()> {
        self.record.process = Some(process.clone());
        self.record.incarnations = incarnations.to_vec();
        let written = folder.record().write(&self.record);
        written.map_err(io::Error::other)
    }
}

/// The applied file, mapped.
#[derive(Debug)]
pub(crate) struct Applied {
    words: Box<dyn Words>,
    /// First word of each region's set.
    regions: Vec<usize>,
    lens: Vec<vmferry_proto::geometry::RegionLen>,
}

fn lay_out(regions: &[RegionSpec]) -> (Vec<usize>, usize) {
    let mut next = HEADER + usize::from(MAX_LANES) * LANE;
    let mut places = Vec::with_capacity(regions.len());
    for region in regions {
        places.push(next);
        next += region.len.windows() as usize * WINDOW;
    }
    (places, next)
}

fn halves(id: [u8; 16]) -> (u64, u64) {
    let (mut low, mut high) = ([0; 8], [0; 8]);
    low.copy_from_slice(&id[..8]);
    high.copy_from_slice(&id[8..]);
    (u64::from_le_bytes(low), u64::from_le_bytes(high))
}

const fn lane_at(lane: Lane) -> usize {
    HEADER + lane.0 as usize * LANE
}

impl Applied {
    fn create(
        storage: &dyn Storage,
        path: &Path,
        id: [u8; 16],
        regions: &[RegionSpec],
    ) -> io::Result<Self> {
        let (places, count) = lay_out(regions);
        let words = storage.create_words(path, count)?;
        let (low, high) = halves(id);
        words.set(ID_AT, low);
        words.set(ID_AT + 1, high);
        words.set(MAGIC_AT, MAGIC);
        Ok(Self::of(words, places, regions))
    }

    fn open(
        storage: &dyn Storage,
        path: &Path,
        id: [u8; 16],
        regions: &[RegionSpec],
    ) -> io::Result<Self> {
        let (places, count) = lay_out(regions);
        let words = storage.open_words(path, count)?;
        let begins = (words.get(MAGIC_AT), words.get(ID_AT), words.get(ID_AT + 1));
        let (low, high) = halves(id);
        if begins != (MAGIC, low, high) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is not the file that the record names",
            ));
        }
        Ok(Self::of(words, places, regions))
    }

    fn of(words: Box<dyn Words>, places: Vec<usize>, regions: &[RegionSpec]) -> Self {
        Self {
            words,
            regions: places,
            lens: regions.iter().map(|region| region.len).collect(),
        }
    }

    /// Blocks of a region that were received.
    pub(crate) fn received(&self, region: RegionId) -> Option<RegionBits> {
        let index = usize::from(region.0);
        let (first, len) = (*self.regions.get(index)?, *self.lens.get(index)?);
        let mut set = RegionBits::empty(len);
        for window in 0..len.windows() {
            let at = first + window as usize * WINDOW;
            let bits = WindowBits(std::array::from_fn(|word| self.words.get(at + word)));
            set.insert(WindowIndex(window), &bits);
        }
        Some(set)
    }

    /// Notes blocks that were written to the copy.
    pub(crate) fn note(&self, region: RegionId, window: WindowIndex, bits: &WindowBits) {
        let index = usize::from(region.0);
        let (Some(first), Some(len)) = (self.regions.get(index), self.lens.get(index)) else {
            return;
        };
        let at = first + window.0 as usize * WINDOW;
        for (word, bits) in bits.and(&len.all_of(window)).0.iter().enumerate() {
            self.words.add(at + word, *bits);
        }
    }

    /// The region's copy begins with nothing.
    pub(crate) fn forget(&self, region: RegionId) {
        let index = usize::from(region.0);
        if let (Some(first), Some(len)) = (self.regions.get(index), self.lens.get(index)) {
            let words = len.windows() as usize * WINDOW;
            (*first..first + words).for_each(|at| self.words.set(at, 0));
        }
    }

    /// A session of so many lanes may bring frames from here on.
    pub(crate) fn begin_session(&self, session: SessionNumber, lanes: u8) {
        self.words.set(SESSION_AT, 0);
        for at in HEADER..HEADER + usize::from(MAX_LANES) * LANE {
            self.words.set(at, 0);
        }
        self.words.set(LANES_AT, u64::from(lanes));
        self.words.set(SESSION_AT, session.0);
    }

    /// How far a lane is; `flushed` is stored behind `applied`, so that it is never above it.
    pub(crate) fn progress(&self, lane: Lane, applied: FrameSeq, flushed: FrameSeq) {
        self.words.set(lane_at(lane), applied.0);
        self.words.set(lane_at(lane) + 1, flushed.0);
    }

    /// How far the last session was; everything applied counts as flushed where a flush has ended since (`all_flushed`).
    pub(crate) fn resume_point(&self, all_flushed: bool) -> Option<ResumePoint> {
        let session = SessionNumber(self.words.get(SESSION_AT));
        let lanes = u8::try_from(self.words.get(LANES_AT)).unwrap_or(MAX_LANES);
        let lane = |lane: Lane| {
            let applied = FrameSeq(self.words.get(lane_at(lane)));
            let flushed = FrameSeq(self.words.get(lane_at(lane) + 1));
            LaneProgress {
                lane,
                applied,
                flushed: if all_flushed {
                    applied
                } else {
                    flushed.min(applied)
                },
            }
        };
        (session.0 > 0).then(|| ResumePoint {
            session,
            lanes: (0..lanes.min(MAX_LANES)).map(Lane).map(lane).collect(),
        })
    }
}
