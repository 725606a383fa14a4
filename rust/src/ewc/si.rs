//! Kind "si": how much of the loss's fall each weight's path earned (synaptic intelligence, Zenke 2017).
//!
//! `w -= g dth` over the steps of a task; at its end `F += max(w, 0) / (dth_task^2 + 1e-3)`.

use std::sync::Arc;

use super::accumulator::{Accumulator, Dims};
use super::quadratic::{Quadratic, Source};
use super::state::{Reader, Writer};
use super::{KindRow, Path, Statistic};
use crate::error::Result;
use crate::factor::{Factor, SharedFactor};
use crate::layer::Layer;

/// Damping of the squared distance: weights that hardly moved are not divided by nothing.
const DAMPING: f32 = 1e-3;

#[derive(Debug)]
struct Integral {
    dims: Dims,
    /// The path integral of the running task.
    w: [Factor; 2],
    /// Weights at the task's beginning.
    start: [SharedFactor; 2],
}

fn shared(layer: &Layer) -> [SharedFactor; 2] {
    [Arc::clone(&layer.a), Arc::clone(&layer.b)]
}

impl Source for Integral {
    fn task(&self, _seen: &Accumulator, layer: &Layer) -> Option<[Factor; 2]> {
        let mut out = self.dims.pair();
        for ((out, w), (now, start)) in out.iter_mut().zip(&self.w).zip(shared(layer).iter().zip(&self.start))
        {
            let moved = now.stream().iter().zip(start.stream()).map(|(a, b)| a - b);
            for ((out, w), d) in out.stream_mut().iter_mut().zip(w.stream()).zip(moved) {
                *out = w.max(0.0) / (d * d + DAMPING);
            }
        }
        Some(out)
    }

    fn path(&mut self, step: &Path<'_>) {
        for (i, w) in self.w.iter_mut().enumerate() {
            let moved = step.after[i].stream().iter().zip(step.before[i].stream()).map(|(a, b)| a - b);
            for ((w, g), d) in w.stream_mut().iter_mut().zip(step.gradient[i].stream()).zip(moved) {
                *w -= g * d;
            }
        }
    }

    fn next_task(&mut self, layer: &Layer) {
        self.start = shared(layer);
        for w in &mut self.w {
            w.stream_mut().fill(0.0);
        }
    }

    fn memory_bytes(&self) -> usize {
        let start: usize = self.start.iter().map(|f| f.memory_bytes()).sum();
        start + self.w.iter().map(Factor::memory_bytes).sum::<usize>()
    }

    fn save(&self, out: &mut Writer) {
        for (i, side) in ["a", "b"].into_iter().enumerate() {
            out.factor(&format!("path_{side}"), &self.w[i]);
            out.factor(&format!("start_{side}"), &self.start[i]);
        }
    }

    fn load(&mut self, from: &mut Reader<'_>) -> Result<()> {
        let Dims { rank, n_in, n_out } = self.dims;
        for (i, (side, len)) in [("a", n_in), ("b", n_out)].into_iter().enumerate() {
            self.w[i] = from.signed(&format!("path_{side}"), rank, len)?;
            self.start[i] = from.signed(&format!("start_{side}"), rank, len)?.into();
        }
        Ok(())
    }
}

pub(super) const ROW: KindRow = KindRow {
    name: "si",
    lambda: 0.2,
    statistic: Statistic::None,
    proximal: true,
    path: true,
    make: |layer, _| {
        let dims = Dims::of(layer);
        let source = Integral { dims, w: dims.pair(), start: shared(layer) };
        Box::new(Quadratic::new(layer, Box::new(source)))
    },
};
