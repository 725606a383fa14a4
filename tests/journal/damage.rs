//! Cut off, flipped, missing: the good prefix comes back, what follows is kept aside, and the warning says where.

use std::fs;
use std::path::Path;

use microlora::Error;
use microlora::journal::{DirLock, Journal, Recovered};

use super::support::*;

/// One segment with records 1 to `n`, as bytes, and where each record ends.
fn one(n: u64) -> (Vec<u8>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 16384);
    let mut ends = vec![journal.bytes() as usize];
    for id in 1..=n {
        fill(&mut journal, [id]);
        ends.push(journal.bytes() as usize);
    }
    drop(journal);
    (fs::read(segment(dir.path(), 1)).unwrap(), ends)
}

/// Opens, checks that the prefix of `good` records is there and goes on, and that the damage is found once.
fn recovers(dir: &Path, good: u64, what: &str) -> Recovered {
    let (mut journal, found) = open(dir, 16384);
    assert_eq!(ids(&journal), (1..=good).collect::<Vec<_>>(), "{what}");
    assert_eq!((found.records, found.last_id), (good, good), "{what}");
    fill(&mut journal, [good + 1]);
    drop(journal);
    let (journal, again) = open(dir, 16384);
    assert_eq!(again.warning, None, "{what}");
    assert_eq!(ids(&journal), (1..=good + 1).collect::<Vec<_>>(), "{what}");
    found
}

#[test]
fn cut_off_at_every_byte_of_the_last_records() {
    let (bytes, ends) = one(12);
    let end = ends[12];
    for cut in ends[9]..=end {
        let dir = tempfile::tempdir().unwrap();
        let path = segment(dir.path(), 1);
        fs::write(&path, &bytes[..cut]).unwrap();
        let good = ends.iter().rposition(|&e| e <= cut).unwrap();
        let found = recovers(dir.path(), good as u64, &format!("cut at {cut}"));
        let warning = found.warning.expect("a warning");
        assert!(warning.contains(path.to_str().unwrap()), "{warning}");
        assert!(warning.contains(&format!("at byte {}", ends[good])), "cut at {cut}: {warning}");
        let lost = &bytes[ends[good]..cut];
        let lost = lost.iter().rposition(|&b| b != 0).map_or(0, |n| n + 1);
        assert_eq!(found.set_aside, lost as u64, "cut at {cut}");
        let aside = dir.path().join("journal-00000001.seg.damaged");
        if lost > 0 {
            assert!(warning.contains(&format!("{lost} bytes")) && warning.contains(aside.to_str().unwrap()));
            assert_eq!(fs::read(aside).unwrap(), bytes[ends[good]..ends[good] + lost]);
        } else {
            assert!(!aside.exists());
        }
    }
}

/// What a process leaves that is killed in mid-record: some of the record, not its first word.
#[test]
fn a_record_that_was_not_finished() {
    let (bytes, ends) = one(6);
    for written in [0, 1, 20, 32, ends[6] - ends[5] - 8] {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = bytes.clone();
        bytes[ends[5]..ends[5] + 8].fill(0);
        bytes[ends[5] + 8 + written..].fill(0);
        fs::write(segment(dir.path(), 1), &bytes).unwrap();
        let found = recovers(dir.path(), 5, &format!("{written} bytes written"));
        assert_eq!(found.warning.is_some(), written > 0);
        if let Some(w) = found.warning {
            assert!(w.contains("not finished"), "{w}");
        }
    }
}

