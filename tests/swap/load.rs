//! Under load: the checker of torn reads, shown to see them.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::{Duration, Instant};

use microlora::factor::{Factor, SharedFactor};
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::learn::{Feedback, TargetLoss};
use microlora::micro_lora::Settings;
use microlora::swap::Generation;
use microlora::{Adapter, Dtype, Error, HotSwap, MicroLora};

use super::{MODULES, N, READERS, adapter_of, layer, numbers, version};

/// 1 MiB that no other generation shares, so that a few which stay are seen in the process.
const BALLAST: usize = 1 << 20;

fn heavy(adapter: &Adapter) -> Arc<Adapter> {
    let half = || {
        let n = BALLAST / 8;
        Factor::from_rows(&vec![0.5; n], 1, n, Dtype::F32)
    };
    let mut modules = adapter.modules.clone();
    modules.push(("ballast".into(), Arc::new(Layer::new(half(), half(), 1.0, false).unwrap())));
    Arc::new(Adapter { modules, ..Adapter::default() })
}

/// What one generation answers: hashes of both modules' outputs, for one row and for a batch.
type Pair = (u64, u64);

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Answers {
    row: Pair,
    batch: Pair,
}

fn answer(k: &Kernels, layer: &Layer, x: &[f32], batch: bool) -> u64 {
    let mut hash = DefaultHasher::new();
    if batch {
        let mut y = vec![0.0; 2 * N];
        layer.forward_rows(k, &[x, x].concat(), &mut y, false).unwrap();
        y.iter().for_each(|v| v.to_bits().hash(&mut hash));
    } else {
        let mut y = vec![0.0; N];
        layer.forward(k, x, &mut y, false).unwrap();
        y.iter().for_each(|v| v.to_bits().hash(&mut hash));
    }
    hash.finish()
}

fn answers(k: &Kernels, adapter: &Adapter, x: &[f32]) -> Answers {
    let pair = |batch| {
        let [q, v] = MODULES.map(|m| answer(k, adapter.layer(m).unwrap(), x, batch));
        (q, v)
    };
    Answers { row: pair(false), batch: pair(true) }
}

/// Something that serves two modules while others change them.
trait Serves: Sync {
    /// Both modules within one pin: number and what each answered.
    fn read(&self, x: &[f32], batch: bool, way: usize) -> (Option<u64>, Pair);
    /// One change by the swapper.
    fn change(&self, adapter: &Arc<Adapter>, step: usize) -> Option<Change>;
    /// One publication by the learner; none where another writer was faster.
    fn publish(&self, expected: u64, adapter: &Arc<Adapter>) -> Option<u64>;
    fn pin(&self) -> (u64, Arc<Adapter>);
}

/// What a generation holds: an adapter whose answers are known, or what another generation held.
enum Change {
    New(u64),
    Back { new: u64, to: u64 },
}

struct Real {
    swap: HotSwap,
    slots: [usize; 2],
    seen: Mutex<Vec<Weak<Generation>>>,
    /// Of all that was swapped in.
    bytes: AtomicUsize,
}

impl Real {
    fn new(first: &Arc<Adapter>) -> Self {
        let swap = HotSwap::new(true).unwrap();
        drop(swap.set_active(Arc::clone(first), false).unwrap());
        let slots = MODULES.map(|m| swap.slot(m).unwrap());
        Real { swap, slots, seen: Mutex::default(), bytes: AtomicUsize::new(0) }
    }
}

impl Serves for Real {
    fn read(&self, x: &[f32], batch: bool, way: usize) -> (Option<u64>, Pair) {
        let k = self.swap.kernels();
        let of = |g: &Generation| {
            let q = answer(k, g.slot(self.slots[0]).unwrap(), x, batch);
            if way.is_multiple_of(3) {
                std::thread::yield_now();
            }
            (Some(g.number()), (q, answer(k, g.layer(MODULES[1]).unwrap(), x, batch)))
        };
        if way.is_multiple_of(2) {
            return of(&self.swap.load());
        }
        let pinned = self.swap.pin();
        if way.is_multiple_of(101) {
            self.seen.lock().unwrap().push(Arc::downgrade(&pinned));
        }
        of(&pinned)
    }

    fn change(&self, adapter: &Arc<Adapter>, step: usize) -> Option<Change> {
        if step % 5 == 4 {
            // Nothing to go back to right after another rollback.
            let done = self.swap.rollback().ok()?;
            return Some(Change::Back { new: done.new, to: done.old - 1 });
        }
        self.bytes.fetch_add(BALLAST, Ordering::Relaxed);
        self.swap.prepare_standby(heavy(adapter), false, &mut |_, _| Ok(())).unwrap();
        Some(Change::New(self.swap.swap().unwrap().new))
    }

