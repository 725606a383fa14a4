//! Merging adapters without their base model: every method acts on the product of the factors.
//!
//! [`METHODS`] is the table. A factor-space method gives coefficients of the parents' deltas (`factor/`), an
//! element-wise one tiles of the merged delta (`element/`). Parents are never touched.

mod compose;
mod diff;
mod element;
mod extract;
mod factor;
mod method;
mod peft;
mod report;
mod resize;
mod spec;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use compose::{combine, sequential};
pub use diff::{Diff, ModuleDiff, diff};
pub use element::mask;
pub use extract::{ExtractOptions, ExtractReport, Pair, extract_arrays, extract_files};
pub use method::{DefaultWeights, Family, METHODS, Method};
pub use peft::METHODS as PEFT_METHODS;
pub use report::{ModuleReport, Report};
pub use resize::{Goal, ResizePlan, resize};
pub use spec::{Gram, Majority, ModulePlan, Parent, Plan, Semantics, Spec, Statistics};

use self::method::Run;
use crate::adapter::Adapter;
use crate::algebra::Stack;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

/// Told of progress as (modules done, modules in all); an error stops the work.
pub type Tick<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

/// Time between two ticks inside a module.
const PATIENCE: Duration = Duration::from_millis(20);

/// An adapter with its name and what it knows of its data, module by module.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// Name, distinct among the parents.
    pub name: String,
    /// Weights.
    pub adapter: Adapter,
    /// By module.
    pub statistics: HashMap<String, Statistics>,
}

/// Merges as planned.
///
/// # Errors
/// Anything wrong with plan or parents, before any work; cancellation by `tick`.
pub fn merge(k: &Kernels, sources: &[Source], plan: &Plan, tick: &mut Tick<'_>) -> Result<(Adapter, Report)> {
    let start = Instant::now();
    let mut work = Vec::with_capacity(plan.modules.len());
    for m in &plan.modules {
        let spec = Spec::new(m, plan)?;
        let parents = parents_of(m, sources)?;
        check(k, &m.name, &parents, &spec)?;
        work.push((m, spec, parents));
    }
    if work.is_empty() {
        return Err(Error::config("adapters", "no common modules", "adapters that share a module"));
    }
    let mut modules = Vec::with_capacity(work.len());
    let mut report = Report { semantics: plan.semantics.as_str().into(), ..Report::default() };
    for (done, (m, spec, parents)) in work.iter().enumerate() {
        tick(done, work.len())?;
        let begin = Instant::now();
        let mut last = begin;
        let alone = plan.semantics == Semantics::Peft && sources.len() == 1;
        let (layer, mut figures) = one(k, &m.name, parents, spec, alone, &mut |_, _| {
            if last.elapsed() < PATIENCE {
                return Ok(());
            }
            last = Instant::now();
            tick(done, work.len())
        })?;
        figures.name.clone_from(&m.name);
        figures.method = spec.method.name.into();
        figures.rank_out = layer.rank();
        figures.seconds = begin.elapsed().as_secs_f64();
        report.peak_bytes = report.peak_bytes.max(figures.bytes);
        report.modules.push(figures);
        modules.push((m.name.clone(), Arc::new(layer)));
    }
    tick(work.len(), work.len())?;
    report.seconds = start.elapsed().as_secs_f64();
    Ok((Adapter { modules, ..Adapter::default() }, report))
}

