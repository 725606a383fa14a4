//! The live learners: one, or in an ensemble one for each pattern of inputs.

use std::sync::Arc;

use crate::kernels::Kernels;
use crate::micro_lora::MicroLora;

/// Learners that share their A, and the direction of inputs that each is for.
#[derive(Clone)]
pub(super) struct Members {
    pub loras: Vec<Arc<MicroLora>>,
    /// Unit rows, one per member; empty while there is one member only.
    pub centroids: Vec<f32>,
}

impl Members {
    pub fn one(lora: Arc<MicroLora>) -> Self {
        Members { loras: vec![lora], centroids: Vec::new() }
    }

    /// Cosine of x with the centroid of each member.
    fn cosines(&self, k: &Kernels, x: &[f32], out: &mut Vec<f32>) {
        out.clear();
        let norm = k.dot(x, x).sqrt().max(f32::MIN_POSITIVE);
        out.extend(self.centroids.chunks_exact(x.len()).map(|c| k.dot(c, x) / norm));
    }

    /// The member nearest to x; the first of equals.
    pub fn nearest(&self, k: &Kernels, x: &[f32]) -> usize {
        if self.loras.len() == 1 {
            return 0;
        }
        let mut best = (0, f32::NEG_INFINITY);
        for (i, c) in self.centroids.chunks_exact(x.len()).enumerate() {
            let along = k.dot(c, x);
            if along > best.1 {
                best = (i, along);
            }
        }
        best.0
    }

    /// Weight of each member for x: all to the nearest, or the softmax of cosines over a temperature.
    pub fn weights(&self, k: &Kernels, x: &[f32], hard: bool, temperature: f64, out: &mut Vec<f32>) {
        if hard || self.loras.len() == 1 {
            out.clear();
            out.resize(self.loras.len(), 0.0);
            out[self.nearest(k, x)] = 1.0;
            return;
        }
        self.cosines(k, x, out);
        let top = out.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let mut sum = 0.0;
        for v in out.iter_mut() {
            *v = ((f64::from(*v - top)) / temperature).exp() as f32;
            sum += *v;
        }
        out.iter_mut().for_each(|v| *v /= sum);
    }
}
