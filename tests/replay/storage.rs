//! What is kept of an event: everything in f32, all but rounding in f16; bytes; what is refused.

use std::sync::Arc;

use microlora::learn::{Feedback, TargetLoss};
use microlora::replay::{Reservoir, Sample, Settings};
use microlora::{Dtype, Error};

use crate::{numbers, rich, settings, small};
use microlora::rng::Rng;

fn only(dtype: Dtype, sample: &Sample, stored: &[f32]) -> (Sample, Vec<f32>) {
    let mut r = Reservoir::new(Settings { dtype, ..settings(5, 0.0, 1) }).unwrap();
    assert!(r.offer(sample, stored, 3).unwrap());
    let e = r.part(false).get(0);
    assert_eq!((e.pattern, e.width()), (3, sample.feedback.width()));
    let (mut x, mut base, mut out) = (vec![9.0], vec![8.0], vec![7.0]);
    e.push_x(&mut x);
    assert_eq!(e.push_base(&mut base), sample.base.is_some());
    e.push_stored(&mut out);
    assert_eq!((&x[1..], &out[1..]), (&*e.x(), &*e.stored()));
    assert_eq!(&base[1..], e.base().as_deref().unwrap_or_default());
    (e.to_sample(), e.stored().into_owned())
}

#[test]
fn f32_gives_back_what_came_and_shares_the_feedback() {
    for event in 1..=12 {
        let s = rich(event, 20);
        let stored = numbers(&mut Rng::new(1, event), 40, 1.0);
        let (back, out) = only(Dtype::F32, &s, &stored);
        assert_eq!((&back, &out), (&s, &stored));
        assert!(Arc::ptr_eq(&back.feedback, &s.feedback));
    }
}

fn vectors(f: &Feedback) -> Vec<f32> {
    match f {
        Feedback::Target { target, .. } => target.clone(),
        Feedback::Gradient { gradient } => gradient.clone(),
        Feedback::Reward { response, .. } => response.clone(),
        Feedback::Preference { chosen, rejected, .. } => [chosen.as_slice(), rejected].concat(),
        Feedback::Contrastive { rows, .. } => rows.clone(),
    }
}

fn close(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let top = want.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
    for (g, w) in got.iter().zip(want) {
        let (g, w) = (f64::from(*g), f64::from(*w));
        assert!((g - w).abs() <= w.abs() * 6e-4 + top * 1e-8, "{what}: {g} for {w}");
    }
}

#[test]
fn f16_keeps_eleven_bits_of_every_array_at_any_scale() {
    for scale in [1e-38f32, 1e-12, 1e-5, 1.0, 7e4, 1e12, 3e38] {
        for event in 1..=12 {
            let mut s = rich(event, 70);
            s.x.iter_mut().chain(s.base.iter_mut().flatten()).for_each(|v| *v *= scale / 4.0);
            if let Feedback::Gradient { gradient } = Arc::make_mut(&mut s.feedback) {
                gradient.iter_mut().for_each(|v| *v *= scale.min(1e15));
            }
            let stored: Vec<f32> =
                numbers(&mut Rng::new(1, event), 70, 1.0).iter().map(|v| v * scale).collect();
            let (back, out) = only(Dtype::F16, &s, &stored);
            close("x", &back.x, &s.x);
            close("stored", &out, &stored);
            close("base", &back.base.clone().unwrap_or_default(), &s.base.clone().unwrap_or_default());
            close("feedback", &vectors(&back.feedback), &vectors(&s.feedback));
            let kind = |s: &Sample| std::mem::discriminant(&*s.feedback);
            assert_eq!(kind(&back), kind(&s));
            match (&*back.feedback, &*s.feedback) {
                (Feedback::Preference { p, beta, .. }, Feedback::Preference { p: q, beta: b, .. }) => {
                    assert_eq!((p, beta), (q, b));
                }
                (
                    Feedback::Contrastive { width, tau, .. },
                    Feedback::Contrastive { width: w, tau: t, .. },
                ) => {
                    assert_eq!((width, tau), (w, t));
                }
                (Feedback::Reward { reward, .. }, Feedback::Reward { reward: r, .. }) => {
                    assert_eq!(reward, r);
                }
                (Feedback::Target { loss, .. }, Feedback::Target { loss: l, .. }) => assert_eq!(loss, l),
                _ => {}
            }
            let scalars = |s: &Sample| (s.event, s.module, s.quality, s.weight, s.advantage);
            assert_eq!(scalars(&back), scalars(&s));
        }
    }
}

#[test]
fn f16_directions_have_unit_length_again() {
    for event in [1, 3, 4, 5] {
        let s = rich(event, 300);
        let (back, _) = only(Dtype::F16, &s, &[]);
        for row in vectors(&back.feedback).chunks_exact(300) {
            let norm2: f64 = row.iter().map(|&v| f64::from(v).powi(2)).sum();
            assert!((norm2 - 1.0).abs() < 1e-6, "event {event}: {norm2}");
        }
    }
}

#[test]
fn zeros_stay_zeros() {
    let mut s = small(1);
    s.x.fill(0.0);
    for dtype in [Dtype::F32, Dtype::F16] {
        let (back, out) = only(dtype, &s, &[0.0, 0.0]);
        assert_eq!((back.x, out), (vec![0.0; 2], vec![0.0; 2]));
    }
}

