//! What a GGUF file must hold to be an adapter, and what becomes of it here.

use std::collections::BTreeMap;

use super::super::fingerprint::{KEY, as_it_is};
use super::super::json::{StringMap, show};
use super::super::tensor::{Bytes, Tensor, TensorDtype};
use super::super::{AdapterParts, LoadOptions, Loaded, ModuleKind, ModuleParts, Variant, check_factors};
use super::super::{Along, FactorParts, QuantModuleParts};
use super::container::{self, BF16_TYPE, F16_TYPE, F32_TYPE, Info, PutTensor, Reader, Value};
use super::order::{self, Towards};
use crate::error::{Error, Result};
use crate::quant::{BlockType, dequantize_rows};

/// Kind of the variant of a file whose q and k lie in llama.cpp's order.
pub const ROW_ORDER: &str = "row_order";
pub(super) const ARCHITECTURE: &str = "general.architecture";
pub(super) const ALPHA: &str = "adapter.lora.alpha";
pub(super) const TOKENS: &str = "adapter.alora.invocation_tokens";
/// Texts that are kept and mean nothing to the numbers.
pub(super) const TEXTS: [&str; 2] = ["adapter.lora.task_name", "adapter.lora.prompt_prefix"];
const THEIR_NAMES: &str = "module names are llama.cpp's; base_config= gives the model's own";
const EMBEDDING: &str = "token_embd";

/// Reads an adapter; names and row order are those of llama.cpp.
pub(crate) fn from_bytes(bytes: &Bytes, file: &str, opts: &LoadOptions) -> Result<Loaded> {
    let wrong = |reason: String| Error::format(file, reason);
    let reader = Reader::new(bytes, file, &opts.limits)?;
    check_kind(&reader, file)?;
    let architecture = match reader.text(ARCHITECTURE)? {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => return Err(wrong(format!("no {ARCHITECTURE}: the base model's architecture is unknown"))),
    };
    let alpha = match reader.get(ALPHA) {
        None => 0.0,
        Some(Value::F32(alpha)) if alpha.is_finite() => f64::from(*alpha),
        Some(Value::F32(alpha)) => {
            return Err(wrong(format!("{ALPHA}: got {alpha}, expected a finite number")));
        }
        Some(v) => {
            let reason =
                format!("{ALPHA}: of type {}, expected f32 exactly (llama.cpp ends on any other)", v.kind());
            return Err(wrong(reason));
        }
    };
    let mut loaded = Loaded::default();
    ours(&reader, &mut loaded.parts, file)?;
    loaded.weights_sha256 = reader.text(KEY)?.map(str::to_owned);
    let header = &mut loaded.parts.header;
    header.insert(ARCHITECTURE.into(), architecture.clone());
    for key in TEXTS {
        if let Some(text) = reader.text(key)? {
            header.insert(key.into(), text.to_owned());
        }
    }
    if let Some(tokens) = reader.u32s(TOKENS)? {
        header.insert(TOKENS.into(), format!("{tokens:?}"));
        loaded.variants.push(Variant {
            kind: "alora".into(),
            at: TOKENS.into(),
            why: "an activated LoRA (aLoRA): its weights act only after its invocation tokens".into(),
        });
    }
    if alpha == 0.0 {
        loaded.notes.push(format!("no {ALPHA}, so every scaling is 1"));
    }
    let data = |info: &Info| bytes.slice(info.span.clone());
    Tensors { data: &data, file, opts }.modules(reader.infos()?, alpha, &mut loaded)?;
    let rotated = loaded.parts.modules.iter().find(|m| order::is_rotated(&m.path));
    match (rotated, order::interleaves(&architecture)) {
        (Some(m), None | Some(true)) => loaded.variants.push(Variant {
            kind: ROW_ORDER.into(),
            at: m.b.name.clone(),
            why: format!(
                "rows of q and k of architecture {} are in llama.cpp's order: pass base_config= for the model's own \
                 names and order, or names=\"gguf\" to keep llama.cpp's",
                show(&architecture)
            ),
        }),
        _ => loaded.notes.push(THEIR_NAMES.into()),
    }
    loaded.parts.check_json(file)?;
    loaded.parts.check_names().map_err(|e| wrong(e.to_string()))?;
    Ok(loaded)
}

