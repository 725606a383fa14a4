//! The gate, by table and on windows that are clean and poisoned.

use std::sync::Arc;

use proptest::prelude::*;

use super::fixtures::*;
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::learn::consolidate::{
    Gate, Problem, Rows, STRATEGIES, Settings, Side, Verdict, mean_loss, strategy,
};
use crate::learn::{Feedback, TargetLoss};
use crate::rng::Rng;

const GATE: Gate = Gate { tolerance: 0.01, min_samples: 5 };

#[test]
fn verdicts_by_table() {
    let inf = f64::INFINITY;
    let cases = [
        (Some(1.0), Some(0.5), Some(0.505), Verdict::Accept),
        (Some(1.0), Some(0.5), Some(0.506), Verdict::KeepLive),
        (Some(0.5), Some(0.505), Some(0.506), Verdict::KeepLive),
        (Some(0.5), Some(0.506), Some(0.506), Verdict::RollBack),
        (Some(0.5), Some(0.6), Some(0.505), Verdict::Accept),
        (None, Some(0.6), Some(0.605), Verdict::Accept),
        (Some(0.5), None, Some(0.6), Verdict::RollBack),
        (Some(inf), Some(0.6), Some(0.7), Verdict::KeepLive),
        (Some(0.6), Some(f64::NAN), Some(f64::NAN), Verdict::RollBack),
        (Some(inf), Some(inf), Some(0.7), Verdict::Accept),
        (Some(inf), Some(inf), Some(inf), Verdict::RollBack),
        (Some(0.5), Some(0.5), None, Verdict::Unmeasured),
        (Some(0.0), Some(0.0), Some(1e-13), Verdict::Accept),
        (Some(0.0), Some(0.0), Some(1e-9), Verdict::KeepLive),
        (Some(0.0), Some(1e-9), Some(1e-9), Verdict::RollBack),
    ];
    for (slow, live, candidate, want) in cases {
        assert_eq!(GATE.judge(slow, live, candidate, 5), want, "{slow:?} {live:?} {candidate:?}");
        assert_eq!(GATE.judge(slow, live, candidate, 4), Verdict::Unmeasured);
    }
}

proptest! {
    #[test]
    fn what_is_accepted_is_no_worse_than_the_tolerance_says(
        slow in 0.0f64..2.0, live in 0.0f64..2.0, candidate in 0.0f64..2.0, tolerance in 0.0f64..0.5,
    ) {
        let gate = Gate { tolerance, min_samples: 1 };
        let verdict = gate.judge(Some(slow), Some(live), Some(candidate), 1);
        let left = match verdict {
            Verdict::Accept => candidate,
            Verdict::KeepLive => live,
            _ => slow,
        };
        prop_assert!(left <= slow.max(slow.min(live)) * (1.0 + tolerance) + 1e-9, "{verdict:?} {left}");
    }
}

/// Rows of `y = x-bottleneck times truth` with a little noise; `sign` -1 poisons them.
fn stream(rng: &mut Rng, truth: &Factor, n: usize, sign: f32) -> Rows {
    let (k, rank, out) = (kernels(), truth.rank(), truth.len());
    let mut all = rows(rng, rank, out, n, &[0], true);
    all.weight.fill(1.0);
    for i in 0..n {
        let mut target = vec![0.0; out];
        truth.combine(k, &all.u[i * rank..(i + 1) * rank], &mut target, false);
        all.stored[i * out..(i + 1) * out].copy_from_slice(&target);
        for (t, b) in target.iter_mut().zip(&all.base[i * out..]) {
            *t = sign * *t + b + rng.symmetric(0.05);
        }
        all.feedback[i] = Arc::new(Feedback::target(target, TargetLoss::Mse).unwrap());
    }
    all
}

/// What recursive least squares makes of the rows: ridge regression from `from` with its Gram as prior.
fn learn(from: &Side, rows: &Rows, window: bool) -> Side {
    let mut p = problem(0, settings("best_only"), (from.b.rank(), from.b.len()), [1, 0], &[0]);
    p.settings = Settings { best_share: 1.0, ridge: 0.01, ..p.settings };
    (p.slow, p.fast, p.window) = (from.clone(), from.clone(), rows.clone());
    let mut gram = if window { vec![0.0; from.gram.len()] } else { from.gram.clone() };
    for u in rows.u.chunks(rows.rank) {
        for (i, g) in gram.iter_mut().enumerate() {
            *g += f64::from(u[i / rows.rank]) * f64::from(u[i % rows.rank]);
        }
    }
    Side { b: Arc::new(run(kernels(), &p).b), gram, events: rows.len() as u64, quality: Some(0.7) }
}

