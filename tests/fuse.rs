//! The arithmetic of fusing: one rounding, the same bits on every ISA, and back again through files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use microlora::adapter::Adapter;
use microlora::factor::Factor;
use microlora::fuse::{FuseOptions, fuse, unfuse};
use microlora::kernels::{Kernels, Product, Stored, Weight};
use microlora::layer::Layer;
use microlora::rng::Rng;
use microlora::{Dtype, Error};

/// Numbers of many magnitudes, both zeros and subnormals among them.
fn numbers(n: usize, seed: u64, spread: i32) -> Vec<f32> {
    let mut rng = Rng::new(seed, 0);
    (0..n)
        .map(|i| {
            let x = rng.symmetric(1.0);
            let scale = 2f32.powi(rng.symmetric(spread as f32) as i32);
            match i % 17 {
                3 => 0.0,
                5 => -0.0,
                7 => f32::from_bits((i as u32 % 5) + 1),
                _ => x * scale,
            }
        })
        .collect()
}

fn bits<E: Stored>(x: &[E]) -> Vec<u8> {
    bytemuck::cast_slice(x).to_vec()
}

/// The definition, as plainly as it can be said.
fn plain<E: Stored + Weight>(p: &Product<'_>, columns: &[f32], w: &[E]) -> (Vec<E>, Vec<E>) {
    let (g, mut out, mut back) = (p.geometry, w.to_vec(), w.to_vec());
    for i in 0..w.len() {
        let (row, column) = (i / g.len, i % g.len);
        let mut sum = 0.0f64;
        for r in 0..g.rank {
            sum += f64::from(p.rows[row * g.rank + r]) * f64::from(columns[r * g.len + column]);
        }
        out[i] = E::narrow(w[i].widen() + sum * p.scale);
        back[i] = E::narrow(out[i].widen() - sum * p.scale);
    }
    (out, back)
}

fn same_bits_on_every_isa<E: Stored + Weight>(of: impl Fn(f32) -> E) {
    for (rank, len, rows) in [
        (1, 1, 1),
        (1, 16, 4),
        (3, 17, 5),
        (7, 31, 2),
        (8, 64, 9),
        (16, 100, 4),
        (20, 33, 6),
        (64, 40, 7),
        (300, 18, 3),
    ] {
        let columns = numbers(rank * len, 1, 20);
        let factor = Factor::from_rows(&columns, rank, len, Dtype::F32);
        let coefficients = numbers(rows * rank, 2, 20);
        let w: Vec<E> = numbers(rows * len, 3, 12).into_iter().map(&of).collect();
        for scale in [1.0, -0.7, 1e-3, 0.0] {
            let p =
                Product { rows: &coefficients, columns: factor.stream(), geometry: factor.geometry(), scale };
            let (want, want_back) = plain(&p, &columns, &w);
            for k in Kernels::available() {
                let (mut out, mut back) = (w.clone(), w.clone());
                k.fuse(&p, &w, &mut out, Some(&mut back));
                let what = format!("{} {rank} x {len}, {rows} rows", k.isa());
                assert_eq!(bits(&out), bits(&want), "{what}");
                assert_eq!(bits(&back), bits(&want_back), "{what}");
                out.fill(of(9.0));
                k.fuse(&p, &w, &mut out, None);
                assert_eq!(bits(&out), bits(&want), "{what} without back");
            }
        }
    }
}

#[test]
fn every_isa_gives_the_bits_of_the_definition() {
    same_bits_on_every_isa(|x| x);
    same_bits_on_every_isa(f16::from_f32);
    same_bits_on_every_isa(bf16::from_f32);
}

