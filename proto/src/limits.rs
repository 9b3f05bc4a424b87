//! The named cap of every length, count, index and string that a peer can send, each with its reason.

/// Longest control message: room for the digests of a piece and for a guest of 1,024 regions.
pub const MAX_CONTROL_MESSAGE: usize = 1 << 20;
/// Longest detail of an error.
pub const MAX_DETAIL: usize = 4096;
/// Longest name of a region, device, machine or CPU model.
pub const MAX_NAME: usize = 512;
/// Most regions of a guest.
pub const MAX_REGIONS: usize = 1024;
/// Most ranges of populated windows in an `Offer`.
pub const MAX_POPULATED: usize = 4096;
/// Most devices listed.
pub const MAX_DEVICES: usize = 2048;
/// Longest region: 64 TiB.
pub const MAX_REGION_LEN: u64 = 64 << 40;
/// Most data lanes (quinn closes a connection whose stream has more than 1,024 gaps, so width comes from lanes).
pub const MAX_LANES: u8 = 64;
/// Data lanes unless told otherwise.
pub const DEFAULT_LANES: u8 = 16;
/// Most connections of a session.
pub const MAX_CONNECTIONS: u8 = 16;
/// Most blocks in one frame: 512 KiB of payload, at which zstd has nearly its full ratio and speed
/// while a lane needs little memory.
pub const MAX_FRAME_BLOCKS: u32 = 128;
/// Longest payload of a frame, encoded or not.
pub const MAX_FRAME_PAYLOAD: u32 = MAX_FRAME_BLOCKS * crate::geometry::BLOCK_SIZE;
/// Longest device state: QEMU's is tens of KiB for a small guest, some MiB with large display devices.
pub const MAX_DEVICE_STATE: u64 = 256 << 20;
/// Most digests in one message.
pub const MAX_DIGESTS: usize = 8192;
/// Most windows of one `Compare`: 512 MiB, which a core digests in a quarter of a second.
pub const MAX_COMPARE_WINDOWS: u32 = 256;
/// Most `Compare` that wait for an answer at a time: enough that neither side waits for the other's digests on a long link.
pub const MAX_COMPARES: usize = 4;
/// Bytes of the length in front of a control message.
pub const CONTROL_PREFIX: usize = 4;
/// Most virtual CPUs: QEMU's largest machine type has 4,096.
pub const MAX_VCPUS: u32 = 4096;
/// Most disks of mode `shared`.
pub const MAX_SHARED_DISKS: usize = 256;
/// Most features in one message.
pub const MAX_FEATURES: usize = 64;
/// Longest name of a feature.
pub const MAX_FEATURE_NAME: usize = 64;
/// Longest name of an agent in `Welcome`.
pub const MAX_AGENT_NAME: usize = 128;
