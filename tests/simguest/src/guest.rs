//! The guest itself: RAM with its version tables, CPU state, disk; one step at a time, and the full check.
//!
//! Owns the layout of RAM: a table of entries for all pages of RAM, then one for all disk blocks, then the pages that are
//! written. Invariant between steps: every page and block is what its entry says, and the sums in the CPU state are the sums over
//! the tables. Does not own pace, sockets or who may run it.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmferry_memtrack::GuestRam;

use crate::content::{self, Entry, Kind, PAGE, Page, Place, Random, describe, share};
use crate::cpu::{BadState, Content, CpuState, Workload};
use crate::disk::Disk;

/// Bytes of an entry in the tables.
const ENTRY: u64 = 4;
/// Most wrong pages that a verdict describes.
const MAX_DESCRIBED: usize = 16;

/// What RAM is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RamKind {
    /// Private anonymous memory.
    Anon,
    /// A shared mapping of a memfd.
    Memfd,
}

/// A guest to be made.
#[derive(Debug, Clone)]
pub struct GuestConfig {
    /// Bytes of RAM.
    pub ram_len: u64,
    /// What RAM is made of.
    pub ram_kind: RamKind,
    /// File and length of the disk.
    pub disk: Option<(PathBuf, u64)>,
    /// Seed of all content.
    pub seed: u64,
    /// Percent of the pages that are written before it starts.
    pub fill: u8,
    /// Percent of the disk's blocks that are written before it starts.
    pub disk_fill: u8,
    /// What it does.
    pub workload: Workload,
}

/// A guest.
#[derive(Debug)]
pub struct Guest {
    ram: GuestRam,
    disk: Option<Disk>,
    layout: Layout,
    cpu: Option<CpuState>,
}

/// Where things are in RAM.
#[derive(Debug, Clone, Copy)]
struct Layout {
    pages: u64,
    blocks: u64,
    first: u64,
}

impl Layout {
    fn new(ram_len: u64, disk_len: u64) -> io::Result<Self> {
        let page = PAGE as u64;
        let (pages, blocks) = (ram_len / page, disk_len / page);
        let first = ((pages + blocks) * ENTRY).div_ceil(page);
        if !ram_len.is_multiple_of(page) || first >= pages {
            return Err(io::Error::other(format!(
                "{ram_len} bytes of RAM: it must be whole pages of {page} and more than the {first} pages of tables for this RAM and disk"
            )));
        }
        Ok(Self {
            pages,
            blocks,
            first,
        })
    }

    const fn entry_at(&self, place: Place) -> u64 {
        match place {
            Place::Memory(page) => page * ENTRY,
            Place::Disk(block) => (self.pages + block) * ENTRY,
        }
    }
}

/// Outcome of the full check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Nothing is wrong.
    pub ok: bool,
    /// Pages of RAM that were compared.
    pub pages: u64,
    /// Blocks of disk that were compared.
    pub blocks: u64,
    /// Number of things wrong.
    pub wrong: u64,
    /// The first of them.
    pub details: Vec<String>,
}

impl Verdict {
    fn complain(&mut self, detail: String) {
        self.wrong += 1;
        if self.details.len() < MAX_DESCRIBED {
            self.details.push(detail);
        }
    }
}

impl Guest {
    /// Makes a guest with content; the disk file is made anew.
    pub fn create(config: &GuestConfig) -> io::Result<Self> {
        let disk = match &config.disk {
            Some((path, len)) => Some(Disk::create(path, *len)?),
            None => None,
        };
        let mut guest = Self::with_disk(config, disk)?;
        let disk_len = guest.disk.as_ref().map_or(0, Disk::len);
        let mut cpu = CpuState {
            ram_len: config.ram_len,
            disk_len,
            seed: config.seed,
            random: Random(content::mix(config.seed)),
            steps: 0,
            disk_steps: 0,
            beats: 0,
            accumulator: 0,
            memory_sum: 0,
            disk_sum: 0,
            workload: config.workload,
        };
        let layout = guest.layout;
        let share_of = |all: u64, percent: u8| all * u64::from(percent.min(100)) / 100;
        let filled = share_of(layout.pages - layout.first, config.fill);
        for page in layout.first..layout.first + filled {
            guest.rewrite(&mut cpu, Place::Memory(page))?;
        }
        for block in 0..share_of(layout.blocks, config.disk_fill) {
            guest.rewrite(&mut cpu, Place::Disk(block))?;
        }
        guest.cpu = Some(cpu);
        Ok(guest)
    }

