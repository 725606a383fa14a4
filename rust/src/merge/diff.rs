//! How far two adapters are apart, module by module.

use serde::Serialize;

use super::finite_factor;
use super::report::cosine;
use crate::adapter::Adapter;
use crate::algebra::{Grams, Stack, principal_angles};
use crate::error::{Error, Result};
use crate::kernels::Kernels;

/// One module of both.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleDiff {
    /// Module name.
    pub name: String,
    /// Cosine of the deltas; none where one is zero.
    pub cosine: Option<f64>,
    /// `|D_a|` (Frobenius).
    pub norm_a: f64,
    /// `|D_b|`.
    pub norm_b: f64,
    /// `|D_a - D_b|`.
    pub norm_diff: f64,
    /// Principal angles of the row spaces (what the deltas read), radians, smallest first.
    pub angles_in: Vec<f64>,
    /// Principal angles of the column spaces (what they write).
    pub angles_out: Vec<f64>,
}

/// Two adapters against each other.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Diff {
    /// Modules that both have.
    pub modules: Vec<ModuleDiff>,
    /// Modules of the first alone.
    pub only_a: Vec<String>,
    /// Modules of the second alone.
    pub only_b: Vec<String>,
}

/// Compares all modules.
///
/// # Errors
/// No common modules, shapes that differ (named), NaN in one (named).
pub fn diff(k: &Kernels, a: &Adapter, b: &Adapter) -> Result<Diff> {
    let lacks = |of: &Adapter, other: &Adapter| {
        let names = of.modules.iter().map(|(n, _)| n);
        names.filter(|n| other.layer(n).is_err()).cloned().collect::<Vec<_>>()
    };
    let mut out = Diff { modules: Vec::new(), only_a: lacks(a, b), only_b: lacks(b, a) };
    for (arg, adapter) in [("a", a), ("b", b)] {
        for (name, layer) in &adapter.modules {
            if !(finite_factor(k, &layer.a) && finite_factor(k, &layer.b)) {
                return Err(Error::NonFinite { arg: arg.into(), detail: format!(" in module {name}") });
            }
        }
    }
    for (name, x) in a.modules.iter().filter(|(n, _)| b.layer(n).is_ok()) {
        let y = b.layer(name)?;
        let shape = |l: &crate::layer::Layer| format!("in {}, out {}", l.in_features(), l.out_features());
        if shape(x) != shape(y) {
            return Err(Error::shape(format!("b, module {name}"), shape(y), shape(x)));
        }
        let (stack, groups) = Stack::of(&[x, y], &[1.0, 1.0])?;
        let products = Grams::of(k, &stack).products(&stack.coef, &groups);
        let norm = |i: usize| products[(i, i)].max(0.0).sqrt();
        // Equal adapters must be 0 apart, not the root of rounding: the difference is measured by itself.
        let apart =
            crate::algebra::refactor(k, &Stack::of(&[x, y], &[1.0, -1.0])?.0, crate::algebra::Keep::Rank(1))?;
        let split = |rows: &[f32], n: usize| {
            let (one, two) = rows.split_at(groups[1].start * n);
            principal_angles(one, two, n).radians
        };
        out.modules.push(ModuleDiff {
            name: name.clone(),
            cosine: cosine(&products, 0, 1),
            norm_a: norm(0),
            norm_b: norm(1),
            norm_diff: apart.norm2.max(0.0).sqrt(),
            angles_in: split(&stack.a, stack.n_in),
            angles_out: split(&stack.b, stack.n_out),
        });
    }
    if out.modules.is_empty() {
        let names = |a: &Adapter| a.modules.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Error::config("b", names(b), format!("a module in common with a ({})", names(a))));
    }
    Ok(out)
}
