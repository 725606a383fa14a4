//! Laws of the learning rules, in the core: what proptest can break without Python.

use microlora::learn::{Feedback, Instant, Rule, TargetLoss, Train};
use microlora::micro_lora::{ModuleSpec, Settings};
use microlora::rng::Rng;
use microlora::{Dtype, MicroLora, Snapshot};
use proptest::prelude::*;

fn lora(n_in: usize, n_out: usize, rank: usize, instant: Instant) -> MicroLora {
    let spec = ModuleSpec {
        name: "m".into(),
        in_features: n_in,
        out_features: n_out,
        rank,
        alpha: 2.0 * rank as f64,
        rslora: false,
        dtype: Dtype::F32,
    };
    MicroLora::new(&[spec], 5, Settings { dropout: 0.0, instant }).unwrap()
}

fn numbers(rng: &mut Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(scale)).collect()
}

/// One feedback of each kind.
fn feedback(kind: usize, rng: &mut Rng, n: usize) -> Feedback {
    let mut v = || numbers(rng, n, 1.0);
    match kind {
        0 => Feedback::target(v(), TargetLoss::Mse),
        1 => Feedback::target(v(), TargetLoss::Cosine),
        2 => Feedback::gradient(v()),
        3 => Feedback::reward(0.7, v()),
        4 => Feedback::preference(v(), v(), 0.9, 20.0),
        _ => {
            let negatives = [v(), v(), v()].concat();
            Feedback::contrastive(v(), negatives, 0.05)
        }
    }
    .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_nlms_step_never_raises_the_loss_of_its_event(
        seed in 0u64..10_000, n_in in 1usize..40, n_out in 2usize..40, rank in 1usize..9,
        kind in 0usize..6, both in any::<bool>(), mu in 0.01f32..1.9, steps in 1usize..5,
    ) {
        let train = if both { Train::Both } else { Train::B };
        let rule = Instant { rule: Rule::Nlms, train, mu: Some(mu), ..Instant::default() };
        let lora = lora(n_in, n_out, rank, rule);
        let mut rng = Rng::new(seed, 1);
        for _ in 0..steps {
            let (x, base) = (numbers(&mut rng, n_in, 1.0), numbers(&mut rng, n_out, 1.0));
            let f = feedback(kind, &mut rng, n_out);
            let r = lora.instant(0, &x, &f, Some(&base)).unwrap();
            if let (Some(before), Some(after)) = (r.loss_before, r.loss_after) {
                prop_assert!(after <= before * (1.0 + 1e-5) + 1e-7, "{before} -> {after} ({kind})");
            }
        }
    }

    #[test]
    fn rls_reports_the_loss_that_the_next_look_sees(
        seed in 0u64..10_000, n in 2usize..40, rank in 1usize..9, forgetting in 0.9f64..1.0,
    ) {
        let lora = lora(n, n, rank, Instant { forgetting, ..Instant::default() });
        let mut rng = Rng::new(seed, 2);
        for _ in 0..4 {
            let (x, t) = (numbers(&mut rng, n, 1.0), numbers(&mut rng, n, 1.0));
            let f = Feedback::target(t.clone(), TargetLoss::Mse).unwrap();
            let r = lora.instant(0, &x, &f, None).unwrap();
            let mut y = vec![0.0; n];
            lora.forward(0, &x, &mut y, false).unwrap();
            let seen: f32 = 0.5 * y.iter().zip(&t).map(|(y, t)| (y - t) * (y - t)).sum::<f32>();
            let told = r.loss_after.unwrap();
            prop_assert!((seen - told).abs() <= 1e-4 * r.loss_before.unwrap() + 1e-6, "{seen} {told}");
            prop_assert!(told <= r.loss_before.unwrap());
        }
    }

    #[test]
    fn refused_events_leave_every_bit_as_it_was(seed in 0u64..1000, kind in 0usize..6, at in 0usize..16) {
        let lora = lora(16, 16, 4, Instant::default());
        let mut rng = Rng::new(seed, 3);
        let x = numbers(&mut rng, 16, 1.0);
        let base = numbers(&mut rng, 16, 1.0);
        lora.instant(0, &x, &feedback(0, &mut rng, 16), None).unwrap();
        lora.adapt(0, &x, &feedback(0, &mut rng, 16), None).unwrap();
        let before = lora.snapshot().to_bytes().unwrap();
        for bad in [f32::NAN, f32::INFINITY, 1e30] {
            let mut broken = x.clone();
            broken[at] = bad;
            let f = feedback(kind, &mut rng, 16);
            if bad.is_finite() {
                let mut b = base.clone();
                b[at] = f32::NAN;
                prop_assert!(lora.instant(0, &x, &f, Some(&b)).is_err());
                prop_assert!(lora.adapt(0, &x, &f, Some(&b)).is_err());
            } else {
                prop_assert!(lora.instant(0, &broken, &f, Some(&base)).is_err());
                prop_assert!(lora.adapt(0, &broken, &f, Some(&base)).is_err());
            }
            prop_assert!(lora.instant(0, &x[1..], &f, None).is_err());
        }
        prop_assert!(lora.snapshot().to_bytes().unwrap() == before);
    }

    #[test]
    fn a_snapshot_survives_its_bytes_and_goes_on_bit_for_bit(
        seed in 0u64..1000, kinds in proptest::collection::vec((0usize..6, 0usize..3), 1..12), dtype in 0usize..3,
    ) {
        let spec = ModuleSpec {
            name: "m".into(), in_features: 20, out_features: 12, rank: 3, alpha: 6.0, rslora: true,
            dtype: Dtype::ALL[dtype],
        };
        let make = || {
            MicroLora::new(std::slice::from_ref(&spec), 1, Settings { dropout: 0.2, ..Settings::default() }).unwrap()
        };
        let run = |lora: &MicroLora, rng: &mut Rng| {
            for &(kind, action) in &kinds {
                let (x, base) = (numbers(rng, 20, 1.0), numbers(rng, 12, 1.0));
                let f = feedback(kind, rng, 12);
                match action {
                    0 => drop(lora.instant(0, &x, &f, Some(&base)).unwrap()),
                    1 => drop(lora.adapt(0, &x, &f, Some(&base)).unwrap()),
                    _ => drop(lora.apply_updates(0.05, Some(1.0)).unwrap()),
                }
            }
        };
        let lora = make();
        run(&lora, &mut Rng::new(seed, 4));
        let snapshot = Snapshot::from_bytes(&lora.snapshot().to_bytes().unwrap()).unwrap();
        run(&lora, &mut Rng::new(seed, 5));
        let twin = make();
        twin.restore(&snapshot).unwrap();
        run(&twin, &mut Rng::new(seed, 5));
        prop_assert!(lora.adapter() == twin.adapter());
        let (a, b) = (lora.snapshot().to_bytes().unwrap(), twin.snapshot().to_bytes().unwrap());
        // The version counts restores too; everything else is equal.
        prop_assert!(a.len().abs_diff(b.len()) <= 16);
    }
}

