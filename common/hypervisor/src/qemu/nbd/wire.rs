//! Messages of the NBD protocol as bytes, without any I/O.
//!
//! Owns the numbers, the encoders and the parsers. Everything is big-endian. No parser panics or allocates more
//! than it was given, whatever the bytes are.

/// `NBDMAGIC`.
pub const HELLO_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First field of an option's reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First field of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First field of a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// First field of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Server and client speak fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// No 124 bytes of zero after the handshake.
pub const FLAG_NO_ZEROES: u16 = 2;

/// Option: open this export.
pub const OPT_GO: u32 = 7;
/// Option: structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// Option: choose meta contexts.
pub const OPT_SET_META_CONTEXT: u32 = 10;

/// Reply: done.
pub const REP_ACK: u32 = 1;
/// Reply: information on the export.
pub const REP_INFO: u32 = 3;
/// Reply: a meta context that was chosen.
pub const REP_META_CONTEXT: u32 = 4;
/// Bit of replies that are errors.
pub const REP_ERROR: u32 = 1 << 31;
/// Information: size and flags of the export.
pub const INFO_EXPORT: u16 = 0;

/// Export flag: read-only.
pub const EXPORT_READ_ONLY: u16 = 1 << 1;
/// Export flag: FLUSH is there.
pub const EXPORT_FLUSH: u16 = 1 << 2;
/// Export flag: WRITE_ZEROES is there.
pub const EXPORT_WRITE_ZEROES: u16 = 1 << 6;

/// Requests, as numbered on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    /// Read bytes.
    Read = 0,
    /// Write bytes.
    Write = 1,
    /// End the connection; not answered.
    Disconnect = 2,
    /// Make durable what was written.
    Flush = 3,
    /// Write zeroes, leaving a hole where the image can.
    WriteZeroes = 6,
    /// State of a range in each meta context.
    BlockStatus = 7,
}

impl Command {
    /// Name for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "READ",
            Self::Write => "WRITE",
            Self::Disconnect => "DISC",
            Self::Flush => "FLUSH",
            Self::WriteZeroes => "WRITE_ZEROES",
            Self::BlockStatus => "BLOCK_STATUS",
        }
    }
}

/// Chunk: nothing but its flags.
pub const CHUNK_NONE: u16 = 0;
/// Chunk: data.
pub const CHUNK_DATA: u16 = 1;
/// Chunk: a hole, which reads as zero.
pub const CHUNK_HOLE: u16 = 2;
/// Chunk: extents of one meta context.
pub const CHUNK_BLOCK_STATUS: u16 = 5;
/// Bit of chunks that are errors.
pub const CHUNK_ERROR: u16 = 1 << 15;
/// Chunk flag: the last one of its reply.
pub const CHUNK_DONE: u16 = 1;

/// Longest payload of a chunk that is believed: the protocol's largest read and its offset.
pub const MAX_CHUNK: u32 = (32 << 20) + 8;
/// Longest data of an option's reply that is believed.
pub const MAX_OPTION_DATA: u32 = 64 << 10;

/// Size in bytes of a request without its data.
pub const REQUEST_LEN: usize = 28;
/// Size in bytes of an option's reply without its data.
pub const OPTION_REPLY_LEN: usize = 20;
/// Size in bytes of what both kinds of reply have.
pub const REPLY_LEN: usize = 16;

/// A range of a disk in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u32,
    /// State: for `base:allocation` bit 0 hole, bit 1 reads as zero; for a dirty bitmap bit 0 dirty.
    pub status: u32,
}

/// `base:allocation`: the range reads as zero.
pub const STATUS_ZERO: u32 = 2;
/// A dirty bitmap: the range is dirty.
pub const STATUS_DIRTY: u32 = 1;

/// Bytes of a request without its data.
#[must_use]
pub fn request(command: Command, cookie: u64, offset: u64, len: u32) -> [u8; REQUEST_LEN] {
    let mut out = [0; REQUEST_LEN];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[6..8].copy_from_slice(&(command as u16).to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..].copy_from_slice(&len.to_be_bytes());
    out
}

/// Everything a client says in the handshake: flags, structured replies, meta contexts, GO.
#[must_use]
pub fn handshake(export: &str, contexts: &[&str]) -> Vec<u8> {
    let flags = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    let mut out = flags.to_be_bytes().to_vec();
    option(&mut out, OPT_STRUCTURED_REPLY, &[]);
    if !contexts.is_empty() {
        let mut data = text(export);
        data.extend(count(contexts.len()).to_be_bytes());
        contexts.iter().for_each(|name| data.extend(text(name)));
        option(&mut out, OPT_SET_META_CONTEXT, &data);
    }
    let mut data = text(export);
    data.extend(0u16.to_be_bytes());
    option(&mut out, OPT_GO, &data);
    out
}

