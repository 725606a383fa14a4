//! Writing a PEFT adapter that PEFT itself loads, and that changes nothing of what was read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::super::atomic::write_pair;
use super::super::container::Container;
use super::super::fingerprint::{KEY as HEADER_SHA256, UNKNOWN, as_it_is};
use super::super::json::{parse_object, show, show_list, to_sorted_pretty, truthy};
use super::super::pattern::anchored;
use super::super::{AdapterParts, Digests, ModuleKind, ModuleParts, Tensor, container, fingerprint};
use super::experts::pack;
use super::names::{Key, classify, keys, pattern_path};
use super::variants::{self, Use};
use super::{CONFIG_FILE, HEADER_CONFIG, HEADER_METADATA, PREFIX, WEIGHTS_FILE, config, read};
use crate::error::{Error, Result};

/// How to write a PEFT directory.
#[derive(Clone, Copy, Debug, Default)]
pub struct PeftOptions<'a> {
    /// Module paths of the model for each of the adapter's names: one, or several that get the same
    /// factors. Without it, names are written as they are.
    pub layer_paths: Option<&'a BTreeMap<String, Vec<String>>>,
    /// `base_model_name_or_path`; without it what the file had, else `base_model` of the metadata.
    pub base_model: Option<&'a str>,
}

/// Writes `adapter_model.safetensors` and `adapter_config.json` into `dir` (made if missing).
///
/// Both are complete and on disk before either takes its place, so a full disk leaves the old pair. Then
/// an old configuration that differs steps aside, the weights take their place, and the configuration
/// comes last: a crash in between leaves a directory without a configuration, which no reader accepts,
/// never weights with the alphas of others.
pub fn save_peft(dir: &Path, parts: &AdapterParts, opts: &PeftOptions) -> Result<()> {
    parts.check()?;
    let had = match &parts.peft_config {
        Some(text) => Some(config::parse(text, CONFIG_FILE)?),
        None => None,
    };
    let is_raw = |name: &str| {
        matches!(classify(name), Key::Factor { .. })
            && !matches!(variants::use_of(name, had.as_ref()), Use::Unused)
    };
    if parts.modules.is_empty() && !parts.extra.iter().any(|t| is_raw(&t.name)) {
        return Err(Error::config("adapter", "no modules", "at least one for a PEFT directory"));
    }
    let modules = place(parts, opts.layer_paths)?;
    let config = config_text(parts, &modules, opts)?;
    let prefix = parts.prefix.as_deref().unwrap_or(PREFIX);
    let packed = modules.iter().filter(|(_, m)| m.kind == ModuleKind::Experts);
    let packed = packed.map(|(path, m)| Ok((path.as_str(), pack(m)?))).collect::<Result<BTreeMap<_, _>>>()?;
    let mut tensors = Vec::with_capacity(2 * modules.len() + parts.extra.len());
    for (path, m) in &modules {
        let embedding = m.kind == ModuleKind::Embedding;
        let [key_a, key_b] = keys(prefix, path, embedding);
        let read_back = match classify(&key_a) {
            Key::Factor { path: read, embedding: e, .. } => {
                let raw = !embedding && had.as_ref().and_then(|c| c.raw_kind(path)).is_some();
                read == *path && e == embedding && raw == (m.kind == ModuleKind::Experts)
            }
            _ => false,
        };
        if !read_back || (m.kind == ModuleKind::Linear && path.ends_with(".base_layer")) {
            return Err(Error::config(
                "module path",
                show(path),
                "a path that can be read back from PEFT's keys and settings",
            ));
        }
        let (a, b) = packed.get(path.as_str()).map_or((&m.a, &m.b), |(a, b)| (a, b));
        tensors.push((key_a, a));
        tensors.push((key_b, b));
    }
    let taken = |name: &str| matches!(classify(name), Key::Factor { .. }) && !is_raw(name);
    if let Some(t) = parts.extra.iter().find(|t| taken(&t.name)) {
        return Err(Error::config("extra tensor", show(&t.name), "a name that is not one of LoRA's own"));
    }
    tensors.extend(parts.extra.iter().map(|t| (t.name.clone(), t)));
    let mut header = parts.header_without_hash();
    header.insert("format".into(), "pt".into());
    let ours = [(HEADER_CONFIG, &parts.config_json), (HEADER_METADATA, &parts.metadata_json)];
    header.extend(ours.into_iter().filter_map(|(k, v)| Some((k.to_owned(), v.clone()?))));
    header.insert(HEADER_SHA256.into(), UNKNOWN.into());
    let file = dir.join(WEIGHTS_FILE).display().to_string();
    // Packed experts are read back as they lie, so that the reader is asked what it finds.
    let content = (!packed.is_empty()).then(|| Container {
        metadata: header.clone(),
        tensors: tensors.iter().map(|(name, t)| Tensor { name: name.clone(), ..(*t).clone() }).collect(),
    });
    let layout = container::lay_out(&header, tensors, &file)?;

    let sha256 = |digests: &mut Digests| match content {
        Some(content) => read::of_parts(&config, content, [CONFIG_FILE, &file], &as_it_is())?.fingerprint(),
        None => fingerprint(modules.iter().map(|(path, m)| (path.as_str(), *m)), &parts.extra, digests),
    };
    write_pair(dir, [CONFIG_FILE, WEIGHTS_FILE], &config, |path| {
        layout.stage_named(path, HEADER_SHA256, sha256)
    })
}

