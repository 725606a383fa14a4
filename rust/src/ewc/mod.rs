//! Learning that lasts: penalties that hold an adapter near what earlier tasks needed.
//!
//! All penalties are in one unit: mean loss + `lambda/2 sum F d^2`, with F a mean over samples of squared
//! per-sample gradients. [`KINDS`] is the one table of what F can be and where it acts.

mod accumulator;
mod buffer;
mod consolidation;
mod delta;
mod factor;
pub mod fisher;
mod l2;
mod mas;
mod quadratic;
mod regularizer;
mod settings;
mod si;
mod state;

use std::fmt;

pub use crate::learn::Samples;
pub use consolidation::Ewc;
pub(crate) use consolidation::Observed;
pub use settings::{Anchors, EwcSettings, Fisher, Normalize, Step};

use crate::error::Result;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use accumulator::Accumulator;
use state::{Reader, Writer};

/// What is averaged over the samples of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistic {
    /// Nothing is needed (second moments of x and g are kept all the same).
    None,
    /// Second moments of x and g.
    Moments,
    /// Squares of per-sample gradients.
    Squares,
    /// Absolute values of per-sample gradients.
    Magnitudes,
}

impl Statistic {
    /// Whether sums as large as the factors are kept.
    const fn needs_factors(self) -> bool {
        matches!(self, Statistic::Squares | Statistic::Magnitudes)
    }
}

/// One kind of penalty.
pub struct KindRow {
    /// The public name.
    pub name: &'static str,
    /// Default strength in the canonical unit.
    pub lambda: f64,
    /// What is averaged over samples; with [`Statistic::None`] a task needs no samples.
    pub statistic: Statistic,
    /// Whether the implicit step is defined.
    pub proximal: bool,
    /// Whether it looks at every optimiser step.
    pub path: bool,
    make: fn(&Layer, &EwcSettings) -> Box<dyn Memory>,
}

/// Every kind; a new one is one file and one row here.
pub const KINDS: [KindRow; 5] = [delta::ROW, factor::ROW, l2::ROW, si::ROW, mas::ROW];

/// A row of [`KINDS`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kind(usize);

impl Kind {
    /// What the kind is.
    pub fn row(self) -> &'static KindRow {
        static ROWS: [KindRow; 5] = KINDS;
        &ROWS[self.0]
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().name)
    }
}

/// Importance that one task adds.
pub(crate) enum Importance {
    /// No sample was seen.
    Nothing,
    /// Of every weight, in the layouts of A and B.
    Factors([Factor; 2]),
    /// `s^2 a_i c_j` of the weight change.
    Moments { a: Vec<f64>, c: Vec<f64>, scale2: f64 },
}

impl Importance {
    fn max(&self) -> f64 {
        match self {
            Importance::Nothing => 0.0,
            Importance::Factors(f) => {
                f64::from(f.iter().flat_map(|f| f.stream()).fold(0.0f32, |m, v| m.max(*v)))
            }
            Importance::Moments { a, c, scale2 } => {
                let top = |v: &[f64]| v.iter().fold(0.0f64, |m, v| m.max(*v));
                scale2 * top(a) * top(c)
            }
        }
    }
}

/// How a task joins the earlier ones.
pub(crate) struct Boundary {
    /// Share of the earlier importance that stays.
    pub gamma: f64,
    /// One anchor, the latest.
    pub online: bool,
    /// The new importance stands for all tasks (moving average).
    pub replace: bool,
    /// What the task's importance is multiplied by, where it is normalised.
    pub scale: Option<f64>,
}

/// One optimiser step of one module: the loss's gradient without penalty, weights before and after.
pub(crate) struct Path<'a> {
    pub gradient: [&'a Factor; 2],
    pub before: [&'a Factor; 2],
    pub after: [&'a Factor; 2],
}

/// What a kind remembers of one module, and how it pulls.
pub(crate) trait Memory: fmt::Debug + Send {
    /// Whether there is an anchor.
    fn is_set(&self) -> bool;
    /// `ga, gb += lambda dOmega`.
    fn add_gradient(&mut self, k: &Kernels, lambda: f64, layer: &Layer, ga: &mut Factor, gb: &mut Factor);
    /// The penalty at lambda = 1.
    fn penalty(&mut self, k: &Kernels, layer: &Layer) -> f64;
    /// The implicit step with `c = lr lambda`.
    fn proximal(&self, _c: f64, _layer: &mut Layer) {}
    /// One optimiser step, for kinds that integrate a path.
    fn path(&mut self, _step: &Path<'_>) {}
    /// Importance of the task that ends.
    fn task(&self, seen: &Accumulator, layer: &Layer) -> Importance;
    /// Takes the task in and moves the anchor.
    fn consolidate(&mut self, task: Importance, layer: &Layer, at: &Boundary);
    /// The largest importance (an upper bound where several anchors are kept).
    fn max_importance(&self) -> f64;
    fn memory_bytes(&self) -> usize;
    fn save(&self, out: &mut Writer);
    fn load(&mut self, from: &mut Reader<'_>) -> Result<()>;
}
