//! A write-ahead journal: checksummed records in mapped segments.
//!
//! A record is stored by copying it into a mapped file, its checksum beside it, and its length last: the page
//! cache has it when [`Journal::append`] returns, so a process that is killed loses at most the record that it
//! was writing. What a power loss may take is what came after the last sync, as [`Fsync`] says; what the disk
//! returns afterwards is believed only as far as lengths, checksums and seals agree (see [`Recovered`]).
//!
//! Bytes per event: 32 of record, 48 of event, then the numbers as they are. An event with an input and a target
//! of 768 numbers takes 6,224 bytes; 16 MiB hold 2,695 of them.
//!
//! Files in the directory: `journal-00000001.seg` and so on, of a fixed length until they are complete;
//! `*.damaged`, set aside by recovery, never read again and never deleted here (they keep what was forgotten
//! since: delete them by hand); `microlora.lock`.
//!
//! After a fork the parent goes on; a child's journal refuses everything and touches no file when it is dropped.

mod compact;
pub mod event;
mod iter;
mod lock;
mod options;
mod record;
mod recover;
mod segment;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

pub use iter::{Record, RecordIter};
pub use lock::DirLock;
pub use options::{Fsync, Options, Recovered, Retain};
pub use record::{FORMAT, Header};
use record::{Head, SEAL};
pub use segment::Spare;
use segment::{Placed, RESERVE, Sealed, Segment};

use crate::error::{Error, Result};
use crate::format::atomic::sync_dir;
use crate::mapping::ForkMark;

/// Pages that [`Journal::prepare`] keeps writable before the end of the records.
const AHEAD: usize = 512 << 10;

/// The journal of a state directory. One writer; wrap it in a mutex to share it.
#[derive(Debug)]
pub struct Journal {
    lock: Arc<DirLock>,
    owner: ForkMark,
    options: Options,
    header: Header,
    checkpoint: u64,
    /// First segment that replay needs.
    needed: u64,
    sealed: Vec<Sealed>,
    current: Segment,
    spare: Option<Placed>,
    /// Written and sealed; taking its map down costs a millisecond, which `append` leaves to others.
    retired: Option<Segment>,
    last_id: u64,
    last_us: u64,
    clamped: u64,
    synced_through: u64,
    unsynced_from: u64,
    unsynced_names: bool,
    since_sync: u32,
    last_sync: Instant,
    failed: Option<String>,
}

/// A segment that is wanted: [`NextSegment::make`] takes milliseconds and needs no journal.
#[derive(Debug)]
pub struct NextSegment {
    retired: Option<Segment>,
    dir: PathBuf,
    capacity: usize,
    durable: bool,
}

impl NextSegment {
    /// Folder of the journal that wants it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Makes the file; give it to [`Journal::adopt`].
    ///
    /// # Errors
    /// What the system says, a full disk for one; nothing is left then.
    pub fn make(self) -> Result<Spare> {
        drop(self.retired);
        Spare::make(&self.dir, self.capacity, self.durable)
    }
}

