//! What is refused, capped and normalised.

use std::sync::Arc;

use microlora::ewc::{Anchors, EwcSettings, Kind, Normalize, Step};
use microlora::kernels::Kernels;
use microlora::learn::{Feedback, Regularizer, Samples};
use microlora::rng::Rng;

use crate::support::*;

#[test]
fn bad_batches_are_refused_and_can_be_dropped() {
    each(|k| {
        let (case, mut rng) = (Case::new(6, 4, 2), Rng::new(3, 13));
        let layer = case.layer(&mut rng);
        for kind in KINDS {
            let mut ewc = case.ewc(&layer, settings(kind));
            let (x, g) = case.samples(&mut rng, 3);
            feed(&mut ewc, k, &layer, &x, &g);
            let before = ewc.export(k, &[], None).unwrap();
            for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, 1), (1e30, 2)] {
                let (mut bx, mut bg) = (x.clone(), g.clone());
                bx[at] = bad;
                bg[at] = bad;
                assert!(ewc.observe_gradients(k, 0, &layer, &bx, &g).is_err());
                ewc.discard();
                assert!(ewc.observe_gradients(k, 0, &layer, &x, &bg).is_err());
                ewc.discard();
                // A bad later pass drops the whole batch.
                ewc.observe_gradients(k, 0, &layer, &x, &g).unwrap();
                assert!(ewc.observe_gradients(k, 0, &layer, &bx, &g).is_err());
                ewc.discard();
            }
            ewc.observe_gradients(k, 0, &layer, &x, &g).unwrap();
            assert!(ewc.seen(2).is_err() && ewc.seen(0).is_err());
            assert!(ewc.start_new_task(k, &[Arc::clone(&layer)]).is_err());
            ewc.discard();
            let s = Samples { x: &x, g: &g, u: &x[..5], w: &x[..6] };
            assert!(ewc.observe(k, 0, s).is_err());
            assert!(ewc.export(k, &[], None).unwrap() == before, "{kind}");
        }
    });
}

#[test]
fn a_task_needs_samples_where_samples_matter() {
    let k = Kernels::detect().unwrap();
    let (case, mut rng) = (Case::new(6, 4, 2), Rng::new(3, 14));
    let layer = case.layer(&mut rng);
    for kind in KINDS {
        let mut ewc = case.ewc(&layer, settings(kind));
        let result = ewc.start_new_task(k, &[Arc::clone(&layer)]);
        assert_eq!(result.is_ok(), matches!(kind, "l2" | "si"), "{kind}");
        assert_eq!(ewc.task_count(), u64::from(result.is_ok()));
    }
}

#[test]
fn samples_beyond_the_cap_are_counted_and_not_used() {
    let k = Kernels::detect().unwrap();
    let (case, mut rng) = (Case::new(6, 4, 2), Rng::new(3, 15));
    let layer = case.layer(&mut rng);
    let lora = case.lora(&layer);
    let (x, g) = case.samples(&mut rng, 9);
    let mut capped = case.ewc(&layer, EwcSettings { samples: Some(5), ..settings("factor") });
    feed(&mut capped, k, &layer, &x[..18], &g[..12]);
    feed(&mut capped, k, &layer, &x[18..], &g[12..]);
    let f = Feedback::gradient(g[..4].to_vec()).unwrap();
    event(&lora, &x[..6], &f, None, &mut capped);
    assert_eq!((capped.samples(), capped.ignored()), (5, 5));
    let mut five = case.ewc(&layer, settings("factor"));
    feed(&mut five, k, &layer, &x[..18], &g[..12]);
    feed(&mut five, k, &layer, &x[18..30], &g[12..20]);
    assert!(five.task_fisher(k, 0) == capped.task_fisher(k, 0));
}

#[test]
fn normalised_importance_has_a_maximum_of_one() {
    let k = Kernels::detect().unwrap();
    let (case, mut rng) = (Case::new(6, 4, 2), Rng::new(3, 16));
    let layer = case.layer(&mut rng);
    for kind in ["delta", "factor", "mas"] {
        let mut ewc = case.ewc(&layer, EwcSettings { normalize: Normalize::Max, ..settings(kind) });
        let mut raw = case.ewc(&layer, settings(kind));
        let (x, g) = case.samples(&mut rng, 9);
        for e in [&mut ewc, &mut raw] {
            feed(e, k, &layer, &x, &g);
        }
        let top = raw.task_importance(k, &[Arc::clone(&layer)]);
        for e in [&mut ewc, &mut raw] {
            e.start_new_task(k, &[Arc::clone(&layer)]).unwrap();
        }
        assert!((ewc.max_importance() - 1.0).abs() < 1e-6, "{kind}: {}", ewc.max_importance());
        let now = [case.layer(&mut rng)];
        let (got, want) = (ewc.penalty(k, &now), raw.penalty(k, &now) / top);
        assert!((got - want).abs() <= 1e-5 * want, "{kind}: {got} {want}");
    }
}

#[test]
fn settings_without_a_meaning_are_refused() {
    let bad: [fn(&mut EwcSettings); 9] = [
        |s| s.lambda = -1.0,
        |s| s.lambda = f64::NAN,
        |s| s.lambda = 1e300,
        |s| s.gamma = 1.1,
        |s| s.gamma = f64::NAN,
        |s| s.decay = Some(0.0),
        |s| s.decay = Some(1.0),
        |s| s.step = Step::Proximal,
        |s| s.samples = Some(0),
    ];
    for change in bad {
        let mut s = settings("delta");
        change(&mut s);
        assert!(s.validate().is_err(), "{s:?}");
    }
    for (kind, change) in [
        ("l2", (|s| s.decay = Some(0.5)) as fn(&mut EwcSettings)),
        ("l2", |s| s.gamma = 0.5),
        ("l2", |s| s.normalize = Normalize::Max),
        ("si", |s| s.decay = Some(0.5)),
        ("factor", |s| (s.decay, s.gamma) = (Some(0.5), 0.5)),
        ("factor", |s| (s.decay, s.anchors) = (Some(0.5), Anchors::Separate)),
    ] {
        let mut s = settings(kind);
        change(&mut s);
        assert!(s.validate().is_err(), "{s:?}");
    }
    assert!("ewc".parse::<Kind>().is_err());
}
