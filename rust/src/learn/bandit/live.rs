//! A bandit in the bottleneck of a module that lives: inputs in, and another A noticed.

use std::sync::{Arc, Weak};

use super::{Bandit, BanditSettings, Choice, Logged, Rewarded};
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::Tensor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::Train;
use crate::micro_lora::MicroLora;

/// A bandit on one module of a learner.
///
/// P and theta belong to one A. When the module's A has other numbers than at the last choice (a fitted basis,
/// another adapter, deep training), every arm starts again from the prior and learns the last `history` rewarded
/// inputs in the new bottleneck; what is older is forgotten. Waiting choices keep their numbers.
pub struct LiveBandit {
    bandit: Bandit,
    kernels: &'static Kernels,
    module: usize,
    /// The A that the arms were learned with; a learner that edits it in place moves it first.
    seen: Weak<Factor>,
    u: Vec<f32>,
}

/// Digest of the numbers that make `u` of `x`.
fn digest(layer: &Layer) -> u64 {
    let words = layer.a.to_f32(false).into_iter().chain([layer.scaling()]);
    words.fold(0xcbf2_9ce4_8422_2325, |h: u64, v| {
        (h ^ u64::from(v.to_bits())).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// `u = s x A`; false where it is beyond float32.
fn bottleneck(k: &Kernels, layer: &Layer, x: &[f32], u: &mut Vec<f32>) -> bool {
    u.resize(layer.rank(), 0.0);
    layer.a.dots(k, x, u);
    k.scale(layer.scaling(), u);
    k.all_finite(u)
}

impl LiveBandit {
    /// A bandit that has seen nothing, on one module.
    ///
    /// # Errors
    /// Settings out of range; a learner whose instant update moves A.
    pub fn new(lora: &MicroLora, module: usize, settings: BanditSettings) -> Result<Self> {
        Self::with(lora, module, Bandit::new(lora.bottleneck(module).0.rank(), settings)?)
    }

    fn with(lora: &MicroLora, module: usize, bandit: Bandit) -> Result<Self> {
        if lora.settings().instant.train == Train::Both {
            let want = "b: a bandit needs an A that stays from one event to the next";
            return Err(Error::config("instant.train", "both", want));
        }
        let rank = lora.bottleneck(module).0.rank();
        if bandit.rank() != rank {
            return Err(Error::shape("bandit", format!("rank {}", bandit.rank()), format!("rank {rank}")));
        }
        Ok(LiveBandit { bandit, kernels: lora.kernels(), module, seen: Weak::new(), u: Vec::new() })
    }

    /// Chooses among `arms` for the input `x`; see [`Bandit::choose`].
    ///
    /// # Errors
    /// As there; x of another width, NaN or infinity in it. Nothing changes then.
    pub fn choose(&mut self, lora: &MicroLora, x: &[f32], arms: &[&str]) -> Result<Choice> {
        let (layer, unit) = lora.bottleneck(self.module);
        let width = layer.in_features();
        if x.len() != width {
            return Err(Error::shape("x", format!("({},)", x.len()), format!("({width},)")));
        }
        if !bottleneck(self.kernels, &layer, x, &mut self.u) {
            return Err(Error::non_finite("x"));
        }
        let known = std::ptr::eq(self.seen.as_ptr(), Arc::as_ptr(&layer.a));
        let basis = (!known).then(|| digest(&layer));
        let moved = basis.is_some() && self.bandit.basis.is_some() && basis != self.bandit.basis;
        // What cannot be asked for must not restart the arms either.
        if moved {
            self.bandit.ask(arms)?;
            self.restart(&layer, unit);
        }
        let kept = if self.bandit.settings().history == 0 { Box::default() } else { x.into() };
        let choice = self.bandit.choose_for(&self.u, arms, kept, unit)?;
        if basis.is_some() {
            self.bandit.basis = basis;
            self.seen = Arc::downgrade(&layer.a);
        }
        Ok(choice)
    }

    fn restart(&mut self, layer: &Layer, unit: Option<f64>) {
        let k = self.kernels;
        let mut row = Vec::new();
        self.bandit.restart(k, unit, |x| {
            // An input that the new A takes beyond float32, or that was not kept, teaches nothing.
            if x.is_empty() || !bottleneck(k, layer, x, &mut row) {
                row.clear();
                row.resize(layer.rank(), 0.0);
            }
            row.as_slice().into()
        });
    }

    /// See [`Bandit::assign`].
    pub(crate) fn assign(&mut self, choice: u64, name: &str, propensity: f64) {
        self.bandit.assign(choice, name, propensity);
    }

    /// The reward of a choice; see [`Bandit::reward`].
    ///
    /// # Errors
    /// As there.
    pub fn reward(&mut self, choice: u64, reward: f64) -> Result<Rewarded> {
        self.bandit.reward(self.kernels, choice, reward)
    }

    /// The arms and their log.
    pub fn bandit(&self) -> &Bandit {
        &self.bandit
    }

    /// The module that it reads.
    pub fn module(&self) -> usize {
        self.module
    }

    /// The latest rewarded choices, oldest first.
    pub fn log(&self) -> impl ExactSizeIterator<Item = &Logged> {
        self.bandit.log()
    }

    /// Bytes resident.
    pub fn memory_bytes(&self) -> usize {
        self.bandit.memory_bytes() + size_of::<Self>() - size_of::<Bandit>() + 4 * self.u.len()
    }

    /// Everything, as tensors whose names start with `prefix`.
    pub fn to_tensors(&self, prefix: &str) -> Vec<Tensor> {
        self.bandit.to_tensors(prefix)
    }

    /// Takes what [`LiveBandit::to_tensors`] gave, on a module of the same shape. Another A than the one that
    /// the arms were learned with is noticed at the next choice.
    ///
    /// # Errors
    /// Tensors of anything else, or of another shape.
    pub fn from_tensors(lora: &MicroLora, module: usize, prefix: &str, tensors: &[Tensor]) -> Result<Self> {
        let bandit = Bandit::from_tensors(prefix, tensors)?;
        let width = lora.shape(module).0;
        if let Some(got) = bandit.width().filter(|&got| got != width) {
            return Err(Error::shape("bandit", format!("inputs of {got}"), format!("inputs of {width}")));
        }
        Self::with(lora, module, bandit)
    }
}