    /// Makes an empty guest that waits for its content; the disk file is used as it is.
    pub fn incoming(config: &GuestConfig) -> io::Result<Self> {
        let disk = match &config.disk {
            Some((path, len)) => Some(Disk::open(path, *len)?),
            None => None,
        };
        Self::with_disk(config, disk)
    }

    fn with_disk(config: &GuestConfig, disk: Option<Disk>) -> io::Result<Self> {
        let layout = Layout::new(config.ram_len, disk.as_ref().map_or(0, Disk::len))?;
        let len = usize::try_from(config.ram_len).map_err(io::Error::other)?;
        let ram = match config.ram_kind {
            RamKind::Anon => GuestRam::anonymous(len)?,
            RamKind::Memfd => GuestRam::memfd("vmferry-simguest", len)?,
        };
        Ok(Self {
            ram,
            disk,
            layout,
            cpu: None,
        })
    }

    /// RAM.
    #[must_use]
    pub const fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The disk.
    #[must_use]
    pub const fn disk(&self) -> Option<&Disk> {
        self.disk.as_ref()
    }

    /// The disk, for its dirty marks.
    pub const fn disk_mut(&mut self) -> Option<&mut Disk> {
        self.disk.as_mut()
    }

    /// The CPU state; `None` until an incoming guest was given one.
    #[must_use]
    pub const fn cpu(&self) -> Option<&CpuState> {
        self.cpu.as_ref()
    }

    /// Gives the guest a CPU state, which must be of a guest of its size.
    pub fn load_cpu(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let cpu = CpuState::from_bytes(bytes)?;
        let disk_len = self.disk.as_ref().map_or(0, Disk::len);
        if (cpu.ram_len, cpu.disk_len) != (self.ram.len() as u64, disk_len) {
            return Err(LoadError::OtherSize {
                theirs: (cpu.ram_len, cpu.disk_len),
                ours: (self.ram.len() as u64, disk_len),
            });
        }
        self.cpu = Some(cpu);
        Ok(())
    }

    /// Changes what the guest does; false if it has no CPU state yet.
    pub const fn set_workload(&mut self, workload: Workload) -> bool {
        match &mut self.cpu {
            Some(cpu) => {
                cpu.workload = workload;
                true
            }
            None => false,
        }
    }

    /// Counts a beat: its number. `None` without a CPU state.
    pub fn next_beat(&mut self) -> Option<u64> {
        let cpu = self.cpu.as_mut()?;
        cpu.beats += 1;
        Some(cpu.beats)
    }

    /// Writes one page of RAM in the working set. A page that was not what it should be is told.
    pub fn memory_step(&mut self) -> io::Result<Option<String>> {
        let layout = self.layout;
        self.step(|cpu| {
            let span =
                (cpu.workload.working_set / PAGE as u64).clamp(1, layout.pages - layout.first);
            Place::Memory(layout.first + cpu.random.below(span))
        })
    }

    /// Writes one block of the disk in its working set. A block that was not what it should be is told.
    pub fn disk_step(&mut self) -> io::Result<Option<String>> {
        let blocks = self.layout.blocks;
        if blocks == 0 {
            return Ok(None);
        }
        self.step(|cpu| {
            let span = (cpu.workload.disk_working_set / PAGE as u64).clamp(1, blocks);
            Place::Disk(cpu.random.below(span))
        })
    }

    /// Compares one page of RAM, anywhere, with what it must hold.
    pub fn spot_check(&mut self) -> io::Result<Option<String>> {
        let Some(mut cpu) = self.cpu.take() else {
            return Ok(None);
        };
        let page = self.layout.first + cpu.random.below(self.layout.pages - self.layout.first);
        let found = self.compare(&cpu, Place::Memory(page));
        self.cpu = Some(cpu);
        found
    }

    fn step(&mut self, choose: impl FnOnce(&mut CpuState) -> Place) -> io::Result<Option<String>> {
        let Some(mut cpu) = self.cpu.take() else {
            return Ok(None);
        };
        let place = choose(&mut cpu);
        let found = self.compare(&cpu, place);
        let done = found.and_then(|wrong| self.rewrite(&mut cpu, place).map(|()| wrong));
        self.cpu = Some(cpu);
        done
    }

