//! One run: both agents' own programs on a simulated world, from the seed to the verdict.
//!
//! Owns who starts which program when: the source's as an administrator would (again after it was killed, `recover` where it was
//! in doubt, the word that the destination is fenced once that is true), the destination's as its service manager would, and
//! a host's boot script, which asks `owner` before it boots the guest afresh. The clock is tokio's paused one: it jumps to
//! the next thing that happens.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use vmferry_certs::{CertificateAuthority, HostRequest, Validity};
use vmferry_common::endpoint::TransportTuning;
use vmferry_common::hooks::Hooks;
use vmferry_common::identity::Identity;
use vmferry_common::state::StateDir;
use vmferry_dst::config::GuestFiles;
use vmferry_dst::{Host, RunFolder, Server};
use vmferry_proto::ids::GuestName;
use vmferry_src::local::Command;

use super::alpha;
use super::check::{Broken, Rule, check};
use super::dice::Dice;
use super::facts::{Birth, Fact, HostId, VmId, What};
use super::guest::{VmState, block_len, empty};
use super::network::Network;
use super::plan::{Act, Flaw, Plan};
use super::storage::NodeDisk;
use super::target::SimHypervisors;
use super::world::{Node, World};

/// Name of the guest.
pub(super) const GUEST: &str = "web";
/// The state folder of each host, on its simulated disk.
pub(super) const STATE: &str = "/state";
/// The run folder of each host, there too.
pub(super) const RUN: &str = "/run";
/// After the last fault all must be settled within this: the longest `--timeout` and two times the ten minutes for which
/// a lost destination is looked for, with room to spare.
const SETTLE_LIMIT: Duration = Duration::from_secs(2 * 3600);
/// For how long a settled source keeps its session open at the destination at most.
const LINGER: Duration = Duration::from_secs(90);

/// What all runs of a process share: identities and the guest file of the destination.
#[derive(Debug)]
pub struct Ground {
    folder: TempDir,
    pub(super) alpha: Arc<Identity>,
    beta: Arc<Identity>,
}

impl Ground {
    /// Makes the certificates.
    ///
    /// # Errors
    /// No folder for them, or no certificate.
    pub fn new() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let authority = folder.path().join("ca");
        CertificateAuthority::create(&authority, Validity::days(90)?)?;
        let authority = CertificateAuthority::load(&authority)?;
        let issue = |name: &str| -> anyhow::Result<Arc<Identity>> {
            let out = folder.path().join(name);
            let request = HostRequest {
                name: name.to_owned(),
                addresses: Vec::new(),
                validity: Validity::days(30)?,
            };
            authority.issue(&request, &out)?;
            Ok(Arc::new(Identity::load(&out)?))
        };
        let (alpha, beta) = (issue("alpha")?, issue("beta")?);
        let guests = folder.path().join("guests");
        std::fs::create_dir(&guests)?;
        std::fs::write(
            guests.join("web.toml"),
            "name = \"web\"\ndriver = \"sim\"\nsocket = \"/nonexistent/web.sock\"\n\
             from = [\"alpha\"]\nlaunch = [\"/nonexistent/hypervisor\"]\n",
        )?;
        Ok(Self {
            folder,
            alpha,
            beta,
        })
    }

    /// A folder that is not there, for hooks.
    pub(super) fn no_hooks(&self) -> PathBuf {
        self.folder.path().join("hooks")
    }
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// Its log.
    pub facts: Vec<Fact>,
    /// In words, for counting.
    pub word: &'static str,
    /// What happened on the way, for counting.
    pub seen: Vec<&'static str>,
    /// The rule that was broken, if one was.
    pub verdict: Result<(), Broken>,
}

/// A run under way.
pub(super) struct Run {
    pub(super) world: Arc<World>,
    pub(super) network: Arc<Network>,
    pub(super) ground: Arc<Ground>,
    pub(super) plan: Plan,
    pub(super) guest: GuestName,
    /// The way to the source's program, while one runs.
    pub(super) commands: Mutex<Option<mpsc::Sender<Command>>>,
    /// Stops the destination's program.
    stop: Mutex<CancellationToken>,
}

thread_local! {
    /// Panics of this thread since the last look.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    static WATCHED: RefCell<bool> = const { RefCell::new(false) };
}

/// Keeps the panics of watched threads for the verdict: tokio ends the task and says nothing.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if WATCHED.with(|watched| *watched.borrow()) {
                PANICS.with(|panics| panics.borrow_mut().push(info.to_string()));
            } else {
                before(info);
            }
        }));
    });
}

/// Runs `seed`.
///
/// # Panics
/// No runtime can be built.
#[must_use]
pub fn run(seed: u64, flaw: Option<Flaw>, ground: &Arc<Ground>) -> Outcome {
    carry_out(Plan::of(seed, flaw), ground)
}

