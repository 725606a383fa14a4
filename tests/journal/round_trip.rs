//! What goes in comes out, over any number of segments and openings.

use std::time::Duration;

use microlora::Error;
use microlora::journal::{FORMAT, Fsync, Header, Journal, Options};
use proptest::prelude::*;

use super::support::*;

#[test]
fn a_new_journal_is_empty_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (journal, found) = open(dir.path(), 4096);
    assert!(found.created && found.warning.is_none());
    assert_eq!((found.records, found.last_id, found.header, found.headers), (0, 0, header(), vec![]));
    assert_eq!(read(&journal), []);
    assert!(journal.bytes() < 200, "{}", journal.bytes());
    drop(journal);
    let (journal, found) = open(dir.path(), 4096);
    assert!(!found.created && found.warning.is_none());
    assert_eq!(names(dir.path()), ["journal-00000001.seg"]);
    assert_eq!(journal.dir(), dir.path());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Openings, other segment lengths, preparation: the records are those that were appended.
    #[test]
    fn records_survive_any_rolling(
        batches in prop::collection::vec((0u64..60, 4096usize..9000, any::<bool>(), any::<bool>()), 1..5),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut last = 0;
        for (count, bytes, prepare, sync) in batches {
            let (mut journal, found) = open(dir.path(), bytes);
            prop_assert_eq!(&found.warning, &None);
            prop_assert_eq!((found.records, found.last_id, found.set_aside), (last, last, 0));
            prop_assert_eq!(ids(&journal), (1..=last).collect::<Vec<_>>());
            for id in last + 1..=last + count {
                fill(&mut journal, [id]);
                if prepare {
                    journal.prepare().unwrap();
                }
            }
            last += count;
            prop_assert_eq!(journal.synced_through(), 0);
            if sync {
                journal.sync().unwrap();
                prop_assert_eq!(journal.synced_through(), last);
            }
            prop_assert_eq!(ids(&journal), (1..=last).collect::<Vec<_>>());
        }
    }

    /// Any bytes in any parts, empty ones too, longer than a segment too.
    #[test]
    fn any_payload_in_any_parts(
        parts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..3000), 0..5),
        kind in 1u8..,
        id in any::<u64>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 4096);
        let slices: Vec<&[u8]> = parts.iter().map(|p| &p[..]).collect();
        journal.append_at(5, kind, id, &slices).unwrap();
        journal.append_at(6, kind, id, &[]).unwrap();
        for _ in 0..2 {
            let found = read(&journal);
            prop_assert_eq!(found.len(), 2);
            prop_assert_eq!((found[0].kind, found[0].id, found[0].timestamp_us), (kind, id, 5));
            prop_assert_eq!(&found[0].payload, &parts.concat());
            prop_assert_eq!(&found[1].payload, &Vec::<u8>::new());
            drop(journal);
            journal = open(dir.path(), 4096).0;
        }
    }
}

#[test]
fn times_never_go_back_and_the_clamps_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 4096);
    let append = |journal: &mut Journal, times: &[u64]| {
        for &t in times {
            journal.append_at(t, 1, t, &[]).unwrap();
        }
    };
    let times = |journal: &Journal| read(journal).iter().map(|r| r.timestamp_us).collect::<Vec<_>>();
    append(&mut journal, &[10, 20, 5, 20, 19, 30]);
    assert_eq!(times(&journal), [10, 20, 20, 20, 20, 30]);
    assert_eq!(journal.clamped(), 2);
    drop(journal);
    // The clock of the next process may be behind too.
    let (mut journal, _) = open(dir.path(), 4096);
    append(&mut journal, &[7, 31]);
    assert_eq!(times(&journal), [10, 20, 20, 20, 20, 30, 30, 31]);
    assert_eq!(journal.clamped(), 1);
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    journal.append(1, 9, &[]).unwrap();
    let stamp = u128::from(*times(&journal).last().unwrap());
    assert!((before.as_micros()..before.as_micros() + 60_000_000).contains(&stamp));
}

#[test]
fn syncs_come_when_the_policy_says() {
    let with = |fsync| {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) =
            open_with(dir.path(), Options { fsync, segment_bytes: 4096, ..Options::default() });
        let mut through = Vec::new();
        for id in 1..=7 {
            fill(&mut journal, [id]);
            through.push(journal.synced_through());
        }
        (dir, journal, through)
    };
    assert_eq!(with(Fsync::Never).2, [0; 7]);
    assert_eq!(with(Fsync::Always).2, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(with(Fsync::Events(3)).2, [0, 0, 3, 3, 3, 6, 6]);
    assert_eq!(with(Fsync::Interval(Duration::from_nanos(1))).2, [1, 2, 3, 4, 5, 6, 7]);
    let (_dir, mut journal, through) = with(Fsync::Interval(Duration::from_millis(400)));
    assert_eq!(through, [0; 7]);
    journal.prepare().unwrap();
    assert_eq!(journal.synced_through(), 0);
    std::thread::sleep(Duration::from_millis(450));
    journal.prepare().unwrap();
    assert_eq!(journal.synced_through(), 7);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lock = lock(dir.path());
    let bad = [
        Options { segment_bytes: 4095, ..Options::default() },
        Options { segment_bytes: (1 << 30) + 1, ..Options::default() },
        Options { fsync: Fsync::Events(0), ..Options::default() },
        Options { fsync: Fsync::Interval(Duration::ZERO), ..Options::default() },
    ];
    for options in bad {
        assert!(matches!(Journal::open(&lock, options, &header()), Err(Error::Config { .. })), "{options:?}");
    }
    for header in [Header { format: FORMAT + 1, ..header() }, Header { isa: "x".repeat(257), ..header() }] {
        let result = Journal::open(&lock, Options::default(), &header);
        assert!(matches!(result, Err(Error::Config { arg, .. }) if arg.starts_with("header.")));
    }
    assert!(names(dir.path()).is_empty());
    let (mut journal, _) = Journal::open(&lock, options(4096), &header()).unwrap();
    fill(&mut journal, 1..4);
    let err = journal.append_at(9, 0, 4, &[b"x"]).unwrap_err();
    assert!(err.to_string().contains("kind: got 0"), "{err}");
    assert_eq!((ids(&journal), journal.last_id()), (vec![1, 2, 3], 3));
}

#[test]
fn every_build_and_isa_has_segments_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let isas = ["avx2", "avx2", "scalar"];
    for (n, isa) in isas.iter().enumerate() {
        let (mut journal, _) =
            Journal::open(&lock(dir.path()), options(4096), &Header::new(isa, [n as u8; 32])).unwrap();
        fill(&mut journal, [n as u64 + 1]);
    }
    let (journal, found) = open(dir.path(), 4096);
    assert_eq!(ids(&journal), [1, 2, 3]);
    // The state is the one that the journal was made for: only a checkpoint changes it.
    assert_eq!(found.headers, [Header::new("avx2", [0; 32]), Header::new("scalar", [0; 32])]);
    assert_eq!(found.header, Header::new("scalar", [0; 32]));
    assert_eq!(names(dir.path()).len(), 3);
}