fn option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend(number.to_be_bytes());
    out.extend(count(data.len()).to_be_bytes());
    out.extend(data);
}

fn text(text: &str) -> Vec<u8> {
    let mut out = count(text.len()).to_be_bytes().to_vec();
    out.extend(text.as_bytes());
    out
}

/// Lengths here are of names that we made; a longer one would be refused by any server.
fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Head of an option's reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// The option that it answers.
    pub option: u32,
    /// Kind of reply.
    pub kind: u32,
    /// Length in bytes of the data that follow, checked against [`MAX_OPTION_DATA`].
    pub len: u32,
}

/// Parses the head of an option's reply.
///
/// # Errors
/// What is wrong with it.
pub fn option_reply(bytes: &[u8; OPTION_REPLY_LEN]) -> Result<OptionReply, String> {
    let mut take = Take(bytes);
    let magic = take.u64()?;
    if magic != OPTION_REPLY_MAGIC {
        return Err(format!("an option's reply begins with {magic:#x}"));
    }
    let reply = OptionReply {
        option: take.u32()?,
        kind: take.u32()?,
        len: take.u32()?,
    };
    if reply.len > MAX_OPTION_DATA {
        return Err(format!("an option's reply of {} bytes", reply.len));
    }
    Ok(reply)
}

/// Size and flags of an export, where the information `data` is about them.
///
/// # Errors
/// What is wrong with it.
pub fn export_info(data: &[u8]) -> Result<Option<(u64, u16)>, String> {
    let mut take = Take(data);
    if take.u16()? != INFO_EXPORT {
        return Ok(None);
    }
    Ok(Some((take.u64()?, take.u16()?)))
}

/// Id and name of a meta context.
///
/// # Errors
/// What is wrong with it.
pub fn meta_context(data: &[u8]) -> Result<(u32, String), String> {
    let mut take = Take(data);
    let id = take.u32()?;
    let name = String::from_utf8(take.0.to_vec()).map_err(|error| error.to_string())?;
    Ok((id, name))
}

/// Head of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// A simple reply: no data but for a READ, which is never answered this way here.
    Simple {
        /// Error number, 0 for none.
        error: u32,
        /// Cookie of the request.
        cookie: u64,
    },
    /// A chunk; its length (u32) follows.
    Chunk {
        /// Flags.
        flags: u16,
        /// Kind.
        kind: u16,
        /// Cookie of the request.
        cookie: u64,
    },
}

/// Parses the head of a reply.
///
/// # Errors
/// What is wrong with it.
pub fn reply(bytes: &[u8; REPLY_LEN]) -> Result<Reply, String> {
    let mut take = Take(bytes);
    match take.u32()? {
        SIMPLE_MAGIC => Ok(Reply::Simple {
            error: take.u32()?,
            cookie: take.u64()?,
        }),
        CHUNK_MAGIC => Ok(Reply::Chunk {
            flags: take.u16()?,
            kind: take.u16()?,
            cookie: take.u64()?,
        }),
        magic => Err(format!("a reply begins with {magic:#x}")),
    }
}

/// Context id and extents of a block status chunk.
///
/// # Errors
/// What is wrong with it.
pub fn block_status(payload: &[u8]) -> Result<(u32, Vec<Extent>), String> {
    let mut take = Take(payload);
    let context = take.u32()?;
    let mut extents = Vec::with_capacity(take.0.len() / 8);
    while !take.0.is_empty() {
        let extent = Extent {
            len: take.u32()?,
            status: take.u32()?,
        };
        if extent.len == 0 {
            return Err("an extent of no length".to_owned());
        }
        extents.push(extent);
    }
    if extents.is_empty() {
        return Err("a block status without extents".to_owned());
    }
    Ok((context, extents))
}

/// Error number and text of an error chunk.
///
/// # Errors
/// What is wrong with it.
pub fn error_chunk(payload: &[u8]) -> Result<(u32, String), String> {
    let mut take = Take(payload);
    let number = take.u32()?;
    let len = usize::from(take.u16()?);
    let text = take
        .0
        .get(..len)
        .ok_or("an error text longer than its chunk")?;
    Ok((number, String::from_utf8_lossy(text).into_owned()))
}

/// Takes big-endian numbers off the front of a slice.
#[derive(Debug)]
pub struct Take<'a>(pub &'a [u8]);

impl Take<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| format!("{} bytes where {N} are needed", self.0.len()))?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next two bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u16(&mut self) -> Result<u16, String> {
        self.bytes().map(u16::from_be_bytes)
    }

    /// The next four bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_be_bytes)
    }

    /// The next eight bytes.
    ///
    /// # Errors
    /// Where fewer are left.
    pub fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_be_bytes)
    }
}
