//! Factor-space algebra against a dense float64 singular value decomposition.

use microlora::algebra::{Grams, Keep, Stack, principal_angles, refactor};
use microlora::kernels::Kernels;
use nalgebra::DMatrix;
use proptest::prelude::*;

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

fn stack(n_in: usize, n_out: usize, rank: usize, seed: u64) -> Stack {
    Stack {
        n_in,
        n_out,
        a: numbers(rank * n_in, seed),
        b: numbers(rank * n_out, seed + 1),
        coef: numbers(rank, seed + 2).iter().map(|c| f64::from(*c) * 3.0).collect(),
    }
}

/// `(n_out, n_in)` in f64.
fn dense(s: &Stack) -> DMatrix<f64> {
    let rank = s.rank();
    let a = DMatrix::from_fn(rank, s.n_in, |r, i| f64::from(s.a[r * s.n_in + i]));
    let b = DMatrix::from_fn(rank, s.n_out, |r, j| s.coef[r] * f64::from(s.b[r * s.n_out + j]));
    b.transpose() * a
}

fn rows(a: &[f32], b: &[f32], n_in: usize, n_out: usize) -> DMatrix<f64> {
    let rank = a.len() / n_in;
    dense(&Stack { n_in, n_out, a: a.to_vec(), b: b.to_vec(), coef: vec![1.0; rank] })
}

/// Checks values, kept and dropped energy, and the product, for every rank.
fn check(s: &Stack, what: &str) {
    let d = dense(s);
    let svd = d.clone().svd(true, true);
    let top = svd.singular_values[0];
    for k in Kernels::available() {
        let all = refactor(k, s, Keep::Rank(s.rank())).unwrap();
        for (i, v) in all.values.iter().enumerate() {
            let want = svd.singular_values.get(i).copied().unwrap_or(0.0);
            assert!((v - want).abs() <= 1e-6 * top, "{what} {} value {i}: {v}, want {want}", k.isa());
        }
        assert!((all.norm2 - d.norm_squared()).abs() <= 1e-9 * d.norm_squared(), "{what} norm");
        for rank in 1..=s.rank() {
            let f = refactor(k, s, Keep::Rank(rank)).unwrap();
            let got = rows(&f.a, &f.b, s.n_in, s.n_out);
            let best: f64 = svd.singular_values.iter().skip(rank).map(|v| v * v).sum();
            let error = (&got - &d).norm_squared();
            assert!(
                error.sqrt() <= best.sqrt() + 3e-6 * d.norm(),
                "{what} rank {rank}: {error} against {best}"
            );
            assert!(
                ((f.norm2 - f.kept2).sqrt() - best.sqrt()).abs() <= 2e-6 * d.norm(),
                "{what} dropped at {rank}"
            );
            // The subspace, where the gap names one.
            let next = svd.singular_values.get(rank).copied().unwrap_or(0.0);
            let last = svd.singular_values.get(rank - 1).copied().unwrap_or(0.0);
            if (last - next) / top > 1e-3 {
                let v = svd.v_t.as_ref().unwrap().rows(0, rank).transpose();
                let mine = DMatrix::from_fn(s.n_in, f.rank, |i, r| f64::from(f.a[r * s.n_in + i])).qr().q();
                let outside = &mine - &v * (v.transpose() * &mine);
                assert!(
                    outside.norm() <= 1e-5 * (rank as f64).sqrt(),
                    "{what} subspace at {rank}: {}",
                    outside.norm()
                );
            }
        }
    }
}

#[test]
fn random_stacks() {
    for (n_in, n_out, rank) in [
        (6, 19, 15),
        (5, 4, 30),
        (2, 3, 25),
        (24, 40, 6),
        (33, 17, 9),
        (96, 96, 24),
        (7, 50, 5),
        (1, 9, 1),
        (130, 8, 8),
    ] {
        check(&stack(n_in, n_out, rank, (n_in * 31 + rank) as u64), &format!("{n_in}x{n_out} r{rank}"));
    }
}

#[test]
fn more_rows_than_columns_and_coefficients_far_apart() {
    for seed in 0..60 {
        let (n_in, n_out) = (1 + seed as usize % 9, 24 - seed as usize % 9);
        let mut s = stack(n_in, n_out, 15, seed);
        for (r, c) in s.coef.iter_mut().enumerate() {
            *c *= 10f64.powi((r as i32 / 4 + seed as i32 % 4) % 4 - 2);
        }
        check(&s, &format!("{n_in}x{n_out}, seed {seed}"));
    }
}

#[test]
fn duplicates_and_dependent_rows() {
    let mut s = stack(40, 30, 8, 5);
    let (a, b) = (s.a[..4 * 40].to_vec(), s.b[..4 * 30].to_vec());
    s.a[4 * 40..].copy_from_slice(&a);
    check(&s, "equal A");
    s.b[4 * 30..].copy_from_slice(&b);
    check(&s, "equal A and B");
    for (i, v) in s.a[4 * 40..].iter_mut().enumerate() {
        *v += 1e-6 * ((i % 7) as f32 - 3.0);
    }
    check(&s, "nearly equal");
}

