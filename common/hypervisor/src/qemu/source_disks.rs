//! The source's disks: dirty bitmaps, their rotation, and the read-only exports.
//!
//! Owns what of a disk is dirty. A bitmap records writes from the start of tracking on; a rotation adds the next bitmap, then
//! disables the old one. In that order a write that ends between the two is in both, and one that was in flight all the
//! time is in the new one, since QEMU marks at the end of a write: none is missed, and no I/O has to be held, as a transaction
//! would do. A disabled bitmap is read through a passing export, kept until its blocks are safe at the destination, and
//! merged back if they are not.
//!
//! Invariant: a block that was written is in the enabled bitmap, in a disabled one, or in `owed`; nothing leaves
//! all three before it is acknowledged.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde_json::json;
use tokio::time::Instant;
use vmferry_proto::geometry::{RegionBits, RegionLen};
use vmferry_proto::ids::RegionId;

use super::disk_io::{ALLOCATION, DiskHandle};
use super::inventory::{self, Disk};
use super::leftovers;
use super::names;
use super::nbd::{NbdError, wire};
use super::nbd_server::NbdServer;
use super::qmp::{Qmp, QmpError};
use crate::error::GuestError;
use crate::guest::{Settlement, Taken};
use crate::marks::MarkLog;

/// The disks of mode `copy`.
#[derive(Debug, Default)]
pub(super) struct SourceDisks {
    disks: Vec<SourceDisk>,
    server: Option<NbdServer>,
    tracking: bool,
    log: Option<Arc<dyn MarkLog>>,
}

#[derive(Debug)]
struct SourceDisk {
    region: RegionId,
    node: String,
    len: RegionLen,
    handle: Arc<DiskHandle>,
    /// Number of the enabled bitmap.
    round: u64,
    /// Whether the first take, of everything, is still to come.
    untold: bool,
    /// Taken and not acknowledged.
    owed: Option<RegionBits>,
    /// Disabled bitmaps, with the export that still holds each.
    disabled: Vec<Disabled>,
    /// What was read from the last disabled bitmap and not yet taken.
    read: Option<RegionBits>,
}

#[derive(Debug)]
struct Disabled {
    bitmap: String,
    export: Option<String>,
    /// Whether its blocks are safe, so that it is only to be removed.
    done: bool,
}

/// A bitmap's granularity in bytes: fine for the last round's sake, but at most a few MiB of QEMU's memory per bitmap.
fn granularity(len: RegionLen) -> u64 {
    const GIB: u64 = 1 << 30;
    match len.0 {
        ..=0x10_0000_0000 => 4096,
        len if len <= 1024 * GIB => 16384,
        _ => 65536,
    }
}

impl SourceDisks {
    /// One entry a disk: region, node name, name for people, length.
    pub(super) fn new(disks: Vec<(RegionId, String, String, RegionLen)>) -> Self {
        let disks = disks
            .into_iter()
            .map(|(region, node, name, len)| SourceDisk {
                region,
                node,
                len,
                handle: Arc::new(DiskHandle::new(&name, len)),
                round: 0,
                untold: true,
                owed: None,
                disabled: Vec::new(),
                read: None,
            });
        Self {
            disks: disks.collect(),
            server: None,
            tracking: false,
            log: None,
        }
    }

    pub(super) fn keep_marks(&mut self, log: Arc<dyn MarkLog>) {
        self.log = Some(log);
    }

    pub(super) fn handle(&self, region: RegionId) -> Option<Arc<DiskHandle>> {
        let disk = self.disks.iter().find(|disk| disk.region == region)?;
        Some(Arc::clone(&disk.handle))
    }

    pub(super) fn has(&self, region: RegionId) -> bool {
        self.disks.iter().any(|disk| disk.region == region)
    }

    /// Adds a bitmap to each disk, and exports them.
    pub(super) async fn start(&mut self, qmp: &Qmp) -> Result<(), GuestError> {
        if self.tracking || self.disks.is_empty() {
            return Ok(());
        }
        self.open(qmp).await?;
        for disk in &mut self.disks {
            (disk.untold, disk.owed, disk.read) = (true, None, None);
            disk.disabled.clear();
            disk.round += 1;
            let arguments = disk.bitmap_arguments();
            qmp.execute("block-dirty-bitmap-add", arguments).await?;
        }
        self.tracking = true;
        Ok(())
    }

