//! The judge and the world in cases that random runs hardly ever come to.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vmferry_common::ownership;
use vmferry_common::state::StateDir;
use vmferry_common::storage::{Locked, Patience, Storage};
use vmferry_proto::error::{ErrorCode, WireError};
use vmferry_proto::handover::{
    DestinationRecord, DestinationState, Peer, ProcessRecord, SourceRecord, SourceState,
};
use vmferry_proto::ids::{Attempt, Generation, GuestName, MigrationId, RegisterId, SessionNumber};
use vmferry_proto::message::AttemptKey;
use vmferry_proto::spec::RunState;
use vmferry_src::policy::Cutover;

use super::check::{Broken, Rule, check};
use super::facts::{Birth, Fact, HostId, VmId, What};
use super::guest::{VmState, empty};
use super::plan::{Class, Plan, Strike, Trap};
use super::run::{GUEST, Ground, STATE, carry_out};
use super::storage::NodeDisk;
use super::world::{Node, World};

/// The guest where it is at first.
const ORIGINAL: VmId = VmId(0);
const KEY: AttemptKey = AttemptKey {
    migration: MigrationId::from_bytes([1; 16]),
    attempt: Attempt(1),
    register: RegisterId::from_bytes([2; 16]),
};

/// A plan in which nothing goes wrong.
fn undisturbed(seed: u64) -> Plan {
    Plan {
        traps: Vec::new(),
        acts: Vec::new(),
        resets: 0,
        ..Plan::of(seed, None)
    }
}

/// Both hosts, and a guest that runs at the first. Time stands still: the guest does what a test makes it do.
struct Scene {
    world: Arc<World>,
    alpha: Node,
    beta: Node,
    guest: VmId,
}

impl Scene {
    fn set(traps: Vec<Trap>) -> Self {
        let plan = Plan {
            traps,
            ..undisturbed(1)
        };
        let lens: Vec<_> = plan.regions.iter().map(|(_, len)| *len).collect();
        let world = World::new(plan);
        let (alpha, beta) = (
            world.start_agent(HostId::Alpha),
            world.start_agent(HostId::Beta),
        );
        let mut state = world.state();
        for host in [HostId::Alpha, HostId::Beta] {
            state.host(host).images = lens.iter().map(|len| empty(*len)).collect();
        }
        let guest = state.new_vm(HostId::Alpha, Birth::Original);
        state.tell_birth(guest, Birth::Original);
        assert!(state.start(&world, guest));
        drop(state);
        Self {
            world,
            alpha,
            beta,
            guest,
        }
    }

    fn journal(node: &Node) -> (StateDir, GuestName) {
        let state = StateDir::open_on(NodeDisk::state(node), Path::new(STATE)).unwrap();
        (state, GUEST.parse().unwrap())
    }

    fn source_says(&self, state: SourceState) {
        let (journal, guest) = Self::journal(&self.alpha);
        let record = SourceRecord {
            guest: guest.clone(),
            migration: KEY.migration,
            generation: Generation(1),
            session: SessionNumber(1),
            peer: Peer {
                address: "beta:7447".to_owned(),
                identity: "beta".to_owned(),
            },
            process: ProcessRecord {
                pid: 1,
                start_ticks: 1,
                boot_id: String::new(),
            },
            shared_disks: false,
            run_state_before: RunState::Running,
            state,
        };
        ownership::source_file(&journal, &guest)
            .write(&record)
            .unwrap();
    }

    fn destination_owns(&self) {
        let (journal, guest) = Self::journal(&self.beta);
        let record = DestinationRecord {
            guest: guest.clone(),
            migration: KEY.migration,
            generation: Generation(1),
            session: SessionNumber(1),
            sender: "alpha".to_owned(),
            register: KEY.register,
            process: None,
            state: DestinationState::Owned {
                attempt: KEY.attempt,
                to: RunState::Running,
                started: false,
            },
            earlier: Vec::new(),
        };
        ownership::destination_file(&journal, &guest)
            .write(&record)
            .unwrap();
    }

    /// A whole copy of the paused guest, which runs on at the destination and does something there.
    fn runs_at_the_destination(&self) {
        self.destination_owns();
        let mut state = self.world.state();
        let copy = state.new_vm(HostId::Beta, Birth::Incoming);
        state.tell_birth(copy, Birth::Incoming);
        let guest = state.vm(self.guest).unwrap();
        let (image, device) = (guest.image.clone(), guest.device_state());
        let vm = state.vm(copy).unwrap();
        vm.state = VmState::Incoming;
        vm.image = image;
        assert!(vm.load(&device));
        let contents = vm.contents();
        state.tell(What::Loaded { vm: copy, contents });
        assert!(state.start(&self.world, copy));
        state.step(copy);
    }

