//! Exact combinations that are no merge methods: sums of adapters with signs, and one adapter after another.

use std::sync::Arc;

use nalgebra::DMatrix;

use super::factor::concatenated;
use super::spec::Parent;
use super::store::store;
use super::{finite_factor, widest};
use crate::adapter::Adapter;
use crate::algebra::Factors;
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;

/// `sum c_i D_i` over all modules of any of them; a module that an adapter lacks counts as zero.
///
/// # Errors
/// Nothing to sum, factors that are not finite, shapes that differ (named).
pub fn combine(k: &Kernels, terms: &[(&Adapter, f64)]) -> Result<Adapter> {
    check(k, &terms.iter().map(|t| t.0).collect::<Vec<_>>())?;
    if let Some((_, c)) = terms.iter().find(|(_, c)| !c.is_finite()) {
        return Err(Error::config("factor", c, "a finite number"));
    }
    if let &[(adapter, c)] = terms {
        let modules = adapter.modules.iter().map(|(n, l)| Ok((n.clone(), Arc::new(scaled(l, c)?))));
        return Ok(Adapter { modules: modules.collect::<Result<_>>()?, ..Adapter::default() });
    }
    let mut modules = Vec::new();
    for name in names(terms.iter().map(|t| t.0)) {
        let mut parents = Vec::new();
        for (adapter, c) in terms {
            if let Ok(layer) = adapter.layer(&name) {
                parents.push(Parent { name: "", layer, weight: *c, statistics: None });
            }
        }
        let layers: Vec<&Layer> = parents.iter().map(|p| p.layer).collect();
        let shape = |l: &Layer| format!("in {}, out {}", l.in_features(), l.out_features());
        if let Some(other) = layers.iter().find(|l| shape(l) != shape(layers[0])) {
            return Err(Error::shape(format!("module {name}"), shape(other), shape(layers[0])));
        }
        let (stack, groups) = super::Stack::of(&layers, &vec![1.0; layers.len()])?;
        let coefficients: Vec<f64> = parents.iter().map(|p| p.weight).collect();
        let rank = stack.rank();
        let layer = concatenated(k, &parents, &groups, &coefficients, &stack, widest(&layers), rank)?.layer;
        modules.push((name, Arc::new(layer)));
    }
    Ok(Adapter { modules, ..Adapter::default() })
}

/// The layer times a number: the size in alpha, the sign in B.
fn scaled(layer: &Layer, c: f64) -> Result<Layer> {
    if c == 0.0 {
        let zeros = Factor::zeros(layer.rank(), layer.out_features(), layer.b.dtype());
        return Ok(Layer { b: zeros.into(), ..layer.clone() });
    }
    let alpha = layer.alpha * c.abs();
    if !(alpha.is_finite() && alpha != 0.0 || layer.alpha == 0.0) {
        return Err(Error::config("factor", c, "one that leaves alpha a number of float64"));
    }
    let b = if c > 0.0 {
        Arc::clone(&layer.b)
    } else {
        let rows: Vec<f32> = layer.b.to_f32(false).iter().map(|v| -v).collect();
        Factor::from_rows(&rows, layer.rank(), layer.out_features(), layer.b.dtype()).into()
    };
    Ok(Layer { a: Arc::clone(&layer.a), b, alpha, rslora: layer.rslora })
}

