//! The invariants of each strategy.

use std::sync::Arc;

use proptest::prelude::*;

use super::fixtures::*;
use crate::dtype::Dtype;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::learn::Feedback;
use crate::learn::consolidate::best_only::{best, shrunk};
use crate::learn::consolidate::{Problem, Rows, STRATEGIES, Side, fit_members, member_runs, mix, strategy};
use crate::rng::Rng;

fn mean(sides: &[&Side]) -> Factor {
    let (rank, out) = (sides[0].b.rank(), sides[0].b.len());
    let mut sum = vec![0.0f64; rank * out];
    for side in sides {
        sum.iter_mut().zip(side.b.to_f32(false)).for_each(|(s, v)| *s += f64::from(v));
    }
    let rows: Vec<f32> = sum.iter().map(|s| (s / sides.len() as f64) as f32).collect();
    Factor::from_rows(&rows, rank, out, Dtype::F32)
}

/// A problem of merging alone.
fn merging(seed: u64, name: &str, rank: usize, out: usize) -> Problem {
    let mut p = problem(seed, settings(name), (rank, out), [8, 6], &[0]);
    p.settings.steps = 0;
    p
}

fn shuffled(rows: &Rows, seed: u64) -> Rows {
    let mut rng = Rng::new(seed, 3);
    let mut order: Vec<usize> = (0..rows.len()).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, (rng.uniform() * (i + 1) as f32) as usize % (i + 1));
    }
    rows.select(&order)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_strategy_leaves_an_adapter_merged_with_itself(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..40, row in 0usize..5, snapshots in 0usize..4,
    ) {
        let mut p = problem(seed, named(&STRATEGIES[row]), (rank, out), [8, 6], &[0]);
        p.settings.steps = 0;
        p.fast.b = Arc::clone(&p.slow.b);
        p.snapshots = (0..snapshots).map(|_| p.fast.clone()).collect();
        for k in Kernels::available() {
            prop_assert!(run(k, &p).b == *p.slow.b);
        }
    }

    #[test]
    fn every_strategy_is_blind_to_the_order_of_samples_and_snapshots(
        seed in 0u64..10_000, rank in 1usize..10, out in 2usize..30, row in 0usize..5, n in 1usize..80,
    ) {
        let mut p = problem(seed, named(&STRATEGIES[row]), (rank, out), [n, 70], &[0, 3, 2]);
        p.settings.steps = 1;
        let mut rng = Rng::new(seed, 2);
        p.snapshots = (0..3).map(|_| side(&mut rng, rank, out, 20)).collect();
        let mut other = p.clone();
        other.snapshots.reverse();
        (other.window, other.replay) = (shuffled(&p.window, seed), shuffled(&p.replay, seed + 1));
        for k in Kernels::available() {
            let (one, two) = (run(k, &p), run(k, &other));
            prop_assert!(apart(&one.b, &two.b) < 1e-4, "{} {}", k.isa(), apart(&one.b, &two.b));
            prop_assert_eq!(one.used, two.used);
        }
    }

    #[test]
    fn equal_fishers_merge_to_the_mean(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..40, snapshots in 0usize..3, seen in 1usize..20,
    ) {
        let mut p = merging(seed, "ewc_merge", rank, out);
        let mut rng = Rng::new(seed, 2);
        // Fewer events than ranks leave directions that nobody saw; they are shared alike.
        p.slow.gram = gram(&mut rng, rank, seen);
        p.snapshots = (0..snapshots).map(|_| side(&mut rng, rank, out, 1)).collect();
        let shared = p.slow.gram.clone();
        p.fast.gram = shared.clone();
        p.snapshots.iter_mut().for_each(|s| s.gram = shared.clone());
        let sides: Vec<&Side> = [&p.slow, &p.fast].into_iter().chain(&p.snapshots).collect();
        for k in Kernels::available() {
            let got = apart(&run(k, &p).b, &mean(&sides));
            prop_assert!(got < 1e-5, "{} {got}", k.isa());
        }
    }

    #[test]
    fn a_side_that_saw_nothing_moves_nothing(seed in 0u64..10_000, rank in 1usize..18, out in 1usize..40) {
        let mut p = merging(seed, "ewc_merge", rank, out);
        let full = p.slow.gram.clone();
        p.fast.gram.fill(0.0);
        for k in Kernels::available() {
            prop_assert!(run(k, &p).b == *p.slow.b);
        }
        (p.fast.gram, p.slow.gram) = (full, p.fast.gram.clone());
        for k in Kernels::available() {
            prop_assert!(apart(&run(k, &p).b, &p.fast.b) < 1e-5);
        }
        p.fast.gram.fill(0.0);
        let got = run(kernels(), &p);
        prop_assert!(got.b == *p.slow.b && got.notes.len() == 1);
    }

    #[test]
    fn the_average_is_the_mean_whatever_the_order(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..40, snapshots in 0usize..4,
    ) {
        let mut p = problem(seed, settings("average"), (rank, out), [8, 6], &[0]);
        let mut rng = Rng::new(seed, 2);
        p.snapshots = (0..snapshots).map(|_| side(&mut rng, rank, out, 1)).collect();
        let sides: Vec<&Side> = [&p.slow, &p.fast].into_iter().chain(&p.snapshots).collect();
        let want = mean(&sides);
        let mut other = p.clone();
        std::mem::swap(&mut other.slow, &mut other.fast);
        other.snapshots.reverse();
        for k in Kernels::available() {
            let got = run(k, &p);
            prop_assert!(apart(&got.b, &want) < 1e-6);
            prop_assert!(apart(&run(k, &other).b, &want) < 1e-6);
            prop_assert_eq!(got.used, 0);
        }
    }

    #[test]
    fn equal_qualities_merge_as_the_average_and_train_evenly(
        seed in 0u64..10_000, rank in 1usize..18, out in 1usize..40, q in 0.55f64..1.0, known in 0usize..4,
    ) {
        let mut p = merging(seed, "quality_weighted", rank, out);
        p.slow.quality = (known & 1 > 0).then_some(q);
        p.fast.quality = (known & 2 > 0).then_some(q);
        p.window.quality.fill(q as f32);
        for k in Kernels::available() {
            prop_assert!(apart(&run(k, &p).b, &mean(&[&p.slow, &p.fast])) < 1e-6);
        }
        p.settings.steps = 1;
        let weighted = run(kernels(), &p).b;
        // A weight is made of the quality: with one quality for all, samples count alike.
        p.window.weight.fill(0.3);
        p.window.quality.fill(f32::NAN);
        prop_assert!(apart(&run(kernels(), &p).b, &weighted) < 1e-5);
    }

    #[test]
    fn quality_weights_are_free_of_scale(
        seed in 0u64..10_000, rank in 1usize..10, out in 1usize..30, scale in 0.2f64..5.0, threshold in 0.0f64..0.4,
    ) {
        let mut p = problem(seed, settings("quality_weighted"), (rank, out), [20, 30], &[0, 3]);
        p.window.quality[3] = f32::NAN;
        p.window.quality[0] = 0.9;
        (p.slow.quality, p.fast.quality) = (Some(0.6), Some(0.8));
        p.settings.quality_threshold = threshold;
        let mut other = p.clone();
        other.settings.quality_threshold *= scale;
        for q in other.window.quality.iter_mut().chain(&mut other.replay.quality) {
            *q *= scale as f32;
        }
        (other.slow.quality, other.fast.quality) = (Some(0.6 * scale), Some(0.8 * scale));
        for k in Kernels::available() {
            let (one, two) = (run(k, &p), run(k, &other));
            prop_assert!(apart(&one.b, &two.b) < 1e-4, "{}", apart(&one.b, &two.b));
        }
    }

    #[test]
    fn nothing_above_the_threshold_changes_nothing(seed in 0u64..10_000, rank in 1usize..10, out in 1usize..30) {
        let mut p = problem(seed, settings("quality_weighted"), (rank, out), [20, 30], &[0]);
        p.settings.quality_threshold = 1.0;
        for k in Kernels::available() {
            let got = run(k, &p);
            prop_assert!(got.idle && got.used == 0 && got.notes.len() == 1 && got.b == *p.slow.b);
        }
    }

    #[test]
    fn a_sample_below_the_threshold_does_not_train_but_a_failed_reward_does(
        seed in 0u64..10_000, rank in 1usize..10, out in 2usize..30, reward in any::<bool>(),
    ) {
        let mut p = problem(seed, settings("quality_weighted"), (rank, out), [6, 0], &[0]);
        p.window.quality = vec![0.9, 0.9, 0.9, 0.9, 0.9, 0.1];
        let mut rng = Rng::new(seed, 5);
        p.window.feedback[5] = feedback(if reward { 3 } else { 0 }, &mut rng, out);
        let one = run(kernels(), &p);
        p.window.feedback[5] = feedback(if reward { 3 } else { 0 }, &mut rng, out);
        prop_assert_eq!(run(kernels(), &p).b == one.b, !reward);
        prop_assert_eq!(one.used, if reward { 6 } else { 5 });
    }

    #[test]
    fn best_only_keeps_exactly_its_share_and_is_monotone(
        seed in 0u64..10_000, n in 1usize..60, share in 0.001f64..1.0, which in 0usize..60, rise in 0.0f32..1.0,
        levels in 1u32..6,
    ) {
        let mut rng = Rng::new(seed, 8);
        let mut w = rows(&mut rng, 3, 5, n, &[0], false);
        // Few levels, so that there are ties; some things are rated several times.
        w.quality.iter_mut().for_each(|q| *q = (*q * levels as f32).floor() / levels as f32);
        for i in (2..n).step_by(3) {
            w.feedback[i] = Arc::clone(&w.feedback[i - 1]);
            let (from, to) = w.u.split_at_mut(i * 3);
            to[..3].copy_from_slice(&from[(i - 1) * 3..]);
        }
        let chosen = best(&w, share);
        prop_assert_eq!(chosen.len(), ((share * n as f64).ceil() as usize).max(1));
        let events = |rows: &Rows| {
            let mut e: Vec<u64> = best(rows, share).iter().map(|&i| rows.event[i]).collect();
            e.sort_unstable();
            e
        };
        prop_assert_eq!(events(&w), events(&shuffled(&w, seed)));
        let quality = shrunk(&w);
        let worst = chosen.iter().map(|&i| quality[i]).fold(f32::INFINITY, f32::min);
        for i in (0..n).filter(|i| !chosen.contains(i)) {
            prop_assert!(quality[i] <= worst);
            let tied = chosen.iter().filter(|&&j| quality[j] == quality[i]);
            prop_assert!(tied.map(|&j| w.event[j]).all(|e| e > w.event[i]), "the most recent go first");
        }
        let lifted = chosen[which % chosen.len()];
        w.quality[lifted] += rise;
        prop_assert!(best(&w, share).contains(&lifted));
    }

    #[test]
    fn best_only_sees_nothing_but_the_best(seed in 0u64..10_000, rank in 1usize..8, out in 2usize..20) {
        let p = problem(seed, settings("best_only"), (rank, out), [20, 10], &[0]);
        let chosen = best(&p.window, 0.2);
        let mut other = p.clone();
        let mut rng = Rng::new(seed, 5);
        for i in (0..20).filter(|i| !chosen.contains(i)) {
            other.window.feedback[i] = feedback(0, &mut rng, out);
        }
        other.replay.stored.iter_mut().for_each(|v| *v += 1.0);
        other.fast.b = factor(&mut rng, rank, out);
        for k in Kernels::available() {
            prop_assert!(run(k, &p).b == run(k, &other).b);
        }
    }

    #[test]
    fn an_ensemble_mixes_outputs(
        seed in 0u64..10_000, rank in 1usize..10, out in 1usize..40, members in 1usize..6, hot in 0usize..6,
    ) {
        let mut rng = Rng::new(seed, 1);
        let all: Vec<_> = (0..members).map(|_| factor(&mut rng, rank, out)).collect();
        for k in Kernels::available() {
            let mut one = vec![0.0; members];
            one[hot % members] = 1.0;
            prop_assert!(mix(k, &one, &all).unwrap() == *all[hot % members]);
            // The concatenated adapter of rank `members * rank`: every member's bottleneck with its share.
            let share = 1.0 / members as f32;
            let mut rows = Vec::new();
            all.iter().for_each(|m| m.append_rows(&mut rows));
            let cat = Factor::from_rows(&rows, members * rank, out, Dtype::F32);
            let u = numbers(&mut rng, rank, 1.0);
            let wide: Vec<f32> = (0..members).flat_map(|_| u.iter().map(|v| v * share)).collect();
            let (mut want, mut got) = (vec![0.0; out], vec![0.0; out]);
            cat.combine(k, &wide, &mut want, false);
            mix(k, &vec![share; members], &all).unwrap().combine(k, &u, &mut got, false);
            for (a, b) in got.iter().zip(&want) {
                prop_assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()));
            }
        }
    }

    #[test]
    fn members_learn_from_their_own_samples(
        seed in 0u64..10_000, rank in 1usize..8, out in 2usize..20, n in 1usize..30, m in 0usize..30,
    ) {
        let p = problem(seed, settings("ensemble"), (rank, out), [n, m], &[0, 5]);
        let mut rng = Rng::new(seed, 1);
        let all: Vec<_> = (0..3).map(|_| factor(&mut rng, rank, out)).collect();
        let pick = |n: usize| -> Vec<usize> { (0..n).map(|i| i % 2).collect() };
        for k in Kernels::available() {
            let fitted = fit_members(k, &p, &pick(n), &pick(m), &all).unwrap();
            prop_assert!(fitted[2] == *all[2], "no samples, no change");
            prop_assert!(fitted[0] != *all[0]);
            let mut other = p.clone();
            let half: Vec<usize> = (0..n).filter(|i| i % 2 == 0).collect();
            other.window.feedback.iter_mut().skip(1).step_by(2).for_each(|f| *f = feedback(0, &mut rng, out));
            let again = fit_members(k, &other, &pick(n), &pick(m), &all).unwrap();
            prop_assert!(again[0] == fitted[0], "another pattern's samples change nothing");
            prop_assert_eq!(again[1] == fitted[1], n < 2);

            // One member is that adapter, trained as the default trains a slow side that is the fast one.
            let one = fit_members(k, &p, &vec![0; n], &vec![0; m], &all[..1]).unwrap();
            let mut single = p.clone();
            single.settings.strategy = strategy("ewc_merge").unwrap();
            (single.slow.b, single.fast.b) = (Arc::clone(&all[0]), Arc::clone(&all[0]));
            prop_assert!(one[0] == run(k, &single).b);
            prop_assert_eq!(half.len(), n.div_ceil(2));
        }
    }
}

