//! From whatever files there are to the longest prefix of records that can be trusted.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::compact;
use super::record::{self, BadHead, FORMAT, Fault, Head, Header, SEAL, Scan};
use super::segment::{self, NEW, Sealed};
use crate::error::{Error, Result};
use crate::format::atomic::{self, sync_dir};

/// No head of any format is longer.
const MAX_HEAD: u64 = 1 << 16;

/// Headers that were found.
#[derive(Default)]
pub(super) struct Headers {
    pub newest: Option<Header>,
    pub needed: Vec<Header>,
}

/// The last segment, if it can be gone on with.
pub(super) struct Open {
    pub path: PathBuf,
    pub number: u64,
    pub head: usize,
    pub header: Header,
    pub scan: Scan,
}

/// What there is.
#[derive(Default)]
pub(super) struct Found {
    pub sealed: Vec<Sealed>,
    pub open: Option<Open>,
    /// Number of the next new segment.
    pub next: u64,
    pub needed: Option<u64>,
    pub checkpoint: u64,
    pub headers: Headers,
    pub records: u64,
    pub last_id: u64,
    pub last_us: u64,
    pub notes: Vec<String>,
    pub set_aside: u64,
}

/// Where a test looks at the directory as a killed process would leave it.
#[inline]
pub(super) fn point() {
    #[cfg(test)]
    super::tests::at_point();
}

/// Segments by number.
fn segments(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        if let Some(number) = entry.file_name().to_str().and_then(segment::number) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn first_bytes(path: &Path) -> Result<Vec<u8>> {
    let at = |e| Error::io(path, e);
    let mut bytes = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_HEAD).read_to_end(&mut bytes)).map_err(at)?;
    Ok(bytes)
}

/// Deletes the files whose names end in `suffix`: what a process that was killed did not finish.
pub(super) fn sweep(dir: &Path, suffix: &str) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let ours =
            entry.file_name().to_str().is_some_and(|n| n.starts_with("journal-") && n.ends_with(suffix));
        if ours {
            fs::remove_file(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
        }
    }
    Ok(())
}

pub(super) fn recover(dir: &Path) -> Result<Found> {
    let mut heads = Vec::new();
    for (_, path) in segments(dir)?.into_iter().chain(compact::files(dir)?) {
        match Head::decode(&first_bytes(&path)?) {
            Ok((head, _)) => heads.push(head),
            Err(BadHead::Newer(format)) => return Err(newer(&path, format)),
            Err(_) => {}
        }
    }
    compact::check(dir)?;
    // Nothing was touched up to here.
    sweep(dir, NEW)?;
    compact::finish(dir)?;
    let mut r = Recovery { dir, found: Found { next: 1, ..Found::default() }, hole: false };
    let needed = heads.iter().map(|h| h.needed).max();
    r.found.needed = needed;
    r.found.checkpoint = heads.iter().map(|h| h.checkpoint).max().unwrap_or(0);
    r.walk(segments(dir)?, needed.unwrap_or(0))?;
    Ok(r.found)
}

pub(super) fn newer(path: &Path, format: u32) -> Error {
    let reason =
        format!("format {format} of the journal is newer than {FORMAT}, the last one that this build reads");
    Error::format(path.display(), reason)
}

struct Recovery<'a> {
    dir: &'a Path,
    found: Found,
    /// Whether what follows cannot be replayed.
    hole: bool,
}

