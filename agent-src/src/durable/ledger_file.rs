//! The mapped ledger: what is dirty, what is in flight, what the tracking has told, as words of a file.
//!
//! Owns the layout, what is read of it, and what a scan changes; `writer` owns what the copy changes. Invariant: after any beginning of the stores the file
//! says *dirty or in flight* of every block that is not safe at the destination. So marks are added before anything is taken
//! away: a frame stands in its slot before its lane's number says so, and only then do its blocks cease to be dirty; the
//! windows of a scan are named before it, and dirty until its result is here.
//!
//! ```text
//! header | lanes (sent, applied, flushed) | regions (scan, rotation, incarnation) | dirty, sent, told by region | slots
//! ```

use std::io;
use std::ops::Range;
use std::path::Path;

use vmferry_common::storage::Storage;
use vmferry_hypervisor::MarkLog;
use vmferry_proto::geometry::{RegionBits, RegionLen, WindowBits, WindowIndex, WindowRef};
use vmferry_proto::ids::{FrameSeq, Incarnation, Lane, RegionId, SessionNumber};
use vmferry_proto::ledger::{FrameImage, LaneImage, LedgerImage, SessionImage};
use vmferry_proto::limits::MAX_LANES;
use vmferry_proto::spec::{RegionKind, RegionSpec};

use super::words::Words;

mod writer;

/// What the file begins with; the last digit is the layout's version.
const MAGIC: u64 = u64::from_le_bytes(*b"vmfLedg1");
/// Words of the header.
const MAGIC_AT: usize = 0;
const ID_AT: usize = 1;
const SESSION_AT: usize = 3;
const LANES_AT: usize = 4;
/// Whether incarnations were told.
const KNOWN_AT: usize = 5;
const HEADER: usize = 8;
/// Words of a lane: sent, applied, flushed.
const LANE: usize = 3;
/// Words of a region: windows of the scan under way, last rotation, incarnation.
const REGION: usize = 4;
/// Words of a slot: number, window, blocks.
const SLOT: usize = 10;
/// All slots: as many frames of a single block as the destination may leave unflushed (256 MiB), halved, since hardly ever are
/// all so small.
#[cfg(not(test))]
const SLOTS: usize = 1 << 15;
/// So few that tests meet a full ring.
#[cfg(test)]
const SLOTS: usize = 8;
/// Words of a window in a set.
const WINDOW: usize = 8;
/// Marks a slot's window as one of a disk.
const DISK_BIT: u64 = 1 << 63;

/// Where a region's words are.
#[derive(Debug, Clone, Copy)]
struct Place {
    kind: RegionKind,
    len: RegionLen,
    /// Its words in the table.
    entry: usize,
    dirty: usize,
    sent: usize,
    /// Memory only.
    told: Option<usize>,
}

impl Place {
    fn words(&self) -> usize {
        self.len.windows() as usize * WINDOW
    }
}

fn lay_out(regions: &[RegionSpec]) -> (Vec<Place>, usize) {
    let table = HEADER + usize::from(MAX_LANES) * LANE;
    let mut next = table + regions.len() * REGION;
    let mut places = Vec::with_capacity(regions.len());
    for (index, region) in regions.iter().enumerate() {
        let words = region.len.windows() as usize * WINDOW;
        let told = match region.kind {
            RegionKind::Memory => Some(next + 2 * words),
            RegionKind::Disk => None,
        };
        places.push(Place {
            kind: region.kind,
            len: region.len,
            entry: table + index * REGION,
            dirty: next,
            sent: next + words,
            told,
        });
        next += words * if told.is_some() { 3 } else { 2 };
    }
    (places, next)
}

/// The file, mapped.
#[derive(Debug)]
pub struct LedgerFile {
    words: Words,
    regions: Vec<Place>,
    slots: usize,
}

impl LedgerFile {
    /// Makes a ledger that holds nothing, whose space is reserved.
    ///
    /// # Errors
    /// The file system.
    pub fn create(
        storage: &dyn Storage,
        path: &Path,
        id: [u8; 16],
        regions: &[RegionSpec],
    ) -> io::Result<Self> {
        let (places, slots) = lay_out(regions);
        let words = Words::create(storage, path, slots + SLOTS * SLOT)?;
        let file = Self {
            words,
            regions: places,
            slots,
        };
        let (low, high) = halves(id);
        file.words.set(ID_AT, low);
        file.words.set(ID_AT + 1, high);
        file.words.set(MAGIC_AT, MAGIC);
        Ok(file)
    }

