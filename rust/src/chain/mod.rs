//! A small network: frozen linear layers, each with a LoRA (or DoRA) of its own, an activation between them
//! and a loss at the end. Forward, backward and training run here, without any other library.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::batch::BadRow;
use crate::learn::train::{Data, Targets, Trainee, Workspace};
use crate::learn::{Learner, Regularizer};
use crate::micro_lora::MicroLora;
use crate::snapshot::Snapshot;

pub mod activation;
mod backward;
mod forward;
mod frozen;
pub mod head;
mod importance;
mod pass;

pub use activation::Activation;
pub use frozen::Frozen;
pub use head::Head;
pub use pass::Pass;

/// Layers one after another; the weights that learn live in a [`MicroLora`] with one module per layer.
pub struct Chain {
    lora: Arc<MicroLora>,
    frozen: Vec<Frozen>,
    activation: Activation,
    head: Head,
    /// Which layers are DoRA.
    dora: Vec<bool>,
    /// Layers between two stored inputs; 1 stores all.
    segment: usize,
}

/// DoRA of one layer: one over the norms of the rows, and magnitudes over norms.
pub(crate) struct Dora {
    pub inverse: Vec<f32>,
    pub scale: Vec<f32>,
}

/// One version of everything that learns.
pub(crate) struct Version {
    pub layers: Vec<Arc<Layer>>,
    /// Of the layers that are DoRA.
    pub dora: Vec<Option<Dora>>,
}

impl Chain {
    /// Puts layers together. A layer with `dora` gets a magnitude vector, at first the norms of its rows.
    /// With `checkpointing` only every `ceil(sqrt(L))`-th input is kept for backward (arXiv 1604.06174).
    ///
    /// # Errors
    /// No layers, widths that do not follow one another or do not fit the learner's modules.
    pub fn new(
        lora: Arc<MicroLora>,
        frozen: Vec<Frozen>,
        activation: Activation,
        head: Head,
        dora: &[bool],
        checkpointing: bool,
    ) -> Result<Self> {
        if frozen.len() != lora.names().len() || frozen.is_empty() {
            let got = format!("{} layers", frozen.len());
            return Err(Error::config("layers", got, format!("{} as the adapter has", lora.names().len())));
        }
        if dora.len() != frozen.len() {
            return Err(Error::config("use_dora", format!("{} flags", dora.len()), frozen.len()));
        }
        for (i, f) in frozen.iter().enumerate() {
            let (got, want) = ((f.in_features(), f.out_features()), lora.shape(i));
            if got != want {
                return Err(Error::shape(format!("layers[{i}]"), format!("{got:?}"), format!("{want:?}")));
            }
            if i > 0 && frozen[i - 1].out_features() != got.0 {
                let want = format!(
                    "{} inputs, as many as layer {} has outputs",
                    frozen[i - 1].out_features(),
                    i - 1
                );
                return Err(Error::shape(format!("layers[{i}]"), format!("{} inputs", got.0), want));
            }
        }
        let segment = if checkpointing { (frozen.len() as f64).sqrt().ceil() as usize } else { 1 };
        let chain = Chain { lora, frozen, activation, head, dora: dora.to_vec(), segment };
        chain.init_magnitudes()?;
        Ok(chain)
    }

    fn init_magnitudes(&self) -> Result<()> {
        let k = self.lora.kernels();
        self.lora.edit(|learners| {
            for ((learner, frozen), dora) in learners.iter_mut().zip(&self.frozen).zip(&self.dora) {
                if *dora && learner.magnitude.is_none() {
                    learner.magnitude = Some(Arc::new(frozen.row_norms(k, learner.master())));
                }
            }
            Ok((false, ()))
        })
    }

    /// The learner that holds what learns.
    pub fn lora(&self) -> &Arc<MicroLora> {
        &self.lora
    }

    /// The frozen layers.
    pub fn frozen(&self) -> &[Frozen] {
        &self.frozen
    }

    /// The loss.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Which layers are DoRA.
    pub fn dora(&self) -> &[bool] {
        &self.dora
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.frozen[0].in_features()
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.frozen[self.frozen.len() - 1].out_features()
    }

    /// Resident bytes of the frozen layers.
    pub fn frozen_bytes(&self) -> usize {
        self.frozen.iter().map(Frozen::memory_bytes).sum()
    }

    /// Magnitudes of the layers that are DoRA, in order.
    pub fn magnitudes(&self) -> Vec<Arc<Vec<f32>>> {
        self.lora.inspect(|learners| learners.iter().filter_map(|l| l.magnitude.clone()).collect())
    }

    /// Replaces DoRA's magnitudes.
    ///
    /// # Errors
    /// Widths that do not fit, numbers that are not finite, a chain of plain LoRA. Nothing changes then.
    pub fn set_magnitudes(&self, values: Vec<Vec<f32>>) -> Result<()> {
        let places: Vec<usize> = (0..self.dora.len()).filter(|i| self.dora[*i]).collect();
        if places.is_empty() || values.len() != places.len() {
            let want = if places.is_empty() { "none (no DoRA)".into() } else { places.len().to_string() };
            return Err(Error::config("magnitudes", format!("{} vectors", values.len()), want));
        }
        for (i, (v, place)) in values.iter().zip(&places).enumerate() {
            let (arg, width) = (format!("magnitudes[{i}]"), self.frozen[*place].out_features());
            if v.len() != width {
                return Err(Error::shape(arg, format!("({},)", v.len()), format!("({width},)")));
            }
            if v.iter().any(|v| !v.is_finite()) {
                return Err(Error::non_finite(arg));
            }
        }
        self.lora.edit(|learners| {
            for (place, v) in places.into_iter().zip(values) {
                learners[place].magnitude = Some(Arc::new(v));
            }
            Ok((true, ()))
        })
    }

