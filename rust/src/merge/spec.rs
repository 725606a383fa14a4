//! What to do with one module, and with which parents.

use serde::Deserialize;

use super::method::Method;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::layer::Layer;

/// Whose definition of a method's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Semantics {
    /// The paper, on the delta.
    #[default]
    Exact,
    /// PEFT 0.21.2, on the factors where it works on factors.
    Peft,
    /// mergekit's weighting, on the delta.
    Mergekit,
}

impl Semantics {
    /// The name that `semantics=` takes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Semantics::Exact => "exact",
            Semantics::Peft => "peft",
            Semantics::Mergekit => "mergekit",
        }
    }
}

/// How signs are elected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Majority {
    /// By the sum of the values.
    #[default]
    Total,
    /// By the sum of their signs.
    Frequency,
}

/// One module of a plan, as JSON brings it. Parameters that its method does not take are absent.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModulePlan {
    /// Module name.
    pub name: String,
    /// Parents that take part, by position.
    pub parents: Vec<usize>,
    /// One weight per parent that takes part.
    pub weights: Vec<f64>,
    /// Name of the method.
    pub method: String,
    /// Share of entries kept.
    pub density: Option<f64>,
    /// Width of della's band of probabilities.
    pub epsilon: Option<f64>,
    /// Share of the largest entries that breadcrumbs drops.
    pub gamma: Option<f64>,
    /// Where between two parents.
    pub t: Option<f64>,
    /// Weight of the Gram matrix beside its diagonal.
    pub rho: Option<f64>,
    /// Factor on the result.
    pub lam: Option<f64>,
    /// Whether weights count relative to their sum.
    pub normalize: Option<bool>,
    /// How signs are elected.
    pub majority: Option<Majority>,
    /// Rank of the result; none for the method's default.
    pub rank: Option<usize>,
    /// Of random masks and of the sketch.
    pub seed: Option<u64>,
}

/// A whole merge.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Whose definitions.
    #[serde(default)]
    pub semantics: Semantics,
    /// Stored dtype; none for the widest of the parents.
    pub dtype: Option<String>,
    /// Whether the report tells what only a streamed delta shows.
    #[serde(default)]
    pub full: bool,
    /// Module by module, in the order of the result.
    pub modules: Vec<ModulePlan>,
}

/// A checked [`ModulePlan`] with every default filled in.
#[derive(Clone, Debug)]
pub struct Spec {
    /// The method's row.
    pub method: &'static Method,
    /// Share of entries kept, in (0, 1].
    pub density: f64,
    /// Width of della's band of probabilities.
    pub epsilon: f64,
    /// Share of the largest entries that breadcrumbs drops.
    pub gamma: f64,
    /// Where between two parents, in [0, 1].
    pub t: f64,
    /// Weight of the Gram matrix beside its diagonal, in [0, 1].
    pub rho: f64,
    /// Factor on the result.
    pub lam: f64,
    /// Whether weights count relative to their sum.
    pub normalize: bool,
    /// How signs are elected.
    pub majority: Majority,
    /// Whose definitions.
    pub semantics: Semantics,
    /// Rank of the result; none for the method's default.
    pub rank: Option<usize>,
    /// Of random masks and of the sketch.
    pub seed: u64,
    /// Stored dtype; none for the widest of the parents.
    pub dtype: Option<Dtype>,
    /// Whether the report tells what only a streamed delta shows.
    pub full: bool,
}

/// The inputs' second moments `G` of one module.
#[derive(Clone, Debug)]
pub enum Gram {
    /// The matrix, (d, d) row-major.
    Dense(Vec<f32>),
    /// The exact diagonal (d,), and a part (q, d) whose `low^T low` is what lies beside it.
    Low {
        /// Diagonal.
        diag: Vec<f32>,
        /// Rows of the low-rank part.
        low: Vec<f32>,
    },
}

/// What one parent knows of the data that one of its modules saw.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Second moments of the inputs.
    pub gram: Option<Gram>,
    /// Mean squares of inputs (in,) and of output gradients (out,).
    pub importance: Option<(Vec<f32>, Vec<f32>)>,
}

/// One adapter's part in the merge of one module.
#[derive(Clone, Copy, Debug)]
pub struct Parent<'a> {
    /// Name; random masks hang on it.
    pub name: &'a str,
    /// Its factors.
    pub layer: &'a Layer,
    /// Its weight.
    pub weight: f64,
    /// What it knows of its data.
    pub statistics: Option<&'a Statistics>,
}

impl Spec {
    /// The spec of a module, every parameter inside its range.
    ///
    /// # Errors
    /// An unknown method, a parameter that the method does not take, a value out of range.
    pub fn new(m: &ModulePlan, plan: &Plan) -> Result<Self> {
        let method = super::method::find(&m.method, plan.semantics)?;
        let take = |name: &str, given: Option<f64>, lo: f64, hi: f64, open: bool| -> Result<f64> {
            let Some(default) = method.default(name) else {
                return match given {
                    // What the method does not know leaves its result as it is.
                    None => Ok(if name == "lam" || name == "density" { 1.0 } else { 0.0 }),
                    Some(v) => Err(not_taken(name, v, method.name)),
                };
            };
            let v = given.unwrap_or(default);
            let low = if open { v > lo } else { v >= lo };
            if low && v <= hi {
                return Ok(v);
            }
            let bracket = if open { '(' } else { '[' };
            Err(Error::config(name, v, format!("a number in {bracket}{lo}, {hi}] (module {})", m.name)))
        };
        let flag = |name: &str, given: bool| -> Result<()> {
            if given && method.default(name).is_none() {
                Err(not_taken(name, "a value", method.name))
            } else {
                Ok(())
            }
        };
        flag("normalize", m.normalize.is_some())?;
        flag("majority", m.majority.is_some())?;
        flag("seed", m.seed.is_some())?;
        let spec = Spec {
            density: take("density", m.density, 0.0, 1.0, true)?,
            epsilon: take("epsilon", m.epsilon, 0.0, 1.0, false)?,
            gamma: take("gamma", m.gamma, 0.0, 1.0, false)?,
            t: take("t", m.t, 0.0, 1.0, false)?,
            rho: take("rho", m.rho, 0.0, 1.0, false)?,
            lam: take("lam", m.lam, f64::MIN, f64::MAX, false)?,
            normalize: m.normalize.unwrap_or(method.default("normalize") == Some(1.0)),
            majority: m.majority.unwrap_or_default(),
            semantics: plan.semantics,
            rank: m.rank,
            seed: m.seed.unwrap_or(0),
            dtype: plan.dtype.as_deref().map(str::parse).transpose()?,
            full: plan.full,
            method,
        };
        if method.default("gamma").is_some() && spec.gamma + spec.density > 1.0 {
            let got = format!("{} with density {}", spec.gamma, spec.density);
            return Err(Error::config("gamma", got, "gamma + density at most 1"));
        }
        let band = if spec.semantics == Semantics::Mergekit { spec.epsilon } else { spec.epsilon / 2.0 };
        if method.default("epsilon").is_some() && (spec.density - band <= 0.0 || spec.density + band > 1.0) {
            let want = format!("a band inside (0, 1], density {} -+ {band}", spec.density);
            return Err(Error::config("epsilon", spec.epsilon, want));
        }
        if spec.rank == Some(0) {
            return Err(Error::config("rank", 0, "at least 1"));
        }
        Ok(spec)
    }
}

fn not_taken(name: &str, got: impl ToString, method: &str) -> Error {
    Error::config(name, got, format!("nothing: method {method:?} does not take it"))
}
