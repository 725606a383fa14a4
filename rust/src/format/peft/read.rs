//! Reading a PEFT adapter: names, ranks, alphas, and every reason not to.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::super::container::{self, Container};
use super::super::fingerprint::KEY as HEADER_SHA256;
use super::super::json::{show, show_list};
use super::super::source::{Content, Source};
use super::super::tensor::{Bytes, Tensor};
use super::super::{
    AdapterParts, LoadOptions, Loaded, ModuleKind, ModuleParts, source, take_factors, unread, unread_head,
};
use super::config::{self, PeftConfig};
use super::names::{Factor, Key, classify, split_prefix, stored_name};
use super::variants::{self, Use};
use super::{CONFIG_FILE, HEADER_CONFIG, HEADER_METADATA, PREFIX, WEIGHTS_FILE};
use crate::error::{Error, Result};

const PICKLED_WEIGHTS: &str = "adapter_model.bin";

/// A directory with PEFT's files, or the weights file of one.
pub(crate) fn knows(source: &Source) -> bool {
    let has_config = || match source::Text::read(&source.path.join(CONFIG_FILE)) {
        Ok(text) => text.text.contains("\"peft_type\""),
        Err(_) => true, // its reader says what is wrong with it
    };
    match &source.content {
        Content::Directory => {
            [WEIGHTS_FILE, PICKLED_WEIGHTS].iter().any(|name| source.has(name))
                || (source.has(CONFIG_FILE) && has_config())
                || !hint(&source.path).is_empty()
        }
        Content::Safetensors(_) => is_weights_of_dir(&source.path),
        Content::Other(_) => false,
    }
}

/// A name with PEFT's prefix and a mark of one of its factors or variants.
pub(crate) fn is_key(key: &str) -> bool {
    key.starts_with(PREFIX) && !matches!(classify(key), Key::Other)
}

/// Reads what [`knows`] knows.
pub(crate) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    match source.content {
        Content::Directory => from_dir(&source.path, opts),
        _ => from_file(&source.path, opts),
    }
}

fn is_weights_of_dir(path: &Path) -> bool {
    path.file_name().is_some_and(|n| n == WEIGHTS_FILE)
        && path.parent().is_some_and(|dir| dir.join(CONFIG_FILE).is_file())
}

/// Reads an adapter directory.
pub(crate) fn from_dir(dir: &Path, opts: &LoadOptions) -> Result<Loaded> {
    let (config, weights) = (dir.join(CONFIG_FILE), dir.join(WEIGHTS_FILE));
    if !weights.exists() && dir.join(PICKLED_WEIGHTS).exists() {
        return Err(source::refuse_pickle(&dir.join(PICKLED_WEIGHTS)));
    }
    for (path, name) in [(&config, CONFIG_FILE), (&weights, WEIGHTS_FILE)] {
        if !path.exists() {
            return Err(Error::format(dir.display(), format!("no {name} in this directory{}", hint(dir))));
        }
    }
    // A writer replaces the weights between two configuration files: the pair belongs together when the
    // configuration is the same file after the weights were opened.
    for _ in 0..3 {
        let text = source::Text::read(&config)?;
        let bytes = source::open_lazily(&weights, opts)?;
        if text.is_still(&config) {
            let names = [config.display().to_string(), weights.display().to_string()];
            return build(&text.text, &bytes, [&names[0], &names[1]], opts);
        }
    }
    Err(Error::format(dir.display(), format!("{CONFIG_FILE} changed while the adapter was being read")))
}

/// Reads a weights file that is not one of ours: its directory must hold the configuration.
pub(crate) fn from_file(path: &Path, opts: &LoadOptions) -> Result<Loaded> {
    let dir = match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    if is_weights_of_dir(path) {
        return from_dir(dir, opts);
    }
    let reason = format!(
        "safetensors, but not written by microlora, and without an {CONFIG_FILE} beside it the scaling is unknown; \
         of a PEFT adapter pass the directory"
    );
    Err(Error::format(path.display(), reason))
}