impl Journal {
    /// Opens or makes the journal of a locked directory and recovers it to its last good record.
    ///
    /// `header` says who will write; its `state` counts for a journal that is made, else the last checkpoint's
    /// stays. Records of another build or ISA are left alone: new ones go into a segment of their own.
    ///
    /// # Errors
    /// [`Error::Format`] of a newer format, with nothing touched; options or header out of range; what the
    /// system says.
    pub fn open(lock: &Arc<DirLock>, options: Options, header: &Header) -> Result<(Journal, Recovered)> {
        options.check()?;
        header.check()?;
        let dir = lock.dir();
        let found = recover::recover(dir)?;
        let mut header = header.clone();
        if let Some(newest) = found.headers.newest.as_ref() {
            header.state = newest.state;
        }
        let recovered = Recovered {
            created: found.headers.newest.is_none() && found.notes.is_empty(),
            records: found.records,
            last_id: found.last_id,
            checkpoint: found.checkpoint,
            warning: (!found.notes.is_empty()).then(|| found.notes.join("; ")),
            set_aside: found.set_aside,
            header: found.headers.newest.clone().unwrap_or_else(|| header.clone()),
            headers: found.headers.needed,
        };
        let durable = options.fsync != Fsync::Never;
        let mut sealed = found.sealed;
        let mut next = found.next;
        let mut open = None;
        if let Some(last) = found.open {
            let ours = (&last.header.build, &last.header.isa) == (&header.build, &header.isa);
            next = last.number + 1;
            open = Some((ours, Segment::resume(&last.path, last.number, last.head, &last.scan)?));
        }
        let needed = found.needed.unwrap_or(next);
        let (fresh, current) = match open {
            Some((true, segment)) if segment.fits(record::size(0)) => (false, segment),
            other => {
                let spare = Spare::make(dir, options.segment_bytes, durable)?;
                if let Some((_, mut last)) = other {
                    if !last.fits(0) {
                        return Err(Error::format(
                            last.path.display(),
                            "no room for the seal of the segment",
                        ));
                    }
                    sealed.push(last.seal(found.last_us));
                }
                let capacity = spare.capacity() as u64;
                let head = Head {
                    header: header.clone(),
                    segment: next,
                    capacity,
                    needed,
                    checkpoint: found.checkpoint,
                };
                (true, spare.place(dir, next)?.begin(&head))
            }
        };
        let mut journal = Journal {
            lock: Arc::clone(lock),
            owner: ForkMark::new(),
            options,
            header,
            checkpoint: found.checkpoint,
            needed,
            unsynced_from: sealed.first().map_or(current.number, |s| s.number),
            sealed,
            current,
            spare: None,
            retired: None,
            last_id: found.last_id,
            last_us: found.last_us,
            clamped: 0,
            synced_through: 0,
            unsynced_names: fresh || durable,
            since_sync: 0,
            last_sync: Instant::now(),
            failed: None,
        };
        if durable {
            journal.sync()?;
        }
        Ok((journal, recovered))
    }

