//! What a reservoir and a pattern bank take, counted by the allocator, against what they say.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use microlora::Dtype;
use microlora::learn::{Feedback, TargetLoss};
use microlora::replay::{PatternBank, Reservoir, Sample, Settings};
use microlora::rng::Rng;

/// The system's allocator, with a count of the bytes that are out.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NOW.fetch_add(layout.size(), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        NOW.fetch_add(size, Relaxed);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn sample(event: u64, width: usize) -> Sample {
    let mut rng = Rng::new(1, event);
    let mut v = || (0..width).map(|_| rng.symmetric(1.0)).collect::<Vec<f32>>();
    let feedback = match event % 3 {
        0 => Feedback::target(v(), TargetLoss::Mse),
        1 => Feedback::reward(1.0, v()),
        _ => Feedback::preference(v(), v(), 0.9, 2.0),
    };
    Sample {
        event,
        module: None,
        x: v(),
        base: event.is_multiple_of(2).then(v),
        feedback: Arc::new(feedback.unwrap()),
        quality: None,
        weight: 1.0,
        advantage: 0.0,
    }
}

fn within(what: &str, said: usize, counted: usize, share: f64) {
    let ratio = said as f64 / counted as f64;
    assert!((ratio - 1.0).abs() < share, "{what}: says {said}, the allocator {counted}");
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn memory_bytes_are_those_of_the_allocator() {
    for dtype in [Dtype::F32, Dtype::F16] {
        for (width, share) in [(768, 0.01), (64, 0.05), (4, 0.25)] {
            for balance in [false, true] {
                let before = NOW.load(Relaxed);
                let mut r = Box::new(
                    Reservoir::new(Settings {
                        capacity: 300,
                        max_bytes: None,
                        dtype,
                        holdout: 0.1,
                        balance,
                        seed: 3,
                    })
                    .unwrap(),
                );
                let stored = vec![0.25; width];
                for (offers, name) in [(1..=200u64, "filling"), (201..=3000, "full")] {
                    offers.for_each(|e| drop(r.offer(&sample(e, width), &stored, (e % 5) as u32)));
                    let held = stored.capacity() * 4;
                    let counted = NOW.load(Relaxed) - before - held;
                    within(&format!("{dtype} {width} {name}"), r.memory_bytes(), counted, share);
                }
                let copy = Reservoir::from_tensors("", &r.to_tensors("")).unwrap();
                within("copy", copy.memory_bytes(), r.memory_bytes(), 0.05);
            }
        }
    }
    let before = NOW.load(Relaxed);
    let mut bank = Box::new(PatternBank::new(32, 0.99, 256).unwrap());
    for e in 0..500 {
        bank.observe(&sample(e, 256).x, None);
    }
    within("bank", bank.memory_bytes(), NOW.load(Relaxed) - before, 0.01);
}
