//! Penalties that are a sum over weights: `1/2 sum F (th - th*)^2`, in two vectors whatever the tasks.

use std::fmt::Debug;
use std::sync::Arc;

use super::accumulator::{Accumulator, Dims};
use super::state::{Reader, Writer};
use super::{Boundary, Importance, Memory, Path};
use crate::error::Result;
use crate::factor::{Factor, SharedFactor};
use crate::kernels::Kernels;
use crate::layer::Layer;

/// Where the importance of one task comes from: all that sets the factor-space kinds apart.
pub(crate) trait Source: Debug + Send {
    /// Importance of every weight for the task that ends; `None` where nothing was seen.
    fn task(&self, seen: &Accumulator, layer: &Layer) -> Option<[Factor; 2]>;
    /// Whether tasks add up; else the latest stands alone.
    fn sums(&self) -> bool {
        true
    }
    /// One optimiser step.
    fn path(&mut self, _step: &Path<'_>) {}
    /// The next task begins at these weights.
    fn next_task(&mut self, _layer: &Layer) {}
    fn memory_bytes(&self) -> usize {
        0
    }
    fn save(&self, _out: &mut Writer) {}
    fn load(&mut self, _from: &mut Reader<'_>) -> Result<()> {
        Ok(())
    }
}

/// The sum over tasks, one anchor, and where importance comes from.
///
/// Several anchors collapse: `sum_k F_k (th - th_k)^2 = F (th - mean)^2 + offset` with `F = sum F_k` and the
/// F-weighted mean of the anchors, so separate anchors cost no more than one.
#[derive(Debug)]
pub(crate) struct Quadratic {
    dims: Dims,
    source: Box<dyn Source>,
    fisher: Option<[Factor; 2]>,
    anchor: Option<[SharedFactor; 2]>,
    offset: f64,
}

fn factors(layer: &Layer) -> [&SharedFactor; 2] {
    [&layer.a, &layer.b]
}

impl Quadratic {
    pub fn new(layer: &Layer, source: Box<dyn Source>) -> Self {
        Quadratic { dims: Dims::of(layer), source, fisher: None, anchor: None, offset: 0.0 }
    }

    fn state(&self) -> Option<[(&Factor, &SharedFactor); 2]> {
        let ([fa, fb], [ta, tb]) = (self.fisher.as_ref()?, self.anchor.as_ref()?);
        Some([(fa, ta), (fb, tb)])
    }

    /// Adds a task and moves the anchor to the F-weighted mean of all anchors.
    fn join(&mut self, task: &[Factor; 2], layer: &Layer, gamma: f64) {
        let first = self.anchor.is_none();
        let fisher = self.fisher.get_or_insert_with(|| self.dims.pair());
        let anchor = self.anchor.get_or_insert_with(|| factors(layer).map(Arc::clone));
        let mut offset = gamma * self.offset;
        for i in 0..2 {
            let th = factors(layer)[i].stream();
            let fisher = fisher[i].stream_mut();
            let mean = Arc::make_mut(&mut anchor[i]).stream_mut();
            for (((f, m), &th), &new) in fisher.iter_mut().zip(mean).zip(th).zip(task[i].stream()) {
                let old = gamma as f32 * *f;
                *f = old + new;
                if *f == 0.0 || first {
                    *m = th;
                    continue;
                }
                let (share, d) = (new / *f, th - *m);
                offset += f64::from(old) * f64::from(share) * f64::from(d) * f64::from(d);
                *m += share * d;
            }
        }
        self.offset = offset;
    }
}

impl Memory for Quadratic {
    fn is_set(&self) -> bool {
        self.anchor.is_some()
    }

    fn add_gradient(&mut self, k: &Kernels, lambda: f64, layer: &Layer, ga: &mut Factor, gb: &mut Factor) {
        let Some(state) = self.state() else { return };
        for (((f, th), w), g) in state.into_iter().zip(factors(layer)).zip([ga, gb]) {
            k.pull(lambda as f32, f.stream(), w.stream(), th.stream(), g.stream_mut());
        }
    }

