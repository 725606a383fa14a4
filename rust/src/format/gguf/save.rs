//! Writing a GGUF adapter that llama.cpp loads, refusing before anything is written what it would refuse.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::super::fingerprint::KEY;
use super::super::json::{show, show_list};
use super::super::tensor::{Tensor, TensorDtype};
use super::super::{AdapterParts, Along, FactorParts, ModuleKind, ModuleParts, QuantModuleParts, atomic};
use super::adapter::{ALPHA, ARCHITECTURE, TEXTS, TOKENS, along as adapter_along, fingerprint, transposed};
use super::container::{self, ALIGNMENT, MAX_NAME, Put, PutTensor};
use super::encode::{Encoded, Encoding, encode};
use super::order::{self, Towards};
use crate::error::{Error, Result};

/// A module's place in a base model: the tensor it adapts, and its heads where rows are to be reordered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Full name of the base tensor, such as `blk.0.attn_q.weight`.
    pub tensor: String,
    /// Heads whose rows llama.cpp interleaves.
    pub heads: Option<usize>,
}

/// How to write.
#[derive(Clone, Debug)]
pub struct GgufOptions<'a> {
    /// Architecture of the base model, as GGUF names it.
    pub architecture: &'a str,
    /// Place of each module, by its path; modules without one are left out.
    pub targets: &'a BTreeMap<String, Target>,
    /// Type of the tensors.
    pub encoding: Encoding,
    /// Tokens after which an activated LoRA acts.
    pub tokens: Option<&'a [u32]>,
    /// Modules of which factors are blocks; those that fit go out byte for byte.
    pub quantized: &'a [QuantModuleParts],
    /// Whether blocks that do not fit are written as numbers; otherwise they are refused, except as f32 that was
    /// asked for.
    pub drop_blocks: bool,
}

