//! File maps: the one place where the core asks the system for memory it does not own.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory from this size on asks for huge pages: two of those of x86-64.
const HUGE_FROM: usize = 2 << 20;

/// Asks the system to back fresh, large memory with huge pages, so that filling it faults once per 2 MiB
/// instead of once per 4 KiB. Advice only: it changes no byte, and a refusal changes nothing.
pub(crate) fn advise_huge<T>(fresh: &mut [T]) {
    #[cfg(target_os = "linux")]
    advise(fresh, libc::MADV_HUGEPAGE);
    #[cfg(not(target_os = "linux"))]
    let _ = fresh;
}

/// [`advise_huge`], and all pages made present at once, where the system can (Linux 5.14 or newer): for who writes
/// all of them now.
pub(crate) fn prepare<T>(fresh: &mut [T]) {
    advise_huge(fresh);
    #[cfg(target_os = "linux")]
    advise(fresh, libc::MADV_POPULATE_WRITE);
}

#[cfg(target_os = "linux")]
fn advise<T>(fresh: &mut [T], advice: libc::c_int) {
    if size_of_val(fresh) >= HUGE_FROM {
        // Whole pages from the one that holds the first byte: the allocator's own header may share it.
        let start = fresh.as_mut_ptr().map_addr(|a| a & !0xfff);
        let len = fresh.as_ptr_range().end.addr() - start.addr();
        // SAFETY: neither advice that is given here changes a byte, whatever lies in the range.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::madvise(start.cast(), len, advice) };
    }
}

/// An empty vector with room for `bytes`, or `None` when the system does not give that much.
pub(crate) fn reserve(bytes: usize) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    out.try_reserve_exact(bytes).ok()?;
    advise_huge(out.spare_capacity_mut());
    Some(out)
}

/// Fills `out` from byte `at` of a file on, wherever the file's own position is.
pub(crate) fn read_at(file: &File, out: &mut [u8], at: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, out, at);
    #[cfg(not(unix))]
    {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = file;
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(out)
    }
}

/// Asks the system to begin writing a part of a file to the disk, so that a later sync finds little to do.
/// Advice only: it waits for nothing, and a refusal changes nothing.
pub(crate) fn begin_writing(file: &File, from: u64, len: u64) {
    #[cfg(target_os = "linux")]
    if let (Ok(from), Ok(len)) = (from.try_into(), len.try_into()) {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is open, and the call touches no memory of ours.
        #[allow(unsafe_code)]
        let _ = unsafe { libc::sync_file_range(file.as_raw_fd(), from, len, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, from, len);
}

/// A whole file, mapped read-only.
///
/// The pages stay the file's: who truncates it in place while it is mapped makes later reads fault
/// (SIGBUS), who overwrites it in place changes what is read. Files replaced by rename are safe, and
/// that is the only way this crate writes.
#[derive(Debug)]
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps `file`, all of it, read-only.
    #[allow(unsafe_code)]
    pub fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the map is private to this type and only ever read as bytes, for which every bit
        // pattern is valid; the caller opts in to the contract above (`mmap = true`).
        unsafe { memmap2::Mmap::map(file) }.map(Mapping)
    }

    /// Makes the pages of `range` present at once, where the system can (Linux 5.14 or newer): for who reads all.
    pub fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        let _ = self.0.advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
        let _ = range;
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// A whole file, mapped for writing: what is stored here is the file's at once, and outlives the process.
///
/// For files that one process owns (the journal's segments, under the lock of their directory). A file that
/// is cut off in place while it is mapped makes later accesses fault (SIGBUS).
#[derive(Debug)]
pub struct MappingMut(memmap2::MmapMut);

impl MappingMut {
    /// Maps `file`, all of it; it must be open for reading and writing, and not be empty.
    #[allow(unsafe_code)]
    pub fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the map is private to this type, its bytes are plain, and the lock of the directory keeps
        // other processes from writing to the file.
        unsafe { memmap2::MmapMut::map_mut(file) }.map(MappingMut)
    }

    /// Stores `word`, little-endian, at byte `at`, in one piece and after everything that was stored before.
    ///
    /// # Panics
    /// `at` is not a multiple of 8, or the word does not fit.
    #[allow(unsafe_code)]
    pub fn commit(&mut self, at: usize, word: u64) {
        let cell: &mut [u8; 8] = (&mut self.0[at..at + 8]).try_into().expect("eight bytes");
        let cell = cell.as_mut_ptr().cast::<u64>();
        assert!(cell.is_aligned(), "{at} is not a multiple of 8");
        // SAFETY: the pointer is aligned, its 8 bytes lie in the map, and `&mut self` makes this the only access.
        unsafe { AtomicU64::from_ptr(cell) }.store(word.to_le(), Ordering::Release);
    }

    /// Writes the bytes of `range` to the disk and waits for it.
    pub fn flush(&self, range: Range<usize>) -> io::Result<()> {
        self.0.flush_range(range.start, range.len())
    }

    /// Makes the pages of `range` present and writable, where the system can (Linux 5.14 or newer).
    pub fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        let _ = self.0.advise_range(memmap2::Advice::PopulateWrite, range.start, range.len());
        let _ = range;
    }
}

impl Deref for MappingMut {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for MappingMut {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

/// Tells the process that made it from forked children: a page that a child sees as zeros (Linux 4.14 or newer).
/// Elsewhere the number of the process is asked for, which is a system call.
#[derive(Debug)]
pub struct ForkMark {
    page: Option<memmap2::MmapMut>,
    process: u32,
}

impl ForkMark {
    /// Marks this process.
    pub fn new() -> Self {
        ForkMark { page: Self::wiped_in_children(), process: std::process::id() }
    }

    #[cfg(target_os = "linux")]
    #[allow(unsafe_code)]
    fn wiped_in_children() -> Option<memmap2::MmapMut> {
        let mut page = memmap2::MmapMut::map_anon(1).ok()?;
        // SAFETY: the page is ours, private and anonymous, which is what the advice asks for; a child reads zeros.
        if unsafe { libc::madvise(page.as_mut_ptr().cast(), 1, libc::MADV_WIPEONFORK) } != 0 {
            return None;
        }
        page[0] = 1;
        Some(page)
    }

    #[cfg(not(target_os = "linux"))]
    fn wiped_in_children() -> Option<memmap2::MmapMut> {
        None
    }

    /// Whether this is the process that made the mark.
    #[inline]
    pub fn is_here(&self) -> bool {
        match &self.page {
            Some(page) => page[0] == 1,
            None => std::process::id() == self.process,
        }
    }
}

impl Default for ForkMark {
    fn default() -> Self {
        Self::new()
    }
}
