//! Version 2 of our single file: an adapter of which a factor or more is quantised.
//!
//! As version 1, and: an entry of `modules` has `a` and `b` where that factor is blocks, `{"type", "shape",
//! "along"}`; its tensor is then U8 of shape (rows, bytes per row). Blocks lie along the last dimension of
//! `shape`: (rank, features) where `along` is `features`, (features, rank) where it is `rank`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::fingerprint::{OUR_KEY, UNKNOWN};
use super::json::{parse_list, show, show_list};
use super::limits::Limits;
use super::tensor::{Bytes, Tensor, TensorDtype};
use super::{
    AdapterParts, LoadOptions, Loaded, ModuleKind, ModuleParts, Variant, check_name, fingerprint, single,
};
use crate::error::{Error, Result};
use crate::quant::{BlockType, dequantize_rows};

/// The header's `format_version` of a quantised adapter.
pub const QUANTIZED_VERSION: u32 = 2;

/// Which way the blocks of a factor lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Along {
    /// Rows are the ranks.
    Features,
    /// Rows are the features, as `lora_b` of a GGUF file has them.
    Rank,
}

/// One factor as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub enum FactorParts {
    /// (rank, in_features) of A, (out_features, rank) of B; f32, f16 or bf16.
    Plain(Tensor),
    /// Blocks.
    Blocks {
        /// Their type.
        kind: BlockType,
        /// Which way they lie.
        along: Along,
        /// Rows of blocks.
        rows: usize,
        /// Numbers per row.
        cols: usize,
        /// The blocks, row after row.
        data: Bytes,
    },
}

