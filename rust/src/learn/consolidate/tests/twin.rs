//! The written objective in float64 with nalgebra, solved densely, and gradients by finite differences.

use nalgebra::DMatrix;
use proptest::prelude::*;

use super::fixtures::*;
use crate::kernels::Kernels;
use crate::learn::consolidate::{Problem, Rows};
use crate::learn::{Feedback, TargetLoss};

fn matrix(v: &[f32], rows: usize, cols: usize) -> DMatrix<f64> {
    DMatrix::from_iterator(cols, rows, v.iter().map(|v| f64::from(*v))).transpose()
}

/// Means of one part: weights of losses that sum to 1.
fn means(rows: &Rows, bare: bool) -> Vec<f64> {
    let w: Vec<f64> = (0..rows.len())
        .map(|i| match *rows.feedback[i] {
            Feedback::Gradient { .. } if !bare => 0.0,
            _ => f64::from(rows.weight[i]),
        })
        .collect();
    let sum: f64 = w.iter().sum();
    w.iter().map(|w| w / sum.max(1e-300)).collect()
}

/// Merge of slow and fast, then the minimiser of the objective as it is written, by normal equations.
fn exact(p: &Problem) -> DMatrix<f64> {
    let (r, out, s) = (p.slow.b.rank(), p.slow.b.len(), &p.settings);
    let b = |side: &crate::learn::consolidate::Side| matrix(&side.b.to_f32(false), r, out);
    let g = |side: &crate::learn::consolidate::Side| DMatrix::from_row_slice(r, r, &side.gram);
    let (slow, fast, gs, gf) = (b(&p.slow), b(&p.fast), g(&p.slow), g(&p.fast));
    let start = (&gs + &gf).lu().solve(&(&gs * &slow + &gf * &fast)).unwrap();
    if s.steps == 0 {
        return start;
    }
    let (mut h, mut rhs) = (DMatrix::zeros(r, r), DMatrix::zeros(r, out));
    let mut add = |c: f64, u: &DMatrix<f64>, t: DMatrix<f64>| {
        h += u.transpose() * u * c;
        rhs += u.transpose() * t * c;
    };
    for (rows, share, replay) in [(&p.window, 1.0, false), (&p.replay, s.replay_ratio, true)] {
        let weights = means(rows, !replay);
        for i in 0..rows.len() {
            let u = matrix(&rows.u[i * r..(i + 1) * r], 1, r);
            let base = matrix(&rows.base[i * out..(i + 1) * out], 1, out);
            let c = share * weights[i];
            match &*rows.feedback[i] {
                Feedback::Target { target, loss: TargetLoss::Mse } => {
                    add(c, &u, matrix(target, 1, out) - base)
                }
                // One step of mu 0.3: the loss's minimum lies 0.3 gradients from where the row stood.
                Feedback::Gradient { gradient } if !replay => {
                    add(c / 0.3, &u, &u * &start - matrix(gradient, 1, out) * 0.3);
                }
                _ => {}
            }
            if replay {
                let stored = matrix(&rows.stored[i * out..(i + 1) * out], 1, out);
                add(s.replay_ratio * s.logit_weight / rows.len() as f64, &u, stored);
            }
        }
    }
    if p.replay.is_empty() {
        let m = &gs * (s.ewc_lambda / p.slow.events as f64);
        rhs += &m * &slow;
        h += m;
    }
    let n = (p.slow.events + p.fast.events).max((p.window.len() + p.replay.len()) as u64);
    h += DMatrix::identity(r, r) * (s.ridge / n as f64);
    h.lu().solve(&rhs).unwrap()
}

fn distance(got: &crate::factor::Factor, want: &DMatrix<f64>) -> f64 {
    let got = matrix(&got.to_f32(false), got.rank(), got.len());
    (got - want).amax() / want.amax()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_candidate_is_the_minimiser_of_the_written_objective(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..50, n in 1usize..90, m in prop_oneof![Just(0usize), 1usize..150],
        steps in 0usize..4, gradients in any::<bool>(), ratio in 0.1f64..3.0, logit in 0.0f64..2.0,
        lambda in 0.0f64..200.0,
    ) {
        let mut s = settings("ewc_merge");
        (s.steps, s.replay_ratio, s.logit_weight, s.ewc_lambda) = (steps, ratio, logit, lambda);
        let kinds: &[usize] = if gradients { &[0, 1, 0] } else { &[0] };
        let p = problem(seed, s, (rank, out), [n, m], kinds);
        let want = exact(&p);
        for k in Kernels::available() {
            let got = run(k, &p);
            prop_assert!(distance(&got.b, &want) < 1e-4, "{}: {}", k.isa(), distance(&got.b, &want));
        }
    }

    #[test]
    fn best_only_is_the_regularised_solution_from_slow(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..50, n in 1usize..60, share in 0.01f64..1.0,
    ) {
        let mut s = settings("best_only");
        s.best_share = share;
        let mut p = problem(seed, s, (rank, out), [n, 20], &[0]);
        p.window.weight.fill(1.0);
        let m = ((share * n as f64).ceil() as usize).max(1);
        // Every thing is rated once, so shrinking keeps the order.
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| p.window.quality[b].total_cmp(&p.window.quality[a]));
        let slow = matrix(&p.slow.b.to_f32(false), rank, out);
        let mut h = DMatrix::from_row_slice(rank, rank, &p.slow.gram) + DMatrix::identity(rank, rank) * 0.5;
        let mut rhs = DMatrix::zeros(rank, out);
        for &i in &order[..m] {
            let u = matrix(&p.window.u[i * rank..(i + 1) * rank], 1, rank);
            let Feedback::Target { target, .. } = &*p.window.feedback[i] else { unreachable!() };
            let err = matrix(target, 1, out) - matrix(&p.window.base[i * out..(i + 1) * out], 1, out) - &u * &slow;
            h += u.transpose() * &u;
            rhs += u.transpose() * err;
        }
        let want = slow + h.lu().solve(&rhs).unwrap();
        for k in Kernels::available() {
            let got = run(k, &p);
            prop_assert_eq!(got.used, m);
            prop_assert!(distance(&got.b, &want) < 1e-4, "{}: {}", k.isa(), distance(&got.b, &want));
        }
    }
}
