//! One batch, copied together: rows of the data set, and behind them rows that replay remembers.

use super::batch::Replayed;
use super::replay_memory::ReplayMemory;
use super::train::{Data, Targets};

/// Rows of a batch, contiguous; buffers are kept between batches.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    x: Vec<f32>,
    target: Vec<f32>,
    labels: Vec<i64>,
    base: Vec<f32>,
    weights: Vec<f32>,
    joined: Joined,
}

/// What rows of earlier tasks have beside x and y.
#[derive(Debug, Default)]
struct Joined {
    outputs: Vec<f32>,
    weights: Vec<f32>,
    stride: usize,
    logit_weight: f32,
}

impl Gathered {
    /// Copies the rows of `order`; batches are then contiguous whatever the data set is.
    pub fn fill(&mut self, data: &Data<'_>, order: &[usize]) {
        let copy = |to: &mut Vec<f32>, from: &[f32]| {
            to.clear();
            append(to, from, from.len() / data.rows, order);
        };
        copy(&mut self.x, data.x);
        match data.y {
            Targets::Values(y) => copy(&mut self.target, y),
            Targets::Labels(y) => {
                self.labels.clear();
                self.labels.extend(order.iter().map(|&row| y[row]));
            }
        }
        if let Some(base) = data.base {
            copy(&mut self.base, base);
        }
        if let Some(weights) = data.weights {
            copy(&mut self.weights, weights);
        }
        self.joined.weights.clear();
    }

    /// Draws `n` rows of a memory that fits, and puts them behind the batch.
    pub fn join(&mut self, memory: &mut ReplayMemory, n: usize) {
        let slots = memory.draw(n);
        let (kept, set) = (memory.kept(), memory.settings());
        append(&mut self.x, &kept.x, kept.in_features(), &slots);
        append(&mut self.target, &kept.targets, kept.targets.len() / kept.rows(), &slots);
        if !kept.labels.is_empty() {
            self.labels.extend(slots.iter().map(|&slot| kept.labels[slot]));
        }
        self.joined.stride = kept.outputs.len() / kept.rows();
        self.joined.outputs.clear();
        append(&mut self.joined.outputs, &kept.outputs, self.joined.stride, &slots);
        let label = set.label_weight as f32;
        self.joined.weights.extend(slots.iter().map(|&slot| label * kept.weights[slot]));
        self.joined.logit_weight = set.logit_weight as f32;
    }

    /// The batch.
    pub fn view(&self, data: &Data<'_>) -> Data<'_> {
        let Joined { outputs, weights, stride, logit_weight } = &self.joined;
        let replayed = Replayed { outputs, stride: *stride, weights, logit_weight: *logit_weight };
        Data {
            x: &self.x,
            y: match data.y {
                Targets::Values(_) => Targets::Values(&self.target),
                Targets::Labels(_) => Targets::Labels(&self.labels),
            },
            base: data.base.map(|_| &self.base[..]),
            weights: data.weights.map(|_| &self.weights[..]),
            rows: self.x.len() / (data.x.len() / data.rows),
            replayed: (!weights.is_empty()).then_some(replayed),
        }
    }
}

fn append(to: &mut Vec<f32>, from: &[f32], width: usize, rows: &[usize]) {
    for &row in rows {
        to.extend_from_slice(&from[row * width..(row + 1) * width]);
    }
}
