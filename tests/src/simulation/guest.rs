//! The simulated guest: what a hypervisor process holds and does, whatever agents do.
//!
//! Owns memory, disks, CPU, dirty marks and device I/O in flight. The guest is deterministic: each step follows from its CPU
//! state alone, and changes it, so a copy that goes on from anything but exactly what was there is told apart by its next
//! write. A device transfer marks its block when it is submitted and lands later, without a mark, as `O_DIRECT` does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use vmferry_hypervisor::GuestLife;
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen, Run, WINDOW_BLOCKS, WindowBits, WindowIndex};
use vmferry_proto::spec::RegionKind;

use super::dice::{Dice, mix};
use super::facts::{Birth, Block, Contents, HostId, Image, VmId, What};
use super::plan::Flaw;
use super::tracking::Marks;
use super::world::{State, World};

/// Steps for which a guest is busy; after them it only ticks, so that long waits cost little.
const BUSY_STEPS: u64 = 500;
/// Between two steps of a guest that only ticks.
const TICK: Duration = Duration::from_secs(2);

/// What a hypervisor does with the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum VmState {
    /// It was launched, and waits to be recorded before it becomes a hypervisor.
    Staged,
    /// It waits for content.
    Incoming,
    /// It stands still.
    Paused,
    /// It runs.
    Running,
    /// It was shut down; the process is still there.
    ShutDown,
    /// The process is gone.
    Gone,
}

/// A device transfer that has not landed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    number: u64,
    region: usize,
    block: usize,
    stamp: u64,
}

/// A hypervisor process.
#[derive(Debug)]
pub(super) struct Vm {
    pub(super) id: VmId,
    pub(super) host: HostId,
    pub(super) state: VmState,
    pub(super) regions: Vec<(RegionKind, RegionLen)>,
    pub(super) image: Image,
    pub(super) cpu: u64,
    steps: u64,
    /// How often it was started.
    pub(super) starts: u64,
    /// Dirty marks, which outlive the agents.
    pub(super) marks: Marks,
    transfers: u64,
    pub(super) in_flight: Vec<Transfer>,
    /// Stopped, and its end is not told yet.
    draining: bool,
    pub(super) life: watch::Sender<GuestLife>,
}

impl Vm {
    pub(super) fn is_alive(&self) -> bool {
        self.state != VmState::Gone
    }

    pub(super) fn contents(&self) -> Contents {
        Contents {
            image: self.image.clone(),
            cpu: self.cpu,
        }
    }

    /// The last transfer that was submitted.
    pub(super) const fn newest_transfer(&self) -> u64 {
        self.transfers
    }

    /// Whether a transfer up to this one has not landed.
    pub(super) fn has_until(&self, number: u64) -> bool {
        self.in_flight.iter().any(|other| other.number <= number)
    }

    /// CPU and devices.
    pub(super) fn device_state(&self) -> Vec<u8> {
        let mut state = [self.cpu.to_le_bytes(), self.steps.to_le_bytes()].concat();
        let padding = usize::try_from(mix(self.cpu) % 5000).unwrap_or_default();
        state.resize(16 + padding, 0x5a);
        state
    }

    /// Takes the device state of another process; false where it is none.
    pub(super) fn load(&mut self, state: &[u8]) -> bool {
        let Some((numbers, padding)) = state.split_at_checked(16) else {
            return false;
        };
        let number = |bytes: &[u8]| {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            u64::from_le_bytes(eight)
        };
        self.cpu = number(&numbers[..8]);
        self.steps = number(&numbers[8..]);
        self.state = VmState::Paused;
        padding.iter().all(|byte| *byte == 0x5a)
    }

    /// Which of these blocks of a window are zero.
    pub(super) fn zero(&self, region: usize, window: WindowIndex, bits: &WindowBits) -> WindowBits {
        let mut zero = WindowBits::EMPTY;
        for block in bits.iter() {
            let index = block_index(window, block);
            // A block that a transfer will land in is there already, so it is read.
            let pinned = |other: &Transfer| (other.region, other.block) == (region, index);
            if matches!(self.image[region].get(index), Some(None))
                && !self.in_flight.iter().any(pinned)
            {
                zero.insert(block);
            }
        }
        zero
    }