    /// Appends one record of `parts`, one after the other, with the time of now.
    ///
    /// # Errors
    /// Kind 0, which is the journal's own; more than 4 GiB; a full disk, a failed sync: nothing was appended then.
    pub fn append(&mut self, kind: u8, id: u64, parts: &[&[u8]]) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        self.append_at(now.map_or(0, |d| d.as_micros() as u64), kind, id, parts)
    }

    /// [`Journal::append`] with the caller's clock, in microseconds since 1970. A time before the last record's
    /// is raised to it and counted.
    ///
    /// # Errors
    /// Those of [`Journal::append`].
    pub fn append_at(&mut self, now_us: u64, kind: u8, id: u64, parts: &[&[u8]]) -> Result<()> {
        self.usable()?;
        if kind == SEAL {
            return Err(Error::config("kind", kind, "1 to 255"));
        }
        let len: usize = parts.iter().map(|p| p.len()).sum();
        if len > u32::MAX as usize {
            return Err(Error::config("parts", format!("{len} bytes"), format!("at most {}", u32::MAX)));
        }
        let size = record::size(len);
        if !self.current.fits(size) {
            self.roll(size)?;
        }
        let before = (self.current.used, self.current.records, self.current.max_id);
        let (last_id, last_us) = (self.last_id, self.last_us);
        self.clamped += u64::from(now_us < last_us);
        self.last_us = now_us.max(last_us);
        self.last_id = last_id.max(id);
        self.current.append(kind, id, self.last_us, parts, len);
        if self.due(1)
            && let Err(e) = self.sync()
        {
            self.current.retract(before.0, before.1, before.2);
            self.last_id = last_id;
            return Err(e);
        }
        Ok(())
    }

    fn due(&mut self, events: u32) -> bool {
        match self.options.fsync {
            Fsync::Never => false,
            Fsync::Always => true,
            Fsync::Events(n) => {
                self.since_sync += events;
                self.since_sync >= n
            }
            Fsync::Interval(d) => self.last_sync.elapsed() >= d,
        }
    }

    /// Writes everything through to the disk.
    ///
    /// # Errors
    /// What the system says. It may have dropped what it could not write, so nothing is accepted afterwards:
    /// open the journal again.
    pub fn sync(&mut self) -> Result<()> {
        self.usable()?;
        let result = self.write_through();
        self.noted(result)?;
        self.unsynced_from = self.current.number;
        self.unsynced_names = false;
        self.synced_through = self.last_id;
        self.since_sync = 0;
        self.last_sync = Instant::now();
        Ok(())
    }

    // Older segments first: what is on disk must not have a hole.
    fn write_through(&mut self) -> Result<()> {
        for s in self.sealed.iter().filter(|s| s.number >= self.unsynced_from) {
            let file = std::fs::File::options().write(true).open(&s.path);
            file.and_then(|f| f.sync_data()).map_err(|e| Error::io(&s.path, e))?;
        }
        if self.unsynced_names {
            sync_dir(self.lock.dir());
        }
        self.current.sync().map_err(|e| Error::io(&self.current.path, e))
    }

    /// Largest id for which it and everything before it was written through by this journal; 0: none.
    pub fn synced_through(&self) -> u64 {
        self.synced_through
    }

    /// Says that the saved state has everything up to `id` and is called `state`: replay starts after `id`, a new
    /// segment begins, and older ones are kept or deleted as [`Retain`] says.
    ///
    /// # Errors
    /// A full disk, with nothing changed; what the system says of deleting.
    pub fn checkpoint(&mut self, id: u64, state: [u8; 32]) -> Result<()> {
        self.usable()?;
        let next = self.current.number + 1;
        let behind = |s: &&Sealed| s.max_id > id && s.number >= self.needed;
        let current = (self.current.max_id > id).then_some(self.current.number);
        let needed = self.sealed.iter().find(behind).map(|s| s.number).or(current).unwrap_or(next);
        let (old_state, old_checkpoint, old_needed) = (self.header.state, self.checkpoint, self.needed);
        (self.header.state, self.checkpoint, self.needed) = (state, id.max(old_checkpoint), needed);
        if let Err(e) = self.roll(0) {
            (self.header.state, self.checkpoint, self.needed) = (old_state, old_checkpoint, old_needed);
            return Err(e);
        }
        self.retired = None;
        if let Some(s) = self.sealed.last() {
            // The rest is zeros; without it frequent checkpoints cost no room.
            let file = std::fs::File::options().write(true).open(&s.path);
            let _ = file.and_then(|f| f.set_len(s.used as u64));
        }
        self.retain()
    }

    fn retain(&mut self) -> Result<()> {
        let Retain::Bytes(limit) = self.options.retain else { return Ok(()) };
        let mut room = limit;
        let old = self.sealed.iter().filter(|s| s.number < self.needed).rev();
        let kept =
            old.take_while(|s| room.checked_sub(s.used as u64).map(|left| room = left).is_some()).count();
        let old = self.sealed.iter().filter(|s| s.number < self.needed).count();
        if old == kept {
            return Ok(());
        }
        // The head that no longer needs them must be on disk before they go.
        let done = self.current.sync().map_err(|e| Error::io(&self.current.path, e));
        self.noted(done)?;
        sync_dir(self.lock.dir());
        for _ in kept..old {
            recover::point();
            std::fs::remove_file(&self.sealed[0].path).map_err(|e| Error::io(&self.sealed[0].path, e))?;
            self.sealed.remove(0);
        }
        Ok(())
    }

    /// Rewrites the complete segments without the records for which `keep` says no, and returns how many went.
    /// A process killed at any point leaves either all of them or none of them.
    ///
    /// # Errors
    /// A full disk, with nothing changed; what the system says.
    pub fn compact(&mut self, keep: &mut dyn FnMut(u8, u64) -> bool) -> Result<u64> {
        self.usable()?;
        if self.current.records > 0 {
            self.roll(0)?;
        }
        // What is rewritten is synced; what is left must not be older than it on disk.
        self.sync()?;
        let staged = compact::stage(self.lock.dir(), &self.sealed, keep)?;
        let removed = staged.iter().map(|(old, new)| self.sealed[*old].records - new.records).sum();
        if !staged.is_empty() {
            let done = compact::commit(self.lock.dir());
            self.noted(done)?;
        }
        for (old, new) in staged {
            self.sealed[old] = new;
        }
        Ok(removed)
    }

    /// All good records, oldest first. Reads one segment at a time into memory.
    ///
    /// # Errors
    /// A forked child's.
    pub fn records(&self) -> Result<RecordIter<'_>> {
        self.usable()?;
        Ok(RecordIter::new(self))
    }

    /// Bytes of heads and records in all segments, without the zeros behind them.
    pub fn bytes(&self) -> u64 {
        self.sealed.iter().map(|s| s.used as u64).sum::<u64>() + self.current.used as u64
    }

    /// Good records in all segments.
    pub fn count(&self) -> u64 {
        self.sealed.iter().map(|s| s.records).sum::<u64>() + self.current.records
    }

    /// Largest id so far.
    pub fn last_id(&self) -> u64 {
        self.last_id
    }

    /// Id and identity of the last checkpoint.
    pub fn last_checkpoint(&self) -> (u64, [u8; 32]) {
        (self.checkpoint, self.header.state)
    }

    /// Times that were raised to the last record's, since the journal was opened.
    pub fn clamped(&self) -> u64 {
        self.clamped
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        self.lock.dir()
    }

    /// The segment that will be needed soon, if it is not there yet.
    pub fn wanted(&mut self) -> Option<NextSegment> {
        let soon = self.current.used >= self.current.capacity() / 4;
        let capacity = self.options.segment_bytes;
        let durable = self.options.fsync != Fsync::Never;
        (soon && self.spare.is_none() && self.usable().is_ok()).then(|| NextSegment {
            retired: self.retired.take(),
            dir: self.lock.dir().to_owned(),
            capacity,
            durable,
        })
    }

    /// Takes a segment for later.
    ///
    /// # Errors
    /// What the system says of the renaming.
    pub fn adopt(&mut self, spare: Spare) -> Result<()> {
        self.usable()?;
        if self.spare.is_none() && spare.capacity() >= self.options.segment_bytes {
            self.spare = Some(spare.place(self.lock.dir(), self.current.number + 1)?);
            self.unsynced_names = true;
        }
        Ok(())
    }

    /// Does what `append` should not have to: makes the next segment, keeps pages writable, syncs when an
    /// interval is over. Call it from time to time; [`Journal::wanted`] and [`Journal::adopt`] do the long part
    /// without the journal.
    ///
    /// # Errors
    /// Those of a full disk and of [`Journal::sync`].
    pub fn prepare(&mut self) -> Result<()> {
        self.usable()?;
        if let Some(next) = self.wanted() {
            self.adopt(next.make()?)?;
        }
        self.current.populate(AHEAD);
        if matches!(self.options.fsync, Fsync::Interval(_)) && self.due(0) { self.sync() } else { Ok(()) }
    }

    /// Ends the segment and begins the next one, with room for a record of `size` bytes.
    #[cold]
    fn roll(&mut self, size: usize) -> Result<()> {
        let number = self.current.number + 1;
        let head = |header: &Header, capacity| Head {
            header: header.clone(),
            segment: number,
            capacity,
            needed: self.needed,
            checkpoint: self.checkpoint,
        };
        let want = (head(&self.header, 0).encode().len() + size + RESERVE).max(self.options.segment_bytes);
        if let Some(small) = self.spare.take_if(|s| s.capacity() < want) {
            small.discard();
        }
        let placed = match self.spare.take() {
            Some(placed) => placed,
            None => {
                let durable = self.options.fsync != Fsync::Never;
                let dir = self.lock.dir();
                self.unsynced_names = true;
                Spare::make(dir, want.next_multiple_of(8), durable)?.place(dir, number)?
            }
        };
        let capacity = placed.capacity() as u64;
        recover::point();
        let sealed = self.current.seal(self.last_us);
        self.sealed.push(sealed);
        recover::point();
        let begun = placed.begin(&head(&self.header, capacity));
        self.retired = Some(std::mem::replace(&mut self.current, begun));
        recover::point();
        Ok(())
    }

    fn usable(&self) -> Result<()> {
        if !self.owner.is_here() {
            let want = "one that this process opened: a forked child inherits its parent's";
            return Err(Error::config("journal", "a journal of another process", want));
        }
        match &self.failed {
            None => Ok(()),
            Some(why) => {
                Err(Error::config("journal", format!("one that failed ({why})"), "one opened again"))
            }
        }
    }

    fn noted<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            self.failed = Some(e.to_string());
        }
        result
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if self.owner.is_here() {
            if self.options.fsync != Fsync::Never && self.failed.is_none() {
                let _ = self.sync();
            }
            if let Some(spare) = self.spare.take() {
                spare.discard();
            }
        }
    }
}