/// Every bit of the head, of the heads of two records and of the zeros behind; a bit of every fifth byte of payload.
#[test]
fn every_flipped_bit_is_found() {
    let (bytes, ends) = one(5);
    let dir = tempfile::tempdir().unwrap();
    let lock = lock(dir.path());
    let tail = ends[5]..ends[5] + 48;
    for at in (0..ends[0]).chain(ends[1]..ends[3]).chain(tail).chain([bytes.len() - 1]) {
        let payload = at > ends[0] && ends.iter().all(|&e| !(e..e + 32).contains(&at));
        if payload && at % 5 != 0 {
            continue;
        }
        for bit in (0..8).filter(|bit| !payload || *bit == at % 8) {
            for entry in contents(dir.path()) {
                fs::remove_file(dir.path().join(entry.0)).unwrap();
            }
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            fs::write(segment(dir.path(), 1), &bytes).unwrap();
            let good = if at < ends[0] { 0 } else { ends.iter().rposition(|&e| e <= at).unwrap() as u64 };
            let what = format!("bit {bit} of byte {at}");
            let (mut journal, found) = Journal::open(&lock, options(16384), &header()).unwrap();
            assert_eq!(ids(&journal), (1..=good).collect::<Vec<_>>(), "{what}");
            let warning = found.warning.expect(&what);
            assert!(
                warning.contains("journal-00000001.seg: ") && warning.contains(" at byte "),
                "{what}: {warning}"
            );
            assert!(found.set_aside > 0, "{what}");
            let aside = fs::read(dir.path().join("journal-00000001.seg.damaged")).unwrap();
            assert!(bytes.windows(aside.len()).any(|w| w == aside), "{what}");
            fill(&mut journal, [99]);
            assert_eq!(ids(&journal).last(), Some(&99));
        }
    }
}

/// Three segments with records 1 to `last`; the ids that each one begins with.
fn three(dir: &Path) -> (u64, [u64; 3]) {
    let (mut journal, _) = open(dir, 4096);
    let mut firsts = vec![1];
    let mut last = 0;
    while firsts.len() < 4 {
        last += 1;
        fill(&mut journal, [last]);
        if names(dir).len() > firsts.len() {
            firsts.push(last);
        }
    }
    drop(journal);
    // The fourth holds one record; three whole ones are what the tests want.
    fs::remove_file(segment(dir, 4)).unwrap();
    (last - 1, [firsts[0], firsts[1], firsts[2]])
}

#[test]
fn a_flip_in_an_early_segment_ends_the_prefix_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (last, firsts) = three(dir.path());
    let all = contents(dir.path());
    let path = segment(dir.path(), 2);
    let mut bytes = fs::read(&path).unwrap();
    bytes[2000] ^= 4;
    fs::write(&path, &bytes).unwrap();
    let (mut journal, found) = open(dir.path(), 4096);
    let good = journal.last_id();
    assert!((firsts[1]..firsts[2] - 1).contains(&good), "{good} of {last}");
    assert_eq!(ids(&journal), (1..=good).collect::<Vec<_>>());
    let warning = found.warning.unwrap();
    for part in ["00000002.seg: a record", "00000002.seg.damaged", "00000003.seg.damaged", "checksum"] {
        assert!(warning.contains(part), "{part}: {warning}");
    }
    assert_eq!(fs::read(dir.path().join("journal-00000003.seg.damaged")).unwrap(), all[2].1);
    fill(&mut journal, good + 1..good + 40);
    drop(journal);
    // Damage again, at the same number: the first file aside stays as it is.
    let path = segment(dir.path(), 3);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1000] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let (journal, found) = open(dir.path(), 4096);
    assert!(found.warning.is_some());
    assert!(dir.path().join("journal-00000003.seg.damaged-2").exists());
    assert_eq!(fs::read(dir.path().join("journal-00000003.seg.damaged")).unwrap(), all[2].1);
    assert_eq!(ids(&journal), (1..=journal.last_id()).collect::<Vec<_>>());
}

#[test]
fn a_missing_segment_ends_the_prefix() {
    for missing in 1..=3 {
        let dir = tempfile::tempdir().unwrap();
        let (last, firsts) = three(dir.path());
        fs::remove_file(segment(dir.path(), missing)).unwrap();
        let (journal, found) = open(dir.path(), 4096);
        let good = if missing == 3 { firsts[2] - 1 } else { firsts[missing as usize - 1] - 1 };
        assert_eq!(ids(&journal), (1..=good).collect::<Vec<_>>(), "{missing}");
        // The last one was complete, so that nothing tells of it: its end is all that is gone.
        assert_eq!(found.warning.is_some(), missing < 3 && last > 0, "{missing}");
        if let Some(w) = found.warning {
            assert!(w.contains(&format!("journal-0000000{missing}.seg: missing")), "{w}");
        }
        drop(journal);
        assert_eq!(open(dir.path(), 4096).1.warning, None);
    }
}

