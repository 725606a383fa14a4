//! Optimisers over factors: SGD, momentum and AdamW, with LoRA+ rates.
//!
//! A step takes gradient sums with their counts, so that micro-batches add up to the large batch.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kernels::{AdamStep, Kernels};

/// Which rule turns a gradient into a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Method {
    /// `w -= lr (g + wd w)`.
    Sgd,
    /// `m = beta m + g + wd w`, `w -= lr m` (as torch's SGD with momentum).
    Momentum {
        /// Decay of the velocity.
        beta: f64,
    },
    /// AdamW with decoupled weight decay (arXiv 1711.05101).
    AdamW {
        /// Decays of the moments.
        betas: [f64; 2],
        /// Added to the root of the second moment.
        eps: f64,
    },
}

/// Settings of an optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OptimSettings {
    /// The rule.
    pub method: Method,
    /// Weight decay; decoupled for AdamW, added to the gradient otherwise.
    pub weight_decay: f64,
    /// Rate of B over the rate of A (LoRA+, arXiv 2402.12354); 1 is plain.
    pub lora_plus_ratio: f64,
}

impl OptimSettings {
    /// Refuses settings outside their ranges.
    ///
    /// # Errors
    /// [`Error::Config`] that names the setting.
    pub fn validate(self) -> Result<Self> {
        let check = |ok: bool, name: &str, got: f64, want: &str| {
            if ok { Ok(()) } else { Err(Error::config(name, got, want)) }
        };
        let unit = |v: f64| (0.0..1.0).contains(&v);
        match self.method {
            Method::Sgd => {}
            Method::Momentum { beta } => check(unit(beta), "momentum", beta, "0 <= momentum < 1")?,
            Method::AdamW { betas, eps } => {
                check(unit(betas[0]), "betas[0]", betas[0], "0 <= beta < 1")?;
                check(unit(betas[1]), "betas[1]", betas[1], "0 <= beta < 1")?;
                check(eps.is_finite() && eps > 0.0, "eps", eps, "a finite number above 0")?;
            }
        }
        let (wd, ratio) = (self.weight_decay, self.lora_plus_ratio);
        check(wd.is_finite() && wd >= 0.0, "weight_decay", wd, "a finite number, 0 or above")?;
        check(ratio.is_finite() && ratio > 0.0, "lora_plus_ratio", ratio, "a finite number above 0")?;
        Ok(self)
    }
}

/// What an optimiser remembers about one tensor, in that tensor's own layout.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slot {
    /// Velocity, or first moment.
    pub m: Vec<f32>,
    /// Second moment.
    pub v: Vec<f32>,
    /// Steps taken.
    pub steps: u64,
}

impl Slot {
    /// Resident bytes.
    pub fn memory_bytes(&self) -> usize {
        4 * (self.m.len() + self.v.len())
    }

    /// One step on `w` from the gradient sum `g`, which is cleared; `scale` makes it a (clipped) mean.
    pub(crate) fn step(
        &mut self,
        k: &Kernels,
        set: &OptimSettings,
        lr: f64,
        scale: f64,
        g: &mut [f32],
        w: &mut [f32],
    ) {
        self.steps += 1;
        let need = |v: &mut Vec<f32>| v.resize(w.len(), 0.0);
        match set.method {
            Method::Sgd => {
                if set.weight_decay > 0.0 {
                    k.scale((1.0 - lr * set.weight_decay) as f32, w);
                }
                k.step_and_clear((-lr * scale) as f32, g, w);
            }
            Method::Momentum { beta } => {
                need(&mut self.m);
                let s = [scale as f32, beta as f32, set.weight_decay as f32, lr as f32];
                k.momentum(s, g, &mut self.m, w);
            }
            Method::AdamW { betas: [b1, b2], eps } => {
                need(&mut self.m);
                need(&mut self.v);
                let t = self.steps as f64;
                let step = AdamStep {
                    gradient: scale as f32,
                    beta1: b1 as f32,
                    beta2: b2 as f32,
                    keep: (1.0 - lr * set.weight_decay) as f32,
                    rate: (lr / (1.0 - b1.powf(t))) as f32,
                    unbias: (1.0 / (1.0 - b2.powf(t)).sqrt()) as f32,
                    eps: eps as f32,
                };
                k.adamw(&step, g, &mut self.m, &mut self.v, w);
            }
        }
    }

    /// Upper bound of how far one step moves a weight of at most `top`, with gradients of norm `norm`.
    pub(crate) fn reach(&self, set: &OptimSettings, lr: f64, norm: f64, top: f64) -> f64 {
        let decay = lr * set.weight_decay * top;
        match set.method {
            Method::Sgd => lr * norm + decay,
            Method::Momentum { beta } => {
                let m = self.m.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                lr * (beta * f64::from(m) + norm) + decay
            }
            // Cauchy-Schwarz on the two weighted means; without b1^2 < b2 only eps bounds the ratio.
            Method::AdamW { betas: [b1, b2], eps } => {
                let ratio = b1 * b1 / b2;
                let most = if ratio < 1.0 {
                    2.0 * ((1.0 - b1) * ((1.0 - b2) * (1.0 - ratio)).powf(-0.5)).max(1.0)
                } else {
                    let m = self.m.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    (norm + f64::from(m)) / eps
                };
                lr * most + decay
            }
        }
    }
}

/// The three tensors of one module that can learn: A, B and, for DoRA, the magnitudes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModuleSlots {
    /// Of A.
    pub a: Slot,
    /// Of B.
    pub b: Slot,
    /// Of DoRA's magnitude vector.
    pub magnitude: Slot,
}

/// Moments of every module, and the settings that use them.
#[derive(Clone, Debug)]
pub struct Optimizer {
    /// Settings.
    pub settings: OptimSettings,
    /// `(in, out, rank)` of each module, to refuse learners of other shapes.
    pub shapes: Vec<[usize; 3]>,
    /// Moments, in the learner's module order.
    pub slots: Vec<ModuleSlots>,
    /// Steps taken.
    pub steps: u64,
}

impl Optimizer {
    /// Fresh moments for these shapes.
    ///
    /// # Errors
    /// Settings out of range.
    pub fn new(shapes: Vec<[usize; 3]>, settings: OptimSettings) -> Result<Self> {
        let settings = settings.validate()?;
        let slots = vec![ModuleSlots::default(); shapes.len()];
        Ok(Optimizer { settings, shapes, slots, steps: 0 })
    }

    /// Resident bytes of the moments: AdamW 8 and momentum 4 per stored weight, SGD none.
    pub fn memory_bytes(&self) -> usize {
        self.slots.iter().map(|s| s.a.memory_bytes() + s.b.memory_bytes() + s.magnitude.memory_bytes()).sum()
    }
}
