//! Backward through the layers: gradients of the factors and magnitudes, and samples for the importance.

use super::{Chain, Pass, Version};
use crate::kernels::Kernels;
use crate::learn::accumulate::Gradients;
use crate::learn::batch::{BadRow, OVERFLOW, unsquared};
use crate::learn::update::Sums;
use crate::learn::{Regularizer, Samples};

/// Who sees the samples, and how many of the first rows it sees.
pub(super) type Observer<'a> = Option<(&'a mut dyn Regularizer, usize)>;

impl Chain {
    /// From `g` = dL/dz of the outputs (per sample, taken over) back to the first layer.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward(
        &self,
        k: &Kernels,
        version: &Version,
        x: &[f32],
        g: Vec<f32>,
        pass: &mut Pass,
        mut sums: Option<&mut Sums>,
        mut observe: Observer<'_>,
    ) -> Result<(), BadRow> {
        let last = self.frozen.len() - 1;
        let mut g = g;
        for l in (0..=last).rev() {
            // The first touch of a segment, from its end, runs it again from its stored input.
            if self.segment > 1 && pass.kept[l].u.is_empty() {
                self.run_segment(k, version, x, l, pass)?;
            }
            let outcome = self.layer_back(k, version, l, x, g, pass, sums.as_deref_mut(), &mut observe);
            match outcome {
                Ok(Some(below)) => g = below,
                Ok(None) => break,
                Err(bad) => {
                    pass.clear();
                    return Err(bad);
                }
            }
        }
        Ok(())
    }

    /// Keeps what the layers of the segment that ends at `end` need.
    fn run_segment(
        &self,
        k: &Kernels,
        version: &Version,
        x: &[f32],
        end: usize,
        pass: &mut Pass,
    ) -> Result<(), BadRow> {
        for l in end - end % self.segment..=end {
            let h = std::mem::take(&mut pass.kept[l].h);
            let input = if l == 0 { x } else { &h[..] };
            let z = self.layer(k, version, l, input, true, pass);
            pass.kept[l].h = h;
            let z = z?;
            if l < end {
                pass.kept[l + 1].h = z;
            } else {
                pass.give(z);
            }
        }
        Ok(())
    }

    /// One layer; returns dL/dz of the layer below.
    #[allow(clippy::too_many_arguments)]
    fn layer_back(
        &self,
        k: &Kernels,
        version: &Version,
        l: usize,
        x: &[f32],
        mut g: Vec<f32>,
        pass: &mut Pass,
        sums: Option<&mut Sums>,
        observe: &mut Observer<'_>,
    ) -> Result<Option<Vec<f32>>, BadRow> {
        let (frozen, layer) = (&self.frozen[l], &version.layers[l]);
        let (n_in, n_out, rank) = (layer.in_features(), layer.out_features(), layer.rank());
        let n = g.len() / n_out;
        let h = std::mem::take(&mut pass.kept[l].h);
        let input = if l == 0 { x } else { &h[..] };
        let mut magnitude = Vec::new();
        if let Some(dora) = &version.dora[l] {
            // The norm is a constant in backward (arXiv 2402.09353, section 4.3).
            let (inverse, scale) = (&dora.inverse, &dora.scale);
            magnitude.resize(n_out, 0.0f32);
            let raw = &pass.kept[l].raw;
            for (g, raw) in g.chunks_exact_mut(n_out).zip(raw.chunks_exact(n_out)) {
                for j in 0..n_out {
                    magnitude[j] += g[j] * raw[j] * inverse[j];
                    g[j] *= scale[j];
                }
            }
        }
        let mut w = pass.take(n * rank);
        layer.b.dots_batch(k, &g, &mut w, layer.scaling());
        let mut refused = None;
        if !k.all_finite(&w) {
            let row = w.iter().position(|v| !v.is_finite()).unwrap_or(0) / rank;
            refused = Some(BadRow { row, arg: "y", reason: OVERFLOW });
        }
        let u = std::mem::take(&mut pass.kept[l].u);
        if let (Some((e, rows)), None) = (observe.as_mut(), &refused) {
            let samples = Samples { x: input, g: &g, u: &u, w: &w }.first(*rows, n);
            if e.observe(k, l, samples).is_err() {
                refused = Some(unsquared(*rows, samples));
            }
        }
        if let (Some(sums), None) = (sums, &refused) {
            let s = sums[l].get_or_insert_with(|| Box::new(Gradients::new(layer)));
            s.b.outer_batch(k, &u, &g);
            s.a.outer_batch(k, &w, input);
            if version.dora[l].is_some() {
                s.magnitude.resize(n_out, 0.0);
                k.axpy(1.0, &magnitude, &mut s.magnitude);
            }
        }
        let mut below = None;
        if l > 0 && refused.is_none() {
            let mut gh = pass.take(n * n_in);
            frozen.w.combine_batch(k, &g, &mut gh, false);
            layer.a.combine_batch(k, &w, &mut gh, true);
            // Below the first layer of a segment nothing was kept yet.
            if self.activation.needs_input() && pass.kept[l - 1].z.is_empty() {
                self.run_segment(k, version, x, l - 1, pass)?;
            }
            let seen = if self.activation.needs_input() { &pass.kept[l - 1].z } else { &h };
            self.activation.backward(seen, &mut gh);
            below = Some(gh);
        }
        pass.give(w);
        pass.give(g);
        let kept = &mut pass.kept[l];
        (kept.h, kept.u) = (h, u);
        if !pass.hold {
            pass.drop_kept(l);
        }
        match refused {
            Some(bad) => Err(bad),
            None => Ok(below),
        }
    }
}
