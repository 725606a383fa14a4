//! Segments without some of their records: all of the new files, or all of the old ones.
//!
//! New files are written and synced beside the old ones; then a marker appears, in one rename, and from there on
//! the new ones are the journal: whoever finds the marker finishes the renaming.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::record::{self, FORMAT, SEAL};
use super::recover::{newer, point, sweep};
use super::segment::Sealed;
use crate::error::{Error, Result};
use crate::format::atomic::{self, sync_dir};

const SUFFIX: &str = ".seg.compact";
const MARKER: &str = "journal.compact";
const TITLE: &str = "microlora journal compaction ";

/// Files of a compaction and the segments that they stand for, by their places among `segments`.
type Staged = Vec<(usize, Sealed)>;

/// New files that are there, finished or not, by number.
pub(super) fn files(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let segment = name.strip_suffix(".compact").and_then(super::segment::number);
        if let Some(number) = segment {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Refuses a marker of a newer format.
pub(super) fn check(dir: &Path) -> Result<()> {
    let path = dir.join(MARKER);
    let text = fs::read_to_string(&path).unwrap_or_default();
    match text.strip_prefix(TITLE).and_then(|n| n.trim().parse::<u32>().ok()) {
        Some(format) if format > FORMAT => Err(newer(&path, format)),
        _ => Ok(()),
    }
}

/// Finishes a compaction that was committed; clears away one that was not.
pub(super) fn finish(dir: &Path) -> Result<()> {
    let marker = dir.join(MARKER);
    if !marker.try_exists().map_err(|e| Error::io(&marker, e))? {
        return sweep(dir, SUFFIX);
    }
    for (_, path) in files(dir)? {
        point();
        fs::rename(&path, path.with_extension("")).map_err(|e| Error::io(&path, e))?;
    }
    sync_dir(dir);
    point();
    fs::remove_file(&marker).map_err(|e| Error::io(&marker, e))?;
    sync_dir(dir);
    Ok(())
}

/// Writes and syncs the new files of the segments that lose records.
pub(super) fn stage(
    dir: &Path,
    segments: &[Sealed],
    keep: &mut dyn FnMut(u8, u64) -> bool,
) -> Result<Staged> {
    sweep(dir, SUFFIX)?;
    let mut write_all = || {
        let mut staged = Vec::new();
        for (place, segment) in segments.iter().enumerate() {
            if let Some((bytes, new)) = without(segment, keep)? {
                point();
                let path = segment.path.with_extension("seg.compact");
                let written =
                    File::create(&path).and_then(|mut f| f.write_all(&bytes).and_then(|()| f.sync_all()));
                written.map_err(|e| Error::io(&path, e))?;
                staged.push((place, new));
            }
        }
        Ok(staged)
    };
    let staged = write_all();
    if staged.is_err() {
        // On a full disk the half that was written is in the way.
        let _ = sweep(dir, SUFFIX);
    }
    staged
}

/// Makes the new files the journal.
pub(super) fn commit(dir: &Path) -> Result<()> {
    point();
    atomic::write(&dir.join(MARKER), |w| writeln!(w, "{TITLE}{FORMAT}"))?;
    point();
    finish(dir)
}

/// A segment's bytes without some records; `None` where all are kept.
fn without(segment: &Sealed, keep: &mut dyn FnMut(u8, u64) -> bool) -> Result<Option<(Vec<u8>, Sealed)>> {
    let bytes = segment.read()?;
    let mut out = bytes[..segment.head].to_vec();
    let (mut records, mut last_us, mut at) = (0, 0, segment.head);
    loop {
        let found = record::next(&bytes, at).map_err(|f| segment.damaged(&f))?;
        let Some(r) = found.filter(|r| r.kind != SEAL) else { break };
        last_us = r.timestamp_us;
        if keep(r.kind, r.id) {
            out.extend(&bytes[at..r.end]);
            records += 1;
        }
        at = r.end;
    }
    if records == segment.records {
        return Ok(None);
    }
    // The seal keeps the largest id: a number that was forgotten is not given again.
    record::write(&mut out, SEAL, segment.max_id, last_us, &[]);
    let used = out.len();
    Ok(Some((out, Sealed { used, records, ..segment.clone() })))
}
