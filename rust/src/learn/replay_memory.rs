//! Dark experience replay (DER++, Buzzega et al. 2020, arXiv 2004.07211): a uniform draw of the rows of earlier
//! tasks, each with what the adapter answered when its task ended.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::rng::Rng;

use super::batch::{BadRow, NOT_FINITE};
use super::train::{BLOCK, Data, Targets, Trainee, Workspace, check_data};

/// How much is remembered, and how strongly it acts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReplaySettings {
    /// Rows that are kept at most.
    pub capacity: usize,
    /// Weight of the mean loss of the replayed rows.
    pub label_weight: f64,
    /// Weight of the mean of `1/2 |y - stored|^2` over them.
    pub logit_weight: f64,
    /// Of what is kept and of what is drawn.
    pub seed: u64,
}

impl ReplaySettings {
    fn validate(self) -> Result<Self> {
        for (arg, v) in [("label_weight", self.label_weight), ("logit_weight", self.logit_weight)] {
            if !(v.is_finite() && (0.0..=1e6).contains(&v)) {
                return Err(Error::config(arg, v, "a number from 0 to 1e6"));
            }
        }
        Ok(self)
    }
}

/// The rows, slot by slot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Kept {
    /// Number of each row in the stream, from 0.
    pub places: Vec<u64>,
    /// Inputs, `(n, in)`.
    pub x: Vec<f32>,
    /// Wanted outputs less the frozen layer's, `(n, out)`; empty where there are labels.
    pub targets: Vec<f32>,
    /// Classes, `(n,)`; empty where there are targets.
    pub labels: Vec<i64>,
    /// What the adapter answered, `(n, out)`; of several modules side by side.
    pub outputs: Vec<f32>,
    /// Weight of each row's loss.
    pub weights: Vec<f32>,
    /// The modules that answered; none for a chain.
    pub modules: Vec<String>,
}

impl Kept {
    /// How many there are.
    pub fn rows(&self) -> usize {
        self.places.len()
    }

    /// Width of the inputs.
    pub fn in_features(&self) -> usize {
        self.x.len() / self.rows().max(1)
    }

    /// Refuses data, or what trains on them, that cannot stand beside these rows.
    fn check(&self, trainee: &dyn Trainee, data: &Data<'_>) -> Result<()> {
        let n = self.rows();
        if n == 0 {
            return Ok(());
        }
        let (kind, width) = match data.y {
            Targets::Values(y) => ("targets", y.len() / data.rows),
            Targets::Labels(_) => ("labels", 0),
        };
        let now = (data.x.len() / data.rows, kind, width, trainee.modules());
        let labels = !self.labels.is_empty();
        let kind = if labels { "labels" } else { "targets" };
        let then = (self.in_features(), kind, self.targets.len() / n, self.modules.clone());
        if now == then {
            return Ok(());
        }
        let show = |(n_in, kind, n_out, modules): (usize, &str, usize, Vec<String>)| {
            let out = if n_out > 0 { format!(" {n_out} wide") } else { String::new() };
            let of = if modules.is_empty() { String::new() } else { format!(" for {}", modules.join(", ")) };
            format!("rows of {n_in} with {kind}{out}{of}")
        };
        Err(Error::config("replay", show(now), format!("{}, as are remembered", show(then))))
    }
}

/// Rows of earlier tasks. Clones share the rows until one of them takes others.
#[derive(Clone, Debug)]
pub struct ReplayMemory {
    pub(super) settings: ReplaySettings,
    pub(super) kept: Arc<Kept>,
    pub(super) seen: u64,
    pub(super) choose: Rng,
    pub(super) draw: Rng,
}

impl ReplayMemory {
    /// An empty memory.
    ///
    /// # Errors
    /// A weight out of its range.
    pub fn new(settings: ReplaySettings) -> Result<Self> {
        let settings = settings.validate()?;
        let rng = |stream| Rng::new(settings.seed, stream);
        let (choose, draw) = (rng(CHOOSE), rng(DRAW));
        Ok(ReplayMemory { settings, kept: Arc::default(), seen: 0, choose, draw })
    }

    /// What it was made with.
    pub fn settings(&self) -> ReplaySettings {
        self.settings
    }

    /// The rows.
    pub fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Rows that were offered so far.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Resident bytes of the rows.
    pub fn memory_bytes(&self) -> usize {
        let k = &self.kept;
        4 * (k.x.len() + k.targets.len() + k.outputs.len() + k.weights.len())
            + 8 * (k.labels.len() + k.rows())
    }

    /// Whether there are rows, and weights that let them act.
    pub fn acts(&self) -> bool {
        self.kept.rows() > 0 && (self.settings.label_weight > 0.0 || self.settings.logit_weight > 0.0)
    }

    /// Refuses data that cannot stand beside what is remembered.
    ///
    /// # Errors
    /// [`Error::Config`] on `replay`.
    pub fn check(&self, trainee: &dyn Trainee, data: &Data<'_>) -> Result<()> {
        self.kept.check(trainee, data)
    }