    /// Gives `place` its next version.
    fn rewrite(&mut self, cpu: &mut CpuState, place: Place) -> io::Result<()> {
        let old = self.entry(place);
        let draw = cpu.random.draw();
        let kind = match (cpu.workload.content, draw % 8) {
            (Content::Zero, _) | (Content::Mixed, 0) => Kind::Zero,
            (Content::Text, _) | (Content::Mixed, 1..=4) => Kind::Text,
            (Content::Copies, _) => Kind::Copy,
            (Content::Random | Content::Mixed, _) => Kind::Random,
        };
        let new = old.next(kind);
        let mut page = [0; PAGE];
        self.load(place, &mut page)?;
        let at = (draw >> 8) as usize % (PAGE / 8) * 8;
        let seen = page[at..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes));
        // An entry from `next` always has a kind.
        let _ = content::fill(cpu.seed, place, new, &mut page);
        self.store(place, &page)?;
        self.ram.write(
            ram_offset(self.layout.entry_at(place)),
            &new.0.to_le_bytes(),
        );
        cpu.account(place, old, new, seen);
        Ok(())
    }

    /// What is wrong with `place`, if anything.
    fn compare(&self, cpu: &CpuState, place: Place) -> io::Result<Option<String>> {
        let entry = self.entry(place);
        let mut expected = [0; PAGE];
        if !content::fill(cpu.seed, place, entry, &mut expected) {
            return Ok(Some(format!("{place:?}: its entry {:#x} is none", entry.0)));
        }
        let mut found = [0; PAGE];
        self.load(place, &mut found)?;
        let wrong = found != expected;
        Ok(wrong.then(|| {
            format!(
                "{place:?} holds {} and not version {}",
                describe(&found),
                entry.version()
            )
        }))
    }

    fn entry(&self, place: Place) -> Entry {
        let mut bytes = [0; 4];
        self.ram
            .read(ram_offset(self.layout.entry_at(place)), &mut bytes);
        Entry(u32::from_le_bytes(bytes))
    }

    fn load(&self, place: Place, page: &mut Page) -> io::Result<()> {
        match (place, &self.disk) {
            (Place::Memory(index), _) => {
                self.ram.read(ram_offset(index * PAGE as u64), page);
                Ok(())
            }
            (Place::Disk(block), Some(disk)) => disk.read(block, page),
            (Place::Disk(_), None) => Err(io::Error::other("there is no disk")),
        }
    }

    fn store(&mut self, place: Place, page: &Page) -> io::Result<()> {
        match (place, &mut self.disk) {
            (Place::Memory(index), _) => {
                self.ram.write(ram_offset(index * PAGE as u64), page);
                Ok(())
            }
            (Place::Disk(block), Some(disk)) => disk.write(block, page),
            (Place::Disk(_), None) => Err(io::Error::other("there is no disk")),
        }
    }

    /// Compares all of RAM and disk with what the tables say, and the tables with the sums in the CPU state.
    /// `None` without a CPU state.
    pub fn verify(&self) -> io::Result<Option<Verdict>> {
        let Some(cpu) = &self.cpu else {
            return Ok(None);
        };
        let mut verdict = Verdict::default();
        let Layout {
            pages,
            blocks,
            first,
        } = self.layout;
        let memory = (first..pages).map(Place::Memory);
        for place in memory.chain((0..blocks).map(Place::Disk)) {
            if let Some(wrong) = self.compare(cpu, place)? {
                verdict.complain(wrong);
            }
        }
        (verdict.pages, verdict.blocks) = (pages, blocks);
        self.verify_tables(cpu, &mut verdict);
        verdict.ok = verdict.wrong == 0;
        Ok(Some(verdict))
    }

    fn verify_tables(&self, cpu: &CpuState, verdict: &mut Verdict) {
        let Layout {
            pages,
            blocks,
            first,
        } = self.layout;
        let sum = |places: &mut dyn Iterator<Item = Place>| {
            places.fold(0, |sum, place| sum ^ share(place, self.entry(place)))
        };
        let memory = sum(&mut (0..pages).map(Place::Memory));
        let disk = sum(&mut (0..blocks).map(Place::Disk));
        if memory != cpu.memory_sum {
            verdict
                .complain("the table of RAM versions is not the one of this CPU state".to_owned());
        }
        if disk != cpu.disk_sum {
            verdict
                .complain("the table of disk versions is not the one of this CPU state".to_owned());
        }
        if (0..first).any(|page| self.entry(Place::Memory(page)).0 != 0) {
            verdict.complain("a page of the tables has an entry".to_owned());
        }
        let used = (pages + blocks) * ENTRY;
        let mut rest = vec![0; ram_offset(first * PAGE as u64 - used)];
        self.ram.read(ram_offset(used), &mut rest);
        if rest.iter().any(|byte| *byte != 0) {
            verdict.complain("the space behind the tables is not zero".to_owned());
        }
    }
}

