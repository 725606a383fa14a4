//! Laws of the bandit in the core: ridge regression in f64, and state as tensors.

use microlora::kernels::Kernels;
use microlora::learn::bandit::{Bandit, BanditSettings, off_policy};
use microlora::rng::Rng;
use nalgebra::{DMatrix, DVector};
use proptest::prelude::*;

const ARMS: [&str; 3] = ["a", "b", "c"];

fn numbers(rng: &mut Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(scale)).collect()
}

fn settings(epsilon: f64) -> BanditSettings {
    BanditSettings { epsilon, ..BanditSettings::default() }
}

/// `theta . u + alpha sqrt(u P u)` solved from all that an arm has seen.
fn score(seen: &[(Vec<f32>, f64)], u: &[f32], ridge: f64, alpha: f64) -> f64 {
    let r = u.len();
    let wide = |u: &[f32]| DVector::from_iterator(r, u.iter().map(|&u| f64::from(u)));
    let (mut gram, mut sum) = (DMatrix::identity(r, r) * ridge, DVector::zeros(r));
    for (v, reward) in seen {
        let v = wide(v);
        sum += &v * *reward;
        gram += &v * v.transpose();
    }
    let (u, p) = (wide(u), gram.cholesky().unwrap().inverse());
    (&p * sum).dot(&u) + alpha * u.dot(&(&p * &u)).sqrt()
}

fn bits(bandit: &Bandit) -> Vec<(String, Vec<u8>)> {
    bandit.to_tensors("x/").into_iter().map(|t| (t.name, t.data.to_vec())).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn scores_are_those_of_ridge_regression(
        seed in 0u64..10_000, rank in 1usize..70, ridge in 0.05f64..20.0, alpha in 0.0f64..2.0,
        events in 1usize..60,
    ) {
        for k in Kernels::available() {
            let settings = BanditSettings { ridge, alpha, ..BanditSettings::default() };
            let mut bandit = Bandit::new(rank, settings).unwrap();
            let mut rng = Rng::new(seed, 0);
            let mut seen = [vec![], vec![], vec![]];
            let mut unit = None;
            for _ in 0..events {
                let u = numbers(&mut rng, rank, 1.0);
                let norm2: f64 = u.iter().map(|&u| f64::from(u).powi(2)).sum();
                let prior = ridge * *unit.get_or_insert(norm2);
                let choice = bandit.choose(&u, &ARMS).unwrap();
                for (arm, got) in choice.scores.iter().enumerate() {
                    let want = score(&seen[arm], &u, prior, alpha);
                    prop_assert!((got - want).abs() < 1e-9 * (1.0 + want.abs()), "{got} {want}");
                }
                let reward = f64::from(rng.symmetric(1.0));
                let done = bandit.reward(k, choice.id, reward).unwrap();
                let want = score(&seen[choice.arm], &u, prior, 0.0);
                prop_assert!((done.expected - want).abs() < 1e-9 * (1.0 + want.abs()));
                seen[choice.arm].push((u, reward));
                prop_assert_eq!(done.count, seen[choice.arm].len() as u64);
            }
        }
    }

    #[test]
    fn tensors_go_on_bit_for_bit(seed in 0u64..10_000, rank in 1usize..20, events in 0usize..40) {
        let k = Kernels::detect().unwrap();
        let limits = BanditSettings { max_open: 5, history: 9, seed, ..settings(0.3) };
        let mut bandit = Bandit::new(rank, limits).unwrap();
        let mut rng = Rng::new(seed, 1);
        let play = |b: &mut Bandit, rng: &mut Rng| {
            let (u, reward) = (numbers(rng, rank, 1.0), f64::from(rng.symmetric(1.0)));
            let choice = b.choose(&u, &ARMS).unwrap();
            let reward = if reward > 0.5 { None } else { Some(b.reward(k, choice.id, reward).unwrap()) };
            (choice, reward)
        };
        for _ in 0..events {
            play(&mut bandit, &mut rng);
        }
        let mut again = Bandit::from_tensors("x/", &bandit.to_tensors("x/")).unwrap();
        prop_assert_eq!(bits(&again), bits(&bandit));
        prop_assert_eq!(again.memory_bytes() > 0, true);
        let mut other = rng.clone();
        for _ in 0..20 {
            prop_assert_eq!(play(&mut bandit, &mut rng), play(&mut again, &mut other));
        }
        prop_assert_eq!(bits(&again), bits(&bandit));
    }

    #[test]
    fn what_is_refused_changes_nothing(seed in 0u64..10_000, rank in 1usize..9) {
        let k = Kernels::detect().unwrap();
        let mut rng = Rng::new(seed, 2);
        let mut bandit = Bandit::new(rank, BanditSettings { max_arms: 4, ..settings(0.1) }).unwrap();
        let u = numbers(&mut rng, rank, 1.0);
        let done = bandit.choose(&u, &ARMS).unwrap().id;
        let open = bandit.choose(&u, &ARMS).unwrap().id;
        bandit.reward(k, done, 1.0).unwrap();
        let before = bits(&bandit);
        let mut bad = u.clone();
        bad[rank - 1] = f32::NAN;
        for (u, arms) in [
            (&u, &[][..]), (&u, &["a", "a"]), (&u, &["d", "d"]), (&u, &["d", ""]), (&u, &["a", "d", "e"]),
            (&bad, &ARMS), (&numbers(&mut rng, rank + 1, 1.0), &ARMS),
        ] {
            prop_assert!(bandit.choose(u, arms).is_err());
        }
        for (id, reward) in [(open, f64::NAN), (open, f64::INFINITY), (open, 1e19), (done, 1.0), (99, 1.0)] {
            prop_assert!(bandit.reward(k, id, reward).is_err());
        }
        prop_assert_eq!(bits(&bandit), before);
        bandit.reward(k, open, 1.0).unwrap();
    }
}

#[test]
fn a_fresh_unit_is_that_of_the_first_context_with_a_length() {
    let mut bandit = Bandit::new(2, BanditSettings::default()).unwrap();
    assert_eq!(bandit.choose(&[0.0, 0.0], &ARMS).unwrap().scores, [0.0; 3]);
    let near = |got: &[f64], want: f64| got.iter().all(|g| (g - want).abs() < 1e-12);
    assert!(near(&bandit.choose(&[3.0, 4.0], &ARMS).unwrap().scores, 0.3));
    assert!(near(&bandit.choose(&[30.0, 40.0], &["d"]).unwrap().scores, 3.0));
}

#[test]
fn tensors_of_something_else_are_refused() {
    let bandit = Bandit::new(3, BanditSettings::default()).unwrap();
    let tensors = bandit.to_tensors("x/");
    assert!(Bandit::from_tensors("y/", &tensors).is_err());
    for missing in 0..tensors.len() {
        let mut some = tensors.clone();
        let gone = some.remove(missing);
        assert!(Bandit::from_tensors("x/", &some).is_err(), "{} is needed", gone.name);
    }
    for at in 0..tensors.len() {
        let mut other = tensors.clone();
        other[at].shape.push(1);
        if at > 0 {
            assert!(Bandit::from_tensors("x/", &other).is_err(), "{} of another shape", other[at].name);
        }
    }
}

#[test]
fn off_policy_weighs_what_was_rare() {
    let e = off_policy(&[0.5, 0.25], &[1.0, 2.0], &[0.5, 0.5]).unwrap();
    assert_eq!((e.ips, e.weight, e.events), (2.5, 1.5, 2));
    assert!((e.snips - 5.0 / 3.0).abs() < 1e-15 && (e.effective - 9.0 / 5.0).abs() < 1e-15);
}
