//! Our single file: safetensors with the side-car data in its header.
//!
//! Tensors `<module>.lora_a` (rank, in) and `<module>.lora_b` (out, rank), others under `extra.`. Header
//! entries: `format` = "microlora", `format_version`, `modules` (a JSON list of path, rank, alpha and
//! use_rslora, and `kind` of other than linear layers), and where there is one `config`, `metadata`, `peft_config`,
//! `prefix`, `header`, `variants` (what is not plain LoRA on linear layers), `weights_sha256`. The same
//! adapter always gives the same bytes, and they stand for it in equality, hashing and pickling.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::container::{self, Container, Layout};
use super::fingerprint::{OUR_KEY, UNKNOWN};
use super::json::{StringMap, parse_list, show, show_list};
use super::quantized::{self, QUANTIZED_VERSION};
use super::source::{Content, Source};
use super::tensor::{Bytes, Tensor};
use super::{
    AdapterParts, Digests, LoadOptions, Loaded, ModuleKind, ModuleParts, Variant, fingerprint, peft, source,
    take_factors, unread,
};
use crate::error::{Error, Result};

/// The header's `format`.
pub const FORMAT: &str = "microlora";
/// The header's `format_version` of a plain adapter; 2 is a quantised one, a newer one is refused.
pub const FORMAT_VERSION: u32 = 1;
const EXTRA: &str = "extra.";
/// Most variants that a header may list.
const MAX_VARIANTS: usize = 1 << 14;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModuleEntry {
    path: String,
    rank: usize,
    alpha: f64,
    use_rslora: bool,
    /// Absent for linear layers.
    #[serde(default, skip_serializing_if = "ModuleKind::is_linear")]
    kind: ModuleKind,
}

/// Writes an adapter to one file, whole or not at all.
pub fn save_single(path: &Path, parts: &AdapterParts) -> Result<()> {
    save_named(path, parts, &[])
}

/// [`save_single`] of what was read, variants included: reading it back gives the same ones. Factors in blocks
/// stay blocks (version 2) where all modules are linear layers and not `expand`.
pub fn save_single_as_read(path: &Path, loaded: &Loaded, expand: bool) -> Result<()> {
    match &loaded.quantized {
        Some(modules) if !expand && modules.iter().all(|m| m.kind == ModuleKind::Linear) => {
            quantized::save_with(path, &loaded.parts, modules, &loaded.variants)
        }
        _ => save_named(path, &loaded.parts, &loaded.variants),
    }
}

fn save_named(path: &Path, parts: &AdapterParts, variants: &[Variant]) -> Result<()> {
    let layout = lay_out(parts, variants, Some(UNKNOWN.to_owned()), &path.display().to_string())?;
    let named = |digests: &mut Digests| {
        fingerprint(parts.modules.iter().map(|m| (m.path.as_str(), m)), &parts.extra, digests)
    };
    layout.stage_named(path, OUR_KEY, named)?.commit()
}

/// The single file as bytes.
pub fn to_bytes(parts: &AdapterParts) -> Result<Vec<u8>> {
    let layout = lay_out(parts, &[], None, "bytes")?;
    let mut out = Vec::with_capacity(layout.len());
    layout.write_to(&mut out).map_err(|e| Error::io("bytes", e))?;
    Ok(out)
}

/// Reads what [`to_bytes`] or [`save_single`] wrote, for use: variants are refused.
pub fn from_bytes(bytes: &[u8], strict: bool) -> Result<Loaded> {
    let loaded = read_bytes(bytes, strict)?;
    loaded.check_runs("bytes", &[])?;
    Ok(loaded)
}

/// [`from_bytes`], variants included.
pub fn read_bytes(bytes: &[u8], strict: bool) -> Result<Loaded> {
    let loaded = any_from_bytes(bytes, &LoadOptions { strict, ..LoadOptions::default() })?;
    loaded.check_plain("bytes")?;
    Ok(loaded)
}

/// Reads the bytes of a file of either version.
pub(super) fn any_from_bytes(bytes: &[u8], opts: &LoadOptions) -> Result<Loaded> {
    let file = "bytes";
    source::sniff(&bytes[..bytes.len().min(64)], file)?;
    let container = container::parse(&Bytes::from(bytes.to_vec()), file)?;
    if !is_ours(&container) {
        return Err(Error::format(file, "safetensors, but not written by microlora"));
    }
    from_container(container, file, opts)
}

