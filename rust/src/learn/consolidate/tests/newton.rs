//! Steps on curved losses: gradients, descent, slices.

use proptest::prelude::*;

use super::fixtures::*;
use crate::dtype::Dtype;
use crate::error::Error;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::Feedback;
use crate::learn::consolidate::general;
use crate::learn::consolidate::objective::{Block, Part, Quadratic};
use crate::learn::consolidate::strategy::Plan;
use crate::learn::consolidate::{Problem, Run};
use crate::learn::feedback::Output;

/// The whole objective at B by its definition, row by row; the gradient's proxy is taken around `start`.
fn objective(k: &Kernels, p: &Problem, plan: &Plan, start: &Factor, b: &Factor) -> f64 {
    let (rank, out) = (b.rank(), b.len());
    let mut sum = 0.0;
    for (rows, coefs, logit) in [(&p.window, &plan.window, 0.0), (&p.replay, &plan.replay, plan.logit)] {
        for i in 0..rows.len() {
            let u = &rows.u[i * rank..(i + 1) * rank];
            let (mut delta, mut from) = (vec![0.0; out], vec![0.0; out]);
            b.combine(k, u, &mut delta, false);
            start.combine(k, u, &mut from, false);
            let y: Vec<f32> = delta.iter().zip(&rows.base[i * out..]).map(|(d, b)| d + b).collect();
            let c = f64::from(coefs.get(i).copied().unwrap_or(0.0));
            sum += c * match &*rows.feedback[i] {
                Feedback::Gradient { gradient } => (delta.iter().zip(&from).zip(gradient))
                    .map(|((d, f), g)| f64::from(d - f) * (f64::from(*g) + f64::from(d - f) / 0.6))
                    .sum(),
                f => f64::from(
                    f.evaluate(k, Output { y: &y, delta: &delta }, rows.advantage[i], None).unwrap_or(0.0),
                ),
            };
            if logit > 0.0 {
                let stored = &rows.stored[i * out..(i + 1) * out];
                let miss: f64 = delta.iter().zip(stored).map(|(d, s)| f64::from(d - s).powi(2)).sum();
                sum += 0.5 * f64::from(logit) * miss;
            }
        }
    }
    let (now, slow) = (b.to_f32(false), p.slow.b.to_f32(false));
    sum += 0.5 * plan.ridge * now.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
    for (at, a) in plan.anchor.iter().enumerate() {
        let (i, j) = (at / rank, at % rank);
        sum += 0.5
            * a
            * (0..out)
                .map(|c| {
                    f64::from(now[i * out + c] - slow[i * out + c])
                        * f64::from(now[j * out + c] - slow[j * out + c])
                })
                .sum::<f64>();
    }
    sum
}

