//! The handover's machines, checked exhaustively within bounds, and proof that the check bites.

use std::time::Instant;

use stateright::{Checker, Model};
use vmferry_tests::model::{Bounds, HandoverModel};

const NONE: Bounds = Bounds {
    attempts: 1,
    sessions: 1,
    crashes: 0,
    write_failures: 0,
    guest_failures: 0,
    touches: 0,
    cancels: 0,
    give_ups: 0,
    folder_switches: 0,
    fencing: false,
};

#[test]
fn probe() {
    for bounds in [
        NONE,
        Bounds {
            sessions: 2,
            crashes: 1,
            ..NONE
        },
        Bounds {
            sessions: 2,
            crashes: 2,
            ..NONE
        },
        Bounds {
            sessions: 2,
            crashes: 1,
            write_failures: 1,
            ..NONE
        },
        Bounds {
            sessions: 3,
            attempts: 2,
            crashes: 1,
            ..NONE
        },
    ] {
        let begun = Instant::now();
        let checker = HandoverModel::new(bounds)
            .checker()
            .threads(2)
            .target_state_count(3_000_000)
            .spawn_bfs()
            .join();
        println!(
            "{bounds:?}: {} unique, {} total, depth {}, {:?}",
            checker.unique_state_count(),
            checker.state_count(),
            checker.max_depth(),
            begun.elapsed()
        );
        for (name, path) in checker.discoveries() {
            println!("  {name}: {} steps", path.clone().into_actions().len());
            if name.contains("HAND") || name.contains("nothing") || name.contains("faults") {
                println!("     {:?}", path.into_actions());
            }
        }
    }
}
