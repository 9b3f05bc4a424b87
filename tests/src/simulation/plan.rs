//! What is to happen in a run, all drawn from its seed before it begins.
//!
//! Owns the distributions: sizes of the guest, the link, what users and administrators do, which faults strike at which effect
//! or time. Also the flaws that a test builds in on purpose, to show that the checkers find them.

use std::time::Duration;

use vmferry_common::compress::CompressMode;
use vmferry_common::units::Rate;
use vmferry_proto::geometry::{BLOCK_SIZE, RegionLen};
use vmferry_proto::spec::{RegionKind, RunState};
use vmferry_src::cli::Verify;
use vmferry_src::policy::{Cutover, Limits, OnStall};

use super::dice::Dice;
use super::facts::HostId;

/// Something is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// The source's driver forgets one dirty mark in fifty.
    LosesMarks,
    /// The source's driver does not wait for device I/O in flight.
    SkipsBarrier,
    /// The destination's hypervisor runs as soon as it has its device state.
    StartsByItself,
    /// The source's driver lets the guest run when an agent attaches.
    ResumesAtAttach,
    /// The disks of both hosts say that they synced, and did not.
    LyingSync,
    /// The destination's hypervisor drops one write in five hundred.
    LosesWrites,
    /// The source's driver says which marks it is about to take only once it has them.
    ForgetsScan,
    /// The source's hypervisor forgets a bitmap once it was read, before anybody else has what it held.
    ForgetsBitmap,
    /// The destination's hypervisor begins before it is recorded, and goes on when its agent dies.
    BeginsUnrecorded,
    /// The destination's hypervisor says that what it was given is on its disk, and it is not.
    ClaimsFlushed,
}

/// What an effect of an agent belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The journal: each step of it.
    Journal,
    /// The hypervisor: each order to it.
    Control,
    /// Memory and disks: each read and write.
    Data,
    /// What is left for a later agent: each word of it, and each step of its records.
    Notes,
}

impl Class {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Journal, Self::Control, Self::Data, Self::Notes];
}

/// What strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    /// The host's agent is killed, and started again after this time.
    KillAgent(Duration),
    /// The host's hypervisor of the guest dies.
    KillVm,
    /// The host's agent is killed with its hypervisor of the guest.
    KillAgentAndVm(Duration),
    /// The host's agent is killed, and what it leaves in its run folder is lost: somebody cleans up there.
    KillAgentAndNotes(Duration),
    /// The host loses power for this time: agent, hypervisor, and whatever was not synced.
    Power(Duration),
    /// Both agents are killed.
    KillBoth(Duration),
    /// No packet passes for this time.
    CutLink(Duration),
    /// The effect itself fails, with an error to its agent.
    Fail,
}

/// A strike at the n-th effect of a class on a host.
#[derive(Debug, Clone, Copy)]
pub struct Trap {
    /// Where.
    pub host: HostId,
    /// At which kind of effect.
    pub class: Class,
    /// At which one, counted from 1 since the run began.
    pub nth: u64,
    /// Whether the effect has happened by then.
    pub late: bool,
    /// What.
    pub strike: Strike,
}

/// What happens at a time.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// A strike on a host.
    Strike(HostId, Strike),
    /// The destination host is lost for good; later an administrator fences it and says so.
    LoseBeta,
    /// `vmferry-src cutover`.
    Cutover,
    /// `vmferry-src cancel`.
    Cancel,
    /// Two signals: the program is to stop.
    Leave,
    /// The destination's agent is told to stop, and started again.
    StopBeta,
    /// The guest shuts itself down.
    ShutDown,
}

/// How the link is.
#[derive(Debug, Clone, Copy)]
pub struct Link {
    /// Milliseconds that each packet takes.
    pub delay_ms: u64,
    /// At most so many more, drawn for each packet: this is what reorders.
    pub jitter_ms: u64,
    /// Packets lost, of 1,000.
    pub loss: u64,
    /// Packets that come twice, of 1,000.
    pub twice: u64,
}

/// What is wanted of the migration.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// The policy's limits.
    pub limits: Limits,
    /// `--max-bandwidth`.
    pub max_bandwidth: Option<Rate>,
    /// `--lanes`.
    pub lanes: u8,
    /// `--connections`.
    pub connections: u8,
    /// `--verify`.
    pub verify: Verify,
    /// `--compress`; never `auto`, which looks at this machine's clock.
    pub compress: CompressMode,
}

