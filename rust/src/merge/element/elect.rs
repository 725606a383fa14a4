//! How the parents' thinned entries become one: a weighted sum, or the election of a sign and its weighted mean.

use super::super::spec::{Majority, Parent, Semantics, Spec};
use crate::kernels::{Election, Kernels};

/// What becomes of the entries at one position.
pub(super) enum Join {
    /// `sum c_i t_i`.
    Sum(Vec<f32>),
    /// The sign of `sum v_i t_i` or `sum v_i sign(t_i)`, then the sum or mean of `w_i t_i` over those that have it.
    Elect(Vote),
}

/// An election with its numbers.
pub(super) struct Vote {
    pub votes: Vec<f32>,
    pub weights: Vec<f32>,
    pub sizes: Vec<f32>,
    pub frequency: bool,
    pub normalize: bool,
    pub lam: f32,
}

impl Join {
    /// `lam sum w_i t_i`, over `sum w_i` where `normalize`.
    pub fn sum(parents: &[Parent<'_>], spec: &Spec) -> Self {
        let all: f64 = parents.iter().map(|p| p.weight).sum();
        let by = if spec.normalize { spec.lam / all } else { spec.lam };
        Join::Sum(parents.iter().map(|p| (by * p.weight) as f32).collect())
    }

    /// TIES' last two steps (arXiv 2306.01708): elect, then the mean of those that agree (`sum w_i t_i` over
    /// `sum |w_i|`, or the sum alone without `normalize`). A negative weight makes a parent stand for its opposite.
    pub fn elect(parents: &[Parent<'_>], spec: &Spec) -> Self {
        let count = vec![1.0; parents.len()];
        if spec.semantics == Semantics::Peft {
            // PEFT elects without weights and divides by how many agree.
            let weights = parents.iter().map(|p| p.weight as f32).collect();
            let frequency = spec.majority == Majority::Frequency;
            return Join::Elect(Vote {
                votes: count.clone(),
                sizes: count,
                weights,
                frequency,
                normalize: true,
                lam: 1.0,
            });
        }
        // Only ratios matter for the sign and for the mean.
        let most = parents.iter().map(|p| p.weight.abs()).fold(0.0, f64::max);
        let unit = if most > 0.0 { 1.0 / most } else { 0.0 };
        let votes: Vec<f32> = parents.iter().map(|p| (unit * p.weight) as f32).collect();
        let lam = if spec.normalize { spec.lam } else { spec.lam * most };
        Join::Elect(Vote {
            weights: votes.clone(),
            sizes: votes.iter().map(|v| v.abs()).collect(),
            votes,
            frequency: spec.majority == Majority::Frequency,
            normalize: spec.normalize,
            lam: lam as f32,
        })
    }

    /// One stretch of positions.
    pub fn join(&self, k: &Kernels, rows: &[&[f32]], out: &mut [f32]) {
        match self {
            Join::Sum(coef) => {
                out.fill(0.0);
                for (row, &c) in rows.iter().zip(coef) {
                    k.axpy(c, row, out);
                }
            }
            Join::Elect(v) => {
                let e = Election {
                    votes: &v.votes,
                    weights: &v.weights,
                    sizes: &v.sizes,
                    frequency: v.frequency,
                    normalize: v.normalize,
                    lam: v.lam,
                };
                k.elect(&e, rows, out);
            }
        }
    }
}