/// Between every two neighbours: the tie goes to the even one, and a hair decides on either side of it.
fn rounds_once<E: Weight + PartialEq + std::fmt::Debug>(from: impl Fn(u16) -> E, largest: u16) {
    let next = |x: f64, by: i64| f64::from_bits((x.to_bits() as i64 + by) as u64);
    for b in 0..largest {
        let (low, high) = (from(b), from(b + 1));
        let middle = (low.widen() + high.widen()) / 2.0;
        let even = if b % 2 == 0 { low } else { high };
        assert_eq!(E::narrow(low.widen()), low);
        assert_eq!(E::narrow(middle), even, "{middle:e}");
        assert_eq!(E::narrow(next(middle, 1)), high, "{middle:e}");
        assert_eq!(E::narrow(next(middle, -1)), low, "{middle:e}");
        assert_eq!(E::narrow(-middle).widen(), -even.widen());
    }
}

#[test]
fn narrow_types_are_rounded_once_to_nearest_even() {
    rounds_once(f16::from_bits, f16::MAX.to_bits());
    rounds_once(bf16::from_bits, bf16::MAX.to_bits());
    for x in [65520.0, 1e6, 1e300, f64::MAX, f64::INFINITY] {
        assert_eq!(f16::narrow(x), f16::INFINITY);
        assert_eq!(f16::narrow(-x), f16::NEG_INFINITY);
    }
    assert_eq!(f16::narrow(65519.999_999), f16::MAX);
    let largest = f64::from(bf16::MAX.to_f32());
    let halfway = largest + (largest - f64::from(bf16::from_bits(bf16::MAX.to_bits() - 1).to_f32())) / 2.0;
    assert_eq!(bf16::narrow(halfway), bf16::INFINITY);
    assert_eq!(bf16::narrow(halfway * (1.0 - 1e-15)), bf16::MAX);
    assert_eq!(bf16::narrow(f64::INFINITY), bf16::INFINITY);
    for x in [-0.0, -1e-300] {
        assert_eq!((f16::narrow(x).to_bits(), bf16::narrow(x).to_bits()), (0x8000, 0x8000));
    }
    for b in 0..=u16::MAX {
        let (h, f) = (f16::from_bits(b), bf16::from_bits(b));
        assert_eq!((h.finite(), f.finite()), (h.is_finite(), f.is_finite()));
        assert!(!h.is_finite() || h.widen() == h.to_f64());
        assert!(!f.is_finite() || f.widen() == f.to_f64());
    }
}

// -- through files --

fn write_base(path: &Path, tensors: &[(&str, Vec<usize>, Vec<f32>)]) {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, shape, x)| {
            let data: &[u8] = bytemuck::cast_slice(x);
            (
                *name,
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data).unwrap(),
            )
        })
        .collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn adapter(modules: &[(&str, usize, usize, usize)]) -> Adapter {
    let layer = |seed, n_in, n_out, rank| {
        let a = Factor::from_rows(&numbers(rank * n_in, seed, 2), rank, n_in, Dtype::F32);
        let b = Factor::from_rows(&numbers(rank * n_out, seed + 1, 2), rank, n_out, Dtype::F32);
        Arc::new(Layer::new(a, b, 3.0, false).unwrap())
    };
    let modules = modules
        .iter()
        .enumerate()
        .map(|(i, &(name, n_in, n_out, rank))| (name.to_owned(), layer(10 + i as u64, n_in, n_out, rank)))
        .collect();
    Adapter { modules, ..Adapter::default() }
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

#[test]
fn a_file_comes_back_bit_for_bit_and_ticks_count_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // Wide enough for several blocks of each tensor.
    write_base(
        &at("base"),
        &[
            ("m.a.weight", vec![300, 1000], numbers(300_000, 5, 9)),
            ("m.b.weight", vec![1000, 200], numbers(200_000, 6, 9)),
            ("m.norm", vec![7], numbers(7, 7, 2)),
        ],
    );
    let adapter = adapter(&[("m.a", 1000, 300, 5), ("m.b", 1000, 200, 2)]);
    let opts = FuseOptions { sidecar: Some(&at("car")), ..FuseOptions::default() };
    let mut seen = Vec::new();
    let mut tick = |done: usize, total: usize| {
        seen.push((done, total));
        Ok(())
    };
    let report = fuse(&at("base"), &adapter, &at("out"), &opts, &mut tick).unwrap();
    let size = fs::metadata(at("base")).unwrap().len() as usize;
    assert_eq!(seen[0], (0, size));
    assert_eq!(*seen.last().unwrap(), (size, size));
    assert!(seen.len() > 5 && seen.windows(2).all(|p| p[0].0 <= p[1].0));
    assert_eq!(report.tensors.iter().map(|t| t.layout.as_str()).collect::<Vec<_>>(), ["out_in", "in_out"]);
    assert_eq!(report.sidecar_bytes, fs::metadata(at("car")).unwrap().len() as usize);
    assert!(report.peak_bytes < 4 << 20, "{}", report.peak_bytes);
    assert_ne!(fs::read(at("base")).unwrap(), fs::read(at("out")).unwrap());
    let back = unfuse(&at("out"), &at("car"), &at("back"), &mut |_, _| Ok(())).unwrap();
    assert_eq!(back.adapter_sha256, report.adapter_sha256);
    assert_eq!(fs::read(at("base")).unwrap(), fs::read(at("back")).unwrap());
    // The bytes of the result do not hang on anything but the bytes that went in.
    fuse(&at("base"), &adapter, &at("again"), &FuseOptions::default(), &mut |_, _| Ok(())).unwrap();
    assert_eq!(fs::read(at("out")).unwrap(), fs::read(at("again")).unwrap());
}

