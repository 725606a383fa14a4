//! The directory at every point where a process can be killed between two steps: whatever it looks like there,
//! opening it gives a state from before the step or from after it.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::options::MIN_SEGMENT;
use super::*;

type Look = Box<dyn FnMut()>;

thread_local! {
    static LOOK: RefCell<Option<Look>> = const { RefCell::new(None) };
}

pub(super) fn at_point() {
    LOOK.with_borrow_mut(|look| {
        if let Some(look) = look {
            look();
        }
    });
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_str().unwrap().ends_with(".lock") {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Runs `act` and returns copies of `dir` from every point within, and the one from after it.
fn looks(dir: &Path, act: impl FnOnce()) -> Vec<(tempfile::TempDir, PathBuf)> {
    let seen = std::rc::Rc::new(RefCell::new(Vec::new()));
    let (from, into) = (dir.to_owned(), std::rc::Rc::clone(&seen));
    let look = move || {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("seen");
        copy(&from, &path);
        into.borrow_mut().push((temp, path));
    };
    LOOK.set(Some(Box::new(look)));
    act();
    at_point();
    LOOK.set(None);
    std::rc::Rc::into_inner(seen).unwrap().into_inner()
}

fn options() -> Options {
    Options { segment_bytes: MIN_SEGMENT, ..Options::default() }
}

fn open_at(dir: &Path) -> (Journal, Recovered) {
    let lock = Arc::new(DirLock::acquire(dir).unwrap());
    Journal::open(&lock, options(), &Header::new("avx2", [0; 32])).unwrap()
}

fn fill(journal: &mut Journal, ids: std::ops::RangeInclusive<u64>) {
    for id in ids {
        journal.append_at(id, 1, id, &[&[id as u8; 300]]).unwrap();
    }
}

fn ids(journal: &Journal) -> Vec<u64> {
    journal.records().unwrap().map(|r| r.unwrap().id).collect()
}

/// Opens a copy, which must be sound, and goes on with it.
fn sound(dir: &Path) -> (Vec<u64>, Recovered) {
    let (mut journal, found) = open_at(dir);
    let there = ids(&journal);
    let next = journal.last_id() + 1;
    fill(&mut journal, next..=next + 20);
    drop(journal);
    let (journal, again) = open_at(dir);
    assert_eq!(again.warning, None);
    assert_eq!(ids(&journal), [there.clone(), (next..=next + 20).collect()].concat());
    (there, found)
}

#[test]
fn a_kill_while_rolling_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=11);
    let seen = looks(dir.path(), || fill(&mut journal, 12..=12));
    assert_eq!(seen.len(), 4, "the twelfth begins a segment");
    for (n, (_temp, dir)) in seen.iter().enumerate() {
        let (there, found) = sound(dir);
        assert_eq!(found.warning, None, "{n}");
        assert_eq!(there, (1..=11 + u64::from(n == 3)).collect::<Vec<_>>(), "{n}");
    }
}

#[test]
fn a_kill_while_checkpointing_leaves_the_old_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    journal.options.retain = Retain::Bytes(0);
    fill(&mut journal, 1..=40);
    let seen = looks(dir.path(), || journal.checkpoint(40, [5; 32]).unwrap());
    assert!(seen.len() > 6, "{}", seen.len());
    let mut last = 0;
    for (n, (_temp, dir)) in seen.iter().enumerate() {
        let (there, found) = sound(dir);
        assert_eq!(found.warning, None, "{n}");
        let new = found.checkpoint == 40;
        assert_eq!(found.header.state == [5; 32], new);
        assert!(new || there.len() == 40, "{n}: old and {}", there.len());
        assert!(there.is_empty() || there.last() == Some(&40));
        assert!(u64::from(new) >= last, "{n}");
        last = u64::from(new);
    }
    assert!(ids(&journal).is_empty());
}

#[test]
fn a_kill_while_compacting_leaves_the_old_or_the_new_set() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=40);
    let old: Vec<u64> = (1..=40).collect();
    let new: Vec<u64> = old.iter().copied().filter(|id| id % 3 != 0).collect();
    let seen = looks(dir.path(), || {
        assert_eq!(journal.compact(&mut |_, id| id % 3 != 0).unwrap(), 13);
    });
    assert!(seen.len() >= 12, "{}", seen.len());
    let mut switched = 0;
    for (n, (_temp, dir)) in seen.iter().enumerate() {
        // Whoever finishes it may be killed too.
        for (_temp, dir) in looks(dir, || drop(open_at(dir))) {
            let (there, found) = sound(&dir);
            assert_eq!(found.warning, None, "{n}");
            assert_eq!(found.last_id, 40);
            assert!(there == old && switched == 0 || there == new, "{n}: {there:?}");
            switched += usize::from(there == new);
            for name in fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()) {
                assert!(name.ends_with(".seg") || name == "microlora.lock", "{name}");
            }
        }
    }
    assert!(switched > 4, "{switched}");
    assert_eq!(ids(&journal), new);
}

