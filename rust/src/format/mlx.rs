//! Adapters of MLX-LM: `adapters.safetensors` and `adapter_config.json`.
//!
//! `<module>.lora_a` (in, rank) and `<module>.lora_b` (rank, out) are the transposes of ours; of an
//! embedding (vocab, rank) and (rank, dims), of the switch layers of experts 3-D and as ours. The
//! configuration gives one rank and one `scale`, a plain multiplier: alpha = scale · rank.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::atomic::write_pair;
use super::json::{parse_object, show, show_value, to_sorted_pretty};
use super::pairs::{self, Carried, Found, Pairs, Side, plain_alpha, transposed, widened};
use super::peft::CONFIG_FILE;
use super::source::{self, Content as Kind, Source};
use super::styles::{Content, magnitude_key};
use super::tensor::{Tensor, TensorDtype};
use super::{AdapterParts, LoadOptions, Loaded, ModuleKind, ModuleParts, container, fingerprint};
use crate::error::{Error, Result};

/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapters.safetensors";
/// Last names of modules that are embeddings.
const EMBEDDINGS: [&str; 11] = [
    "embed_in",
    "embed_positions",
    "embed_tokens",
    "embed_tokens_per_layer",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "token_embedding",
    "word_embeddings",
    "wpe",
    "wte",
];

/// A directory with MLX's configuration, or its weights or a checkpoint with the configuration beside.
pub(super) fn knows(source: &Source) -> bool {
    match &source.content {
        Kind::Directory => {
            let config = source.path.join(CONFIG_FILE);
            match source::Text::read(&config) {
                Ok(text) => is_config(&text.text),
                Err(_) => source.has(WEIGHTS_FILE) && !source.has(super::peft::WEIGHTS_FILE),
            }
        }
        Kind::Safetensors(container) => {
            let named = source.path.file_name().is_some_and(|n| n.to_string_lossy().ends_with(WEIGHTS_FILE));
            let ours = super::single::is_ours(container);
            named && !ours && source::Text::read(&beside(&source.path)).is_ok_and(|t| is_config(&t.text))
        }
        Kind::Other(_) => false,
    }
}

fn is_config(text: &str) -> bool {
    let has = |key: &str| text.contains(&format!("\"{key}\""));
    !has("peft_type") && (has("fine_tune_type") || has("lora_parameters"))
}

fn beside(path: &Path) -> PathBuf {
    super::atomic::parent(path).join(CONFIG_FILE)
}

/// What the configuration says of the maths, and whom it is for.
struct Config {
    rank: Option<usize>,
    scale: f64,
    dora: bool,
    peft: String,
}

impl Config {
    fn parse(text: &str, opts: &LoadOptions, file: &str) -> Result<Self> {
        let wrong = |reason: String| Error::format(file, reason);
        let object = parse_object(text).map_err(wrong)?;
        let kind = match object.get("fine_tune_type") {
            None => "lora",
            Some(Value::String(kind)) => kind.as_str(),
            Some(v) => return Err(wrong(format!("fine_tune_type: got {}, expected a name", show_value(v)))),
        };
        let dora = match kind {
            "lora" => false,
            "dora" => true,
            "full" => {
                let reason = "fine_tune_type = \"full\": whole weights of the base, no LoRA; extract a low-rank \
                              adapter from the difference of the two models";
                return Err(Error::unsupported(file, reason));
            }
            other => {
                let reason = format!("fine_tune_type = {}: expected lora or dora", show(other));
                return Err(Error::unsupported(file, reason));
            }
        };
        let parameters = match object.get("lora_parameters") {
            Some(Value::Object(o)) => o,
            Some(v) => {
                return Err(wrong(format!("lora_parameters: got {}, expected an object", show_value(v))));
            }
            None => return Err(wrong("no lora_parameters, so the scale is unknown".into())),
        };
        let rank = match parameters.get("rank") {
            None => None,
            Some(v) => {
                let rank = v.as_u64().filter(|&n| n > 0).and_then(|n| usize::try_from(n).ok());
                let bad =
                    || wrong(format!("rank: got {}, expected a whole number of at least 1", show_value(v)));
                Some(rank.ok_or_else(bad)?)
            }
        };
        let scale = match (parameters.get("scale"), opts.alpha, rank) {
            (Some(v), _, _) => {
                let scale = v.as_f64().filter(|s| s.is_finite());
                scale
                    .ok_or_else(|| wrong(format!("scale: got {}, expected a finite number", show_value(v))))?
            }
            (None, Some(alpha), Some(rank)) => alpha / rank as f64,
            _ => return Err(wrong("lora_parameters: no scale; pass alpha= (scale times rank)".into())),
        };
        // A path of the machine that trained says nothing elsewhere.
        let is_local = |m: &str| m.starts_with(['/', '.', '~']) || m.contains('\\') || m.contains(':');
        let model = object.get("model").and_then(Value::as_str).filter(|m| !m.is_empty() && !is_local(m));
        let dropout = parameters.get("dropout").and_then(Value::as_f64).filter(|d| (0.0..1.0).contains(d));
        let peft = json!({
            "base_model_name_or_path": model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_dropout": dropout.unwrap_or(0.0),
            "peft_type": "LORA",
        });
        Ok(Config { rank, scale, dora, peft: peft.to_string() })
    }
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let (config, weights) = match source.content {
        Kind::Directory => (source.path.join(CONFIG_FILE), source.path.join(WEIGHTS_FILE)),
        _ => (beside(&source.path), source.path.clone()),
    };
    for path in [&config, &weights] {
        if !path.exists() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let what = if path == &config { "the scale is unknown" } else { "there are no weights" };
            let reason = format!("no {name} in this directory, so {what}{}", checkpoints(&source));
            return Err(Error::format(&source.file, reason));
        }
    }
    // The pair belongs together when the configuration is the same file after the weights were opened.
    for _ in 0..3 {
        let text = source::Text::read(&config)?;
        let bytes = source::open(&weights, opts)?;
        if text.is_still(&config) {
            let file = weights.display().to_string();
            let settings = Config::parse(&text.text, opts, &config.display().to_string())?;
            source::sniff(&bytes[..bytes.len().min(64)], &file)?;
            return build(&settings, container::parse_within(&bytes, &file, &opts.limits)?, opts, &file);
        }
    }
    Err(Error::format(&source.file, format!("{CONFIG_FILE} changed while the adapter was being read")))
}

