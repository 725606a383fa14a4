//! What an event costs in the journal, and where it goes: `cargo bench --bench journal [-- DIRECTORY]`.
//!
//! The event has an input and a target of 768 numbers. Times are of the calls alone; `prepare` runs between them
//! and is shown apart, as the background loop pays for it.

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use microlora::journal::event::{Event, decode};
use microlora::journal::{DirLock, Fsync, Header, Journal, Options, Retain};
use microlora::learn::{Feedback, TargetLoss};
use microlora::replay::Sample;

fn sample() -> Sample {
    let numbers = |phase: f32| (0..768).map(|i| (i as f32 * 0.37 + phase).sin()).collect::<Vec<f32>>();
    Sample {
        event: 1,
        module: Some(0),
        x: numbers(0.0),
        base: None,
        feedback: Arc::new(Feedback::target(numbers(1.0), TargetLoss::Mse).expect("a target")),
        quality: Some(0.9),
        weight: 1.0,
        advantage: 0.0,
    }
}

fn line(what: &str, spent: Duration, count: usize) {
    println!("{what:<58} {:>12.0} ns", spent.as_nanos() as f64 / count as f64);
}

fn part(what: &str, count: usize, mut call: impl FnMut()) {
    let start = Instant::now();
    for _ in 0..count {
        call();
    }
    line(what, start.elapsed(), count);
}

/// Appends `count` events, `prepare` after every 64 if it is asked for; returns append's time and prepare's.
fn run(dir: &Path, fsync: Fsync, count: usize, prepared: bool) -> (Vec<u32>, Duration, Journal) {
    let options = Options { fsync, retain: Retain::Bytes(0), ..Options::default() };
    let lock = Arc::new(DirLock::acquire(dir).expect("a lock"));
    let (mut journal, _) = Journal::open(&lock, options, &Header::new("bench", [0; 32])).expect("a journal");
    let sample = sample();
    let mut aside = Duration::ZERO;
    let mut times = Vec::with_capacity(count);
    for id in 1..=count {
        let start = Instant::now();
        let event = Event::new(black_box(&sample)).expect("an event");
        journal.append(1, id as u64, &event.parts()).expect("an append");
        times.push(start.elapsed().as_nanos() as u32);
        if prepared && id % 64 == 0 {
            let start = Instant::now();
            journal.prepare().expect("room");
            aside += start.elapsed();
        }
        if id % 20_000 == 0 {
            journal.checkpoint(id as u64, [0; 32]).expect("a checkpoint");
        }
    }
    (times, aside, journal)
}

fn report(what: &str, times: &mut [u32]) {
    let mean = |times: &[u32]| times.iter().map(|&t| f64::from(t)).sum::<f64>() / times.len() as f64;
    times.sort_unstable();
    // On a machine that others use, the slowest are time slices that went to them.
    let most = mean(&times[..times.len() - times.len() / 1000]);
    let mean = mean(times);
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize];
    let (p50, p99, p999) = (at(0.5), at(0.99), at(0.999));
    println!(
        "{what:<32} mean {mean:>8.0} ns   of the faster 99.9 % {most:>8.0}   p50 {p50:>8}   p99 {p99:>8}   p99.9 {p999:>8}"
    );
}

fn main() {
    let place = std::env::args().skip(1).find(|a| !a.starts_with('-'));
    let temp = match &place {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    };
    let temp = temp.expect("a directory");
    let sample = sample();
    let event = Event::new(&sample).expect("an event");
    let payload = event.parts().concat();
    println!("parts of an event of {} bytes", payload.len() + 32);
    let mut to = payload.clone();
    part("  copy (in cache)", 100_000, || black_box(&mut to).copy_from_slice(black_box(&payload)));
    part("  CRC-32", 100_000, || {
        black_box(crc32fast::hash(black_box(&payload)));
    });
    part("  clock", 100_000, || {
        black_box(SystemTime::now());
    });
    part("  number of the process", 100_000, || {
        black_box(std::process::id());
    });
    part("  parts of the event", 100_000, || {
        black_box(Event::new(black_box(&sample)).expect("an event").parts());
    });
    part("  decoding", 20_000, || {
        black_box(decode(1, black_box(&payload)).expect("an event"));
    });

    println!("append");
    let rows = [
        ("  no sync, prepared", Fsync::Never, 60_000, true),
        ("  no sync, unprepared", Fsync::Never, 60_000, false),
        ("  sync with every 64th event", Fsync::Events(64), 6_400, true),
        ("  sync with every event", Fsync::Always, 400, true),
    ];
    for (n, (what, fsync, count, prepared)) in rows.into_iter().enumerate() {
        let (mut times, aside, journal) = run(&temp.path().join(n.to_string()), fsync, count, prepared);
        report(what, &mut times);
        if prepared {
            line("    prepare, apart, for each event", aside, count);
        }
        drop(journal);
    }

    println!("opening and reading");
    let dir = temp.path().join("read");
    let lock = Arc::new(DirLock::acquire(&dir).expect("a lock"));
    let open =
        || Journal::open(&lock, Options::default(), &Header::new("bench", [0; 32])).expect("a journal");
    let mut journal = open().0;
    let count = 20_000;
    for id in 1..=count {
        journal.append(1, id, &event.parts()).expect("an append");
    }
    drop(journal);
    let start = Instant::now();
    let (journal, found) = open();
    assert_eq!(found.records, count);
    line("  recovery, for each event", start.elapsed(), count as usize);
    let start = Instant::now();
    let bytes: usize = journal.records().expect("ours").map(|r| r.expect("good").payload.len()).sum();
    assert_eq!(bytes, count as usize * payload.len());
    line("  reading, for each event", start.elapsed(), count as usize);
}