/// Refuses models and adapters of other kinds.
fn check_kind(reader: &Reader, file: &str) -> Result<()> {
    let general = reader.text("general.type")?;
    if general != Some("adapter") {
        let what = general.map_or("no general.type".into(), |g| format!("general.type {}", show(g)));
        let of = match reader.text(ARCHITECTURE)? {
            Some(name) => format!(" of architecture {}", show(name)),
            None => String::new(),
        };
        let reason = format!(
            "a GGUF file of a whole model{of} ({what}, {} tensors), expected one of an adapter (general.type \"adapter\")",
            reader.tensors
        );
        return Err(Error::unsupported(file, reason));
    }
    match reader.text("adapter.type")? {
        Some("lora") => Ok(()),
        Some(other) => {
            Err(Error::unsupported(file, format!("adapter.type {}, expected \"lora\"", show(other))))
        }
        None => Err(Error::format(file, "no adapter.type, expected \"lora\"")),
    }
}

/// Our own settings, where we wrote the file.
fn ours(reader: &Reader, parts: &mut AdapterParts, file: &str) -> Result<()> {
    let text = |name: &str| Ok::<_, Error>(reader.text(&format!("microlora.{name}"))?.map(str::to_owned));
    parts.config_json = text("config")?;
    parts.metadata_json = text("metadata")?;
    parts.peft_config = text("peft_config")?;
    parts.prefix = text("prefix")?;
    if let Some(header) = text("header")? {
        let map: StringMap = serde_json::from_str(&header)
            .map_err(|e| Error::format(file, format!("key microlora.header: {e}")))?;
        parts.header.extend(map.0);
    }
    Ok(())
}

/// The two factors of one base tensor.
type Pair = [Option<Info>; 2];

struct Tensors<'a> {
    /// The bytes of a tensor; none where they lie outside of the file.
    data: &'a dyn Fn(&Info) -> Option<Bytes>,
    file: &'a str,
    opts: &'a LoadOptions,
}