/// The numbered checkpoints that training left in a directory, and how one of them is read.
fn checkpoints(source: &Source) -> String {
    const MOST: usize = 3;
    if !matches!(source.content, Kind::Directory) {
        return String::new();
    }
    let names = fs::read_dir(&source.path).into_iter().flatten().flatten();
    let names = names.map(|e| e.file_name().to_string_lossy().into_owned());
    let mut found: Vec<String> =
        names.filter(|n| n.ends_with(WEIGHTS_FILE) && n != WEIGHTS_FILE && !n.starts_with('.')).collect();
    found.sort();
    let Some(last) = found.last() else { return String::new() };
    let shown: Vec<String> = found.iter().take(MOST).map(|n| show(n)).collect();
    let more = if found.len() > MOST { ", ..." } else { "" };
    let path = show(&source.path.join(last).display().to_string());
    format!(
        "; there are {} checkpoints ({}{more}): pass the path of one, such as {path}",
        found.len(),
        shown.join(", ")
    )
}

fn build(config: &Config, content: container::Container, opts: &LoadOptions, file: &str) -> Result<Loaded> {
    let carried = Carried::take(content.metadata, file)?;
    let mut found = Found { carried, ..Found::default() };
    found.offer_peft_config(config.peft.clone());
    let mut pairs = Pairs::new(file);
    for mut t in content.tensors {
        let Some((path, leaf)) = t.name.rsplit_once('.') else {
            found.leave(t);
            continue;
        };
        let path = path.to_owned();
        match leaf {
            "lora_a" => pairs.put(&path, Side::A, t)?,
            "lora_b" => pairs.put(&path, Side::B, t)?,
            "m" if config.dora => {
                t.name = magnitude_key(&path);
                found.vary("dora", "DoRA needs the base weights at inference", t);
            }
            _ => found.leave(t),
        }
    }
    let mut carried = std::mem::take(&mut found.carried);
    for (path, mut slot) in pairs.slots {
        let both = slot.both(&path, file)?;
        let kind = match both[0].1.shape.len() {
            3 => ModuleKind::Experts,
            _ if is_embedding(&path) => ModuleKind::Embedding,
            _ => ModuleKind::Linear,
        };
        let both = match kind {
            ModuleKind::Experts => both,
            _ => both.map(|(key, t)| (key, transposed(&t))),
        };
        let mut m = pairs::module(&path, kind, both, |rank| config.scale * rank as f64, opts, file)?;
        if config.rank.is_some_and(|rank| rank != m.rank) {
            let want = config.rank.unwrap_or_default();
            let reason = format!("module {}: rank {}, but lora_parameters give {want}", show(&path), m.rank);
            return Err(Error::format(file, reason));
        }
        let rank = m.rank as f64;
        carried.restore(&path, &mut m, |alpha| (alpha / rank).to_bits() == config.scale.to_bits());
        found.add(m);
    }
    found.carried = carried;
    found.finish(opts, file)
}

fn is_embedding(path: &str) -> bool {
    EMBEDDINGS.contains(&path.rsplit('.').next().unwrap_or(path))
}