    fn mark(&mut self, region: usize, block: usize) {
        let (window, block) = place(block);
        self.marks.mark(region, window, &one(block));
    }

    fn block_len(&self, region: usize, block: usize) -> usize {
        block_len(self.regions[region].1, block)
    }

    pub(super) fn read(&self, region: usize, runs: &[Run], buf: &mut [u8]) {
        let mut rest = buf;
        for (block, from, len) in pieces(runs) {
            let (piece, behind) = rest.split_at_mut(len);
            match self.image[region].get(block) {
                Some(Some(bytes)) => piece.copy_from_slice(&bytes[from..from + len]),
                Some(None) | None => piece.fill(0),
            }
            rest = behind;
        }
    }

    /// Writes `data`, or zeros, into whole blocks; `keeps` says which of them arrive.
    pub(super) fn write(
        &mut self,
        region: usize,
        runs: &[Run],
        data: Option<&[u8]>,
        mut keeps: impl FnMut() -> bool,
    ) {
        let mut rest = data;
        for (block, _, len) in pieces(runs) {
            let piece = rest.map(|rest| &rest[..len]);
            rest = rest.map(|rest| &rest[len..]);
            if keeps()
                && let Some(slot) = self.image[region].get_mut(block)
            {
                *slot = piece.and_then(block_of);
            }
        }
    }
}

/// Blocks of `runs`: index, first byte within it, length.
fn pieces(runs: &[Run]) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
    let size = u64::from(BLOCK_SIZE);
    runs.iter().flat_map(move |run| {
        let (mut at, end) = (run.offset, run.offset + u64::from(run.len));
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let from = at % size;
                let len = (size - from).min(end - at);
                let piece = (at / size, from, len);
                at += len;
                let index = |value| usize::try_from(value).unwrap_or(usize::MAX);
                (index(piece.0), index(piece.1), index(piece.2))
            })
        })
    })
}

/// Zero is stored as nothing, so that blocks compare by content.
fn block_of(bytes: &[u8]) -> Block {
    bytes
        .iter()
        .any(|byte| *byte != 0)
        .then(|| Arc::from(bytes))
}

fn place(block: usize) -> (WindowIndex, u32) {
    let block = u32::try_from(block).unwrap_or(u32::MAX);
    (WindowIndex(block / WINDOW_BLOCKS), block % WINDOW_BLOCKS)
}

/// Bytes of a block of a region of this length.
pub(super) fn block_len(len: RegionLen, block: usize) -> usize {
    let (window, block) = place(block);
    len.block_len(window, block) as usize
}

const fn block_index(window: WindowIndex, block: u32) -> usize {
    (window.0 * WINDOW_BLOCKS + block) as usize
}

fn one(block: u32) -> WindowBits {
    let mut bits = WindowBits::EMPTY;
    bits.insert(block);
    bits
}

/// Contents that many stamps stand for.
const SHARED: u64 = 24;

/// Bytes that `stamp` stands for: every eighth is zero, every fourth has one of a few contents, and no two of the others have the same.
fn content(stamp: u64, len: usize) -> Block {
    if stamp.is_multiple_of(8) {
        return None;
    }
    let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, len).collect();
    let mut word = if stamp % 4 == 2 {
        mix(stamp % (4 * SHARED))
    } else {
        stamp
    };
    // Compressible in part, as memory is.
    for line in Arc::make_mut(&mut bytes).chunks_mut(64) {
        for eight in line.chunks_mut(8) {
            eight.copy_from_slice(&word.to_le_bytes()[..eight.len()]);
        }
        word = mix(word);
    }
    Some(bytes)
}