#[test]
fn a_lucky_rating_does_not_beat_good_ones() {
    let mut rng = Rng::new(0, 0);
    let mut w = rows(&mut rng, 2, 4, 6, &[0], false);
    for i in 1..4 {
        w.feedback[i] = Arc::clone(&w.feedback[0]);
        let (from, to) = w.u.split_at_mut(2 * i);
        to[..2].copy_from_slice(&from[..2]);
    }
    w.quality = vec![0.9, 0.9, 0.8, 0.9, 1.0, 0.1];
    let mut chosen = best(&w, 0.6);
    chosen.sort_unstable();
    assert_eq!(chosen, [0, 1, 2, 3]);
    let m = (0.9 * 3.0 + 0.8 + 1.0 + 0.1) / 6.0;
    assert!((f64::from(shrunk(&w)[4]) - (1.0 + 3.0 * m) / 4.0).abs() < 1e-6);
    assert!((f64::from(shrunk(&w)[0]) - (3.5 + 3.0 * m) / 7.0).abs() < 1e-6);
}

#[test]
fn notes_tell_what_was_chosen_on_noise() {
    let k = kernels();
    let mut p = problem(1, settings("best_only"), (3, 5), [10, 0], &[0]);
    assert!(run(k, &p).notes[0].contains("selects on noise"));
    p.window.quality.fill(f32::NAN);
    assert!(run(k, &p).notes[0].contains("most recent"));
    p.window = Rows::default();
    let idle = run(k, &p);
    assert!(idle.idle && idle.b == *p.slow.b);
}