/// The modules at the paths they are written under.
fn place<'a>(
    parts: &'a AdapterParts,
    layer_paths: Option<&BTreeMap<String, Vec<String>>>,
) -> Result<Vec<(String, &'a ModuleParts)>> {
    let have: Vec<&str> = parts.modules.iter().map(|m| m.path.as_str()).collect();
    let placed = placed(&have, layer_paths)?;
    Ok(placed.into_iter().map(|(path, m)| (path, &parts.modules[m])).collect())
}

/// Paths in a model of the modules of those names, each with the module's number.
pub(crate) fn placed(
    have: &[&str],
    layer_paths: Option<&BTreeMap<String, Vec<String>>>,
) -> Result<Vec<(String, usize)>> {
    let Some(map) = layer_paths else {
        return Ok(have.iter().enumerate().map(|(m, name)| ((*name).to_owned(), m)).collect());
    };
    if let Some(got) = map.keys().find(|k| !have.contains(&k.as_str())) {
        return Err(Error::UnknownModule { got: got.clone(), have: show_list(have) });
    }
    let mut out: Vec<(String, usize)> = Vec::new();
    let mut seen: HashMap<&str, &str> = HashMap::new();
    for (m, name) in have.iter().enumerate() {
        let Some(paths) = map.get(*name).filter(|p| !p.is_empty()) else {
            return Err(Error::config(
                "layer_paths",
                format!("no path for {}", show(name)),
                "one or more for each module",
            ));
        };
        for path in paths {
            if path.split('.').any(str::is_empty) || path.chars().any(char::is_control) {
                return Err(Error::config(
                    "layer_paths",
                    show(path),
                    "a module path such as model.layers.0.self_attn.q_proj",
                ));
            }
            if let Some(first) = seen.insert(path, name) {
                let got = format!("{} for {} and {}", show(path), show(first), show(name));
                return Err(Error::config("layer_paths", got, "each path once"));
            }
            out.push((path.clone(), m));
        }
    }
    Ok(out)
}

/// The configuration: what was read, where it still describes the modules; else rewritten there.
fn config_text(
    parts: &AdapterParts,
    modules: &[(String, &ModuleParts)],
    opts: &PeftOptions,
) -> Result<String> {
    let file = CONFIG_FILE;
    let mut object = match &parts.peft_config {
        Some(text) => parse_object(text).map_err(|e| Error::format(file, format!("peft_config: {e}")))?,
        None => fresh(parts),
    };
    if let Some(base) = opts.base_model {
        object.insert("base_model_name_or_path".into(), base.into());
    }
    let (alone, _): (Vec<_>, Vec<_>) =
        modules.iter().cloned().partition(|(_, m)| m.kind != ModuleKind::Experts);
    let renamed = opts.layer_paths.is_some();
    let modules = &alone[..];
    if modules.is_empty() {
        return Ok(to_sorted_pretty(&object)); // experts alone: their settings came with them
    }
    if !describes(&object, modules)? {
        // Patterns of packed experts have no module here that would keep them.
        if object.get("target_parameters").is_some_and(truthy) {
            let want = "those of the configuration, where experts are packed beside them";
            return Err(Error::config("modules", "other ranks or alphas", want));
        }
        set_scaling(&mut object, modules)?;
    }
    if !targets(&object, modules, renamed)? {
        let paths: BTreeSet<&str> = modules.iter().map(|(p, _)| pattern_path(p)).collect();
        object.insert("target_modules".into(), json!(paths));
        for key in ["exclude_modules", "layers_to_transform", "layers_pattern"] {
            object.insert(key.into(), Value::Null);
        }
    }
    debug_assert!(describes(&object, modules)?);
    Ok(to_sorted_pretty(&object))
}

