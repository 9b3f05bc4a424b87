//! All faults at all phases, with the embedded guest.

use std::time::Duration;

use rustix::process::Signal;
use vmferry_tests::harness::doubt::{answer_held_back, commit_into_the_void, kill};
use vmferry_tests::harness::process::{self, Finished, Running, descriptors};
use vmferry_tests::harness::role::Role;
use vmferry_tests::harness::scripts::Gate;
use vmferry_tests::harness::stage::soon;
use vmferry_tests::harness::{Host, Proxy, SimGuest, SimSpec, Stage};

use super::PROGRAMS;
use super::fault::{PHASES, Place, Victim, is_before_the_decision};

const END: Duration = Duration::from_secs(120);
/// The guest stands still for no longer than this before COMMITTING, whatever happens to the link.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(4);
const OPTIONS: [&str; 4] = ["--max-downtime", "3s", "--pause-timeout", "4s"];
/// How long the link is cut.
const CUT: Duration = Duration::from_millis(1500);

fn small() -> SimSpec {
    SimSpec {
        ram: 16 << 20,
        disk: 4 << 20,
        dirty_rate: 1 << 20,
        working_set: 1 << 20,
        disk_rate: 256 << 10,
        ..SimSpec::small("web")
    }
}

#[test]
fn the_source_agent_is_killed() {
    strike_at_every_phase(Victim::SourceAgent);
}

#[test]
fn the_destination_agent_is_killed() {
    strike_at_every_phase(Victim::DestinationAgent);
}

#[test]
fn both_agents_are_killed() {
    strike_at_every_phase(Victim::BothAgents);
}

#[test]
fn the_guest_is_killed_at_the_source() {
    strike_at_every_phase(Victim::SourceGuest);
}

#[test]
fn the_guest_is_killed_at_the_destination() {
    strike_at_every_phase(Victim::DestinationGuest);
}

#[test]
fn the_link_is_cut_and_restored() {
    strike_at_every_phase(Victim::Link);
}

fn strike_at_every_phase(victim: Victim) {
    for phase in PHASES {
        if let Some(place) = victim.leaves_it(phase) {
            println!("--- {victim:?} in phase {phase}");
            Scene::at(phase).strike(victim).settled(place);
        }
    }
}

/// A migration that stands in a phase.
struct Scene {
    phase: &'static str,
    victim: Option<Victim>,
    stage: Stage,
    guest: SimGuest,
    proxy: Proxy,
    gate: Option<Gate>,
    migration: Option<Running>,
    /// Descriptors of the guest's process before anybody touched it.
    before: Vec<String>,
    done: Option<Finished>,
}

impl Scene {
    fn at(phase: &'static str) -> Self {
        let stage = Stage::set(PROGRAMS);
        let guest = stage.guest(small());
        let proxy = Proxy::to(stage.agent.port).unwrap();
        let before = descriptors(guest.first_pid());
        let mut gate = None;
        let migration = match phase {
            "commit" => commit_into_the_void(&stage, &proxy),
            "start" => answer_held_back(&stage, &guest, &proxy),
            held => {
                let held = gate.insert(stage.alpha.gate(held).unwrap());
                let begun = stage.alpha.start_migrate("web", proxy.port(), &OPTIONS);
                let mut migration = begun.unwrap();
                held.wait_reached(&mut migration).unwrap();
                migration
            }
        };
        Self {
            phase,
            victim: None,
            stage,
            guest,
            proxy,
            gate,
            migration: Some(migration),
            before,
            done: None,
        }
    }

    /// The fault, and what an administrator does about it.
    fn strike(mut self, victim: Victim) -> Self {
        self.victim = Some(victim);
        match victim {
            Victim::SourceAgent => self.kill_source_agent(),
            Victim::DestinationAgent => self.kill_destination_agent(),
            Victim::BothAgents => {
                self.kill_source_agent();
                self.kill_destination_agent();
            }
            Victim::SourceGuest => process::kill(self.guest.first_pid()),
            Victim::DestinationGuest => self.kill_incoming(),
            Victim::Link => self.proxy.cut(),
        }
        if let Some(gate) = self.gate.take() {
            gate.remove().unwrap();
        }
        if victim == Victim::Link {
            std::thread::sleep(CUT);
        }
        if matches!(victim, Victim::DestinationAgent | Victim::BothAgents) {
            self.stage.agent = self
                .stage
                .beta
                .serve_at(self.stage.agent.port, &[])
                .unwrap();
        }
        self.proxy.restore();
        self.done = Some(match self.migration.take() {
            Some(migration) => migration.wait(END).unwrap(),
            None => self.recover(),
        });
        self
    }

    fn kill_source_agent(&mut self) {
        kill(self.migration.take().unwrap());
    }

    fn kill_destination_agent(&mut self) {
        let agent = &mut self.stage.agent.process;
        agent.signal(Signal::KILL).unwrap();
        assert!(soon(|| agent.has_ended().unwrap()));
    }

    fn kill_incoming(&self) {
        let socket = self.stage.beta.path("web.sock");
        let pids = process::with_words(&socket.display().to_string());
        assert!(!pids.is_empty(), "no guest was launched at beta");
        pids.into_iter().for_each(process::kill);
    }

    fn recover(&self) -> Finished {
        let recover = self
            .stage
            .alpha
            .ask(Role::Source, "recover", "web", &["--json"]);
        recover.unwrap()
    }

    fn done(&self) -> &Finished {
        self.done.as_ref().unwrap()
    }

