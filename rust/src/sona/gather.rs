//! Samples of one module and member, laid out for a strategy.

use std::sync::Arc;

use super::Sona;
use super::members::Members;
use super::window::Pending;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::consolidate::Rows;
use crate::replay::{Entry, Sample};

/// Where rows of one module come from, and their widths.
pub(super) struct Shape<'a> {
    pub module: u32,
    pub layer: &'a Layer,
    /// Outputs of each module of the adapter, in order.
    pub outs: &'a [usize],
}

/// Rows with the inputs that they were made from.
#[derive(Default)]
pub(super) struct Gathered {
    pub rows: Rows,
    x: Vec<f32>,
    /// `|x|^2` of each.
    pub x2: Vec<f32>,
    /// Inputs are kept where members are chosen by them.
    pub inputs: Vec<f32>,
}

impl Gathered {
    pub fn new(shape: &Shape<'_>) -> Self {
        let rows = Rows { rank: shape.layer.rank(), out: shape.layer.out_features(), ..Rows::default() };
        Gathered { rows, ..Gathered::default() }
    }

    fn push(&mut self, s: &Sample) {
        let rows = &mut self.rows;
        self.x.extend_from_slice(&s.x);
        match &s.base {
            Some(base) => rows.base.extend_from_slice(base),
            None => rows.base.resize(rows.base.len() + rows.out, 0.0),
        }
        rows.feedback.push(Arc::clone(&s.feedback));
        rows.advantage.push(s.advantage);
        rows.weight.push(s.weight);
        rows.quality.push(s.quality.unwrap_or(f32::NAN));
        rows.event.push(s.event);
    }

    pub fn pending(&mut self, shape: &Shape<'_>, p: &Pending) {
        if concerns(p.sample.module, shape.module) {
            self.push(&p.sample);
        }
    }

    /// A stored sample, with what the adapter answered then.
    pub fn entry(&mut self, shape: &Shape<'_>, e: &Entry<'_>) {
        if !concerns(e.module, shape.module) {
            return;
        }
        let rows = &mut self.rows;
        e.push_x(&mut self.x);
        if !e.push_base(&mut rows.base) {
            rows.base.resize(rows.base.len() + rows.out, 0.0);
        }
        let first = match e.module {
            Some(_) => 0,
            None => shape.outs[..shape.module as usize].iter().sum(),
        };
        rows.stored.extend_from_slice(&e.stored()[first..first + rows.out]);
        rows.feedback.push(e.feedback());
        rows.advantage.push(e.advantage);
        rows.weight.push(e.weight);
        rows.quality.push(e.quality.unwrap_or(f32::NAN));
        rows.event.push(e.event);
    }

    /// `u = s x A` of all rows.
    pub fn finish(mut self, k: &Kernels, shape: &Shape<'_>, keep_inputs: bool) -> Self {
        let layer = shape.layer;
        self.rows.u = vec![0.0; self.x.len() / layer.in_features() * layer.rank()];
        self.x2 = self.x.chunks_exact(layer.in_features()).map(|x| k.dot(x, x)).collect();
        layer.a.dots_batch(k, &self.x, &mut self.rows.u, layer.scaling());
        if keep_inputs {
            self.inputs = std::mem::take(&mut self.x);
        }
        self
    }
}

/// Whether an event of `of` (`None`: every module) is about `module`.
pub(super) fn concerns(of: Option<u32>, module: u32) -> bool {
    of.is_none_or(|m| m == module)
}

/// `sum weight u u^T` of rows.
pub(super) fn gram(rows: &Rows) -> Vec<f64> {
    let r = rows.rank;
    let mut gram = vec![0.0; r * r];
    for (u, &w) in rows.u.chunks_exact(r.max(1)).zip(&rows.weight) {
        for i in 0..r {
            let c = f64::from(w) * f64::from(u[i]);
            for j in 0..r {
                gram[i * r + j] += c * f64::from(u[j]);
            }
        }
    }
    gram
}

impl Sona {
    pub(super) fn outs(&self) -> Vec<usize> {
        (0..self.lora.names().len()).map(|m| self.lora.shape(m).1).collect()
    }

    /// Weights of the members for each row of inputs, `(n, K)`.
    pub(super) fn mixing(&self, members: &Members, inputs: &[f32], n: usize) -> Vec<f32> {
        if members.loras.len() == 1 {
            return vec![1.0; n];
        }
        let s = &self.settings;
        let (mut all, mut one) = (Vec::new(), Vec::new());
        for x in inputs.chunks_exact(self.lora.shape(0).0) {
            members.weights(self.kernels, x, s.ensemble_hard, s.ensemble_temperature, &mut one);
            all.extend_from_slice(&one);
        }
        all
    }
}
