//! Processes that are killed, that find a full disk, that are forked.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use microlora::Error;
use microlora::journal::{DirLock, Fsync, Header, Journal, Options};

use super::support::*;

const DIR: &str = "MICROLORA_TEST_JOURNAL_DIR";

fn given() -> Option<PathBuf> {
    std::env::var_os(DIR).map(PathBuf::from)
}

/// This test binary again, for one of the tests that are made for it.
fn child(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("children::{test}"), "--nocapture"])
        .env(DIR, dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn wait_for(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !what() {
        assert!(Instant::now() < end, "the child does nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Appends for ever and writes down, in another file, every id that is in.
#[test]
fn child_that_appends_for_ever() {
    let Some(dir) = given() else { return };
    let mut done = fs::File::options().append(true).create(true).open(dir.join("done")).unwrap();
    let (mut journal, found) = open(&dir, 1 << 15);
    for id in found.last_id + 1.. {
        fill(&mut journal, [id]);
        done.write_all(&id.to_le_bytes()).unwrap();
        if id % 64 == 0 {
            journal.prepare().unwrap();
        }
        if id % 1000 == 0 {
            journal.checkpoint(id, [1; 32]).unwrap();
        }
    }
}

#[test]
fn kill_9_loses_at_most_the_record_being_written() {
    let dir = tempfile::tempdir().unwrap();
    let done = dir.path().join("done");
    let count = || fs::metadata(&done).map_or(0, |m| m.len() / 8);
    for round in 0..12u64 {
        let before = count();
        let mut child = child("child_that_appends_for_ever", dir.path());
        wait_for(|| count() > before);
        std::thread::sleep(Duration::from_micros(997 * round * round / 2));
        child.kill().unwrap();
        child.wait().unwrap();
        let appended = count();
        let (journal, found) = open(dir.path(), 1 << 15);
        let there = journal.last_id();
        assert!(there == appended || there == appended + 1, "{there} of {appended}");
        assert_eq!(ids(&journal), (1..=there).collect::<Vec<_>>(), "{found:?}");
        // The next child must go on where this journal ends.
        if there > appended {
            fs::File::options().append(true).open(&done).unwrap().write_all(&there.to_le_bytes()).unwrap();
        }
    }
    assert!(count() > 100, "{}", count());
}

#[test]
fn child_that_holds_the_lock() {
    let Some(dir) = given() else { return };
    let _lock = DirLock::acquire(&dir).unwrap();
    fs::write(dir.join("held"), b"").unwrap();
    std::thread::sleep(Duration::from_secs(120));
}

#[test]
fn a_second_process_is_refused_until_the_first_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = child("child_that_holds_the_lock", dir.path());
    wait_for(|| dir.path().join("held").exists());
    let err = DirLock::acquire(dir.path()).unwrap_err();
    assert!(matches!(&err, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock));
    assert!(err.to_string().contains(&format!("process {}", child.id())), "{err}");
    child.kill().unwrap();
    child.wait().unwrap();
    DirLock::acquire(dir.path()).unwrap();
}

/// No file may be longer than the limit that the shell sets, as if the disk were full from there on.
#[test]
fn child_with_a_file_size_limit() {
    let Some(dir) = given() else { return };
    let lock = lock(&dir);
    let full = |e: &Error| matches!(e, Error::Io { path, .. } if path.starts_with(dir.to_str().unwrap()));
    let err = Journal::open(&lock, options(1 << 20), &header()).unwrap_err();
    assert!(full(&err), "{err}");
    assert!(names(&dir).is_empty(), "{:?}", names(&dir));
    let (mut journal, _) = Journal::open(&lock, options(4096), &header()).unwrap();
    fill(&mut journal, 1..=5);
    let before = contents(&dir);
    let err = journal.append_at(9999, 1, 6, &[&vec![1; 1 << 20]]).unwrap_err();
    assert!(full(&err), "{err}");
    assert_eq!(contents(&dir), before);
    fill(&mut journal, 6..=100);
    assert_eq!(ids(&journal), (1..=100).collect::<Vec<_>>());
    drop(journal);
    // Nothing in advance, no compaction that is longer than the limit, no checkpoint: all as before.
    let (mut journal, _) = Journal::open(&lock, options(1 << 15), &header()).unwrap();
    assert_eq!(journal.count(), 100);
    drop(journal);
    let before = contents(&dir);
    let err = Journal::open(&lock, options(1 << 20), &Header::new("scalar", [0; 32])).unwrap_err();
    assert!(full(&err), "{err}");
    assert_eq!(contents(&dir).len(), before.len());
    journal = Journal::open(&lock, options(1 << 20), &header()).unwrap().0;
    let err = journal.checkpoint(100, [9; 32]).unwrap_err();
    assert!(full(&err), "{err}");
    assert_eq!(journal.last_checkpoint(), (0, [7; 32]));
    assert_eq!(ids(&journal), (1..=100).collect::<Vec<_>>());
    fs::write(dir.join("passed"), b"").unwrap();
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_and_not_a_fault() {
    let dir = tempfile::tempdir().unwrap();
    let run =
        "trap '' XFSZ; ulimit -f 128; exec \"$0\" --exact children::child_with_a_file_size_limit --nocapture";
    let out = Command::new("sh")
        .args(["-c", run])
        .arg(std::env::current_exe().unwrap())
        .env(DIR, dir.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && dir.path().join("passed").exists(), "{:?} {text}", out.status);
}

/// The file's blocks are taken when it is made: a hole in it would be a fault when the disk is full.
#[cfg(unix)]
#[test]
fn a_segment_has_its_blocks_from_the_start() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let options = Options { fsync: Fsync::Always, segment_bytes: 1 << 20, ..Options::default() };
    let (_journal, _) = open_with(dir.path(), options);
    // What zeros take on this file system.
    let zeros = fs::File::create(dir.path().join("zeros")).unwrap();
    (&zeros).write_all(&vec![0; 1 << 20]).unwrap();
    zeros.sync_all().unwrap();
    let blocks = |path: &Path| fs::metadata(path).unwrap().blocks();
    assert!(blocks(&segment(dir.path(), 1)) >= blocks(&dir.path().join("zeros")));
}

/// Between fork and exec the child tries everything; what it may do comes back as the result of starting it.
#[cfg(unix)]
#[test]
fn a_forked_child_is_refused_and_leaves_the_parent_alone() {
    use std::os::unix::process::CommandExt;
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 4096);
    fill(&mut journal, 1..=8);
    journal.prepare().unwrap();
    let before = contents(dir.path());
    let shared = std::sync::Arc::new(std::sync::Mutex::new(Some(journal)));
    let inherited = std::sync::Arc::clone(&shared);
    let try_all = move || {
        let mut journal = inherited.lock().unwrap().take().unwrap();
        let refused = [
            journal.append_at(9, 1, 9, &[b"x"]),
            journal.sync(),
            journal.prepare(),
            journal.checkpoint(9, [0; 32]),
            journal.compact(&mut |_, _| false).map(|_| ()),
            journal.records().map(|_| ()),
        ];
        drop(journal);
        let all = refused.iter().all(|r| matches!(r, Err(Error::Config { arg, .. }) if arg == "journal"));
        if all { Ok(()) } else { Err(std::io::Error::other("the child was not refused")) }
    };
    let mut command = Command::new("true");
    // SAFETY: this test allocates in the child, which works where the allocator survives forks, as glibc's does.
    unsafe { command.pre_exec(try_all) };
    command.spawn().unwrap().wait().unwrap();
    assert_eq!(contents(dir.path()), before);
    assert!(DirLock::acquire(dir.path()).is_err(), "the child gave the lock away");
    let mut journal = shared.lock().unwrap().take().unwrap();
    fill(&mut journal, 9..=60);
    assert_eq!(ids(&journal), (1..=60).collect::<Vec<_>>());
}
