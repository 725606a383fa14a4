//! What an element-wise merge takes, counted by the allocator, against what its report says.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use microlora::factor::Factor;
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::merge::{self, Family, METHODS, Source, Statistics};
use microlora::{Adapter, Dtype};

/// The system's allocator, with a count of the bytes that are out.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    PEAK.fetch_max(NOW.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: forwarded.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size.saturating_sub(layout.size()));
        NOW.fetch_sub(layout.size().saturating_sub(size), Relaxed);
        // SAFETY: forwarded.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut one = || {
        z ^= z << 13;
        z ^= z >> 7;
        z ^= z << 17;
        (z >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..n).map(|_| one() + one() + one()).collect()
}

fn source(i: u64, rows: usize, cols: usize, rank: usize, dtype: Dtype) -> Source {
    let factor = |n, seed| Factor::from_rows(&numbers(rank * n, seed), rank, n, dtype);
    let layer = Layer::new(factor(cols, 2 * i + 1), factor(rows, 2 * i + 2), 16.0, false).unwrap();
    let importance = Some((vec![1.0; cols], vec![1.0; rows]));
    Source {
        name: format!("p{i}"),
        adapter: Adapter { modules: vec![("m".into(), Arc::new(layer))], ..Adapter::default() },
        statistics: [("m".into(), Statistics { gram: None, importance })].into(),
    }
}

/// Bytes told, and bytes taken beyond inputs and result.
fn merged(sources: &[Source], method: &str, rank: usize) -> [usize; 2] {
    let k = Kernels::detect().unwrap();
    let text = format!(
        r#"{{"modules": [{{"name": "m", "parents": [0, 1, 2], "weights": [1, 1, 1], "method": "{method}", "rank": {rank}}}]}}"#
    );
    let plan = serde_json::from_str(&text).unwrap();
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let (adapter, report) = merge::merge(k, sources, &plan, &mut |_, _| Ok(())).unwrap();
    let took = PEAK.load(Relaxed) - before;
    let result = adapter.modules[0].1.memory_bytes();
    // The factors of the result are there twice while they are packed.
    [report.modules[0].bytes, took.saturating_sub(result)]
}

#[test]
fn memory_is_told_and_bounded() {
    let element = || METHODS.iter().filter(|m| m.family == Family::Element);
    assert!(element().count() >= 10);
    for (rows, cols, dtype) in [(700, 500, Dtype::F32), (300, 1500, Dtype::F16), (40, 2000, Dtype::F32)] {
        let sources: Vec<Source> = (0..3).map(|i| source(i, rows, cols, 4 + i as usize, dtype)).collect();
        for method in element() {
            let [told, took] = merged(&sources, method.name, 6);
            let name = method.name;
            assert!(took <= told + 20_000, "{name} {rows}x{cols}: told {told}, took {took}");
            assert!(told <= took + took / 3 + 100_000, "{name} {rows}x{cols}: told {told}, took {took}");
        }
    }
    // The published case: 3 x r16 at 4096 x 4096, ties. A matrix would be 67 MB.
    let sources: Vec<Source> = (0..3).map(|i| source(i, 4096, 4096, 16, Dtype::F32)).collect();
    let [told, took] = merged(&sources, "ties", 16);
    assert!(took <= told && told < 16_000_000, "told {told}, took {took}");
}
