//! Dirty marks of a simulated guest, and how the source's driver takes them.
//!
//! Owns what of it outlives an agent and what does not. Marks are the hypervisor's: those of memory are forgotten in the moment in
//! which they are taken, those of a disk are set aside as a bitmap with a number, as QEMU's are, and forgotten on order. What was taken
//! is the agent's, and its log's.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use vmferry_hypervisor::{GuestError, MarkLog, Taken, TrackingLeft};
use vmferry_proto::geometry::{RegionBits, RegionLen, WindowBits, WindowIndex};
use vmferry_proto::ids::RegionId;
use vmferry_proto::spec::RegionKind;

use super::guest::Vm;
use super::plan::Flaw;
use super::source::{Source, gone};

/// Marks of a hypervisor process.
#[derive(Debug)]
pub(super) struct Marks {
    /// Number of the tracking that is under way.
    tracking: Option<i32>,
    begun: i32,
    dirty: Vec<RegionBits>,
    /// Set aside: region, number, what it holds.
    bitmaps: Vec<(usize, u64, RegionBits)>,
}

impl Marks {
    pub(super) fn new(lens: impl Iterator<Item = RegionLen>) -> Self {
        Self {
            tracking: None,
            begun: 0,
            dirty: lens.map(RegionBits::empty).collect(),
            bitmaps: Vec::new(),
        }
    }

    fn start(&mut self) -> i32 {
        self.begun += 1;
        self.tracking = Some(self.begun);
        self.dirty.iter_mut().for_each(RegionBits::fill);
        self.bitmaps.clear();
        self.begun
    }

    /// Every trace of a tracking goes.
    pub(super) fn stop(&mut self) {
        self.tracking = None;
        self.dirty.iter_mut().for_each(RegionBits::clear);
        self.bitmaps.clear();
    }

    pub(super) fn mark(&mut self, region: usize, window: WindowIndex, bits: &WindowBits) {
        if self.tracking.is_some()
            && let Some(dirty) = self.dirty.get_mut(region)
        {
            dirty.insert(window, bits);
        }
    }

    fn take_window(&mut self, region: usize, window: WindowIndex) -> Option<WindowBits> {
        let dirty = self.dirty.get_mut(region)?;
        let bits = dirty.get(window);
        dirty.remove(window, &bits);
        Some(bits)
    }

    /// Sets the marks of a disk aside as bitmap `number`.
    fn rotate(&mut self, region: usize, number: u64) -> Option<()> {
        let dirty = self.dirty.get_mut(region)?;
        let set_aside = dirty.clone();
        dirty.clear();
        self.bitmaps.push((region, number, set_aside));
        Some(())
    }

    fn bitmap(&self, region: usize, number: u64) -> Option<RegionBits> {
        let mut all = self.bitmaps.iter();
        let found = all.find(|(of, its, _)| (*of, *its) == (region, number))?;
        Some(found.2.clone())
    }

    /// Forgets the bitmaps of a disk up to `number`.
    fn forget(&mut self, region: usize, number: u64) {
        self.bitmaps
            .retain(|(of, its, _)| *of != region || *its > number);
    }

    /// Goes on with tracking `left` at these last bitmaps that somebody has: what is set aside beyond them is dirty again.
    fn resume(&mut self, left: i32, last: &[u64]) -> bool {
        if self.tracking != Some(left) {
            return false;
        }
        for (region, number, bits) in std::mem::take(&mut self.bitmaps) {
            if last.get(region).is_none_or(|last| number > *last)
                && let Some(dirty) = self.dirty.get_mut(region)
            {
                dirty.union(&bits);
            }
        }
        true
    }
}

/// The driver's half.
#[derive(Debug, Default)]
pub(super) struct Tracking {
    log: Option<Arc<dyn MarkLog>>,
    number: Option<i32>,
    /// Taken and not acknowledged, by region.
    owed: Vec<RegionBits>,
    /// Last bitmap that was set aside, by region.
    bitmaps: Vec<u64>,
}

impl Tracking {
    pub(super) fn new(lens: impl Iterator<Item = RegionLen>) -> Self {
        let owed: Vec<_> = lens.map(RegionBits::empty).collect();
        Self {
            log: None,
            number: None,
            bitmaps: vec![0; owed.len()],
            owed,
        }
    }

    pub(super) fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.log = Some(log);
    }

    pub(super) fn left(&self) -> Option<TrackingLeft> {
        Some(TrackingLeft {
            descriptor: self.number?,
            memory: Vec::new(),
        })
    }
}

fn windows(of: Range<u32>) -> impl Iterator<Item = WindowIndex> {
    of.map(WindowIndex)
}