    fn publish(&self, expected: u64, adapter: &Arc<Adapter>) -> Option<u64> {
        match self.swap.compare_and_swap(expected, Arc::clone(adapter), false) {
            Ok(done) => {
                assert_eq!((done.old, done.new), (expected, expected + 1));
                Some(done.new)
            }
            Err(Error::Swap { generation, .. }) => {
                assert!(generation > expected, "refused, although {generation} was expected");
                None
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn pin(&self) -> (u64, Arc<Adapter>) {
        let g = self.swap.pin();
        (g.number(), adapter_of(&MODULES.map(|m| (m, Arc::clone(g.layer(m).unwrap())))))
    }
}

/// The planted defects: a change in two steps, between which readers get in.
struct Torn {
    parts: [[RwLock<SharedFactor>; 2]; 2],
    /// A of both modules, then B; otherwise one module after the other.
    by_factor: bool,
    first: Arc<Adapter>,
}

impl Torn {
    fn new(first: &Arc<Adapter>, by_factor: bool) -> Self {
        let parts = MODULES.map(|m| {
            let l = first.layer(m).unwrap();
            [RwLock::new(Arc::clone(&l.a)), RwLock::new(Arc::clone(&l.b))]
        });
        Torn { parts, by_factor, first: Arc::clone(first) }
    }

    fn store(&self, adapter: &Adapter, module: usize, factor: usize) {
        let l = adapter.layer(MODULES[module]).unwrap();
        *self.parts[module][factor].write().unwrap() = Arc::clone([&l.a, &l.b][factor]);
    }
}

impl Serves for Torn {
    fn read(&self, x: &[f32], batch: bool, way: usize) -> (Option<u64>, Pair) {
        let k = Kernels::detect().unwrap();
        let [q, v] = [0, 1].map(|m| {
            let (a, b) = (self.parts[m][0].read().unwrap().clone(), self.parts[m][1].read().unwrap().clone());
            if way.is_multiple_of(3) {
                std::thread::yield_now();
            }
            answer(k, &Layer { a, b, alpha: 8.0, rslora: false }, x, batch)
        });
        (None, (q, v))
    }

    fn change(&self, adapter: &Arc<Adapter>, _: usize) -> Option<Change> {
        for i in 0..4 {
            let (module, factor) = if self.by_factor { (i % 2, i / 2) } else { (i / 2, i % 2) };
            if i == 2 {
                std::thread::yield_now();
            }
            self.store(adapter, module, factor);
        }
        None
    }

    fn publish(&self, _: u64, _: &Arc<Adapter>) -> Option<u64> {
        None
    }

    fn pin(&self) -> (u64, Arc<Adapter>) {
        (0, Arc::clone(&self.first))
    }
}

#[derive(Default)]
struct Seen {
    reads: usize,
    torn: usize,
    backwards: usize,
    /// (number, batch, pair), verified when the writers' log is whole.
    numbered: Vec<(u64, bool, Pair)>,
}

struct Outcome {
    reads: usize,
    torn: usize,
    backwards: usize,
    changes: usize,
    learned: usize,
    leaked: usize,
}

fn read_on(
    serves: &dyn Serves,
    known: &RwLock<HashSet<Pair>>,
    done: &AtomicBool,
    x: &[f32],
    me: usize,
) -> Seen {
    let (mut seen, mut last) = (Seen::default(), 0);
    while !done.load(Ordering::Relaxed) {
        let batch = seen.reads % 4 == 3;
        let (number, pair) = serves.read(x, batch, seen.reads + me);
        seen.reads += 1;
        seen.torn += usize::from(!known.read().unwrap().contains(&pair));
        if let Some(number) = number {
            seen.backwards += usize::from(number < last);
            last = number;
            if seen.numbered.last() != Some(&(number, batch, pair)) {
                seen.numbered.push((number, batch, pair));
            }
        }
    }
    seen
}

/// Eight readers, a swapper and a learner for `time`.
fn under_load(serves: &dyn Serves, versions: &[Arc<Adapter>], x: &[f32], time: Duration) -> Outcome {
    let k = Kernels::detect().unwrap();
    let known: RwLock<HashSet<Pair>> = RwLock::default();
    let learn_of = |a: &Adapter| {
        let of = answers(k, a, x);
        known.write().unwrap().extend([of.row, of.batch]);
        of
    };
    let all: Vec<Answers> = versions.iter().map(|v| learn_of(v)).collect();
    let log: Mutex<HashMap<u64, Answers>> = Mutex::new(HashMap::from([(serves.pin().0, all[0])]));
    let back: Mutex<Vec<(u64, u64)>> = Mutex::default();
    let (done, changes) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (seen, weak) = std::thread::scope(|s| {
        let readers: Vec<_> = (0..READERS)
            .map(|me| {
                s.spawn({
                    let (known, done) = (&known, &done);
                    move || read_on(serves, known, done, x, me)
                })
            })
            .collect();
        s.spawn(|| {
            for step in 0.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let i = step * 7 % versions.len();
                match serves.change(&versions[i], step) {
                    Some(Change::New(n)) => _ = log.lock().unwrap().insert(n, all[i]),
                    Some(Change::Back { new, to }) => back.lock().unwrap().push((new, to)),
                    None => (),
                }
                changes.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        let learner = s.spawn(|| {
            let mut weak: Vec<Weak<Layer>> = Vec::new();
            for step in 0u64.. {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                let (number, adapter) = serves.pin();
                let lora = MicroLora::from_adapter(&adapter, 1, Settings::default()).unwrap();
                for m in 0..MODULES.len() {
                    let t = Feedback::target(numbers(100 + step % 50, N), TargetLoss::Mse).unwrap();
                    lora.instant(m, &numbers(500 + step % 50, N), &t, None).unwrap();
                }
                let next = Arc::new(lora.adapter());
                let of = learn_of(&next);
                if let Some(n) = serves.publish(number, &next) {
                    weak.push(Arc::downgrade(next.layer(MODULES[0]).unwrap()));
                    log.lock().unwrap().insert(n, of);
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            weak
        });
        let start = Instant::now();
        while start.elapsed() < time {
            std::thread::sleep(Duration::from_millis(5));
        }
        done.store(true, Ordering::Relaxed);
        let seen: Vec<Seen> = readers.into_iter().map(|r| r.join().unwrap()).collect();
        (seen, learner.join().unwrap())
    });
    let mut log = log.into_inner().unwrap();
    for (new, to) in back.into_inner().unwrap() {
        let of = log[&to];
        log.insert(new, of);
    }
    let wrong = |&(n, batch, pair): &(u64, bool, Pair)| {
        let of = log[&n];
        pair != if batch { of.batch } else { of.row }
    };
    Outcome {
        reads: seen.iter().map(|s| s.reads).sum(),
        torn: seen.iter().map(|s| s.torn + s.numbered.iter().filter(|o| wrong(o)).count()).sum(),
        backwards: seen.iter().map(|s| s.backwards).sum(),
        changes: changes.into_inner(),
        learned: weak.len(),
        leaked: weak.iter().filter(|w| w.strong_count() > 0).count(),
    }
}

fn time() -> Duration {
    let slow = std::env::var("MICROLORA_TEST_PROFILE").is_ok_and(|p| p == "slow");
    Duration::from_secs(if slow { 10 } else { 1 })
}

fn resident() -> usize {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn every_read_is_exactly_one_generation_and_memory_returns() {
    let versions: Vec<_> = (0..16).map(version).collect();
    let (x, real) = (numbers(7, N), Real::new(&versions[0]));
    // Once before, so that stacks and thread caches of the allocator are there.
    under_load(&real, &versions, &x, Duration::from_millis(100));
    drop(real);
    let (real, before) = (Real::new(&versions[0]), resident());
    let o = under_load(&real, &versions, &x, time());
    assert_eq!((o.torn, o.backwards), (0, 0), "of {} reads and {} changes", o.reads, o.changes);
    assert!(o.changes > 100 && o.learned > 20 && o.reads > 1000, "{} {} {}", o.changes, o.learned, o.reads);
    // The active generation, the one before; not one more of the thousands.
    assert!(real.swap.live_generations() <= 2);
    assert!(o.leaked <= 2, "{} of {} learned adapters are still there", o.leaked, o.learned);
    drop(real.swap.set_active(Arc::clone(&versions[0]), false).unwrap()); // without ballast
    drop(real.swap.forget_previous());
    assert_eq!(real.swap.live_generations(), 1);
    let seen = real.seen.into_inner().unwrap();
    assert!(!seen.is_empty());
    let alive: Vec<u64> = seen.iter().filter_map(Weak::upgrade).map(|g| g.number()).collect();
    assert!(alive.iter().all(|&n| n == real.swap.generation()), "{alive:?}");
    // What the allocator keeps for its threads is up to a tenth of the first GB, of which a busy machine swaps a
    // third in this time: a leak would be all of it.
    let (grown, swapped) = (resident().saturating_sub(before), real.bytes.into_inner());
    assert!(grown < (swapped / 5).max(100 << 20), "{grown} bytes more after {swapped} were swapped");
}

#[test]
fn the_same_checker_catches_torn_reads() {
    // Equal ranks: a mix of two versions must be able to run.
    let versions: Vec<_> = (0..8)
        .map(|i| adapter_of(&[0, 1].map(|m| (MODULES[m], layer(90 + 2 * i + m as u64, 4, N, N)))))
        .collect();
    let x = numbers(7, N);
    for by_factor in [true, false] {
        let o = under_load(&Torn::new(&versions[0], by_factor), &versions, &x, Duration::from_millis(500));
        assert!(o.torn > 0, "by factor: {by_factor}: unseen in {} reads, {} changes", o.reads, o.changes);
    }
}