/// Writes one file, whole or not at all; returns notes. `tick` is called with modules done and in all.
///
/// # Errors
/// Whatever llama.cpp would refuse, numbers that the type cannot hold, `tick`'s own error, or a full disk.
pub fn save(
    path: &Path,
    parts: &AdapterParts,
    opts: &GgufOptions,
    tick: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<String>> {
    parts.check()?;
    let modules = placed(parts, opts.targets);
    if modules.is_empty() {
        return Err(Error::config("adapter", "no modules", "at least one for a GGUF file"));
    }
    check_names(&modules)?;
    let alpha = common_alpha(modules.iter().map(|(m, _)| *m))?;
    let blocks = blocks_of(opts.quantized);
    let mut notes = Notes::default();
    let mut tensors = Vec::with_capacity(2 * modules.len());
    for (done, (m, target)) in modules.iter().enumerate() {
        tick(done, modules.len())?;
        let times = share(m, alpha);
        let [in_a, in_b] = blocks.get(m.path.as_str()).map_or([None, None], |q| [Some(&q.a), Some(&q.b)]);
        let a = if m.kind == ModuleKind::Embedding { &transposed(&m.a)? } else { &m.a };
        let a = factor(m, true, a, in_a, opts, 1.0, None)?;
        let b = if let Some(heads) = target.heads { &reordered(m, heads)? } else { &m.b };
        let b = factor(m, false, b, in_b, opts, times, target.heads)?;
        notes.add(m, times, [&a.0, &b.0]);
        for ((e, shape), suffix) in [a, b].into_iter().zip(["lora_a", "lora_b"]) {
            let name = format!("{}.{suffix}", target.tensor);
            tensors.push(PutTensor { name, shape, kind: e.kind, data: e.data });
        }
    }
    tick(modules.len(), modules.len())?;
    let blocks = tensors.iter().any(|t| ![0, 1, 30].contains(&t.kind));
    let header_text = serde_json::json!(other_header(parts)).to_string();
    let sha256 = fingerprint(&tensors, alpha as f32)?;
    let mut keys = keys(parts, opts, alpha as f32, blocks, &header_text);
    keys.push((KEY, Put::Text(&sha256)));
    let header = container::header(&keys, &tensors);
    atomic::write(path, |out| {
        out.write_all(&header)?;
        tensors.iter().try_for_each(|t| {
            out.write_all(&t.data)?;
            let pad = t.data.len().next_multiple_of(ALIGNMENT) - t.data.len();
            out.write_all(&[0; ALIGNMENT][..pad])
        })
    })?;
    Ok(notes.into_texts(opts.encoding))
}

fn blocks_of(modules: &[QuantModuleParts]) -> BTreeMap<&str, &QuantModuleParts> {
    modules.iter().map(|m| (m.path.as_str(), m)).collect()
}

/// Why a factor's blocks cannot go out as they are; `None` where they can, or where there are none.
fn misfit(
    m: &ModuleParts,
    is_a: bool,
    blocks: &FactorParts,
    encoding: Encoding,
    times: f64,
) -> Option<String> {
    let FactorParts::Blocks { kind, along, .. } = blocks else { return None };
    if *along != adapter_along(m.kind == ModuleKind::Embedding, is_a) {
        let lies = if *along == Along::Features { "along the features" } else { "along the rank" };
        return Some(format!("{kind} {lies}, where GGUF has them the other way"));
    }
    if times != 1.0 {
        return Some(format!("{kind}, which a scaling that is folded in would change (one alpha per file)"));
    }
    match encoding {
        Encoding::Auto => None,
        Encoding::Blocks(wanted) if wanted == *kind => None,
        _ => Some(format!("{kind}, where dtype asks for another type")),
    }
}

/// Factors whose blocks would be lost, each with the reason.
///
/// # Errors
/// Those of [`common_alpha`].
pub fn lost_blocks(
    modules: &[ModuleParts],
    quantized: &[QuantModuleParts],
    encoding: Encoding,
) -> Result<Vec<String>> {
    if encoding == Encoding::Plain(TensorDtype::F32) {
        return Ok(Vec::new()); // asked for, and exact
    }
    let alpha = common_alpha(modules.iter())?;
    let blocks = blocks_of(quantized);
    let mut lost = Vec::new();
    for m in modules {
        let Some(q) = blocks.get(m.path.as_str()) else { continue };
        for (name, is_a, factor, times) in
            [("lora_a", true, &q.a, 1.0), ("lora_b", false, &q.b, share(m, alpha))]
        {
            let why = misfit(m, is_a, factor, encoding, times);
            lost.extend(why.map(|why| format!("{}.{name}: {why}", m.path)));
        }
    }
    Ok(lost)
}

/// One factor as it is written, with its shape: its blocks where they fit, else its numbers.
fn factor(
    m: &ModuleParts,
    is_a: bool,
    t: &Tensor,
    blocks: Option<&FactorParts>,
    opts: &GgufOptions,
    times: f64,
    heads: Option<usize>,
) -> Result<(Encoded, Vec<usize>)> {
    let shape = t.shape.clone();
    let Some(blocks @ FactorParts::Blocks { kind, rows, data, .. }) = blocks else {
        return Ok((encode(t, opts.encoding, times)?, shape));
    };
    let Some(why) = misfit(m, is_a, blocks, opts.encoding, times) else {
        let data = match heads {
            Some(heads) => order::reorder(data, data.len() / rows, heads, Towards::Llama, &t.name)?.into(),
            None => data.clone(),
        };
        let as_it_is = Encoded { kind: kind.ggml(), data, fell_back: false, rounded: false, opened: false };
        return Ok((as_it_is, shape));
    };
    if !opts.drop_blocks && opts.encoding != Encoding::Plain(TensorDtype::F32) {
        let reason = format!(
            "GGUF cannot hold these blocks ({}: {why}); allow=[\"drop:blocks\"] writes their numbers",
            show(&t.name)
        );
        return Err(Error::unsupported(show(&m.path), reason));
    }
    Ok((Encoded { opened: true, ..encode(t, opts.encoding, times)? }, shape))
}

fn reordered(m: &ModuleParts, heads: usize) -> Result<Tensor> {
    let row = m.b.data.len() / m.b.shape[0];
    let data = order::reorder(&m.b.data, row, heads, Towards::Llama, &m.b.name)?;
    Tensor::new(m.b.name.clone(), m.b.dtype, m.b.shape.clone(), data)
}

/// Kinds that the format has, and each base tensor once, with a name that ggml holds.
fn check_names(modules: &[(&ModuleParts, &Target)]) -> Result<()> {
    let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
    for (m, target) in modules {
        if m.kind == ModuleKind::Conv {
            return Err(Error::unsupported(&m.path, "GGUF adapters have no convolutions"));
        }
        let embeds = target.tensor == "token_embd.weight";
        if embeds != (m.kind == ModuleKind::Embedding) {
            let want = if embeds { "an embedding" } else { "no embedding" };
            let got = format!("a module of kind {}", m.kind.as_str());
            return Err(Error::config(&m.path, got, format!("{want} for {}", target.tensor)));
        }
        let longest = MAX_NAME - ".lora_a".len();
        if !target.tensor.ends_with(".weight") || target.tensor.len() > longest {
            let want = format!("<tensor>.weight of at most {longest} bytes");
            return Err(Error::config("tensor name", show(&target.tensor), want));
        }
        if let Some(first) = seen.insert(&target.tensor, &m.path) {
            let got = format!("{} for {} and {}", show(&target.tensor), show(first), show(&m.path));
            return Err(Error::config("tensor name", got, "each base tensor once"));
        }
    }
    Ok(())
}

/// Modules that have a place, with it.
fn placed<'a>(
    parts: &'a AdapterParts,
    targets: &'a BTreeMap<String, Target>,
) -> Vec<(&'a ModuleParts, &'a Target)> {
    parts.modules.iter().filter_map(|m| Some((m, targets.get(&m.path)?))).collect()
}

/// What alpha would be if the scaling were alpha / rank.
fn alpha_of(m: &ModuleParts) -> f64 {
    if m.use_rslora { m.alpha * (m.rank as f64).sqrt() } else { m.alpha }
}

