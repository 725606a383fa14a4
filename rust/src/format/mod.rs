//! Adapter files: PEFT directories and our single file, read and written without loss, failing closed.
//!
//! What changes the maths and is not run here is [`Error::Unsupported`], what is broken is
//! [`Error::Format`]; both name the file and the tensor or key. Pickle is never opened.

pub(crate) mod atomic;
mod budget;
mod bytes;
pub(crate) mod container;
mod diffusers;
mod fingerprint;
mod flat;
pub mod gguf;
pub(crate) mod json;
mod kohya;
mod limits;
mod mlx;
mod npz;
mod pairs;
pub(crate) mod pattern;
pub mod peft;
mod quantized;
mod runs;
pub mod scan;
pub(crate) mod shards;
mod single;
mod source;
mod styles;
mod table;
pub mod tensor;
mod zip;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

pub use container::{MAX_DIMS, MAX_HEADER, MAX_TENSORS};
pub use kohya::resolve as resolve_names;
pub use limits::Limits;
pub use peft::{PeftOptions, save_peft};
pub use quantized::{Along, FactorParts, QUANTIZED_VERSION, QuantModuleParts};
pub use quantized::{quantized_from_bytes, quantized_to_bytes, save_quantized};
pub use runs::variant_kinds;
pub use single::{
    FORMAT, FORMAT_VERSION, from_bytes, read_bytes, save_single, save_single_as_read, to_bytes,
};
pub use styles::{STYLES, Style, losses, save_style};
pub use table::{FORMATS, Row};
pub use tensor::{Bytes, Tensor, TensorDtype};

pub(crate) use fingerprint::{Digests, fingerprint};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use json::show;

/// What kind of layer a pair of factors adapts, which says how its tensors lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModuleKind {
    /// A (rank, in_features), B (out_features, rank): the only kind that is run here.
    #[default]
    Linear,
    /// A (rank, num_embeddings), B (dim, rank); the delta of the table is `s (B A)^T`.
    Embedding,
    /// A (rank, in_channels, kernel ...), B (out_channels, rank, 1 ...).
    Conv,
    /// One pair per expert: A (experts, rank, in_features), B (experts, out_features, rank).
    Experts,
}

impl ModuleKind {
    /// Name in messages and in `drop:<kind>`.
    pub const fn as_str(self) -> &'static str {
        match self {
            ModuleKind::Linear => "linear",
            ModuleKind::Embedding => "embedding",
            ModuleKind::Conv => "conv",
            ModuleKind::Experts => "experts",
        }
    }

    fn is_linear(&self) -> bool {
        *self == ModuleKind::Linear
    }

    /// Dimensions that its factors may have.
    const fn dims(self) -> std::ops::RangeInclusive<usize> {
        match self {
            ModuleKind::Linear | ModuleKind::Embedding => 2..=2,
            ModuleKind::Experts => 3..=3,
            ModuleKind::Conv => 3..=5,
        }
    }

    /// Rank of a pair of factors, `None` where the two do not fit. A grouped convolution has fewer
    /// columns than ranks.
    fn rank_of(self, a: &[usize], b: &[usize]) -> Option<usize> {
        if a.len() != b.len() || !self.dims().contains(&a.len()) {
            return None;
        }
        match self {
            ModuleKind::Linear | ModuleKind::Embedding => (a[0] == b[1]).then_some(a[0]),
            ModuleKind::Conv => (b[1] > 0 && a[0].is_multiple_of(b[1])).then_some(a[0]),
            ModuleKind::Experts => (a[0] == b[0] && a[1] == b[2]).then_some(a[1]),
        }
    }
}

/// One adapted layer as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct ModuleParts {
    /// Short name or full module path, without PEFT's prefix.
    pub path: String,
    /// Kind of layer; shapes below are those of a linear one.
    pub kind: ModuleKind,
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

/// Which way factors lie in a file that does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// A (rank, in), B (out, rank), as PEFT.
    RankFirst,
    /// A (in, rank), B (rank, out), as MLX.
    RankLast,
}

/// Something in a file that is not plain LoRA on linear layers: kept, and not run.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Short name, the `<kind>` of `drop:<kind>`.
    pub kind: String,
    /// Tensor, module or setting that shows it.
    pub at: String,
    /// What it changes, and the way out.
    pub why: String,
}

