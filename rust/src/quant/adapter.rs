//! An adapter that stays quantised: named layers over blocks, and what else its file held.

use std::collections::HashSet;
use std::sync::Arc;

use super::{QuantLayer, QuantMatrix, Side, SideType};
use crate::adapter::{Adapter, unknown_module};
use crate::error::{Error, Result};
use crate::factor::Factor;
use crate::format::{AdapterParts, Along, FactorParts, ModuleKind, QuantModuleParts, Tensor};
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

    /// Packs what a file held.
    ///
    /// # Errors
    /// Factors of a shape or type that does not run, or with a scale that is not finite.
    pub fn from_parts(rest: &AdapterParts, modules: &[QuantModuleParts]) -> Result<Self> {
        let layers = modules.iter().map(|m| {
            let (a, b) = (side(&m.path, "lora_a", &m.a)?, side(&m.path, "lora_b", &m.b)?);
            Ok((m.path.clone(), Arc::new(QuantLayer::new(a, b, m.alpha, m.use_rslora)?)))
        });
        Self::new(layers.collect::<Result<_>>()?, rest.clone())
    }

    /// The modules for a file; blocks are byte for byte those that were loaded. [`QuantAdapter::rest`] is what
    /// else belongs into it.
    pub fn to_parts(&self) -> Vec<QuantModuleParts> {
        let module = |(path, layer): &(String, Arc<QuantLayer>)| QuantModuleParts {
            path: path.clone(),
            kind: ModuleKind::Linear,
            alpha: layer.alpha,
            rank: layer.rank(),
            use_rslora: layer.rslora,
            a: factor_parts(path, "lora_a", &layer.a),
            b: factor_parts(path, "lora_b", &layer.b),
        };
        self.modules.iter().map(module).collect()
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

/// A plain factor's tensor has PEFT's shape: A (rank, in), B (out, rank).
fn side(path: &str, which: &str, parts: &FactorParts) -> Result<Side> {
    let name = format!("{path}.{which}");
    match parts {
        FactorParts::Plain(t) => {
            let (&[first, second], Some(dtype)) = (&t.shape[..], t.factor_dtype()) else {
                let got = format!("{} {:?}", t.dtype, t.shape);
                return Err(Error::shape(name, got, "a matrix of F32, F16 or BF16"));
            };
            let transposed = which == "lora_b";
            let (rank, len) = if transposed { (second, first) } else { (first, second) };
            Ok(Side::Plain(Factor::from_bits(&t.data, rank, len, dtype, transposed)?))
        }
        FactorParts::Blocks { kind, along, rows, cols, data } => {
            let matrix = QuantMatrix::from_bytes(*kind, &name, data, *rows, *cols)?;
            Ok(match along {
                Along::Features => Side::Blocks(matrix),
                Along::Rank => Side::BlocksAlongRank(matrix),
            })
        }
    }
}

fn factor_parts(path: &str, which: &str, side: &Side) -> FactorParts {
    let blocks = |m: &QuantMatrix, along| FactorParts::Blocks {
        kind: m.kind(),
        along,
        rows: m.rows(),
        cols: m.cols(),
        data: m.to_bytes().into(),
    };
    match side {
        Side::Blocks(m) => blocks(m, Along::Features),
        Side::BlocksAlongRank(m) => blocks(m, Along::Rank),
        Side::Plain(f) => {
            let transposed = which == "lora_b";
            let shape = if transposed { vec![f.len(), f.rank()] } else { vec![f.rank(), f.len()] };
            let name = format!("{path}.{which}");
            FactorParts::Plain(Tensor {
                name,
                dtype: f.dtype().into(),
                shape,
                data: f.to_bits(transposed).into(),
            })
        }
    }
}
