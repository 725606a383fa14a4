//! Every ISA of this machine against a float64 reference, at awkward lengths and ranks.

use microlora::Dtype;
use microlora::factor::Factor;
use microlora::kernels::{AdamStep, Isa, Kernels};

const LENGTHS: [usize; 14] = [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 97, 255, 256, 257];
const RANKS: [usize; 9] = [1, 2, 3, 5, 8, 12, 16, 64, 256];

/// Numbers in [-1, 1), the same on every run.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            z ^= z << 13;
            z ^= z >> 7;
            z ^= z << 17;
            (z >> 40) as f32 / 8_388_608.0 - 1.0
        })
        .collect()
}

fn close(got: &[f32], want: &[f64], scale: f64, what: &str) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(error <= 2e-6 * scale.max(1.0), "{what}[{i}]: got {g}, want {w}");
    }
}

/// Runs `test` for every ISA, dtype, rank and length.
fn sweep(test: impl Fn(&'static Kernels, Dtype, usize, usize)) {
    let isas: Vec<_> = Kernels::available().collect();
    eprintln!("ISAs tested: {}", isas.iter().map(|k| k.isa().as_str()).collect::<Vec<_>>().join(", "));
    for k in isas {
        for dtype in Dtype::ALL {
            for rank in RANKS {
                for len in LENGTHS {
                    test(k, dtype, rank, len);
                }
            }
        }
    }
}

fn dot64(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

#[test]
fn dots_match_float64() {
    sweep(|k, dtype, rank, len| {
        let f = Factor::from_rows(&numbers(rank * len, 1), rank, len, dtype);
        let (w, x) = (f.to_f32(false), numbers(len, 2));
        let mut out = vec![9.0; rank];
        f.dots(k, &x, &mut out);
        let want: Vec<f64> = w.chunks_exact(len).map(|row| dot64(row, &x)).collect();
        close(&out, &want, len as f64, &format!("{} {dtype} dots {rank}x{len}", k.isa()));
    });
}

#[test]
fn combine_matches_float64_with_and_without_add() {
    sweep(|k, dtype, rank, len| {
        let f = Factor::from_rows(&numbers(rank * len, 3), rank, len, dtype);
        let (w, c, y0) = (f.to_f32(true), numbers(rank, 4), numbers(len, 5));
        for add in [false, true] {
            let mut y = y0.clone();
            f.combine(k, &c, &mut y, add);
            let want: Vec<f64> = w
                .chunks_exact(rank)
                .zip(&y0)
                .map(|(column, y)| dot64(column, &c) + if add { f64::from(*y) } else { 0.0 })
                .collect();
            close(&y, &want, rank as f64, &format!("{} {dtype} combine {rank}x{len} add={add}", k.isa()));
        }
    });
}

#[test]
fn batches_equal_row_by_row() {
    sweep(|k, dtype, rank, len| {
        let f = Factor::from_rows(&numbers(rank * len, 6), rank, len, dtype);
        for rows in [1, 2, 3, 5, 6, 7, 13] {
            let (x, y0) = (numbers(rows * len, 7), numbers(rows * len, 8));
            let mut u = vec![9.0; rows * rank];
            f.dots_batch(k, &x, &mut u, 0.5);
            let what = format!("{} {dtype} batch {rows}x{rank}x{len}", k.isa());
            for (m, u) in u.chunks_exact(rank).enumerate() {
                let mut one = vec![0.0; rank];
                f.dots(k, &x[m * len..(m + 1) * len], &mut one);
                let want: Vec<f64> = one.iter().map(|v| 0.5 * f64::from(*v)).collect();
                close(u, &want, len as f64, &what);
            }
            for add in [false, true] {
                let mut y = y0.clone();
                f.combine_batch(k, &u, &mut y, add);
                for m in 0..rows {
                    let mut one = y0[m * len..(m + 1) * len].to_vec();
                    f.combine(k, &u[m * rank..(m + 1) * rank], &mut one, add);
                    let want: Vec<f64> = one.iter().map(|v| f64::from(*v)).collect();
                    close(&y[m * len..(m + 1) * len], &want, (rank * len) as f64, &what);
                }
            }
        }
    });
}

#[test]
fn rank1_and_fit_sweep_match_float64_and_keep_the_padding_zero() {
    for k in Kernels::available() {
        for rank in RANKS {
            for len in LENGTHS {
                let rows = numbers(rank * len, 9);
                let (u, gain) = (numbers(rank, 10), numbers(rank, 11));
                let target = numbers(len, 12);
                let what = format!("{} {rank}x{len}", k.isa());

                let mut f = Factor::from_rows(&rows, rank, len, Dtype::F32);
                f.rank1(k, &gain, &target);
                let want: Vec<f64> = (0..rank * len)
                    .map(|i| f64::from(rows[i]) + f64::from(gain[i / len]) * f64::from(target[i % len]))
                    .collect();
                close(&f.to_f32(false), &want, 1.0, &format!("rank1 {what}"));

                let mut f = Factor::from_rows(&rows, rank, len, Dtype::F32);
                let mut e = target.clone();
                let loss = f.fit_sweep(k, &u, &gain, &mut e);
                let error: Vec<f64> = (0..len)
                    .map(|c| {
                        let y: f64 = (0..rank).map(|r| f64::from(u[r]) * f64::from(rows[r * len + c])).sum();
                        f64::from(target[c]) - y
                    })
                    .collect();
                close(&e, &error, rank as f64, &format!("fit_sweep error {what}"));
                let want: Vec<f64> = (0..rank * len)
                    .map(|i| f64::from(rows[i]) + f64::from(gain[i / len]) * error[i % len])
                    .collect();
                close(&f.to_f32(false), &want, rank as f64, &format!("fit_sweep weights {what}"));
                let total: f64 = error.iter().map(|e| e * e).sum();
                assert!((f64::from(loss) - total).abs() <= 1e-5 * total.max(1.0), "{what}: {loss} {total}");
                let stored: f32 = f.stream().iter().map(|v| v.abs()).sum();
                let shown: f32 = f.to_f32(false).iter().map(|v| v.abs()).sum();
                assert!((stored - shown).abs() <= 1e-4 * shown.max(1.0), "padding moved: {what}");
            }
        }
    }
}

#[test]
fn elementwise_pieces_match_float64() {
    for k in Kernels::available() {
        for len in [0, 1, 7, 15, 16, 17, 97, 1000] {
            let (a, b) = (numbers(len, 13), numbers(len, 14));
            assert!((f64::from(k.dot(&a, &b)) - dot64(&a, &b)).abs() <= 1e-6 * (len as f64).max(1.0));
            let mut y = b.clone();
            k.axpy(0.3, &a, &mut y);
            let want: Vec<f64> = a.iter().zip(&b).map(|(a, b)| f64::from(*b) + 0.3 * f64::from(*a)).collect();
            close(&y, &want, 1.0, "axpy");
            assert!(k.all_finite(&a));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in 0..len {
                    let mut x = a.clone();
                    x[at] = bad;
                    assert!(!k.all_finite(&x), "{} missed {bad} at {at}", k.isa());
                }
            }
        }
    }
}

#[test]
fn rls_gain_matches_float64_and_stays_symmetric() {
    for k in Kernels::available() {
        for r in [1, 2, 3, 8, 16, 33, 64] {
            let mut p: Vec<f64> = (0..r * r).map(|i| if i % (r + 1) == 0 { 0.5 } else { 0.0 }).collect();
            let (mut pu, mut gain) = (vec![0.0; r], vec![0.0; r]);
            for step in 0..20 {
                let u = numbers(r, 20 + step);
                let before = p.clone();
                let uk = k.rls_gain(&mut p, &u, 0.98, &mut pu, &mut gain);
                let pu64: Vec<f64> =
                    (0..r).map(|i| (0..r).map(|j| before[i * r + j] * f64::from(u[j])).sum()).collect();
                let d = 0.98 + pu64.iter().zip(&u).map(|(p, u)| p * f64::from(*u)).sum::<f64>();
                let want: Vec<f64> = pu64.iter().map(|p| p / d).collect();
                close(&gain, &want, 1.0, "gain");
                assert!((uk - (d - 0.98) / d).abs() < 1e-12);
                for i in 0..r {
                    for j in 0..r {
                        let want = (before[i * r + j] - pu64[i] * pu64[j] / d) / 0.98;
                        assert!((p[i * r + j] - want).abs() < 1e-11);
                        assert!(p[i * r + j] == p[j * r + i], "P lost its symmetry");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_survive_packing_both_ways() {
    for dtype in Dtype::ALL {
        for (rank, len) in [(1, 1), (3, 17), (8, 16), (9, 31), (16, 97)] {
            let f = Factor::from_rows(&numbers(rank * len, 15), rank, len, dtype);
            for transposed in [false, true] {
                let bits = f.to_bits(transposed);
                assert_eq!(Factor::from_bits(&bits, rank, len, dtype, transposed).unwrap(), f);
                let mut written = Vec::new();
                f.write_bits(transposed, &mut written).unwrap();
                assert!(written == bits, "{rank} x {len} {dtype} {transposed}");
                // By the definition: row-major numbers, or those of the transpose.
                let size = dtype.size();
                let row_major = f.to_bits(false);
                let at = |r: usize, c: usize| if transposed { c * rank + r } else { r * len + c };
                for (r, c) in (0..rank).flat_map(|r| (0..len).map(move |c| (r, c))) {
                    assert_eq!(bits[at(r, c) * size..][..size], row_major[(r * len + c) * size..][..size]);
                }
                for at in [0, rank * len - 1, rank * len / 2] {
                    let mut bad = bits.clone();
                    bad[at * size + size - 2..][..2].copy_from_slice(&[0x80, 0x7f]);
                    let bad = Factor::from_bits(&bad, rank, len, dtype, transposed).unwrap();
                    assert!(!bad.is_finite(), "{dtype}: 0x7f80 is NaN or infinity in all three");
                }
            }
        }
    }
}

#[test]
fn every_detected_isa_is_found_by_name() {
    assert!(Kernels::for_isa(Isa::Scalar).is_some());
    assert!(Kernels::available().any(|k| k.isa() == Kernels::detect().unwrap().isa()));
}

#[test]
fn rows_without_columns_sum_to_zero() {
    for k in Kernels::available() {
        for dtype in Dtype::ALL {
            for rank in [1, 8, 9] {
                let f = Factor::zeros(rank, 0, dtype);
                let mut out = vec![9.0; rank];
                f.dots(k, &[], &mut out);
                assert!(out.iter().all(|&v| v == 0.0), "{} {dtype} {rank}", k.isa());
                let mut u = vec![9.0; 7 * rank];
                f.dots_batch(k, &[], &mut u, 1.0);
                assert!(u.iter().all(|&v| v == 0.0), "{} {dtype} {rank} in batches", k.isa());
                f.combine(k, &out, &mut [], true);
                f.combine_batch(k, &u, &mut [], false);
            }
        }
    }
}

#[test]
fn outer_batch_matches_float64_and_keeps_the_padding_zero() {
    for k in Kernels::available() {
        for rank in RANKS {
            for len in LENGTHS {
                for rows in [0, 1, 5, 33] {
                    let start = numbers(rank * len, 11);
                    let mut f = Factor::from_rows(&start, rank, len, Dtype::F32);
                    let (coef, v) = (numbers(rows * rank, 12), numbers(rows * len, 13));
                    f.outer_batch(k, &coef, &v);
                    let mut want: Vec<f64> = start.iter().map(|&v| v.into()).collect();
                    for (coef, v) in coef.chunks_exact(rank).zip(v.chunks_exact(len)) {
                        for (row, &c) in want.chunks_exact_mut(len).zip(coef) {
                            for (w, &v) in row.iter_mut().zip(v) {
                                *w += f64::from(c) * f64::from(v);
                            }
                        }
                    }
                    let what = format!("{} outer {rank}x{len}, {rows} rows", k.isa());
                    close(&f.to_f32(false), &want, rows as f64, &what);
                    let stored: f64 = f.stream().iter().map(|&v| f64::from(v).abs()).sum();
                    let shown: f64 = f.to_f32(false).iter().map(|&v| f64::from(v).abs()).sum();
                    assert!((stored - shown).abs() <= 1e-9 * shown.max(1.0), "{what}: padding");
                }
            }
        }
    }
}

#[test]
fn moved_rows_unpack_and_weigh() {
    for k in Kernels::available() {
        for rank in RANKS {
            for len in LENGTHS {
                let (w, th, d) = (numbers(rank * len, 71), numbers(rank * len, 72), numbers(len, 73));
                let [pw, pth] = [&w, &th].map(|v| Factor::from_rows(v, rank, len, Dtype::F32));
                for swap in [false, true] {
                    let (mut first, mut second) = (vec![9.0; rank * len], vec![9.0; rank * len]);
                    let out = [&mut first[..], &mut second[..]];
                    k.moved_rows(pw.geometry(), [pw.stream(), pth.stream()], &d, out, swap);
                    for i in 0..rank * len {
                        let (moved, by) = ((w[i] - th[i]) * d[i % len], d[i % len]);
                        let want = if swap { (w[i] * by, moved) } else { (moved, th[i] * by) };
                        let close = |a: f32, b: f32| (a - b).abs() <= 1e-6;
                        assert!(close(first[i], want.0) && close(second[i], want.1), "{} {i}", k.isa());
                    }
                }
            }
        }
    }
}

#[test]
fn optimiser_steps_match_float64() {
    let (b1, b2, lr, wd, eps, grad) = (0.9f64, 0.999f64, 0.01f64, 0.1f64, 1e-8f64, 0.25f64);
    for k in Kernels::available() {
        for n in LENGTHS {
            let (mut w, mut m, mut v) = (numbers(n, 21), vec![0.0; n], vec![0.0; n]);
            let mut w64: Vec<f64> = w.iter().map(|&v| v.into()).collect();
            let (mut m64, mut v64) = (vec![0.0f64; n], vec![0.0f64; n]);
            for t in 1..=5 {
                let mut g = numbers(n, 30 + t as u64);
                for i in 0..n {
                    let d = grad * f64::from(g[i]);
                    m64[i] = b1 * m64[i] + (1.0 - b1) * d;
                    v64[i] = b2 * v64[i] + (1.0 - b2) * d * d;
                    let root = (v64[i] / (1.0 - b2.powi(t))).sqrt() + eps;
                    w64[i] = (1.0 - lr * wd) * w64[i] - lr * m64[i] / (1.0 - b1.powi(t)) / root;
                }
                let step = AdamStep {
                    gradient: grad as f32,
                    beta1: b1 as f32,
                    beta2: b2 as f32,
                    keep: (1.0 - lr * wd) as f32,
                    rate: (lr / (1.0 - b1.powi(t))) as f32,
                    unbias: (1.0 / (1.0 - b2.powi(t)).sqrt()) as f32,
                    eps: eps as f32,
                };
                k.adamw(&step, &mut g, &mut m, &mut v, &mut w);
                assert!(g.iter().all(|&g| g == 0.0));
            }
            close(&w, &w64, 2.0, &format!("{} adamw {n}", k.isa()));

            let (mut w, mut m) = (numbers(n, 41), vec![0.0; n]);
            let mut w64: Vec<f64> = w.iter().map(|&v| v.into()).collect();
            let mut m64 = vec![0.0f64; n];
            for t in 0..5 {
                let mut g = numbers(n, 50 + t);
                for i in 0..n {
                    m64[i] = b1 * m64[i] + grad * f64::from(g[i]) + wd * w64[i];
                    w64[i] -= lr * m64[i];
                }
                k.momentum([grad as f32, b1 as f32, wd as f32, lr as f32], &mut g, &mut m, &mut w);
            }
            close(&w, &w64, 2.0, &format!("{} momentum {n}", k.isa()));

            let (f, a, c, g0) = (numbers(n, 61), numbers(n, 62), numbers(n, 63), numbers(n, 64));
            let mut g = g0.clone();
            k.pull(3.0, &f, &a, &c, &mut g);
            let want: Vec<f64> = (0..n)
                .map(|i| f64::from(g0[i]) + 3.0 * f64::from(f[i]) * (f64::from(a[i]) - f64::from(c[i])))
                .collect();
            close(&g, &want, 4.0, "pull");
            let mut out = vec![9.0; n];
            k.products(&a, &c, &mut out);
            close(
                &out,
                &(0..n).map(|i| f64::from(a[i]) * f64::from(c[i])).collect::<Vec<_>>(),
                1.0,
                "products",
            );
            k.squares(&a, &mut out);
            close(&out, &a.iter().map(|&a| f64::from(a).powi(2)).collect::<Vec<_>>(), 1.0, "squares");
        }
    }
}
