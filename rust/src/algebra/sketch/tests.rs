//! The sketch against dense float64 decompositions.

use super::*;
use crate::algebra::Dense;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = Rng::new(seed, 7);
    // Sums of uniforms are close enough to Gaussian.
    (0..n).map(|_| (0..6).map(|_| rng.symmetric(1.0)).sum()).collect()
}

/// `rows x cols` of rank `rank` with singular values that fall as `decay(i)`, plus `noise`.
fn matrix(rows: usize, cols: usize, rank: usize, decay: impl Fn(usize) -> f32, noise: f32) -> Vec<f32> {
    let (b, a) = (numbers(rows * rank, 1), numbers(rank * cols, 2));
    let mut m: Vec<f32> = numbers(rows * cols, 3).iter().map(|v| noise * v).collect();
    for (i, row) in m.chunks_exact_mut(cols).enumerate() {
        for r in 0..rank {
            let s = decay(r) * b[i * rank + r];
            row.iter_mut().zip(&a[r * cols..(r + 1) * cols]).for_each(|(m, a)| *m += s * a);
        }
    }
    m
}

fn dense(m: &[f32], cols: usize) -> DMatrix<f64> {
    DMatrix::from_row_iterator(m.len() / cols, cols, m.iter().map(|&v| f64::from(v)))
}

fn squares(m: &[f32], cols: usize) -> Vec<f64> {
    let mut s: Vec<f64> = dense(m, cols).singular_values().iter().map(|s| s * s).collect();
    s.sort_by(|a, b| b.total_cmp(a));
    s
}

fn residual2(m: &[f32], cols: usize, f: &Factors) -> f64 {
    let rows = m.len() / cols;
    let a = DMatrix::from_row_iterator(f.rank, cols, f.a.iter().map(|&v| f64::from(v)));
    let b = DMatrix::from_row_iterator(f.rank, rows, f.b.iter().map(|&v| f64::from(v)));
    (dense(m, cols) - b.transpose() * a).norm_squared()
}

fn sketch(k: &Kernels, m: &[f32], cols: usize, keep: Keep, o: &SketchOptions) -> Factors {
    decompose(k, &mut Dense::new(m, cols), keep, o, &mut |_, _| Ok(())).unwrap()
}

/// Residual within 1.001 of the best (or rounding of f32), and told as it is.
fn judge(k: &Kernels, m: &[f32], cols: usize, rank: usize, what: &str) {
    let f = sketch(k, m, cols, Keep::Rank(rank), &SketchOptions::for_rank(rank));
    let s = squares(m, cols);
    let norm2: f64 = s.iter().sum();
    let (got, best) = (residual2(m, cols, &f), s[rank.min(s.len())..].iter().sum::<f64>());
    assert!(f.rank <= rank, "{what}");
    assert!((f.norm2 - norm2).abs() <= 1e-10 * norm2, "{what}: norm {} {norm2}", f.norm2);
    let ratio = (got / best.max(1e-11 * norm2)).sqrt();
    assert!(ratio <= 1.001, "{what} on {}: residual {ratio} of the best, {got} {best}", k.isa());
    let told = f.norm2 - f.kept2;
    let off = (told - got).abs();
    assert!(off <= 0.01 * got + 1e-13 * norm2, "{what}: told {told}, is {got} of {norm2}");
}

#[test]
fn residual_is_within_a_thousandth_of_the_best_and_told_as_it_is() {
    for k in Kernels::available() {
        for (rows, cols) in [(200, 300), (301, 150)] {
            for rank in [1, 4, 16] {
                let flat = matrix(rows, cols, 1, |_| 0.0, 1.0);
                judge(k, &flat, cols, rank, "flat");
                let signal = matrix(rows, cols, 24, |_| 1.0, 0.5);
                judge(k, &signal, cols, rank, "signal");
                let tail = matrix(rows, cols, 40, |i| 1.0 / (1.0 + i as f32), 0.01);
                judge(k, &tail, cols, rank, "harmonic");
                let steep = matrix(rows, cols, 40, |i| 0.6f32.powi(i as i32), 1e-4);
                judge(k, &steep, cols, rank, "steep");
            }
        }
    }
}

#[test]
fn low_rank_zero_and_small_matrices_are_exact() {
    for k in Kernels::available() {
        for rank in [1, 3, 8] {
            judge(k, &matrix(120, 90, rank, |_| 1.0, 0.0), 90, 8, "low rank");
        }
        for (rows, cols) in [(1, 1), (1, 40), (40, 1), (3, 500), (500, 3), (16, 16), (30, 20)] {
            judge(k, &matrix(rows, cols, 4, |_| 1.0, 0.3), cols, 3, &format!("{rows}x{cols}"));
            judge(k, &matrix(rows, cols, 4, |_| 1.0, 0.3), cols, 50, &format!("{rows}x{cols} whole"));
        }
        for shape in [(100, 80), (4, 80)] {
            let zero = vec![0.0; shape.0 * shape.1];
            let f = sketch(k, &zero, shape.1, Keep::Rank(4), &SketchOptions::for_rank(4));
            assert_eq!((f.norm2, f.kept2), (0.0, 0.0));
            assert!(f.a.iter().chain(&f.b).all(|v| *v == 0.0));
        }
    }
}

