//! The source's program, whenever it is to run, as an administrator runs it.
//!
//! Owns which verb is next: `migrate`, again or `recover` after it was killed, `recover` while in doubt, `resolve` once the
//! destination is fenced.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use tokio::sync::mpsc;
use tokio::time::Instant;
use vmferry_common::causes::chain;
use vmferry_common::local::Events;
use vmferry_common::ownership;
use vmferry_hypervisor::config::{DriverKind, SourceConfig};
use vmferry_proto::handover::SourceState;
use vmferry_src::cli::MigrateOptions;
use vmferry_src::durable::DurableFiles;
use vmferry_src::local::QUEUE;
use vmferry_src::progress::Progress;
use vmferry_src::report::{GuestNow, Report};
use vmferry_src::run::{self, Desk, DestinationIsFenced, NotBegun, Purpose};

use super::dice::Dice;
use super::facts::{HostId, What};
use super::network::{PORT, SimConnector};
use super::run::{GUEST, RUN, Run, STATE};
use super::storage::NodeDisk;
use super::target::SimHypervisors;
use super::world::Node;

/// Most migrations that are begun in a run.
const MOST_MIGRATIONS: u32 = 3;
/// Most programs of a run that end before anything was done to the guest.
const MOST_REFUSALS: u32 = 100;

/// What is typed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Migrate,
    Recover,
    Resolve,
}

/// How a program ended.
enum Program {
    Killed,
    NotBegun(NotBegun),
    Said(Box<Report>),
}

/// Runs the source's programs until there is nothing left to do. The guest may be anywhere, or gone, by then.
pub(super) async fn drive(run: Arc<Run>) {
    let mut dice = Dice::new(run.plan.seed, 9);
    let (mut verb, mut migrations, mut refusals) = (Verb::Migrate, 0, 0);
    loop {
        run.world.until_ready(HostId::Alpha).await;
        let node = run.world.start_agent(HostId::Alpha);
        run.boot(&node);
        note_state(&run, &node);
        migrations += u32::from(verb == Verb::Migrate);
        let program = tokio::task::spawn_local(program(run.clone(), node.clone(), verb));
        let ended = watch(&node, program).await;
        *run.commands.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let next = match ended {
            Program::Killed if dice.chance(600) => Some(Verb::Migrate),
            Program::Killed => Some(Verb::Recover),
            Program::NotBegun(why) => {
                run.world.note(format!("{verb:?}: {}", why.error));
                refusals += 1;
                after_refusal(&run, verb, &why, refusals)
            }
            Program::Said(report) => {
                let again = migrations < MOST_MIGRATIONS && dice.chance(400);
                after_report(&run, &report, again)
            }
        };
        let Some(next) = next else { return };
        verb = next;
        let pause = dice.millis(1, 5_000);
        run.world.state().retire_agent(HostId::Alpha, pause);
        run.world.changed();
    }
}

async fn watch(
    node: &Node,
    mut program: tokio::task::JoinHandle<Result<Report, NotBegun>>,
) -> Program {
    tokio::select! {
        biased;
        () = node.died() => {
            program.abort();
            Program::Killed
        }
        ended = &mut program => match ended {
            Ok(Ok(report)) => Program::Said(Box::new(report)),
            Ok(Err(why)) => Program::NotBegun(why),
            // It panicked, which the run's verdict tells.
            Err(_) => Program::Killed,
        },
    }
}

/// A killed program's record, where it says that only the destination knows.
fn note_state(run: &Run, node: &Node) {
    let Ok(dir) = run.state_dir(node) else { return };
    let record = ownership::source_file(&dir, &run.guest).read();
    if let Ok(Some(record)) = record {
        let word = record.state.name();
        if matches!(record.state, SourceState::Committing { .. }) {
            run.world.note("the source's agent finds COMMITTING");
        } else {
            run.world.note(format!("the source's agent finds {word}"));
        }
    }
}