/// Writes a directory that `mlx_lm.tuner.utils.load_adapters` loads.
///
/// Its configuration has one rank and one scale, and its loader refuses tensors of another shape: smaller
/// ranks are padded with zeros under `pad:rank`, other scales go into B (exactly by powers of two, rounded
/// under `round:scale`).
pub(super) fn save(dir: &Path, content: &Content) -> Result<Vec<String>> {
    let mut notes = Vec::new();
    let rank = one_rank(content, &mut notes)?;
    let scale = commonest_scale(&content.modules);
    let mut written = Vec::with_capacity(content.modules.len());
    let mut folded = 0;
    for m in &content.modules {
        let mut m = (*m).clone();
        let own = plain_alpha(&m) / m.rank as f64;
        if own.to_bits() != scale.to_bits() {
            m.b = fold(&m, own / scale, content)?;
            folded += 1;
            // What is carried must no longer match the scaling of the file.
            (m.alpha, m.use_rslora) = (scale * m.rank as f64, false);
        }
        pad(&mut m, rank, scale);
        written.push(m);
    }
    if folded > 0 {
        notes
            .push(format!("one scale ({scale}) for all modules: those of {folded} others went into their B"));
    }
    let keys = keys_of(&written)?;
    let tensors = tensors_of(&written, content, dir)?;
    let config = config_text(content, rank, scale, &keys);
    let carried = written.iter().map(|m| (m.path.as_str(), m));
    let mut parts = AdapterParts { modules: Vec::new(), extra: Vec::new(), ..content.loaded.parts.clone() };
    if !notes.is_empty() {
        parts.config_json = None; // it has the ranks and alphas that were
    }
    let header = Carried::give(&parts, carried, "mlx")?;
    let file = dir.join(WEIGHTS_FILE).display().to_string();
    let opts = fingerprint::as_it_is();
    let settings = Config::parse(&config, &opts, &file)?;

    write_pair(dir, [CONFIG_FILE, WEIGHTS_FILE], &config, |path| {
        fingerprint::stage(path, header, &tensors, |c| build(&settings, c, &opts, &file))
    })?;
    Ok(notes)
}

fn one_rank(content: &Content, notes: &mut Vec<String>) -> Result<usize> {
    let most = content.modules.iter().map(|m| m.rank).max().unwrap_or(1);
    let Some(other) = content.modules.iter().find(|m| m.rank != most) else { return Ok(most) };
    if !content.allows("pad:rank") {
        let got = format!("ranks {} ({}) and {most}", other.rank, show(&other.path));
        let want =
            "one rank for all modules of an MLX adapter; allow=[\"pad:rank\"] pads the smaller with zeros";
        return Err(Error::config("rank", got, want));
    }
    let count = content.modules.iter().filter(|m| m.rank != most).count();
    notes.push(format!("{count} modules were padded with zeros to rank {most}"));
    Ok(most)
}

/// The scaling that most modules have.
fn commonest_scale(modules: &[&ModuleParts]) -> f64 {
    let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
    let scale = |m: &ModuleParts| plain_alpha(m) / m.rank as f64;
    modules
        .iter()
        .for_each(|m| *counts.entry(scale(m).to_bits()).or_default() += usize::from(scale(m) != 0.0));
    let most = counts.iter().filter(|(_, n)| **n > 0).max_by_key(|(_, n)| **n);
    most.map_or(1.0, |(bits, _)| f64::from_bits(*bits))
}

/// B times a ratio, in its own dtype where that is exact.
fn fold(m: &ModuleParts, ratio: f64, content: &Content) -> Result<Tensor> {
    let old = widened(&m.b);
    let new: Vec<f32> = old.iter().map(|&x| (f64::from(x) * ratio) as f32).collect();
    let exact = old.iter().zip(&new).all(|(&x, &y)| f64::from(x) * ratio == f64::from(y));
    if !exact && !content.allows("round:scale") {
        let got = format!("{ratio} times the others ({})", show(&m.path));
        let want = "one scale for all modules of an MLX adapter, or ratios that float32 holds exactly in B; \
                    allow=[\"round:scale\"] rounds";
        return Err(Error::config("scale", got, want));
    }
    let narrow: Vec<u8> = match m.b.dtype {
        TensorDtype::F16 => new.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect(),
        TensorDtype::BF16 => new.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
        _ => Vec::new(),
    };
    let same = Tensor { data: narrow.into(), ..m.b.clone() };
    if widened(&same) == new {
        return Ok(same);
    }
    let data: Vec<u8> = new.iter().flat_map(|x| x.to_le_bytes()).collect();
    Tensor::new(&m.b.name, TensorDtype::F32, m.b.shape.clone(), data)
}

