//! What holds for every case.

use std::sync::Arc;

use microlora::Dtype;
use microlora::ewc::{Anchors, Ewc, EwcSettings, Fisher, Step};
use microlora::factor::Factor;
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::learn::{Feedback, Regularizer};
use microlora::rng::Rng;
use proptest::prelude::*;

use crate::support::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn squares_are_of_samples_not_of_their_mean(
        seed in 0u64..10_000, n in 1usize..80, n_in in 1usize..40, n_out in 1usize..40, rank in 1usize..10,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(n_in, n_out, rank), Rng::new(seed, 1));
            let layer = case.layer(&mut rng);
            let (x, g) = case.samples(&mut rng, n);
            for (kind, f) in [("factor", (|v| v * v) as fn(f64) -> f64), ("mas", f64::abs)] {
                let want = mean_of(&case, &layer, &x, &g, f);
                let mut ewc = case.ewc(&layer, settings(kind));
                feed(&mut ewc, k, &layer, &x, &g);
                for (got, want) in ewc.task_fisher(k, 0).unwrap().iter().zip(&want) {
                    close(&wide(got), want, 1e-5, kind);
                }
                let ([a, c], count) = ewc.moments(k, 0);
                assert_eq!(count, n as u64);
                let mean = |v: &[f32], len: usize| -> Vec<f64> {
                    (0..len).map(|i| v.chunks_exact(len).map(|r| f64::from(r[i]).powi(2)).sum::<f64>() / n as f64).collect()
                };
                close(&a, &mean(&x, n_in), 1e-5, "a");
                close(&c, &mean(&g, n_out), 1e-5, "c");
            }
            // The classic mistake is another number: this test would see it.
            if n > 8 {
                let mean = |v: &[f32], len: usize| -> Vec<f32> {
                    (0..len).map(|i| v.chunks_exact(len).map(|r| r[i]).sum::<f32>() / n as f32).collect()
                };
                let wrong = mean_of(&case, &layer, &mean(&x, n_in), &mean(&g, n_out), |v| v * v);
                let right = mean_of(&case, &layer, &x, &g, |v| v * v);
                let sum = |v: &[Vec<f64>; 2]| v.iter().flatten().sum::<f64>();
                assert!(sum(&wrong) < 0.8 * sum(&right), "{} {}", sum(&wrong), sum(&right));
            }
        });
    }

    #[test]
    fn the_fisher_does_not_see_batches_nor_order(
        seed in 0u64..10_000, n in 2usize..70, cut in 1usize..69, rank in 1usize..6,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(19, 33, rank), Rng::new(seed, 2));
            let layer = case.layer(&mut rng);
            let (x, g) = case.samples(&mut rng, n);
            let cut = cut.min(n - 1);
            let mut whole = case.ewc(&layer, settings("factor"));
            feed(&mut whole, k, &layer, &x, &g);
            let mut parts = case.ewc(&layer, settings("factor"));
            feed(&mut parts, k, &layer, &x[..cut * 19], &g[..cut * 33]);
            feed(&mut parts, k, &layer, &x[cut * 19..], &g[cut * 33..]);
            let mut single = case.ewc(&layer, settings("factor"));
            let mut back = case.ewc(&layer, settings("factor"));
            let lora = case.lora(&layer);
            for i in 0..n {
                let j = n - 1 - i;
                feed(&mut back, k, &layer, &x[j * 19..][..19], &g[j * 33..][..33]);
                let f = Feedback::gradient(g[i * 33..][..33].to_vec()).unwrap();
                event(&lora, &x[i * 19..][..19], &f, None, &mut single);
            }
            assert_eq!(single.samples(), n as u64);
            let want = whole.task_fisher(k, 0).unwrap();
            for other in [&mut parts, &mut single, &mut back] {
                for (got, want) in other.task_fisher(k, 0).unwrap().iter().zip(&want) {
                    close(&wide(got), &wide(want), 2e-6, "batches");
                }
                let ([a, c], _) = other.moments(k, 0);
                let ([wa, wc], _) = whole.moments(k, 0);
                close(&a, &wa, 2e-6, "a");
                close(&c, &wc, 2e-6, "c");
            }
        });
    }

    #[test]
    fn the_delta_penalty_is_the_dense_one_and_its_gradient_the_slope(
        seed in 0u64..10_000, n_in in 1usize..20, n_out in 1usize..20, rank in 1usize..5,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(n_in, n_out, rank), Rng::new(seed, 3));
            let (then, now) = (case.layer(&mut rng), case.layer(&mut rng));
            let (x, g) = case.samples(&mut rng, 12);
            let mut ewc = case.ewc(&then, settings("delta"));
            feed(&mut ewc, k, &then, &x, &g);
            let ([a, c], _) = ewc.moments(k, 0);
            ewc.start_new_task(k, &[Arc::clone(&then)]).unwrap();
            let want = 3.0 * dense(&case, &a, &c, &now, &then);
            let got = ewc.penalty(k, &[Arc::clone(&now)]);
            assert!((got - want).abs() <= 1e-5 * want, "{got} {want}");
            let slope = differences(&case, &mut ewc, k, &now);
            let gradient = ewc.penalty_gradient(k, 0, &now);
            for (got, want) in gradient.iter().zip(&slope) {
                close(&wide(got), want, 2e-4, "gradient");
            }
        });
    }

    #[test]
    fn the_delta_penalty_does_not_see_the_gauge_and_the_factor_penalty_does(
        seed in 0u64..10_000, rank in 2usize..6, angle in 0.3f64..2.8, stretch in 0.5f64..2.0,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(23, 18, rank), Rng::new(seed, 4));
            let (then, now) = (case.layer(&mut rng), case.layer(&mut rng));
            // Q turns the first two directions and stretches them.
            let (sin, cos) = angle.sin_cos();
            let turn = |f: &Factor, len: usize, c: f64| -> Vec<f32> {
                let mut v = wide(f);
                for i in 0..len {
                    let (p, q) = (v[i], v[len + i]);
                    (v[i], v[len + i]) = (c * (cos * p - sin * q), c * (sin * p + cos * q));
                }
                v.iter().map(|v| *v as f32).collect()
            };
            let gauge = |l: &Layer| case.of_rows(&turn(&l.a, 23, stretch), &turn(&l.b, 18, 1.0 / stretch));
            let (x, g) = case.samples(&mut rng, 20);
            let penalties = |kind: &str| {
                let mut ewc = case.ewc(&then, settings(kind));
                feed(&mut ewc, k, &then, &x, &g);
                ewc.start_new_task(k, &[Arc::clone(&then)]).unwrap();
                [&now, &gauge(&now), &gauge(&then)].map(|l| ewc.penalty(k, &[Arc::clone(l)]))
            };
            let [plain, turned, still] = penalties("delta");
            assert!((plain - turned).abs() <= 1e-5 * plain, "{plain} {turned}");
            assert!(still <= 1e-9 * plain, "{still} {plain}");
            let [plain, _, still] = penalties("factor");
            assert!(still > 1e-3 * plain);
        });
    }

    #[test]
    fn a_sum_over_weights_has_its_slope_and_collapses(seed in 0u64..10_000, kind in 1usize..5) {
        each(|k| {
            let (case, mut rng) = (Case::new(9, 11, 3), Rng::new(seed, 5));
            let kind = KINDS[kind];
            let anchors: Vec<_> = (0..3).map(|_| case.layer(&mut rng)).collect();
            let now = case.layer(&mut rng);
            let parts = EwcSettings { anchors: Anchors::Separate, ..settings(kind) };
            let mut all = case.ewc(&anchors[0], parts);
            let mut sum = 0.0;
            for at in &anchors {
                let (x, g) = case.samples(&mut rng, 7);
                let mut one = case.ewc(&anchors[0], settings(kind));
                let step = [&anchors[0], &now].map(|l| (&*l.a, &*l.b));
                for ewc in [&mut all, &mut one] {
                    feed(ewc, k, at, &x, &g);
                    if kind == "si" {
                        // A new path from the beginning of the task, with some sign in each weight.
                        let [ga, gb] = [at.a.cast(Dtype::F32), at.b.cast(Dtype::F32)];
                        ewc.path(0, (&ga, &gb), step[0], step[1]);
                    }
                    ewc.start_new_task(k, &[Arc::clone(at)]).unwrap();
                }
                if kind != "si" {
                    sum += one.penalty(k, &[Arc::clone(&now)]);
                }
            }
            let got = all.penalty(k, &[Arc::clone(&now)]);
            if kind != "si" {
                assert!((got - sum).abs() <= 1e-5 * sum, "{kind}: {got} {sum}");
            }
            let slope = differences(&case, &mut all, k, &now);
            for (got, want) in all.penalty_gradient(k, 0, &now).iter().zip(&slope) {
                close(&wide(got), want, 1e-5, kind);
            }
        });
    }

    #[test]
    fn right_after_a_task_nothing_pulls_and_lambda_scales(
        seed in 0u64..10_000, kind in 0usize..5, tasks in 1usize..4,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(17, 12, 4), Rng::new(seed, 6));
            let kind = KINDS[kind];
            let first = case.layer(&mut rng);
            let at = |lambda: f64| case.ewc(&first, EwcSettings { lambda, ..settings(kind) });
            let mut all = [0.0, 1.0, 2.5].map(at);
            let mut layer = first;
            for _ in 0..tasks {
                let before = Arc::clone(&layer);
                layer = case.layer(&mut rng);
                let (x, g) = case.samples(&mut rng, 5);
                for ewc in &mut all {
                    feed(ewc, k, &layer, &x, &g);
                    let gradient = [&before.a, &before.b].map(|f| f.cast(Dtype::F32));
                    ewc.path(0, (&gradient[0], &gradient[1]), (&before.a, &before.b), (&layer.a, &layer.b));
                    ewc.start_new_task(k, &[Arc::clone(&layer)]).unwrap();
                    assert_eq!(ewc.penalty(k, &[Arc::clone(&layer)]), 0.0);
                    // The same numbers in other memory count as the same place.
                    let copy = case.of_rows(&layer.a.to_f32(false), &layer.b.to_f32(false));
                    assert_eq!(ewc.penalty(k, &[Arc::clone(&copy)]), 0.0);
                    assert!(ewc.penalty_gradient(k, 0, &copy).iter().all(Factor::is_zero));
                }
            }
            assert_eq!(all[1].task_count(), tasks as u64);
            let now = case.layer(&mut rng);
            let [zero, one, more] = all.each_mut().map(|e| e.penalty(k, &[Arc::clone(&now)]));
            assert_eq!(zero, 0.0);
            assert!(one > 0.0 && (more - 2.5 * one).abs() <= 1e-9 * more, "{one} {more}");
            let mut ga = now.a.cast(Dtype::F32);
            let mut gb = now.b.cast(Dtype::F32);
            all[0].add_gradient(k, 0, &now, 1.0, (&mut ga, &mut gb)).unwrap();
            assert!(ga == *now.a && gb == *now.b && !all[0].is_active() && all[1].is_active());
        });
    }

    #[test]
    fn an_implicit_step_is_bounded_whatever_lambda(
        seed in 0u64..10_000, kind in 1usize..5, power in -3i32..38,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(13, 10, 2), Rng::new(seed, 7));
            let lambda = 10f64.powi(power);
            let then = case.layer(&mut rng);
            let step = EwcSettings { lambda, step: Step::Proximal, ..settings(KINDS[kind]) };
            let mut ewc = case.ewc(&then, step);
            let (mut x, g) = case.samples(&mut rng, 6);
            // One input never seen: its weights have no importance.
            x.chunks_exact_mut(13).for_each(|row| row[4] = 0.0);
            feed(&mut ewc, k, &then, &x, &g);
            let fisher = ewc.task_fisher(k, 0);
            ewc.start_new_task(k, &[Arc::clone(&then)]).unwrap();
            let before = case.layer(&mut rng);
            let mut after = (*before).clone();
            ewc.proximal(0, 0.1, &mut after);
            let (a, b, t) = (after.a.to_f32(false), before.a.to_f32(false), then.a.to_f32(false));
            for r in 0..2 {
                for i in 0..13 {
                    let (a, b, t) = (a[r * 13 + i], b[r * 13 + i], t[r * 13 + i]);
                    assert!(a.is_finite() && (a - t).abs() <= (b - t).abs() * 1.000_001, "{a} {b} {t}");
                    if i == 4 && matches!(KINDS[kind], "factor" | "mas") {
                        assert_eq!(a.to_bits(), b.to_bits());
                    }
                }
            }
            // (th + lr lambda F th*) / (1 + lr lambda F), in float64.
            if let Some([fa, fb]) = fisher {
                for (f, now, old, th) in
                    [(&fa, &after.a, &before.a, &then.a), (&fb, &after.b, &before.b, &then.b)]
                {
                    let implicit = |((f, b), t): ((f64, f64), f64)| {
                        let pull = 0.1 * lambda * f;
                        b / (1.0 + pull) + t * (pull / (1.0 + pull))
                    };
                    let want: Vec<f64> = wide(f).into_iter().zip(wide(old)).zip(wide(th)).map(implicit).collect();
                    close(&wide(now), &want, 1e-5, KINDS[kind]);
                }
            }
            if power >= 12 && KINDS[kind] == "l2" {
                assert!(a == t);
            }
            if power >= 12 && KINDS[kind] == "factor" {
                let kept = (0..26).filter(|i| i % 13 != 4).all(|i| (a[i] - t[i]).abs() < 1e-6);
                assert!(kept, "{a:?} {t:?}");
            }
            // With the gradient step it does nothing.
            let mut same = (*before).clone();
            let idle = case.ewc(&then, settings(KINDS[kind]));
            idle.proximal(0, 0.1, &mut same);
            assert!(same == *before);
        });
    }

    #[test]
    fn passes_of_one_batch_add_up(seed in 0u64..10_000, n in 1usize..40, passes in 1usize..5) {
        each(|k| {
            let (case, mut rng) = (Case::new(8, 6, 2), Rng::new(seed, 8));
            let layer = case.layer(&mut rng);
            let (x, _) = case.samples(&mut rng, n);
            let gs: Vec<_> = (0..passes).map(|_| case.samples(&mut rng, n).1).collect();
            let mut ewc = case.ewc(&layer, settings("factor"));
            for g in &gs {
                ewc.observe_gradients(k, 0, &layer, &x, g).unwrap();
            }
            ewc.seen(n).unwrap();
            let mut want = [vec![0.0; 16], vec![0.0; 12]];
            for g in &gs {
                let one = mean_of(&case, &layer, &x, g, |v| v * v);
                want.iter_mut().zip(&one).for_each(|(w, o)| w.iter_mut().zip(o).for_each(|(w, o)| *w += o));
            }
            for (got, want) in ewc.task_fisher(k, 0).unwrap().iter().zip(&want) {
                close(&wide(got), want, 1e-5, "passes");
            }
            // x counts once per sample, g once per pass.
            let ([a, c], _) = ewc.moments(k, 0);
            let square = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            close(&[a.iter().sum()], &[square(&x)], 1e-5, "a");
            close(&[c.iter().sum()], &[gs.iter().map(|g| square(g)).sum()], 1e-5, "c");
        });
    }

    #[test]
    fn a_moving_average_weighs_batches_and_is_not_reset(
        seed in 0u64..10_000, n in 1usize..70, d in 0.05f64..0.99,
    ) {
        each(|k| {
            let (case, mut rng) = (Case::new(7, 5, 2), Rng::new(seed, 9));
            let layer = case.layer(&mut rng);
            let lora = case.lora(&layer);
            let (x, g) = case.samples(&mut rng, n);
            let decayed = |kind| EwcSettings { decay: Some(d), ..settings(kind) };
            let mut batches = case.ewc(&layer, decayed("factor"));
            let mut events = case.ewc(&layer, decayed("factor"));
            let mut mean = [0.0; 14];
            for i in 0..n {
                let (x, g) = (&x[i * 7..][..7], &g[i * 5..][..5]);
                feed(&mut batches, k, &layer, x, g);
                event(&lora, x, &Feedback::gradient(g.to_vec()).unwrap(), None, &mut events);
                let one = mean_of(&case, &layer, x, g, |v| v * v);
                mean.iter_mut().zip(&one[0]).for_each(|(m, f)| *m = d * *m + (1.0 - d) * f);
            }
            let want: Vec<f64> = mean.iter().map(|m| m / (1.0 - d.powi(n as i32))).collect();
            close(&wide(&batches.task_fisher(k, 0).unwrap()[0]), &want, 1e-5, "batches");
            close(&wide(&events.task_fisher(k, 0).unwrap()[0]), &want, 1e-5, "events");
            // Used at the boundary, it goes on afterwards; the next boundary does not sum.
            let layers = [Arc::clone(&layer)];
            batches.start_new_task(k, &layers).unwrap();
            let top = batches.max_importance();
            assert!(batches.start_new_task(k, &layers).is_err(), "no samples since");
            feed(&mut batches, k, &layer, &x[..7], &g[..5]);
            batches.start_new_task(k, &layers).unwrap();
            let one = mean_of(&case, &layer, &x[..7], &g[..5], |v| v * v);
            let bound = one.iter().flatten().fold(0.0f64, |m, v| m.max(*v)).max(top);
            assert!(batches.max_importance() <= bound * 1.00001);
        });
    }

    #[test]
    fn a_state_survives_its_bytes_and_goes_on_bit_for_bit(
        seed in 0u64..10_000, kind in 0usize..5, decay in any::<bool>(), separate in any::<bool>(),
        open in any::<bool>(), events in 0usize..40,
    ) {
        let k = Kernels::detect().unwrap();
        let (case, mut rng) = (Case::new(10, 6, 2), Rng::new(seed, 10));
        let kind = KINDS[kind];
        let decay = (decay && !matches!(kind, "l2" | "si")).then_some(0.9);
        let anchors = if separate && decay.is_none() { Anchors::Separate } else { Anchors::Online };
        let settings = EwcSettings { decay, anchors, fisher: Fisher::Sample, samples: Some(60), ..settings(kind) };
        let start = case.layer(&mut rng);
        let lora = case.lora(&start);
        let run = |ewc: &mut Ewc, rng: &mut Rng, open: bool| {
            for task in 0..2 {
                let layer = case.layer(rng);
                let (x, g) = case.samples(rng, 5);
                feed(ewc, k, &layer, &x, &g);
                for _ in 0..events {
                    let f = Feedback::preference(numbers(rng, 6, 1.0), numbers(rng, 6, 1.0), 0.8, 3.0).unwrap();
                    event(&lora, &numbers(rng, 10, 1.0), &f, Some(&numbers(rng, 6, 1.0)), ewc);
                }
                ewc.path(0, (&layer.a, &layer.b), (&start.a, &start.b), (&layer.a, &layer.b));
                if task == 0 {
                    ewc.start_new_task(k, &[layer]).unwrap();
                } else if open {
                    ewc.observe_gradients(k, 0, &layer, &x, &g).unwrap();
                }
            }
        };
        let mut one = case.ewc(&start, settings);
        run(&mut one, &mut Rng::new(seed, 11), open);
        let bytes = one.export(k, &[], None).unwrap();
        let mut two = case.ewc(&start, settings);
        two.import(&bytes).unwrap();
        prop_assert!(two.export(k, &[], None).unwrap() == bytes);
        for ewc in [&mut one, &mut two] {
            if open {
                ewc.seen(5).unwrap();
            }
            run(ewc, &mut Rng::new(seed, 12), false);
        }
        prop_assert!(one.export(k, &[], None).unwrap() == two.export(k, &[], None).unwrap());
        let now = [case.layer(&mut rng)];
        prop_assert_eq!(one.penalty(k, &now).to_bits(), two.penalty(k, &now).to_bits());
        prop_assert_eq!(one.max_importance().to_bits(), two.max_importance().to_bits());
    }
}
