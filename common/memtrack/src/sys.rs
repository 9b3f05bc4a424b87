//! The kernel calls that no crate wraps: userfaultfd ioctls, PAGEMAP_SCAN, process_vm_readv and _writev.
//!
//! Owns one thin safe function for each. They check what memory safety of *this* process needs and nothing
//! else; meaning is given to them elsewhere.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFDIO_REGISTER_MODE_WP,
    page_region, pm_scan_arg, uffdio_api, uffdio_range, uffdio_register,
};

/// Bytes of a page on x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// Flags of the injected `userfaultfd` call. USER_MODE_ONLY is enough: asynchronous write-protection is resolved inside
/// the kernel, for its own writes too, and an unprivileged target may not ask for more.
pub(crate) const UFFD_FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

const FEATURES: u64 = (UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC) as u64;

// _IOWR(0xAA, 0x3F, struct uffdio_api), _IOWR(0xAA, 0, struct uffdio_register), _IOR(0xAA, 1, struct uffdio_range),
// _IOWR('f', 16, struct pm_scan_arg): older headers lack the last.
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const PAGEMAP_SCAN: u64 = 0xc060_6610;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A userfaultfd of this process, to try out what the kernel can do.
pub(crate) fn own_userfaultfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes an integer and returns a new descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS) };
    let fd = check(i32::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the descriptor was just made and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Switches on asynchronous write-protection; once per descriptor. EINVAL where the kernel has not got it.
pub(crate) fn uffd_enable(fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut api = uffdio_api {
        api: u64::from(UFFD_API),
        features: FEATURES,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API reads and writes one uffdio_api, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) }).map(drop)
}

/// Registers `start..start + len` of the descriptor's process for write-protection.
pub(crate) fn uffd_register(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut request = uffdio_register {
        range: uffdio_range { start, len },
        mode: u64::from(UFFDIO_REGISTER_MODE_WP),
        ioctls: 0,
    };
    // SAFETY: UFFDIO_REGISTER reads and writes one uffdio_register, which lives until the call returns; the
    // addresses in it belong to the descriptor's process and are not followed in this one.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut request) }).map(drop)
}

/// Undoes [`uffd_register`]: protection and marks are gone.
pub(crate) fn uffd_unregister(fd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut range = uffdio_range { start, len };
    // SAFETY: UFFDIO_UNREGISTER reads one uffdio_range, which lives until the call returns.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut range) }).map(drop)
}

/// What PAGEMAP_SCAN is asked; fields as in the kernel's `struct pm_scan_arg`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ScanRequest {
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) inverted: u64,
    pub(crate) mask: u64,
    pub(crate) anyof: u64,
    pub(crate) wanted: u64,
}

/// An empty answer slot.
pub(crate) const NO_REGION: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

/// One PAGEMAP_SCAN: how many regions it wrote to `out`, and the address up to which it walked.
pub(crate) fn pagemap_scan(
    pagemap: BorrowedFd<'_>,
    request: &ScanRequest,
    out: &mut [page_region],
) -> io::Result<(usize, u64)> {
    let mut arg = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: request.flags,
        start: request.start,
        end: request.end,
        walk_end: 0,
        vec: out.as_mut_ptr() as u64,
        vec_len: out.len() as u64,
        max_pages: 0,
        category_inverted: request.inverted,
        category_mask: request.mask,
        category_anyof_mask: request.anyof,
        return_mask: request.wanted,
    };
    // SAFETY: the call reads and writes one pm_scan_arg and writes at most `vec_len` page_regions to `vec`, which is
    // `out`; both live until it returns. The scanned addresses belong to another process.
    let filled = check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) })?;
    let filled = usize::try_from(filled).unwrap_or(0).min(out.len());
    Ok((filled, arg.walk_end))
}

/// A piece of another process's memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RemotePiece {
    pub(crate) addr: u64,
    pub(crate) len: usize,
}

fn remote_iovecs(pieces: &[RemotePiece]) -> Vec<libc::iovec> {
    pieces
        .iter()
        .map(|piece| libc::iovec {
            iov_base: piece.addr as *mut libc::c_void,
            iov_len: piece.len,
        })
        .collect()
}

/// One process_vm_readv into `buf`: bytes read, which may be fewer than asked.
pub(crate) fn read_remote(pid: u32, pieces: &[RemotePiece], buf: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    let remote = remote_iovecs(pieces);
    // SAFETY: the kernel writes at most `buf.len()` bytes into `buf`, which is borrowed mutably for the call; the remote
    // addresses are only looked up in the other process.
    let done = unsafe {
        libc::process_vm_readv(
            pid.cast_signed(),
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as u64,
            0,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// One process_vm_writev from `data`, one behind the other: bytes written, which may be fewer than asked.
pub(crate) fn write_remote(
    pid: u32,
    pieces: &[RemotePiece],
    data: &[IoSlice<'_>],
) -> io::Result<usize> {
    let remote = remote_iovecs(pieces);
    // SAFETY: the kernel only reads what `data` borrows, and an `IoSlice` is laid out as an iovec ("guaranteed to be ABI compatible
    // with the iovec type on Unix platforms"); the remote addresses are only looked up in the other process, of which the caller
    // was told that it is memory to write.
    let done = unsafe {
        libc::process_vm_writev(
            pid.cast_signed(),
            data.as_ptr().cast(),
            data.len() as u64,
            remote.as_ptr(),
            remote.len() as u64,
            0,
        )
    };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Whether descriptor `theirs` of `pid` is the same open file as `ours`; `None` where the kernel cannot say.
pub(crate) fn same_open_file(ours: &OwnedFd, pid: u32, theirs: i32) -> Option<bool> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: kcmp takes integers only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            std::process::id(),
            pid,
            KCMP_FILE,
            u64::from(ours.as_fd().as_raw_fd().cast_unsigned()),
            u64::from(theirs.cast_unsigned()),
        )
    };
    (answer >= 0).then_some(answer == 0)
}