    /// Opens the ledger `id` of these regions.
    ///
    /// # Errors
    /// There is none, or it is another file.
    pub fn open(
        storage: &dyn Storage,
        path: &Path,
        id: [u8; 16],
        regions: &[RegionSpec],
    ) -> io::Result<Self> {
        let (places, slots) = lay_out(regions);
        let words = Words::open(storage, path, slots + SLOTS * SLOT)?;
        let foreign = |text| io::Error::new(io::ErrorKind::InvalidData, text);
        if words.get(MAGIC_AT) != MAGIC {
            return Err(foreign("it is no ledger of this version"));
        }
        if (words.get(ID_AT), words.get(ID_AT + 1)) != halves(id) {
            return Err(foreign("it is another ledger than the record names"));
        }
        Ok(Self {
            words,
            regions: places,
            slots,
        })
    }

    /// Takes for dirty what was being scanned when the process before this one died.
    pub fn heal(&self) {
        for place in &self.regions {
            let scan = self.words.get(place.entry);
            let windows = scan_of(scan);
            let last = place.len.windows();
            for window in windows.start.min(last)..windows.end.min(last) {
                let all = place.len.all_of(WindowIndex(window));
                self.add(place.dirty, window, &all);
                if let Some(told) = place.told {
                    self.add(told, window, &all);
                }
            }
            self.words.set(place.entry, 0);
        }
    }

    /// What the file holds, as a ledger is made from it.
    #[must_use]
    pub fn image(&self) -> LedgerImage {
        let sets = |at: fn(&Place) -> usize| {
            let set = |place: &Place| self.set_at(at(place), place.len);
            self.regions.iter().map(set).collect()
        };
        LedgerImage {
            dirty: sets(|place| place.dirty),
            sent: sets(|place| place.sent),
            incarnations: (self.words.get(KNOWN_AT) == 1).then(|| self.incarnations()),
            session: self.session(),
        }
    }

    fn set_at(&self, at: usize, len: RegionLen) -> RegionBits {
        let mut set = RegionBits::empty(len);
        for window in 0..len.windows() {
            let first = at + window as usize * WINDOW;
            let bits = WindowBits(std::array::from_fn(|word| self.words.get(first + word)));
            set.insert(WindowIndex(window), &bits);
        }
        set
    }

    fn incarnations(&self) -> Vec<Incarnation> {
        let of = |place: &Place| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&self.words.get(place.entry + 2).to_le_bytes());
            bytes[8..].copy_from_slice(&self.words.get(place.entry + 3).to_le_bytes());
            Incarnation::from_bytes(bytes)
        };
        self.regions.iter().map(of).collect()
    }

    fn session(&self) -> Option<SessionImage> {
        let number = self.words.get(SESSION_AT);
        let lanes = u8::try_from(self.words.get(LANES_AT)).unwrap_or(u8::MAX);
        (number != 0).then(|| SessionImage {
            number: SessionNumber(number),
            lanes: (0..lanes.min(MAX_LANES))
                .map(|lane| self.lane(Lane(lane), lanes))
                .collect(),
        })
    }

    fn lane(&self, lane: Lane, lanes: u8) -> LaneImage {
        let at = lane_at(lane);
        let [sent, applied, flushed] = [0, 1, 2].map(|word| FrameSeq(self.words.get(at + word)));
        let mut frames: Vec<FrameImage> = self
            .ring(lane, lanes)
            .filter_map(|slot| self.slot(slot))
            .filter(|(frame, _)| frame.seq <= sent)
            .filter(|(frame, kind)| !is_settled(frame.seq, *kind, applied, flushed))
            .map(|(frame, _)| frame)
            .collect();
        frames.sort_unstable_by_key(|frame| frame.seq);
        LaneImage {
            sent,
            applied,
            // Stored behind `applied`, so never above it.
            flushed: flushed.min(applied),
            frames,
        }
    }

    /// First words of the slots of a lane.
    fn ring(&self, lane: Lane, lanes: u8) -> impl Iterator<Item = usize> + use<> {
        let each = SLOTS / usize::from(lanes.max(1));
        let first = self.slots + usize::from(lane.0) * each * SLOT;
        (0..each).map(move |slot| first + slot * SLOT)
    }

    /// Empties all slots that the session so far has used: the first of each ring, and one more that its lane does not
    /// tell of yet.
    fn clear_slots(&self) {
        let lanes = u8::try_from(self.words.get(LANES_AT)).unwrap_or(MAX_LANES);
        let lanes = lanes.min(MAX_LANES);
        let each = SLOTS / usize::from(lanes.max(1));
        for lane in (0..lanes).map(Lane) {
            let sent = usize::try_from(self.words.get(lane_at(lane))).unwrap_or(usize::MAX);
            let used = sent.saturating_add(2).min(each);
            for slot in self.ring(lane, lanes).take(used) {
                self.words.set(slot, 0);
            }
        }
    }

    fn slot(&self, at: usize) -> Option<(FrameImage, RegionKind)> {
        let seq = self.words.get(at);
        if seq == 0 {
            return None;
        }
        let place = self.words.get(at + 1);
        let kind = if place & DISK_BIT == 0 {
            RegionKind::Memory
        } else {
            RegionKind::Disk
        };
        let place = place & !DISK_BIT;
        let frame = FrameImage {
            seq: FrameSeq(seq),
            at: WindowRef {
                region: RegionId(u16::try_from(place >> 32).ok()?),
                window: WindowIndex(u32::try_from(place & 0xffff_ffff).ok()?),
            },
            blocks: WindowBits(std::array::from_fn(|word| self.words.get(at + 2 + word))),
        };
        Some((frame, kind))
    }

    fn add(&self, set: usize, window: u32, bits: &WindowBits) {
        let first = set + window as usize * WINDOW;
        for (word, bits) in bits.0.iter().enumerate().filter(|(_, bits)| **bits != 0) {
            self.words.add(first + word, *bits);
        }
    }

    fn remove(&self, set: usize, window: u32, bits: &WindowBits) {
        let first = set + window as usize * WINDOW;
        for (word, bits) in bits.0.iter().enumerate() {
            self.words.remove(first + word, *bits);
        }
    }

    fn place(&self, region: RegionId) -> Option<&Place> {
        self.regions.get(usize::from(region.0))
    }
}

