//! Records in the order in which they were written.

use super::Journal;
use super::record::{self, SEAL};
use crate::error::{Error, Result};

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is, 1 to 255.
    pub kind: u8,
    /// Its id.
    pub id: u64,
    /// Microseconds since 1970; never less than the record's before it.
    pub timestamp_us: u64,
    /// Its bytes.
    pub payload: Vec<u8>,
}

/// See [`Journal::records`]. Ends after the first error.
pub struct RecordIter<'a> {
    journal: &'a Journal,
    /// Place of the next segment among the sealed ones; one more is the current one.
    next: usize,
    bytes: Vec<u8>,
    at: usize,
    done: bool,
}

impl<'a> RecordIter<'a> {
    pub(super) fn new(journal: &'a Journal) -> Self {
        RecordIter { journal, next: 0, bytes: Vec::new(), at: 0, done: false }
    }

    fn advance(&mut self) -> Result<Option<Record>> {
        loop {
            let found = record::next(&self.bytes, self.at).map_err(|fault| {
                let path = match self.journal.sealed.get(self.next - 1) {
                    Some(s) => &s.path,
                    None => &self.journal.current.path,
                };
                Error::format(path.display(), format!("{} at byte {}", fault.reason, fault.offset))
            })?;
            if let Some(r) = found.filter(|r| r.kind != SEAL) {
                self.at = r.end;
                let payload = r.payload.to_vec();
                return Ok(Some(Record { kind: r.kind, id: r.id, timestamp_us: r.timestamp_us, payload }));
            }
            let j = self.journal;
            (self.bytes, self.at) = match j.sealed.get(self.next) {
                Some(s) => (s.read()?, s.head),
                None if self.next == j.sealed.len() => (j.current.bytes().to_vec(), j.current.head),
                None => return Ok(None),
            };
            self.next += 1;
        }
    }
}

impl Iterator for RecordIter<'_> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}