/// Reads an adapter from the two files' content.
pub fn from_memory(config: &str, weights: &[u8], strict: bool) -> Result<Loaded> {
    let opts = LoadOptions { strict, ..LoadOptions::default() };
    build(config, &Bytes::from(weights.to_vec()), [CONFIG_FILE, WEIGHTS_FILE], &opts)
}

/// A named adapter lies one level below: say so.
fn hint(dir: &Path) -> String {
    let mut below: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|e| e.path().join(CONFIG_FILE).is_file())
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    below.sort();
    if below.is_empty() { String::new() } else { format!("; it holds the adapters {}", show_list(&below)) }
}

struct Slot {
    key: String,
    prefix: String,
    tensor: Tensor,
}

/// A and B, as far as they are there.
#[derive(Default)]
struct Pair([Option<Slot>; 2]);

/// Path, and whether it is an embedding's.
type Place = (String, bool);

fn build(text: &str, bytes: &Bytes, [config_file, file]: [&str; 2], opts: &LoadOptions) -> Result<Loaded> {
    let config = settings(text, config_file, opts)?;
    let head = bytes.prefix(64).map_err(|e| unread_head(e, file))?;
    source::sniff(&head, file)?;
    drop(head);
    of_container(
        text,
        &config,
        container::parse_within(bytes, file, &opts.limits)?,
        [config_file, file],
        opts,
    )
}

/// What the reader makes of a container beside a configuration.
pub(super) fn of_parts(
    text: &str,
    content: Container,
    files: [&str; 2],
    opts: &LoadOptions,
) -> Result<Loaded> {
    of_container(text, &settings(text, files[0], opts)?, content, files, opts)
}

fn settings(text: &str, config_file: &str, opts: &LoadOptions) -> Result<PeftConfig> {
    let config = config::parse(text, config_file)?;
    if opts.strict && !config.unknown.is_empty() {
        let reason = format!(
            "unknown settings {} may change the maths; load with strict=False if they do not",
            show_list(&config.unknown)
        );
        return Err(Error::unsupported(config_file, reason));
    }
    Ok(config)
}

fn of_container(
    text: &str,
    config: &PeftConfig,
    Container { metadata, tensors }: Container,
    [config_file, file]: [&str; 2],
    opts: &LoadOptions,
) -> Result<Loaded> {
    let strict = opts.strict;
    config.check_names_work(tensors.len(), config_file)?;
    let Sorted { pairs, raw, extra, mut unused } = sort_out(tensors, config, file)?;
    if strict && !unused.is_empty() {
        let reason =
            format!("unused tensors {}; load with strict=False to keep them aside", show_list(&unused));
        return Err(Error::format(file, reason));
    }
    if pairs.is_empty() && raw.is_empty() {
        return Err(Error::format(file, "no lora_A and lora_B tensors"));
    }
    let paths: Vec<&str> = pairs.keys().chain(raw.keys()).map(|(path, _)| path.as_str()).collect();
    config.check_work(&paths, config_file)?;
    let mut notes = config.notes.clone();
    notes.extend(config.unmatched_notes(&paths));

    let prefix = common_prefix(if pairs.is_empty() { &raw } else { &pairs });
    for ((path, _), pair) in raw {
        check_raw(&path, pair, config, file)?;
    }
    let mut modules = Vec::with_capacity(pairs.len());
    for ((path, embedding), pair) in pairs {
        let module = module(path, embedding, pair, config, file, opts)?;
        opts.limits.check_rank(module.rank, &module.path, file)?;
        modules.push(module);
    }
    unused.extend(config.unknown.iter().map(|k| format!("{CONFIG_FILE}: {k}")));
    let mut header = metadata;
    header.remove("format");
    let weights_sha256 = header.remove(HEADER_SHA256);
    let mut parts = AdapterParts {
        modules,
        config_json: header.remove(HEADER_CONFIG),
        metadata_json: header.remove(HEADER_METADATA),
        peft_config: Some(text.to_owned()),
        extra,
        prefix,
        header,
    };
    parts.check_names().map_err(|e| Error::format(file, e.to_string()))?;
    parts.check_json(file)?;
    parts.detach_extra();
    let variants = variants::with(&parts, Some(config));
    Ok(Loaded { format: "peft", parts, variants, unused, notes, weights_sha256, ..Loaded::default() })
}

