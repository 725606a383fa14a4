//! Blocks on every ISA of this machine: against float64 over the definition of each type, at awkward shapes.

use std::sync::Arc;

use microlora::dtype::Dtype;
use microlora::factor::Factor;
use microlora::kernels::{Isa, Kernels};
use microlora::low_rank::{Half, LowRank};
use microlora::quant::{BlockType, QuantLayer, QuantMatrix, Side, SideType};

/// Ranks: whole groups of rows, parts of them, both.
const ROWS: [usize; 9] = [1, 2, 3, 4, 5, 7, 8, 17, 40];

struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In [-1, 1).
    fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    fn numbers(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.number()).collect()
    }
}

fn rng(seed: u64) -> Rng {
    Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
}

/// Blocks of any bits, so that every code, scale and minimum comes up, with scales that are finite halves.
fn random_blocks(kind: BlockType, rows: usize, cols: usize, rng: &mut Rng) -> Vec<u8> {
    let mut bytes: Vec<u8> =
        (0..rows * kind.row_bytes(cols).unwrap()).map(|_| (rng.bits() >> 32) as u8).collect();
    for (i, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
        if i % 5 == 1 {
            block.fill(0xff); // the largest codes and scales
        } else if i % 5 == 3 {
            block.fill(0); // and the least
        }
        for &at in kind.row().halves {
            let half = half::f16::from_f32(rng.number() / 64.0);
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    bytes
}

fn random_matrix(kind: BlockType, rows: usize, cols: usize, seed: u64) -> QuantMatrix {
    let bytes = random_blocks(kind, rows, cols, &mut rng(seed));
    QuantMatrix::from_bytes(kind, "m", &bytes, rows, cols).unwrap()
}

/// Runs `test` for every ISA, type, number of rows and of blocks.
fn sweep(test: impl Fn(&'static Kernels, BlockType, usize, usize)) {
    for k in Kernels::available() {
        for kind in BlockType::ALL {
            for rows in ROWS {
                // From one block to more than a stretch of the batch kernels.
                for blocks in if kind.elements() == 32 { [1, 3, 8, 19] } else { [1, 2, 3, 5] } {
                    test(k, kind, rows, blocks * kind.elements());
                }
            }
        }
    }
}

/// `got` is `want` up to f32 sums of terms of size `size`.
fn close(got: &[f32], want: &[f64], size: &[f64], what: &str) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(
            error <= 3e-6 * size[i].max(1e-6),
            "{what}[{i}]: got {g}, want {w}, error {error:e} of {}",
            size[i]
        );
    }
}

/// `s w x` and the sum of the terms' magnitudes, per row.
fn dots64(w: &[f32], x: &[f32], s: f64) -> (Vec<f64>, Vec<f64>) {
    let row = |row: &[f32]| {
        let terms = || row.iter().zip(x).map(|(w, x)| s * f64::from(*w) * f64::from(*x));
        (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>())
    };
    w.chunks_exact(x.len()).map(row).unzip()
}

/// `y + sum_r c_r row_r` and the sum of the terms' magnitudes, per column.
fn combine64(w: &[f32], c: &[f32], y: &[f32], add: bool) -> (Vec<f64>, Vec<f64>) {
    let column = |j: usize| {
        let start = if add { f64::from(y[j]) } else { 0.0 };
        let terms = || c.iter().enumerate().map(|(r, c)| f64::from(*c) * f64::from(w[r * y.len() + j]));
        (start + terms().sum::<f64>(), start.abs() + terms().map(f64::abs).sum::<f64>())
    };
    (0..y.len()).map(column).unzip()
}

/// Codes and minima cancel in a number; what they are made of bounds the error of a sum.
fn widened(size: Vec<f64>, w: &[f32], x: &[f32]) -> Vec<f64> {
    let largest = w.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    let input: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
    size.into_iter().map(|s| s + 2.0 * largest * input / 16.0).collect()
}

#[test]
fn bytes_come_back_and_numbers_are_those_of_the_definition() {
    for kind in BlockType::ALL {
        for rows in ROWS {
            for blocks in [1, 2, 5] {
                let cols = blocks * kind.elements();
                let bytes = random_blocks(kind, rows, cols, &mut rng(rows as u64));
                let m = QuantMatrix::from_bytes(kind, "m", &bytes, rows, cols).unwrap();
                assert_eq!(m.to_bytes(), bytes, "{kind} {rows}x{cols}");
                let mut want = vec![0.0; rows * cols];
                kind.dequantize(&bytes, &mut want);
                assert_eq!(m.dequantize(), want);
                assert_eq!(m.memory_bytes(), bytes.len().div_ceil(64) * 64);
            }
        }
    }
}

#[test]
fn dots_match_float64_with_and_without_add() {
    sweep(|k, kind, rows, cols| {
        let m = random_matrix(kind, rows, cols, 1);
        let (w, x, before) = (m.dequantize(), rng(2).numbers(cols), rng(3).numbers(rows));
        let (want, size) = dots64(&w, &x, 1.0);
        let size = widened(size, &w, &x);
        let what = format!("{} {kind} dots {rows}x{cols}", k.isa());
        let mut out = vec![9.0; rows];
        m.dots(k, &x, &mut out, false);
        close(&out, &want, &size, &what);
        let mut out = before.clone();
        m.dots(k, &x, &mut out, true);
        let want: Vec<f64> = want.iter().zip(&before).map(|(w, b)| w + f64::from(*b)).collect();
        close(&out, &want, &size, &what);
    });
}

#[test]
fn every_element_of_a_block_meets_its_own_input() {
    // One input at a time: a wrong place, code, scale or sign of any element shows.
    for k in Kernels::available() {
        for kind in BlockType::ALL {
            let (rows, cols) = (5, 2 * kind.elements());
            let m = random_matrix(kind, rows, cols, 4);
            let w = m.dequantize();
            let scale = w.iter().fold(0f32, |a, v| a.max(v.abs()));
            for j in 0..cols {
                let mut x = vec![0.0; cols];
                x[j] = 1.0;
                let mut out = vec![9.0; rows];
                m.dots(k, &x, &mut out, false);
                for (r, got) in out.iter().enumerate() {
                    let want = w[r * cols + j];
                    assert!(
                        (got - want).abs() <= 1e-6 * scale,
                        "{} {kind} [{r}][{j}]: {got} for {want}",
                        k.isa()
                    );
                }
            }
            for r in 0..rows {
                let mut c = vec![0.0; rows];
                c[r] = 1.0;
                let mut y = vec![9.0; cols];
                m.combine(k, &c, &mut y, false);
                for (j, got) in y.iter().enumerate() {
                    let want = w[r * cols + j];
                    assert!(
                        (got - want).abs() <= 1e-6 * scale,
                        "{} {kind} [{r}][{j}]: {got} for {want}",
                        k.isa()
                    );
                }
            }
        }
    }
}

#[test]
fn combine_matches_float64_with_and_without_add() {
    sweep(|k, kind, rows, cols| {
        let m = random_matrix(kind, rows, cols, 5);
        let (w, c, before) = (m.dequantize(), rng(6).numbers(rows), rng(7).numbers(cols));
        for add in [false, true] {
            let mut y = before.clone();
            m.combine(k, &c, &mut y, add);
            let (want, size) = combine64(&w, &c, &before, add);
            let what = format!("{} {kind} combine {rows}x{cols} add={add}", k.isa());
            close(&y, &want, &widened(size, &w, &c), &what);
        }
    });
}

#[test]
fn batches_match_float64() {
    sweep(|k, kind, rows, cols| {
        if rows > 17 && cols > 512 {
            return;
        }
        let m = random_matrix(kind, rows, cols, 8);
        let w = m.dequantize();
        for n in [1, 2, 3, 4, 5, 6, 7, 25] {
            let (x, u0, y0) =
                (rng(9).numbers(n * cols), rng(10).numbers(n * rows), rng(11).numbers(n * cols));
            let what = format!("{} {kind} batch of {n}, {rows}x{cols}", k.isa());
            for add in [false, true] {
                let mut u = u0.clone();
                m.dots_batch(k, &x, &mut u, 0.5, add);
                for (i, (u, x)) in u.chunks_exact(rows).zip(x.chunks_exact(cols)).enumerate() {
                    let (mut want, size) = dots64(&w, x, 0.5);
                    if add {
                        want.iter_mut().zip(&u0[i * rows..]).for_each(|(w, u)| *w += f64::from(*u));
                    }
                    close(u, &want, &widened(size, &w, x), &what);
                }
                let mut y = y0.clone();
                m.combine_batch(k, &u0, &mut y, add);
                for (i, (y, u)) in y.chunks_exact(cols).zip(u0.chunks_exact(rows)).enumerate() {
                    let (want, size) = combine64(&w, u, &y0[i * cols..][..cols], add);
                    close(y, &want, &widened(size, &w, u), &what);
                }
            }
        }
    });
}

#[test]
fn every_isa_gives_what_the_scalar_twin_gives() {
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    sweep(|k, kind, rows, cols| {
        let m = random_matrix(kind, rows, cols, 12);
        let (w, x, c) = (m.dequantize(), rng(13).numbers(cols), rng(14).numbers(rows));
        let (mut got, mut want) = (vec![0.0; rows], vec![0.0; rows]);
        m.dots(k, &x, &mut got, false);
        m.dots(scalar, &x, &mut want, false);
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
        let (_, size) = dots64(&w, &x, 1.0);
        close(&got, &wide(&want), &widened(size, &w, &x), &format!("{} {kind} dots {rows}x{cols}", k.isa()));
        let (mut got, mut want) = (vec![0.0; cols], vec![0.0; cols]);
        m.combine(k, &c, &mut got, false);
        m.combine(scalar, &c, &mut want, false);
        let (_, size) = combine64(&w, &c, &want, false);
        close(
            &got,
            &wide(&want),
            &widened(size, &w, &c),
            &format!("{} {kind} combine {rows}x{cols}", k.isa()),
        );
    });
}

#[test]
fn long_matrices_match_float64() {
    for k in Kernels::available() {
        for kind in BlockType::ALL {
            let (rows, cols) = (16, 8192);
            let m = random_matrix(kind, rows, cols, 15);
            assert!(m.memory_bytes() > 64 << 10);
            let (w, x, c) = (m.dequantize(), rng(16).numbers(cols), rng(17).numbers(rows));
            let mut out = vec![9.0; rows];
            m.dots(k, &x, &mut out, false);
            let (want, size) = dots64(&w, &x, 1.0);
            close(&out, &want, &widened(size, &w, &x), &format!("{} {kind} long dots", k.isa()));
            let mut y = x.clone();
            m.combine(k, &c, &mut y, true);
            let (want, size) = combine64(&w, &c, &x, true);
            close(&y, &want, &widened(size, &w, &c), &format!("{} {kind} long combine", k.isa()));
        }
    }
}

fn plain(rank: usize, len: usize, seed: u64) -> Factor {
    Factor::from_rows(&rng(seed).numbers(rank * len), rank, len, Dtype::F32)
}

#[test]
fn layers_give_what_their_dequantised_layer_gives() {
    let k = Kernels::detect().unwrap();
    let types = || {
        let blocks = BlockType::ALL.map(SideType::Blocks).into_iter();
        blocks.chain(Dtype::ALL.map(SideType::Plain))
    };
    for rank in [1, 16, 32, 33] {
        for (a, b) in types().zip(types().skip(3).chain(types().take(3))) {
            for along_rank in [false, true] {
                let fits = |t: SideType| matches!(t, SideType::Blocks(k) if !k.fits(rank));
                if along_rank && fits(b) {
                    continue;
                }
                let out = if along_rank || matches!(b, SideType::Plain(_)) { 77 } else { 768 };
                let a = Side::quantize("a", &plain(rank, 512, 18), a, false).unwrap();
                let b = Side::quantize("b", &plain(rank, out, 19), b, along_rank).unwrap();
                let layer = QuantLayer::new(a, b, 8.0, rank == 16).unwrap();
                let twin = layer.dequantize().unwrap();
                assert_eq!(layer.scaling(), twin.scaling());
                let what = format!("{:?} {:?} rank {rank}", layer.a, layer.b);
                for n in [1, 5, 30] {
                    let (x, base) = (rng(20).numbers(n * 512), rng(21).numbers(n * out));
                    for add in [false, true] {
                        let (mut got, mut want) = (base.clone(), base.clone());
                        if n == 1 {
                            layer.forward(k, &x, &mut got, add).unwrap();
                            twin.forward(k, &x, &mut want, add).unwrap();
                        } else {
                            layer.forward_rows(k, &x, &mut got, add).unwrap();
                            twin.forward_rows(k, &x, &mut want, add).unwrap();
                        }
                        let size = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                        for (g, w) in got.iter().zip(&want) {
                            assert!((g - w).abs() <= 1e-5 * size, "{what} n={n} add={add}: {g} for {w}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_refused_row_leaves_the_output_alone() {
    let k = Kernels::detect().unwrap();
    for kind in BlockType::ALL {
        let to = SideType::Blocks(kind);
        let a = Side::quantize("a", &plain(4, 256, 22), to, false).unwrap();
        let b = Side::quantize("b", &plain(4, 256, 23), to, false).unwrap();
        let layer = QuantLayer::new(a, b, 4.0, false).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 100, 255] {
                let mut x = rng(24).numbers(256);
                x[at] = bad;
                let mut y = vec![7.0; 256];
                let e = layer.forward(k, &x, &mut y, false).unwrap_err();
                assert!(e.to_string().starts_with("x: "), "{e}");
                let mut rows = rng(25).numbers(3 * 256);
                rows[512 + at] = bad;
                let mut ys = vec![7.0; 3 * 256];
                let e = layer.forward_rows(k, &rows, &mut ys, true).unwrap_err();
                assert!(e.to_string().contains("row 2"), "{e}");
                assert!(y.iter().chain(&ys).all(|&v| v == 7.0));
            }
        }
        assert!(layer.forward(k, &[0.0; 255], &mut [0.0; 256], false).is_err());
        assert!(layer.forward(k, &[0.0; 256], &mut [0.0; 255], false).is_err());
    }
}

#[test]
fn wrong_bytes_are_refused_before_use() {
    for kind in BlockType::ALL {
        let n = kind.elements();
        let good = random_blocks(kind, 2, 2 * n, &mut rng(26));
        let refused = |bytes: &[u8], rows, cols| {
            let e = QuantMatrix::from_bytes(kind, "lora_a", bytes, rows, cols).unwrap_err().to_string();
            assert!(e.starts_with("lora_a: "), "{e}");
            e
        };
        refused(&good[1..], 2, 2 * n);
        refused(&good, 2, 2 * n - 1);
        refused(&good, 3, 2 * n);
        refused(&[], 0, n);
        refused(&[], 1, 0);
        refused(&good, usize::MAX, 2 * n);
        refused(&good, usize::MAX / 2, usize::MAX / n * n);
        for &at in kind.row().halves {
            for bad in [0x7c00u16, 0xfc00, 0x7e00, 0x7c01] {
                let mut bytes = good.clone();
                let block = 3 * kind.block_bytes();
                bytes[block + at..block + at + 2].copy_from_slice(&bad.to_le_bytes());
                let e = refused(&bytes, 2, 2 * n);
                assert!(e.contains("block 1 of row 1"), "{e}");
            }
        }
    }
}

#[test]
fn ranks_and_dimensions_must_agree() {
    let side = |rank| Side::Plain(plain(rank, 64, 27));
    assert!(QuantLayer::new(side(3), side(4), 1.0, false).is_err());
    assert!(QuantLayer::new(side(3), side(3), f64::NAN, false).is_err());
    let layer = Arc::new(QuantLayer::new(side(3), side(3), 6.0, false).unwrap());
    assert_eq!((layer.rank(), layer.in_features(), layer.out_features(), layer.scaling()), (3, 64, 64, 2.0));
    assert_eq!(layer.a.len(), 64);
    assert!("q9_0".parse::<SideType>().unwrap_err().to_string().contains("q4_k"));
    assert_eq!("bf16".parse::<SideType>().unwrap(), SideType::Plain(Dtype::Bf16));
}