    /// Goes on with the bitmaps that an earlier agent left: of each disk the newest is enabled or was about to be followed by
    /// one. Those before it whose blocks are in the log are removed, all others are merged into it.
    pub(super) async fn resume(&mut self, qmp: &Qmp) -> Result<(), GuestError> {
        if self.disks.is_empty() {
            self.tracking = true;
            return Ok(());
        }
        let arguments = json!({ "flat": true });
        let nodes = qmp.execute("query-named-block-nodes", arguments).await?;
        let nodes = inventory::block_nodes(&nodes)?;
        for disk in &mut self.disks {
            let node = nodes.iter().find(|node| node.name == disk.node);
            let bitmaps = node.map(|node| node.bitmaps.as_slice()).unwrap_or_default();
            let rounds = bitmaps
                .iter()
                .filter_map(|(name, _)| names::round_of(name, disk.region));
            let log = self.log.as_deref();
            disk.adopt(
                qmp,
                rounds.collect(),
                log.map(|log| log.last_rotation(disk.region)),
            )
            .await?;
        }
        self.open(qmp).await?;
        self.tracking = true;
        Ok(())
    }

    /// Exports all disks for reading, where they are not.
    pub(super) async fn open(&mut self, qmp: &Qmp) -> Result<(), GuestError> {
        if self.disks.is_empty() {
            return Ok(());
        }
        let server = match self.server.take() {
            Some(server) => server,
            None => NbdServer::start(qmp).await?,
        };
        let server = self.server.insert(server);
        for disk in &self.disks {
            if !disk.handle.is_open() {
                let export = names::export(disk.region);
                server.export(qmp, &export, &disk.node, false).await?;
                disk.handle
                    .open(server.connect(&export, &[ALLOCATION]).await?)?;
            }
        }
        Ok(())
    }

    /// Flushes the images, so that the flush which a pause brings has little left to do.
    pub(super) async fn flush_ahead(&self) {
        for disk in &self.disks {
            let Ok(nbd) = disk.handle.nbd() else { continue };
            if let Err(error) = nbd.flush().await {
                tracing::debug!(%error, node = disk.node, "the flush ahead of the pause failed");
            }
        }
    }

    /// Takes the dirty blocks of `region`. `listed` is what a paused QEMU said of its disks: then no disk changes any more,
    /// and all are turned at once, so that the others cost nothing when their turn comes.
    pub(super) async fn take(
        &mut self,
        qmp: &Qmp,
        region: RegionId,
        listed: Option<&[Disk]>,
    ) -> Result<Taken, GuestError> {
        if !self.tracking {
            return Err(GuestError::Refused {
                command: format!("dirty marks of region {region}"),
                answer: "disk tracking was not started".to_owned(),
            });
        }
        self.open(qmp).await?;
        let unknown = || GuestError::Config(format!("region {region} is no disk"));
        let server = self.server.as_ref().ok_or_else(unknown)?;
        let paused = listed.is_some();
        let turns = self
            .disks
            .iter_mut()
            .filter(|disk| !disk.untold && (paused || disk.region == region))
            .map(|disk| disk.turn(qmp, server, listed, self.log.as_deref()));
        try_join_all(turns).await?;
        let disk = self.disks.iter_mut().find(|disk| disk.region == region);
        let disk = disk.ok_or_else(unknown)?;
        if disk.untold {
            return disk.take_everything().await;
        }
        Ok(disk.take_read())
    }

    /// Says what became of the blocks of the last take. While the guest is `paused` QEMU is left alone.
    pub(super) async fn settle(
        &mut self,
        qmp: &Qmp,
        region: RegionId,
        outcome: Settlement,
        paused: bool,
    ) -> Result<(), GuestError> {
        let Some(disk) = self.disks.iter_mut().find(|disk| disk.region == region) else {
            return Ok(());
        };
        match outcome {
            Settlement::Acknowledged => {
                disk.owed = None;
                disk.disabled
                    .iter_mut()
                    .for_each(|bitmap| bitmap.done = true);
            }
            Settlement::PutBack => {}
        }
        if paused {
            return Ok(());
        }
        disk.tidy(qmp).await
    }

    /// Ends all exports and the server. The bitmaps go on recording.
    async fn close(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        NbdServer::stop(self.let_go(), qmp).await
    }