/// Everything of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where it all comes from.
    pub seed: u64,
    /// The guest's regions.
    pub regions: Vec<(RegionKind, RegionLen)>,
    /// Blocks of each region that are not zero at first, of 1,000.
    pub filled: u64,
    /// Whether the destination's disk image holds old data.
    pub reused_image: bool,
    /// Whether the guest runs.
    pub run_state: RunState,
    /// Longest time between two steps of the guest, in milliseconds.
    pub pace_ms: u64,
    /// The link.
    pub link: Link,
    /// What is wanted.
    pub wish: Wish,
    /// So many pauses, the first ones, meet a reset that the guest had asked for just before.
    pub resets: u64,
    /// Strikes at effects.
    pub traps: Vec<Trap>,
    /// Strikes at times, and what people do.
    pub acts: Vec<(Duration, Act)>,
    /// From here on nothing strikes any more, the link is whole and both hosts are up.
    pub quiet: Duration,
    /// For how long the destination keeps a copy without its source.
    pub keep: Duration,
    /// What is broken on purpose.
    pub flaw: Option<Flaw>,
}

/// Most strikes in a run; more would only hide each other.
const MAX_STRIKES: u64 = 4;

impl Plan {
    /// The plan of `seed`.
    #[must_use]
    pub fn of(seed: u64, flaw: Option<Flaw>) -> Self {
        let mut dice = Dice::new(seed, 1);
        let dice = &mut dice;
        let quiet = dice.millis(5_000, 240_000);
        Self {
            seed,
            regions: regions(dice),
            filled: dice.pick(&[20, 100, 400]),
            reused_image: dice.chance(300),
            run_state: if dice.chance(80) {
                RunState::Paused
            } else {
                RunState::Running
            },
            pace_ms: dice.pick(&[2, 8, 40, 200]),
            link: link(dice),
            wish: wish(dice),
            resets: 0,
            traps: Vec::new(),
            acts: Vec::new(),
            quiet,
            keep: dice.millis(1_000, 300_000),
            flaw,
        }
        .with_strikes(dice)
        .with_people(dice)
    }

    fn with_strikes(self, dice: &mut Dice) -> Self {
        let scans = |plan: Self, dice: &mut Dice| plan.with_source_killed_in_scans(dice);
        let flushes = |plan: Self, dice: &mut Dice| plan.with_destination_killed_in_copy(dice);
        match self.flaw {
            // These show only where an agent is killed at just that moment.
            Some(Flaw::ForgetsScan | Flaw::ForgetsBitmap) => scans(self, dice),
            Some(Flaw::ClaimsFlushed) => flushes(self, dice),
            Some(_) => self.with_any_strikes(dice),
            None => match dice.below(12) {
                0 => scans(self, dice),
                1 => flushes(self, dice),
                2 => self.with_source_ledger_lost(dice),
                3 => self.with_source_left_in_doubt(dice),
                _ => self.with_any_strikes(dice),
            },
        }
    }

    /// The source's agent is killed several times just behind orders to its hypervisor, most of which take dirty marks.
    fn with_source_killed_in_scans(mut self, dice: &mut Dice) -> Self {
        // Until somebody says so it scans again and again.
        self.wish.limits.cutover = Cutover::Manual;
        for _ in 0..MAX_STRIKES {
            self.traps.push(Trap {
                host: HostId::Alpha,
                class: Class::Control,
                nth: dice.between(8, 120),
                late: true,
                strike: Strike::KillAgent(dice.millis(1, 2_000)),
            });
        }
        self
    }

    /// The source's agent is killed in a copy that lasts, and nothing is left of its ledger.
    fn with_source_ledger_lost(mut self, dice: &mut Dice) -> Self {
        self.wish.limits.cutover = Cutover::Manual;
        // A guest that is soon calm, a copy that is whole and still there: something is equal then.
        self.pace_ms = 2;
        self.keep = self.keep.max(Duration::from_secs(60));
        let at = dice.millis(200, 4_000).min(self.quiet);
        let strike = Strike::KillAgentAndNotes(dice.millis(1, 2_000));
        self.acts.push((at, Act::Strike(HostId::Alpha, strike)));
        self.acts.push((at + Duration::from_secs(5), Act::Cutover));
        self
    }

    /// The link is cut for long at a step of the source's journal, often enough behind COMMITTING, and its program is told to leave
    /// meanwhile.
    fn with_source_left_in_doubt(mut self, dice: &mut Dice) -> Self {
        self.wish.limits.cutover = Cutover::Manual;
        self.quiet = self.quiet.max(Duration::from_secs(120));
        self.traps.push(Trap {
            host: HostId::Alpha,
            class: Class::Journal,
            nth: dice.between(10, 80),
            late: true,
            strike: Strike::CutLink(dice.millis(45_000, 90_000)),
        });
        self.acts.push((dice.millis(9_000, 20_000), Act::Leave));
        self
    }

    /// The destination's agent and its hypervisor die together while the disks fill, as a rule with some of it flushed.
    fn with_destination_killed_in_copy(mut self, dice: &mut Dice) -> Self {
        // It flushes each second, and the copy must last until then.
        let at = dice.millis(1_000, 8_000).min(self.quiet);
        self.wish.limits.cutover = Cutover::Manual;
        let strike = Strike::KillAgentAndVm(dice.millis(1, 2_000));
        self.acts.push((at, Act::Strike(HostId::Beta, strike)));
        self
    }

