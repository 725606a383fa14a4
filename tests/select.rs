//! Kernels that choose among entries: every ISA against a plain definition in f64, and bit for bit against each other.

use microlora::kernels::{Election, Kernels};

const LENGTHS: [usize; 10] = [0, 1, 7, 31, 63, 64, 65, 127, 200, 1000];

/// Numbers with zeros, equal magnitudes and a wide range among them; the same on every run.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut one = || {
        z ^= z << 13;
        z ^= z >> 7;
        z ^= z << 17;
        (z >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..n)
        .map(|i| match i % 5 {
            0 => 0.0,
            1 => 0.25f32.copysign(one()),
            2 => one() * 1e-20,
            3 => one() * 1e12,
            _ => one(),
        })
        .collect()
}

/// Runs `test` on every ISA and checks that all give the same bits.
fn same<T: PartialEq + std::fmt::Debug>(test: impl Fn(&'static Kernels) -> T) -> T {
    let all: Vec<T> = Kernels::available().map(&test).collect();
    for (k, one) in Kernels::available().zip(&all) {
        assert!(*one == all[0], "{} differs from scalar: {one:?}", k.isa());
    }
    all.into_iter().next().expect("scalar is always there")
}

fn bits(v: Vec<f32>) -> Vec<u32> {
    v.into_iter().map(f32::to_bits).collect()
}

#[test]
fn bracket_counts_and_collects() {
    for n in LENGTHS {
        let x = numbers(n, 3);
        for [lo, hi] in [[0.0, f32::INFINITY], [0.25, 0.25], [0.1, 0.5], [0.0, 0.0], [2.0, 1.0], [0.3, 1e13]]
        {
            let (above, inside) = same(|k| {
                let mut inside = vec![7.0];
                (k.bracket(&x, [lo, hi], &mut inside), inside)
            });
            assert_eq!(above, x.iter().filter(|v| v.abs() > hi).count());
            let want: Vec<f32> = x.iter().map(|v| v.abs()).filter(|v| (lo..=hi).contains(v)).collect();
            assert_eq!((inside[0], &inside[1..]), (7.0, &want[..]), "what was there stays");
        }
    }
}

#[test]
fn bands_bits_and_keys_keep_what_they_say() {
    for n in LENGTHS {
        let x = numbers(n, 4);
        let got = same(|k| {
            let mut y = x.clone();
            k.keep_band([0.25, 0.9], &mut y);
            bits(y)
        });
        assert_eq!(
            got,
            bits(x.iter().map(|v| if (0.25..=0.9).contains(&v.abs()) { *v } else { 0.0 }).collect())
        );

        let words: Vec<u64> =
            (0..n.div_ceil(64)).map(|i| 0x9E37_79B9_7F4A_7C15u64.rotate_left(i as u32 * 7)).collect();
        let got = same(|k| {
            let mut y = x.clone();
            k.keep_bits(&words, 1.7, &mut y);
            bits(y)
        });
        let set = |i: usize| words[i / 64] >> (i % 64) & 1 == 1;
        assert_eq!(
            got,
            bits(x.iter().enumerate().map(|(i, v)| if set(i) { v * 1.7 } else { 0.0 }).collect())
        );

        let key = numbers(n, 5);
        let got = same(|k| {
            let mut y = x.clone();
            k.keep_above(&key, 0.25, &mut y);
            bits(y)
        });
        assert_eq!(got, bits(x.iter().zip(&key).map(|(v, k)| if *k >= 0.25 { *v } else { 0.0 }).collect()));
    }
}

#[test]
fn an_election_is_its_definition() {
    for n in LENGTHS {
        for m in 1..=5 {
            let rows: Vec<Vec<f32>> = (0..m).map(|i| numbers(n, 10 + i as u64)).collect();
            let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
            let votes = &[1.0, -0.5, 2.0, 0.0, 1.0][..m];
            let weights = &[0.3, -0.5, 1.0, 1.0, 0.0][..m];
            let sizes = &[0.3, 0.5, 1.0, 0.0, 2.0][..m];
            for (frequency, normalize) in [(false, false), (false, true), (true, false), (true, true)] {
                let e = Election { votes, weights, sizes, frequency, normalize, lam: -1.5 };
                let got = same(|k| {
                    let mut out = vec![9.0; n];
                    k.elect(&e, &rows, &mut out);
                    out
                });
                for (j, got) in got.iter().enumerate() {
                    let x: Vec<f64> = rows.iter().map(|r| f64::from(r[j])).collect();
                    let sign = |v: f64| if v == 0.0 { 0.0 } else { v.signum() };
                    let vote = |(x, v): (&f64, &f32)| f64::from(*v) * if frequency { sign(*x) } else { *x };
                    let up = x.iter().zip(votes).map(vote).sum::<f64>() >= 0.0;
                    let (mut sum, mut weight) = (0.0, 0.0);
                    for (((x, v), w), size) in x.iter().zip(votes).zip(weights).zip(sizes) {
                        let side = if *v < 0.0 { -x } else { *x };
                        if side != 0.0 && (side > 0.0) == up {
                            sum += f64::from(*w) * x;
                            weight += f64::from(*size);
                        }
                    }
                    let want = -1.5
                        * if !normalize {
                            sum
                        } else if weight > 0.0 {
                            sum / weight
                        } else {
                            0.0
                        };
                    let size =
                        x.iter().fold(0.0f64, |a, v| a.max(v.abs())) * if weight > 0.0 { 8.0 } else { 1.0 };
                    assert!(
                        (f64::from(*got) - want).abs() <= 1e-5 * size,
                        "{n} {m} {frequency} {normalize}: {got} {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_draw_is_positive_and_an_empty_column_is_zero() {
    let rows: [&[f32]; 3] = [&[1.0, 0.0, -2.0, 0.5], &[-1.0, 0.0, 2.0, 0.5], &[0.0, -0.0, 0.0, -1.0]];
    for frequency in [false, true] {
        let one = &[1.0; 3];
        let e = Election { votes: one, weights: one, sizes: one, frequency, normalize: true, lam: 1.0 };
        let got = same(|k| {
            let mut out = vec![9.0; 4];
            k.elect(&e, &rows, &mut out);
            out
        });
        assert_eq!(got, [1.0, 0.0, 2.0, 0.5]);
    }
}

#[test]
fn ratios_variances_and_sums_match_float64() {
    for n in LENGTHS {
        let rows: Vec<Vec<f32>> = (0..3).map(|i| numbers(n, 20 + i)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let f: Vec<Vec<f32>> =
            (0..3).map(|i| numbers(n, 30 + i).iter().map(|v| v.abs().max(1e-6)).collect()).collect();
        let f: Vec<&[f32]> = f.iter().map(Vec::as_slice).collect();
        let c = [0.5, 2.0, 1.0];
        let got = same(|k| {
            let mut out = vec![9.0; n];
            k.ratio(&rows, &f, &c, 2.0, &mut out);
            out
        });
        let spread = same(|k| {
            let mut out = vec![9.0; n];
            k.variance(&rows, &mut out);
            out
        });
        for j in 0..n {
            let x: Vec<f64> = rows.iter().map(|r| f64::from(r[j])).collect();
            let size = x.iter().fold(0.0f64, |a, v| a.max(v.abs()));
            let w: Vec<f64> = (0..3).map(|i| f64::from(c[i]) * f64::from(f[i][j])).collect();
            let all: f64 = w.iter().sum();
            let mean = if all > 0.0 { 2.0 * (0..3).map(|i| w[i] * x[i]).sum::<f64>() / all } else { 0.0 };
            assert!((f64::from(got[j]) - mean).abs() <= 1e-5 * size, "{} {mean}", got[j]);
            let middle = x.iter().sum::<f64>() / 3.0;
            let want: f64 = x.iter().map(|x| (x - middle).powi(2)).sum();
            assert!(
                (f64::from(spread[j]) - want).abs() <= 1e-5 * size * size + 1e-37,
                "{} {want}",
                spread[j]
            );
        }
        let x = rows[0];
        let squares = same(|k| k.sum_squares(x));
        let want: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
        assert!((squares - want).abs() <= 1e-13 * want);
        let sizes = same(|k| k.sum_magnitudes(x));
        let want: f64 = x.iter().map(|v| f64::from(v.abs())).sum();
        assert!((sizes - want).abs() <= 1e-13 * want);
    }
    let equal = numbers(100, 1);
    let spread = same(|k| {
        let mut out = vec![9.0; 100];
        k.variance(&[&equal, &equal, &equal], &mut out);
        out
    });
    assert!(spread.iter().all(|v| *v == 0.0), "equal rows have no variance at all");
    let k = Kernels::detect().unwrap();
    assert!(k.sum_squares(&[f32::MAX; 40]).is_finite());
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [0, 33, 39] {
            let mut x = vec![1.0f32; 40];
            x[at] = bad;
            assert!(same(|k| k.sum_squares(&x).is_finite() as u8) == 0);
        }
    }
}

#[test]
fn conflicts_are_counted_once_per_column() {
    let rows: [&[f32]; 3] =
        [&[1.0, -1.0, 0.0, 2.0, 0.0], &[-1.0, -2.0, 0.0, 0.0, 1e-30], &[1.0, 0.0, -0.0, 3.0, -1e-30]];
    assert_eq!(same(|k| k.conflicts(&rows)), [2, 4]);
    assert_eq!(same(|k| k.conflicts(&[])), [0, 0]);
    for n in LENGTHS {
        let rows: Vec<Vec<f32>> = (0..4).map(|i| numbers(n, 40 + i)).collect();
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let up = |j: usize| rows.iter().any(|r| r[j] > 0.0);
        let down = |j: usize| rows.iter().any(|r| r[j] < 0.0);
        let want =
            [(0..n).filter(|&j| up(j) && down(j)).count(), (0..n).filter(|&j| up(j) || down(j)).count()];
        assert_eq!(same(|k| k.conflicts(&rows)), want);
    }
}
