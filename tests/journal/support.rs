//! Directories, journals and records to test with.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use microlora::journal::{DirLock, Fsync, Header, Journal, Options, Record, Recovered, Retain};

pub fn options(segment_bytes: usize) -> Options {
    Options { fsync: Fsync::Never, segment_bytes, retain: Retain::All }
}

pub fn header() -> Header {
    Header::new("avx2", [7; 32])
}

pub fn lock(dir: &Path) -> Arc<DirLock> {
    Arc::new(DirLock::acquire(dir).unwrap())
}

pub fn open_with(dir: &Path, options: Options) -> (Journal, Recovered) {
    Journal::open(&lock(dir), options, &header()).unwrap()
}

pub fn open(dir: &Path, segment_bytes: usize) -> (Journal, Recovered) {
    open_with(dir, options(segment_bytes))
}

/// Bytes that only record `id` has; lengths from 0 to 300.
pub fn payload(id: u64) -> Vec<u8> {
    let len = (id.wrapping_mul(0x9e37_79b9) >> 7) % 301;
    let mut state = id;
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33) as u8 | 1
    };
    (0..len).map(|_| next()).collect()
}

pub fn fill(journal: &mut Journal, ids: impl IntoIterator<Item = u64>) {
    for id in ids {
        let bytes = payload(id);
        let (a, b) = bytes.split_at(bytes.len() / 3);
        journal.append_at(1000 + id, (id % 5) as u8 + 1, id, &[a, b]).unwrap();
    }
}

pub fn record(id: u64) -> Record {
    Record { kind: (id % 5) as u8 + 1, id, timestamp_us: 1000 + id, payload: payload(id) }
}

pub fn read(journal: &Journal) -> Vec<Record> {
    journal.records().unwrap().map(|r| r.unwrap()).collect()
}

/// The ids that are there, each record checked.
pub fn ids(journal: &Journal) -> Vec<u64> {
    let found = read(journal);
    for r in &found {
        assert_eq!(*r, record(r.id));
    }
    assert_eq!(found.len() as u64, journal.count());
    found.iter().map(|r| r.id).collect()
}

pub fn segment(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("journal-{number:08}.seg"))
}

/// Names and contents of a directory, without the lock.
pub fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| !p.ends_with("microlora.lock"))
        .map(|p| (p.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&p).unwrap()))
        .collect();
    found.sort();
    found
}

pub fn names(dir: &Path) -> Vec<String> {
    contents(dir).into_iter().map(|(name, _)| name).collect()
}
