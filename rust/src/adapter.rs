//! An adapter as a value: named layers, its settings and whatever else its file held.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::factor::{Factor, SharedFactor};
use crate::format::{AdapterParts, Bytes, ModuleKind, ModuleParts, Tensor};
use crate::layer::Layer;
use crate::snapshot::LEARNER_PREFIX;

/// Immutable weights with their settings; cheap to clone, because layers are shared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapter {
    /// Layers by module name, in file or configuration order.
    pub modules: Vec<(String, Arc<Layer>)>,
    /// The configuration as JSON (the Python layer's schema).
    pub config_json: Option<String>,
    /// Name, base model, metrics and so on, as JSON (the Python layer's schema).
    pub metadata_json: Option<String>,
    /// A PEFT `adapter_config.json`, whole.
    pub peft_config: Option<String>,
    /// Tensors that are not factors, byte for byte.
    pub extra: Vec<Tensor>,
    /// PEFT's key prefix where it was repeated.
    pub prefix: Option<String>,
    /// Header entries of a foreign safetensors file.
    pub header: BTreeMap<String, String>,
}

/// A tensor in the kernels' order: the one that its reader made, or a new one.
fn factor(t: &Tensor, rank: usize, len: usize, transposed: bool) -> Result<SharedFactor> {
    match t.data.packed(transposed).filter(|f| (f.rank(), f.len()) == (rank, len)) {
        Some(factor) => Ok(factor),
        None => Ok(Factor::from_bits(&t.data, rank, len, dtype_of(t)?, transposed)?.into()),
    }
}

fn dtype_of(t: &Tensor) -> Result<Dtype> {
    t.factor_dtype().ok_or_else(|| Error::Dtype {
        arg: t.name.clone(),
        got: t.dtype.to_string(),
        want: "F32, F16 or BF16".into(),
    })
}

impl Adapter {
    /// Packs what a file held.
    ///
    /// # Errors
    /// Factors of a dtype or shape that the kernels do not run.
    pub fn from_parts(parts: &AdapterParts) -> Result<Self> {
        // The state of a chain with magnitudes: its factors alone are another network.
        let is_magnitude = |t: &Tensor| t.name.starts_with(LEARNER_PREFIX) && t.name.ends_with("/magnitude");
        if parts.extra.iter().any(is_magnitude) {
            let reason = "holds DoRA magnitudes, which mean nothing without their base weights: load it into a \
                          LoraChain of the same layers (chain.load), or use the weights of chain.fuse()";
            return Err(Error::unsupported("adapter", reason));
        }
        let mut modules = Vec::with_capacity(parts.modules.len());
        for m in &parts.modules {
            if m.kind != ModuleKind::Linear {
                let reason = format!("LoRA on {} layers is kept in files and not run here", m.kind.as_str());
                return Err(Error::unsupported(&m.path, reason));
            }
            let (&[rank, inputs], &[outputs, _]) = (&m.a.shape[..], &m.b.shape[..]) else {
                return Err(Error::shape(
                    &m.path,
                    format!("{:?}, {:?}", m.a.shape, m.b.shape),
                    "two matrices",
                ));
            };
            let a = factor(&m.a, rank, inputs, false)?;
            let b = factor(&m.b, rank, outputs, true)?;
            modules.push((m.path.clone(), Arc::new(Layer::new(a, b, m.alpha, m.use_rslora)?)));
        }
        Ok(Adapter {
            modules,
            config_json: parts.config_json.clone(),
            metadata_json: parts.metadata_json.clone(),
            peft_config: parts.peft_config.clone(),
            // What a snapshot's bytes carry beyond an adapter means nothing without its learner.
            extra: parts.extra.iter().filter(|t| !t.name.starts_with(LEARNER_PREFIX)).cloned().collect(),
            prefix: parts.prefix.clone(),
            header: parts.header.clone(),
        })
    }

    /// Unpacks for a file; bits are those that were loaded.
    pub fn to_parts(&self) -> AdapterParts {
        let modules = self.modules.iter().map(|(path, layer)| module_parts(path, layer)).collect();
        AdapterParts {
            modules,
            config_json: self.config_json.clone(),
            metadata_json: self.metadata_json.clone(),
            peft_config: self.peft_config.clone(),
            extra: self.extra.clone(),
            prefix: self.prefix.clone(),
            header: self.header.clone(),
        }
    }

    /// The layer of one module.
    ///
    /// # Errors
    /// A name the adapter does not have.
    pub fn layer(&self, name: &str) -> Result<&Arc<Layer>> {
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
        let extra = self.extra.iter().filter(|t| !t.data.is_mapped()).map(|t| t.data.len());
        self.modules.iter().map(|(_, l)| l.memory_bytes()).sum::<usize>() + extra.sum::<usize>()
    }
}

fn module_parts(path: &str, layer: &Layer) -> ModuleParts {
    let tensor = |f: &SharedFactor, suffix: &str, transposed: bool| Tensor {
        name: format!("{path}.{suffix}"),
        dtype: f.dtype().into(),
        shape: if transposed { vec![f.len(), f.rank()] } else { vec![f.rank(), f.len()] },
        data: Bytes::from_factor(f, transposed),
    };
    ModuleParts {
        path: path.into(),
        kind: ModuleKind::Linear,
        alpha: layer.alpha,
        rank: layer.rank(),
        use_rslora: layer.rslora,
        a: tensor(&layer.a, "lora_a", false),
        b: tensor(&layer.b, "lora_b", true),
    }
}

/// The error for a name that is not among `have`; long lists are cut to the nearest names.
pub(crate) fn unknown_module<'a>(name: &str, have: impl Iterator<Item = &'a str>) -> Error {
    let mut have: Vec<&str> = have.collect();
    let total = have.len();
    const SHOWN: usize = 9;
    if total > SHOWN {
        have.sort_by_key(|h| edit_distance(name, h));
        have.truncate(SHOWN);
    }
    let mut list = have.join(", ");
    if total > SHOWN {
        list = format!("{list}, ... ({total} in all)");
    }
    Error::UnknownModule { got: name.into(), have: list }
}

/// Levenshtein distance, for near names in errors.
pub(crate) fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = row[j + 1];
            row[j + 1] = next;
        }
    }
    row[b.len()]
}
