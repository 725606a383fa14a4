//! An adapter that stays quantised: named layers over blocks, and what else its file held.

use std::collections::HashSet;
use std::sync::Arc;

use super::{QuantLayer, Side, SideType};
use crate::adapter::{Adapter, unknown_module};
use crate::error::{Error, Result};
use crate::format::AdapterParts;
use crate::low_rank::LowRank;
use crate::snapshot::LEARNER_PREFIX;

/// What one module's factors are to be stored in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SideTypes {
    /// Of A.
    pub a: SideType,
    /// Of B.
    pub b: SideType,
    /// Blocks of B along the rank, as a GGUF file has them, instead of along the output.
    pub b_along_rank: bool,
}

/// Immutable quantised weights with their settings; cheap to clone, because layers are shared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QuantAdapter {
    /// Layers by module name, in order.
    pub modules: Vec<(String, Arc<QuantLayer>)>,
    /// Settings, metadata and other content of the file; its `modules` are empty.
    pub rest: AdapterParts,
}

impl QuantAdapter {
    /// Puts layers and the rest of a file together.
    ///
    /// # Errors
    /// A name that comes twice.
    pub fn new(modules: Vec<(String, Arc<QuantLayer>)>, mut rest: AdapterParts) -> Result<Self> {
        let mut seen = HashSet::new();
        for (name, _) in &modules {
            if !seen.insert(name.as_str()) {
                return Err(Error::config("modules", format!("{name:?} twice"), "each module once"));
            }
        }
        rest.modules.clear();
        rest.extra.retain(|t| !t.name.starts_with(LEARNER_PREFIX));
        Ok(QuantAdapter { modules, rest })
    }

    /// Quantises every module, each factor to the type that is asked for.
    ///
    /// # Errors
    /// `Shape` where a type does not fit the width of a factor, with the module's name; numbers that no scale of
    /// the type can hold.
    pub fn quantize(adapter: &Adapter, types: impl Fn(&str) -> Result<SideTypes>) -> Result<Self> {
        let mut modules = Vec::with_capacity(adapter.modules.len());
        for (name, layer) in &adapter.modules {
            let to = types(name)?;
            let a = Side::quantize(&format!("lora_a of {name}"), &layer.a, to.a, false)?;
            let b = Side::quantize(&format!("lora_b of {name}"), &layer.b, to.b, to.b_along_rank)?;
            modules.push((name.clone(), Arc::new(QuantLayer::new(a, b, layer.alpha, layer.rslora)?)));
        }
        let rest = Adapter { modules: Vec::new(), ..adapter.clone() };
        Self::new(modules, rest.to_parts())
    }

    /// The plain adapter: f32 where a factor was quantised.
    ///
    /// # Errors
    /// Those of [`Adapter::from_parts`].
    pub fn dequantize(&self) -> Result<Adapter> {
        let mut adapter = Adapter::from_parts(&self.rest)?;
        for (name, layer) in &self.modules {
            adapter.modules.push((name.clone(), Arc::new(layer.dequantize()?)));
        }
        Ok(adapter)
    }

    /// The layer of one module.
    ///
    /// # Errors
    /// A name the adapter does not have.
    pub fn layer(&self, name: &str) -> Result<&Arc<QuantLayer>> {
        self.modules
            .iter()
            .find_map(|(n, layer)| (n == name).then_some(layer))
            .ok_or_else(|| unknown_module(name, self.modules.iter().map(|(n, _)| n.as_str())))
    }

    /// Numbers in all factors.
    pub fn param_count(&self) -> usize {
        self.modules.iter().map(|(_, l)| l.param_count()).sum()
    }

    /// Resident bytes of factors and extra tensors.
    pub fn memory_bytes(&self) -> usize {
        let extra = self.rest.extra.iter().filter(|t| !t.data.is_mapped()).map(|t| t.data.len());
        self.modules.iter().map(|(_, l)| l.memory_bytes()).sum::<usize>() + extra.sum::<usize>()
    }
}