    fn settled(self, place: Place) {
        println!("{}{}", self.done().stdout, self.done().stderr);
        let place = match (place, self.done().code()) {
            (Place::AsTold, 0) => Place::Beta,
            (Place::AsTold, _) => {
                self.stage.expect_code(self.done(), 1);
                Place::Alpha
            }
            (place, _) => place,
        };
        match place {
            Place::Alpha | Place::AsTold => self.stayed(),
            Place::Beta => self.moved(),
            Place::DiedAtAlpha => self.died(true),
            Place::DiedAtBeta => self.died(false),
        }
    }

    fn stayed(self) {
        let (stage, guest) = (&self.stage, &self.guest);
        let runs = soon(|| guest.runs_on(&stage.alpha));
        assert!(runs, "not at alpha\n{}", stage.agent_log());
        stage.expect_stayed(guest);
        let mut now = Vec::new();
        let traceless = soon(|| {
            now = descriptors(guest.first_pid());
            now == self.before
        });
        assert!(traceless, "descriptors {:?} became {now:?}", self.before);
        self.no_socket_is_left();
        self.stood_still_no_longer_than_allowed();
        self.owners(Some(&stage.alpha));
        let again = stage.migrate(guest, &OPTIONS);
        stage.expect_code(&again, 0);
        stage.expect_moved(guest);
    }

    fn moved(self) {
        let (stage, guest) = (&self.stage, &self.guest);
        let runs = soon(|| guest.runs_on(&stage.beta));
        assert!(runs, "not at beta\n{}", stage.agent_log());
        stage.expect_moved(guest);
        // A guest that was killed leaves its own socket.
        if self.victim != Some(Victim::SourceGuest) {
            let mut left = Vec::new();
            let clean = soon(|| {
                left = guest.traces_on(&stage.alpha);
                left.is_empty()
            });
            assert!(clean, "left at alpha: {left:?}");
        }
        self.no_socket_is_left();
        self.stood_still_no_longer_than_allowed();
        self.owners(Some(&stage.beta));
        guest.expect_at(&stage.alpha, &["beta"]).unwrap();
        let back = stage.alpha.serve(&[]).unwrap();
        let again = stage.beta.migrate("web", back.port, &OPTIONS).unwrap();
        assert_eq!(
            again.code(),
            0,
            "{}\n{}",
            again.stderr,
            back.process.stderr()
        );
        assert!(soon(|| guest.runs_on(&stage.alpha)));
        guest.wait_for_beats(20).unwrap();
        guest.verify_on(&stage.alpha).unwrap();
        guest.beats().unwrap().check().unwrap();
    }

    /// The guest is dead: nobody pretends otherwise, and it can be booted where it lived and moved from there.
    fn died(self, at_alpha: bool) {
        let (stage, guest) = (&self.stage, &self.guest);
        assert!(!guest.runs_on(&stage.alpha) && !guest.runs_on(&stage.beta));
        self.no_socket_is_left();
        if at_alpha {
            self.stage.expect_code(self.done(), 1);
            assert_eq!(self.done().json().unwrap()["guest_now"], "ended");
            stage.expect_clean(guest);
            self.owners(Some(&stage.alpha));
        } else {
            self.stage.expect_code(self.done(), 0);
            self.owners(Some(&stage.beta));
        }
        let Self { stage, guest, .. } = self;
        drop(guest);
        let home = if at_alpha { &stage.alpha } else { &stage.beta };
        let booted = SimGuest::start(small(), home).unwrap();
        let (there, agent);
        if at_alpha {
            booted.expect_at(&stage.beta, &["alpha"]).unwrap();
            (there, agent) = (&stage.beta, None);
        } else {
            booted.expect_at(&stage.alpha, &["beta"]).unwrap();
            (there, agent) = (&stage.alpha, Some(stage.alpha.serve(&[]).unwrap()));
        }
        let port = agent.as_ref().map_or(stage.agent.port, |agent| agent.port);
        let again = home.migrate("web", port, &OPTIONS).unwrap();
        stage.expect_code(&again, 0);
        assert!(soon(|| booted.runs_on(there)));
        booted.verify_on(there).unwrap();
    }

    fn no_socket_is_left(&self) {
        // An agent that was killed before its first session left nothing to recover; the next one takes its dead socket over.
        if self.phase == "negotiate" && self.done().json().is_err() {
            return;
        }
        let socket = self.stage.alpha.path("state/run/web.source.sock");
        assert!(!socket.exists(), "{} is left", socket.display());
    }

    /// Both commands of both hosts name the owner. A host that no session ever reached has no record, and nothing to say.
    fn owners(&self, owner: Option<&Host>) {
        for host in [&self.stage.alpha, &self.stage.beta] {
            for role in [Role::Source, Role::Destination] {
                let said = host.ask(role, "owner", "web", &["--json"]).unwrap();
                let state = &said.json().unwrap()["state"];
                if !state.is_null() {
                    let here = owner.is_some_and(|owner| owner.name() == host.name());
                    assert_eq!(said.code(), i32::from(!here), "{}", said.stdout);
                }
            }
        }
    }

    /// Whatever was struck: before the decision the guest stands still for no longer than the pause timeout.
    fn stood_still_no_longer_than_allowed(&self) {
        let beats = self.guest.beats().unwrap();
        let handovers = beats.handovers();
        let longest = handovers
            .into_iter()
            .fold(beats.longest_within(), Duration::max);
        println!("{}: longest time without a beat {longest:.1?}", self.phase);
        if is_before_the_decision(self.phase) {
            assert!(longest <= PAUSE_TIMEOUT, "{longest:?}");
        }
    }
}
