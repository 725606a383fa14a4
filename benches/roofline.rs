//! One table: forward of many shapes against the read bandwidth of the same footprint and the FMA peak.
//!
//! `cargo bench --bench roofline [-- --smoke] [-- --isa=avx2]`; every bound is measured in the same run, just
//! before and after the kernel, and the better of the two is taken. Pages are 4 KiB unless the system maps huge ones.

use microlora::Dtype;
use microlora::factor::Factor;
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::probe;

const SHAPES: [usize; 4] = [384, 768, 2048, 4096];
const RANKS: [usize; 4] = [2, 8, 16, 64];

fn layer(dim: usize, rank: usize, dtype: Dtype) -> Layer {
    let values: Vec<f32> = (0..rank * dim).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    let factor = || Factor::from_rows(&values, rank, dim, dtype);
    Layer::new(factor(), factor(), rank as f64, false).expect("a valid layer")
}

fn best_read(bytes: usize, seconds: f64) -> f64 {
    Kernels::available().skip(1).map(|k| probe::read_gbps(k, bytes, seconds)).fold(0.0, f64::max)
}

/// Takes turns between bound and kernel, so that both see the same machine; the best of each.
fn against(turns: usize, mut bound: impl FnMut() -> f64, mut kernel: impl FnMut() -> f64) -> (f64, f64) {
    let (mut best, mut ns) = (0.0f64, f64::INFINITY);
    for _ in 0..turns {
        best = best.max(bound());
        ns = ns.min(kernel());
    }
    (best, ns)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let smoke = args.iter().any(|a| a == "--smoke");
    let isa = args.iter().find_map(|a| a.strip_prefix("--isa="));
    let seconds: f64 = if smoke { 0.0 } else { 0.04 };
    let turns = if smoke { 1 } else { 8 };
    let k = match isa {
        Some(name) => {
            Kernels::available().find(|k| k.isa().as_str() == name).expect("an ISA of this machine")
        }
        None => Kernels::detect().expect("a valid MICROLORA_ISA"),
    };
    let peak = Kernels::available().map(|k| probe::fma_gflops(k, seconds.max(0.005))).fold(0.0, f64::max);
    println!("ISA {}; FMA peak {peak:.0} GFLOP/s (best ISA)", k.isa());
    for (name, bytes) in
        [("16 KiB", 16 << 10), ("512 KiB", 512 << 10), ("8 MiB", 8 << 20), ("256 MiB", 256 << 20)]
    {
        println!("read {name:>8}: {:.0} GB/s", best_read(bytes, seconds));
    }
    println!(
        "\n{:>5} {:>5} {:>5} {:>10} {:>8} {:>8} {:>7}",
        "dim", "rank", "dtype", "ns", "GB/s", "read", "% read"
    );
    for dim in SHAPES {
        for rank in RANKS {
            for dtype in Dtype::ALL {
                let layer = layer(dim, rank, dtype);
                let bytes = probe::forward_bytes(&layer, 1);
                let (read, ns) = against(
                    turns,
                    || best_read(bytes, seconds / 8.0),
                    || probe::forward_ns(k, &layer, seconds / 4.0),
                );
                let rate = bytes as f64 / ns;
                let share = 100.0 * rate / read;
                println!(
                    "{dim:>5} {rank:>5} {:>5} {ns:>10.1} {rate:>8.1} {read:>8.1} {share:>6.0}%",
                    dtype.as_str()
                );
            }
        }
    }
    println!(
        "\n{:>5} {:>5} {:>5} {:>5} {:>10} {:>8} {:>7}",
        "dim", "rank", "dtype", "rows", "us", "GFLOP/s", "% peak"
    );
    for (dim, rank) in [(768, 8), (768, 16), (768, 64), (2048, 16), (4096, 16)] {
        for dtype in [Dtype::F32, Dtype::F16] {
            let layer = layer(dim, rank, dtype);
            for rows in [4, 32, 256] {
                let ns = probe::forward_rows_ns(k, &layer, rows, seconds);
                let rate = probe::forward_flops(&layer, rows) as f64 / ns;
                let (us, share) = (ns / 1e3, 100.0 * rate / peak);
                println!(
                    "{dim:>5} {rank:>5} {:>5} {rows:>5} {us:>10.2} {rate:>8.1} {share:>6.0}%",
                    dtype.as_str()
                );
            }
        }
    }
    cold(k, if smoke { 4 << 20 } else { 393_216_000 }, if smoke { 1 } else { 40 });
}

/// A plain list of adapters larger than L3, visited in random order; slices take turns with a read of DRAM.
fn cold(k: &Kernels, bytes: usize, turns: usize) {
    let lists = Dtype::ALL.map(|dtype| {
        let first = layer(768, 16, dtype);
        let copy =
            || Layer::new((*first.a).clone(), (*first.b).clone(), first.alpha, false).expect("a valid layer");
        (0..bytes / first.memory_bytes()).map(|_| copy()).collect::<Vec<_>>()
    });
    let stream = probe::AlignedBuffer::new(bytes);
    let (x, mut y) = (probe::AlignedBuffer::new(4 * 768), probe::AlignedBuffer::new(4 * 768));
    let slice = bytes / 32;
    let (mut read, mut best, mut z) = (0.0f64, [f64::INFINITY; 3], 1u64);
    for turn in 0..turns {
        let part = &stream.floats()[turn % 8 * slice / 4..][..slice / 4];
        let start = std::time::Instant::now();
        std::hint::black_box(k.probe_read(part));
        read = read.max(slice as f64 / start.elapsed().as_nanos() as f64);
        for (list, best) in lists.iter().zip(&mut best) {
            let visits = list.len() / 8;
            let start = std::time::Instant::now();
            for _ in 0..visits {
                z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let at = (z >> 33) as usize % list.len();
                list[at].forward(k, x.floats(), y.floats_mut(), false).expect("finite");
            }
            *best = best.min(start.elapsed().as_nanos() as f64 / visits as f64);
        }
    }
    println!(
        "\ncold list, 768 r16, {} MB per dtype, DRAM read {read:.1} GB/s, 4 KiB pages",
        bytes / 1_000_000
    );
    for ((list, ns), dtype) in lists.iter().zip(best).zip(Dtype::ALL) {
        let rate = list[0].memory_bytes() as f64 / ns;
        let (share, gain) = (100.0 * rate / read, best[0] / ns);
        println!(
            "{:>5} {} adapters {ns:>8.0} ns {rate:>6.1} GB/s {share:>4.0}% of DRAM, {gain:.2}x f32",
            dtype.as_str(),
            list.len()
        );
    }
}
