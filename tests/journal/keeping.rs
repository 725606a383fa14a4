//! Checkpoints, retention, compaction.

use microlora::journal::{Fsync, Header, Options, Retain};
use proptest::prelude::*;

use super::support::*;

#[test]
fn a_checkpoint_begins_a_segment_and_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 1 << 16);
    fill(&mut journal, 1..=10);
    assert_eq!(journal.last_checkpoint(), (0, [7; 32]));
    journal.checkpoint(10, [1; 32]).unwrap();
    assert_eq!(names(dir.path()).len(), 2);
    // The complete one has no zeros left.
    assert!(std::fs::metadata(segment(dir.path(), 1)).unwrap().len() < 1 << 13);
    fill(&mut journal, 11..=12);
    assert_eq!(ids(&journal), (1..=12).collect::<Vec<_>>());
    drop(journal);
    let (journal, found) = open(dir.path(), 1 << 16);
    assert_eq!((found.checkpoint, found.records, found.warning), (10, 12, None));
    assert_eq!(found.header.state, [1; 32]);
    assert_eq!(found.headers, [Header::new("avx2", [1; 32])]);
    assert_eq!(journal.last_checkpoint(), (10, [1; 32]));
}

#[test]
fn retention_deletes_the_oldest_that_replay_does_not_need() {
    for (limit, gone) in [(u64::MAX, false), (0, true)] {
        let dir = tempfile::tempdir().unwrap();
        let retain = Retain::Bytes(limit);
        let all = Options { fsync: Fsync::Never, segment_bytes: 4096, retain };
        let (mut journal, _) = open_with(dir.path(), all);
        fill(&mut journal, 1..=60);
        // Saved while events went on: what holds some after 50 stays.
        journal.checkpoint(50, [2; 32]).unwrap();
        let left = ids(&journal);
        assert_eq!(left.last(), Some(&60));
        assert!(left[0] <= 51 && (left[0] > 30) == gone, "{}", left[0]);
        fill(&mut journal, 61..=70);
        drop(journal);
        let (mut journal, found) = open_with(dir.path(), all);
        assert_eq!((found.checkpoint, found.warning), (50, None));
        assert_eq!(ids(&journal), (left[0]..=70).collect::<Vec<_>>());
        journal.checkpoint(70, [3; 32]).unwrap();
        assert_eq!(ids(&journal).is_empty(), gone);
        drop(journal);
        let (journal, found) = open_with(dir.path(), all);
        assert_eq!((found.warning, found.header.state), (None, [3; 32]));
        assert_eq!(journal.count() == 0, gone);
    }
    // The newest of them, of so many bytes at most.
    let dir = tempfile::tempdir().unwrap();
    let options = Options { fsync: Fsync::Always, segment_bytes: 4096, retain: Retain::Bytes(9000) };
    let (mut journal, _) = open_with(dir.path(), options);
    for id in 1..=100 {
        fill(&mut journal, [id]);
        journal.prepare().unwrap();
    }
    journal.checkpoint(100, [2; 32]).unwrap();
    assert!((4096 + 100..9100).contains(&journal.bytes()), "{}", journal.bytes());
    let left = ids(&journal);
    assert_eq!(left, (left[0]..=100).collect::<Vec<_>>());
}

/// Damage in what the saved state has already: audits lose it, replay goes on behind it.
#[test]
fn damage_before_the_checkpoint_does_not_end_the_replay() {
    for broken in 0..3 {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 4096);
        fill(&mut journal, 1..=60);
        journal.checkpoint(60, [2; 32]).unwrap();
        fill(&mut journal, 61..=64);
        drop(journal);
        let path = segment(dir.path(), 2);
        match broken {
            0 => std::fs::remove_file(&path).unwrap(),
            byte => {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[if byte == 1 { 10 } else { 1500 }] ^= 1;
                std::fs::write(&path, bytes).unwrap();
            }
        }
        for again in [false, true] {
            let (journal, found) = open(dir.path(), 4096);
            let left = ids(&journal);
            assert_eq!(left[left.len() - 4..], [61, 62, 63, 64], "{broken}");
            assert!(left.contains(&1) && left.contains(&60) && left.len() < 64);
            // A segment that is missing for good is told each time.
            assert_eq!(found.warning.is_some(), !again || broken < 2, "{broken} {again}: {found:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, ..ProptestConfig::default() })]

    #[test]
    fn compaction_takes_what_it_is_told(
        count in 0u64..120,
        modulus in 1u64..7,
        rest in 0u64..7,
        more in 0u64..5,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut journal, _) = open(dir.path(), 4096);
        fill(&mut journal, 1..=count);
        let kept: Vec<u64> = (1..=count).filter(|id| id % modulus != rest).collect();
        let removed = journal.compact(&mut |kind, id| {
            assert_eq!(u64::from(kind), id % 5 + 1);
            id % modulus != rest
        }).unwrap();
        prop_assert_eq!(removed, count - kept.len() as u64);
        prop_assert_eq!(journal.last_id(), count);
        prop_assert_eq!(ids(&journal), kept.clone());
        fill(&mut journal, count + 1..=count + more);
        drop(journal);
        let (journal, found) = open(dir.path(), 4096);
        // A number that was forgotten is not given again.
        prop_assert_eq!((found.last_id, found.warning), (count + more, None));
        prop_assert_eq!(ids(&journal), kept.into_iter().chain(count + 1..=count + more).collect::<Vec<_>>());
        // Nothing of what went is left in any file.
        let gone: Vec<u64> = (1..=count).filter(|id| id % modulus == rest && payload(*id).len() > 40).collect();
        for (name, bytes) in contents(dir.path()) {
            for id in &gone {
                let trace = payload(*id);
                prop_assert!(!bytes.windows(trace.len()).any(|w| w == trace), "{} in {}", id, name);
            }
        }
    }
}

#[test]
fn segments_made_in_advance_are_used_or_cleared_away() {
    let dir = tempfile::tempdir().unwrap();
    let (mut journal, _) = open(dir.path(), 4096);
    assert!(journal.wanted().is_none());
    fill(&mut journal, 1..=8);
    let mut make = || journal.wanted().expect("a quarter is full").make().unwrap();
    let (first, second) = (make(), make());
    assert_eq!(names(dir.path()).len(), 3);
    journal.adopt(first).unwrap();
    journal.adopt(second).unwrap();
    assert!(journal.wanted().is_none());
    assert_eq!(names(dir.path()), ["journal-00000001.seg", "journal-00000002.seg"]);
    // A record that is longer than what was made: it gets a file of its own.
    let long = vec![9; 10_000];
    journal.append_at(2000, 1, 9, &[&long]).unwrap();
    assert_eq!(read(&journal).last().unwrap().payload, long);
    assert!(std::fs::metadata(segment(dir.path(), 2)).unwrap().len() > 10_000);
    journal.prepare().unwrap();
    assert_eq!(names(dir.path()).len(), 3);
    drop(journal);
    assert_eq!(names(dir.path()).len(), 2);
    let (mut journal, found) = open(dir.path(), 4096);
    assert_eq!((found.records, found.warning), (9, None));
    fill(&mut journal, 10..=200);
    assert_eq!(read(&journal).len(), 200);
}