/// A segment that lost its last records, cut off where one ends, is not taken for a complete one.
#[test]
fn a_segment_without_its_seal_ends_the_prefix() {
    let dir = tempfile::tempdir().unwrap();
    let (_, firsts) = three(dir.path());
    let bytes = fs::read(segment(dir.path(), 1)).unwrap();
    let (mut end, mut id) = (0, 0);
    for at in (0..bytes.len() - 32).step_by(8) {
        if &bytes[at + 4..at + 8] == b"mlR1" && bytes[at + 24] != 0 {
            (end, id) = (at, id + 1);
        }
    }
    assert_eq!(id, firsts[1] - 1);
    fs::write(segment(dir.path(), 1), &bytes[..end]).unwrap();
    let (journal, found) = open(dir.path(), 4096);
    assert_eq!(ids(&journal), (1..id).collect::<Vec<_>>());
    let warning = found.warning.unwrap();
    assert!(warning.contains("its end is missing") && warning.contains("00000003.seg.damaged"), "{warning}");
}

/// Pages that a power loss takes: any page that came after the last sync.
#[test]
fn a_lost_page_costs_only_what_was_not_synced() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 1 << 16);
    fill(&mut journal, 1..=40);
    journal.sync().unwrap();
    let synced = journal.bytes() as usize;
    fill(&mut journal, 41..=200);
    let used = journal.bytes() as usize;
    drop(journal);
    let bytes = fs::read(segment(dir.path(), 1)).unwrap();
    for page in (synced / 4096..=used / 4096).map(|p| p * 4096) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = bytes.clone();
        bytes[page.max(synced)..page + 4096].fill(0);
        fs::write(segment(dir.path(), 1), &bytes).unwrap();
        let (journal, found) = open(dir.path(), 1 << 16);
        let good = journal.last_id();
        assert_eq!(ids(&journal), (1..=good).collect::<Vec<_>>());
        assert!((40..200).contains(&good), "{good}");
        assert!(found.warning.is_some());
    }
}

#[test]
fn a_newer_format_is_refused_and_nothing_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    three(dir.path());
    let path = segment(dir.path(), 3);
    let mut bytes = fs::read(&path).unwrap();
    // A head as a later build would write it: its length, format and checksum are where they are now.
    let len = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    bytes[8..12].copy_from_slice(&9u32.to_le_bytes());
    let mut hash = crc32fast::Hasher::new();
    hash.update(&bytes[..16]);
    hash.update(&bytes[24..len]);
    bytes[16..20].copy_from_slice(&hash.finalize().to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    // Damage in another one, a leftover: all of it stays.
    fs::write(segment(dir.path(), 1), b"damage").unwrap();
    fs::write(dir.path().join("journal-x.seg.new"), b"left over").unwrap();
    let before = contents(dir.path());
    let lock = lock(dir.path());
    let err = Journal::open(&lock, options(4096), &header()).unwrap_err();
    assert!(
        matches!(&err, Error::Format { file, reason } if file.ends_with("00000003.seg") && reason.contains("format 9"))
    );
    assert_eq!(contents(dir.path()), before);
    fs::remove_file(path).unwrap();
    fs::write(dir.path().join("journal.compact"), "microlora journal compaction 2\n").unwrap();
    let before = contents(dir.path());
    assert!(matches!(Journal::open(&lock, options(4096), &header()), Err(Error::Format { .. })));
    assert_eq!(contents(dir.path()), before);
}

#[test]
fn a_lock_is_for_one_holder() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("made/here");
    let first = DirLock::acquire(&inner).unwrap();
    assert_eq!(first.dir(), inner);
    let err = DirLock::acquire(&inner).unwrap_err();
    let text = err.to_string();
    assert!(matches!(&err, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock));
    assert!(text.contains(inner.to_str().unwrap()), "{text}");
    assert!(text.contains(&format!("process {}", std::process::id())), "{text}");
    drop(first);
    DirLock::acquire(&inner).unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    assert!(matches!(DirLock::acquire(&dir.path().join("file")), Err(Error::Io { .. })));
}