const fn lane_at(lane: Lane) -> usize {
    HEADER + lane.0 as usize * LANE
}

fn halves(id: [u8; 16]) -> (u64, u64) {
    let number = u128::from_le_bytes(id);
    let low = u64::try_from(number & u128::from(u64::MAX)).unwrap_or_default();
    (low, u64::try_from(number >> 64).unwrap_or_default())
}

fn is_settled(seq: FrameSeq, kind: RegionKind, applied: FrameSeq, flushed: FrameSeq) -> bool {
    match kind {
        RegionKind::Memory => seq <= applied,
        RegionKind::Disk => seq <= flushed,
    }
}

/// Windows of a scan in one word, so that they are stored together; an end of 0 is none.
fn scan_word(windows: &Range<u32>) -> u64 {
    u64::from(windows.start) << 32 | u64::from(windows.end)
}

fn scan_of(word: u64) -> Range<u32> {
    let part = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or_default();
    part(word >> 32)..part(word)
}

impl MarkLog for LedgerFile {
    fn before(&self, region: RegionId, windows: Range<u32>) {
        if let Some(place) = self.place(region) {
            self.words.set(place.entry, scan_word(&windows));
        }
    }

    fn after(&self, region: RegionId, windows: Range<u32>, dirty: &[u64], told: &[u64]) {
        let Some(place) = self.place(region) else {
            return;
        };
        let first = windows.start as usize * WINDOW;
        let room = place.words().saturating_sub(first);
        for (at, bits) in (place.dirty + first..).zip(dirty).take(room) {
            self.words.add(at, *bits);
        }
        // Behind the marks: what is not told any more was marked, if it ever was told.
        if let Some(set) = place.told {
            for (at, bits) in (set + first..).zip(told).take(room) {
                self.words.set(at, *bits);
            }
        }
        self.words.set(place.entry, 0);
    }

    fn found(&self, region: RegionId, dirty: &RegionBits) {
        if let Some(place) = self.place(region) {
            for (window, bits) in dirty.iter() {
                self.add(place.dirty, window.0, &bits.and(&place.len.all_of(window)));
            }
        }
    }

    fn rotated(&self, region: RegionId, round: u64) {
        if let Some(place) = self.place(region) {
            self.words.set(place.entry + 1, round);
        }
    }

    fn told(&self, region: RegionId) -> Vec<u64> {
        let Some((told, place)) = self
            .place(region)
            .and_then(|place| Some((place.told?, place)))
        else {
            return Vec::new();
        };
        (told..told + place.words())
            .map(|at| self.words.get(at))
            .collect()
    }

    fn last_rotation(&self, region: RegionId) -> u64 {
        self.place(region)
            .map_or(0, |place| self.words.get(place.entry + 1))
    }
}

#[cfg(test)]
mod tests;
