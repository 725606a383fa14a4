//! A reservoir and a bank as tensors: exact there and back, and nothing damaged comes in.

use microlora::format::{Tensor, TensorDtype};
use microlora::replay::{PatternBank, Reservoir, Settings};
use microlora::rng::Rng;
use microlora::{Dtype, Error};
use proptest::prelude::*;

use crate::{numbers, rich, settings};

fn reservoir(s: Settings, n: u64) -> Reservoir {
    let mut r = Reservoir::new(s).unwrap();
    for e in 1..=n {
        let stored = numbers(&mut Rng::new(2, e), if e % 5 == 0 { 0 } else { 4 }, 1.0);
        r.offer(&rich(e, 4), &stored, (e % 3) as u32).unwrap();
    }
    r
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_reservoir_comes_back_and_goes_on_the_same(
        capacity in 0usize..40, max_bytes in proptest::option::of(1usize..20_000), half in any::<bool>(),
        holdout in 0.0..0.5f64, balance in any::<bool>(), seed in any::<u64>(), n in 0u64..120, more in 0u64..80,
        forgotten in 0u64..60,
    ) {
        let dtype = if half { Dtype::F16 } else { Dtype::F32 };
        let mut r = reservoir(Settings { capacity, max_bytes, dtype, holdout, balance, seed }, n);
        for e in 0..forgotten {
            r.forget(e);
        }
        let tensors = r.to_tensors("a/");
        let mut all = vec![Tensor::new("other", TensorDtype::U8, vec![1], vec![7]).unwrap()];
        all.extend(tensors.iter().cloned());
        let mut copy = Reservoir::from_tensors("a/", &all).unwrap();
        prop_assert_eq!(copy.settings(), r.settings());
        for held in [false, true] {
            prop_assert_eq!(copy.part(held), r.part(held));
        }
        prop_assert_eq!(&copy.to_tensors("a/"), &tensors);
        for e in n + 1..=n + more {
            prop_assert_eq!(
                copy.offer(&rich(e, 4), &[], (e % 3) as u32).unwrap(),
                r.offer(&rich(e, 4), &[], (e % 3) as u32).unwrap()
            );
        }
        prop_assert_eq!(copy.to_tensors(""), r.to_tensors(""));
    }

    #[test]
    fn a_bank_comes_back_and_goes_on_the_same(
        capacity in 1usize..7, threshold in -0.5..0.99f32, n in 0u64..40, width in 1usize..40,
    ) {
        let mut bank = PatternBank::new(capacity, threshold, width).unwrap();
        let x = |e| numbers(&mut Rng::new(9, e), width, 1.0);
        for e in 0..n {
            bank.observe(&x(e), (e % 2 == 0).then_some(0.5));
        }
        let tensors = bank.to_tensors("p/");
        let mut copy = PatternBank::from_tensors("p/", &tensors).unwrap();
        prop_assert_eq!(&copy.to_tensors("p/"), &tensors);
        for e in n..n + 30 {
            prop_assert_eq!(copy.observe(&x(e), Some(0.1)), bank.observe(&x(e), Some(0.1)));
            prop_assert_eq!(copy.merged(), bank.merged());
        }
        prop_assert_eq!(copy.to_tensors(""), bank.to_tensors(""));
    }
}

