//! A memory mapping that other processes may read and write at any time: the RAM of the embedded guest.
//!
//! Owns the mapping; hands out copies and single words, never references, since a migration agent reads and writes
//! it from outside while it is in use.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{NonNull, null_mut};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};

/// A mapping of zeroes to begin with, private anonymous or of a memfd.
#[derive(Debug)]
pub struct GuestRam {
    base: NonNull<u8>,
    len: usize,
    memfd: Option<OwnedFd>,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for GuestRam {}

impl GuestRam {
    /// Private anonymous memory of `len` bytes, in huge pages where the system has them: as QEMU asks for its guests' RAM.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let ram = Self::map(len, None)?;
        // SAFETY: advice on a mapping that is ours alone; it changes no content.
        let advised = unsafe { libc::madvise(ram.base.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        if advised != 0 {
            // A kernel without huge pages: the memory is as good, only slower to touch.
            tracing::debug!(error = %io::Error::last_os_error(), "no huge pages");
        }
        Ok(ram)
    }

    /// Shared memory of `len` bytes under a memfd called `name`.
    pub fn memfd(name: &str, len: usize) -> io::Result<Self> {
        let memfd = memfd_create(name, MemfdFlags::CLOEXEC)?;
        ftruncate(&memfd, len as u64)?;
        Self::map(len, Some(memfd))
    }

    /// Makes every page present now, zero as it was: no write waits for memory later.
    pub fn preallocate(&self) -> io::Result<()> {
        // SAFETY: advice on a mapping that is ours alone; pages that are there already keep their content.
        let done = unsafe {
            let all = self.base.as_ptr().cast();
            libc::madvise(all, self.len, libc::MADV_POPULATE_WRITE)
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn map(len: usize, memfd: Option<OwnedFd>) -> io::Result<Self> {
        let (flags, fd) = memfd
            .as_ref()
            .map_or((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1), |memfd| {
                (libc::MAP_SHARED, memfd.as_raw_fd())
            });
        let flags = flags | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice; no existing memory is touched.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                fd,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len, memfd })
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte; a mapping never has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies bytes from `offset` on into `buf`.
    ///
    /// # Panics
    /// If they are not all inside.
    pub fn read(&self, offset: usize, buf: &mut [u8]) {
        self.check(offset, buf.len());
        // SAFETY: source and length were checked to lie inside the mapping, `buf` is this process's own and elsewhere; bytes
        // that another process changes meanwhile arrive old or new, and any byte is a valid u8.
        unsafe {
            self.base
                .as_ptr()
                .add(offset)
                .copy_to_nonoverlapping(buf.as_mut_ptr(), buf.len());
        }
    }

    /// Copies `data` to the bytes from `offset` on.
    ///
    /// # Panics
    /// If they are not all inside.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        // SAFETY: as in `read`; `&mut self` keeps this process's other threads away.
        unsafe {
            self.base
                .as_ptr()
                .add(offset)
                .copy_from_nonoverlapping(data.as_ptr(), data.len());
        }
    }

    /// Fills bytes from `offset` on with what `file` holds at `from`, written by the kernel and not by this
    /// program, as a device would. Returns how many.
    ///
    /// # Panics
    /// If they are not all inside.
    pub fn read_from_file(
        &mut self,
        offset: usize,
        len: usize,
        file: &impl AsRawFd,
        from: i64,
    ) -> io::Result<usize> {
        self.check(offset, len);
        // SAFETY: the kernel writes at most `len` bytes inside the mapping, as checked; `&mut self` keeps other threads away.
        let got = unsafe {
            let to = self.base.as_ptr().add(offset);
            libc::pread(file.as_raw_fd(), to.cast(), len, from)
        };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Gives the whole pages in `offset..offset + len` back to the kernel, as a balloon does: they read as zero.
    ///
    /// # Panics
    /// If they are not all inside.
    pub fn discard(&mut self, offset: usize, len: usize) -> io::Result<()> {
        self.check(offset, len);
        if let Some(memfd) = &self.memfd {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(memfd, punch, offset as u64, len as u64)?;
        }
        // SAFETY: the range lies inside our own mapping, and no reference to its content exists.
        let done = unsafe {
            let from = self.base.as_ptr().add(offset);
            libc::madvise(from.cast(), len, libc::MADV_DONTNEED)
        };
        if done == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "bytes {offset}+{len} are outside of {} bytes of guest memory",
            self.len
        );
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` with this address and length, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