#[test]
fn whoever_stops_the_work_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_base(
        &at("base"),
        &[("m.a.weight", vec![40, 50], numbers(2000, 5, 9)), ("x", vec![3], vec![1.0; 3])],
    );
    let adapter = adapter(&[("m.a", 50, 40, 2)]);
    let opts = FuseOptions { sidecar: Some(&at("car")), ..FuseOptions::default() };
    let mut total = 0;
    fuse(&at("base"), &adapter, &at("out"), &opts, &mut |_, _| {
        total += 1;
        Ok(())
    })
    .unwrap();
    let old = [fs::read(at("out")).unwrap(), fs::read(at("car")).unwrap()];
    for stop in 0..total {
        for back in [false, true] {
            let mut left: usize = stop;
            let mut tick = |_: usize, _: usize| {
                left = left.checked_sub(1).ok_or_else(|| Error::Cancelled("test".into()))?;
                Ok(())
            };
            let second = FuseOptions { sidecar: Some(&at("car2")), ..opts };
            let stopped = match back {
                false => fuse(&at("base"), &adapter, &at("out"), &second, &mut tick),
                true => unfuse(&at("out"), &at("car"), &at("back"), &mut tick),
            };
            assert!(matches!(stopped, Err(Error::Cancelled(_))), "{stop}");
            assert_eq!(names(dir.path()), ["base", "car", "out"]);
            assert_eq!(old, [fs::read(at("out")).unwrap(), fs::read(at("car")).unwrap()]);
        }
    }
}

#[test]
fn short_names_go_to_every_layer() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let w = |seed| numbers(12, seed, 2);
    write_base(&at("base"), &[("l.0.q.weight", vec![3, 4], w(1)), ("l.1.q.weight", vec![3, 4], w(2))]);
    let adapter = adapter(&[("q", 4, 3, 2)]);
    let paths = BTreeMap::from([("q".to_owned(), vec!["l.0.q".to_owned(), "l.1.q".to_owned()])]);
    let opts = FuseOptions { sidecar: Some(&at("car")), layer_paths: Some(&paths), fan_in_fan_out: None };
    let report = fuse(&at("base"), &adapter, &at("out"), &opts, &mut |_, _| Ok(())).unwrap();
    assert_eq!(report.tensors.len(), 2);
    unfuse(&at("out"), &at("car"), &at("back"), &mut |_, _| Ok(())).unwrap();
    assert_eq!(fs::read(at("base")).unwrap(), fs::read(at("back")).unwrap());
    let refused = fuse(&at("base"), &adapter, &at("x"), &FuseOptions::default(), &mut |_, _| Ok(()));
    assert!(refused.unwrap_err().to_string().contains("layer_paths"));
}
