//! What a fuzzer calls: any bytes as a segment, or as an event, give records or a typed error, never a panic.

use microlora::Error;
use microlora::journal::event::{Event, decode};
use microlora::journal::{DirLock, Header, Journal, Options};

/// Any bytes as the first segment: what is recovered can be gone on with, and stays.
pub fn segment(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("journal-00000001.seg"), data).expect("a file");
    let lock = std::sync::Arc::new(DirLock::acquire(dir.path()).expect("a lock"));
    let options = Options { segment_bytes: 4096, ..Options::default() };
    let open = || Journal::open(&lock, options, &Header::new("scalar", [0; 32]));
    let (mut journal, found) = match open() {
        Ok(opened) => opened,
        Err(Error::Format { file, reason }) => return assert!(!file.is_empty() && !reason.is_empty()),
        Err(other) => panic!("not an error of a file: {other:?}"),
    };
    assert_eq!(journal.count(), found.records);
    journal.append(1, found.last_id, &[data]).expect("an append");
    drop(journal);
    let (journal, again) = open().expect("what was repaired is sound");
    assert_eq!((again.records, again.warning), (found.records + 1, None));
    let read = journal.records().expect("ours").collect::<Result<Vec<_>, _>>().expect("good records");
    assert_eq!(read.len() as u64, again.records);
}

/// Any bytes as an event: what decodes encodes to the same bytes.
pub fn event(data: &[u8]) {
    match decode(1, data) {
        Ok(sample) => assert_eq!(Event::new(&sample).expect("encodes").parts().concat(), data),
        Err(Error::Format { reason, .. }) => assert!(!reason.is_empty()),
        Err(other) => panic!("not an error of a file: {other:?}"),
    }
}