#[test]
fn a_compaction_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=40);
    journal.compact(&mut |_, _| true).unwrap();
    // Something sits where the last of the new files should go.
    let blocked = journal.sealed[journal.sealed.len() - 2].path.with_extension("seg.compact");
    fs::create_dir(&blocked).unwrap();
    fs::write(blocked.join("file"), b"").unwrap();
    assert!(matches!(journal.compact(&mut |_, id| id % 2 == 0), Err(Error::Io { .. })));
    assert_eq!(ids(&journal), (1..=40).collect::<Vec<_>>());
    fs::remove_dir_all(&blocked).unwrap();
    assert_eq!(journal.compact(&mut |_, id| id % 2 == 0).unwrap(), 20);
    assert_eq!(ids(&journal), (2..=40).step_by(2).collect::<Vec<_>>());
}

#[test]
fn a_kill_while_setting_damage_aside_finds_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=60);
    drop(journal);
    let path = segment::path(dir.path(), 2);
    let mut bytes = fs::read(&path).unwrap();
    bytes[1500] ^= 1;
    fs::write(&path, bytes).unwrap();
    let seen = looks(dir.path(), || drop(open_at(dir.path())));
    assert!(seen.len() > 5, "{}", seen.len());
    let mut good = None;
    for (n, (_temp, dir)) in seen.iter().enumerate() {
        let (there, found) = sound(dir);
        // Every byte of the damage is somewhere.
        assert_eq!(found.warning.is_none(), n + 1 == seen.len(), "{n}: {found:?}");
        assert_eq!(good.get_or_insert(there.clone()), &there, "{n}");
        let aside = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let aside: u64 = aside
            .filter(|p| p.to_str().unwrap().contains("damaged"))
            .map(|p| fs::metadata(p).unwrap().len())
            .sum();
        assert!(aside > 4096 * 3, "{n}: {aside}");
    }
    let good = good.unwrap();
    assert_eq!(good, (1..=good.len() as u64).collect::<Vec<_>>());
    assert!((11..22).contains(&good.len()), "{}", good.len());
}

/// A disk that takes nothing more: what was said to be in the journal is, nothing else, and it says so.
#[test]
fn a_failed_sync_takes_the_record_back_and_ends_the_writing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=15);
    journal.options.fsync = Fsync::Always;
    // The first segment is not synced yet, and cannot be opened now.
    let (first, away) = (segment::path(dir.path(), 1), dir.path().join("away"));
    fs::rename(&first, &away).unwrap();
    assert!(matches!(journal.append(1, 16, &[b"x"]), Err(Error::Io { .. })));
    fs::rename(&away, &first).unwrap();
    for refused in [journal.append(1, 17, &[b"x"]), journal.sync(), journal.prepare()] {
        assert!(refused.unwrap_err().to_string().contains("failed"));
    }
    assert_eq!((journal.last_id(), journal.synced_through(), journal.count()), (15, 0, 15));
    drop(journal);
    let (journal, found) = open_at(dir.path());
    assert_eq!((ids(&journal), found.warning), ((1..=15).collect(), None));
}

#[test]
fn a_segment_that_changes_after_opening_is_an_error_of_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open_at(dir.path());
    fill(&mut journal, 1..=30);
    let path = segment::path(dir.path(), 2);
    let good = fs::read(&path).unwrap();
    let mut bytes = good.clone();
    bytes[900] ^= 1;
    for bytes in [&bytes[..], &good[..900]] {
        fs::write(&path, bytes).unwrap();
        let mut records = journal.records().unwrap();
        let error = records.by_ref().find_map(|r| r.err()).unwrap();
        assert!(matches!(&error, Error::Format { file, .. } if file.contains("00000002.seg")), "{error}");
        assert!(records.next().is_none());
        assert!(journal.compact(&mut |_, _| false).is_err());
    }
}