impl Tensors<'_> {
    fn modules(&self, infos: Vec<Info>, alpha: f64, loaded: &mut Loaded) -> Result<()> {
        let mut quantized = Vec::new();
        let mut pairs: Vec<(String, Pair)> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        for info in infos {
            let (base, side) = match (info.name.strip_suffix(".lora_a"), info.name.strip_suffix(".lora_b")) {
                (Some(base), _) => (base, 0),
                (None, Some(base)) => (base, 1),
                (None, None) if info.name.ends_with("_norm.weight") => {
                    self.norm(info, loaded)?;
                    continue;
                }
                (None, None) => {
                    let reason = format!(
                        "tensor {}: expected a name that ends in .lora_a, .lora_b or _norm.weight",
                        show(&info.name)
                    );
                    return Err(Error::format(self.file, reason));
                }
            };
            let Some(path) = base.strip_suffix(".weight").filter(|p| !p.is_empty()) else {
                let reason =
                    format!("tensor {}: expected <base tensor>.weight before its suffix", show(&info.name));
                return Err(Error::format(self.file, reason));
            };
            let at = *places.entry(path.to_owned()).or_insert_with(|| {
                pairs.push((path.to_owned(), Pair::default()));
                pairs.len() - 1
            });
            pairs[at].1[side] = Some(info);
        }
        for (path, pair) in pairs {
            let (module, blocks) = match pair {
                [Some(a), Some(b)] => self.module(path, a, b, alpha)?,
                [a, b] => {
                    let have = a.or(b).map(|info| info.name).unwrap_or_default();
                    let lacks = if have.ends_with("a") { "lora_b" } else { "lora_a" };
                    let reason = format!("tensor {}: without its {lacks}", show(&have));
                    return Err(Error::format(self.file, reason));
                }
            };
            if module.kind != ModuleKind::Linear {
                loaded.variants.push(Variant {
                    kind: module.kind.as_str().into(),
                    at: module.path.clone(),
                    why: format!("LoRA on {} layers is kept in files and not run here", module.kind.as_str()),
                });
            }
            quantized.push(quantised(&module, blocks));
            loaded.parts.modules.push(module);
        }
        let has_blocks = |m: &QuantModuleParts| m.a.is_blocks() || m.b.is_blocks();
        if quantized.iter().any(has_blocks) {
            loaded.quantized = Some(quantized);
        }
        if loaded.parts.modules.is_empty() {
            return Err(Error::format(self.file, "an adapter without a pair of factors"));
        }
        Ok(())
    }

    /// A whole normalisation weight, which llama.cpp accepts and ignores.
    fn norm(&self, info: Info, loaded: &mut Loaded) -> Result<()> {
        let dtype = plain(info.kind).ok_or_else(|| {
            Error::unsupported(self.file, format!("tensor {}: a norm in blocks", show(&info.name)))
        })?;
        loaded.variants.push(Variant {
            kind: "modules_to_save".into(),
            at: info.name.clone(),
            why: "a whole weight of the base, which llama.cpp accepts and ignores".into(),
        });
        let tensor = Tensor::new(info.name.clone(), dtype, info.shape.clone(), self.data(&info)?.detach())?;
        loaded.parts.extra.push(tensor);
        Ok(())
    }

    /// A module with its numbers, and the blocks that its factors lie in.
    fn module(&self, path: String, a: Info, b: Info, alpha: f64) -> Result<(ModuleParts, Blocks)> {
        let names = [a.name.clone(), b.name.clone()];
        let (mut a, blocks_a) = self.tensor(a, &path)?;
        let (b, blocks_b) = self.tensor(b, &path)?;
        let mut kind = ModuleKind::Linear;
        if path == EMBEDDING {
            kind = ModuleKind::Embedding;
            a = transposed(&a)?;
        } else if a.shape.len() == 3 && b.shape.len() == 3 {
            kind = ModuleKind::Experts;
        }
        let names = [names[0].as_str(), names[1].as_str()];
        let rank = check_factors(kind, &a, &b, names, self.file).map_err(|e| self.hint(e, &a, &b))?;
        self.opts.limits.check_rank(rank, &show(&path), self.file)?;
        // Without an alpha llama.cpp scales by one.
        let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
        Ok((ModuleParts { path, kind, alpha, rank, use_rslora: false, a, b }, [blocks_a, blocks_b]))
    }

    /// Says so where a factor lies the other way round.
    fn hint(&self, error: Error, a: &Tensor, b: &Tensor) -> Error {
        match (&a.shape[..], &b.shape[..], error) {
            (&[_, ra], &[_, rb], Error::Format { file, reason }) if ra == rb => {
                Error::Format { file, reason: format!("{reason}; the first is transposed") }
            }
            (&[ra, _], &[rb, _], Error::Format { file, reason }) if ra == rb => {
                Error::Format { file, reason: format!("{reason}; the second is transposed") }
            }
            (_, _, error) => error,
        }
    }

    fn data(&self, info: &Info) -> Result<Bytes> {
        let outside =
            || Error::format(self.file, format!("tensor {}: outside of the file", show(&info.name)));
        (self.data)(info).ok_or_else(outside)
    }

    /// A factor; blocks are expanded to f32 beside them, and a vector is a matrix of one row.
    fn tensor(&self, info: Info, path: &str) -> Result<(Tensor, Option<FactorParts>)> {
        let data = self.data(&info)?;
        let name = info.name[info.name.len() - "lora_a".len()..].to_owned();
        let mut shape = info.shape;
        if shape.len() == 1 {
            shape.insert(0, 1); // ggml drops outer dimensions of 1
        }
        if shape.len() > 3 {
            let reason =
                format!("tensor {}: shape {shape:?}, expected two or three dimensions", show(&info.name));
            return Err(Error::format(self.file, reason));
        }
        let name = format!("{path}.{name}");
        if let Some(dtype) = plain(info.kind) {
            return Ok((Tensor::new(name, dtype, shape, data)?, None));
        }
        let Some(kind) = BlockType::from_ggml(info.kind) else {
            let reason = format!("tensor {}: type {}", show(&info.name), container::type_name(info.kind));
            return Err(Error::unsupported(self.file, reason));
        };
        let columns = shape[shape.len() - 1];
        let rows = shape[..shape.len() - 1].iter().product();
        let numbers = dequantize_rows(kind, &show(&info.name), &data, rows, columns)
            .map_err(|e| Error::format(self.file, e.to_string()))?;
        let bytes: Vec<u8> = numbers.iter().flat_map(|v| v.to_le_bytes()).collect();
        let along = along(path == EMBEDDING, name.ends_with("lora_a"));
        let blocks = FactorParts::Blocks { kind, along, rows, cols: columns, data };
        Ok((Tensor::new(name, TensorDtype::F32, shape, bytes)?, Some(blocks)))
    }
}

/// Which way blocks lie in a GGUF file: along its last dimension.
pub(super) fn along(embedding: bool, is_a: bool) -> Along {
    if is_a && !embedding { Along::Features } else { Along::Rank }
}

/// The fingerprint that [`from_bytes`] would find in a file of these tensors.
pub(super) fn fingerprint(tensors: &[PutTensor], alpha: f32) -> Result<String> {
    let mut start = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    let mut places = BTreeMap::new();
    for t in tensors {
        let span = start..start + t.data.len();
        start = span.end;
        places.insert(span.start, &t.data);
        infos.push(Info { name: t.name.clone(), shape: t.shape.clone(), kind: t.kind, span });
    }
    let data = |info: &Info| places.get(&info.span.start).map(|data| (*data).clone());
    let mut loaded = Loaded::default();
    let tensors = Tensors { data: &data, file: "GGUF", opts: &as_it_is() };
    tensors.modules(infos, f64::from(alpha), &mut loaded)?;
    loaded.fingerprint()
}