#[test]
fn forgetting_without_excitation_stays_bounded() {
    let lora = lora(8, 8, 4, Instant { forgetting: 0.9, ..Instant::default() });
    let x = vec![0.5; 8];
    let f = Feedback::target(vec![1.0; 8], TargetLoss::Mse).unwrap();
    for _ in 0..200_000 {
        lora.instant(0, &x, &f, None).unwrap();
    }
    let mut other = vec![0.0; 8];
    other[0] = 1.0;
    let r = lora.instant(0, &other, &f, None).unwrap();
    assert!(r.loss_after.unwrap().is_finite() && r.applied);
}

#[test]
fn the_first_step_of_a_fresh_adapter_moves_b_only() {
    for kind in 0..6 {
        let lora = lora(12, 12, 4, Instant { rule: Rule::Nlms, train: Train::Both, ..Instant::default() });
        let mut rng = Rng::new(8, kind);
        let (x, base) = (numbers(&mut rng, 12, 1.0), numbers(&mut rng, 12, 1.0));
        let before = lora.adapter();
        let f = feedback(kind as usize, &mut rng, 12);
        lora.adapt(0, &x, &f, Some(&base)).unwrap();
        lora.apply_updates(0.1, None).unwrap();
        let after = lora.adapter();
        assert!(before.modules[0].1.a == after.modules[0].1.a, "A moved ({kind})");
        assert!(before.modules[0].1.b != after.modules[0].1.b, "B did not move ({kind})");
    }
}