impl State {
    /// A new hypervisor process.
    pub(super) fn new_vm(&mut self, host: HostId, birth: Birth) -> VmId {
        let id = VmId(u32::try_from(self.vms.len()).unwrap_or(u32::MAX));
        let regions = self.plan.regions.clone();
        let images = self.host(host).images.clone();
        let image = regions
            .iter()
            .zip(images)
            .map(|((kind, len), image)| match kind {
                RegionKind::Disk => image,
                RegionKind::Memory => empty(*len),
            })
            .collect();
        let vm = Vm {
            id,
            host,
            state: match birth {
                Birth::Incoming => VmState::Staged,
                Birth::Original | Birth::Booted => VmState::Paused,
            },
            image,
            cpu: mix(self.plan.seed ^ u64::from(id.0)),
            steps: 0,
            starts: 0,
            marks: Marks::new(regions.iter().map(|(_, len)| *len)),
            transfers: 0,
            in_flight: Vec::new(),
            draining: false,
            life: watch::Sender::new(GuestLife::Alive),
            regions,
        };
        self.vms.push(vm);
        id
    }

    /// Fills a fresh guest and tells of it.
    pub(super) fn fill(&mut self, id: VmId, birth: Birth, dice: &mut Dice) {
        let filled = self.plan.filled;
        if let Some(vm) = self.vm(id) {
            for region in 0..vm.regions.len() {
                for block in 0..vm.image[region].len() {
                    if birth == Birth::Original && dice.chance(filled) {
                        let len = vm.block_len(region, block);
                        vm.image[region][block] = content(dice.roll(), len);
                    }
                }
            }
        }
        self.tell_birth(id, birth);
    }

    pub(super) fn tell_birth(&mut self, id: VmId, birth: Birth) {
        if let Some(vm) = self.vm(id) {
            let (host, contents) = (vm.host, vm.contents());
            self.tell(What::Appeared {
                vm: id,
                host,
                birth,
                contents,
            });
        }
    }

    /// Makes durable what the disks of `id` hold.
    pub(super) fn flush(&mut self, id: VmId) {
        let Some(vm) = self.vm(id).filter(|vm| vm.is_alive()) else {
            return;
        };
        let (host, regions, image) = (vm.host, vm.regions.clone(), vm.image.clone());
        let images = &mut self.host(host).images;
        for ((kind, _), (to, from)) in regions.iter().zip(images.iter_mut().zip(image)) {
            if *kind == RegionKind::Disk {
                *to = from;
            }
        }
    }

    /// `cont`. Returns whether there is a guest that can run.
    pub(super) fn start(&mut self, world: &Arc<World>, id: VmId) -> bool {
        let Some(vm) = self.vm(id) else { return false };
        match vm.state {
            VmState::Running => return true,
            VmState::Paused => {}
            VmState::Staged | VmState::Incoming | VmState::ShutDown | VmState::Gone => {
                return false;
            }
        }
        vm.state = VmState::Running;
        vm.draining = false;
        vm.starts += 1;
        let (host, start, contents) = (vm.host, vm.starts, vm.contents());
        let records = self.durable_records(host);
        self.tell(What::Ran {
            vm: id,
            contents,
            records,
        });
        tokio::spawn(live(world.clone(), id, start));
        true
    }

    /// `stop`. Returns whether it ran and how often it was started.
    pub(super) fn stop(&mut self, id: VmId) -> Option<(bool, u64)> {
        let vm = self.vm(id)?;
        let ran = match vm.state {
            VmState::Running => true,
            VmState::Paused => false,
            VmState::Staged | VmState::Incoming | VmState::ShutDown | VmState::Gone => return None,
        };
        let starts = vm.starts;
        if ran {
            vm.state = VmState::Paused;
            vm.draining = true;
            self.told_to_stand(id);
        }
        Some((ran, starts))
    }

    fn told_to_stand(&mut self, id: VmId) {
        let Some(vm) = self.vm(id) else { return };
        if vm.draining && vm.in_flight.is_empty() {
            vm.draining = false;
            let contents = vm.contents();
            self.tell(What::Stood { vm: id, contents });
        }
    }

    /// Takes a reset that the guest had asked for into the pause that has just begun. Whether there was one.
    pub(super) fn take_reset(&mut self) -> bool {
        let meets = self.plan.resets > 0;
        if meets {
            self.plan.resets -= 1;
            self.tell(What::Note("the guest reset itself in the pause".to_owned()));
        }
        meets
    }

