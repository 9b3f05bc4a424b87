//! What /proc/PID/maps says a memory range is made of.
//!
//! Owns the parse of that file and the decision what a page that is not there reads as. A range may lie over several
//! mappings; the most cautious answer of them counts for the whole.

use crate::error::TrackError;
use crate::remote::MemoryRange;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) shared: bool,
    pub(crate) offset: u64,
    pub(crate) device: String,
    pub(crate) inode: u64,
    pub(crate) path: String,
}

/// What a range is made of, and so what a page that is not there means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory: a page that was never touched reads as zero.
    Anonymous,
    /// A shared mapping of a file (memfd, tmpfs, …): a hole of the file reads as zero, and reading it here would
    /// allocate it. A page that this process has not mapped may hold data all the same.
    Shared,
    /// Anything else (private mapping of a file, huge pages): nothing is known without reading.
    Opaque,
}

/// All mappings of `pid`, ascending.
pub(crate) fn read(pid: u32) -> Result<Vec<Vma>, TrackError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/maps")).map_err(|source| {
        if source.kind() == std::io::ErrorKind::NotFound {
            TrackError::Gone { pid }
        } else {
            TrackError::from_os(pid, "list the mappings of", source)
        }
    })?;
    Ok(text.lines().filter_map(parse).collect())
}

/// `7f0000000000-7f0000001000 rw-s 00000000 00:01 1024   /memfd:ram (deleted)`
fn parse(line: &str) -> Option<Vma> {
    let mut rest = line;
    let mut field = || {
        let trimmed = rest.trim_start();
        let (head, tail) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = tail;
        (!head.is_empty()).then_some(head)
    };
    let (start, end) = field()?.split_once('-')?;
    let permissions = field()?;
    let offset = field()?;
    let device = field()?.to_owned();
    let inode = field()?.parse().ok()?;
    Some(Vma {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        shared: permissions.ends_with('s'),
        offset: u64::from_str_radix(offset, 16).ok()?,
        device,
        inode,
        path: rest.trim().to_owned(),
    })
}

/// The mappings under `range`, without gaps.
pub(crate) fn covering(all: &[Vma], pid: u32, range: &MemoryRange) -> Result<Vec<Vma>, TrackError> {
    let bad = |why: &str| TrackError::BadRange {
        pid,
        start: range.start,
        len: range.len,
        why: why.to_owned(),
    };
    let end = range
        .start
        .checked_add(range.len)
        .ok_or_else(|| bad("it ends beyond the address space"))?;
    if range.len == 0 {
        return Err(bad("it is empty"));
    }
    let found: Vec<Vma> = all
        .iter()
        .filter(|vma| vma.start < end && vma.end > range.start)
        .cloned()
        .collect();
    let mut reached = range.start;
    for vma in &found {
        if vma.start > reached {
            break;
        }
        reached = vma.end;
    }
    if reached < end {
        return Err(bad("it is not wholly mapped there (any more)"));
    }
    Ok(found)
}

/// What `vmas` together are; `hugetlb` says of a shared file that it has huge pages.
pub(crate) fn backing(vmas: &[Vma], hugetlb: impl Fn(&Vma) -> bool) -> Backing {
    let one = |vma: &Vma| match (vma.shared, vma.inode) {
        (false, 0) => Backing::Anonymous,
        (true, _) if !hugetlb(vma) => Backing::Shared,
        (_, _) => Backing::Opaque,
    };
    let mut kinds = vmas.iter().map(one);
    let first = kinds.next().unwrap_or(Backing::Opaque);
    if kinds.all(|kind| kind == first) {
        first
    } else {
        Backing::Opaque
    }
}

#[cfg(test)]
mod tests {
    use super::{Backing, backing, covering, parse};
    use crate::remote::MemoryRange;

    #[test]
    fn a_line_of_maps_is_understood() {
        let vma =
            parse("7f00-8f00 rw-s 00002000 00:01 1024       /memfd:my ram (deleted)").unwrap();
        assert_eq!((vma.start, vma.end, vma.offset), (0x7f00, 0x8f00, 0x2000));
        assert!(vma.shared);
        assert_eq!(
            (vma.inode, vma.path.as_str()),
            (1024, "/memfd:my ram (deleted)")
        );
        let anonymous = parse("1000-2000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((anonymous.inode, anonymous.path.as_str()), (0, ""));
        assert_eq!(
            backing(&[anonymous.clone(), vma], |_| false),
            Backing::Opaque
        );
        assert_eq!(backing(&[anonymous], |_| false), Backing::Anonymous);
    }

    #[test]
    fn a_gap_under_a_range_is_refused() {
        let all: Vec<_> = ["1000-2000 rw-p 0 00:00 0", "3000-4000 rw-p 0 00:00 0"]
            .iter()
            .filter_map(|line| parse(line))
            .collect();
        let range = |start, len| MemoryRange { start, len };
        assert!(covering(&all, 1, &range(0x1000, 0x1000)).is_ok());
        assert!(covering(&all, 1, &range(0x1000, 0x3000)).is_err());
        assert!(covering(&all, 1, &range(0x1000, 0)).is_err());
        assert!(covering(&all, 1, &range(0x1000, u64::MAX)).is_err());
    }
}
