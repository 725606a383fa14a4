//! A layer whose factors are known, samples for it, and the formulas in float64.

use std::sync::{Arc, Mutex};

use microlora::ewc::{Ewc, EwcSettings, Fisher, Kind};
use microlora::factor::Factor;
use microlora::kernels::Kernels;
use microlora::layer::Layer;
use microlora::learn::{Feedback, Regularizer};
use microlora::micro_lora::Settings;
use microlora::rng::Rng;
use microlora::{Adapter, Dtype, MicroLora};

pub const KINDS: [&str; 5] = ["delta", "factor", "l2", "si", "mas"];

pub fn numbers(rng: &mut Rng, n: usize, scale: f32) -> Vec<f32> {
    (0..n).map(|_| rng.symmetric(scale)).collect()
}

/// A layer whose factors are known as rows.
pub struct Case {
    pub n_in: usize,
    pub n_out: usize,
    pub rank: usize,
    pub s: f64,
}

impl Case {
    pub fn new(n_in: usize, n_out: usize, rank: usize) -> Self {
        Case { n_in, n_out, rank, s: 2.0 }
    }

    pub fn layer(&self, rng: &mut Rng) -> Arc<Layer> {
        let (a, b) = (numbers(rng, self.rank * self.n_in, 1.0), numbers(rng, self.rank * self.n_out, 1.0));
        self.of_rows(&a, &b)
    }

    pub fn of_rows(&self, a: &[f32], b: &[f32]) -> Arc<Layer> {
        let f = |v: &[f32], len| Factor::from_rows(v, self.rank, len, Dtype::F32);
        Arc::new(Layer::new(f(a, self.n_in), f(b, self.n_out), self.s * self.rank as f64, false).unwrap())
    }

    pub fn lora(&self, layer: &Arc<Layer>) -> MicroLora {
        let modules = vec![("m".to_owned(), Arc::clone(layer))];
        MicroLora::from_adapter(&Adapter { modules, ..Adapter::default() }, 1, Settings::default()).unwrap()
    }

    pub fn ewc(&self, layer: &Arc<Layer>, settings: EwcSettings) -> Ewc {
        Ewc::new(&self.lora(layer), settings).unwrap()
    }

    /// `x`, `g` of `n` samples.
    pub fn samples(&self, rng: &mut Rng, n: usize) -> (Vec<f32>, Vec<f32>) {
        (numbers(rng, n * self.n_in, 1.0), numbers(rng, n * self.n_out, 1.0))
    }
}

pub fn settings(kind: &str) -> EwcSettings {
    EwcSettings { lambda: 3.0, fisher: Fisher::Empirical, ..EwcSettings::of(kind.parse::<Kind>().unwrap()) }
}

pub fn wide(f: &Factor) -> Vec<f64> {
    f.to_f32(false).iter().map(|v| f64::from(*v)).collect()
}

pub fn close(got: &[f64], want: &[f64], rel: f64, what: &str) {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1e-30f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= rel * scale, "{what}[{i}]: got {g:e}, want {w:e}, scale {scale:e}");
    }
}

/// Adds a batch and closes it.
pub fn feed(ewc: &mut Ewc, k: &Kernels, layer: &Layer, x: &[f32], g: &[f32]) {
    ewc.observe_gradients(k, 0, layer, x, g).unwrap();
    ewc.seen(x.len() / layer.in_features()).unwrap();
}

/// One event, through the learner.
pub fn event(lora: &MicroLora, x: &[f32], feedback: &Feedback, base: Option<&[f32]>, ewc: &mut Ewc) {
    let place = Ewc::new(lora, *ewc.settings()).unwrap();
    let shared = Mutex::new(std::mem::replace(ewc, place));
    lora.observe(0, x, feedback, base, &shared).unwrap();
    *ewc = shared.into_inner().unwrap();
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Mean over samples of `f(gradient)` for both factors, in float64, one sample at a time.
pub fn mean_of(case: &Case, layer: &Layer, x: &[f32], g: &[f32], f: impl Fn(f64) -> f64) -> [Vec<f64>; 2] {
    let (a, b) = (wide(&layer.a), wide(&layer.b));
    let n = x.len() / case.n_in;
    let mut out = [vec![0.0; a.len()], vec![0.0; b.len()]];
    for (x, g) in x.chunks_exact(case.n_in).zip(g.chunks_exact(case.n_out)) {
        let (x, g): (Vec<f64>, Vec<f64>) =
            (x.iter().map(|v| f64::from(*v)).collect(), g.iter().map(|v| f64::from(*v)).collect());
        for r in 0..case.rank {
            let u = case.s * dot(&a[r * case.n_in..][..case.n_in], &x);
            let w = case.s * dot(&b[r * case.n_out..][..case.n_out], &g);
            for i in 0..case.n_in {
                out[0][r * case.n_in + i] += f(w * x[i]) / n as f64;
            }
            for j in 0..case.n_out {
                out[1][r * case.n_out + j] += f(u * g[j]) / n as f64;
            }
        }
    }
    out
}

/// `sum_ij a_i c_j (s (A B - A* B*))_ij^2 / 2`, formed densely.
pub fn dense(case: &Case, a: &[f64], c: &[f64], now: &Layer, then: &Layer) -> f64 {
    let f = [&now.a, &now.b, &then.a, &then.b].map(|f| wide(f));
    let mut sum = 0.0;
    for i in 0..case.n_in {
        for j in 0..case.n_out {
            let at = |a: &[f64], b: &[f64]| -> f64 {
                (0..case.rank).map(|r| a[r * case.n_in + i] * b[r * case.n_out + j]).sum()
            };
            let d = case.s * (at(&f[0], &f[1]) - at(&f[2], &f[3]));
            sum += 0.5 * a[i] * c[j] * d * d;
        }
    }
    sum
}

/// Central differences of the penalty in f32 weights; the penalty itself is computed in f64.
pub fn differences(case: &Case, ewc: &mut Ewc, k: &Kernels, layer: &Layer) -> [Vec<f64>; 2] {
    let rows = [layer.a.to_f32(false), layer.b.to_f32(false)];
    [0, 1].map(|side| {
        (0..rows[side].len())
            .map(|i| {
                let h = 2f32.powi(-7);
                let mut at = |d: f32| {
                    let mut rows = rows.clone();
                    rows[side][i] += d;
                    let moved = f64::from(rows[side][i]);
                    (ewc.penalty(k, &[case.of_rows(&rows[0], &rows[1])]), moved)
                };
                let ((up, x1), (down, x0)) = (at(h), at(-h));
                (up - down) / (x1 - x0)
            })
            .collect()
    })
}

pub fn each(test: impl Fn(&'static Kernels)) {
    Kernels::available().for_each(test);
}