    fn judged(&self) -> Result<(), Broken> {
        check(&self.world.facts(), RunState::Running)
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_goes_on_before_its_transfer_landed_is_what_it_was() {
    let scene = Scene::set(Vec::new());
    scene.source_says(SourceState::RolledBack {
        attempt: KEY.attempt,
        reason: WireError::new(ErrorCode::Cancelled, "somebody cancelled"),
    });
    let mut state = scene.world.state();
    while state.step(scene.guest).is_none() {}
    state.stop(scene.guest).unwrap();
    assert!(state.start(&scene.world, scene.guest));
    drop(state);
    assert_eq!(scene.judged(), Ok(()));
}

/// `[HAND-9]`
#[tokio::test(start_paused = true)]
async fn only_where_the_destination_is_lost_and_fenced_is_an_older_copy_the_guest() {
    for lost_for_good in [true, false] {
        let scene = Scene::set(Vec::new());
        scene.world.state().stop(scene.guest).unwrap();
        scene.runs_at_the_destination();
        assert_eq!(scene.judged(), Ok(()));
        let mut state = scene.world.state();
        state.cut_power(HostId::Beta, Duration::from_secs(3_600));
        if lost_for_good {
            state.tell(What::GoneForGood);
        }
        drop(state);
        scene.source_says(SourceState::Fenced { key: KEY });
        let mut state = scene.world.state();
        assert!(state.start(&scene.world, scene.guest));
        state.step(scene.guest);
        drop(state);
        let broken = scene.judged().err().map(|broken| broken.rule);
        assert_eq!(broken, (!lost_for_good).then_some(Rule::SameContents));
    }
}

#[tokio::test(start_paused = true)]
async fn a_name_whose_locking_failed_is_free() {
    let scene = Scene::set(vec![Trap {
        host: HostId::Beta,
        class: Class::Journal,
        nth: 1,
        late: true,
        strike: Strike::Fail,
    }]);
    let disk = NodeDisk::state(&scene.beta);
    let lock = || disk.lock(Path::new("/state/web.lock"), Patience::Try);
    assert!(lock().is_err());
    let held = lock().unwrap();
    assert!(matches!(held, Locked::Taken(_)));
    assert!(matches!(lock().unwrap(), Locked::HeldBy(_)));
    drop(held);
    assert!(matches!(lock().unwrap(), Locked::Taken(_)));
}

/// Two: a record's file and its folder (`[HAND-3]`). The guest stands still meanwhile.
const MOST_SYNCS: usize = 2;

#[test]
fn the_journals_sync_one_record_a_side_between_pause_and_run() {
    let ground = Arc::new(Ground::new().unwrap());
    let mut moved = 0;
    for seed in 1..=40 {
        let outcome = carry_out(undisturbed(seed), &ground);
        outcome.verdict.unwrap();
        let whats: Vec<_> = outcome.facts.iter().map(|fact| &fact.what).collect();
        let runs = |what: &&What| matches!(what, What::Ran { vm, .. } if *vm != ORIGINAL);
        let Some(run) = whats.iter().position(runs) else {
            continue;
        };
        let stands = |what: &&What| matches!(what, What::Stood { vm, .. } if *vm == ORIGINAL);
        let pause = whats[..run].iter().rposition(stands).unwrap();
        for side in [HostId::Alpha, HostId::Beta] {
            let syncs = whats[pause..run]
                .iter()
                .filter(|what| matches!(what, What::Synced { host } if *host == side));
            assert_eq!(syncs.count(), MOST_SYNCS, "seed {seed}, {side:?}");
        }
        moved += 1;
    }
    assert!(moved > 20, "{moved} runs moved the guest");
}

#[test]
fn a_guest_that_reboots_as_it_is_paused_is_moved_by_a_later_attempt() {
    let ground = Arc::new(Ground::new().unwrap());
    // Of the first program: an administrator may begin again after it.
    let end = |seed, resets| {
        let mut plan = undisturbed(seed);
        plan.run_state = RunState::Running;
        plan.wish.limits.cutover = Cutover::Auto;
        plan.wish.limits.timeout = Duration::from_secs(600);
        plan.wish.limits.max_downtime = Duration::from_secs(10);
        plan.wish.limits.pause_timeout = None;
        plan.resets = resets;
        let outcome = carry_out(plan, &ground);
        outcome.verdict.unwrap();
        let reported = |fact: &Fact| match fact.what {
            What::Reported { outcome, .. } => Some(outcome),
            _ => None,
        };
        outcome.facts.iter().find_map(reported).unwrap()
    };
    let mut moved = 0;
    for seed in 1..=30 {
        if end(seed, 0) != "committed" {
            continue;
        }
        assert_eq!(end(seed, 2), "committed", "seed {seed}");
        assert_eq!(end(seed, 3), "rolled-back", "seed {seed}");
        moved += 1;
    }
    assert!(moved > 15, "{moved} runs moved the guest");
}
