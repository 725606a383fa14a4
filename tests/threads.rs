//! Many threads read while one learns: every read must be one whole version, and the test must be able to fail.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use microlora::learn::{Feedback, TargetLoss};
use microlora::micro_lora::{ModuleSpec, Settings};
use microlora::{Dtype, MicroLora};

const N: usize = 96;
const STEPS: usize = 400;
const READERS: usize = 3;

fn spec(dtype: Dtype) -> ModuleSpec {
    ModuleSpec {
        name: "q_proj".into(),
        in_features: N,
        out_features: N,
        rank: 8,
        alpha: 16.0,
        rslora: false,
        dtype,
    }
}

fn numbers(seed: u64) -> Vec<f32> {
    let mut rng = microlora::rng::Rng::new(seed, 9);
    (0..N).map(|_| rng.symmetric(1.0)).collect()
}

/// Something that serves and learns.
trait Serves: Sync {
    fn read(&self, x: &[f32]) -> Vec<u32>;
    fn learn(&self, step: usize);
}

struct Whole(MicroLora);

impl Whole {
    fn new(dtype: Dtype) -> Self {
        Whole(MicroLora::new(&[spec(dtype)], 3, Settings::default()).unwrap())
    }
}

impl Serves for Whole {
    fn read(&self, x: &[f32]) -> Vec<u32> {
        // Half of the reads as a batch on a shared version, half under the lock.
        let mut y = vec![0.0; 2 * N];
        let (layer, _) = self.0.layer(0);
        layer.forward_rows(self.0.kernels(), &[x, x].concat(), &mut y, false).unwrap();
        let mut one = vec![0.0; N];
        self.0.forward(0, x, &mut one, false).unwrap();
        assert!(y[..N] == y[N..], "two rows of one batch saw two versions");
        let pick = if y[0] > 0.0 { &y[..N] } else { &one[..] };
        pick.iter().map(|v| v.to_bits()).collect()
    }

    fn learn(&self, step: usize) {
        let target = Feedback::target(numbers(100 + step as u64), TargetLoss::Mse).unwrap();
        self.0.instant(0, &numbers(1000 + step as u64), &target, None).unwrap();
    }
}

/// The planted defect: the output is kept number by number and rewritten without any lock.
struct Torn {
    inner: Whole,
    x: Vec<f32>,
    shown: Vec<AtomicU32>,
}

impl Torn {
    fn new() -> Self {
        Torn {
            inner: Whole::new(Dtype::F32),
            x: numbers(7),
            shown: (0..N).map(|_| AtomicU32::new(0)).collect(),
        }
    }
}

impl Serves for Torn {
    fn read(&self, _: &[f32]) -> Vec<u32> {
        self.shown.iter().map(|v| v.load(Ordering::Relaxed)).collect()
    }

    fn learn(&self, step: usize) {
        self.inner.learn(step);
        for (i, (to, from)) in self.shown.iter().zip(self.inner.read(&self.x)).enumerate() {
            to.store(from, Ordering::Relaxed);
            if i % 16 == 0 {
                std::thread::yield_now();
            }
        }
    }
}

/// Lets the readers get in between: a learner of microseconds would be done before they start.
fn await_more(reads: &AtomicUsize) {
    let before = reads.load(Ordering::Relaxed);
    while reads.load(Ordering::Relaxed) == before {
        std::thread::yield_now();
    }
}

/// Reads that equal no version, out of all reads.
fn torn_reads(serves: &dyn Serves, versions: &HashSet<Vec<u32>>, x: &[f32]) -> (usize, usize) {
    let (done, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        let readers: Vec<_> = (0..READERS)
            .map(|_| {
                s.spawn(|| {
                    let mut torn = 0;
                    while !done.load(Ordering::Relaxed) {
                        torn += usize::from(!versions.contains(&serves.read(x)));
                        reads.fetch_add(1, Ordering::Relaxed);
                    }
                    torn
                })
            })
            .collect();
        for step in 0..STEPS {
            if step % 4 == 0 {
                await_more(&reads);
            }
            serves.learn(step);
        }
        done.store(true, Ordering::Relaxed);
        (readers.into_iter().map(|r| r.join().unwrap()).sum(), reads.load(Ordering::Relaxed))
    })
}

/// Outputs of every version, from a run of one thread.
fn versions(serves: &dyn Serves, x: &[f32]) -> HashSet<Vec<u32>> {
    let mut seen = HashSet::from([serves.read(x)]);
    for step in 0..STEPS {
        serves.learn(step);
        seen.insert(serves.read(x));
    }
    seen
}

#[test]
fn every_read_is_one_whole_version() {
    let x = numbers(7);
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut known = versions(&Whole::new(dtype), &x);
        // A batch and a single row may round differently; both are whole versions.
        let serial = Whole::new(dtype);
        for step in 0..=STEPS {
            let mut y = vec![0.0; N];
            serial.0.forward(0, &x, &mut y, false).unwrap();
            known.insert(y.iter().map(|v| v.to_bits()).collect());
            let (layer, _) = serial.0.layer(0);
            let mut two = vec![0.0; 2 * N];
            layer.forward_rows(serial.0.kernels(), &[&x[..], &x[..]].concat(), &mut two, false).unwrap();
            known.insert(two[..N].iter().map(|v| v.to_bits()).collect());
            if step < STEPS {
                serial.learn(step);
            }
        }
        let (torn, all) = torn_reads(&Whole::new(dtype), &known, &x);
        assert_eq!(torn, 0, "{torn} of {all} reads were no whole version ({dtype})");
    }
}

#[test]
fn the_same_test_catches_a_version_that_is_not_atomic() {
    let torn = Torn::new();
    let x = torn.x.clone();
    let known = versions(&Torn::new(), &x);
    let (bad, all) = torn_reads(&torn, &known, &x);
    assert!(bad > 0, "the planted defect went unseen in {all} reads");
}

#[test]
fn restore_is_atomic_over_modules() {
    let specs: Vec<ModuleSpec> =
        ["q_proj", "v_proj"].iter().map(|n| ModuleSpec { name: (*n).into(), ..spec(Dtype::F32) }).collect();
    let lora = MicroLora::new(&specs, 1, Settings::default()).unwrap();
    let same = |step: u64| {
        for m in 0..2 {
            let t = Feedback::target(numbers(50 + step), TargetLoss::Mse).unwrap();
            lora.instant(m, &numbers(60 + step), &t, None).unwrap();
        }
    };
    let mut snapshots = Vec::new();
    for step in 0..8 {
        same(step);
        snapshots.push(lora.snapshot());
    }
    let pair = || {
        let (layers, _) = lora.layers(&[0, 1]);
        layers.iter().map(|l| l.b.to_bits(false)).collect::<Vec<_>>()
    };
    let known: HashSet<Vec<Vec<u8>>> = snapshots
        .iter()
        .map(|s| {
            lora.restore(s).unwrap();
            pair()
        })
        .collect();
    let (done, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|s| {
        let reader = s.spawn(|| {
            let mut mixed = 0;
            while !done.load(Ordering::Relaxed) {
                mixed += usize::from(!known.contains(&pair()));
                reads.fetch_add(1, Ordering::Relaxed);
            }
            mixed
        });
        for i in 0..400 {
            if i % 4 == 0 {
                await_more(&reads);
            }
            lora.restore(&snapshots[i * 5 % 8]).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(reader.join().unwrap(), 0, "two modules of two versions");
    });
}