/// Adds zero rows to A and zero columns to B.
fn pad(m: &mut ModuleParts, rank: usize, scale: f64) {
    if m.rank == rank {
        return;
    }
    m.a = grown(&m.a, m.a.shape.len() - 2, rank);
    m.b = grown(&m.b, m.b.shape.len() - 1, rank);
    m.rank = rank;
    (m.alpha, m.use_rslora) = (scale * rank as f64, false);
}

/// A tensor with zeros appended along an axis.
fn grown(t: &Tensor, axis: usize, to: usize) -> Tensor {
    let size = t.dtype.bitsize() / 8;
    let inner: usize = t.shape[axis + 1..].iter().product::<usize>() * size;
    let mut data = Vec::with_capacity(t.data.len() / t.shape[axis].max(1) * to);
    for block in t.data.chunks_exact(inner * t.shape[axis]) {
        data.extend_from_slice(block);
        data.resize(data.len() + (to - t.shape[axis]) * inner, 0);
    }
    let mut shape = t.shape.clone();
    shape[axis] = to;
    Tensor { name: t.name.clone(), dtype: t.dtype, shape, data: data.into() }
}

/// Names for `keys`: inside a block relative to it, elsewhere whole.
fn keys_of(modules: &[ModuleParts]) -> Result<BTreeSet<String>> {
    let mut keys = BTreeSet::new();
    for m in modules {
        if !m.path.contains('.') && !matches!(m.path.as_str(), "lm_head") {
            let want = "a path in the model such as model.layers.0.self_attn.q_proj";
            return Err(Error::config("module path", show(&m.path), want));
        }
        let segments: Vec<&str> = m.path.split('.').collect();
        let block = segments.iter().position(|s| !s.is_empty() && s.bytes().all(|c| c.is_ascii_digit()));
        keys.insert(match block {
            Some(at) if at > 0 && at + 1 < segments.len() => segments[at + 1..].join("."),
            _ => m.path.clone(),
        });
    }
    Ok(keys)
}

fn tensors_of(modules: &[ModuleParts], content: &Content, dir: &Path) -> Result<Vec<Tensor>> {
    let mut out = Vec::with_capacity(2 * modules.len());
    for m in modules {
        for (t, leaf) in [(&m.a, "lora_a"), (&m.b, "lora_b")] {
            let mut t = if m.kind == ModuleKind::Experts { t.clone() } else { transposed(t) };
            t.name = format!("{}.{leaf}", m.path);
            out.push(t);
        }
        if (m.kind == ModuleKind::Embedding) != is_embedding(&m.path) {
            let want = format!("a path whose last name tells its kind ({})", m.kind.as_str());
            return Err(Error::config("module path", show(&m.path), want));
        }
    }
    if content.magnitudes.is_empty() {
        return Ok(out);
    }
    for m in modules {
        let Some((_, t)) = content.magnitudes.iter().find(|(path, _)| *path == m.path) else {
            let reason = format!(
                "module {}: no DoRA magnitudes, and an MLX adapter is DoRA in all modules or in none; \
                 allow=[\"drop:dora\"] leaves them out",
                show(&m.path)
            );
            return Err(Error::unsupported(dir.display(), reason));
        };
        let shape = vec![t.shape.iter().product()];
        out.push(Tensor { name: format!("{}.m", m.path), shape, ..(*t).clone() });
    }
    Ok(out)
}

fn config_text(content: &Content, rank: usize, scale: f64, keys: &BTreeSet<String>) -> String {
    let parts = &content.loaded.parts;
    let kind = if content.magnitudes.is_empty() { "lora" } else { "dora" };
    let (model, dropout) = settings(parts);
    let mut object = Map::new();
    object.insert("fine_tune_type".into(), kind.into());
    object.insert("num_layers".into(), (-1).into());
    object.insert(
        "lora_parameters".into(),
        json!({ "dropout": dropout, "keys": keys, "rank": rank, "scale": scale }),
    );
    if let Some(model) = model {
        object.insert("model".into(), model.into());
    }
    to_sorted_pretty(&object)
}

/// The base model's name and the dropout, from whatever settings there are.
fn settings(parts: &AdapterParts) -> (Option<String>, f64) {
    let object = |text: &Option<String>| text.as_ref().and_then(|t| parse_object(t).ok()).unwrap_or_default();
    let (peft, config, metadata) =
        (object(&parts.peft_config), object(&parts.config_json), object(&parts.metadata_json));
    let text = |v: Option<&Value>| v.and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned);
    let model = text(peft.get("base_model_name_or_path")).or_else(|| text(metadata.get("base_model")));
    let dropout = peft.get("lora_dropout").or_else(|| config.get("dropout")).and_then(Value::as_f64);
    (model, dropout.unwrap_or(0.0))
}
