//! The one table of merge methods: a method is one file and one row here.

use super::element::{Prepare, breadcrumbs, dare, della, fisher, prune, sce, ties};
use super::factor::{average, karcher, linear, model_stock, multislerp, nuslerp, slerp};
use super::peft;
use super::spec::Semantics;
use crate::error::{Error, Result};

use super::factor::Pieces;

/// How a method works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// In factor space, exact up to the rank asked for.
    Factor,
    /// Entry by entry on the streamed delta, then a randomised SVD.
    Element,
}

impl Family {
    /// Name for tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Family::Factor => "factor space",
            Family::Element => "element-wise",
        }
    }
}

/// Weights where none are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DefaultWeights {
    /// The method takes no weights.
    None,
    /// One over the number of parents.
    Equal,
    /// One each.
    One,
}

impl DefaultWeights {
    /// Name for tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            DefaultWeights::None => "none",
            DefaultWeights::Equal => "equal",
            DefaultWeights::One => "one",
        }
    }
}

/// What does the work.
#[derive(Clone, Copy)]
pub(crate) enum Run {
    /// Coefficients of the parents' deltas, from their inner products.
    Mix(fn(&Pieces<'_>) -> Result<Vec<f64>>),
    /// RegMean: the parents' A are changed first.
    RegMean,
    /// Blocks of the deltas.
    Element(Prepare),
    /// PEFT's operators on A and B apart.
    Peft(peft::Op),
}

/// A row of the table.
pub struct Method {
    /// Name that `method=` takes.
    pub name: &'static str,
    /// How it works.
    pub family: Family,
    /// Formula on the deltas `D_i`, plain text.
    pub formula: &'static str,
    /// Where it comes from.
    pub paper: &'static str,
    /// When to use it.
    pub when: &'static str,
    /// Laws it obeys before truncation; the tests check exactly these.
    pub laws: &'static [&'static str],
    /// Parameters with their defaults; a flag is 0 or 1, `majority` 0 for "total".
    pub params: &'static [(&'static str, f64)],
    /// Weights where none are given.
    pub weights: DefaultWeights,
    /// Fewest and most parents.
    pub parents: (usize, usize),
    pub(crate) run: Run,
}

impl std::fmt::Debug for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Method({})", self.name)
    }
}

impl Method {
    /// A parameter's default, none where the method does not take it.
    pub fn default(&self, name: &str) -> Option<f64> {
        self.params.iter().find_map(|(n, v)| (*n == name).then_some(*v))
    }
}

const ANY: (usize, usize) = (1, usize::MAX);
const TWO: (usize, usize) = (2, 2);
const LAM: (&str, f64) = ("lam", 1.0);

