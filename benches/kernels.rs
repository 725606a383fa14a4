//! Criterion benches of the kernels: single rows, batches, learning updates and cold adapters.
//!
//! `cargo bench --bench kernels [-- FILTER]`; `-- --test` runs each body once on small data.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use microlora::Dtype;
use microlora::factor::Factor;
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::probe::{self, AlignedBuffer};

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect()
}

fn layer(dim: usize, rank: usize, dtype: Dtype) -> Layer {
    let rows = values(rank * dim);
    let factor = || Factor::from_rows(&rows, rank, dim, dtype);
    Layer::new(factor(), factor(), rank as f64, false).expect("a valid layer")
}

fn buffers(layer: &Layer, rows: usize) -> (AlignedBuffer, AlignedBuffer) {
    let mut x = AlignedBuffer::new(4 * rows * layer.in_features());
    x.floats_mut().fill(0.5);
    (x, AlignedBuffer::new(4 * rows * layer.out_features()))
}

fn forward(c: &mut Criterion) {
    let mut group = c.benchmark_group("forward");
    for k in Kernels::available() {
        for dim in [384, 768, 2048, 4096] {
            for rank in [2, 8, 16, 64] {
                for dtype in Dtype::ALL {
                    let layer = layer(dim, rank, dtype);
                    let (x, mut y) = buffers(&layer, 1);
                    group.throughput(Throughput::Bytes(probe::forward_bytes(&layer, 1) as u64));
                    let id = BenchmarkId::new(format!("{}/{dtype}", k.isa()), format!("{dim}r{rank}"));
                    group.bench_function(id, |b| {
                        b.iter(|| layer.forward(k, black_box(x.floats()), y.floats_mut(), false).unwrap());
                    });
                }
            }
        }
    }
}

fn batch(c: &mut Criterion) {
    let mut group = c.benchmark_group("batch");
    let k = Kernels::detect().expect("a valid MICROLORA_ISA");
    for (dim, rank) in [(768, 16), (2048, 16), (4096, 16), (768, 64)] {
        for dtype in [Dtype::F32, Dtype::F16] {
            let layer = layer(dim, rank, dtype);
            for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256] {
                let (x, mut y) = buffers(&layer, rows);
                group.throughput(Throughput::Elements(probe::forward_flops(&layer, rows) as u64));
                let id = BenchmarkId::new(format!("{dtype}/{dim}r{rank}"), rows);
                group.bench_function(id, |b| {
                    b.iter(|| layer.forward_rows(k, black_box(x.floats()), y.floats_mut(), false).unwrap());
                });
            }
        }
    }
}

fn learn(c: &mut Criterion) {
    let mut group = c.benchmark_group("learn");
    let k = Kernels::detect().expect("a valid MICROLORA_ISA");
    for rank in [8, 16, 64] {
        let dim = 768;
        let a = Factor::from_rows(&values(rank * dim), rank, dim, Dtype::F32);
        let mut b = a.clone();
        let (mut u, mut gain, mut pu) = (vec![0.0; rank], vec![0.0; rank], vec![0.0; rank]);
        let (x, tiny) = (values(dim), vec![1e-6; rank]);
        let target = values(dim);
        let mut e = target.clone();
        let mut p: Vec<f64> = (0..rank * rank).map(|i| if i % (rank + 1) == 0 { 0.5 } else { 0.0 }).collect();
        group.bench_function(BenchmarkId::new("rank1", rank), |bench| {
            bench.iter(|| b.rank1(k, black_box(&tiny), black_box(&x)));
        });
        group.bench_function(BenchmarkId::new("rls_gain", rank), |bench| {
            u.copy_from_slice(&values(rank));
            bench.iter(|| k.rls_gain(&mut p, black_box(&u), 1.0, &mut pu, &mut gain));
        });
        group.bench_function(BenchmarkId::new("fit_sweep", rank), |bench| {
            bench.iter(|| b.fit_sweep(k, black_box(&u), black_box(&tiny), &mut e));
        });
        group.bench_function(BenchmarkId::new("rls_event", rank), |bench| {
            bench.iter(|| {
                a.dots(k, black_box(&x), &mut u);
                k.rls_gain(&mut p, &u, 1.0, &mut pu, &mut gain);
                e.copy_from_slice(&target);
                b.fit_sweep(k, &u, &gain, &mut e)
            });
        });
    }
}

/// Adapters that no cache holds, in a plain list visited in random order; one iteration is one adapter.
fn cold(c: &mut Criterion) {
    let small = std::env::args().any(|a| a == "--test");
    let mut group = c.benchmark_group("cold");
    let k = Kernels::detect().expect("a valid MICROLORA_ISA");
    let bytes = if small { 1 << 20 } else { 393_216_000 };
    group.throughput(Throughput::Bytes(bytes as u64));
    let stream = AlignedBuffer::new(bytes);
    group.bench_function("read", |b| b.iter(|| black_box(k.probe_read(black_box(stream.floats())))));
    drop(stream);
    for dtype in Dtype::ALL {
        let first = layer(768, 16, dtype);
        let adapters: Vec<Layer> = (0..bytes / first.memory_bytes())
            .map(|_| Layer::new((*first.a).clone(), (*first.b).clone(), 16.0, false).expect("a valid layer"))
            .collect();
        let mut order: Vec<usize> = (0..adapters.len()).collect();
        let mut z = 1u64;
        for i in (1..order.len()).rev() {
            z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            order.swap(i, (z >> 33) as usize % (i + 1));
        }
        let (x, mut y) = buffers(&first, 1);
        let mut at = 0;
        group.throughput(Throughput::Bytes(first.memory_bytes() as u64));
        group.bench_function(BenchmarkId::new("768r16", dtype), |b| {
            b.iter(|| {
                at = (at + 1) % order.len();
                adapters[order[at]].forward(k, x.floats(), y.floats_mut(), false).unwrap();
            });
        });
    }
}

fn quick() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(300))
        .without_plots()
}

criterion_group! { name = benches; config = quick(); targets = forward, batch, learn, cold }
criterion_main!(benches);