/// The one alpha of the file, before it is rounded: the most frequent. Zero would be read as a scaling of one.
///
/// # Errors
/// An alpha that no f32 holds.
pub fn common_alpha<'a>(modules: impl Iterator<Item = &'a ModuleParts>) -> Result<f64> {
    let mut counts: Vec<(f64, usize)> = Vec::new();
    for m in modules {
        let alpha = alpha_of(m);
        if !(alpha as f32).is_finite() {
            return Err(Error::config(format!("{}.alpha", m.path), m.alpha, "a number that an f32 holds"));
        }
        if !(alpha as f32).is_normal() {
            continue;
        }
        match counts.iter_mut().find(|(have, _)| *have as f32 == alpha as f32) {
            Some((_, count)) => *count += 1,
            None => counts.push((alpha, 1)),
        }
    }
    let most = counts.iter().map(|(_, count)| *count).max().unwrap_or(0);
    Ok(counts.iter().find(|(_, count)| *count == most).map_or(1.0, |(alpha, _)| *alpha))
}

/// What `lora_b` is multiplied by, so that the common alpha gives the module's scaling.
fn share(m: &ModuleParts, alpha: f64) -> f64 {
    let own = alpha_of(m);
    if own as f32 == alpha as f32 { 1.0 } else { own / alpha }
}

/// Header entries of the source that are no keys of GGUF.
fn other_header(parts: &AdapterParts) -> BTreeMap<String, String> {
    let mut header = parts.header_without_hash();
    header.retain(|key, _| key != ARCHITECTURE && key != TOKENS && !TEXTS.contains(&key.as_str()));
    header
}

fn keys<'a>(
    parts: &'a AdapterParts,
    opts: &GgufOptions<'a>,
    alpha: f32,
    blocks: bool,
    header: &'a str,
) -> Vec<(&'a str, Put<'a>)> {
    let mut keys = vec![
        (ARCHITECTURE, Put::Text(opts.architecture)),
        ("general.type", Put::Text("adapter")),
        ("adapter.type", Put::Text("lora")),
        (ALPHA, Put::F32(alpha)),
    ];
    if blocks {
        keys.push(("general.quantization_version", Put::U32(2)));
    }
    if let Some(tokens) = opts.tokens {
        keys.push((TOKENS, Put::U32s(tokens)));
    }
    for key in TEXTS {
        if let Some(text) = parts.header.get(key) {
            keys.push((key, Put::Text(text)));
        }
    }
    let texts = [
        ("microlora.config", parts.config_json.as_deref()),
        ("microlora.metadata", parts.metadata_json.as_deref()),
        ("microlora.peft_config", parts.peft_config.as_deref()),
        ("microlora.prefix", parts.prefix.as_deref()),
        ("microlora.header", (header != "{}").then_some(header)),
    ];
    keys.extend(texts.into_iter().filter_map(|(key, text)| Some((key, Put::Text(text?)))));
    keys
}

/// What a caller should know of a file that was written.
#[derive(Default)]
struct Notes<'a> {
    folded: Vec<&'a str>,
    rounded: bool,
    fell_back: Vec<String>,
    opened: Vec<String>,
    alphas: BTreeSet<&'a str>,
}

impl<'a> Notes<'a> {
    fn add(&mut self, m: &'a ModuleParts, times: f64, factors: [&Encoded; 2]) {
        if times != 1.0 {
            self.folded.push(&m.path);
        } else if f64::from(alpha_of(m) as f32) != alpha_of(m) {
            self.alphas.insert(&m.path);
        }
        self.rounded |= factors.iter().any(|f| f.rounded);
        for (f, suffix) in factors.into_iter().zip(["lora_a", "lora_b"]) {
            if f.fell_back {
                self.fell_back.push(format!("{}.{suffix}", m.path));
            }
            if f.opened {
                self.opened.push(format!("{}.{suffix} ({})", m.path, container::type_name(f.kind)));
            }
        }
    }

    fn into_texts(self, encoding: Encoding) -> Vec<String> {
        let mut texts = Vec::new();
        if !self.folded.is_empty() {
            let how = if self.rounded { "rounded to the nearest f32" } else { "exactly" };
            let names = show_list(&self.folded);
            texts.push(format!(
                "one alpha per file: other scalings were folded into lora_b ({how}) of {names}"
            ));
        }
        if !self.alphas.is_empty() {
            let names: Vec<&str> = self.alphas.into_iter().collect();
            texts.push(format!("alpha was rounded to the nearest f32 for {}", show_list(&names)));
        }
        if !self.opened.is_empty() {
            texts.push(format!(
                "blocks that were written as numbers or other blocks: {}",
                show_list(&self.opened)
            ));
        }
        if let (Encoding::Blocks(kind), false) = (encoding, self.fell_back.is_empty()) {
            let of = kind.elements();
            let names = show_list(&self.fell_back);
            texts.push(format!("rows that are no whole blocks of {of} are f16 instead of {kind}: {names}"));
        }
        texts
    }
}