    /// Goes back to a snapshot of this chain's learner.
    ///
    /// # Errors
    /// A snapshot of other shapes, or one with magnitudes for a chain without and the other way round.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        let theirs: Vec<bool> = snapshot.learners.iter().map(|l| l.magnitude.is_some()).collect();
        if theirs.len() == self.dora.len() && theirs != self.dora {
            let kind = |dora: &[bool]| {
                let names = dora.iter().map(|d| if *d { "DoRA" } else { "LoRA" });
                format!("layers of {}", names.collect::<Vec<_>>().join(", "))
            };
            return Err(Error::config("data", kind(&theirs), kind(&self.dora)));
        }
        self.lora.restore(snapshot)
    }

    pub(crate) fn version(&self) -> Version {
        let k = self.lora.kernels();
        let (layers, magnitudes): (Vec<_>, Vec<_>) = self.lora.inspect(|learners| {
            learners.iter().map(|l: &Learner| (Arc::clone(l.layer()), l.magnitude.clone())).unzip()
        });
        let each = self.frozen.iter().zip(&layers).zip(magnitudes);
        let dora = each
            .map(|((frozen, layer), magnitude)| {
                let norms = magnitude.as_ref().map(|_| frozen.row_norms(k, layer))?;
                // A row of zeros has magnitude 0 too, so that it stays one.
                let inverse: Vec<f32> = norms.iter().map(|n| 1.0 / n.max(f32::MIN_POSITIVE)).collect();
                let scale = magnitude?.iter().zip(&inverse).map(|(m, i)| m * i).collect();
                Some(Dora { inverse, scale })
            })
            .collect();
        Version { layers, dora }
    }

    /// The layers with their adapters fused in: `(W', b)` of each, row-major `(out, in)`.
    pub fn fuse(&self) -> Vec<(Vec<f32>, Option<Vec<f32>>)> {
        let (k, version) = (self.lora.kernels(), self.version());
        let layers = self.frozen.iter().zip(&version.layers).enumerate();
        layers
            .map(|(i, (frozen, layer))| {
                let mut w = frozen.w.to_f32(false);
                layer.add_delta(k, &mut w, 1.0);
                if let Some(dora) = &version.dora[i] {
                    for (row, s) in w.chunks_exact_mut(frozen.in_features()).zip(&dora.scale) {
                        k.scale(*s, row);
                    }
                }
                (w, frozen.bias.clone())
            })
            .collect()
    }
}

impl Trainee for Chain {
    fn lora(&self) -> &MicroLora {
        &self.lora
    }

    fn check(&self, data: &Data<'_>) -> Result<()> {
        let (n_in, n_out) = (self.in_features(), self.out_features());
        let width = |arg: &str, len: usize, want: usize| {
            if len == data.rows * want {
                return Ok(());
            }
            let got = format!("({}, {})", data.rows, len / data.rows.max(1));
            Err(Error::shape(arg, got, format!("({}, {want})", data.rows)))
        };
        width("x", data.x.len(), n_in)?;
        if data.base.is_some() {
            return Err(Error::config("base", "outputs", "none (a chain has its base layers)"));
        }
        match (self.head, data.y) {
            (Head::Mse, Targets::Values(y)) => width("y", y.len(), n_out),
            (Head::CrossEntropy, Targets::Labels(y)) => {
                match y.iter().position(|y| !(0..n_out as i64).contains(y)) {
                    Some(row) => {
                        let want = format!("a class from 0 to {}", n_out - 1);
                        Err(Error::config(format!("y[{row}]"), y[row], want))
                    }
                    None => Ok(()),
                }
            }
            (Head::Mse, _) => Err(Error::config("y", "labels", "target vectors for the mse head")),
            (Head::CrossEntropy, _) => {
                Err(Error::config("y", "target vectors", "integer labels for the cross_entropy head"))
            }
        }
    }

    fn run(
        &self,
        k: &Kernels,
        batch: Data<'_>,
        learn: bool,
        ws: &mut Workspace,
        observe: Option<&mut dyn Regularizer>,
    ) -> Result<(), BadRow> {
        let version = self.version();
        let pass = &mut ws.pass;
        let mut z = self.forward_tape(k, &version, batch.x, learn, pass)?;
        let (width, losses) = (self.out_features(), &mut ws.losses);
        let outcome = self.head.losses(k, width, &mut z, batch.y, batch.weights, batch.replayed, losses);
        if outcome.is_err() || !learn {
            pass.give(z);
            pass.clear();
            return outcome;
        }
        let fresh = batch.fresh();
        self.backward(k, &version, batch.x, z, pass, Some(&mut ws.sums), observe.map(|e| (e, fresh)))?;
        pass.clear();
        for s in ws.sums.iter_mut().flatten() {
            s.count += fresh as u64;
        }
        Ok(())
    }

    fn modules(&self) -> Vec<String> {
        Vec::new()
    }

    fn outputs(&self, _: &Kernels, x: &[f32], ws: &mut Workspace) -> Result<Vec<f32>, BadRow> {
        self.forward(x, &mut ws.pass)
    }
}
