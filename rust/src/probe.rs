//! Timing for benches: what the machine can do at most, and how near a layer comes to it.
//!
//! Every figure is the best of many short samples, so that other work on the machine counts least.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::adapter::Adapter;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::swap::HotSwap;

/// Long against the clock's resolution, short against a time slice of the scheduler.
const SAMPLE: Duration = Duration::from_micros(40);

/// Nanoseconds per call of `f`: the minimum over samples of about 40 us during `seconds` (at least 5 samples).
pub fn min_ns(seconds: f64, mut f: impl FnMut()) -> f64 {
    let mut calls = 1u32;
    loop {
        let start = Instant::now();
        for _ in 0..calls {
            f();
        }
        if start.elapsed() >= SAMPLE || calls >= 1 << 24 {
            break;
        }
        calls *= 2;
    }
    let (mut best, mut samples) = (f64::INFINITY, 0);
    let begin = Instant::now();
    while samples < 5 || begin.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        for _ in 0..calls {
            f();
        }
        best = best.min(start.elapsed().as_nanos() as f64 / f64::from(calls));
        samples += 1;
    }
    best
}

/// Read bandwidth in GB/s (10^9 bytes) over a buffer of `bytes`, read front to back again and again.
pub fn read_gbps(k: &Kernels, bytes: usize, seconds: f64) -> f64 {
    let buffer = AlignedBuffer::new(bytes);
    bytes as f64 / min_ns(seconds, || _ = black_box(k.probe_read(black_box(buffer.floats()))))
}

/// Peak of register-only FMA chains in GFLOP/s.
pub fn fma_gflops(k: &Kernels, seconds: f64) -> f64 {
    let mut flops = 0.0;
    let ns = min_ns(seconds, || flops = k.probe_fma(black_box(1000)));
    flops / ns
}

/// Nanoseconds of one warm [`Layer::forward`] into a buffer.
pub fn forward_ns(k: &Kernels, layer: &Layer, seconds: f64) -> f64 {
    forward_rows_ns(k, layer, 1, seconds)
}

/// Nanoseconds of one warm [`Layer::forward_rows`] ([`Layer::forward`] for one row).
pub fn forward_rows_ns(k: &Kernels, layer: &Layer, rows: usize, seconds: f64) -> f64 {
    let (mut x, mut y) = (
        AlignedBuffer::new(4 * rows * layer.in_features()),
        AlignedBuffer::new(4 * rows * layer.out_features()),
    );
    x.floats_mut().fill(0.5);
    min_ns(seconds, || {
        let (x, y) = (black_box(x.floats()), black_box(y.floats_mut()));
        let done = if rows == 1 { layer.forward(k, x, y, false) } else { layer.forward_rows(k, x, y, false) };
        done.expect("sizes match and every number is finite");
    })
}

/// Bytes of the weights, of x and of y that one forward of `rows` rows touches.
pub fn forward_bytes(layer: &Layer, rows: usize) -> usize {
    layer.memory_bytes() + 4 * rows * (layer.in_features() + layer.out_features())
}

/// Floating point operations of one forward of `rows` rows.
pub fn forward_flops(layer: &Layer, rows: usize) -> usize {
    2 * rows * layer.param_count()
}

/// f32 buffer that starts on a cache line, as a factor does.
pub struct AlignedBuffer(Vec<Line>, usize);

#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([f32; 16]);

impl AlignedBuffer {
    /// `bytes / 4` zeros, every page written.
    pub fn new(bytes: usize) -> Self {
        let mut lines = vec![Line([0.0; 16]); bytes.div_ceil(64)];
        black_box(&mut lines).fill(Line([0.0; 16]));
        AlignedBuffer(lines, bytes / 4)
    }

    /// The numbers.
    pub fn floats(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.0)[..self.1]
    }

    /// The numbers, writable.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.0)[..self.1]
    }
}

/// What [`swap_ns`] measured, in nanoseconds: (median, 99th percentile).
#[derive(Clone, Copy, Debug, Default)]
pub struct SwapTimes {
    /// `HotSwap::swap`.
    pub swap: (f64, f64),
    /// Freeing what it retired, where the weights live on elsewhere.
    pub free: (f64, f64),
    /// Load of the generation and [`Layer::forward`] of the adapter's first module.
    pub read: (f64, f64),
    /// Preparations and swaps together.
    pub swaps_per_second: f64,
}

/// Times swaps one by one, and reads by `readers` threads meanwhile; the clock's own time is in every figure.
///
/// # Errors
/// An adapter that a [`HotSwap`] refuses.
pub fn swap_ns(adapter: &Arc<Adapter>, readers: usize, swapping: bool, seconds: f64) -> Result<SwapTimes> {
    let manager = HotSwap::new(true)?;
    drop(manager.set_active(Arc::clone(adapter), false)?);
    let slot = manager.slot(&adapter.modules[0].0)?;
    let done = AtomicBool::new(false);
    let read = || {
        let layer = Arc::clone(manager.load().slot(slot).expect("every version has it"));
        let (mut x, mut y) =
            (AlignedBuffer::new(4 * layer.in_features()), AlignedBuffer::new(4 * layer.out_features()));
        x.floats_mut().fill(0.5);
        let mut times = Vec::with_capacity(MOST_TIMES);
        while !done.load(Ordering::Relaxed) {
            let start = Instant::now();
            let generation = manager.load();
            let layer = generation.slot(slot).expect("every version has it");
            let result =
                layer.forward(manager.kernels(), black_box(x.floats()), black_box(y.floats_mut()), false);
            result.expect("sizes match and every number is finite");
            drop(generation);
            let spent = start.elapsed().as_nanos() as f64;
            if times.len() < MOST_TIMES {
                times.push(spent);
            }
        }
        times
    };
    let (mut swaps, mut frees) = (Vec::with_capacity(MOST_TIMES), Vec::with_capacity(MOST_TIMES));
    let (mut reads, mut count) = (Vec::new(), 0u32);
    let mut spent = 0.0;
    std::thread::scope(|s| -> Result<()> {
        let running: Vec<_> = (0..readers).map(|_| s.spawn(read)).collect();
        let begin = Instant::now();
        let mut swap = || -> Result<()> {
            while begin.elapsed().as_secs_f64() < seconds {
                if !swapping {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let ticket = manager.ticket();
                drop(manager.install(Arc::clone(adapter), ticket, false)?);
                let start = Instant::now();
                let done = manager.swap()?;
                let swapped = start.elapsed();
                drop(done);
                count += 1;
                if swaps.len() < MOST_TIMES {
                    swaps.push(swapped.as_nanos() as f64);
                    frees.push((start.elapsed() - swapped).as_nanos() as f64);
                }
            }
            Ok(())
        };
        let result = swap();
        spent = begin.elapsed().as_secs_f64();
        done.store(true, Ordering::Relaxed);
        for r in running {
            reads.extend(r.join().expect("a reader does not panic"));
        }
        result
    })?;
    let rate = f64::from(count) / spent;
    Ok(SwapTimes { swap: spread(swaps), free: spread(frees), read: spread(reads), swaps_per_second: rate })
}

/// Times kept per thread.
const MOST_TIMES: usize = 1 << 21;

/// Median and 99th percentile; zeros of nothing.
fn spread(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| times.get(((times.len() as f64 * share) as usize).min(times.len().max(1) - 1));
    (at(0.5).copied().unwrap_or(0.0), at(0.99).copied().unwrap_or(0.0))
}