/// How to load.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadOptions {
    /// Map the file instead of copying it: the tensors are then pages of the file (see
    /// [`crate::mapping::Mapping`] for what that asks of everybody who writes it).
    pub mmap: bool,
    /// Refuse unused tensors and unknown settings; otherwise they are listed, and tensors kept in `extra`.
    /// Variants that change the maths are refused either way.
    pub strict: bool,
    /// What a file may ask for.
    pub limits: Limits,
    /// Scaling numerator, for formats that have none.
    pub alpha: Option<f64>,
    /// Which way factors lie, for formats that do not say.
    pub orientation: Option<Orientation>,
    /// Factors are put in the kernels' order as they are read, which an adapter then shares; whoever wants their
    /// bits as the file has them pays for it.
    pub packed: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions {
            mmap: false,
            strict: true,
            limits: Limits::default(),
            alpha: None,
            orientation: None,
            packed: false,
        }
    }
}

/// A loaded file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// Name of its row in [`FORMATS`] (empty when it came from memory).
    pub format: &'static str,
    /// The content.
    pub parts: AdapterParts,
    /// Modules of which a factor or more is blocks: all of them, in order. `parts` then have the same ones,
    /// expanded, or none before [`Loaded::expanded`].
    pub quantized: Option<Vec<QuantModuleParts>>,
    /// What is not plain LoRA on linear layers; an adapter without it is another one.
    pub variants: Vec<Variant>,
    /// Tensors and settings that nothing uses (empty when strict).
    pub unused: Vec<String>,
    /// What is worth knowing and no error: pattern keys that match nothing, a transposed base layer.
    pub notes: Vec<String>,
    /// The fingerprint that the file says its weights have; [`Loaded::fingerprint`] is what they have.
    pub weights_sha256: Option<String>,
}

/// Reads whatever adapter lies at a path, variants included. The content decides, not the name.
///
/// # Errors
/// A file that is broken, ambiguous, beyond the limits or of no known format.
pub fn read(path: &Path, opts: &LoadOptions) -> Result<Loaded> {
    table::read(source::Source::open(path, opts)?, opts)
}

/// [`read`], for use: what is not plain LoRA on linear layers is refused.
///
/// # Errors
/// Those of [`read`], and the first variant.
pub fn load(path: &Path, opts: &LoadOptions) -> Result<Loaded> {
    load_without(path, opts, &[])
}

/// [`load`], without the variants that are dropped by name (`drop:<kind>`).
///
/// # Errors
/// Those of [`read`], and the first variant that is left.
pub fn load_without(path: &Path, opts: &LoadOptions, allow: &[String]) -> Result<Loaded> {
    let loaded = read(path, &LoadOptions { packed: true, ..*opts })?;
    loaded.check_plain(&path.display().to_string())?;
    loaded.runnable(&path.display().to_string(), allow)
}

/// What in these parts is not plain LoRA on linear layers, as a PEFT file of them would show it.
///
/// # Errors
/// A PEFT configuration among them that is broken.
pub fn peft_variants(parts: &AdapterParts) -> Result<Vec<Variant>> {
    peft::variants::of(parts, peft::CONFIG_FILE)
}

impl Loaded {
    /// SHA-256 of names, shapes, dtypes, scaling and data (64 hex digits), whatever the format; of factors in
    /// blocks, that of the blocks.
    ///
    /// # Errors
    /// Never, as long as memory is not a file that shrinks.
    pub fn fingerprint(&self) -> Result<String> {
        if let Some(modules) = &self.quantized {
            return fingerprint::of_blocks(modules, &self.parts.extra);
        }
        let modules = self.parts.modules.iter().map(|m| (m.path.as_str(), m));
        fingerprint(modules, &self.parts.extra, &mut Digests::default())
    }

    /// Refuses a quantised adapter where plain weights are wanted.
    ///
    /// # Errors
    /// A file of version 2.
    pub fn check_plain(&self, file: &str) -> Result<()> {
        match self.quantized {
            None => Ok(()),
            Some(_) if !self.parts.modules.is_empty() => Ok(()), // expanded beside the blocks
            Some(_) => Err(Error::unsupported(
                file,
                "a quantised adapter, expected plain weights: microlora.load(path).dequantize() gives them",
            )),
        }
    }
}