/// A file's tensors: factors by module, those kept as they lie, the others, and which nothing uses.
#[derive(Default)]
struct Sorted {
    pairs: BTreeMap<Place, Pair>,
    /// Pairs of several layers in one; their tensors are in `extra` as well.
    raw: BTreeMap<Place, Pair>,
    extra: Vec<Tensor>,
    unused: Vec<String>,
}

fn sort_out(tensors: Vec<Tensor>, config: &PeftConfig, file: &str) -> Result<Sorted> {
    let mut out = Sorted::default();
    let mut parts: BTreeMap<String, String> = BTreeMap::new();
    for mut tensor in tensors {
        let key = tensor.name.clone();
        let is_matrix = |path: &str| config.raw_kind(path).is_none() && tensor.shape.len() == 2;
        if !matches!(classify(&key), Key::Factor { path, embedding: false, .. } if is_matrix(&path)) {
            tensor.data.settle().map_err(|e| unread(&key, &e, file))?;
        }
        let Key::Factor { prefix, path, factor, embedding } = classify(&key) else {
            match variants::use_of(&key, Some(config)) {
                Use::Training => {}
                Use::Unused => out.unused.push(key),
                Use::Part(_) => {
                    if !tensor.is_finite() {
                        let reason = format!("tensor {}: contains NaN or infinity", show(&key));
                        return Err(Error::format(file, reason));
                    }
                    let stored = stored_name(&key);
                    let part = split_prefix(&stored).1.to_owned();
                    tensor.name = stored;
                    if let Some(first) = parts.insert(part.clone(), key.clone()) {
                        let reason =
                            format!("tensors {} and {} are both {}", show(&first), show(&key), show(&part));
                        return Err(Error::format(file, reason));
                    }
                }
            }
            out.extra.push(tensor);
            continue;
        };
        let which = factor as usize;
        let place = (path.clone(), embedding);
        let pairs = match config.raw_kind(&path) {
            Some(_) if !embedding => {
                out.extra.push(tensor.clone());
                &mut out.raw
            }
            _ => &mut out.pairs,
        };
        tensor.name = format!("{path}.{}", ["lora_a", "lora_b"][which]);
        let slot = &mut pairs.entry(place).or_default().0[which];
        if let Some(first) = slot {
            let reason = format!(
                "tensors {} and {} are both {} of module {}",
                show(&first.key),
                show(&key),
                word(factor, embedding),
                show(&path)
            );
            return Err(Error::format(file, reason));
        }
        *slot = Some(Slot { prefix: prefix.to_owned(), key, tensor });
    }
    Ok(out)
}

/// What a factor is called in keys.
fn word(factor: Factor, embedding: bool) -> &'static str {
    match (factor, embedding) {
        (Factor::A, false) => "lora_A",
        (Factor::B, false) => "lora_B",
        (Factor::A, true) => "lora_embedding_A",
        (Factor::B, true) => "lora_embedding_B",
    }
}

/// The prefix to write keys back with, when it is not the usual one: only a repeated one is kept, since
/// PEFT would load nothing from keys without any.
fn common_prefix(pairs: &BTreeMap<Place, Pair>) -> Option<String> {
    let mut all = pairs.values().flat_map(|p| p.0.iter().flatten()).map(|s| s.prefix.as_str());
    let first = all.next().filter(|p| p.len() > PREFIX.len())?;
    all.all(|p| p == first).then(|| first.to_owned())
}

impl Pair {
    /// Both factors; an error names the one that is alone.
    fn both(self, path: &str, embedding: bool, file: &str) -> Result<(Slot, Slot)> {
        match self.0 {
            [Some(a), Some(b)] => Ok((a, b)),
            [a, b] => {
                let names = [Factor::A, Factor::B].map(|f| word(f, embedding));
                let [have, missing] = if a.is_some() { names } else { [names[1], names[0]] };
                let key = a.or(b).map(|s| s.key).unwrap_or_default();
                let reason = format!("module {}: {have} ({}) without its {missing}", show(path), show(&key));
                Err(Error::format(file, reason))
            }
        }
    }
}

