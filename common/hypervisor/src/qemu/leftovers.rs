//! What an earlier agent left inside a QEMU, found by name and removed.
//!
//! Owns the search and the order: server and exports first, since a bitmap under export is busy. Removing what
//! is not there is no error; everything found is tried, and the first failure is told.

use serde_json::json;
use vmferry_common::process::ProcessIdentity;

use super::inventory::{self, Machine};
use super::names;
use super::nbd_server::{left_sockets, remove_left};
use super::qmp::{Qmp, QmpError};
use crate::error::GuestError;
use crate::memory::ProcessMemory;
use crate::open::Leftovers;

/// Removes every export and descriptor set that is named as ours, and the bitmaps unless the tracking is kept.
pub(super) async fn remove(
    qmp: &Qmp,
    process: &ProcessIdentity,
    left: Leftovers,
) -> Result<(), GuestError> {
    let exports = remove_exports(qmp, process).await;
    let bitmaps = match left {
        Leftovers::Remove => remove_bitmaps(qmp).await,
        Leftovers::KeepTracking => Ok(()),
    };
    let sets = remove_descriptor_sets(qmp).await;
    Ok(exports.and(bitmaps).and(sets)?)
}

async fn remove_exports(qmp: &Qmp, process: &ProcessIdentity) -> Result<(), QmpError> {
    let sockets = left_sockets(process);
    let exports = inventory::exports(qmp).await?;
    let (ours, others): (Vec<_>, Vec<_>) = exports
        .iter()
        .partition(|export| names::is_ours(&export.id));
    if sockets.is_empty() && ours.is_empty() {
        return Ok(());
    }
    tracing::info!(
        exports = ours.len(),
        servers = sockets.len(),
        "removing what an earlier agent left in QEMU"
    );
    if others.is_empty() {
        // Ends all exports of the server, and waits for them.
        qmp.execute("nbd-server-stop", json!({})).await?;
    } else {
        for export in ours {
            let arguments = json!({ "id": export.id, "mode": "hard" });
            qmp.execute("block-export-del", arguments).await?;
        }
    }
    sockets.iter().for_each(|socket| remove_left(socket));
    Ok(())
}

/// Removes all dirty bitmaps that are named as ours. Their exports are gone.
pub(super) async fn remove_bitmaps(qmp: &Qmp) -> Result<(), QmpError> {
    let arguments = json!({ "flat": true });
    let nodes = qmp.execute("query-named-block-nodes", arguments).await?;
    let mut first_failure = Ok(());
    for node in inventory::block_nodes(&nodes)? {
        for (bitmap, _) in node.bitmaps.iter().filter(|(name, _)| names::is_ours(name)) {
            let arguments = json!({ "node": node.name, "name": bitmap });
            let removed = qmp.execute("block-dirty-bitmap-remove", arguments).await;
            first_failure = first_failure.and(removed.map(drop));
        }
    }
    first_failure
}

async fn remove_descriptor_sets(qmp: &Qmp) -> Result<(), QmpError> {
    let sets = qmp.execute("query-fdsets", json!({})).await?;
    for set in sets.as_array().into_iter().flatten() {
        let descriptors = set["fds"].as_array().into_iter().flatten();
        let ours = descriptors
            .filter_map(|fd| fd["opaque"].as_str())
            .any(names::is_ours);
        if ours {
            let arguments = json!({ "fdset-id": set["fdset-id"] });
            qmp.execute("remove-fd", arguments).await?;
        }
    }
    Ok(())
}

/// Ends the memory tracking that an earlier agent left: the marks in QEMU name its descriptors.
pub(super) async fn end_tracking(
    qmp: &Qmp,
    machine: &Machine,
    memory: &mut ProcessMemory,
) -> Result<(), GuestError> {
    for (object, _) in &machine.objects {
        let Some(descriptor) = names::marked_descriptor(object) else {
            continue;
        };
        tracing::info!(
            descriptor,
            "ending the memory tracking that an earlier agent left"
        );
        match memory.resume_tracking(descriptor).await {
            Ok(()) => memory.stop_tracking().await?,
            // It was closed, and only the mark is left.
            Err(error) => tracing::debug!(%error, descriptor, "no tracking behind the mark"),
        }
        unmark_tracking(qmp, object).await?;
    }
    Ok(())
}

/// Leaves a mark that names the tracking descriptor inside QEMU.
pub(super) async fn mark_tracking(qmp: &Qmp, descriptor: i32) -> Result<(), QmpError> {
    let arguments = json!({
        "qom-type": "authz-simple", "id": names::tracking_mark(descriptor), "identity": "vmferry",
    });
    qmp.execute("object-add", arguments).await.map(drop)
}

/// Removes a mark; one that is not there is no error.
pub(super) async fn unmark_tracking(qmp: &Qmp, object: &str) -> Result<(), QmpError> {
    match qmp.execute("object-del", json!({ "id": object })).await {
        Ok(_) | Err(QmpError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
