//! Read-only file maps: the one place where the core asks the system for memory it does not own.

use std::fs::File;
use std::io;
use std::ops::Deref;

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
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