/// Slow has learned from 30 clean events, fast from a window besides.
fn stage(
    seed: u64,
    sign: f32,
    replayed: bool,
    strategy: &'static crate::learn::consolidate::Row,
) -> (Problem, Rows) {
    let (rank, out) = (8, 24);
    let mut rng = Rng::new(seed, 1);
    let truth = factor(&mut rng, rank, out);
    let zero = Side {
        b: Arc::new(Factor::zeros(rank, out, Dtype::F32)),
        gram: vec![0.0; rank * rank],
        events: 0,
        quality: Some(0.7),
    };
    let mut clean = stream(&mut rng, &truth, 30, 1.0);
    let slow = learn(&zero, &clean, false);
    let mut window = stream(&mut rng, &truth, 64, sign);
    window.stored.clear();
    window.quality.fill(0.7);
    clean.quality.fill(0.7);
    let fast = learn(&slow, &window, true);
    if !replayed {
        clean = Rows::default();
    }
    let held = stream(&mut rng, &truth, 40, 1.0);
    // As many as slow's events are to the window's: Laplace's own weight, at which the penalty loses nothing.
    let settings = Settings { ewc_lambda: 30.0 / 64.0, ridge: 0.01, ..named(strategy) };
    (Problem { settings, slow, fast, snapshots: Vec::new(), window, replay: clean }, held)
}

fn verdict(p: &Problem, held: &Rows) -> Verdict {
    let k = kernels();
    let candidate = run(k, p).b;
    let loss = |b: &Factor| mean_loss(k, b, held);
    GATE.judge(loss(&p.slow.b), loss(&p.fast.b), loss(&candidate), held.len())
}

#[test]
fn a_poisoned_window_rolls_back_and_a_clean_one_is_accepted() {
    for row in STRATEGIES.iter().filter(|row| row.name != "ensemble") {
        for (replayed, seed) in [true, false].into_iter().flat_map(|r| (0..5).map(move |s| (r, s))) {
            let (p, held) = stage(seed, -1.0, replayed, row);
            assert_eq!(verdict(&p, &held), Verdict::RollBack, "{} {replayed} {seed}", row.name);
            // A mean with a slow that has seen less, or a fifth of the window, cannot reach what fast has from all.
            let want = match row.name {
                "average" | "best_only" => Verdict::KeepLive,
                _ => Verdict::Accept,
            };
            let (p, held) = stage(seed, 1.0, replayed, row);
            assert_eq!(verdict(&p, &held), want, "{} {replayed} {seed}", row.name);
        }
    }
}

#[test]
fn poison_that_is_rated_low_is_refused_by_those_that_look_at_quality() {
    for seed in 0..5 {
        for (name, want) in [
            ("quality_weighted", Verdict::Accept),
            ("best_only", Verdict::Accept),
            ("ewc_merge", Verdict::RollBack),
            ("average", Verdict::RollBack),
        ] {
            let (clean, held) = stage(seed, 1.0, true, strategy(name).unwrap());
            let (poisoned, _) = stage(seed, -1.0, true, strategy(name).unwrap());
            let mut p = clean.clone();
            for i in (0..64).filter(|i| i % 4 > 0) {
                p.window.feedback[i] = Arc::clone(&poisoned.window.feedback[i]);
                p.window.quality[i] = 0.1;
            }
            p.fast = learn(&p.slow, &p.window, true);
            p.fast.quality = p.window.mean_quality();
            assert_eq!(verdict(&p, &held), want, "{name} {seed}");
        }
    }
}

#[test]
fn the_mean_loss_is_the_weighted_mean_of_what_has_one() {
    let k = kernels();
    let mut rng = Rng::new(4, 4);
    let b = factor(&mut rng, 3, 7);
    let all = rows(&mut rng, 3, 7, 50, &[0, 1], false);
    let (mut sum, mut total) = (0.0, 0.0);
    for i in (0..50).step_by(2) {
        let Feedback::Target { target, .. } = &*all.feedback[i] else { unreachable!() };
        let mut y = all.base[i * 7..(i + 1) * 7].to_vec();
        b.combine(k, &all.u[i * 3..(i + 1) * 3], &mut y, true);
        let miss: f64 = y.iter().zip(target).map(|(y, t)| f64::from(y - t).powi(2)).sum();
        sum += f64::from(all.weight[i]) * 0.5 * miss;
        total += f64::from(all.weight[i]);
    }
    let got = mean_loss(k, &b, &all).unwrap();
    assert!((got - sum / total).abs() < 1e-5 * got, "{got} {}", sum / total);

    assert_eq!(mean_loss(k, &b, &Rows::default()), None);
    assert_eq!(mean_loss(k, &b, &rows(&mut rng, 3, 7, 4, &[1], false)), None, "gradients have no loss");
    let mut silent = rows(&mut rng, 3, 7, 4, &[2], false);
    (silent.u, silent.base) = (vec![0.0; 12], vec![0.0; 28]);
    assert_eq!(mean_loss(k, &b, &silent), None, "a zero output has no angle");
    let mut huge = rows(&mut rng, 3, 7, 4, &[0], false);
    huge.base[0] = f32::MAX;
    assert_eq!(mean_loss(k, &b, &huge), Some(f64::INFINITY));
    let mut none = rows(&mut rng, 3, 7, 4, &[0], false);
    none.weight.fill(0.0);
    assert_eq!(mean_loss(k, &b, &none), None);
}
