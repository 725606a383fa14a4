//! What a fuzzer calls: any bytes as a segment, or as an event, give records or a typed error, never a panic.

use std::sync::OnceLock;

use microlora::Error;
use microlora::journal::event::{Event, decode};
use microlora::journal::{DirLock, Header, Journal, Options};

/// Called around each parser with the bytes of its files, where somebody counts what it takes.
pub static WATCH: OnceLock<Watch> = OnceLock::new();

/// Runs a parser on so many bytes, under the watch of the fuzz runner.
pub type Watch = fn(usize, &mut dyn FnMut());

fn watched<T>(len: usize, mut read: impl FnMut() -> T) -> T {
    let mut out = None;
    match WATCH.get() {
        Some(watch) => watch(len, &mut || out = Some(read())),
        None => out = Some(read()),
    }
    out.expect("it was called")
}

/// Any bytes as the first segment: what is recovered can be gone on with, and stays.
pub fn segment(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("journal-00000001.seg"), data).expect("a file");
    let lock = std::sync::Arc::new(DirLock::acquire(dir.path()).expect("a lock"));
    let options = Options { segment_bytes: 4096, ..Options::default() };
    let open = || Journal::open(&lock, options, &Header::new("scalar", [0; 32]));
    let (mut journal, found) = match watched(data.len(), open) {
        Ok(opened) => opened,
        Err(Error::Format { file, reason }) => {
            assert!(!file.is_empty() && !reason.is_empty());
            return false;
        }
        Err(other) => panic!("not an error of a file: {other:?}"),
    };
    assert_eq!(journal.count(), found.records);
    journal.append(1, found.last_id, &[data]).expect("an append");
    drop(journal);
    let (journal, again) = open().expect("what was repaired is sound");
    assert_eq!((again.records, again.warning), (found.records + 1, None));
    let read = journal.records().expect("ours").collect::<Result<Vec<_>, _>>().expect("good records");
    assert_eq!(read.len() as u64, again.records);
    found.records > 0
}

/// Any bytes as an event: what decodes encodes to the same bytes.
pub fn event(data: &[u8]) -> bool {
    match watched(data.len(), || decode(1, data)) {
        Ok(sample) => {
            assert_eq!(Event::new(&sample).expect("encodes").parts().concat(), data);
            true
        }
        Err(Error::Format { reason, .. }) => {
            assert!(!reason.is_empty());
            false
        }
        Err(other) => panic!("not an error of a file: {other:?}"),
    }
}
