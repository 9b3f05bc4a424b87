//! Names of everything that the driver creates inside a QEMU: a later agent knows them again by their beginning.

use vmferry_proto::ids::RegionId;

/// Beginning of them all.
const PREFIX: &str = "vmferry-";

/// Name under which the listening socket of the NBD server is handed over.
pub(super) const NBD_SOCKET: &str = "vmferry-nbd";
/// Name under which the incoming device state is handed over.
pub(super) const INCOMING: &str = "vmferry-incoming";
/// Mark of descriptor sets.
pub(super) const STATE_SET: &str = "vmferry-state";

/// Whether we, or an agent before us, made it.
pub(super) fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// Export of a disk's content.
pub(super) fn export(region: RegionId) -> String {
    format!("{PREFIX}disk{}", region.0)
}

/// Export of a disk with the bitmap of its `round`th rotation.
pub(super) fn bitmap_export(region: RegionId, round: u64) -> String {
    format!("{PREFIX}disk{}-round{round}", region.0)
}

/// Bitmap that records a disk's writes from its `round`th rotation on.
pub(super) fn bitmap(region: RegionId, round: u64) -> String {
    format!("{PREFIX}bitmap{}-{round}", region.0)
}

/// The rotation that a bitmap of `region` belongs to.
pub(super) fn round_of(bitmap: &str, region: RegionId) -> Option<u64> {
    let rest = bitmap.strip_prefix(PREFIX)?.strip_prefix("bitmap")?;
    let (number, round) = rest.split_once('-')?;
    (number.parse() == Ok(region.0)).then(|| round.parse().ok())?
}

/// Object without any function whose name tells a later agent which descriptor inside QEMU tracks its memory.
pub(super) fn tracking_mark(descriptor: i32) -> String {
    format!("{PREFIX}userfaultfd{descriptor}")
}

/// The descriptor that a mark names.
pub(super) fn marked_descriptor(object: &str) -> Option<i32> {
    let number = object.strip_prefix(PREFIX)?.strip_prefix("userfaultfd")?;
    number.parse().ok()
}
