//! Adapter files: PEFT directories and our single file, read and written without loss, failing closed.
//!
//! What changes the maths and is not run here is [`Error::Unsupported`], what is broken is
//! [`Error::Format`]; both name the file and the tensor or key. Pickle is never opened.

pub(crate) mod atomic;
pub(crate) mod container;
pub(crate) mod json;
mod pattern;
pub mod peft;
pub(crate) mod shards;
mod single;
mod source;
pub mod tensor;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

pub use container::{MAX_DIMS, MAX_HEADER, MAX_TENSORS};
pub use peft::{PeftOptions, save_peft};
pub use single::{FORMAT, FORMAT_VERSION, from_bytes, save_single, to_bytes};
pub use tensor::{Bytes, Tensor, TensorDtype};

use crate::error::{Error, Result};
use json::show;

/// One adapted layer as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleParts {
    /// Short name or full module path, without PEFT's prefix.
    pub path: String,
    /// Scaling numerator.
    pub alpha: f64,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// Scaling alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732) instead of alpha / rank.
    pub use_rslora: bool,
    /// `<path>.lora_a`, shape (rank, in_features); f32, f16 or bf16.
    pub a: Tensor,
    /// `<path>.lora_b`, shape (out_features, rank); f32, f16 or bf16.
    pub b: Tensor,
}

/// Everything one adapter file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdapterParts {
    /// Modules: in a PEFT file by path, in ours in the order they were given.
    pub modules: Vec<ModuleParts>,
    /// Our configuration as a JSON object, when the file carries one.
    pub config_json: Option<String>,
    /// Our metadata as a JSON object, when the file carries one.
    pub metadata_json: Option<String>,
    /// The text of `adapter_config.json`, whole.
    pub peft_config: Option<String>,
    /// Tensors that are not factors, under the names of the PEFT file, byte for byte.
    pub extra: Vec<Tensor>,
    /// PEFT's prefix when it was repeated (`base_model.model.base_model.model.`); `None`: the usual one.
    pub prefix: Option<String>,
    /// Entries of a safetensors header that nothing here gives a meaning to.
    pub header: BTreeMap<String, String>,
}

/// How to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Map the file instead of copying it: the tensors are then pages of the file (see
    /// [`crate::mapping::Mapping`] for what that asks of everybody who writes it).
    pub mmap: bool,
    /// Refuse unused tensors and unknown settings; otherwise they are listed, and tensors kept in `extra`.
    /// Variants that change the maths are refused either way.
    pub strict: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { mmap: false, strict: true }
    }
}

/// A loaded file.
#[derive(Clone, Debug, PartialEq)]
pub struct Loaded {
    /// The content.
    pub parts: AdapterParts,
    /// Tensors and settings that nothing uses (empty when strict).
    pub unused: Vec<String>,
    /// What is worth knowing and no error: pattern keys that match nothing, a transposed base layer.
    pub notes: Vec<String>,
}

/// Loads an adapter: a PEFT directory, the weights file in one, or our single file. The content
/// decides, not the name.
pub fn load(path: &Path, opts: &LoadOptions) -> Result<Loaded> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if meta.is_dir() {
        return peft::from_dir(path, opts);
    }
    let bytes = source::open(path, opts.mmap)?;
    let file = path.display().to_string();
    let container = container::parse(&bytes, &file)?;
    if single::is_ours(&container) {
        return single::from_container(container, &file, opts.strict);
    }
    drop((container, bytes));
    peft::from_file(path, opts)
}

/// Checks shapes, dtypes and numbers of one pair of factors and returns their rank. `names` are the
/// keys that errors carry.
fn check_factors(a: &Tensor, b: &Tensor, names: [&str; 2], file: &str) -> Result<usize> {
    let (&[rank, inputs], &[outputs, columns]) = (&a.shape[..], &b.shape[..]) else {
        let (name, t) = if a.shape.len() == 2 { (names[1], b) } else { (names[0], a) };
        return Err(Error::format(
            file,
            format!("tensor {}: shape {:?}, expected two dimensions", show(name), t.shape),
        ));
    };
    for (name, t) in [(names[0], a), (names[1], b)] {
        if t.shape.contains(&0) {
            return Err(Error::format(
                file,
                format!("tensor {}: shape {:?}, expected no zero", show(name), t.shape),
            ));
        }
        if t.factor_dtype().is_none() {
            let reason = format!(
                "tensor {}: dtype {}, expected F32, F16 or BF16; convert it first",
                show(name),
                t.dtype
            );
            return Err(Error::unsupported(file, reason));
        }
    }
    if rank != columns {
        let reason = format!(
            "tensors {} {:?} and {} {:?}: expected (rank, {inputs}) and ({outputs}, rank) with one rank",
            show(names[0]),
            a.shape,
            show(names[1]),
            b.shape
        );
        return Err(Error::format(file, reason));
    }
    for (name, t) in [(names[0], a), (names[1], b)] {
        if !t.is_finite() {
            return Err(Error::format(file, format!("tensor {}: contains NaN or infinity", show(name))));
        }
    }
    Ok(rank)
}

impl AdapterParts {
    /// Checks what a writer relies on; errors name the module.
    fn check(&self) -> Result<()> {
        self.check_names()?;
        for m in &self.modules {
            let (a, b) = (format!("{}.lora_a", m.path), format!("{}.lora_b", m.path));
            for (name, t, want) in [(&a, &m.a, "(rank, in_features)"), (&b, &m.b, "(out_features, rank)")] {
                if t.shape.len() != 2 || t.shape.contains(&0) {
                    return Err(Error::shape(name, format!("{:?}", t.shape), want));
                }
                if t.factor_dtype().is_none() {
                    let (got, want) = (t.dtype.to_string(), "F32, F16 or BF16".into());
                    return Err(Error::Dtype { arg: name.clone(), got, want });
                }
                t.check_len()?;
                if !t.is_finite() {
                    return Err(Error::non_finite(name));
                }
            }
            if m.a.shape[0] != m.rank || m.b.shape[1] != m.rank {
                let got = format!("{:?} and {:?}", m.a.shape, m.b.shape);
                let want = format!("({0}, in_features) and (out_features, {0})", m.rank);
                return Err(Error::shape(format!("{a}, {b}"), got, want));
            }
        }
        self.check_json("config, metadata")
    }

    /// Paths must be names, each once, and alphas finite.
    fn check_names(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for m in &self.modules {
            if m.path.is_empty() || m.path.chars().any(char::is_control) {
                return Err(Error::config("module path", show(&m.path), "a name without control characters"));
            }
            if !seen.insert(m.path.as_str()) {
                return Err(Error::config("modules", format!("{} twice", show(&m.path)), "each module once"));
            }
            if !m.alpha.is_finite() {
                return Err(Error::config(format!("{}.alpha", m.path), m.alpha, "a finite number"));
            }
        }
        Ok(())
    }

    /// The JSON texts must be objects.
    fn check_json(&self, file: &str) -> Result<()> {
        let texts = [
            ("config", &self.config_json),
            ("metadata", &self.metadata_json),
            ("peft_config", &self.peft_config),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                json::parse_object(text).map_err(|e| Error::format(file, format!("{name}: {e}")))?;
            }
        }
        Ok(())
    }

    /// Gives extra tensors memory of their own, so that they do not keep the whole file's alive.
    fn detach_extra(&mut self) {
        for t in self.extra.iter_mut().filter(|t| !t.data.is_mapped()) {
            t.data = t.data.detach();
        }
    }
}
