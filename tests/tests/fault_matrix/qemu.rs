//! The moments that differ for a real guest: its memory is tracked inside its hypervisor, its disks are exported and marked there, and
//! its destination's hypervisor is used up by one load.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use vmferry_tests::harness::hosts::Agent;
use vmferry_tests::harness::process::{self, Finished, Running, descriptors};
use vmferry_tests::harness::qemu::{Hold, Pair, Side, wait_gone};
use vmferry_tests::harness::role::{Programs, Role};
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Proxy, doubt};
use vmferry_tests::lab::{Content, Disk, JudgeParams, Lab, Qemu, Start};

use super::PROGRAMS;
use super::fault::{PHASES, Place, Victim, is_before_the_decision};

const END: Duration = Duration::from_secs(180);
const MIB: u64 = 1 << 20;
/// The guest stands still for no longer than this before COMMITTING, whatever is struck.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(8);
const OPTIONS: [&str; 4] = ["--max-downtime", "5s", "--pause-timeout", "8s"];
const CUT: Duration = Duration::from_millis(1500);

/// What is run always: each victim, each phase, and the moments around the decision most of all.
const ALWAYS: [(Victim, &[&str]); 6] = [
    (
        Victim::SourceAgent,
        &["copy", "converged", "load", "release"],
    ),
    (
        Victim::DestinationAgent,
        &["prepare", "copy", "final", "commit"],
    ),
    (
        Victim::BothAgents,
        &["negotiate", "copy", "pause", "commit"],
    ),
    (Victim::SourceGuest, &["pause", "commit"]),
    (
        Victim::DestinationGuest,
        &["converged", "load", "commit", "start"],
    ),
    (Victim::Link, &["copy", "final", "commit", "start"]),
];

macro_rules! victims {
    ($($always:ident, $all:ident: $victim:ident;)*) => {$(
        #[test]
        fn $always() {
            let row = ALWAYS.iter().find(|(victim, _)| *victim == Victim::$victim);
            strike(Victim::$victim, row.unwrap().1);
        }

        #[test]
        #[ignore = "the whole matrix takes minutes: a half of it is run always"]
        fn $all() {
            strike(Victim::$victim, &PHASES);
        }
    )*};
}

victims! {
    the_source_agent_of_a_real_guest_is_killed, source_agent_at_every_phase: SourceAgent;
    the_destination_agent_of_a_real_guest_is_killed, destination_agent_at_every_phase: DestinationAgent;
    both_agents_of_a_real_guest_are_killed, both_agents_at_every_phase: BothAgents;
    the_qemu_at_the_source_is_killed, source_qemu_at_every_phase: SourceGuest;
    the_qemu_at_the_destination_is_killed, destination_qemu_at_every_phase: DestinationGuest;
    the_link_of_a_real_guest_is_cut_and_restored, link_at_every_phase: Link;
}