/// The settings that PEFT's defaults do not already say, or that other readers look for.
fn fresh(parts: &AdapterParts) -> Map<String, Value> {
    let field = |text: &Option<String>, key: &str| {
        text.as_ref()
            .and_then(|t| parse_object(t).ok())
            .and_then(|o| o.get(key).cloned())
            .unwrap_or(Value::Null)
    };
    let base = match field(&parts.metadata_json, "base_model") {
        Value::Object(o) => o.get("name").cloned().unwrap_or(Value::Null),
        other => other,
    };
    let dropout = field(&parts.config_json, "dropout").as_f64().unwrap_or(0.0);
    let object = json!({
        "base_model_name_or_path": base.as_str().filter(|name| !name.is_empty()),
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_dropout": dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "revision": null,
        "task_type": null,
        "use_dora": false,
    });
    match object {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// True when the configuration, as it would be written, gives every module its rank, alpha and scaling.
fn describes(object: &Map<String, Value>, modules: &[(String, &ModuleParts)]) -> Result<bool> {
    if !object.contains_key("r") || !object.contains_key("lora_alpha") {
        return Ok(false);
    }
    let config = config::parse(&to_sorted_pretty(object), CONFIG_FILE)?;
    let paths: Vec<&str> = modules.iter().map(|(p, _)| p.as_str()).collect();
    config.check_work(&paths, CONFIG_FILE)?;
    Ok(modules.iter().all(|(path, m)| {
        let same_alpha = config.alpha_for(path).to_bits() == m.alpha.to_bits();
        config.rank_for(path).0 == m.rank && same_alpha && config.use_rslora == m.use_rslora
    }))
}

/// Sets `r`, `lora_alpha`, `use_rslora` and patterns: the commonest values, and one anchored key for
/// each module that differs, so that no two keys match one module and their order means nothing.
pub(crate) fn set_scaling(object: &mut Map<String, Value>, modules: &[(String, &ModuleParts)]) -> Result<()> {
    let use_rslora = modules[0].1.use_rslora;
    if modules.iter().any(|(_, m)| m.use_rslora != use_rslora) {
        let want = "one value for all modules in a PEFT directory; save as a single file";
        return Err(Error::config("use_rslora", "both true and false", want));
    }
    let rank = commonest(modules.iter().map(|(_, m)| m.rank));
    let alpha = f64::from_bits(commonest(modules.iter().map(|(_, m)| m.alpha.to_bits())));
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    let mut seen: HashMap<&str, &ModuleParts> = HashMap::new();
    for (path, m) in modules {
        let path = pattern_path(path);
        if let Some(other) = seen.insert(path, m)
            && (other.rank, other.alpha) != (m.rank, m.alpha)
        {
            let got = format!("different ranks or alphas inside {}", show(path));
            return Err(Error::config(
                "modules",
                got,
                "one rank and alpha for a wrapped layer in a PEFT directory",
            ));
        }
        if m.rank != rank {
            ranks.insert(anchored(path), json!(m.rank));
        }
        if m.alpha.to_bits() != alpha.to_bits() {
            alphas.insert(anchored(path), number(m.alpha));
        }
    }
    object.insert("r".into(), json!(rank));
    object.insert("lora_alpha".into(), number(alpha));
    object.insert("use_rslora".into(), json!(use_rslora));
    object.insert("rank_pattern".into(), ranks.into());
    object.insert("alpha_pattern".into(), alphas.into());
    Ok(())
}

/// The value that comes most often; of several the first.
fn commonest<T: Copy + Default + Eq + Hash>(values: impl Iterator<Item = T> + Clone) -> T {
    let mut counts: HashMap<T, usize> = HashMap::new();
    values.clone().for_each(|v| *counts.entry(v).or_default() += 1);
    let most = counts.values().copied().max().unwrap_or(0);
    values.clone().find(|v| counts[v] == most).unwrap_or_default()
}

/// Whole numbers without a fraction, as PEFT writes them.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 && x.to_bits() != (-0.0f64).to_bits() {
        json!(x as i64)
    } else {
        json!(x)
    }
}

/// True when `target_modules` names every module. A pattern that only Python can run is trusted as long
/// as the modules keep their names.
fn targets(object: &Map<String, Value>, modules: &[(String, &ModuleParts)], renamed: bool) -> Result<bool> {
    // PEFT ties a head to its embedding without naming it.
    if !renamed && object.get("ensure_weight_tying").is_some_and(truthy) {
        return Ok(true);
    }
    let config = config::parse(&to_sorted_pretty(object), CONFIG_FILE)?;
    Ok(config.targets_all(modules.iter().map(|(p, _)| pattern_path(p))).unwrap_or(!renamed))
}