fn after_refusal(run: &Run, verb: Verb, why: &NotBegun, refusals: u32) -> Option<Verb> {
    let guest_is_there = {
        let mut state = run.world.state();
        state
            .vms
            .iter_mut()
            .any(|vm| vm.host == HostId::Alpha && vm.is_alive())
    };
    if refusals > MOST_REFUSALS {
        return None;
    }
    match verb {
        // A host whose guest is gone has nothing to migrate, and may have a doubt to settle.
        Verb::Migrate if !guest_is_there => Some(Verb::Recover),
        // Nothing is recorded: the guest is as its users left it.
        Verb::Recover if why.usage => None,
        Verb::Migrate | Verb::Recover | Verb::Resolve => Some(verb),
    }
}

fn after_report(run: &Run, report: &Report, again: bool) -> Option<Verb> {
    let mut state = run.world.state();
    state.tell(What::Reported {
        outcome: report.outcome.name(),
        guest_now: report.guest_now,
        kept: report.kept_bytes,
        duplicates: report.duplicate_blocks,
    });
    match report.guest_now {
        GuestNow::RunsAtDestination | GuestNow::PausedAtDestination | GuestNow::Ended => None,
        GuestNow::RunsAtSource | GuestNow::PausedAtSource => again.then_some(Verb::Migrate),
        GuestNow::InDoubt if state.beta_is_lost => Some(Verb::Resolve),
        GuestNow::InDoubt | GuestNow::StuckAtSource => Some(Verb::Recover),
    }
}

async fn program(run: Arc<Run>, node: Node, verb: Verb) -> Result<Report, NotBegun> {
    let failed = |error: &dyn std::error::Error| NotBegun {
        usage: false,
        error: vmferry_proto::error::WireError::new(
            vmferry_proto::error::ErrorCode::Hypervisor,
            chain(error),
        ),
    };
    let state = run.state_dir(&node).map_err(|error| failed(&error))?;
    let options = match verb {
        Verb::Migrate => options(&run),
        Verb::Recover | Verb::Resolve => run::saved_options(&state, &run.guest, None)?,
    };
    let lock = state.lock(&run.guest).map_err(|error| failed(&error))?;
    let purpose = match verb {
        Verb::Migrate => Purpose::Migrate,
        Verb::Recover | Verb::Resolve => Purpose::Recover,
    };
    let files = DurableFiles::on(NodeDisk::run(&node), Path::new(RUN), &run.guest);
    let hypervisors = SimHypervisors(node.clone());
    let (guest, keeping) = run::open_guest(&options, &state, files, &hypervisors, purpose).await?;
    if let Some(about) = &keeping.about {
        run.world.note(about.clone());
    }
    let (sender, commands) = mpsc::channel(QUEUE);
    *run.commands.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
    let desk = Desk {
        guest,
        state,
        lock,
        connector: Arc::new(SimConnector {
            network: run.network.clone(),
            node,
        }),
        commands,
        events: Events::new(),
        keeping: Some(keeping),
        began: Instant::now(),
    };
    // Held until the end: a program whose last asker has gone away is told to leave.
    let _sender = sender;
    let progress = Progress::silent(GUEST);
    let identity = run.ground.alpha.clone();
    match verb {
        Verb::Migrate => run::migrate_at(desk, options, identity, progress).await,
        Verb::Recover => run::recover_at(desk, options, identity, None, progress).await,
        Verb::Resolve => {
            let word = Some(DestinationIsFenced);
            run::recover_at(desk, options, identity, word, progress).await
        }
    }
}

fn options(run: &Run) -> MigrateOptions {
    let wish = run.plan.wish;
    MigrateOptions {
        guest: SourceConfig {
            name: run.guest.clone(),
            driver: DriverKind::Sim,
            qmp: None,
            socket: Some(PathBuf::from("/nonexistent/web.sock")),
            disks: Vec::new(),
            from: Vec::new(),
            launch: None,
        },
        to: vmferry_common::endpoint::HostPort {
            host: "beta".to_owned(),
            port: PORT,
        },
        identity: PathBuf::from("/nonexistent/identity"),
        state: PathBuf::from(STATE),
        hooks: run.ground.no_hooks(),
        limits: wish.limits,
        max_bandwidth: wish.max_bandwidth,
        lanes: wish.lanes,
        connections: wish.connections,
        congestion: vmferry_common::congestion::Congestion::default(),
        compress: wish.compress,
        verify: wish.verify,
        json: false,
    }
}