/// Runs `plan`.
pub(super) fn carry_out(plan: Plan, ground: &Arc<Ground>) -> Outcome {
    keep_panics();
    WATCHED.with(|watched| *watched.borrow_mut() = true);
    let before = plan.run_state;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    #[allow(clippy::expect_used, reason = "a test's harness")]
    let runtime = runtime.expect("a runtime without I/O needs nothing");
    // The source's program is not made to move between threads.
    let local = tokio::task::LocalSet::new();
    let facts = runtime.block_on(local.run_until(play(plan, ground.clone())));
    drop(local);
    drop(runtime);
    WATCHED.with(|watched| *watched.borrow_mut() = false);
    let panics = PANICS.with(|panics| std::mem::take(&mut *panics.borrow_mut()));
    let verdict = match panics.first() {
        Some(panic) => Err(Broken {
            rule: Rule::Sound,
            detail: panic.clone(),
        }),
        None => check(&facts, before),
    };
    let (word, seen) = super::tally::classify(&facts);
    Outcome {
        facts,
        word,
        seen,
        verdict,
    }
}

async fn play(plan: Plan, ground: Arc<Ground>) -> Vec<Fact> {
    let world = World::new(plan.clone());
    let run = Arc::new(Run {
        network: Network::new(plan.seed),
        #[allow(clippy::expect_used, reason = "a constant")]
        guest: GUEST.parse().expect("a name"),
        commands: Mutex::new(None),
        stop: Mutex::new(CancellationToken::new()),
        world: world.clone(),
        ground,
        plan,
    });
    run.begin();
    tokio::spawn(beta(run.clone()));
    tokio::spawn(people(run.clone()));
    tokio::spawn(calm(run.clone()));
    let limit = run.plan.quiet + SETTLE_LIMIT;
    let settled = tokio::time::timeout(limit, alpha::drive(run.clone())).await;
    let leftovers = run.leftovers().await;
    // Sockets know their network.
    run.network.close();
    world.state().tell(What::Settled {
        in_time: settled.is_ok(),
        leftovers,
    });
    world.facts()
}

impl Run {
    /// The guest is there, and both hosts' disks are.
    fn begin(&self) {
        let mut dice = Dice::new(self.plan.seed, 10);
        let mut state = self.world.state();
        let lens: Vec<_> = self.plan.regions.iter().map(|(_, len)| *len).collect();
        for host in [HostId::Alpha, HostId::Beta] {
            state.host(host).images = lens.iter().map(|len| empty(*len)).collect();
        }
        if self.plan.reused_image {
            let images = &mut state.host(HostId::Beta).images;
            for (image, len) in images.iter_mut().zip(lens) {
                for (block, old) in image.iter_mut().enumerate() {
                    if dice.chance(300) {
                        *old = Some(Arc::from(vec![0xee; block_len(len, block)]));
                    }
                }
            }
        }
        let vm = state.new_vm(HostId::Alpha, Birth::Original);
        state.fill(vm, Birth::Original, &mut dice);
        state.flush(vm);
        if self.plan.run_state == vmferry_proto::spec::RunState::Running {
            state.start(&self.world, vm);
        }
    }

    /// A host has power again: its boot script asks `owner`, and boots the guest afresh only if that says so.
    pub(super) fn boot(&self, node: &Node) {
        let host = node.host;
        let guest_is_there = |run: &Self| {
            let mut state = run.world.state();
            state
                .vms
                .iter_mut()
                .any(|vm| vm.host == host && vm.is_alive())
        };
        if guest_is_there(self) {
            return;
        }
        let Ok(state) = self.state_dir(node) else {
            return;
        };
        let Ok(owner) = vmferry_common::ownership::of(&state, &self.guest) else {
            return;
        };
        // The guest is no guest of the destination's before a migration made it one.
        let ours = host == HostId::Alpha || owner.role == Some("destination");
        if !(owner.may_run && ours) {
            self.world
                .note(format!("boot script of {host:?}: {}", owner.why));
            return;
        }
        let mut state = self.world.state();
        let vm = state.new_vm(host, Birth::Booted);
        state.tell_birth(vm, Birth::Booted);
        state.start(&self.world, vm);
    }

    /// The journal of a host, in the hands of `node`.
    pub(super) fn state_dir(
        &self,
        node: &Node,
    ) -> Result<StateDir, vmferry_common::state::StateError> {
        StateDir::open_on(NodeDisk::state(node), &PathBuf::from(STATE))
    }

    /// Says something to the source's program, if one runs and listens.
    pub(super) fn tell_source(&self, command: Command) {
        let commands = self.commands.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(commands) = &*commands {
            // A program that is about to end hears nothing any more.
            let _ = commands.try_send(command);
        }
    }