#[test]
fn what_is_left_of_nearly_equal_parents() {
    // D_a - D_b with factors that differ in the sixth digit: squares alone would lose every digit of it.
    let mut s = stack(40, 30, 8, 6);
    for r in 0..4 {
        for i in 0..40 {
            s.a[(r + 4) * 40 + i] = s.a[r * 40 + i] * (1.0 + 3e-6 * ((i % 5) as f32 - 2.0));
        }
        for j in 0..30 {
            s.b[(r + 4) * 30 + j] = s.b[r * 30 + j];
        }
        s.coef[r] = 1.0;
        s.coef[r + 4] = -1.0;
    }
    check(&s, "cancelled");
    s.a.copy_within(0..4 * 40, 4 * 40);
    let k = Kernels::detect().unwrap();
    let zero = refactor(k, &s, Keep::Rank(3)).unwrap();
    assert_eq!((zero.rank, zero.norm2), (1, 0.0));
    assert!(zero.a.iter().chain(&zero.b).all(|v| *v == 0.0));
}

#[test]
fn zero_and_empty() {
    let k = Kernels::detect().unwrap();
    let mut s = stack(9, 5, 3, 7);
    s.b.fill(0.0);
    for s in [s, Stack::new(4, 3)] {
        let f = refactor(k, &s, Keep::Energy(0.9)).unwrap();
        assert_eq!((f.rank, f.norm2, f.error()), (1, 0.0, 0.0));
    }
}

#[test]
fn not_finite_is_an_error() {
    let k = Kernels::detect().unwrap();
    let mut s = stack(9, 5, 3, 8);
    s.a[4] = f32::NAN;
    assert!(refactor(k, &s, Keep::Rank(1)).is_err());
}

#[test]
fn every_isa_gives_the_same_bits() {
    for (n_in, n_out, rank) in [(1, 1, 1), (37, 53, 11), (1030, 2051, 5), (64, 1100, 23)] {
        let s = stack(n_in, n_out, rank, 9);
        let mut first: Option<(Vec<f32>, Vec<f32>, Vec<f64>)> = None;
        for k in Kernels::available() {
            let g = Grams::of(k, &s);
            let f = refactor(k, &s, Keep::Rank(rank.div_ceil(2))).unwrap();
            let bits = (f.a, f.b, g.a.iter().chain(g.b.iter()).copied().collect::<Vec<f64>>());
            match &first {
                None => first = Some(bits),
                Some(want) => assert!(*want == bits, "{} differs at {n_in}x{n_out} r{rank}", k.isa()),
            }
        }
    }
}

#[test]
fn angles_of_known_planes() {
    // Rows e1, e2 against cos t e1 + sin t e3, e2: angles 0 and t.
    for t in [1e-6f64, 0.3, 1.0, std::f64::consts::FRAC_PI_2] {
        let x = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        let y = [t.cos() as f32, 0.0, t.sin() as f32, 0.0, 0.0, 2.0, 0.0, 0.0];
        let got = principal_angles(&x, &y, 4);
        assert_eq!(got.dimensions, [2, 2]);
        assert!(got.radians[0].abs() < 1e-7 && (got.radians[1] - t).abs() < 1e-7, "{t}: {:?}", got.radians);
    }
    assert!(principal_angles(&[0.0; 8], &[1.0; 4], 4).radians.is_empty());
}

proptest! {
    #[test]
    fn keeps_what_was_asked(n_in in 2usize..40, n_out in 2usize..40, rank in 1usize..12, seed in 0u64..1000, share in 0.01f64..0.999) {
        let s = stack(n_in, n_out, rank, seed);
        let k = Kernels::detect().unwrap();
        let values = dense(&s).singular_values();
        let total: f64 = values.iter().map(|v| v * v).sum();
        let fewest = |enough: &dyn Fn(f64) -> bool| {
            (1..=values.len()).find(|&r| enough(values.iter().take(r).map(|v| v * v).sum())).unwrap_or(values.len())
        };
        let energy = refactor(k, &s, Keep::Energy(share)).unwrap();
        // A value may sit on the edge by rounding: one rank either way there, never less energy than asked.
        prop_assert!(energy.kept2 >= share * energy.norm2 * (1.0 - 1e-9));
        prop_assert!(energy.rank.abs_diff(fewest(&|kept| kept >= share * total)) <= 1);
        let bounded = refactor(k, &s, Keep::MaxError(1.0 - share)).unwrap();
        prop_assert!(bounded.error() <= (1.0 - share) * (1.0 + 1e-9));
    }

    #[test]
    fn inner_products_are_those_of_the_matrices(n_in in 1usize..30, n_out in 1usize..30, r1 in 1usize..6, r2 in 1usize..6, seed in 0u64..1000) {
        let s = stack(n_in, n_out, r1 + r2, seed);
        let part = |from: usize, to: usize| dense(&Stack {
            n_in, n_out, a: s.a[from * n_in..to * n_in].to_vec(), b: s.b[from * n_out..to * n_out].to_vec(), coef: s.coef[from..to].to_vec(),
        });
        let (x, y) = (part(0, r1), part(r1, r1 + r2));
        let g = Grams::of(Kernels::detect().unwrap(), &s).products(&s.coef, &[0..r1, r1..r1 + r2]);
        let scale = x.norm() * y.norm() + x.norm_squared() + y.norm_squared();
        prop_assert!((g[(0, 1)] - x.dot(&y)).abs() <= 1e-12 * scale);
        prop_assert!((g[(0, 0)] - x.norm_squared()).abs() <= 1e-12 * scale);
        prop_assert!((g[(1, 1)] - y.norm_squared()).abs() <= 1e-12 * scale);
    }
}