#[test]
fn the_table_is_known_by_its_names() {
    let names: Vec<&str> = STRATEGIES.iter().map(|row| row.name).collect();
    assert_eq!(names, ["ewc_merge", "average", "quality_weighted", "best_only", "ensemble"]);
    let e = strategy("best").unwrap_err().to_string();
    assert!(e.starts_with("consolidation: got \"best\"") && e.contains("best_only"), "{e}");
}

#[test]
fn an_ensemble_refuses_what_does_not_fit() {
    let k = kernels();
    let p = problem(1, settings("ensemble"), (3, 5), [4, 2], &[0]);
    let mut rng = Rng::new(1, 1);
    let all: Vec<_> = (0..2).map(|_| factor(&mut rng, 3, 5)).collect();
    let said = |window: &[usize], replay: &[usize], members: &[Arc<Factor>]| {
        member_runs(k, &p, window, replay, members).expect_err("refused").to_string()
    };
    assert!(said(&[0; 3], &[0; 2], &all).starts_with("assignment of window: got shape (3,)"));
    assert!(said(&[0; 4], &[0, 2], &all).starts_with("assignment of replay: got 2"));
    assert!(said(&[0; 4], &[0; 2], &[]).starts_with("members"));
    assert!(said(&[0; 4], &[0; 2], &[factor(&mut rng, 2, 5)]).starts_with("members[0]"));
    assert!(mix(k, &[1.0], &all).unwrap_err().to_string().starts_with("weights"));
    assert!(mix(k, &[1.0, f32::NAN], &all).unwrap_err().to_string().starts_with("weights"));
    assert!(mix(k, &[1.0, -0.5], &all).unwrap_err().to_string().starts_with("weights"));
    assert!(mix(k, &[], &[]).unwrap_err().to_string().starts_with("members"));
    let idle = run(k, &p);
    assert!(idle.idle && idle.b == *p.slow.b && idle.used == 0);
    assert!(matches!(*p.window.feedback[0], Feedback::Target { .. }));
}