#[test]
fn size_of_the_numbers_does_not_matter() {
    let k = Kernels::detect().unwrap();
    let m = matrix(150, 130, 10, |i| 1.0 / (1.0 + i as f32), 0.1);
    let o = SketchOptions::for_rank(4);
    let one = sketch(k, &m, 130, Keep::Rank(4), &o);
    for power in [-90, -40, 40, 60] {
        let c = 2f32.powi(power);
        let scaled: Vec<f32> = m.iter().map(|v| c * v).collect();
        let f = sketch(k, &scaled, 130, Keep::Rank(4), &o);
        let unit = 2f64.powi(-2 * power);
        assert!((f.kept2 * unit / one.kept2 - 1.0).abs() < 1e-6, "{power}: {} {}", f.kept2 * unit, one.kept2);
    }
}

#[test]
fn energy_and_error_choose_the_rank() {
    let k = Kernels::detect().unwrap();
    let m = matrix(220, 180, 30, |i| 0.7f32.powi(i as i32), 1e-3);
    let s = squares(&m, 180);
    let norm2: f64 = s.iter().sum();
    let o = SketchOptions { width: 8, ..SketchOptions::for_rank(1) };
    for keep in [0.5, 0.9, 0.99, 0.9999] {
        let want = (1..=s.len()).find(|&n| s[..n].iter().sum::<f64>() >= keep * norm2).unwrap();
        let f = sketch(k, &m, 180, Keep::Energy(keep), &o);
        assert_eq!(f.rank, want, "energy {keep}");
        let f = sketch(k, &m, 180, Keep::MaxError((1.0 - keep).sqrt()), &o);
        assert_eq!(f.rank, want, "error for {keep}");
        assert!(residual2(&m, 180, &f) <= (1.0 - keep) * norm2 * (1.0 + 1e-6));
    }
}

#[test]
fn a_start_that_spans_the_answer_saves_passes_and_a_useless_one_does_no_harm() {
    struct Counted<'a>(Dense<'a>, usize);
    impl Tiles for Counted<'_> {
        fn rows(&self) -> usize {
            self.0.rows()
        }
        fn cols(&self) -> usize {
            self.0.cols()
        }
        fn tile(&mut self, first: usize, out: &mut [f32]) -> Result<()> {
            self.1 += out.len();
            self.0.tile(first, out)
        }
    }
    let k = Kernels::detect().unwrap();
    let m = matrix(160, 140, 6, |_| 1.0, 0.0);
    let rows = numbers(6 * 140, 2);
    let o = SketchOptions::for_rank(6);
    let run = |start: &[f32]| {
        let mut t = Counted(Dense::new(&m, 140), 0);
        let (f, bytes) = decompose_from(k, &mut t, start, Keep::Rank(6), &o, &mut |_, _| Ok(())).unwrap();
        assert!(bytes > 0);
        assert!(residual2(&m, 140, &f) <= 1e-11 * f.norm2);
        t.1 / m.len()
    };
    // One to find it, one to measure what is left.
    assert_eq!(run(&rows), 2);
    assert!(run(&[]) <= 4);
    assert!(run(&vec![0.0; 5 * 140]) <= 4);
    assert!(run(&[rows[..140].to_vec(), rows[..140].to_vec()].concat()) <= 4);
}

#[test]
fn numbers_that_are_not_finite_and_a_cancelled_run_are_errors() {
    let k = Kernels::detect().unwrap();
    for (rows, cols) in [(100, 90), (3, 90)] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut m = matrix(rows, cols, 2, |_| 1.0, 0.1);
            m[rows * cols - 1] = bad;
            let got = decompose(
                k,
                &mut Dense::new(&m, cols),
                Keep::Rank(2),
                &SketchOptions::for_rank(2),
                &mut |_, _| Ok(()),
            );
            assert!(matches!(got, Err(Error::NonFinite { .. })));
        }
        let m = matrix(rows, cols, 2, |_| 1.0, 0.1);
        let stop = &mut |_: usize, _: usize| Err(Error::Cancelled("now".into()));
        let got = decompose(k, &mut Dense::new(&m, cols), Keep::Rank(2), &SketchOptions::for_rank(2), stop);
        assert!(matches!(got, Err(Error::Cancelled(_))));
    }
}
