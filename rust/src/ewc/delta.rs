//! Kind "delta": the penalty sits on the adapter's own weight change, so that it sees what the layer sees.
//!
//! `Omega = lambda/2 s^2 sum_ij a_i c_j ((A B - A* B*)_ij)^2` with `a_i = E x_i^2`, `c_j = E g_j^2`: a
//! Kronecker-factored Laplace approximation (Ritter 2018, arXiv 1805.07810) with diagonal factors. It does not
//! change under `(A Q, Q^-1 B)`. The difference is written `A B - A* B* = dA B + A* dB`, rank 2r, so that it
//! vanishes exactly at the anchor and nothing cancels near it; only 2r x 2r Grams are formed.

use std::cell::Cell;
use std::sync::Arc;

use super::accumulator::{Accumulator, Dims};
use super::state::{Reader, Writer};
use super::{Boundary, Importance, KindRow, Memory, Statistic};
use crate::error::Result;
use crate::factor::{Factor, SharedFactor};
use crate::kernels::Kernels;
use crate::layer::Layer;

/// One remembered optimum and the importance around it.
#[derive(Debug)]
struct Anchor {
    a: Vec<f32>,
    c: Vec<f32>,
    factors: [SharedFactor; 2],
}

impl Anchor {
    fn is_at(&self, layer: &Layer) -> bool {
        Arc::ptr_eq(&layer.a, &self.factors[0]) && Arc::ptr_eq(&layer.b, &self.factors[1])
    }

    fn max(&self) -> f64 {
        let top = |v: &[f32]| f64::from(v.iter().fold(0.0f32, |m, v| m.max(*v)));
        top(&self.a) * top(&self.c)
    }
}

#[derive(Debug)]
struct Delta {
    dims: Dims,
    scale2: f64,
    anchors: Vec<Anchor>,
    /// Tasks in the sums of the one anchor.
    tasks: u64,
}

/// Rows `[dW d ; W* d]` of a factor against its anchor, row-major, with the diagonal weights `d`.
/// `swap` puts `[W d ; dW d]` there instead. Every number of `out` is written.
fn rows(k: &Kernels, now: &Factor, anchor: &Factor, d: &[f32], swap: bool, out: &mut Vec<f32>) {
    let half = now.rank() * now.len();
    out.resize(2 * half, 0.0);
    let (first, second) = out.split_at_mut(half);
    k.moved_rows(now.geometry(), [now.stream(), anchor.stream()], d, [first, second], swap);
}

/// Buffers of one gradient, so that steps do not allocate; each thread has its own.
#[derive(Default)]
struct Scratch {
    u: Vec<f32>,
    v: Vec<f32>,
    coef: Vec<f32>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// `W diag(d) W^T` of 2r rows, in f64: the penalty is small against its terms where the gauge has moved.
fn gram(now: &Factor, anchor: &Factor, d: &[f32], swap: bool) -> Vec<f64> {
    let len = now.len();
    let plain: Vec<f64> = {
        let (w, th) = (now.to_f32(false), anchor.to_f32(false));
        let moved = w.iter().zip(&th).map(|(w, th)| f64::from(*w) - f64::from(*th));
        let wide = |v: &[f32]| v.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
        if swap { wide(&w).into_iter().chain(moved).collect() } else { moved.chain(wide(&th)).collect() }
    };
    let weighted: Vec<f64> =
        plain.chunks_exact(len).flat_map(|row| row.iter().zip(d).map(|(v, d)| v * f64::from(*d))).collect();
    let n = 2 * now.rank();
    let mut out = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let (p, q) = (&weighted[i * len..][..len], &plain[j * len..][..len]);
            let mut acc = [0.0f64; 8];
            for (p, q) in p.chunks(8).zip(q.chunks(8)) {
                for ((acc, p), q) in acc.iter_mut().zip(p).zip(q) {
                    *acc += p * q;
                }
            }
            let dot: f64 = acc.iter().sum();
            (out[i * n + j], out[j * n + i]) = (dot, dot);
        }
    }
    out
}

impl Memory for Delta {
    fn is_set(&self) -> bool {
        !self.anchors.is_empty()
    }

    fn add_gradient(&mut self, k: &Kernels, lambda: f64, layer: &Layer, ga: &mut Factor, gb: &mut Factor) {
        let c = (lambda * self.scale2) as f32;
        let mut scratch = SCRATCH.take();
        let Scratch { u, v, coef } = &mut scratch;
        coef.resize(2 * layer.rank() * layer.rank(), 0.0);
        for anchor in &self.anchors {
            if anchor.is_at(layer) {
                continue;
            }
            // U = [dA, A*], V = [B ; dB]: dOmega/dA = lambda s^2 Da U (V Dc B^T), and B likewise.
            rows(k, &layer.a, &anchor.factors[0], &anchor.a, false, u);
            rows(k, &layer.b, &anchor.factors[1], &anchor.c, true, v);
            layer.b.dots_batch(k, v, coef, c);
            ga.outer_batch(k, coef, u);
            layer.a.dots_batch(k, u, coef, c);
            gb.outer_batch(k, coef, v);
        }
        SCRATCH.set(scratch);
    }