    /// The guest shuts itself down, if it runs.
    pub(super) fn shut_down(&mut self, host: HostId) {
        let running = |vm: &&mut Vm| vm.host == host && vm.state == VmState::Running;
        let Some(vm) = self.vms.iter_mut().find(running) else {
            return;
        };
        vm.state = VmState::ShutDown;
        vm.in_flight.clear();
        vm.life
            .send_replace(GuestLife::ShutDown("powered off".to_owned()));
        let id = vm.id;
        self.tell(What::Ended {
            vm: id,
            how: "shut down from inside",
            fault: true,
        });
    }

    /// One step of a running guest. Returns the transfer that it began.
    pub(super) fn step(&mut self, id: VmId) -> Option<Transfer> {
        let forgets = self.plan.flaw == Some(Flaw::LosesMarks) && self.dice.chance(20);
        let vm = self.vm(id)?;
        vm.steps += 1;
        vm.cpu = mix(vm.cpu ^ vm.steps);
        let mut dice = Dice::new(vm.cpu, 3);
        let region = usize::try_from(dice.below(vm.regions.len() as u64)).unwrap_or_default();
        let blocks = vm.image[region].len() as u64;
        // Half of the writes go to a few blocks.
        let span = if dice.chance(500) {
            blocks.min(8)
        } else {
            blocks
        };
        let block = usize::try_from(dice.below(span)).unwrap_or_default();
        let stamp = dice.roll();
        if !forgets {
            vm.mark(region, block);
        }
        if vm.regions[region].0 == RegionKind::Memory && dice.chance(250) {
            vm.transfers += 1;
            let transfer = Transfer {
                number: vm.transfers,
                region,
                block,
                stamp,
            };
            vm.in_flight.push(transfer);
            let cpu = vm.cpu;
            self.tell(What::Submitted { vm: id, cpu });
            return Some(transfer);
        }
        self.put(id, region, block, stamp);
        None
    }

    fn land(&mut self, id: VmId, transfer: Transfer) {
        let Some(vm) = self.vm(id) else { return };
        let before = vm.in_flight.len();
        vm.in_flight.retain(|other| other.number != transfer.number);
        if vm.in_flight.len() < before {
            // The guest learns of it.
            vm.cpu = mix(vm.cpu ^ transfer.stamp);
            self.put(id, transfer.region, transfer.block, transfer.stamp);
            self.told_to_stand(id);
        }
    }

    fn put(&mut self, id: VmId, region: usize, block: usize, stamp: u64) {
        let Some(vm) = self.vm(id) else { return };
        let bytes = content(stamp, vm.block_len(region, block));
        vm.image[region][block].clone_from(&bytes);
        let cpu = vm.cpu;
        self.tell(What::Wrote {
            vm: id,
            region,
            block,
            bytes,
            cpu,
        });
    }
}

/// A region of zeros.
pub(super) fn empty(len: RegionLen) -> Vec<Block> {
    vec![None; usize::try_from(len.blocks()).unwrap_or_default()]
}

/// The life of a guest from one start to its next stop.
async fn live(world: Arc<World>, id: VmId, start: u64) {
    loop {
        let pause = {
            let mut state = world.state();
            let pace = state.plan.pace_ms;
            let Some(vm) = state.vm(id) else { return };
            if vm.steps < BUSY_STEPS {
                Duration::from_millis(Dice::new(vm.cpu, 4).between(1, pace))
            } else {
                TICK
            }
        };
        tokio::time::sleep(pause).await;
        let transfer = {
            let mut state = world.state();
            let runs = |vm: &mut Vm| vm.state == VmState::Running && vm.starts == start;
            if !state.vm(id).is_some_and(runs) {
                return;
            }
            state.step(id)
        };
        if let Some(transfer) = transfer {
            tokio::spawn(fly(world.clone(), id, transfer));
        }
    }
}

async fn fly(world: Arc<World>, id: VmId, transfer: Transfer) {
    let takes = Dice::new(transfer.stamp, 5).millis(1, 40);
    tokio::time::sleep(takes).await;
    world.state().land(id, transfer);
    world.changed();
}