    /// Slots of `n` rows, each drawn from all of them.
    pub(super) fn draw(&mut self, n: usize) -> Vec<usize> {
        let rows = self.kept.rows() as u64;
        (0..n).map(|_| self.draw.below(rows) as usize).collect()
    }

    /// Takes over how far another's draws have come, after it stood in for this one in a run.
    pub fn drew(&mut self, other: &ReplayMemory) {
        self.draw = other.draw.clone();
    }

    /// Shows the rows of `order` as the next of the stream: each of the stream's rows is kept with the same
    /// probability (algorithm R, Vitter 1985). Those that stay are run through the weights as they are now.
    ///
    /// # Errors
    /// Data that do not fit, rows that do not exist or are not finite; nothing changes then.
    pub fn offer(
        &mut self,
        trainee: &dyn Trainee,
        data: &Data<'_>,
        order: &[usize],
        ws: &mut Workspace,
    ) -> Result<()> {
        check_data(trainee, data)?;
        self.check(trainee, data)?;
        if let Some(row) = order.iter().find(|r| **r >= data.rows) {
            return Err(Error::config("rows", row, format!("rows below {}", data.rows)));
        }
        let capacity = self.settings.capacity;
        if capacity == 0 {
            return Ok(());
        }
        let (mut choose, mut seen, mut filled) = (self.choose.clone(), self.seen, self.kept.rows());
        // The row that each slot ends with: the outputs of those that another one displaced are never needed.
        let mut last: Vec<Option<(usize, u64)>> = vec![None; capacity.min(filled + order.len())];
        for &row in order {
            let place = seen;
            seen += 1;
            let slot = if filled < capacity {
                filled += 1;
                filled - 1
            } else {
                choose.below(seen) as usize
            };
            if slot < capacity {
                last[slot] = Some((row, place));
            }
        }
        let taken: Vec<(usize, usize, u64)> = last
            .iter()
            .enumerate()
            .filter_map(|(slot, l)| l.map(|(row, place)| (slot, row, place)))
            .collect();
        let kept = Arc::clone(&self.kept);
        self.kept = Arc::new(fill(kept, filled, &taken, trainee, data, ws)?);
        (self.choose, self.seen) = (choose, seen);
        Ok(())
    }
}

pub(super) const CHOOSE: u64 = 0;
pub(super) const DRAW: u64 = 1;

/// The rows with others in some of their slots.
fn fill(
    kept: Arc<Kept>,
    rows: usize,
    taken: &[(usize, usize, u64)],
    trainee: &dyn Trainee,
    data: &Data<'_>,
    ws: &mut Workspace,
) -> Result<Kept> {
    let k = trainee.lora().kernels();
    let width = data.x.len() / data.rows;
    let mut kept = Arc::unwrap_or_clone(kept);
    kept.modules = trainee.modules();
    kept.places.resize(rows, 0);
    kept.weights.resize(rows, 1.0);
    kept.x.resize(rows * width, 0.0);
    let mut x = Vec::new();
    for part in taken.chunks(BLOCK) {
        x.clear();
        part.iter().for_each(|&(_, row, _)| x.extend_from_slice(&data.x[row * width..(row + 1) * width]));
        let at = |bad: BadRow| Error::from(BadRow { row: part[bad.row].1, ..bad });
        let outputs = trainee.outputs(k, &x, ws).map_err(at)?;
        let stride = outputs.len() / part.len();
        kept.outputs.resize(rows * stride, 0.0);
        for (i, &(slot, row, place)) in part.iter().enumerate() {
            let bad = |arg| Error::from(BadRow { row, arg, reason: NOT_FINITE });
            kept.places[slot] = place;
            kept.weights[slot] = data.weights.map_or(1.0, |w| w[row]);
            kept.x[slot * width..(slot + 1) * width].copy_from_slice(&x[i * width..(i + 1) * width]);
            let answered = &outputs[i * stride..(i + 1) * stride];
            if !k.all_finite(answered) {
                return Err(bad("x"));
            }
            kept.outputs[slot * stride..(slot + 1) * stride].copy_from_slice(answered);
            match data.y {
                Targets::Labels(labels) => {
                    kept.labels.resize(rows, 0);
                    kept.labels[slot] = labels[row];
                }
                Targets::Values(y) => {
                    let n_out = y.len() / data.rows;
                    let (from, to) = (row * n_out..(row + 1) * n_out, slot * n_out..(slot + 1) * n_out);
                    kept.targets.resize(rows * n_out, 0.0);
                    kept.targets[to.clone()].copy_from_slice(&y[from.clone()]);
                    // The part that is the adapter's, so that no base has to be kept.
                    if let Some(base) = data.base {
                        kept.targets[to.clone()].iter_mut().zip(&base[from]).for_each(|(t, b)| *t -= b);
                    }
                    if !k.all_finite(&kept.targets[to]) {
                        return Err(bad("y"));
                    }
                }
            }
        }
    }
    Ok(kept)
}