impl Source {
    pub(super) async fn begin_tracking(&mut self) -> Result<(), GuestError> {
        let number = self.order(|vm| vm.marks.start()).await?;
        self.tracking.number = Some(number);
        self.tracking.owed.iter_mut().for_each(RegionBits::clear);
        self.tracking.bitmaps.fill(0);
        Ok(())
    }

    pub(super) async fn go_on_tracking(&mut self, left: &TrackingLeft) -> Result<(), GuestError> {
        let last: Vec<u64> = (0u16..)
            .take(self.tracking.bitmaps.len())
            .map(|region| {
                let log = self.tracking.log.as_ref();
                log.map_or(0, |log| log.last_rotation(RegionId(region)))
            })
            .collect();
        let number = left.descriptor;
        if !self.order(|vm| vm.marks.resume(number, &last)).await? {
            return Err(gone());
        }
        self.tracking.number = Some(number);
        self.tracking.bitmaps = last;
        Ok(())
    }

    pub(super) async fn end_tracking(&mut self) -> Result<(), GuestError> {
        self.tracking.number = None;
        match self.order(|vm| vm.marks.stop()).await {
            Err(GuestError::Gone(_)) => Ok(()),
            done => done,
        }
    }

    pub(super) async fn take(&mut self, region: RegionId) -> Result<Taken, GuestError> {
        let at = usize::from(region.0);
        let len = self.spec.regions.get(at).ok_or_else(gone)?;
        let zero = match len.kind {
            RegionKind::Memory => self.take_memory(region, at).await?,
            RegionKind::Disk => self.take_disk(region, at).await?,
        };
        Ok(Taken {
            dirty: self.tracking.owed[at].clone(),
            zero,
            longest_hold: Duration::ZERO,
        })
    }

    /// Window by window: each is named before, and its result told after.
    async fn take_memory(&mut self, region: RegionId, at: usize) -> Result<RegionBits, GuestError> {
        let late = self.node.world.state().plan.flaw == Some(Flaw::ForgetsScan);
        let log = self.tracking.log.clone();
        let mut zero = RegionBits::empty(self.tracking.owed[at].region_len());
        for window in windows(0..zero.windows()) {
            let piece = window.0..window.0 + 1;
            if let Some(log) = log.as_ref().filter(|_| !late) {
                log.before(region, piece.clone());
            }
            let owed = self.tracking.owed[at].get(window);
            let taken = self.order(|vm| {
                let taken = vm.marks.take_window(at, window)?;
                Some((taken, vm.zero(at, window, &owed.or(&taken))))
            });
            let (taken, holes) = taken.await?.ok_or_else(gone)?;
            if let Some(log) = &log {
                if late {
                    log.before(region, piece.clone());
                }
                log.after(region, piece, &taken.0, &[]);
            }
            self.tracking.owed[at].insert(window, &taken);
            zero.insert(window, &holes);
        }
        Ok(zero)
    }

    /// As QEMU does it: the bitmap is set aside, read, told, and forgotten once all of it is acknowledged.
    async fn take_disk(&mut self, region: RegionId, at: usize) -> Result<RegionBits, GuestError> {
        let number = self.tracking.bitmaps[at] + 1;
        self.order(|vm| vm.marks.rotate(at, number))
            .await?
            .ok_or_else(gone)?;
        self.tracking.bitmaps[at] = number;
        let forgets = self.node.world.state().plan.flaw == Some(Flaw::ForgetsBitmap);
        let owed = self.tracking.owed[at].clone();
        let read = self.order(|vm| {
            let mut read = vm.marks.bitmap(at, number)?;
            if forgets {
                vm.marks.forget(at, number);
            }
            read.union(&owed);
            let zero = zeros(vm, at, &read);
            Some((read, zero))
        });
        let (read, zero) = read.await?.ok_or_else(gone)?;
        if let Some(log) = &self.tracking.log {
            log.found(region, &read);
            log.rotated(region, number);
        }
        self.tracking.owed[at] = read;
        Ok(zero)
    }

    pub(super) async fn acknowledge(&mut self, region: RegionId) -> Result<(), GuestError> {
        let at = usize::from(region.0);
        let last = self.tracking.bitmaps.get(at).copied().unwrap_or(0);
        self.order(|vm| vm.marks.forget(at, last)).await?;
        if let Some(owed) = self.tracking.owed.get_mut(at) {
            owed.clear();
        }
        Ok(())
    }
}

fn zeros(vm: &Vm, region: usize, of: &RegionBits) -> RegionBits {
    let mut zero = RegionBits::empty(of.region_len());
    for (window, bits) in of.iter() {
        zero.insert(window, &vm.zero(region, window, &bits));
    }
    zero
}