/// An offset in RAM; one that no address space holds becomes one that the mapping refuses.
fn ram_offset(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

/// A CPU state that this guest cannot take.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not a state.
    #[error(transparent)]
    Bad(#[from] BadState),
    /// Of a guest of another size.
    #[error(
        "the state is of a guest with (RAM, disk) of {theirs:?} bytes and this one has {ours:?}"
    )]
    OtherSize {
        /// Sizes in the state.
        theirs: (u64, u64),
        /// Sizes here.
        ours: (u64, u64),
    },
}

#[cfg(test)]
mod tests {
    use super::{Guest, GuestConfig, RamKind};
    use crate::content::PAGE;
    use crate::cpu::{Content, Workload};

    fn config(disk: Option<(std::path::PathBuf, u64)>) -> GuestConfig {
        GuestConfig {
            ram_len: 1 << 20,
            ram_kind: RamKind::Anon,
            disk,
            seed: 7,
            fill: 50,
            disk_fill: 50,
            workload: Workload {
                dirty_rate: 0,
                working_set: u64::MAX,
                disk_rate: 0,
                disk_working_set: u64::MAX,
                content: Content::Mixed,
                beat_us: 0,
            },
        }
    }

    /// The same steps made twice, once with a move to another guest in the middle, come to the same state.
    #[test]
    fn a_moved_guest_goes_on_exactly() {
        let folder = tempfile::tempdir().unwrap();
        let disk = |name: &str| Some((folder.path().join(name), 1 << 20));
        let mut stays = Guest::create(&config(disk("a"))).unwrap();
        let mut leaves = Guest::create(&config(disk("b"))).unwrap();
        let steps = |guest: &mut Guest| {
            for _ in 0..200 {
                assert_eq!(guest.memory_step().unwrap(), None);
                assert_eq!(guest.disk_step().unwrap(), None);
                assert_eq!(guest.spot_check().unwrap(), None);
                guest.next_beat();
            }
        };
        steps(&mut stays);
        steps(&mut leaves);
        std::fs::copy(folder.path().join("b"), folder.path().join("c")).unwrap();
        let mut arrives = Guest::incoming(&config(disk("c"))).unwrap();
        let mut bytes = vec![0; leaves.ram.len()];
        leaves.ram.read(0, &mut bytes);
        arrives.ram.write(0, &bytes);
        let state = leaves.cpu().unwrap().to_bytes();
        arrives.load_cpu(&state).unwrap();
        steps(&mut stays);
        steps(&mut arrives);
        assert_eq!(stays.cpu(), arrives.cpu());
        assert!(arrives.verify().unwrap().unwrap().ok);
        assert_eq!(
            std::fs::read(folder.path().join("a")).unwrap(),
            std::fs::read(folder.path().join("c")).unwrap()
        );
    }

    #[test]
    fn any_wrong_byte_and_any_stale_page_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let mut guest = Guest::create(&config(Some((folder.path().join("d"), 1 << 20)))).unwrap();
        assert!(guest.verify().unwrap().unwrap().ok);
        let len = guest.ram.len();
        for at in (0..len)
            .step_by(PAGE)
            .map(|page| page + page / PAGE * 7 % PAGE)
            .chain([len - 1])
        {
            let mut byte = [0];
            guest.ram.read(at, &mut byte);
            guest.ram.write(at, &[byte[0] ^ 1]);
            assert!(!guest.verify().unwrap().unwrap().ok, "byte {at}");
            guest.ram.write(at, &byte);
        }
        assert!(guest.verify().unwrap().unwrap().ok);
        // All of RAM from an earlier moment, tables included, under a later CPU state.
        let mut earlier = vec![0; len];
        guest.ram.read(0, &mut earlier);
        while guest.cpu().unwrap().steps < 1000 {
            guest.memory_step().unwrap();
        }
        guest.ram.write(0, &earlier);
        assert!(!guest.verify().unwrap().unwrap().ok);
    }

    #[test]
    fn a_wrong_disk_block_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d");
        let mut guest = Guest::create(&config(Some((path.clone(), 1 << 20)))).unwrap();
        for _ in 0..50 {
            guest.disk_step().unwrap();
        }
        let before = std::fs::read(&path).unwrap();
        for block in [0, 100, 255] {
            let mut disk = before.clone();
            disk[block * PAGE + 9] ^= 1;
            std::fs::write(&path, &disk).unwrap();
            assert!(!guest.verify().unwrap().unwrap().ok, "block {block}");
        }
        std::fs::write(&path, &before).unwrap();
        assert!(guest.verify().unwrap().unwrap().ok);
    }
}