    /// Copies at the destination that nobody owns, once the destination has had the time to remove them.
    async fn leftovers(&self) -> Vec<VmId> {
        let until = self.world.began().elapsed().max(self.plan.quiet)
            + self.plan.keep
            + LINGER
            + Duration::from_secs(60);
        loop {
            let left = self.unowned();
            if left.is_empty() || self.world.began().elapsed() > until {
                return left;
            }
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }

    fn unowned(&self) -> Vec<VmId> {
        let mut state = self.world.state();
        let owned = super::check::is_owned(&state.durable_records(HostId::Beta));
        state
            .vms
            .iter_mut()
            .filter(|vm| vm.host == HostId::Beta)
            .filter(|vm| match vm.state {
                VmState::Staged | VmState::Incoming => true,
                VmState::Paused => !owned,
                VmState::Running | VmState::ShutDown | VmState::Gone => false,
            })
            .map(|vm| vm.id)
            .collect()
    }
}

/// The destination's agent, whenever it is to run.
async fn beta(run: Arc<Run>) {
    let mut dice = Dice::new(run.plan.seed, 11);
    loop {
        run.world.until_ready(HostId::Beta).await;
        let node = run.world.start_agent(HostId::Beta);
        run.boot(&node);
        if let Some(server) = set_up(&run, &node) {
            let stop = server.stopper();
            *run.stop.lock().unwrap_or_else(PoisonError::into_inner) = stop;
            let mut serving = tokio::spawn(Arc::new(server).run());
            tokio::select! {
                biased;
                () = node.died() => serving.abort(),
                _ = &mut serving => run.world.note("the destination's agent has stopped"),
            }
        }
        let pause = dice.millis(1, 2_000);
        run.world.state().retire_agent(HostId::Beta, pause);
        run.world.changed();
    }
}

fn set_up(run: &Run, node: &Node) -> Option<Server> {
    let state = match run.state_dir(node) {
        Ok(state) => state,
        Err(error) => {
            run.world.note(format!("no state folder: {error}"));
            return None;
        }
    };
    let host = Host::new(
        state,
        GuestFiles::new(run.ground.folder.path().join("guests")),
        Hooks::new(None, Duration::from_secs(1)),
        run.plan.keep,
        RunFolder {
            storage: NodeDisk::run(node),
            path: PathBuf::from(RUN),
        },
        Arc::new(SimHypervisors(node.clone())),
    );
    let host = match host {
        Ok(host) => host,
        Err(error) => {
            run.world.note(format!("no host: {error}"));
            return None;
        }
    };
    let tuning = TransportTuning::default();
    let endpoint = run.network.listen(node, &run.ground.beta, &tuning).ok()?;
    Some(Server::new(host, endpoint, tuning))
}

/// From the quiet time on nothing strikes any more.
async fn calm(run: Arc<Run>) {
    tokio::time::sleep_until(run.world.began() + run.plan.quiet).await;
    {
        let mut state = run.world.state();
        state.quiet = true;
        state.cut_until = Duration::ZERO;
        state.tell(What::Quiet);
    }
    run.world.changed();
}

/// What people do, and what strikes at a time.
async fn people(run: Arc<Run>) {
    for (at, act) in run.plan.acts.clone() {
        tokio::time::sleep_until(run.world.began() + at).await;
        run.world.note(format!("{act:?}"));
        match act {
            Act::Strike(host, strike) => run.world.strike(host, strike),
            Act::LoseBeta => {
                run.lose_beta();
                tokio::spawn(fence(run.clone()));
            }
            Act::Cutover => {
                tokio::spawn(insist_on_cutover(run.clone()));
            }
            Act::Cancel => run.tell_source(Command::Cancel(oneshot::channel().0)),
            Act::Leave => {
                for again in [false, true] {
                    let name = "SIGTERM";
                    run.tell_source(Command::Signal { name, again });
                }
            }
            Act::StopBeta => run
                .stop
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .cancel(),
            Act::ShutDown => run.world.state().shut_down(HostId::Alpha),
        }
    }
}

/// A program that is started again has not heard of it.
async fn insist_on_cutover(run: Arc<Run>) {
    loop {
        run.tell_source(Command::Cutover(oneshot::channel().0));
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

impl Run {
    fn lose_beta(&self) {
        const FOR_GOOD: Duration = Duration::from_secs(365 * 24 * 3600);
        {
            let mut state = self.world.state();
            state.cut_power(HostId::Beta, FOR_GOOD);
            state.beta_is_lost = true;
            state.tell(What::GoneForGood);
        }
        self.world.changed();
    }
}

/// The administrator has made sure that the lost destination cannot come back, and says so.
async fn fence(run: Arc<Run>) {
    loop {
        tokio::time::sleep(Duration::from_secs(60)).await;
        run.tell_source(Command::Resolve(oneshot::channel().0));
    }
}
