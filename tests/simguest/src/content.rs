//! What a page or block holds: a function of seed, place and entry.
//!
//! Owns the generator. An **entry** is what the version tables hold for a page: its kind in the three highest bits and its
//! version below. Entry 0 means "never written": zeroes. Everything else that is not of kind zero, and no copy, begins with a
//! header that names place and entry, so that a stale or misplaced page tells what it is.

/// Bytes of a page of RAM and of a block of the disk.
pub const PAGE: usize = 4096;

/// A page's content.
pub type Page = [u8; PAGE];

/// Where a page is, so that a block of the disk is never the same as a page of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Page of RAM.
    Memory(u64),
    /// Block of the disk.
    Disk(u64),
}

/// Kind of a written page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// All bytes zero.
    Zero,
    /// Words: compresses about threefold.
    Text,
    /// Does not compress.
    Random,
    /// Does not compress, and is what other pages and blocks hold as well.
    Copy,
}

/// What the version tables hold for a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Entry(pub u32);

const VERSION_BITS: u32 = 29;
const VERSION_MASK: u32 = (1 << VERSION_BITS) - 1;

impl Entry {
    /// The entry after this one, of kind `kind`; version 0 is left out, it means "never written".
    #[must_use]
    pub const fn next(self, kind: Kind) -> Self {
        let version = (self.0 & VERSION_MASK) % VERSION_MASK + 1;
        let kind = match kind {
            Kind::Zero => 0,
            Kind::Text => 1,
            Kind::Random => 2,
            Kind::Copy => 3,
        };
        Self(kind << VERSION_BITS | version)
    }

    /// Kind of the page; `None` for an entry that this program never makes.
    #[must_use]
    pub const fn kind(self) -> Option<Kind> {
        match self.0 >> VERSION_BITS {
            0 => Some(Kind::Zero),
            1 => Some(Kind::Text),
            2 => Some(Kind::Random),
            3 => Some(Kind::Copy),
            _ => None,
        }
    }

    /// Version of the page.
    #[must_use]
    pub const fn version(self) -> u32 {
        self.0 & VERSION_MASK
    }
}

/// Fills `page` with what it must hold; false for an impossible entry.
#[must_use]
pub fn fill(seed: u64, place: Place, entry: Entry, page: &mut Page) -> bool {
    match entry.kind() {
        None => return false,
        Some(Kind::Zero) => page.fill(0),
        Some(Kind::Text) => {
            text(&mut stream(seed, place, entry), page);
            page[..HEADER].copy_from_slice(&header(place, entry));
        }
        Some(Kind::Random) => {
            noise(stream(seed, place, entry), page);
            page[..HEADER].copy_from_slice(&header(place, entry));
        }
        Some(Kind::Copy) => {
            let which = stream(seed, place, entry).below(COPIES);
            noise(Random(mix(seed ^ mix(which))), page);
        }
    }
    true
}

/// Contents of which each copy is one.
const COPIES: u64 = 512;

fn noise(mut random: Random, page: &mut Page) {
    for word in page.as_chunks_mut::<8>().0 {
        *word = random.draw().to_le_bytes();
    }
}

const HEADER: usize = 16;

fn header(place: Place, entry: Entry) -> [u8; HEADER] {
    let (tag, index) = match place {
        Place::Memory(index) => (*b"ram ", index),
        Place::Disk(index) => (*b"disk", index),
    };
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&tag);
    bytes[4..8].copy_from_slice(&entry.0.to_le_bytes());
    bytes[8..].copy_from_slice(&index.to_le_bytes());
    bytes
}

/// What a page says of itself, for a message about a wrong one.
#[must_use]
pub fn describe(page: &Page) -> String {
    if page.iter().all(|byte| *byte == 0) {
        return "zeroes".to_owned();
    }
    let word = |at: usize| {
        page[at..]
            .first_chunk()
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let index = page[8..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes));
    match &page[..4] {
        b"ram " | b"disk" => format!(
            "{} page {index} version {}",
            String::from_utf8_lossy(&page[..4]).trim(),
            Entry(word(4)).version()
        ),
        _ => "bytes of no page".to_owned(),
    }
}

fn stream(seed: u64, place: Place, entry: Entry) -> Random {
    let (tag, index) = match place {
        Place::Memory(index) => (1, index),
        Place::Disk(index) => (2, index),
    };
    Random(mix(seed ^ mix(index << 2 | tag) ^ u64::from(entry.0) << 32))
}

/// Words of two to eight letters, from a vocabulary of 256.
fn text(random: &mut Random, page: &mut Page) {
    let mut at = HEADER;
    while at < PAGE {
        for number in random.draw().to_le_bytes() {
            let letters = mix(u64::from(number)).to_le_bytes();
            let len = (2 + usize::from(letters[7] % 7)).min(PAGE - at);
            for (to, letter) in page[at..at + len].iter_mut().zip(letters) {
                *to = b'a' + letter % 26;
            }
            at += len;
            if at >= PAGE {
                return;
            }
            page[at] = b' ';
            at += 1;
            if at >= PAGE {
                return;
            }
        }
    }
}

/// A small generator (splitmix64): its whole state is one word, which travels in the CPU state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Random(pub u64);

impl Random {
    /// The next word.
    pub const fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`; 0 for a bound of 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.draw() % bound }
    }
}

/// Spreads a word's bits over all of it (the finish of splitmix64).
#[must_use]
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// A page's part in a running sum: the sum over all pages changes with any entry, and with entries that swap places.
#[must_use]
pub const fn share(place: Place, entry: Entry) -> u64 {
    let (tag, index) = match place {
        Place::Memory(index) => (1, index),
        Place::Disk(index) => (2, index),
    };
    if entry.0 == 0 {
        return 0;
    }
    mix(mix(index << 2 | tag) ^ entry.0 as u64)
}
