//! What PEFT 0.21.2 `add_weighted_adapter` gives, defects included, for those who must reproduce it.
//!
//! Written from its documented behaviour and checked against the package. Half of its types work on A and B
//! apart from each other, which is no operation on the delta: cross terms, and another result for the same
//! adapter in another gauge. What applies is named in the report.

mod factors;

use super::element;
use super::factor::layer_of_shape;
use super::method::{DefaultWeights, Family, Method, Run};
use super::report::{ModuleReport, Seen};
use super::spec::{Parent, Spec};
use crate::algebra::{Factors, Grams, Stack};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;

pub(crate) use factors::Op;

const PAPER: &str = "PEFT 0.21.2, add_weighted_adapter";

const fn row(
    name: &'static str,
    formula: &'static str,
    laws: &'static [&'static str],
    params: &'static [(&'static str, f64)],
    run: Run,
) -> Method {
    let when = "only to reproduce what PEFT gives";
    let weights = DefaultWeights::One;
    Method {
        name,
        family: Family::Factor,
        formula,
        paper: PAPER,
        when,
        laws,
        params,
        weights,
        parents: (1, usize::MAX),
        run,
    }
}

const fn streamed(
    name: &'static str,
    formula: &'static str,
    params: &'static [(&'static str, f64)],
    run: Run,
) -> Method {
    Method { family: Family::Element, ..row(name, formula, &["permutation", "gauge"], params, run) }
}

const PRUNE: &[(&str, f64)] = &[("density", 0.5)];
const SIGNS: &[(&str, f64)] = &[("density", 0.5), ("majority", 0.0)];
const RANDOM: &[(&str, f64)] = &[("density", 0.5), ("seed", 0.0)];
const RANDOM_SIGNS: &[(&str, f64)] = &[("density", 0.5), ("majority", 0.0), ("seed", 0.0)];
const SUM: &[&str] = &["identity", "permutation", "scale", "weights_linear", "additive", "gauge"];

/// Its combination types that work on factors or on the sum of the deltas.
pub static METHODS: &[Method] = &[
    row(
        "linear",
        "A = sum sgn(w_i s_i) |w_i s_i|^.5 A_i, B = sum |w_i s_i|^.5 B_i",
        &["permutation"],
        &[],
        Run::Peft(Op::Sum),
    ),
    row("cat", "sum w_i D_i, all rows", SUM, &[], Run::Mix(super::factor::linear::mix)),
    row("svd", "sum w_i D_i, truncated", SUM, &[], Run::Mix(super::factor::linear::mix)),
    row("ties", "TIES on {A_i} and on {B_i}", &["permutation"], SIGNS, Run::Peft(Op::Ties)),
    row("dare_linear", "DARE on {A_i} and on {B_i}", &["permutation"], RANDOM, Run::Peft(Op::DareLinear)),
    row(
        "dare_ties",
        "DARE and TIES' signs on {A_i} and on {B_i}",
        &["permutation"],
        RANDOM_SIGNS,
        Run::Peft(Op::DareTies),
    ),
    streamed(
        "ties_svd",
        "TIES on {D_i}, signs unweighted, divided by the count",
        SIGNS,
        Run::Element(element::ties::prepare),
    ),
    streamed("dare_linear_svd", "DARE on {D_i}", RANDOM, Run::Element(element::dare::prepare)),
    streamed(
        "dare_ties_svd",
        "DARE and TIES' signs on {D_i}",
        RANDOM_SIGNS,
        Run::Element(element::dare::prepare_ties),
    ),
    streamed(
        "magnitude_prune_svd",
        "largest entries of {D_i}, summed",
        PRUNE,
        Run::Element(element::prune::prepare),
    ),
    row(
        "magnitude_prune",
        "largest entries of {A_i} and of {B_i}, summed",
        &["permutation"],
        PRUNE,
        Run::Peft(Op::Prune),
    ),
];

/// Merges one module on its factors.
pub(crate) fn merge(
    k: &Kernels,
    module: &str,
    parents: &[Parent<'_>],
    spec: &Spec,
    op: Op,
) -> Result<(Layer, ModuleReport)> {
    let rank = parents[0].layer.rank();
    if let Some(other) = parents.iter().find(|p| p.layer.rank() != rank) {
        let got = format!("{} in {}", other.layer.rank(), other.name);
        let want =
            format!("{rank} as in {}: PEFT combines factors of one rank (module {module})", parents[0].name);
        return Err(Error::config("rank", got, want));
    }
    if let Some(asked) = spec.rank.filter(|r| *r != rank) {
        return Err(Error::config(
            "rank",
            asked,
            format!("{rank}: this type of PEFT keeps the parents' rank"),
        ));
    }
    let layers: Vec<&Layer> = parents.iter().map(|p| p.layer).collect();
    let (stack, groups) = Stack::of(&layers, &vec![1.0; layers.len()])?;
    let grams = Grams::of(k, &stack);
    let products = grams.products(&stack.coef, &groups);
    let (a, b) = factors::combine(&stack, &groups, parents, module, spec, op);
    let made = Stack { n_in: stack.n_in, n_out: stack.n_out, a, b, coef: vec![1.0; rank] };
    let own = Grams::of(k, &made);
    let norm2 = own.inner(&made.coef, &(0..rank), &(0..rank)).max(0.0);
    let empty = || nalgebra::DMatrix::zeros(0, 0);
    let made = Factors {
        rank,
        a: made.a,
        b: made.b,
        values: Vec::new(),
        norm2,
        kept2: norm2,
        mix_a: empty(),
        mix_b: empty(),
    };
    let seen = Seen { stack: &stack, grams: &grams, groups: &groups, products: &products };
    let mut report = seen.apart(k, parents, &made);
    report.bytes = 3 * stack.bytes() + 3 * grams.bytes();
    report.notes.push(
        "PEFT works on A and B apart: cross terms B_i A_j, and another gauge gives another result".into(),
    );
    let layer = layer_of_shape(made, (stack.n_in, stack.n_out), rank, super::dtype_of(spec, &layers))?;
    Ok((layer, report))
}

/// PEFT copies the first adapter's configuration: with rsLoRA its result counts `sqrt(rank)` times.
pub(crate) fn as_configured(
    layer: Layer,
    parents: &[Parent<'_>],
    report: &mut ModuleReport,
) -> Result<Layer> {
    if !parents[0].layer.rslora {
        return Ok(layer);
    }
    let rank = layer.rank() as f64;
    report.notes.push(format!(
        "PEFT keeps use_rslora of {}: the result is {:.3} times too strong",
        parents[0].name,
        rank.sqrt()
    ));
    let alpha = layer.exact_scaling() * rank;
    Ok(Layer { alpha, rslora: true, ..layer })
}