fn strike(victim: Victim, phases: &[&'static str]) {
    let Some(lab) = Lab::get() else { return };
    for phase in phases {
        if let Some(place) = victim.leaves_it(phase) {
            println!("--- {victim:?} of a real guest in phase {phase}");
            let began = Instant::now();
            let name = format!("{victim:?}-{phase}").to_lowercase();
            Scene::at(lab, &name, phase).strike(victim).settled(place);
            println!("--- settled after {:.1?}", began.elapsed());
        }
    }
}

/// A migration that stands in a phase.
pub(crate) struct Scene {
    pub(crate) pair: Pair,
    pub(crate) source: Qemu,
    pub(crate) agent: Agent,
    pub(crate) proxy: Proxy,
    pub(crate) hold: Option<Hold>,
    pub(crate) migration: Option<Running>,
    /// Descriptors of the source's QEMU before anybody touched it.
    before: Vec<String>,
    done: Option<Finished>,
    phase: &'static str,
}

impl Scene {
    pub(crate) fn at(lab: &'static Lab, name: &str, phase: &'static str) -> Self {
        let mut scene = Self::set(lab, name, phase);
        scene.begin();
        scene
    }

    /// All is there, and nothing has begun.
    pub(crate) fn set(lab: &'static Lab, name: &str, phase: &'static str) -> Self {
        let guest = lab
            .guest(name)
            .memory_mib(128)
            .disk(Disk::qcow2(16 * MIB))
            .judge(JudgeParams {
                memory: 32 * MIB,
                working_set: 8 * MIB,
                content: Content::Random,
                ..JudgeParams::default()
            })
            .build();
        let programs = Programs::played_by(PROGRAMS.as_ref());
        let pair = Pair::new(programs, guest.unwrap()).unwrap();
        pair.expect_launched().unwrap();
        let source = pair.boot().unwrap();
        let before = descriptors(source.pid());
        let agent = pair.beta.host.serve(&[]).unwrap();
        let proxy = Proxy::to(agent.port).unwrap();
        Self {
            pair,
            source,
            agent,
            proxy,
            hold: None,
            migration: None,
            before,
            done: None,
            phase,
        }
    }

    pub(crate) fn name(&self) -> &str {
        self.pair.guest.name()
    }

    /// The migration, until it stands in the phase.
    pub(crate) fn begin(&mut self) {
        let phase = self.phase;
        let late = matches!(phase, "commit" | "start");
        let hold = if late {
            self.pair.beta.hold_at("load")
        } else {
            self.pair.alpha.hold_at(phase)
        };
        let hold = hold.unwrap();
        let port = self.proxy.port();
        let begun = self
            .pair
            .alpha
            .host
            .start_migrate(self.name(), port, &OPTIONS);
        let mut migration = begun.unwrap();
        hold.wait_reached(&mut migration).unwrap();
        match phase {
            "commit" => {
                self.proxy.cut_there();
                hold.release().unwrap();
                assert!(soon(|| self.recorded(Role::Source) == "COMMITTING"));
            }
            "start" => {
                self.proxy.delay_back(Duration::from_secs(4));
                hold.release().unwrap();
                assert!(soon(|| self.recorded(Role::Destination) == "OWNED"));
                assert!(soon(|| self.pair.guest.beats().pids().len() == 2));
            }
            _ => self.hold = Some(hold),
        }
        self.migration = Some(migration);
    }

    /// State of the record of one side.
    pub(crate) fn recorded(&self, role: Role) -> String {
        let host = match role {
            Role::Destination => &self.pair.beta.host,
            Role::Source | Role::SimGuest => &self.pair.alpha.host,
        };
        let said = host.ask(role, "owner", self.name(), &["--json"]).unwrap();
        let state = said.json().map(|said| said["state"].clone());
        state
            .unwrap_or_default()
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }

    /// The fault, and what an administrator does about it.
    fn strike(mut self, victim: Victim) -> Self {
        match victim {
            Victim::SourceAgent => self.kill_source_agent(),
            Victim::DestinationAgent => self.kill_destination_agent(),
            Victim::BothAgents => {
                self.kill_source_agent();
                self.kill_destination_agent();
            }
            Victim::SourceGuest => process::kill(self.source.pid()),
            Victim::DestinationGuest => self.kill_incoming(),
            Victim::Link => self.proxy.cut(),
        }
        if let Some(hold) = self.hold.take() {
            hold.release().unwrap();
        }
        if victim == Victim::Link {
            std::thread::sleep(CUT);
        }
        if matches!(victim, Victim::DestinationAgent | Victim::BothAgents) {
            self.agent = self.pair.beta.host.serve_at(self.agent.port, &[]).unwrap();
        }
        self.proxy.restore();
        self.done = Some(match self.migration.take() {
            Some(migration) => migration.wait(END).unwrap(),
            None => {
                let alpha = &self.pair.alpha.host;
                alpha
                    .ask(Role::Source, "recover", self.name(), &["--json"])
                    .unwrap()
            }
        });
        self
    }

    fn kill_source_agent(&mut self) {
        doubt::kill(self.migration.take().unwrap());
    }

    pub(crate) fn kill_destination_agent(&mut self) {
        self.agent.process.signal(Signal::KILL).unwrap();
        let agent = &mut self.agent.process;
        assert!(soon(|| agent.has_ended().unwrap()));
    }

    fn kill_incoming(&self) {
        let folder = self.pair.beta.place.folder().display().to_string();
        let pids = process::with_words(&folder);
        assert!(!pids.is_empty(), "no QEMU was launched at beta");
        pids.into_iter().for_each(process::kill);
    }

    /// The source, which nobody struck, hears that its guest has moved.
    pub(crate) fn committed(mut self) {
        let done = self.migration.take().unwrap().wait(END).unwrap();
        let there = self.agent.process.stderr();
        assert_eq!(done.code(), 0, "{}{there}", done.stderr);
        self.moved();
    }

    /// The migration, which nobody struck, ends by itself; the guest is where its exit code says.
    pub(crate) fn told(mut self) {
        self.done = Some(self.migration.take().unwrap().wait(END).unwrap());
        self.settled(Place::AsTold);
    }

    fn settled(self, place: Place) {
        let done = self.done.as_ref().unwrap();
        println!("{}{}", done.stdout, done.stderr);
        let place = match (place, done.code()) {
            (Place::AsTold, 0) => Place::Beta,
            (Place::AsTold, 1) => Place::Alpha,
            (Place::AsTold, code) => panic!("exit code {code}"),
            (place, _) => place,
        };
        match place {
            Place::Alpha | Place::AsTold => self.stayed(),
            Place::Beta => self.moved(),
            Place::DiedAtAlpha => {
                wait_gone(self.source.pid()).unwrap();
                self.pair.nothing_at(&self.pair.beta).unwrap();
                assert_eq!(done.json().unwrap()["guest_now"], "ended");
                self.owned_by(true);
                let pair = &self.pair;
                self.boots_and_moves((&pair.alpha, &pair.beta), &self.agent);
            }
            // It lived there, and nobody runs it elsewhere.
            Place::DiedAtBeta => {
                wait_gone(self.source.pid()).unwrap();
                self.owned_by(false);
                let back = self.pair.alpha.host.serve(&[]).unwrap();
                self.boots_and_moves((&self.pair.beta, &self.pair.alpha), &back);
            }
        }
    }

    /// What died is booted where it lived, and moves from there.
    fn boots_and_moves(&self, way: (&Side, &Side), agent: &Agent) {
        let _booted = way.0.start(Start::Boot).unwrap();
        self.pair.guest.wait_ready_again(2).unwrap();
        self.pair.move_guest(way, agent, &OPTIONS).unwrap();
    }

    fn stayed(&self) {
        let pair = &self.pair;
        pair.stayed(self.source.pid(), &pair.beta).unwrap();
        pair.guest.verify_now().unwrap();
        let mut now = Vec::new();
        let traceless = soon(|| {
            now = descriptors(self.source.pid());
            now == self.before
        });
        assert!(traceless, "descriptors {:?} became {now:?}", self.before);
        self.owned_by(true);
        pair.move_guest((&pair.alpha, &pair.beta), &self.agent, &OPTIONS)
            .unwrap();
        self.expect_handovers(1);
    }

    fn moved(&self) {
        let pair = &self.pair;
        wait_gone(self.source.pid()).unwrap();
        pair.guest.wait_for_beats(100).unwrap();
        pair.guest.verify_now().unwrap();
        self.owned_by(false);
        let back = pair.alpha.host.serve(&[]).unwrap();
        pair.move_guest((&pair.beta, &pair.alpha), &back, &OPTIONS)
            .unwrap();
        self.expect_handovers(2);
    }

    /// No beat is missing, and before the decision the guest stood still for no longer than the pause timeout.
    fn expect_handovers(&self, count: usize) {
        let report = self.pair.unbroken(1).unwrap();
        assert_eq!(report.handovers.len(), count);
        let longest = report.longest.unwrap().length;
        if is_before_the_decision(self.phase) {
            assert!(longest <= PAUSE_TIMEOUT, "{longest:?}");
        }
    }

    /// Both programs of both hosts name the owner. A host that no session ever reached has no record, and nothing to say.
    fn owned_by(&self, alpha: bool) {
        for (side, here) in [(&self.pair.alpha, alpha), (&self.pair.beta, !alpha)] {
            for role in [Role::Source, Role::Destination] {
                let said = side.host.ask(role, "owner", self.name(), &["--json"]);
                let said = said.unwrap();
                if !said.json().unwrap()["state"].is_null() {
                    assert_eq!(said.code(), i32::from(!here), "{}", said.stdout);
                }
            }
        }
    }
}