    fn with_any_strikes(mut self, dice: &mut Dice) -> Self {
        let count = if dice.chance(100) {
            0
        } else {
            dice.between(1, MAX_STRIKES)
        };
        for _ in 0..count {
            let host = dice.pick(&[HostId::Alpha, HostId::Beta]);
            let strike = strike(dice);
            if dice.chance(750) {
                let class = dice.pick(&[
                    Class::Journal,
                    Class::Journal,
                    Class::Control,
                    Class::Control,
                    Class::Data,
                    Class::Notes,
                ]);
                let most = match class {
                    Class::Journal => 80,
                    Class::Control => 120,
                    Class::Data => 400,
                    Class::Notes => 1_000,
                };
                self.traps.push(Trap {
                    host,
                    class,
                    nth: dice.pick(&[dice.clone().between(1, most), dice.clone().spread(1, most)]),
                    late: dice.chance(500),
                    strike,
                });
            } else if strike != Strike::Fail {
                let at = self.some_time(dice);
                self.acts.push((at, Act::Strike(host, strike)));
            }
        }
        if dice.chance(40) {
            let at = self.some_time(dice);
            self.acts.push((at, Act::LoseBeta));
        }
        self
    }

    fn with_people(mut self, dice: &mut Dice) -> Self {
        for (act, per_mille) in [
            (Act::Cancel, 150),
            (Act::Leave, 80),
            (Act::StopBeta, 60),
            (Act::ShutDown, 30),
        ] {
            if dice.chance(per_mille) {
                let at = self.some_time(dice);
                self.acts.push((at, act));
            }
        }
        let asked = |(_, act): &(Duration, Act)| matches!(act, Act::Cutover);
        if self.wish.limits.cutover == Cutover::Manual && !self.acts.iter().any(asked) {
            let at = self.some_time(dice);
            self.acts.push((at, Act::Cutover));
        }
        self.acts.sort_by_key(|(at, _)| *at);
        if dice.chance(60) {
            self.resets = dice.between(1, 3);
        }
        self
    }

    /// Mostly while the first seconds of a migration pass.
    fn some_time(&self, dice: &mut Dice) -> Duration {
        dice.millis(1, 8_000).min(self.quiet)
    }
}

fn strike(dice: &mut Dice) -> Strike {
    let short = dice.millis(1, 30_000);
    match dice.below(100) {
        0..40 => Strike::KillAgent(short),
        40..48 => Strike::KillBoth(short),
        48..53 => Strike::KillVm,
        53..60 => Strike::KillAgentAndVm(short),
        60..66 => Strike::Power(short),
        66..82 => Strike::CutLink(dice.millis(50, 120_000)),
        _ => Strike::Fail,
    }
}

fn regions(dice: &mut Dice) -> Vec<(RegionKind, RegionLen)> {
    let block = u64::from(BLOCK_SIZE);
    let mut regions = vec![(
        RegionKind::Memory,
        RegionLen(block * dice.pick(&[24, 100, 530, 1100])),
    )];
    if dice.chance(300) {
        regions.push((RegionKind::Memory, RegionLen(block * dice.between(1, 8))));
    }
    if dice.chance(800) {
        // A disk's last block may be short.
        let len = block * dice.pick(&[16, 64, 520]) + dice.pick(&[0, 512, 3584]);
        regions.push((RegionKind::Disk, RegionLen(len)));
    }
    regions
}

fn link(dice: &mut Dice) -> Link {
    Link {
        delay_ms: dice.pick(&[1, 1, 2, 10, 50]),
        jitter_ms: dice.pick(&[0, 0, 1, 5, 30]),
        loss: dice.pick(&[0, 0, 0, 5, 30]),
        twice: dice.pick(&[0, 0, 10]),
    }
}

fn wish(dice: &mut Dice) -> Wish {
    let max_downtime = dice.millis(20, 2_000);
    let connections = dice.pick(&[1, 1, 1, 2]);
    Wish {
        limits: Limits {
            max_downtime,
            pause_timeout: dice.chance(300).then(|| max_downtime * 2),
            timeout: dice.millis(2_000, 900_000),
            on_stall: dice.pick(&[OnStall::Abort, OnStall::Force]),
            cutover: dice.pick(&[Cutover::Auto, Cutover::Auto, Cutover::Manual]),
        },
        max_bandwidth: dice
            .chance(500)
            .then(|| Rate(dice.spread(500_000, 20_000_000))),
        lanes: dice.pick(&[2, 4]).max(connections),
        connections,
        verify: dice.pick(&[Verify::Off, Verify::Off, Verify::Sample, Verify::Full]),
        compress: dice.pick(&[CompressMode::Off, CompressMode::Level(1)]),
    }
}