    /// Reads nothing any more; the server that is to be stopped has the exports.
    pub(super) fn let_go(&mut self) -> Option<NbdServer> {
        for disk in &mut self.disks {
            disk.handle.close();
            disk.disabled
                .iter_mut()
                .for_each(|bitmap| bitmap.export = None);
        }
        self.server.take()
    }

    /// Removes every trace from QEMU. Idempotent.
    pub(super) async fn stop(&mut self, qmp: &Qmp) -> Result<(), GuestError> {
        let closed = self.close(qmp).await;
        let removed = if self.disks.is_empty() {
            Ok(())
        } else {
            leftovers::remove_bitmaps(qmp).await
        };
        self.tracking = false;
        Ok(closed.and(removed)?)
    }
}

impl SourceDisk {
    fn bitmap_arguments(&self) -> serde_json::Value {
        json!({
            "node": self.node, "name": names::bitmap(self.region, self.round),
            "granularity": granularity(self.len), "persistent": false,
        })
    }

    async fn adopt(
        &mut self,
        qmp: &Qmp,
        mut rounds: Vec<u64>,
        logged: Option<u64>,
    ) -> Result<(), GuestError> {
        rounds.sort_unstable();
        let Some(newest) = rounds.pop() else {
            return Err(GuestError::Touched(format!(
                "no bitmap of an earlier agent is on block node {} any more",
                self.node
            )));
        };
        self.round = newest;
        self.untold = false;
        self.disabled = rounds
            .iter()
            .map(|round| Disabled {
                bitmap: names::bitmap(self.region, *round),
                export: None,
                done: logged.is_some_and(|logged| *round <= logged),
            })
            .collect();
        // Between the merge of one bitmap and its removal its blocks are in both.
        self.tidy(qmp).await
    }

    /// The first take: everything is dirty, and what reads as zero is known from the image's map.
    async fn take_everything(&mut self) -> Result<Taken, GuestError> {
        let zero = self.handle.zeroes().await?;
        let dirty = RegionBits::full(self.len);
        self.owed = Some(dirty.clone());
        self.untold = false;
        Ok(Taken {
            dirty,
            zero,
            longest_hold: Duration::ZERO,
        })
    }

    /// What was read and what is owed.
    fn take_read(&mut self) -> Taken {
        let empty = || RegionBits::empty(self.len);
        let mut dirty = self.read.take().unwrap_or_else(empty);
        if let Some(owed) = &self.owed {
            dirty.union(owed);
        }
        self.owed = (!dirty.is_empty()).then(|| dirty.clone());
        Taken {
            zero: empty(),
            dirty,
            // The guest's I/O goes on through a rotation.
            longest_hold: Duration::ZERO,
        }
    }

    /// Dirty bytes in the enabled bitmap.
    async fn dirty_bytes(&self, qmp: &Qmp, listed: Option<&[Disk]>) -> Result<u64, GuestError> {
        let name = names::bitmap(self.region, self.round);
        // A rotation within the pause is not in its listing.
        if let Some(count) = listed.and_then(|disks| self.count_in(disks, &name)) {
            return Ok(count);
        }
        let answer = qmp.execute("query-block", json!({})).await?;
        let count = self.count_in(&inventory::disks(&answer)?, &name);
        count.ok_or_else(|| {
            GuestError::Touched(format!(
                "bitmap {name} of block node {} is gone: somebody removed it or changed the disk; migrate again",
                self.node
            ))
        })
    }

    fn count_in(&self, disks: &[Disk], bitmap: &str) -> Option<u64> {
        let disk = disks.iter().find(|disk| disk.node == self.node)?;
        let found = disk.bitmaps.iter().find(|(known, _)| known == bitmap)?;
        Some(found.1)
    }

    /// Rotates the bitmap where it has anything, and reads the disabled one into `read`.
    async fn turn(
        &mut self,
        qmp: &Qmp,
        server: &NbdServer,
        listed: Option<&[Disk]>,
        log: Option<&dyn MarkLog>,
    ) -> Result<(), GuestError> {
        if self.dirty_bytes(qmp, listed).await? == 0 {
            return Ok(());
        }
        let begun = Instant::now();
        let read = self.rotate(qmp, server).await;
        let mut read = read.inspect_err(|_| {
            // What the bitmap holds is not known: everything, until it is settled.
            self.owed = Some(RegionBits::full(self.len));
        })?;
        if let Some(log) = log {
            log.found(self.region, &read);
            // The bitmap before the one that is enabled now is the one that was read.
            log.rotated(self.region, self.round - 1);
        }
        if listed.is_none() {
            self.end_exports(qmp).await?;
        }
        if let Some(earlier) = &self.read {
            read.union(earlier);
        }
        self.read = Some(read);
        tracing::debug!(node = self.node, round = self.round, elapsed = ?begun.elapsed(), "rotated a disk's bitmap");
        Ok(())
    }