#[test]
fn halves_take_half_of_the_bytes() {
    let bytes = |dtype| {
        let mut r = Reservoir::new(Settings { dtype, ..settings(64, 0.1, 1) }).unwrap();
        for e in 1..=64 {
            r.offer(&rich(e, 768), &[0.5; 768], 0).unwrap();
        }
        r.memory_bytes() as f64
    };
    let ratio = bytes(Dtype::F16) / bytes(Dtype::F32);
    assert!((0.49..0.53).contains(&ratio), "{ratio}");
}

#[test]
fn byte_caps_hold_with_samples_of_any_size() {
    for balance in [false, true] {
        for dtype in [Dtype::F32, Dtype::F16] {
            let cap = 40_000;
            let s = Settings { max_bytes: Some(cap), dtype, balance, ..settings(1000, 0.1, 3) };
            let mut r = Reservoir::new(s).unwrap();
            for e in 1..=3000u64 {
                let s = rich(e, 1 + (e % 60) as usize);
                r.offer(&s, &[], (e % 4) as u32).unwrap();
                let total: usize = [false, true].map(|h| r.part(h).sample_bytes()).iter().sum();
                assert!(total <= cap, "{total} after {e}");
            }
            assert!(r.part(false).sample_bytes() > cap * 8 / 10);
            assert!(r.part(false).len() > 20 && r.part(true).len() > 2);
        }
    }
}

#[test]
fn a_sample_larger_than_all_bytes_evicts_nothing() {
    let mut r = Reservoir::new(Settings { max_bytes: Some(4000), ..settings(1000, 0.0, 3) }).unwrap();
    (1..=10).for_each(|e| assert!(r.offer(&small(e), &[], 0).unwrap()));
    let large = (11..200).filter(|&e| r.offer(&rich(6 * e + 1, 2000), &[], 0).unwrap()).count();
    assert_eq!((large, r.part(false).len()), (0, 10));
    assert_eq!((r.part(false).too_large(), r.part(false).seen()), (189, 199));
}

#[test]
fn settings_that_cannot_work_are_refused_by_name() {
    let base = settings(10, 0.1, 0);
    for (bad, name) in [
        (Settings { holdout: 0.51, ..base.clone() }, "holdout"),
        (Settings { holdout: -0.1, ..base.clone() }, "holdout"),
        (Settings { holdout: f64::NAN, ..base.clone() }, "holdout"),
        (Settings { dtype: Dtype::Bf16, ..base.clone() }, "reservoir_dtype"),
        (Settings { max_bytes: Some(0), ..base.clone() }, "reservoir_max_bytes"),
        (Settings { capacity: usize::MAX, ..base }, "reservoir_capacity"),
    ] {
        let e = Reservoir::new(bad).unwrap_err();
        assert!(matches!(&e, Error::Config { arg, .. } if arg == name), "{e}");
    }
}

#[test]
fn offers_that_do_not_fit_change_nothing() {
    let mut r = Reservoir::new(settings(10, 0.1, 0)).unwrap();
    r.offer(&small(1), &[1.0, 2.0], 0).unwrap();
    let before = r.to_tensors("");
    let wide = Sample { base: Some(vec![0.0; 3]), ..small(2) };
    assert!(matches!(r.offer(&wide, &[], 0), Err(Error::Shape { arg, .. }) if arg == "base"));
    assert!(matches!(r.offer(&small(2), &[1.0; 3], 0), Err(Error::Shape { arg, .. }) if arg == "stored"));
    let nan = r.offer(&small(2), &[1.0, f32::NAN], 0);
    assert!(matches!(nan, Err(Error::NonFinite { arg, .. }) if arg == "stored"));
    assert_eq!(r.to_tensors(""), before);
}

#[test]
fn outputs_are_restored_in_place() {
    for dtype in [Dtype::F32, Dtype::F16] {
        let mut r = Reservoir::new(Settings { dtype, ..settings(40, 0.2, 0) }).unwrap();
        for e in 1..=300 {
            let stored: &[f32] = if e % 3 == 0 { &[] } else { &[5.0; 4] };
            r.offer(&rich(e, 4), stored, 0).unwrap();
        }
        let (before, bytes) = (r.to_tensors(""), r.memory_bytes());
        assert!(
            r.restore_output(|_, out| {
                out.fill(f32::NAN);
                Ok(())
            })
            .is_err()
        );
        assert!(r.restore_output(|e, _| Err(Error::non_finite(format!("{}", e.event)))).is_err());
        assert_eq!(r.to_tensors(""), before);
        let output = |e: u64, x0: f32| [e as f32, -0.5 * x0, 0.25, 1024.0];
        r.restore_output(|e, out| {
            out.copy_from_slice(&output(e.event, e.x()[0]));
            Ok(())
        })
        .unwrap();
        for e in r.part(false).iter().chain(r.part(true).iter()) {
            if e.event % 3 == 0 {
                assert!(e.stored().is_empty());
            } else {
                close("stored", &e.stored(), &output(e.event, e.x()[0]));
            }
            let kept = rich(e.event, 4);
            close("x", &e.x(), &kept.x);
            close("feedback", &vectors(&e.feedback()), &vectors(&kept.feedback));
        }
        assert_eq!(r.memory_bytes(), bytes);
    }
}

#[test]
fn cleared_is_as_new() {
    let mut r = Reservoir::new(settings(10, 0.1, 3)).unwrap();
    let new = r.to_tensors("");
    (1..=50).for_each(|e| drop(r.offer(&small(e), &[], 0)));
    r.clear();
    assert_eq!(r.to_tensors(""), new);
    assert_eq!(Feedback::target(vec![1.0], TargetLoss::Mse).unwrap().width(), 1);
}
