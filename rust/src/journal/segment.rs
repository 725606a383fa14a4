//! One segment: a file of a fixed length, mapped, that records are appended to.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use super::record::{self, Fault, HEAD, Head, MAGIC, SEAL};
use crate::error::{Error, Result};
use crate::mapping::MappingMut;

/// Room that is always left for the seal.
pub(super) const RESERVE: usize = HEAD;
const ZEROS: usize = 1 << 18;
const PREFIX: &str = "journal-";
const SUFFIX: &str = ".seg";
pub(super) const NEW: &str = ".seg.new";

/// Name of a segment's file.
pub(super) fn path(dir: &Path, segment: u64) -> PathBuf {
    dir.join(format!("{PREFIX}{segment:08}{SUFFIX}"))
}

/// Number of the segment that a file name stands for.
pub(super) fn number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
    digits.parse().ok().filter(|n| path(Path::new(""), *n).as_os_str() == name)
}

/// A file of zeros on its way to become a segment: its blocks are taken and its pages are there. Dropped: deleted.
#[derive(Debug)]
pub struct Spare {
    temp: NamedTempFile,
    map: MappingMut,
}

impl Spare {
    /// Makes one of `capacity` bytes in `dir`. Writing the zeros is what finds a full disk here, and not
    /// as a fault (SIGBUS) when a record is stored.
    pub(super) fn make(dir: &Path, capacity: usize, durable: bool) -> Result<Self> {
        let at = |e| Error::io(dir.join(format!("{PREFIX}*{NEW}")), e);
        let mut builder = Builder::new();
        builder.prefix(PREFIX).suffix(NEW);
        #[cfg(unix)]
        builder.permissions({
            use std::os::unix::fs::PermissionsExt;
            std::fs::Permissions::from_mode(0o666) // less the umask, as any new file
        });
        let temp = builder.tempfile_in(dir).map_err(at)?;
        let zeros = vec![0; ZEROS.min(capacity)];
        let mut left = capacity;
        while left > 0 {
            let n = left.min(zeros.len());
            temp.as_file().write_all(&zeros[..n]).map_err(at)?;
            left -= n;
        }
        if durable {
            // Blocks and length are on disk from now on, so that later syncs write data alone.
            temp.as_file().sync_all().map_err(at)?;
        }
        let map = MappingMut::open(temp.as_file()).map_err(at)?;
        map.populate(0..capacity);
        Ok(Spare { temp, map })
    }

    pub(super) fn capacity(&self) -> usize {
        self.map.len()
    }

    /// Gives the file its name.
    pub(super) fn place(self, dir: &Path, segment: u64) -> Result<Placed> {
        let path = path(dir, segment);
        let file = self.temp.persist_noclobber(&path).map_err(|e| Error::io(&path, e.error))?;
        Ok(Placed { segment, path, file, map: self.map })
    }
}

/// A file of zeros under its own name.
#[derive(Debug)]
pub(super) struct Placed {
    pub segment: u64,
    path: PathBuf,
    file: File,
    map: MappingMut,
}

impl Placed {
    pub fn capacity(&self) -> usize {
        self.map.len()
    }

    /// Deletes a file that is not wanted any more.
    pub fn discard(self) {
        let _ = std::fs::remove_file(&self.path);
    }

    /// Writes the head: from now on it is a segment.
    pub fn begin(mut self, head: &Head) -> Segment {
        let bytes = head.encode();
        self.map[8..bytes.len()].copy_from_slice(&bytes[8..]);
        self.map.commit(0, MAGIC);
        Segment {
            number: self.segment,
            path: self.path,
            _file: self.file,
            map: self.map,
            head: bytes.len(),
            used: bytes.len(),
            synced: 0,
            records: 0,
            max_id: 0,
        }
    }
}

/// The segment that is being written.
#[derive(Debug)]
pub(super) struct Segment {
    pub number: u64,
    pub path: PathBuf,
    // Kept open so that the system can tell of errors of its own writing back.
    _file: File,
    map: MappingMut,
    pub head: usize,
    pub used: usize,
    synced: usize,
    pub records: u64,
    pub max_id: u64,
}