fn lay_out<'a>(
    parts: &'a AdapterParts,
    variants: &[Variant],
    sha256: Option<String>,
    file: &str,
) -> Result<Layout<'a>> {
    parts.check()?;
    let mut tensors = Vec::with_capacity(2 * parts.modules.len() + parts.extra.len());
    let mut entries = Vec::with_capacity(parts.modules.len());
    for m in &parts.modules {
        tensors.push((format!("{}.lora_a", m.path), &m.a));
        tensors.push((format!("{}.lora_b", m.path), &m.b));
        entries.push(ModuleEntry {
            path: m.path.clone(),
            rank: m.rank,
            alpha: m.alpha,
            use_rslora: m.use_rslora,
            kind: m.kind,
        });
    }
    let to_json = |e: serde_json::Error| Error::format(file, format!("header: {e}"));
    let modules = serde_json::to_string(&entries).map_err(to_json)?;
    lay_out_parts(parts, variants, FORMAT_VERSION, tensors, modules, sha256, file)
}

/// Lays out a file of version 2: its modules' tensors, and their header entry.
pub(super) fn lay_out_with<'a>(
    rest: &'a AdapterParts,
    variants: &[Variant],
    tensors: Vec<(String, &'a Tensor)>,
    modules: String,
    sha256: Option<String>,
    file: &str,
) -> Result<Layout<'a>> {
    lay_out_parts(rest, variants, QUANTIZED_VERSION, tensors, modules, sha256, file)
}

fn lay_out_parts<'a>(
    parts: &'a AdapterParts,
    variants: &[Variant],
    version: u32,
    mut tensors: Vec<(String, &'a Tensor)>,
    modules: String,
    sha256: Option<String>,
    file: &str,
) -> Result<Layout<'a>> {
    tensors.extend(parts.extra.iter().map(|t| (format!("{EXTRA}{}", t.name), t)));
    let to_json = |e: serde_json::Error| Error::format(file, format!("header: {e}"));
    let mut metadata = BTreeMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("format_version".to_owned(), version.to_string()),
        ("modules".to_owned(), modules),
    ]);
    let other = parts.header_without_hash();
    let variants = match variants {
        [] => None,
        all => Some(serde_json::to_string(all).map_err(to_json)?),
    };
    let optional = [
        ("variants", variants),
        ("config", parts.config_json.clone()),
        ("metadata", parts.metadata_json.clone()),
        ("peft_config", parts.peft_config.clone()),
        ("prefix", parts.prefix.clone()),
        (OUR_KEY, sha256),
        ("header", (!other.is_empty()).then(|| serde_json::json!(other).to_string())),
    ];
    metadata.extend(optional.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?))));
    container::lay_out(&metadata, tensors, file)
}

pub(super) fn knows(source: &Source) -> bool {
    matches!(&source.content, Content::Safetensors(container) if is_ours(container))
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let Content::Safetensors(container) = source.content else { return Err(source.unknown()) };
    from_container(container, &source.file, opts)
}

/// True for a file that says it is ours, whatever its version.
pub(super) fn is_ours(container: &Container) -> bool {
    container.metadata.get("format").is_some_and(|f| f == FORMAT)
}

