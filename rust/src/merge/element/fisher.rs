//! Fisher-weighted averaging (arXiv 2111.09832) with a factored importance `F = c a^T` per module.

use std::ops::Range;

use super::{Context, Method};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::learn::basis::Tick;

struct Fisher {
    /// Importance of each parent's columns, mean 1.
    columns: Vec<Vec<f32>>,
    /// Importance of each parent's rows, mean 1, times its weight.
    rows: Vec<Vec<f32>>,
    lam: f32,
}

impl Method for Fisher {
    fn block(&mut self, k: &Kernels, block: Range<usize>, parents: &mut [Vec<f32>], out: &mut [f32]) {
        let cols = out.len() / block.len();
        let f: Vec<&[f32]> = self.columns.iter().map(Vec::as_slice).collect();
        for (at, (j, out)) in block.zip(out.chunks_exact_mut(cols)).enumerate() {
            let x: Vec<&[f32]> = parents.iter().map(|p| &p[at * cols..(at + 1) * cols]).collect();
            let c: Vec<f32> = self.rows.iter().map(|r| r[j]).collect();
            k.ratio(&x, &f, &c, self.lam, out);
        }
    }

    fn bytes(&self) -> usize {
        4 * self.columns.iter().chain(&self.rows).map(Vec::len).sum::<usize>()
    }
}

/// `v` times `by` over its mean; zeros stay zeros.
fn scaled(v: &[f32], by: f64) -> Vec<f32> {
    let mean = v.iter().map(|v| f64::from(*v)).sum::<f64>() / v.len() as f64;
    let by = if mean > 0.0 { by / mean } else { 0.0 };
    v.iter().map(|v| (by * f64::from(*v)) as f32).collect()
}

pub(crate) fn prepare<'a>(c: &Context<'a>, _: &mut Tick<'_>) -> Result<Box<dyn Method + 'a>> {
    let most = c.parents.iter().map(|p| p.weight).fold(0.0, f64::max);
    let (mut columns, mut rows) = (Vec::new(), Vec::new());
    for p in c.parents {
        let arg = || format!("statistics[{:?}]", p.name);
        let want =
            format!("importance of module {}: ({},) and ({},)", c.module, c.deltas.cols(), c.deltas.rows());
        let Some((a, b)) = p.statistics.and_then(|s| s.importance.as_ref()) else {
            return Err(Error::config(arg(), "none", want));
        };
        if [b.len(), a.len()] != c.shape() {
            return Err(Error::shape(arg(), format!("({},) and ({},)", a.len(), b.len()), want));
        }
        if !a.iter().chain(b).all(|v| v.is_finite() && *v >= 0.0) {
            return Err(Error::config(arg(), "numbers that are negative or not finite", want));
        }
        if p.weight < 0.0 {
            return Err(Error::config(
                format!("weights[{:?}]", p.name),
                p.weight,
                "at least 0: it weighs an importance",
            ));
        }
        columns.push(scaled(a, 1.0));
        rows.push(scaled(b, if most > 0.0 { p.weight / most } else { 0.0 }));
    }
    Ok(Box::new(Fisher { columns, rows, lam: c.spec.lam as f32 }))
}