/// Checks a pair that stays as it lies: packed experts, or stacked blocks.
fn check_raw(path: &str, pair: Pair, config: &PeftConfig, file: &str) -> Result<()> {
    let (a, b) = pair.both(path, false, file)?;
    for slot in [&a, &b] {
        if slot.tensor.shape.len() != 2 || slot.tensor.shape.contains(&0) {
            let reason = format!(
                "tensor {}: shape {:?}, expected two dimensions without a zero",
                show(&slot.key),
                slot.tensor.shape
            );
            return Err(Error::format(file, reason));
        }
        if !slot.tensor.is_finite() {
            return Err(Error::format(file, format!("tensor {}: contains NaN or infinity", show(&slot.key))));
        }
    }
    if config.raw_kind(path) != Some("target_parameters") {
        return Ok(());
    }
    let (rows, columns) = (a.tensor.shape[0], b.tensor.shape[1]);
    let scalings = config.parameter_scalings(path);
    if rows == columns && scalings.iter().any(|(rank, _)| rows.is_multiple_of(*rank)) {
        return Ok(());
    }
    let ranks: Vec<String> = scalings.iter().map(|(rank, _)| rank.to_string()).collect();
    let reason = format!(
        "tensors {} {:?} and {} {:?}: expected (experts * rank, in) and (out, rank * experts) with rank {}",
        show(&a.key),
        a.tensor.shape,
        show(&b.key),
        b.tensor.shape,
        ranks.join(" or ")
    );
    Err(Error::format(file, reason))
}

fn module(
    path: String,
    embedding: bool,
    pair: Pair,
    config: &PeftConfig,
    file: &str,
    opts: &LoadOptions,
) -> Result<ModuleParts> {
    let (mut a, mut b) = pair.both(&path, embedding, file)?;
    let convolution = !embedding && [&a, &b].iter().any(|s| (3..=5).contains(&s.tensor.shape.len()));
    let kind = match (embedding, convolution) {
        (true, _) => ModuleKind::Embedding,
        (_, true) => ModuleKind::Conv,
        _ => ModuleKind::Linear,
    };
    let rank = take_factors(kind, &mut a.tensor, &mut b.tensor, [&a.key, &b.key], file, opts)?;
    let (want, source) = config.rank_for(&path);
    if rank != want {
        return Err(Error::format(
            file,
            format!(
                "tensor {}: {rank} rows, but {source} of the configuration gives module {} rank {want}",
                show(&a.key),
                show(&path)
            ),
        ));
    }
    let alpha = config.alpha_for(&path);
    let (a, b) = (a.tensor, b.tensor);
    Ok(ModuleParts { path, kind, alpha, rank, use_rslora: config.use_rslora, a, b })
}

#[cfg(test)]
mod tests {
    use super::super::super::tensor::TensorDtype;
    use super::*;

    fn pair(prefixes: [&str; 2]) -> Pair {
        Pair(prefixes.map(|p| {
            let tensor = Tensor::new("t", TensorDtype::F32, vec![1, 1], vec![0; 4]).unwrap();
            Some(Slot { key: "k".into(), prefix: p.into(), tensor })
        }))
    }

    #[test]
    fn only_a_common_repeated_prefix_is_kept() {
        let twice = format!("{PREFIX}{PREFIX}");
        let of = |pairs: Vec<Pair>| {
            common_prefix(&pairs.into_iter().enumerate().map(|(i, p)| ((i.to_string(), false), p)).collect())
        };
        assert_eq!(of(vec![pair([PREFIX, PREFIX])]), None);
        assert_eq!(of(vec![pair(["", ""])]), None);
        assert_eq!(of(vec![pair([&twice, &twice])]), Some(twice.clone()));
        assert_eq!(of(vec![pair([&twice, &twice]), pair([PREFIX, PREFIX])]), None);
    }
}