/// One module; `tick` is called for every block that is streamed, so that it can be cancelled.
fn one(
    k: &Kernels,
    module: &str,
    parents: &[Parent<'_>],
    spec: &Spec,
    alone: bool,
    tick: &mut Tick<'_>,
) -> Result<(Layer, ModuleReport)> {
    let (mut layer, mut report) = match spec.method.run {
        // PEFT turns every type into linear where there is one adapter.
        _ if alone => peft::merge(k, module, parents, spec, peft::Op::Sum)?,
        Run::Element(prepare) => element::layer(k, prepare, module, parents, spec, tick)?,
        Run::Peft(op) => peft::merge(k, module, parents, spec, op)?,
        _ => factor::merge(k, module, parents, spec)?,
    };
    if spec.semantics == Semantics::Peft {
        layer = peft::as_configured(layer, parents, &mut report)?;
    }
    if spec.full && report.sign_conflict.is_none() {
        report.sign_conflict = Some(element::sign_conflict(k, module, parents, tick)?);
    }
    Ok((layer, report))
}

fn parents_of<'a>(m: &ModulePlan, sources: &'a [Source]) -> Result<Vec<Parent<'a>>> {
    if m.parents.len() != m.weights.len() {
        return Err(Error::config(
            "weights",
            format!("{} of them", m.weights.len()),
            format!("{}", m.parents.len()),
        ));
    }
    let pick = |(&i, &weight): (&usize, &f64)| {
        let source = sources.get(i).ok_or_else(|| {
            Error::config("parents", i, format!("below {}, the number of adapters", sources.len()))
        })?;
        let layer = source.adapter.layer(&m.name)?;
        Ok(Parent { name: &source.name, layer, weight, statistics: source.statistics.get(&m.name) })
    };
    m.parents.iter().zip(&m.weights).map(pick).collect()
}

/// Everything that can be wrong with a module, before any work.
fn check(k: &Kernels, module: &str, parents: &[Parent<'_>], spec: &Spec) -> Result<()> {
    let method = spec.method;
    let (fewest, most) = method.parents;
    if parents.len() < fewest || parents.len() > most {
        let want = if fewest == most { format!("exactly {fewest}") } else { format!("at least {fewest}") };
        let got = format!("{} (module {module})", parents.len());
        return Err(Error::config("adapters", got, format!("{want} for {:?}", method.name)));
    }
    let shape = |p: &Parent<'_>| (p.layer.in_features(), p.layer.out_features());
    for p in &parents[1..] {
        if shape(p) != shape(&parents[0]) {
            let show = |p: &Parent<'_>| format!("in {}, out {} in {}", shape(p).0, shape(p).1, p.name);
            return Err(Error::shape(format!("module {module}"), show(p), show(&parents[0])));
        }
    }
    for p in parents {
        if !p.weight.is_finite() {
            return Err(Error::config(format!("weights[{:?}]", p.name), p.weight, "a finite number"));
        }
        if !(finite_factor(k, &p.layer.a) && finite_factor(k, &p.layer.b)) {
            return Err(Error::NonFinite {
                arg: format!("adapter {:?}", p.name),
                detail: format!(" in module {module}"),
            });
        }
    }
    let relative = spec.normalize || method.laws.contains(&"weights_ratio");
    let (sum, size) = parents.iter().fold((0.0, 0.0), |(s, a), p| (s + p.weight, a + p.weight.abs()));
    if relative && !(f64::abs(sum) > 1e-12 * size) {
        let got = format!("a sum of {sum} (module {module})");
        return Err(Error::config(
            "weights",
            got,
            "a sum that is not zero, because they count relative to it",
        ));
    }
    Ok(())
}

fn finite_factor(k: &Kernels, f: &Factor) -> bool {
    if f.dtype() == Dtype::F32 { k.all_finite(f.stream()) } else { f.is_finite() }
}

/// The dtype of the result: as asked, else the widest of the parents; f16 with bf16 gives f32.
fn dtype_of(spec: &Spec, layers: &[&Layer]) -> Dtype {
    spec.dtype.unwrap_or_else(|| widest(layers))
}

/// The one dtype of all factors, or f32.
fn widest(layers: &[&Layer]) -> Dtype {
    let mut all = layers.iter().flat_map(|l| [l.a.dtype(), l.b.dtype()]);
    let first = all.next().unwrap_or(Dtype::F32);
    if all.all(|d| d == first) { first } else { Dtype::F32 }
}

/// A result that leaves its dtype's range is refused.
fn finite(a: &Factor, b: &Factor) -> Result<()> {
    if a.is_finite() && b.is_finite() {
        return Ok(());
    }
    Err(Error::config("dtype", a.dtype(), "one whose range holds the merged factors, such as f32"))
}