    fn penalty(&mut self, _k: &Kernels, layer: &Layer) -> f64 {
        let mut sum = 0.0;
        for anchor in self.anchors.iter().filter(|a| !a.is_at(layer)) {
            let u = gram(&layer.a, &anchor.factors[0], &anchor.a, false);
            let v = gram(&layer.b, &anchor.factors[1], &anchor.c, true);
            sum += u.iter().zip(&v).map(|(u, v)| u * v).sum::<f64>().max(0.0);
        }
        0.5 * self.scale2 * sum
    }

    fn task(&self, seen: &Accumulator, _layer: &Layer) -> Importance {
        match seen.moments() {
            Some([a, c]) => Importance::Moments { a, c, scale2: self.scale2 },
            None => Importance::Nothing,
        }
    }

    fn consolidate(&mut self, task: Importance, layer: &Layer, at: &Boundary) {
        let narrow = |v: Vec<f64>, c: f64| v.into_iter().map(|v| (v * c) as f32).collect::<Vec<_>>();
        let factors = [Arc::clone(&layer.a), Arc::clone(&layer.b)];
        let new = match task {
            Importance::Moments { a, c, .. } => {
                // With a unit maximum of c the sum of a and the mean of c stay in one unit.
                let top = c.iter().fold(0.0f64, |m, v| m.max(*v));
                let unit = if at.scale.is_some() && top > 0.0 { top } else { 1.0 };
                Some((narrow(a, at.scale.unwrap_or(1.0) * unit), narrow(c, 1.0 / unit)))
            }
            _ => None,
        };
        let gamma = at.gamma as f32;
        if !at.online {
            for anchor in &mut self.anchors {
                anchor.a.iter_mut().for_each(|v| *v *= gamma);
            }
            if let Some((a, c)) = new {
                self.anchors.push(Anchor { a, c, factors });
            }
            return;
        }
        let Some(mut anchor) = self.anchors.pop().filter(|_| !at.replace) else {
            self.tasks = u64::from(new.is_some());
            let (a, c) = new.unwrap_or_else(|| (vec![0.0; self.dims.n_in], vec![0.0; self.dims.n_out]));
            self.anchors = vec![Anchor { a, c, factors }];
            return;
        };
        anchor.a.iter_mut().for_each(|v| *v *= gamma);
        if let Some((a, c)) = new {
            anchor.a.iter_mut().zip(a).for_each(|(v, new)| *v += new);
            let n = self.tasks as f32;
            anchor.c.iter_mut().zip(c).for_each(|(v, new)| *v = (gamma * n * *v + new) / (n + 1.0));
            self.tasks += 1;
        }
        anchor.factors = factors;
        self.anchors.push(anchor);
    }

    fn max_importance(&self) -> f64 {
        self.scale2 * self.anchors.iter().map(Anchor::max).sum::<f64>()
    }

    fn memory_bytes(&self) -> usize {
        let one = |a: &Anchor| {
            4 * (a.a.len() + a.c.len()) + a.factors.iter().map(|f| f.memory_bytes()).sum::<usize>()
        };
        self.anchors.iter().map(one).sum()
    }

    fn save(&self, out: &mut Writer) {
        out.f64s("anchors", &[self.anchors.len() as f64, self.tasks as f64]);
        for (i, anchor) in self.anchors.iter().enumerate() {
            out.f32s(&format!("anchor{i}_x"), &anchor.a);
            out.f32s(&format!("anchor{i}_g"), &anchor.c);
            out.factor(&format!("anchor{i}_a"), &anchor.factors[0]);
            out.factor(&format!("anchor{i}_b"), &anchor.factors[1]);
        }
    }

    fn load(&mut self, from: &mut Reader<'_>) -> Result<()> {
        let Dims { rank, n_in, n_out } = self.dims;
        let counts = from.f64s("anchors", 2)?;
        self.tasks = counts[1] as u64;
        self.anchors.clear();
        for i in 0..counts[0] as usize {
            let (a, c) =
                (from.f32s(&format!("anchor{i}_x"), n_in)?, from.f32s(&format!("anchor{i}_g"), n_out)?);
            let at_a = from.signed(&format!("anchor{i}_a"), rank, n_in)?;
            let at_b = from.signed(&format!("anchor{i}_b"), rank, n_out)?;
            self.anchors.push(Anchor { a, c, factors: [at_a.into(), at_b.into()] });
        }
        Ok(())
    }
}

pub(super) const ROW: KindRow = KindRow {
    name: "delta",
    lambda: 100.0,
    statistic: Statistic::Moments,
    proximal: false,
    path: false,
    make: |layer, _| {
        let scale = f64::from(layer.scaling());
        Box::new(Delta { dims: Dims::of(layer), scale2: scale * scale, anchors: Vec::new(), tasks: 0 })
    },
};