/// The objective's gradient at B, as the run sums it up.
fn gradient(k: &Kernels, p: &Problem, plan: &Plan, b: &Factor) -> Vec<f32> {
    let (rank, out) = (b.rank(), b.len());
    let (mut q, mut block) = (Quadratic::new(rank, out), Block::default());
    q.add(k, b, &p.window, Part::Window, plan, 0..p.window.len(), &mut block);
    q.add(k, b, &p.replay, Part::Replay, plan, 0..p.replay.len(), &mut block);
    q.close(k, &b.to_f32(false), &p.slow.b.to_f32(false), plan);
    let mut sums =
        general::Sums { loss: 0.0, g: Factor::zeros(rank, out, Dtype::F32), h: vec![0.0; rank * rank] };
    general::gather(k, b, p, &mut general::samples(p, plan), &mut sums, &mut block);
    k.axpy(1.0, sums.g.stream(), q.g.stream_mut());
    q.g.to_f32(false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gradients_match_finite_differences(
        seed in 0u64..10_000, rank in 1usize..6, out in 2usize..20, n in 1usize..8, m in 0usize..8,
        kind in 0usize..6,
    ) {
        let p = problem(seed, settings("ewc_merge"), (rank, out), [n, m], &[kind]);
        let plan = (p.settings.strategy.plan)(&p);
        for k in Kernels::available() {
            let b = &p.fast.b;
            let g = gradient(k, &p, &plan, b);
            let d = p.slow.b.to_f32(false);
            let eps = 1e-3f32;
            let moved = |by: f32| {
                let mut to = Factor::clone(b);
                k.axpy(by, p.slow.b.stream(), to.stream_mut());
                objective(k, &p, &plan, b, &to)
            };
            let slope = (moved(eps) - moved(-eps)) / f64::from(2.0 * eps);
            let want: f64 = g.iter().zip(&d).map(|(g, d)| f64::from(g * d)).sum();
            let scale = g.iter().map(|g| f64::from(g.abs())).sum::<f64>() + 1.0;
            prop_assert!((slope - want).abs() < 2e-3 * scale, "{}: {slope} {want} {scale}", k.isa());
        }
    }

    #[test]
    fn a_step_never_raises_the_objective(
        seed in 0u64..10_000, rank in 1usize..10, out in 2usize..30, n in 0usize..40, m in 0usize..40,
        kind in 0usize..7, steps in 1usize..5, row in 0usize..3,
    ) {
        let name = ["ewc_merge", "quality_weighted", "best_only"][row];
        let kinds: &[usize] = if kind == 6 { &[0, 1, 2, 3, 4, 5] } else { &[kind] };
        let mut p = problem(seed, settings(name), (rank, out), [n, m], kinds);
        p.settings.steps = steps;
        let plan = (p.settings.strategy.plan)(&p);
        let mut merged = p.clone();
        merged.settings.steps = 0;
        for k in Kernels::available() {
            let start = run(k, &merged).b;
            let got = run(k, &p);
            let before = objective(k, &p, &plan, &start, &start);
            let after = objective(k, &p, &plan, &start, &got.b);
            prop_assert!(after <= before + 1e-5 * (1.0 + before.abs()), "{}: {before} -> {after}", k.isa());
        }
    }
}

#[test]
fn more_steps_lower_a_curved_objective_further() {
    let k = kernels();
    for kind in 2..6 {
        let mut p = problem(3, settings("ewc_merge"), (8, 24), [40, 60], &[kind]);
        let plan = (p.settings.strategy.plan)(&p);
        p.settings.steps = 0;
        let start = run(k, &p).b;
        let at = |steps: usize| {
            let mut p = p.clone();
            p.settings.steps = steps;
            objective(k, &p, &plan, &start, &run(k, &p).b)
        };
        let (zero, one, three) = (at(0), at(1), at(3));
        assert!(one < 0.999 * zero && three < 0.999 * one, "{kind}: {zero} {one} {three}");
    }
}

#[test]
fn one_step_is_exact_for_squared_errors_and_more_change_nothing() {
    let k = kernels();
    let mut p = problem(5, settings("ewc_merge"), (8, 24), [40, 60], &[0, 1]);
    p.settings.steps = 1;
    let one = run(k, &p).b;
    p.settings.steps = 9;
    assert!(run(k, &p).b == one);
}

#[test]
fn a_lone_gradient_moves_its_output_by_its_step() {
    let k = kernels();
    let mut p = problem(6, settings("ewc_merge"), (4, 12), [1, 0], &[1]);
    (p.settings.ridge, p.settings.ewc_lambda) = (0.0, 0.0);
    p.fast = p.slow.clone();
    let Feedback::Gradient { gradient } = &*p.window.feedback[0] else { unreachable!() };
    let (mut before, mut after) = (vec![0.0; 12], vec![0.0; 12]);
    p.slow.b.combine(k, &p.window.u, &mut before, false);
    run(k, &p).b.combine(k, &p.window.u, &mut after, false);
    for ((a, b), g) in after.iter().zip(&before).zip(gradient) {
        assert!((a - (b - 0.3 * g)).abs() < 1e-4, "{a} {b} {g}");
    }
}

#[test]
fn a_replayed_gradient_pulls_by_its_stored_output_only() {
    let k = kernels();
    let mut p = problem(6, settings("ewc_merge"), (4, 12), [5, 9], &[1]);
    p.window = Default::default();
    let one = run(k, &p).b;
    let mut rng = crate::rng::Rng::new(99, 0);
    p.replay.feedback = (0..9).map(|_| feedback(1, &mut rng, 12)).collect();
    assert!(run(k, &p).b == one, "another gradient must change nothing");
    p.replay.stored.iter_mut().for_each(|v| *v += 0.1);
    assert!(run(k, &p).b != one);
}

#[test]
fn a_zero_output_is_left_out_and_told() {
    let k = kernels();
    let mut p = problem(8, settings("best_only"), (4, 12), [6, 0], &[2]);
    p.settings.best_share = 1.0;
    p.slow.b = std::sync::Arc::new(Factor::zeros(4, 12, Dtype::F32));
    p.window.base.fill(0.0);
    let got = run(k, &p);
    assert!(got.b.is_zero());
    assert!(got.notes.iter().any(|n| n.contains("6 samples")), "{:?}", got.notes);
}

#[test]
fn a_slice_is_bounded_and_a_run_goes_on_after_a_pause() {
    let k = kernels();
    let p = problem(9, settings("ewc_merge"), (16, 32), [200, 300], &[0, 5]);
    let mut slices = 0;
    let mut run = Run::new(k, p.clone()).unwrap();
    let first = loop {
        slices += 1;
        if let Some(outcome) = run.advance().unwrap() {
            break outcome;
        }
    };
    // Merge, 4 + 5 slices of reading, and two steps of 2 + 3 slices of gathering and of trying, and a solve.
    assert!(slices >= 1 + 9 + 2 * (4 + 4 + 1), "{slices}");
    assert!(run.advance().unwrap().unwrap().b == first.b, "the end repeats itself");
    assert!(super::fixtures::run(k, &p).b == first.b, "the same bits");
}

#[test]
fn what_is_not_finite_is_refused_by_name() {
    let k = kernels();
    let good = problem(10, settings("ewc_merge"), (4, 12), [6, 5], &[0]);
    let all = |p: Problem| -> Result<(), Error> {
        let mut run = Run::new(k, p)?;
        while run.advance()?.is_none() {}
        Ok(())
    };
    all(good.clone()).unwrap();
    type Break = fn(&mut Problem);
    let cases: [(&str, Break); 15] = [
        ("window.u", |p| p.window.u[3] = f32::NAN),
        ("window.base", |p| p.window.base[3] = f32::NAN),
        ("replay.base", |p| p.replay.base[3] = f32::INFINITY),
        ("replay.stored", |p| p.replay.stored[3] = f32::NAN),
        ("replay.stored", |p| p.replay.stored.truncate(1)),
        ("window.weight", |p| p.window.weight[0] = -1.0),
        ("window.advantage", |p| p.window.advantage[0] = f32::NAN),
        ("window.quality", |p| p.window.quality[0] = f32::INFINITY),
        ("slow.gram", |p| p.slow.gram[0] = f64::NAN),
        ("fast.gram", |p| p.fast.gram.truncate(3)),
        ("fast.b", |p| p.fast.b = factor(&mut crate::rng::Rng::new(0, 0), 3, 12)),
        ("replay_ratio", |p| p.settings.replay_ratio = f64::NAN),
        ("ridge", |p| p.settings.ridge = -1.0),
        ("best_share", |p| p.settings.best_share = 0.0),
        ("window", |p| {
            p.window.base.fill(f32::MAX);
            p.window.u.fill(2.0);
        }),
    ];
    for (arg, spoil) in cases {
        let mut p = good.clone();
        spoil(&mut p);
        let e = all(p).expect_err(arg).to_string();
        assert!(e.starts_with(arg), "{arg}: {e}");
    }
}

#[test]
fn a_reservoir_that_does_not_count_leaves_the_penalty_in_its_place() {
    let k = kernels();
    let mut p = problem(11, settings("ewc_merge"), (4, 12), [6, 5], &[0]);
    p.settings.replay_ratio = 0.0;
    p.settings.ridge = 0.0;
    let mut empty = p.clone();
    empty.replay = Default::default();
    assert!(run(k, &p).b == run(k, &empty).b);
    empty.settings.ewc_lambda = 1e9;
    assert!(apart(&run(k, &empty).b, &p.slow.b) < 1e-4, "lambda without end holds slow");
    empty.settings.ewc_lambda = 0.0;
    assert!(apart(&run(k, &empty).b, &p.slow.b) > 1e-2);
}

#[test]
fn a_run_may_move_between_threads() {
    fn moves<T: Send>(_: T) {}
    moves(Run::new(kernels(), problem(1, settings("average"), (2, 3), [2, 2], &[0, 5])).unwrap());
}