    fn penalty(&mut self, _k: &Kernels, layer: &Layer) -> f64 {
        let Some(state) = self.state() else { return 0.0 };
        let mut sum = self.offset;
        for ((f, th), w) in state.into_iter().zip(factors(layer)) {
            let pairs = w.stream().iter().zip(th.stream());
            sum += f.stream().iter().zip(pairs).fold(0.0f64, |sum, (&f, (&w, &th))| {
                let d = f64::from(w) - f64::from(th);
                sum + f64::from(f) * d * d
            });
        }
        0.5 * sum
    }

    fn proximal(&self, c: f64, layer: &mut Layer) {
        let Some(state) = self.state() else { return };
        for ((f, th), w) in state.into_iter().zip([&mut layer.a, &mut layer.b]) {
            let weights = Arc::make_mut(w).stream_mut().iter_mut();
            for ((w, &th), &f) in weights.zip(th.stream()).zip(f.stream()) {
                // (w + c F th) / (1 + c F), so written that F = 0 keeps every bit and no c gives NaN.
                let pull = (c as f32 * f).min(1e30);
                let share = pull / (1.0 + pull);
                *w = if share >= 1.0 { th } else { *w - share * (*w - th) };
            }
        }
    }

    fn path(&mut self, step: &Path<'_>) {
        self.source.path(step);
    }

    fn task(&self, seen: &Accumulator, layer: &Layer) -> Importance {
        self.source.task(seen, layer).map_or(Importance::Nothing, Importance::Factors)
    }

    fn consolidate(&mut self, task: Importance, layer: &Layer, at: &Boundary) {
        let task = match task {
            Importance::Factors(mut f) => {
                if let Some(scale) = at.scale.map(|s| s as f32) {
                    f.iter_mut().for_each(|f| f.stream_mut().iter_mut().for_each(|v| *v *= scale));
                }
                f
            }
            _ => self.dims.pair(),
        };
        if !at.online {
            self.join(&task, layer, at.gamma);
        } else {
            let gamma = if self.source.sums() && !at.replace { at.gamma as f32 } else { 0.0 };
            let fisher = self.fisher.get_or_insert_with(|| self.dims.pair());
            for (old, new) in fisher.iter_mut().zip(&task) {
                for (old, new) in old.stream_mut().iter_mut().zip(new.stream()) {
                    *old = gamma * *old + new;
                }
            }
            self.anchor = Some(factors(layer).map(Arc::clone));
        }
        self.source.next_task(layer);
    }

    fn max_importance(&self) -> f64 {
        let all = self.fisher.iter().flatten().flat_map(|f| f.stream());
        f64::from(all.fold(0.0f32, |m, v| m.max(*v)))
    }

    fn memory_bytes(&self) -> usize {
        let fisher: usize = self.fisher.iter().flatten().map(Factor::memory_bytes).sum();
        let anchor: usize = self.anchor.iter().flatten().map(|f| f.memory_bytes()).sum();
        fisher + anchor + self.source.memory_bytes()
    }

    fn save(&self, out: &mut Writer) {
        self.source.save(out);
        let Some(state) = self.state() else { return };
        out.f64s("offset", &[self.offset]);
        for (side, (f, th)) in ["a", "b"].into_iter().zip(state) {
            out.factor(&format!("importance_{side}"), f);
            out.factor(&format!("anchor_{side}"), th);
        }
    }

    fn load(&mut self, from: &mut Reader<'_>) -> Result<()> {
        self.source.load(from)?;
        if !from.has("offset") {
            return Ok(());
        }
        let Dims { rank, n_in, n_out } = self.dims;
        self.offset = from.f64s("offset", 1)?[0];
        self.fisher =
            Some([from.factor("importance_a", rank, n_in)?, from.factor("importance_b", rank, n_out)?]);
        let anchor = [from.signed("anchor_a", rank, n_in)?, from.signed("anchor_b", rank, n_out)?];
        self.anchor = Some(anchor.map(Arc::new));
        Ok(())
    }
}