impl Segment {
    /// Goes on in a segment that recovery found sound; `used` is where its records end.
    pub fn resume(path: &Path, number: u64, head: usize, scan: &record::Scan) -> Result<Self> {
        let at = |e| Error::io(path, e);
        let file = File::options().read(true).write(true).open(path).map_err(at)?;
        let map = MappingMut::open(&file).map_err(at)?;
        let (used, records, max_id) = (scan.end, scan.records, scan.max_id);
        let s = Segment {
            number,
            path: path.to_owned(),
            _file: file,
            map,
            head,
            used,
            synced: 0,
            records,
            max_id,
        };
        s.populate(usize::MAX);
        Ok(s)
    }

    /// Whether a record of `size` bytes fits, and the seal after it.
    pub fn fits(&self, size: usize) -> bool {
        self.used + size + RESERVE <= self.map.len()
    }

    pub fn capacity(&self) -> usize {
        self.map.len()
    }

    /// Bytes that are good.
    pub fn bytes(&self) -> &[u8] {
        &self.map[..self.used]
    }

    /// Appends a record for which there is room.
    pub fn append(&mut self, kind: u8, id: u64, timestamp_us: u64, parts: &[&[u8]], len: usize) {
        let at = self.used;
        let head = record::head(len, kind, id, timestamp_us);
        let place = &mut self.map[at..at + HEAD + len];
        let mut to = HEAD;
        for part in parts {
            place[to..to + part.len()].copy_from_slice(part);
            to += part.len();
        }
        place[8..28].copy_from_slice(&head[8..]);
        let crc = record::checksum(&head, &place[HEAD..]);
        place[28..32].copy_from_slice(&crc.to_le_bytes());
        self.map.commit(at, record::word(len));
        self.used = at + record::size(len);
        if kind != SEAL {
            self.records += 1;
            self.max_id = self.max_id.max(id);
        }
    }

    /// Takes the last record back; the counts before it come from the caller.
    pub fn retract(&mut self, used: usize, records: u64, max_id: u64) {
        self.map.commit(used, 0);
        let end = self.used;
        self.map[used..end].fill(0);
        (self.used, self.records, self.max_id) = (used, records, max_id);
        self.synced = self.synced.min(used);
    }

    /// Ends it: the seal tells a segment that others follow from one that lost its end.
    pub fn seal(&mut self, timestamp_us: u64) -> Sealed {
        self.append(SEAL, self.max_id, timestamp_us, &[], 0);
        let (number, path) = (self.number, self.path.clone());
        Sealed { number, path, head: self.head, used: self.used, records: self.records, max_id: self.max_id }
    }

    /// Writes what is not on disk yet.
    pub fn sync(&mut self) -> io::Result<()> {
        if self.synced < self.used {
            self.map.flush(self.synced..self.used)?;
            self.synced = self.used;
        }
        Ok(())
    }

    /// Makes the next `ahead` bytes present and writable: pages that the system wrote back in the meantime
    /// cost microseconds when they are written again.
    pub fn populate(&self, ahead: usize) {
        let page = self.used & !4095;
        self.map.populate(page..self.map.len().min(page.saturating_add(ahead)));
    }
}

/// A segment that is complete.
#[derive(Clone, Debug)]
pub(super) struct Sealed {
    pub number: u64,
    pub path: PathBuf,
    pub head: usize,
    /// Where its records end, the seal among them.
    pub used: usize,
    pub records: u64,
    pub max_id: u64,
}

impl Sealed {
    /// Its bytes, up to the end of its records.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = std::fs::read(&self.path).map_err(|e| Error::io(&self.path, e))?;
        if bytes.len() < self.used {
            return Err(self.damaged(&Fault { offset: bytes.len(), reason: "cut off".into() }));
        }
        bytes.truncate(self.used);
        Ok(bytes)
    }

    pub fn damaged(&self, fault: &Fault) -> Error {
        Error::format(self.path.display(), format!("{} at byte {}", fault.reason, fault.offset))
    }
}
