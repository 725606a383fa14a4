//! One arm: the ridge regression of its rewards on the bottleneck.

use crate::kernels::Kernels;
use crate::learn::learner::TINY;

/// Name, model and statistics of one arm.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Arm {
    pub name: String,
    /// Coefficients, `(rank,)`; empty before the first reward.
    pub theta: Vec<f64>,
    /// Inverse of `ridge unit I + sum u u^T`, `(rank, rank)`; empty before the first reward.
    pub p: Vec<f64>,
    /// Rewards.
    pub count: u64,
    /// Their sum.
    pub total: f64,
    /// Call that last asked for it.
    pub turn: u64,
}

/// `<a, b>` in an order of additions that is the same on every machine.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut acc = [0.0f64; 8];
    let (ca, cb) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = ca.remainder().iter().zip(cb.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in ca.zip(cb) {
        for i in 0..8 {
            acc[i] += a[i] * b[i];
        }
    }
    acc.iter().sum::<f64>() + tail
}

impl Arm {
    pub fn new(name: &str) -> Self {
        Arm { name: name.to_owned(), theta: Vec::new(), p: Vec::new(), count: 0, total: 0.0, turn: 0 }
    }

    /// `theta . u` and `u P u` of an arm that has learned.
    pub fn predict(&self, u: &[f64]) -> (f64, f64) {
        let variance = self.p.chunks_exact(u.len()).zip(u).map(|(row, &u_i)| u_i * dot(row, u)).sum();
        (dot(&self.theta, u), variance)
    }

    /// One reward; returns what was expected before it. `prior` is P's diagonal before the first.
    pub fn learn(&mut self, k: &Kernels, u: &[f32], prior: f64, reward: f64, pu: &mut Vec<f64>) -> f64 {
        let r = u.len();
        let norm2: f64 = u.iter().map(|&u| f64::from(u) * f64::from(u)).sum();
        if !(norm2 >= TINY && norm2.is_finite()) {
            return 0.0;
        }
        if self.p.is_empty() {
            self.theta.resize(r, 0.0);
            self.p.resize(r * r, 0.0);
            self.p.iter_mut().step_by(r + 1).for_each(|p| *p = prior);
        }
        let along = |v: &[f64]| v.iter().zip(u).map(|(v, &u)| v * f64::from(u)).sum::<f64>();
        let expected = along(&self.theta);
        pu.resize(r, 0.0);
        let mut gain = [0.0f32; STACK];
        let mut long = Vec::new();
        let gain = if r <= STACK {
            &mut gain[..r]
        } else {
            long.resize(r, 0.0);
            &mut long[..]
        };
        k.rls_gain(&mut self.p, u, 1.0, pu, gain);
        // The kernel's gain is rounded to f32; theta is kept in f64.
        let step = (reward - expected) / (1.0 + along(pu));
        for (theta, pu) in self.theta.iter_mut().zip(pu.iter()) {
            *theta += step * pu;
        }
        expected
    }
}

/// Ranks up to this need no heap for the gain.
const STACK: usize = 64;
