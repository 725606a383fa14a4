//! How a journal is kept, and what opening it tells.

use std::time::Duration;

use super::Header;
use crate::error::{Error, Result};

pub(super) const MIN_SEGMENT: usize = 4096;
const MAX_SEGMENT: usize = 1 << 30;

/// When records are written through to the disk. Against `kill -9` none is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fsync {
    /// Never by itself; the system writes back within half a minute or so.
    Never,
    /// Before every `append` returns.
    Always,
    /// With every n-th record.
    Events(u32),
    /// With the first record, or call of `prepare`, after this time.
    Interval(Duration),
}

/// Which segments stay that are older than the last checkpoint; they serve audits, replay needs none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retain {
    /// Every one.
    All,
    /// The newest, of at most so many bytes together.
    Bytes(u64),
}

/// How a journal is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// When to sync.
    pub fsync: Fsync,
    /// Length of a segment's file; a record that is longer gets a segment of its own.
    pub segment_bytes: usize,
    /// What a checkpoint deletes.
    pub retain: Retain,
}

impl Default for Options {
    fn default() -> Self {
        Options { fsync: Fsync::Never, segment_bytes: 16 << 20, retain: Retain::All }
    }
}

impl Options {
    pub(super) fn check(&self) -> Result<()> {
        if !(MIN_SEGMENT..=MAX_SEGMENT).contains(&self.segment_bytes) {
            let want = format!("{MIN_SEGMENT} to {MAX_SEGMENT} bytes");
            return Err(Error::config("segment_bytes", self.segment_bytes, want));
        }
        match self.fsync {
            Fsync::Events(0) => Err(Error::config("fsync", "0 events", "at least 1")),
            Fsync::Interval(Duration::ZERO) => Err(Error::config("fsync", "0 s", "more than 0 s")),
            _ => Ok(()),
        }
    }
}

/// What opening found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Whether there was no journal, and one was made.
    pub created: bool,
    /// Good records, in all segments that are kept.
    pub records: u64,
    /// Largest id so far, those of compacted records among them; 0 where there is none.
    pub last_id: u64,
    /// Id up to which the saved state has everything, as the last checkpoint said.
    pub checkpoint: u64,
    /// What was wrong: file, byte, reason, how many bytes were set aside and where.
    pub warning: Option<String>,
    /// Bytes that were set aside.
    pub set_aside: u64,
    /// The newest header as found; the given one where the journal was made.
    pub header: Header,
    /// Every build and ISA that wrote records which replay needs, oldest first.
    pub headers: Vec<Header>,
}
