//! What was seen to happen in a run: the only thing that the checkers know.
//!
//! Owns the log's words. A fact is written down by the part of the world that it happens to (a guest that begins to run says so
//! itself), never by an agent.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmferry_src::report::GuestNow;

/// A block's bytes; `None` is all zero.
pub type Block = Option<Arc<[u8]>>;
/// The blocks of every region of a guest.
pub type Image = Vec<Vec<Block>>;

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HostId {
    /// Where the guest is at first.
    Alpha,
    /// Where it is to go.
    Beta,
}

/// A hypervisor process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VmId(pub u32);

/// What a guest is at one moment.
#[derive(Clone, PartialEq, Eq)]
pub struct Contents {
    /// Memory and disks.
    pub image: Image,
    /// CPU: depends on every step so far.
    pub cpu: u64,
}

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cpu {:016x}", self.cpu)
    }
}

/// How a hypervisor came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// It holds the guest when the run begins.
    Original,
    /// It waits for content.
    Incoming,
    /// The host was asked `owner`, was told that it may, and booted the guest afresh.
    Booted,
}

/// Both records of the guest as a host would find them after a power cut at this moment.
#[derive(Clone, Default)]
pub struct DurableRecords {
    /// The source's.
    pub source: Option<Vec<u8>>,
    /// The destination's.
    pub destination: Option<Vec<u8>>,
}

impl fmt::Debug for DurableRecords {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let len = |record: &Option<Vec<u8>>| record.as_ref().map(Vec::len);
        write!(
            f,
            "source {:?}, destination {:?} bytes",
            len(&self.source),
            len(&self.destination)
        )
    }
}

/// Something that happened.
#[derive(Debug, Clone)]
pub enum What {
    /// A hypervisor is there.
    Appeared {
        /// Which.
        vm: VmId,
        /// Where.
        host: HostId,
        /// How.
        birth: Birth,
        /// What it holds.
        contents: Contents,
    },
    /// A guest runs from now on.
    Ran {
        /// Which.
        vm: VmId,
        /// What it is.
        contents: Contents,
        /// What its host's disk says.
        records: DurableRecords,
    },
    /// A guest stands still from now on, its device I/O in flight landed.
    Stood {
        /// Which.
        vm: VmId,
        /// What it is.
        contents: Contents,
    },
    /// A guest began a device transfer, which is no write before it lands.
    Submitted {
        /// Which.
        vm: VmId,
        /// CPU after it.
        cpu: u64,
    },
    /// A guest wrote.
    Wrote {
        /// Which.
        vm: VmId,
        /// Region.
        region: usize,
        /// Block.
        block: usize,
        /// The block's bytes from now on.
        bytes: Block,
        /// CPU after it.
        cpu: u64,
    },
    /// A waiting hypervisor took the device state.
    Loaded {
        /// Which.
        vm: VmId,
        /// What it is now.
        contents: Contents,
    },
    /// A file of a host's journal, or its folder, was made durable.
    Synced {
        /// Whose.
        host: HostId,
    },
    /// A hypervisor is gone.
    Ended {
        /// Which.
        vm: VmId,
        /// By what.
        how: &'static str,
        /// Whether it was one of the simulation's faults: then the guest may be lost with it.
        fault: bool,
    },
    /// A host's agent begins a life.
    AgentStarted {
        /// Where.
        host: HostId,
        /// Its number.
        life: u64,
    },
    /// The destination host is gone for good.
    GoneForGood,
    /// Faults stop here.
    Quiet,
    /// The source's program ended with a report.
    Reported {
        /// Its outcome.
        outcome: &'static str,
        /// Where it says that the guest is.
        guest_now: GuestNow,
        /// Bytes that were found equal at the destination.
        kept: u64,
        /// Blocks that were sent as references to others.
        duplicates: u64,
    },
    /// All is settled, as far as the run can see.
    Settled {
        /// Whether it was settled within the bound.
        in_time: bool,
        /// Waiting or paused copies at the destination that nobody owns.
        leftovers: Vec<VmId>,
    },
    /// Anything else, for whoever reads the log.
    Note(String),
}

/// A fact and its time since the run began.
#[derive(Debug, Clone)]
pub struct Fact {
    /// When.
    pub at: Duration,
    /// What.
    pub what: What,
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>9.3} ", self.at.as_secs_f64())?;
        match &self.what {
            What::Note(text) => f.write_str(text),
            What::Submitted { vm, cpu } => {
                write!(f, "vm {} began a transfer, cpu {cpu:016x}", vm.0)
            }
            What::Wrote {
                vm,
                region,
                block,
                bytes,
                cpu,
            } => write!(
                f,
                "vm {} wrote region {region} block {block} ({}), cpu {cpu:016x}",
                vm.0,
                if bytes.is_some() { "data" } else { "zero" }
            ),
            other => write!(f, "{other:?}"),
        }
    }
}
