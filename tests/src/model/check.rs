//! What must hold in every state of the model, and what must be reachable so that it is not empty.

use stateright::Property;

use super::action::{HandoverModel, committed, rolled_back};
use super::hosts::{Guest, World};

pub(super) fn properties() -> Vec<Property<HandoverModel>> {
    vec![
        Property::always(
            "[HAND-1] at most one side runs the guest",
            |_, world: &World| world.runners() <= 1,
        ),
        Property::always(
            "[HAND-2] no run at the destination without a durable OWNED",
            |_, world: &World| world.destination_run_is_recorded(),
        ),
        Property::always(
            "[HAND-11] who may boot the guest is not the one beside him who runs it",
            |_, world: &World| {
                let there = world.destination.guest == Guest::Running || world.elsewhere;
                let here = world.source.guest == Guest::Running;
                let beside_there = world.may_boot_at_source() && there;
                let beside_here = world.may_boot_at_destination() && here;
                !beside_there && !beside_here
            },
        ),
        Property::always("nothing happens that no rule allows", |_, world: &World| {
            world.bad.is_none()
        }),
        Property::always(
            "without more faults it ends with exactly one runner",
            |model: &HandoverModel, world: &World| model.ends_well(world),
        ),
        Property::sometimes("committed", |_, world: &World| committed(world)),
        Property::sometimes("rolled back", |_, world: &World| rolled_back(world)),
        Property::sometimes("in doubt, then committed", |_, world: &World| {
            world.seen.in_doubt && world.source.guest == Guest::Missing && committed(world)
        }),
        Property::sometimes("in doubt, then aborted", |_, world: &World| {
            world.seen.in_doubt && rolled_back(world)
        }),
        Property::sometimes("dead in doubt, then committed", |_, world: &World| {
            world.seen.guest_died_in_doubt && committed(world)
        }),
        Property::sometimes("dead in doubt, then bootable here", |_, world: &World| {
            world.seen.guest_died_in_doubt && world.may_boot_at_source()
        }),
        Property::sometimes("crash in COMMITTING, then committed", |_, world: &World| {
            world.seen.crash_in_committing && committed(world)
        }),
        Property::sometimes(
            "crash in COMMITTING, then rolled back",
            |_, world: &World| world.seen.crash_in_committing && rolled_back(world),
        ),
    ]
}