/// One adapter after another as one adapter.
///
/// With `residual` each sees x plus what the ones before it gave: `D_a + D_b + D_b D_a`, the sum of the ranks;
/// a module that one lacks is the others'. Without, each sees only what the one before it gave: `D_b D_a`, the
/// smaller rank; all must have the same modules.
///
/// # Errors
/// Shapes that do not follow one another (module named), modules that differ where they must not.
pub fn sequential(k: &Kernels, adapters: &[&Adapter], residual: bool) -> Result<Adapter> {
    check(k, adapters)?;
    let mut modules = Vec::new();
    for name in names(adapters.iter().copied()) {
        let mut made: Option<Layer> = None;
        for (i, adapter) in adapters.iter().enumerate() {
            let Ok(layer) = adapter.layer(&name) else {
                if residual {
                    continue;
                }
                let want = format!(
                    "module {name}, which the others have: without residual nothing would come through"
                );
                return Err(Error::config("adapters", format!("number {i} without it"), want));
            };
            let next = layer.as_ref();
            if residual && next.in_features() != next.out_features() {
                let got = format!("in {}, out {}", next.in_features(), next.out_features());
                return Err(Error::shape(format!("module {name}"), got, "in = out, for x + a(x)"));
            }
            made = Some(match made {
                // One kind of scaling for all modules of the result.
                None if adapters.len() > 1 => {
                    Layer { alpha: next.exact_scaling() * next.rank() as f64, rslora: false, ..next.clone() }
                }
                None => next.clone(),
                Some(first) => after(k, &name, &first, next, residual)?,
            });
        }
        if let Some(layer) = made {
            modules.push((name, Arc::new(layer)));
        }
    }
    Ok(Adapter { modules, ..Adapter::default() })
}

fn after(k: &Kernels, name: &str, a: &Layer, b: &Layer, residual: bool) -> Result<Layer> {
    let (n_in, mid, n_out) = (a.in_features(), a.out_features(), b.out_features());
    if mid != b.in_features() {
        let want = format!("in {mid}, what the one before it gives");
        return Err(Error::shape(format!("module {name}"), format!("in {}", b.in_features()), want));
    }
    let (ra, rb) = (a.rank(), b.rank());
    let (a_a, a_b, b_a, b_b) = (a.a.to_f32(false), a.b.to_f32(false), b.a.to_f32(false), b.b.to_f32(false));
    let (sa, sb) = (a.exact_scaling(), b.exact_scaling());
    // What a writes against what b reads, (ra, rb) row-major.
    let mut cross = vec![0.0; ra * rb];
    k.products_of_rows(&a_b, &b_a, mid, &mut cross);
    let (rows_a, rows_b, rank) = if residual {
        let rank = ra + rb;
        let mut coef = vec![0.0; rank * rank];
        for i in 0..ra {
            coef[i * rank + i] = sa;
            for j in 0..rb {
                coef[i * rank + ra + j] = sa * sb * cross[i * rb + j];
            }
        }
        for j in 0..rb {
            coef[(ra + j) * rank + ra + j] = sb;
        }
        let mut out = vec![0.0; rank * n_out];
        k.mix_rows(&coef, &[a_b, b_b].concat(), n_out, &mut out);
        ([a_a, b_a].concat(), out, rank)
    } else if ra <= rb {
        let coef: Vec<f64> = cross.iter().map(|c| c * sa * sb).collect();
        let mut out = vec![0.0; ra * n_out];
        k.mix_rows(&coef, &b_b, n_out, &mut out);
        (a_a, out, ra)
    } else {
        let coef: Vec<f64> = (0..ra * rb).map(|i| cross[i % ra * rb + i / ra] * sa * sb).collect();
        let mut out = vec![0.0; rb * n_in];
        k.mix_rows(&coef, &a_a, n_in, &mut out);
        (out, b_b, rb)
    };
    let none = || DMatrix::zeros(0, 0);
    let made = Factors {
        rank,
        a: rows_a,
        b: rows_b,
        values: Vec::new(),
        norm2: 0.0,
        kept2: 0.0,
        mix_a: none(),
        mix_b: none(),
    };
    Ok(store(k, made, (n_in, n_out), rank, widest(&[a, b]))?.layer)
}

fn names<'a>(adapters: impl Iterator<Item = &'a Adapter>) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for (name, _) in adapters.flat_map(|a| &a.modules) {
        if !out.contains(name) {
            out.push(name.clone());
        }
    }
    out
}

fn check(k: &Kernels, adapters: &[&Adapter]) -> Result<()> {
    if adapters.is_empty() {
        return Err(Error::config("adapters", "none", "at least one"));
    }
    for (i, adapter) in adapters.iter().enumerate() {
        for (name, layer) in &adapter.modules {
            if !(finite_factor(k, &layer.a) && finite_factor(k, &layer.b)) {
                let arg = format!("adapter {i}");
                return Err(Error::NonFinite { arg, detail: format!(" in module {name}") });
            }
        }
    }
    Ok(())
}