    /// Adds the next bitmap, disables the enabled one, and reads that.
    async fn rotate(&mut self, qmp: &Qmp, server: &NbdServer) -> Result<RegionBits, GuestError> {
        let old = names::bitmap(self.region, self.round);
        let export = names::bitmap_export(self.region, self.round);
        self.round += 1;
        let disabling = json!({ "node": self.node, "name": old });
        let exporting = NbdServer::export_arguments(&export, &self.node, false, Some(&old));
        // Sent together: QEMU carries them out one after the other. One that fails makes the next fail too, or is
        // noticed here: an enabled bitmap cannot be exported.
        let (added, disabled, exported) = tokio::join!(
            qmp.execute("block-dirty-bitmap-add", self.bitmap_arguments()),
            qmp.execute("block-dirty-bitmap-disable", disabling),
            qmp.execute("block-export-add", exporting),
        );
        self.disabled.push(Disabled {
            bitmap: old.clone(),
            export: exported.is_ok().then(|| export.clone()),
            done: false,
        });
        added?;
        disabled?;
        exported?;
        Ok(self.read_bitmap(server, &export, &old).await?)
    }

    async fn read_bitmap(
        &self,
        server: &NbdServer,
        export: &str,
        bitmap: &str,
    ) -> Result<RegionBits, NbdError> {
        let context = format!("qemu:dirty-bitmap:{bitmap}");
        let nbd = server.connect(export, &[&context]).await?;
        let mut dirty = RegionBits::empty(self.len);
        let mut at = 0;
        for extent in nbd.extents(&context, 0, self.len.0).await? {
            if extent.status & wire::STATUS_DIRTY != 0 {
                dirty.insert_bytes(at, u64::from(extent.len));
            }
            at += u64::from(extent.len);
        }
        Ok(dirty)
    }

    /// Ends the passing exports of disabled bitmaps: a bitmap under export can be neither merged nor removed.
    async fn end_exports(&mut self, qmp: &Qmp) -> Result<(), QmpError> {
        for bitmap in &mut self.disabled {
            let Some(export) = &bitmap.export else {
                continue;
            };
            delete_export(qmp, export).await?;
            bitmap.export = None;
        }
        Ok(())
    }

    /// Removes the disabled bitmaps whose blocks are safe, merges the others back.
    async fn tidy(&mut self, qmp: &Qmp) -> Result<(), GuestError> {
        self.end_exports(qmp).await?;
        while let Some(disabled) = self.disabled.last() {
            let node = &self.node;
            if !disabled.done {
                let target = names::bitmap(self.region, self.round);
                let arguments =
                    json!({ "node": node, "target": target, "bitmaps": [disabled.bitmap] });
                qmp.execute("block-dirty-bitmap-merge", arguments).await?;
            }
            let arguments = json!({ "node": node, "name": disabled.bitmap });
            qmp.execute("block-dirty-bitmap-remove", arguments).await?;
            self.disabled.pop();
        }
        Ok(())
    }
}

/// Deletes an export and waits until it is gone, which QEMU tells by an event.
async fn delete_export(qmp: &Qmp, id: &str) -> Result<(), QmpError> {
    let mut events = qmp.events();
    let arguments = json!({ "id": id, "mode": "hard" });
    match qmp.execute("block-export-del", arguments).await {
        Ok(_) => {}
        Err(QmpError::Refused { description, .. }) if description.contains("is not found") => {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let gone = async {
        loop {
            match events.recv().await {
                Ok(event) if event.name == "BLOCK_EXPORT_DELETED" && event.data["id"] == id => {
                    break;
                }
                Ok(_) => {}
                // Some events were lost, or the connection: the list tells.
                Err(_) => break,
            }
        }
    };
    // The event is sure to come; the list below is what decides.
    let _ = tokio::time::timeout(Duration::from_secs(10), gone).await;
    if inventory::exports(qmp)
        .await?
        .iter()
        .any(|export| export.id == id)
    {
        return Err(QmpError::unexpected(
            "block-export-del",
            &format!("export {id} is still there"),
        ));
    }
    Ok(())
}