impl Recovery<'_> {
    fn walk(&mut self, mut files: Vec<(u64, PathBuf)>, needed: u64) -> Result<()> {
        // A segment that was made in advance and not used yet.
        while let Some((number, path)) = files.last() {
            if !is_blank(path)? {
                break;
            }
            self.found.next = *number;
            fs::remove_file(path).map_err(|e| Error::io(path, e))?;
            files.pop();
        }
        let mut expect = None;
        for at in 0..files.len() {
            let (number, path) = &files[at];
            let (number, rest) = (*number, &files[at + 1..]);
            let missing = match expect {
                Some(e) if number != e => Some(e),
                None if number > needed && needed > 0 => Some(needed),
                _ => None,
            };
            if let Some(first) = missing {
                self.found.notes.push(format!("{}: missing", segment::path(self.dir, first).display()));
                if number > needed {
                    self.found.next = first;
                    return self.set_aside_all(&files[at..]);
                }
            }
            expect = Some(number + 1);
            self.found.next = number + 1;
            let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
            let whole = match Head::decode(&bytes) {
                Ok((head, len)) if head.segment == number => {
                    self.take((number, path), &bytes, (head, len), rest, needed)?;
                    if self.hole {
                        return Ok(());
                    }
                    continue;
                }
                Ok((head, _)) => format!("its head is that of segment {}", head.segment),
                Err(BadHead::Damaged(f)) => format!("{} at byte {}", f.reason, f.offset),
                Err(BadHead::Unused | BadHead::Newer(_)) => "no head".into(),
            };
            self.found.notes.push(format!("{}: {whole}", path.display()));
            if number >= needed {
                self.found.next = number;
                return self.set_aside_all(&files[at..]);
            }
            self.set_aside_all(&files[at..=at])?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        (number, path): (u64, &Path),
        bytes: &[u8],
        (head, len): (Head, usize),
        rest: &[(u64, PathBuf)],
        needed: u64,
    ) -> Result<()> {
        let mut scan = record::scan(bytes, len);
        let f = &mut self.found;
        f.records += scan.records;
        f.last_id = f.last_id.max(scan.max_id);
        f.last_us = f.last_us.max(scan.last_us);
        if number >= needed && scan.records > 0 {
            let new = |h: &Header| (&h.build, &h.isa) != (&head.header.build, &head.header.isa);
            if f.headers.needed.iter().all(new) {
                f.headers.needed.push(head.header.clone());
            }
        }
        f.headers.newest = Some(head.header.clone());
        let fault = scan.fault.take().or_else(|| {
            let reason = if scan.sealed {
                return None;
            } else if !rest.is_empty() {
                "its end is missing, and segments follow".into()
            } else if (bytes.len() as u64) < head.capacity {
                format!("cut off: {} of {} bytes", bytes.len(), head.capacity)
            } else {
                return None;
            };
            Some(Fault { offset: scan.end, reason })
        });
        if let Some(fault) = fault {
            let note = format!("{}: {} at byte {}", path.display(), fault.reason, fault.offset);
            self.found.notes.push(note);
            if number >= needed {
                self.hole = true;
                // Those that follow go first: whoever stops half-way finds the damage again.
                self.set_aside_all(rest)?;
            }
            self.repair(path, bytes, &scan)?;
            scan.sealed = true;
            scan.end += record::size(0);
        }
        let (records, max_id) = (scan.records, scan.max_id);
        if scan.sealed {
            let used = scan.end;
            self.found.sealed.push(Sealed {
                number,
                path: path.to_owned(),
                head: len,
                used,
                records,
                max_id,
            });
        } else {
            let header = head.header;
            self.found.open = Some(Open { path: path.to_owned(), number, head: len, header, scan });
        }
        Ok(())
    }

    /// Copies what follows the good records to a file of its own, cuts it off, and seals the segment.
    fn repair(&mut self, path: &Path, bytes: &[u8], scan: &Scan) -> Result<()> {
        let tail = &bytes[scan.end..];
        let tail = &tail[..tail.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1)];
        if !tail.is_empty() {
            let aside = free_name(path, Some(tail))?;
            atomic::write(&aside, |w| w.write_all(tail))?;
            self.moved(&aside, tail.len());
        }
        point();
        let mut seal = Vec::new();
        record::write(&mut seal, SEAL, scan.max_id, scan.last_us, &[]);
        let mut file = File::options().write(true).open(path).map_err(|e| Error::io(path, e))?;
        let cut = file.set_len(scan.end as u64).and_then(|()| file.seek(SeekFrom::End(0)));
        point();
        cut.and_then(|_| file.write_all(&seal)).and_then(|()| file.sync_all()).map_err(|e| Error::io(path, e))
    }

    /// Renames whole segments.
    fn set_aside_all(&mut self, files: &[(u64, PathBuf)]) -> Result<()> {
        for (_, path) in files {
            point();
            let len = fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
            let aside = free_name(path, None)?;
            fs::rename(path, &aside).map_err(|e| Error::io(path, e))?;
            self.moved(&aside, len as usize);
        }
        sync_dir(self.dir);
        Ok(())
    }

    fn moved(&mut self, to: &Path, bytes: usize) {
        self.found.set_aside += bytes as u64;
        self.found.notes.push(format!("{bytes} bytes from there on were set aside in {}", to.display()));
    }
}

fn is_blank(path: &Path) -> Result<bool> {
    let blank = |bytes: Vec<u8>| bytes.iter().all(|&b| b == 0);
    Ok(blank(first_bytes(path)?) && blank(fs::read(path).map_err(|e| Error::io(path, e))?))
}

/// A name that no earlier damage has, unless it holds just these bytes.
fn free_name(path: &Path, bytes: Option<&[u8]>) -> Result<PathBuf> {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    let first = name.clone();
    for n in 2.. {
        let path = PathBuf::from(&name);
        match fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(path),
            Err(e) => return Err(Error::io(&path, e)),
            Ok(m) => {
                if bytes
                    .is_some_and(|b| b.len() as u64 == m.len() && fs::read(&path).is_ok_and(|old| old == b))
                {
                    return Ok(path);
                }
            }
        }
        name = first.clone();
        name.push(format!("-{n}"));
    }
    unreachable!("names do not end")
}