/// One module of a quantised adapter as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantModuleParts {
    /// Short name or full module path.
    pub path: String,
    /// Kind of layer; a file of ours holds linear ones, one of GGUF experts and embeddings too.
    pub kind: ModuleKind,
    /// Scaling numerator.
    pub alpha: f64,
    /// Rank.
    pub rank: usize,
    /// Scaling alpha / sqrt(rank) instead of alpha / rank.
    pub use_rslora: bool,
    /// A.
    pub a: FactorParts,
    /// B.
    pub b: FactorParts,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlocksEntry {
    r#type: String,
    shape: [usize; 2],
    along: Along,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModuleEntry {
    path: String,
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    a: Option<BlocksEntry>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    b: Option<BlocksEntry>,
}

/// Writes a quantised adapter to one file, whole or not at all. `rest` is everything but its modules.
///
/// # Errors
/// Parts that do not fit together; the system's.
pub fn save_quantized(path: &Path, rest: &AdapterParts, modules: &[QuantModuleParts]) -> Result<()> {
    save_with(path, rest, modules, &[])
}

/// [`save_quantized`] of what was read, variants included.
///
/// # Errors
/// Those of [`save_quantized`].
pub(super) fn save_with(
    path: &Path,
    rest: &AdapterParts,
    modules: &[QuantModuleParts],
    variants: &[Variant],
) -> Result<()> {
    let file = path.display().to_string();
    with_layout(rest, modules, variants, Some(UNKNOWN), &file, |layout| {
        layout.stage_named(path, OUR_KEY, |_| fingerprint::of_blocks(modules, &rest.extra))?.commit()
    })
}

/// The file as bytes.
///
/// # Errors
/// Parts that do not fit together.
pub fn quantized_to_bytes(rest: &AdapterParts, modules: &[QuantModuleParts]) -> Result<Vec<u8>> {
    with_layout(rest, modules, &[], None, "bytes", |layout| {
        let mut out = Vec::with_capacity(layout.len());
        layout.write_to(&mut out).map_err(|e| Error::io("bytes", e))?;
        Ok(out)
    })
}

/// Reads what [`quantized_to_bytes`] wrote: `Loaded::quantized` is there.
///
/// # Errors
/// Bytes of anything else, a plain adapter's among them.
pub fn quantized_from_bytes(bytes: &[u8]) -> Result<Loaded> {
    let loaded = single::any_from_bytes(bytes, &LoadOptions::default())?;
    if loaded.quantized.is_none() {
        return Err(Error::format("bytes", "a plain adapter, expected a quantised one"));
    }
    Ok(loaded)
}

fn with_layout<R>(
    rest: &AdapterParts,
    modules: &[QuantModuleParts],
    variants: &[Variant],
    sha256: Option<&str>,
    file: &str,
    f: impl FnOnce(super::container::Layout<'_>) -> Result<R>,
) -> Result<R> {
    let mut rest = rest.clone();
    rest.modules.clear();
    rest.check()?;
    check_names(modules)?;
    let mut tensors = Vec::with_capacity(2 * modules.len());
    let mut entries = Vec::with_capacity(modules.len());
    for m in modules {
        if m.kind != ModuleKind::Linear {
            let got = format!("a module of kind {}", m.kind.as_str());
            return Err(Error::config(&m.path, got, "linear layers in a file of blocks"));
        }
        let mut entry = |which: &str, factor: &FactorParts| {
            let (tensor, entry) = to_file(format!("{}.{which}", m.path), factor)?;
            tensors.push(tensor);
            Ok::<_, Error>(entry)
        };
        let (a, b) = (entry("lora_a", &m.a)?, entry("lora_b", &m.b)?);
        let (path, rank, alpha, use_rslora) = (m.path.clone(), m.rank, m.alpha, m.use_rslora);
        check_shapes([&tensors[tensors.len() - 2], &tensors[tensors.len() - 1]], [&a, &b], rank)
            .map_err(|(name, got, want)| Error::shape(name, got, want))?;
        entries.push(ModuleEntry { path, rank, alpha, use_rslora, a, b });
    }
    let text =
        serde_json::to_string(&entries).map_err(|e| Error::format(file, format!("header: modules: {e}")))?;
    let tensors = tensors.iter().map(|t| (t.name.clone(), t)).collect();
    f(single::lay_out_with(&rest, variants, tensors, text, sha256.map(str::to_owned), file)?)
}

/// The tensor that holds a factor, and the header's entry for blocks.
fn to_file(name: String, factor: &FactorParts) -> Result<(Tensor, Option<BlocksEntry>)> {
    match factor {
        FactorParts::Plain(t) => Ok((Tensor { name, ..t.clone() }, None)),
        FactorParts::Blocks { kind, along, rows, cols, data } => {
            let width = kind.row_bytes(*cols).unwrap_or(0);
            let entry = BlocksEntry { r#type: kind.as_str().into(), shape: [*rows, *cols], along: *along };
            Ok((Tensor::new(name, TensorDtype::U8, vec![*rows, width], data.clone())?, Some(entry)))
        }
    }
}

/// What is wrong with the shapes of one module as `(tensor, got, wanted)`.
fn check_shapes(
    tensors: [&Tensor; 2],
    entries: [&Option<BlocksEntry>; 2],
    rank: usize,
) -> Result<(), (String, String, String)> {
    for (i, (t, entry)) in tensors.into_iter().zip(entries).enumerate() {
        let bad = |want: String| Err((t.name.clone(), format!("{} {:?}", t.dtype, t.shape), want));
        let Some(entry) = entry else {
            let plain = t.factor_dtype().is_some() && t.shape.len() == 2 && !t.shape.contains(&0);
            if !plain || t.shape[i] != rank {
                let shape = ["(rank, in_features)", "(out_features, rank)"][i];
                return bad(format!("F32, F16 or BF16 {shape} of rank {rank}"));
            }
            continue;
        };
        let Ok(kind) = entry.r#type.parse::<BlockType>() else {
            return Err((t.name.clone(), format!("type {}", show(&entry.r#type)), "a block type".into()));
        };
        let [rows, cols] = entry.shape;
        let of_rank = if entry.along == Along::Features { rows } else { cols };
        if of_rank != rank || rows == 0 {
            return Err((t.name.clone(), format!("({rows}, {cols})"), format!("blocks of rank {rank}")));
        }
        let Some(width) = kind.row_bytes(cols) else {
            let want = format!("rows of a multiple of {} numbers for {kind}", kind.elements());
            return Err((t.name.clone(), format!("({rows}, {cols})"), want));
        };
        if t.dtype != TensorDtype::U8 || t.shape != [rows, width] {
            return bad(format!("U8 [{rows}, {width}] for ({rows}, {cols}) of {kind}"));
        }
    }
    Ok(())
}

fn check_names(modules: &[QuantModuleParts]) -> Result<()> {
    let mut seen = std::collections::HashSet::new();
    modules.iter().try_for_each(|m| check_name(&m.path, m.alpha, &mut seen))
}

/// The modules of a header of version 2; takes their tensors out of `by_name`.
pub(super) fn modules(
    text: &str,
    by_name: &mut HashMap<String, Tensor>,
    limits: &Limits,
    file: &str,
) -> Result<Vec<QuantModuleParts>> {
    let wrong = |reason: String| Error::format(file, reason);
    let entries: Vec<ModuleEntry> =
        parse_list(text, by_name.len() / 2).map_err(|e| wrong(format!("header: modules: {e}")))?;
    let mut out = Vec::with_capacity(entries.len());
    for ModuleEntry { path, rank, alpha, use_rslora, a, b } in entries {
        limits.check_rank(rank, &show(&path), file)?;
        let mut take = |which: &str| {
            let name = format!("{path}.{which}");
            let missing = || wrong(format!("module {}: no tensor {}", show(&path), show(&name)));
            by_name.remove(&name).ok_or_else(missing)
        };
        let tensors = [take("lora_a")?, take("lora_b")?];
        check_shapes([&tensors[0], &tensors[1]], [&a, &b], rank)
            .map_err(|(name, got, want)| wrong(format!("tensor {}: {got}, expected {want}", show(&name))))?;
        let [ta, tb] = tensors;
        let (a, b) = (from_file(ta, a, file)?, from_file(tb, b, file)?);
        out.push(QuantModuleParts { path, kind: ModuleKind::Linear, alpha, rank, use_rslora, a, b });
    }
    check_names(&out).map_err(|e| wrong(e.to_string()))?;
    Ok(out)
}

fn from_file(t: Tensor, entry: Option<BlocksEntry>, file: &str) -> Result<FactorParts> {
    let wrong = |what: String| Error::format(file, format!("tensor {}: {what}", show(&t.name)));
    let Some(BlocksEntry { r#type, shape: [rows, cols], along }) = entry else {
        if !t.is_finite() {
            return Err(wrong("contains NaN or infinity".into()));
        }
        return Ok(FactorParts::Plain(t));
    };
    let kind: BlockType = r#type.parse().map_err(|e: Error| wrong(e.to_string()))?;
    if let Some(block) = kind.first_non_finite(&t.data) {
        return Err(wrong(format!("the scale of block {block} is NaN or infinity")));
    }
    Ok(FactorParts::Blocks { kind, along, rows, cols, data: t.data })
}

impl FactorParts {
    /// True for blocks.
    pub fn is_blocks(&self) -> bool {
        matches!(self, FactorParts::Blocks { .. })
    }

    /// The type of its numbers: a block type's name, or a dtype's.
    fn type_name(&self) -> String {
        match self {
            FactorParts::Plain(t) => t.dtype.to_string().to_lowercase(),
            FactorParts::Blocks { kind, .. } => kind.as_str().to_owned(),
        }
    }

    /// The matrix of a linear layer in PEFT's orientation, `ranked` at which of its axes the rank is.
    fn expanded(&self, name: &str, ranked: usize) -> Result<Tensor> {
        let (kind, along, rows, cols, data) = match self {
            FactorParts::Plain(t) => return Ok(Tensor { name: name.to_owned(), ..t.clone() }),
            FactorParts::Blocks { kind, along, rows, cols, data } => (kind, along, rows, cols, data),
        };
        let numbers = dequantize_rows(*kind, name, data, *rows, *cols)?;
        let lies = usize::from(*along == Along::Rank);
        let turned = |i: usize| numbers[i % rows * cols + i / rows];
        let (shape, bytes): (_, Vec<u8>) = match lies == ranked {
            true => (vec![*rows, *cols], numbers.iter().flat_map(|v| v.to_le_bytes()).collect()),
            false => (vec![*cols, *rows], (0..numbers.len()).flat_map(|i| turned(i).to_le_bytes()).collect()),
        };
        Tensor::new(name, TensorDtype::F32, shape, bytes)
    }
}

impl Loaded {
    /// With the numbers of every module beside its blocks.
    ///
    /// # Errors
    /// Blocks that are not those of their shape.
    pub fn expanded(mut self) -> Result<Self> {
        let Some(modules) = self.quantized.as_ref().filter(|_| self.parts.modules.is_empty()) else {
            return Ok(self);
        };
        let module = |m: &QuantModuleParts| {
            let a = m.a.expanded(&format!("{}.lora_a", m.path), 0)?;
            let b = m.b.expanded(&format!("{}.lora_b", m.path), 1)?;
            let QuantModuleParts { path, kind, alpha, rank, use_rslora, .. } = m.clone();
            Ok(ModuleParts { path, kind, alpha, rank, use_rslora, a, b })
        };
        self.parts.modules = modules.iter().map(module).collect::<Result<_>>()?;
        Ok(self)
    }

    /// Which factors are blocks, of which types; `None` where there are none.
    pub fn block_note(&self) -> Option<String> {
        let mut by_type: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for m in self.quantized.iter().flatten() {
            for (which, factor) in [("lora_a", &m.a), ("lora_b", &m.b)] {
                if factor.is_blocks() {
                    by_type.entry(factor.type_name()).or_default().push(format!("{}.{which}", m.path));
                }
            }
        }
        if by_type.is_empty() {
            return None;
        }
        let of = |(kind, names): (String, Vec<String>)| format!("{kind}: {}", show_list(&names));
        let types: Vec<String> = by_type.into_iter().map(of).collect();
        Some(format!("in blocks, and float32 in formats that have none: {}", types.join("; ")))
    }
}
