//! Fewer ranks for an adapter that exists: the truncated singular value decomposition of each delta.

use std::sync::Arc;
use std::time::Instant;

use serde::Deserialize;

use super::report::{ModuleReport, Report, Seen};
use super::spec::Parent;
use super::store::store;
use super::{Tick, finite_factor};
use crate::adapter::Adapter;
use crate::algebra::{Factors, Grams, Keep, Stack, refactor_with};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;

/// By what a rank is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// That rank.
    Rank,
    /// The smallest with that share of the energy.
    Energy,
    /// The smallest within that relative error.
    MaxError,
}

/// How to resize.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizePlan {
    /// By what.
    pub keep: Goal,
    /// How much.
    pub value: f64,
    /// Whether each module gets a rank of its own; else the largest that any needs.
    #[serde(default)]
    pub per_module: bool,
    /// Stored dtype; none as it is.
    pub dtype: Option<String>,
}

impl ResizePlan {
    fn keep(&self) -> Result<Keep> {
        let v = self.value;
        match self.keep {
            Goal::Rank if v >= 1.0 && v.fract() == 0.0 => Ok(Keep::Rank(v as usize)),
            Goal::Rank => Err(Error::config("rank", v, "an integer of at least 1")),
            Goal::Energy if v > 0.0 && v <= 1.0 => Ok(Keep::Energy(v)),
            Goal::Energy => Err(Error::config("energy", v, "a number in (0, 1]")),
            Goal::MaxError if (0.0..1.0).contains(&v) => Ok(Keep::MaxError(v)),
            Goal::MaxError => Err(Error::config("max_error", v, "a number in [0, 1)")),
        }
    }
}

/// The adapter with smaller ranks. A module that needs all it has stays as it is, bit for bit.
///
/// # Errors
/// A goal out of range, NaN in a module (named); cancellation by `tick`.
pub fn resize(
    k: &Kernels,
    adapter: &Adapter,
    plan: &ResizePlan,
    tick: &mut Tick<'_>,
) -> Result<(Adapter, Report)> {
    let start = Instant::now();
    let mut keep = plan.keep()?;
    let dtype: Option<Dtype> = plan.dtype.as_deref().map(str::parse).transpose()?;
    for (name, layer) in &adapter.modules {
        if !(finite_factor(k, &layer.a) && finite_factor(k, &layer.b)) {
            return Err(Error::NonFinite { arg: "adapter".into(), detail: format!(" in module {name}") });
        }
    }
    let count = adapter.modules.len();
    let by_rank = matches!(keep, Keep::Rank(_));
    let passes = if plan.per_module || by_rank { 1 } else { 2 };
    if passes == 2 {
        let mut largest = 1;
        for (done, (_, layer)) in adapter.modules.iter().enumerate() {
            tick(done, passes * count)?;
            let stack = Stack::of(&[layer], &[1.0])?.0;
            largest = largest.max(refactor_with(k, &stack, &Grams::of(k, &stack), &stack.coef, keep)?.rank);
        }
        keep = Keep::Rank(largest);
    }
    let mut report = Report { semantics: "exact".into(), ..Report::default() };
    let mut modules = Vec::with_capacity(count);
    for (done, (name, layer)) in adapter.modules.iter().enumerate() {
        tick((passes - 1) * count + done, passes * count)?;
        let begin = Instant::now();
        let (layer, mut figures) = one(k, layer, keep, dtype)?;
        figures.name.clone_from(name);
        figures.method = "resize".into();
        figures.parents = vec!["adapter".into()];
        figures.seconds = begin.elapsed().as_secs_f64();
        report.peak_bytes = report.peak_bytes.max(figures.bytes);
        report.modules.push(figures);
        modules.push((name.clone(), layer));
    }
    tick(passes * count, passes * count)?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok((Adapter { modules, ..Adapter::default() }, report))
}

fn one(
    k: &Kernels,
    layer: &Arc<Layer>,
    keep: Keep,
    dtype: Option<Dtype>,
) -> Result<(Arc<Layer>, ModuleReport)> {
    let (stack, groups) = Stack::of(&[layer], &[1.0])?;
    let grams = Grams::of(k, &stack);
    let products = grams.products(&stack.coef, &groups);
    let seen = Seen { stack: &stack, grams: &grams, groups: &groups, products: &products };
    let parent = [Parent { name: "adapter", layer, weight: 1.0, statistics: None }];
    let made: Option<Factors> = match keep {
        Keep::Rank(rank) if rank >= layer.rank() => None,
        _ => Some(refactor_with(k, &stack, &grams, &stack.coef, keep)?).filter(|m| m.rank < layer.rank()),
    };
    let (kept, mut report) = match made {
        None => {
            let same = match dtype {
                Some(d) if d != layer.a.dtype() || d != layer.b.dtype() => Arc::new(layer.cast(d)),
                _ => Arc::clone(layer),
            };
            (same, seen.exact(k, &parent, &stack.coef, layer.rank()))
        }
        Some(made) => {
            let mut report = seen.truncated(k, &parent, &made);
            let rank = if let Keep::Rank(r) = keep { r } else { made.rank };
            let dtype = dtype.unwrap_or_else(|| super::widest(&[layer.as_ref()]));
            let shape = (stack.n_in, stack.n_out);
            let mut small = store(k, made, shape, rank, dtype)?.told(&mut report);
            if layer.rslora {
                // One kind of scaling for all modules, those that stay as they are among them.
                small.alpha = small.exact_scaling() * (rank as f64).sqrt();
                small.rslora = true;
            }
            (Arc::new(small), report)
        }
    };
    report.rank_out = kept.rank();
    report.bytes = stack.bytes() + 3 * grams.bytes();
    Ok((kept, report))
}