/// A tensor with its bytes changed.
fn with(tensors: &[Tensor], name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Vec<Tensor> {
    let mut out = tensors.to_vec();
    let t = out.iter_mut().find(|t| t.name == name).unwrap();
    let mut data = t.data.to_vec();
    change(&mut data);
    if t.dtype == TensorDtype::U8 {
        t.shape = vec![data.len()];
    }
    t.data = data.into();
    out
}

fn edit(tensors: &[Tensor], from: &str, to: &str) -> Vec<Tensor> {
    with(tensors, "state", |d| {
        let text = String::from_utf8(d.clone()).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        *d = text.replacen(from, to, 1).into_bytes();
    })
}

fn refused(tensors: &[Tensor], what: &str) {
    match Reservoir::from_tensors("", tensors) {
        Err(Error::Format { reason, .. } | Error::Unsupported { reason, .. }) => {
            assert!(reason.contains(what), "{what:?} is not in {reason:?}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn damaged_reservoirs_are_refused() {
    for dtype in [Dtype::F32, Dtype::F16] {
        let good = reservoir(Settings { dtype, ..settings(20, 0.2, 1) }, 90).to_tensors("");
        assert!(Reservoir::from_tensors("", &good).is_ok());
        for t in &good {
            let rest: Vec<Tensor> = good.iter().filter(|u| u.name != t.name).cloned().collect();
            refused(&rest, "missing");
            let mut cut = good.clone();
            let bad = cut.iter_mut().find(|u| u.name == t.name).unwrap();
            bad.data = bad.data.slice(0..bad.data.len() - 1).unwrap();
            refused(&cut, &t.name);
            let mut other = good.clone();
            let bad = other.iter_mut().find(|u| u.name == t.name).unwrap();
            (bad.dtype, bad.shape) = (TensorDtype::I8, vec![bad.data.len()]);
            refused(&other, "dtype");
        }
        let put = |name: &str, at: usize, v: [u8; 4]| {
            with(&good, name, |d| d[4 * at..4 * at + 4].copy_from_slice(&v))
        };
        let index = |column: usize, v: u32| put("train/index", 9 + column, v.to_le_bytes());
        refused(&index(2, 8), "does not fit");
        refused(&index(3, 77), "no known feedback");
        refused(&index(5, u32::MAX), "beyond the numbers");
        refused(&index(8, 0), "no feedback of a known width");
        refused(&put("train/scalars", 0, 1.5f32.to_le_bytes()), "out of range");
        refused(&put("train/scalars", 1, f32::NAN.to_le_bytes()), "out of range");
        refused(&put("train/scalars", 1, (-1.0f32).to_le_bytes()), "out of range");
        refused(&put("train/numbers", 0, [0xff; 4]), "NaN");
        if dtype == Dtype::F16 {
            refused(&put("train/shifts", 0, [0xff, 0x7f, 0, 0]), "power");
        }
        // An event of the other part, and one that was never kept under this seed.
        let events: Vec<u8> = good.iter().find(|t| t.name == "held_out/events").unwrap().data.to_vec();
        let kinds: Vec<u8> = good.iter().find(|t| t.name == "train/index").unwrap().data.to_vec();
        let row = kinds.chunks_exact(36).position(|r| r[12] != 2).unwrap();
        let swapped = with(&good, "train/events", |d| d[8 * row..8 * row + 8].copy_from_slice(&events[..8]));
        refused(&swapped, "other part");
        let kept: Vec<u64> = (1..=90).filter(|e| e % 6 == 2).collect();
        let row = kinds.chunks_exact(36).position(|r| r[12] == 2).unwrap();
        let strangers = kept.iter().filter(|e| {
            let changed = with(&good, "train/events", |d| {
                d[8 * row..8 * row + 8].copy_from_slice(&e.to_le_bytes());
            });
            Reservoir::from_tensors("", &changed).is_err()
        });
        assert!(strangers.count() > 5, "events that were not kept can be put in");
        refused(&edit(&good, "\"seed\":1", "\"seed\":2"), "event");
        refused(&edit(&good, "\"version\":1", "\"version\":2"), "version 2");
        refused(&edit(&good, "\"capacity\":20", "\"capacity\":10"), "places");
        refused(&edit(&good, "\"max_bytes\":null", "\"max_bytes\":900"), "bytes");
        refused(&edit(&good, "\"max_bytes\":null", "\"max_bytes\":0"), "reservoir_max_bytes");
        refused(&edit(&good, "\"holdout\":0.2", "\"holdout\":0.9"), "holdout");
        refused(&edit(&good, "\"seen\":", "\"seen\":1"), "contradict");
        refused(&edit(&good, "\"pattern\":0", "\"pattern\":4"), "not kept");
        refused(&edit(&good, "\"seed\"", "\"sead\""), "sead");
        refused(&with(&good, "state", |d| d.truncate(d.len() / 2)), "state");
    }
}

#[test]
fn any_flipped_byte_is_refused_or_harmless() {
    let good =
        reservoir(Settings { dtype: Dtype::F16, balance: true, ..settings(8, 0.2, 1) }, 40).to_tensors("");
    for t in &good {
        for at in 0..t.data.len() {
            for bit in [1u8, 0x40, 0x80] {
                let bad = with(&good, &t.name, |d| d[at] ^= bit);
                let Ok(mut r) = Reservoir::from_tensors("", &bad) else { continue };
                for e in r.part(false).iter().chain(r.part(true).iter()) {
                    let s = e.to_sample();
                    assert!(s.x.iter().all(|v| v.is_finite()) && s.weight.is_finite());
                }
                for e in 41..60 {
                    r.offer(&rich(e, 4), &[], 1).unwrap();
                }
            }
        }
    }
}

#[test]
fn damaged_banks_are_refused() {
    let mut bank = PatternBank::new(4, 0.5, 3).unwrap();
    for e in 0..30 {
        bank.observe(&numbers(&mut Rng::new(3, e), 3, 1.0), Some(0.5));
    }
    let good = bank.to_tensors("");
    let refused = |tensors: &[Tensor], what: &str| {
        let e = PatternBank::from_tensors("", tensors).unwrap_err().to_string();
        assert!(e.contains(what), "{what:?} is not in {e:?}");
    };
    for t in &good {
        refused(&good.iter().filter(|u| u.name != t.name).cloned().collect::<Vec<_>>(), "missing");
    }
    let put = |name: &str, v: &[u8]| with(&good, name, |d| d[..v.len()].copy_from_slice(v));
    refused(&put("centroids", &f32::INFINITY.to_le_bytes()), "infinity");
    refused(&put("centroids", &3.0f32.to_le_bytes()), "contradicts");
    refused(&put("counts", &0u64.to_le_bytes()), "contradicts");
    refused(&put("rated", &u64::MAX.to_le_bytes()), "contradicts");
    refused(&put("quality", &1e9f64.to_le_bytes()), "contradicts");
    refused(&put("quality", &f64::NAN.to_le_bytes()), "contradicts");
    refused(&edit(&good, "\"capacity\":4", "\"capacity\":2"), "places");
    refused(&edit(&good, "\"capacity\":4", "\"capacity\":0"), "patterns");
    refused(&edit(&good, "\"width\":3", "\"width\":4"), "shape");
    refused(&edit(&good, "\"version\":1", "\"version\":3"), "version 3");
}