pub(super) fn from_container(container: Container, file: &str, opts: &LoadOptions) -> Result<Loaded> {
    let wrong = |reason: String| Error::format(file, reason);
    let Container { metadata: mut header, tensors } = container;
    header.remove("format");
    let version = check_version(header.remove("format_version"), file)?;
    let text = header.remove("modules").ok_or_else(|| wrong("header: no `modules`".into()))?;
    let weights_sha256 = header.remove(OUR_KEY);
    let other = match header.remove("header") {
        Some(text) => {
            serde_json::from_str::<StringMap>(&text).map_err(|e| wrong(format!("header: header: {e}")))?.0
        }
        None => BTreeMap::new(),
    };
    let mut variants: Vec<Variant> = match header.remove("variants") {
        Some(text) => parse_list(&text, MAX_VARIANTS).map_err(|e| wrong(format!("header: variants: {e}")))?,
        None => Vec::new(),
    };
    let mut parts = AdapterParts {
        modules: Vec::new(),
        config_json: header.remove("config"),
        metadata_json: header.remove("metadata"),
        peft_config: header.remove("peft_config"),
        extra: Vec::new(),
        prefix: header.remove("prefix"),
        header: other,
    };
    if let Some(key) = header.keys().next() {
        return Err(wrong(format!("header: unknown entry {} in version {version}", show(key))));
    }
    let mut by_name: HashMap<String, Tensor> = HashMap::with_capacity(tensors.len());
    let order: Vec<String> = tensors.iter().map(|t| t.name.clone()).collect();
    by_name.extend(tensors.into_iter().map(|t| (t.name.clone(), t)));
    let quantized = if version == QUANTIZED_VERSION {
        for (name, t) in &mut by_name {
            t.data.settle().map_err(|e| unread(name, &e, file))?;
        }
        Some(quantized::modules(&text, &mut by_name, &opts.limits, file)?)
    } else {
        let entries: Vec<ModuleEntry> =
            parse_list(&text, by_name.len() / 2).map_err(|e| wrong(format!("header: modules: {e}")))?;
        for entry in entries {
            opts.limits.check_rank(entry.rank, &show(&entry.path), file)?;
            parts.modules.push(module(entry, &mut by_name, file, opts)?);
        }
        None
    };
    let mut unused = Vec::new();
    for key in order {
        let Some(mut tensor) = by_name.remove(&key) else { continue };
        tensor.data.settle().map_err(|e| unread(&key, &e, file))?;
        match key.strip_prefix(EXTRA) {
            Some(name) => tensor.name = name.to_owned(),
            None => unused.push(key),
        }
        parts.extra.push(tensor);
    }
    if opts.strict && !unused.is_empty() {
        let reason =
            format!("unused tensors {}; load with strict=False to keep them aside", show_list(&unused));
        return Err(wrong(reason));
    }
    parts.check_json(file)?;
    parts.check_names().map_err(|e| wrong(e.to_string()))?;
    parts.detach_extra();
    // What the content shows counts, whatever the header says.
    let shown = peft::variants::of(&parts, file)?;
    let said: HashSet<&Variant> = variants.iter().collect();
    let more: Vec<Variant> = shown.into_iter().filter(|v| !said.contains(v)).collect();
    variants.extend(more);
    Ok(Loaded {
        format: "safetensors",
        parts,
        variants,
        quantized,
        unused,
        weights_sha256,
        ..Loaded::default()
    })
}

fn check_version(version: Option<String>, file: &str) -> Result<u32> {
    let Some(text) = version else { return Err(Error::format(file, "header: no `format_version`")) };
    match text.parse::<u32>() {
        Ok(n @ (FORMAT_VERSION | QUANTIZED_VERSION)) => Ok(n),
        Ok(n) if n > QUANTIZED_VERSION => {
            let reason =
                format!("format version {n}, this build reads up to {QUANTIZED_VERSION}; upgrade microlora");
            Err(Error::unsupported(file, reason))
        }
        _ => Err(Error::format(
            file,
            format!(
                "header: format_version {}, expected {FORMAT_VERSION} or {QUANTIZED_VERSION}",
                show(&text)
            ),
        )),
    }
}

fn module(
    entry: ModuleEntry,
    by_name: &mut HashMap<String, Tensor>,
    file: &str,
    opts: &LoadOptions,
) -> Result<ModuleParts> {
    let ModuleEntry { path, rank, alpha, use_rslora, kind } = entry;
    let mut take = |which: &str| {
        let name = format!("{path}.{which}");
        let missing = || Error::format(file, format!("module {}: no tensor {}", show(&path), show(&name)));
        by_name.remove(&name).ok_or_else(missing)
    };
    let (mut a, mut b) = (take("lora_a")?, take("lora_b")?);
    let names = [a.name.clone(), b.name.clone()];
    let found = take_factors(kind, &mut a, &mut b, [&names[0], &names[1]], file, opts)?;
    if found != rank {
        let reason = format!(
            "tensor {}: {found} rows, but the header gives module {} rank {rank}",
            show(&a.name),
            show(&path)
        );
        return Err(Error::format(file, reason));
    }
    Ok(ModuleParts { path, kind, alpha, rank, use_rslora, a, b })
}
