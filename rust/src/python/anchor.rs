//! The penalty as training takes it.

use std::sync::{Arc, Mutex};

use pyo3::prelude::*;

use super::error::DTypeError;
use super::ewc::{PyEwc, lock};
use crate::ewc::Ewc;
use crate::factor::Factor;
use crate::kernels::Kernels;
use crate::layer::Layer;
use crate::learn::regularizer::Pair;
use crate::learn::{Regularizer, Samples};
use crate::micro_lora::MicroLora;

/// A consolidation that training shares with its owner: locked call by call, inside the learner's lock.
struct Shared(Arc<Mutex<Ewc>>);

impl Regularizer for Shared {
    fn is_active(&self) -> bool {
        lock(&self.0).is_active()
    }
    fn in_gradient(&self) -> bool {
        lock(&self.0).in_gradient()
    }
    fn add_gradient(
        &mut self,
        k: &Kernels,
        module: usize,
        layer: &Layer,
        weight: f64,
        gradient: (&mut Factor, &mut Factor),
    ) -> crate::Result<()> {
        lock(&self.0).add_gradient(k, module, layer, weight, gradient)
    }
    fn proximal(&self, module: usize, lr: f64, layer: &mut Layer) {
        lock(&self.0).proximal(module, lr, layer);
    }
    fn observe(&mut self, k: &Kernels, module: usize, samples: Samples<'_>) -> crate::Result<()> {
        lock(&self.0).observe(k, module, samples)
    }
    fn seen(&mut self, n: usize) -> crate::Result<()> {
        lock(&self.0).seen(n)
    }
    fn discard(&mut self) {
        lock(&self.0).discard();
    }
    fn uses_path(&self) -> bool {
        lock(&self.0).uses_path()
    }
    fn path(&mut self, module: usize, gradient: Pair<'_>, before: Pair<'_>, after: Pair<'_>) {
        lock(&self.0).path(module, gradient, before, after);
    }
}

/// The `ewc=` of a training call.
pub(super) struct Anchor(Option<Shared>);

impl Anchor {
    /// Takes None or a consolidation of a learner with the same modules.
    pub fn of(ewc: Option<&Bound<'_, PyAny>>, lora: &MicroLora) -> PyResult<Self> {
        let Some(ewc) = ewc else { return Ok(Anchor(None)) };
        let Ok(ewc) = ewc.cast::<PyEwc>() else {
            let kind = ewc.get_type();
            return Err(DTypeError::new_err(format!("ewc: got {kind}, expected an EwcPlusPlus or None")));
        };
        let inner = &ewc.get().inner;
        let masters = lora.masters();
        lock(inner).check_same(lora.names(), &masters)?;
        Ok(Anchor(Some(Shared(Arc::clone(inner)))))
    }

    pub fn get(&mut self) -> Option<&mut dyn Regularizer> {
        self.0.as_mut().map(|s| s as _)
    }
}