/// Blocks of A and of B, where they are in blocks.
type Blocks = [Option<FactorParts>; 2];

/// The module as it runs without expansion.
fn quantised(m: &ModuleParts, [a, b]: Blocks) -> QuantModuleParts {
    let or =
        |blocks: Option<FactorParts>, t: &Tensor| blocks.unwrap_or_else(|| FactorParts::Plain(t.clone()));
    QuantModuleParts {
        path: m.path.clone(),
        kind: m.kind,
        alpha: m.alpha,
        rank: m.rank,
        use_rslora: m.use_rslora,
        a: or(a, &m.a),
        b: or(b, &m.b),
    }
}

/// The dtype of numbers that are no blocks.
fn plain(kind: u32) -> Option<TensorDtype> {
    match kind {
        F32_TYPE => Some(TensorDtype::F32),
        F16_TYPE => Some(TensorDtype::F16),
        BF16_TYPE => Some(TensorDtype::BF16),
        _ => None,
    }
}

/// A matrix turned; its bits stay what they are.
pub(super) fn transposed(t: &Tensor) -> Result<Tensor> {
    let &[rows, columns] = &t.shape[..] else {
        return Err(Error::shape(&t.name, format!("{:?}", t.shape), "two dimensions"));
    };
    let size = t.data.len() / (rows * columns).max(1);
    let mut data = vec![0; t.data.len()];
    for r in 0..rows {
        for c in 0..columns {
            data[(c * rows + r) * size..][..size]
                .copy_from_slice(&t.data[(r * columns + c) * size..][..size]);
        }
    }
    Tensor::new(t.name.clone(), t.dtype, vec![columns, rows], data)
}

/// A module's place in the model: its path there, and its heads where rows of `lora_b` were reordered.
pub type Place = (String, Option<usize>);

/// Gives modules the names and the row order of the model, by their names in the file.
///
/// # Errors
/// A module without a place, heads that do not divide the rows, or two modules at one place.
pub fn translate(mut loaded: Loaded, places: &BTreeMap<String, Place>, file: &str) -> Result<Loaded> {
    let place = |path: &str| {
        let none = || format!("module {}: no module of the base (base_config) has that tensor", show(path));
        places.get(path).ok_or_else(|| Error::format(file, none()))
    };
    for m in &mut loaded.parts.modules {
        let (path, heads) = place(&m.path)?;
        let rows = m.b.shape[m.b.shape.len() - 2];
        put_back(&mut m.b.data, rows, *heads, &m.path, file)?;
        m.path.clone_from(path);
        m.a.name = format!("{path}.lora_a");
        m.b.name = format!("{path}.lora_b");
    }
    for m in loaded.quantized.iter_mut().flatten() {
        let (path, heads) = place(&m.path)?;
        match &mut m.b {
            FactorParts::Plain(t) => {
                let rows = t.shape[t.shape.len() - 2];
                put_back(&mut t.data, rows, *heads, &m.path, file)?
            }
            FactorParts::Blocks { rows, data, .. } => put_back(data, *rows, *heads, &m.path, file)?,
        }
        m.path.clone_from(path);
    }
    for v in &mut loaded.variants {
        if let Some((path, _)) = places.get(&v.at) {
            v.at.clone_from(path);
        }
    }
    loaded.parts.header.remove(ARCHITECTURE);
    loaded.notes.retain(|n| n != THEIR_NAMES);
    loaded.weights_sha256 = None; // it is of the file's names and order
    loaded.variants.retain(|v| v.kind != ROW_ORDER);
    loaded.parts.check_names().map_err(|e| Error::format(file, e.to_string()))?;
    Ok(loaded)
}

/// Puts the rows of a `lora_b` back into the model's order; rows of blocks move whole.
fn put_back(data: &mut Bytes, rows: usize, heads: Option<usize>, path: &str, file: &str) -> Result<()> {
    if let Some(heads) = heads {
        let name = format!("{file}: {path}.lora_b");
        *data = order::reorder(data, data.len() / rows.max(1), heads, Towards::Model, &name)?.into();
    }
    Ok(())
}

/// Takes llama.cpp's names and order as they are.
pub fn keep_names(mut loaded: Loaded) -> Loaded {
    loaded.variants.retain(|v| v.kind != ROW_ORDER);
    loaded
}