/// Checks shapes and dtypes of one pair of factors and returns their rank. `names` are the keys that errors carry.
fn check_shapes(kind: ModuleKind, a: &Tensor, b: &Tensor, names: [&str; 2], file: &str) -> Result<usize> {
    let both = [(names[0], a), (names[1], b)];
    for (name, t) in both {
        if !kind.dims().contains(&t.shape.len()) {
            let want = match kind {
                ModuleKind::Linear | ModuleKind::Embedding => "two dimensions",
                ModuleKind::Conv => "three to five dimensions",
                ModuleKind::Experts => "three dimensions",
            };
            return Err(Error::format(
                file,
                format!("tensor {}: shape {:?}, expected {want}", show(name), t.shape),
            ));
        }
    }
    for (name, t) in both {
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
    let Some(rank) = kind.rank_of(&a.shape, &b.shape) else {
        let reason = format!(
            "tensors {} {:?} and {} {:?}: expected {} with one rank",
            show(names[0]),
            a.shape,
            show(names[1]),
            b.shape,
            match kind {
                ModuleKind::Linear | ModuleKind::Embedding =>
                    format!("(rank, {}) and ({}, rank)", a.shape[1], b.shape[0]),
                ModuleKind::Conv => "(rank, in, kernel) and (out, rank or a part of it, 1)".to_owned(),
                ModuleKind::Experts => "(experts, rank, in) and (experts, out, rank)".to_owned(),
            }
        );
        return Err(Error::format(file, reason));
    };
    Ok(rank)
}

/// Checks one pair of factors as [`check_shapes`], and its numbers.
fn check_factors(kind: ModuleKind, a: &Tensor, b: &Tensor, names: [&str; 2], file: &str) -> Result<usize> {
    let rank = check_shapes(kind, a, b, names, file)?;
    for (name, t) in [(names[0], a), (names[1], b)] {
        if !t.is_finite() {
            return Err(not_finite(name, file));
        }
    }
    Ok(rank)
}

/// [`check_factors`] of what may not have been read yet: it is now, where that is asked for in the kernels' order.
fn take_factors(
    kind: ModuleKind,
    a: &mut Tensor,
    b: &mut Tensor,
    names: [&str; 2],
    file: &str,
    opts: &LoadOptions,
) -> Result<usize> {
    let rank = check_shapes(kind, a, b, names, file)?;
    for (name, t, transposed) in [(names[0], a, false), (names[1], b, true)] {
        let finite = match opts.packed && kind == ModuleKind::Linear {
            true => t.pack(transposed),
            false => t.data.settle().map(|()| t.is_finite()),
        };
        if !finite.map_err(|e| unread(name, &e, file))? {
            return Err(not_finite(name, file));
        }
    }
    Ok(rank)
}

fn not_finite(name: &str, file: &str) -> Error {
    Error::format(file, format!("tensor {}: contains NaN or infinity", show(name)))
}

/// A header that could not be read: a file cut off meanwhile is broken, anything else is the system's error.
fn unread_head(e: std::io::Error, file: &str) -> Error {
    match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::format(file, "truncated while it was read"),
        _ => Error::io(file, e),
    }
}

/// A tensor that could not be read, as the file changed or its disk failed.
fn unread(name: &str, e: &std::io::Error, file: &str) -> Error {
    Error::format(file, format!("tensor {}: could not be read: {e}", show(name)))
}

/// A path must be a name that did not come before, its alpha finite.
fn check_name<'a>(path: &'a str, alpha: f64, seen: &mut HashSet<&'a str>) -> Result<()> {
    if path.is_empty() || path.chars().any(char::is_control) {
        return Err(Error::config("module path", show(path), "a name without control characters"));
    }
    if !seen.insert(path) {
        return Err(Error::config("modules", format!("{} twice", show(path)), "each module once"));
    }
    if !alpha.is_finite() {
        return Err(Error::config(format!("{path}.alpha"), alpha, "a finite number"));
    }
    Ok(())
}

impl AdapterParts {
    /// Checks what a writer relies on; errors name the module.
    pub(crate) fn check(&self) -> Result<()> {
        self.check_names()?;
        for m in &self.modules {
            let (a, b) = (format!("{}.lora_a", m.path), format!("{}.lora_b", m.path));
            for (name, t, want) in [(&a, &m.a, "(rank, in_features)"), (&b, &m.b, "(out_features, rank)")] {
                if !m.kind.dims().contains(&t.shape.len()) || t.shape.contains(&0) {
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
            if m.kind.rank_of(&m.a.shape, &m.b.shape) != Some(m.rank) {
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
        self.modules.iter().try_for_each(|m| check_name(&m.path, m.alpha, &mut seen))
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
                json::check_object(text).map_err(|e| Error::format(file, format!("{name}: {e}")))?;
            }
        }
        Ok(())
    }

    /// Header entries to write beside ours: what was read as the hash of these weights is none of others.
    fn header_without_hash(&self) -> BTreeMap<String, String> {
        let mut header = self.header.clone();
        header.retain(|key, _| key != fingerprint::KEY && key != fingerprint::OUR_KEY);
        header
    }

    /// Gives extra tensors memory of their own, so that they do not keep the whole file's alive.
    fn detach_extra(&mut self) {
        for t in self.extra.iter_mut().filter(|t| !t.data.is_mapped()) {
            t.data = t.data.detach();
        }
    }
}