/// Every method with exact semantics.
pub static METHODS: &[Method] = &[
    Method {
        name: "average",
        family: Family::Factor,
        formula: "sum D_i / m",
        paper: "Model soups, arXiv 2203.05482",
        when: "adapters of one task trained from different seeds",
        laws: &["identity", "idempotent", "permutation", "scale", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::None,
        parents: ANY,
        run: Run::Mix(average::mix),
    },
    Method {
        name: "weighted",
        family: Family::Factor,
        formula: "sum w_i D_i / sum w_i",
        paper: "Model soups, arXiv 2203.05482",
        when: "an average where some parents count more",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Mix(linear::weighted),
    },
    Method {
        name: "linear",
        family: Family::Factor,
        formula: "sum w_i D_i",
        paper: "Model soups, arXiv 2203.05482",
        when: "weights as they are; what PEFT means by linear, without its cross terms",
        laws: &["permutation", "scale", "weights_linear", "additive", "gauge"],
        params: &[LAM, ("normalize", 0.0)],
        weights: DefaultWeights::Equal,
        parents: ANY,
        run: Run::Mix(linear::mix),
    },
    Method {
        name: "task_arithmetic",
        family: Family::Factor,
        formula: "lam sum w_i D_i",
        paper: "Task arithmetic, arXiv 2212.04089",
        when: "adding skills, or taking one away with a negative weight",
        laws: &["identity", "permutation", "scale", "weights_linear", "additive", "gauge"],
        params: &[LAM, ("normalize", 0.0)],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Mix(linear::mix),
    },
    Method {
        name: "cat",
        family: Family::Factor,
        formula: "sum w_i D_i, never truncated",
        paper: "PEFT's cat",
        when: "the exact sum, whatever its rank",
        laws: &["identity", "permutation", "scale", "weights_linear", "additive", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Mix(linear::mix),
    },
    Method {
        name: "slerp",
        family: Family::Factor,
        formula: "sin((1-t)O)/sin O D_1 + sin(tO)/sin O D_2, cos O = <D_1, D_2> / |D_1||D_2|",
        paper: "Shoemake, Animating rotation with quaternion curves, 1985",
        when: "two adapters of one task; keeps the norm where lerp shrinks it",
        laws: &["idempotent", "scale", "endpoints", "gauge"],
        params: &[LAM, ("t", 0.5)],
        weights: DefaultWeights::None,
        parents: TWO,
        run: Run::Mix(slerp::mix),
    },
    Method {
        name: "nuslerp",
        family: Family::Factor,
        formula: "slerp of directions at t = w_2 / (w_1 + w_2), times (1-t)|D_1| + t|D_2|",
        paper: "mergekit documentation (NuSLERP)",
        when: "slerp with weights, and with magnitudes that differ",
        laws: &["idempotent", "permutation", "scale", "weights_ratio", "endpoints", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::One,
        parents: TWO,
        run: Run::Mix(nuslerp::mix),
    },
    Method {
        name: "multislerp",
        family: Family::Factor,
        formula: "exp_mu(sum w_i log_mu(u_i)) sum w_i |D_i|, u_i = D_i / |D_i|, mu ~ sum w_i u_i",
        paper: "Multi-SLERP, mergekit documentation; barycentric weights on the sphere",
        when: "slerp of more than two",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Mix(multislerp::mix),
    },
    Method {
        name: "karcher",
        family: Family::Factor,
        formula: "Riemannian mean of the directions on the sphere, times the mean norm",
        paper: "Karcher mean, arXiv 2603.04972",
        when: "the centre of several adapters of one task, without shrinking",
        laws: &["identity", "idempotent", "permutation", "scale", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::None,
        parents: ANY,
        run: Run::Mix(karcher::mix),
    },
    Method {
        name: "model_stock",
        family: Family::Factor,
        formula: "m c / (1 + (m-1) c) mean(D), c the mean cosine of pairs",
        paper: "Model Stock, arXiv 2403.19522",
        when: "few adapters of one task: the less they agree, the nearer to the base",
        laws: &["idempotent", "permutation", "scale", "gauge"],
        params: &[LAM],
        weights: DefaultWeights::None,
        parents: (2, usize::MAX),
        run: Run::Mix(model_stock::mix),
    },
    Method {
        name: "regmean",
        family: Family::Factor,
        formula: "(sum w_i D_i G_i) (sum w_i G_i)^-1, G_i = rho E[x^T x] + (1-rho) diag",
        paper: "RegMean, arXiv 2212.09849",
        when: "different tasks, with Grams of their inputs: the best merge measured here",
        laws: &[
            "identity",
            "idempotent",
            "permutation",
            "scale",
            "weights_ratio",
            "equal_statistics",
            "gauge",
        ],
        params: &[LAM, ("rho", 0.9)],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::RegMean,
    },
    Method {
        name: "ties",
        family: Family::Element,
        formula: "t_i = top density of D_i by magnitude; sign of sum w_i t_i; sum w_i t_i m_i / sum w_i m_i over those with that sign",
        paper: "TIES-Merging, arXiv 2306.01708",
        when: "different tasks whose changes disagree in sign",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[LAM, ("density", 0.2), ("majority", 0.0), ("normalize", 1.0)],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Element(ties::prepare),
    },
    Method {
        name: "dare_linear",
        family: Family::Element,
        formula: "sum w_i D_i b_i / density, b_i ~ Bernoulli(density) per entry",
        paper: "DARE, arXiv 2311.03099",
        when: "many adapters at once; the mean over seeds is the weighted sum",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_linear", "gauge"],
        params: &[LAM, ("density", 0.5), ("normalize", 0.0), ("seed", 0.0)],
        weights: DefaultWeights::Equal,
        parents: ANY,
        run: Run::Element(dare::prepare),
    },
    Method {
        name: "dare_ties",
        family: Family::Element,
        formula: "t_i = D_i b_i / density, then the election and mean of ties",
        paper: "DARE, arXiv 2311.03099",
        when: "as dare_linear, where signs disagree",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[LAM, ("density", 0.5), ("majority", 0.0), ("normalize", 1.0), ("seed", 0.0)],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Element(dare::prepare_ties),
    },
    Method {
        name: "della",
        family: Family::Element,
        formula: "t_i = D_i b_i / p, p rising with the rank of |D_i| in its row over density -+ epsilon/2; then ties' election and mean",
        paper: "DELLA-Merging, arXiv 2406.11617",
        when: "as dare_ties, but large entries stay more often",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[
            LAM,
            ("density", 0.5),
            ("epsilon", 0.2),
            ("majority", 0.0),
            ("normalize", 1.0),
            ("seed", 0.0),
        ],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Element(della::prepare),
    },
    Method {
        name: "della_linear",
        family: Family::Element,
        formula: "sum w_i t_i, t_i as in della",
        paper: "DELLA-Merging, arXiv 2406.11617",
        when: "as dare_linear, but large entries stay more often",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_linear", "gauge"],
        params: &[LAM, ("density", 0.5), ("epsilon", 0.2), ("normalize", 0.0), ("seed", 0.0)],
        weights: DefaultWeights::Equal,
        parents: ANY,
        run: Run::Element(della::prepare_linear),
    },
    Method {
        name: "breadcrumbs",
        family: Family::Element,
        formula: "t_i = D_i without its gamma largest entries, then its top density; sum w_i t_i",
        paper: "Model Breadcrumbs, arXiv 2312.06795",
        when: "adapters with outliers",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_linear", "gauge"],
        params: &[LAM, ("density", 0.9), ("gamma", 0.01), ("normalize", 0.0)],
        weights: DefaultWeights::Equal,
        parents: ANY,
        run: Run::Element(breadcrumbs::prepare),
    },
    Method {
        name: "breadcrumbs_ties",
        family: Family::Element,
        formula: "t_i as in breadcrumbs, then the election and mean of ties",
        paper: "Model Breadcrumbs, arXiv 2312.06795",
        when: "as breadcrumbs, where signs disagree",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_ratio", "gauge"],
        params: &[LAM, ("density", 0.9), ("gamma", 0.01), ("majority", 0.0), ("normalize", 1.0)],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Element(breadcrumbs::prepare_ties),
    },
    Method {
        name: "magnitude_prune",
        family: Family::Element,
        formula: "t_i = top density of D_i by magnitude; sum w_i t_i",
        paper: "PEFT's magnitude_prune",
        when: "a weighted sum of what matters most in each",
        laws: &["identity", "idempotent", "permutation", "scale", "weights_linear", "gauge"],
        params: &[LAM, ("density", 0.5), ("normalize", 0.0)],
        weights: DefaultWeights::Equal,
        parents: ANY,
        run: Run::Element(prune::prepare),
    },
    Method {
        name: "sce",
        family: Family::Element,
        formula: "t_i = D_i where the variance over parents is in the top density; e_i = |t_i|^2 / sum |t_j|^2; sum e_i t_i over those with the sign of sum t_i",
        paper: "FuseChat, arXiv 2408.07990",
        when: "different tasks, without weights to choose",
        laws: &["identity", "idempotent", "permutation", "scale", "gauge"],
        params: &[LAM, ("density", 0.1)],
        weights: DefaultWeights::None,
        parents: ANY,
        run: Run::Element(sce::prepare),
    },
    Method {
        name: "fisher",
        family: Family::Element,
        formula: "sum w_i F_i D_i / sum w_i F_i, F_i = c_i a_i^T from the squares of inputs and gradients, mean 1",
        paper: "Fisher-weighted averaging, arXiv 2111.09832",
        when: "different tasks, with statistics of each",
        laws: &[
            "identity",
            "idempotent",
            "permutation",
            "scale",
            "weights_ratio",
            "equal_statistics",
            "gauge",
        ],
        params: &[LAM],
        weights: DefaultWeights::One,
        parents: ANY,
        run: Run::Element(fisher::prepare),
    },
];

/// Other names of methods.
const ALIASES: &[(&str, &str)] = &[("dare", "dare_linear")];

/// The row of a method's name.
///
/// # Errors
/// An unknown name.
pub fn find(name: &str, semantics: Semantics) -> Result<&'static Method> {
    let table = if semantics == Semantics::Peft { peft::METHODS } else { METHODS };
    let name = ALIASES.iter().find_map(|(a, n)| (*a == name).then_some(*n)).unwrap_or(name);
    table.iter().find(|m| m.name == name).ok_or_else(|| {
        let names: Vec<&str> = table.iter().map(|m| m.name).collect();
        Error::config("method", format!("{name:?}"), format!("one of {}", names.join(", ")))
    })
}
