//! Sides and samples made from a seed.

use std::sync::Arc;

use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::consolidate::{Outcome, Problem, Row, Rows, Run, Settings, Side, strategy};
use crate::learn::{Feedback, TargetLoss};
use crate::rng::Rng;

pub fn numbers(rng: &mut Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(scale)).collect()
}

pub fn factor(rng: &mut Rng, rank: usize, out: usize) -> Arc<Factor> {
    Arc::new(Factor::from_rows(&numbers(rng, rank * out, 1.0), rank, out, Dtype::F32))
}

/// `sum u u^T` of `n` random bottlenecks.
pub fn gram(rng: &mut Rng, rank: usize, n: usize) -> Vec<f64> {
    let mut g = vec![0.0; rank * rank];
    for _ in 0..n {
        let u = numbers(rng, rank, 1.0);
        for i in 0..rank {
            for j in 0..rank {
                g[i * rank + j] += f64::from(u[i]) * f64::from(u[j]);
            }
        }
    }
    g
}

pub fn side(rng: &mut Rng, rank: usize, out: usize, n: usize) -> Side {
    Side { b: factor(rng, rank, out), gram: gram(rng, rank, n), events: n as u64, quality: None }
}

/// One feedback of each kind; 0 is the squared error, 1 the bare gradient.
pub fn feedback(kind: usize, rng: &mut Rng, out: usize) -> Arc<Feedback> {
    let mut v = || numbers(rng, out, 1.0);
    Arc::new(
        match kind {
            0 => Feedback::target(v(), TargetLoss::Mse),
            1 => Feedback::gradient(v()),
            2 => Feedback::target(v(), TargetLoss::Cosine),
            3 => Feedback::reward(0.7, v()),
            4 => Feedback::preference(v(), v(), 0.9, 20.0),
            _ => {
                let negatives = [v(), v(), v()].concat();
                Feedback::contrastive(v(), negatives, 0.05)
            }
        }
        .unwrap(),
    )
}

/// `n` samples whose kinds come in turn.
pub fn rows(rng: &mut Rng, rank: usize, out: usize, n: usize, kinds: &[usize], stored: bool) -> Rows {
    Rows {
        rank,
        out,
        u: numbers(rng, n * rank, 1.0),
        base: numbers(rng, n * out, 1.0),
        feedback: (0..n).map(|i| feedback(kinds[i % kinds.len()], rng, out)).collect(),
        advantage: (0..n)
            .map(|i| if kinds[i % kinds.len()] == 3 { rng.symmetric(1.0) } else { 0.0 })
            .collect(),
        weight: (0..n).map(|_| 0.1 + rng.uniform()).collect(),
        quality: (0..n).map(|_| rng.uniform()).collect(),
        stored: if stored { numbers(rng, n * out, 1.0) } else { Vec::new() },
        event: (1..=n as u64).collect(),
    }
}

pub fn settings(name: &str) -> Settings {
    Settings { strategy: strategy(name).unwrap(), ridge: 0.5, ..Settings::default() }
}

pub fn named(row: &'static Row) -> Settings {
    Settings { strategy: row, ridge: 0.5, ..Settings::default() }
}

/// A problem with `n` samples in the window and `m` replayed.
pub fn problem(
    seed: u64,
    s: Settings,
    (rank, out): (usize, usize),
    [n, m]: [usize; 2],
    kinds: &[usize],
) -> Problem {
    let mut rng = Rng::new(seed, 7);
    Problem {
        settings: s,
        slow: side(&mut rng, rank, out, 3 * rank),
        fast: side(&mut rng, rank, out, 2 * rank),
        snapshots: Vec::new(),
        window: rows(&mut rng, rank, out, n, kinds, false),
        replay: rows(&mut rng, rank, out, m, kinds, true),
    }
}

pub fn run(k: &'static Kernels, p: &Problem) -> Outcome {
    let mut run = Run::new(k, p.clone()).unwrap();
    for _ in 0..100_000 {
        if let Some(outcome) = run.advance().unwrap() {
            return outcome;
        }
    }
    panic!("a run without end");
}

pub fn kernels() -> &'static Kernels {
    Kernels::detect().unwrap()
}

/// Largest difference over the largest size.
pub fn apart(a: &Factor, b: &Factor) -> f64 {
    let (a, b) = (a.to_f32(false), b.to_f32(false));
    let top = |v: &mut dyn Iterator<Item = f32>| v.fold(0.0f32, |t, v| t.max(v.abs()));
    let size = top(&mut a.iter().chain(&b).copied()).max(1e-30);
    f64::from(top(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / size)
}
