//! Key styles of diffusers: PEFT's names below a component (`unet.`, `transformer.`, `text_encoder.`), and
//! the older ones.
//!
//! | style | down / A | up / B |
//! |---|---|---|
//! | PEFT | `<path>.lora_A.weight` (or `.default.weight`) | `<path>.lora_B.weight` |
//! | attention processors | `<path>.processor.to_q_lora.down.weight` | `....up.weight` |
//! | layers | `<path>.lora.down.weight`, `<path>.lora_linear_layer.down.weight` | `....up.weight` |
//! | Mochi | `<path>.lora_A` | `<path>.lora_B` |
//!
//! Alpha: `<path>.alpha`, else the header's `lora_adapter_metadata` (one `LoraConfig` per component), else
//! the rank.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::container::Container;
use super::json::{parse_object, show, show_value, to_sorted_pretty};
use super::pairs::{self, Carried, Found, Pairs, Side, plain_alpha};
use super::peft::config::PeftConfig;
use super::peft::{self, PREFIX};
use super::source::{Content as Kind, Source};
use super::styles::{Content, magnitude_key};
use super::tensor::Tensor;
use super::{LoadOptions, Loaded, ModuleParts, fingerprint};
use crate::error::{Error, Result};

const METADATA: &str = "lora_adapter_metadata";
/// Components of a pipeline, the first names of its modules.
const COMPONENTS: [&str; 7] =
    ["unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior"];
/// Settings that the maths here depends on.
const SETTINGS: [&str; 5] = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"];

const ENDS: [(&str, Side); 12] = [
    (".lora_A.weight", Side::A),
    (".lora_B.weight", Side::B),
    (".lora_A.default.weight", Side::A),
    (".lora_B.default.weight", Side::B),
    (".lora_A", Side::A),
    (".lora_B", Side::B),
    (".lora.down.weight", Side::A),
    (".lora.up.weight", Side::B),
    (".lora_linear_layer.down.weight", Side::A),
    (".lora_linear_layer.up.weight", Side::B),
    ("_lora.down.weight", Side::A),
    ("_lora.up.weight", Side::B),
];

enum Key {
    Factor(String, Side),
    Alpha(String),
    Magnitude(String),
    Bias,
    Other,
}

fn classify(key: &str) -> Key {
    for (end, side) in ENDS {
        if let Some(path) = key.strip_suffix(end).filter(|p| !p.is_empty()) {
            return Key::Factor(module_path(path, end), side);
        }
    }
    for end in
        [".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".lora_magnitude_vector.default.weight"]
    {
        if let Some(path) = key.strip_suffix(end) {
            return Key::Magnitude(path.to_owned());
        }
    }
    match key.strip_suffix(".alpha") {
        Some(path) if !path.is_empty() => Key::Alpha(path.to_owned()),
        _ if key.ends_with(".lora_B.bias") || key.ends_with(".lora_B.default.bias") => Key::Bias,
        _ => Key::Other,
    }
}

/// The module's own name: attention processors kept theirs beside the layer, not in it.
fn module_path(path: &str, end: &str) -> String {
    if !end.starts_with('_') {
        return path.to_owned();
    }
    let path = path.replace(".processor.", ".");
    if path.ends_with(".to_out") { format!("{path}.0") } else { path }
}

/// A key that only these styles have.
pub(super) fn is_key(key: &str) -> bool {
    !key.starts_with(PREFIX) && matches!(classify(key), Key::Factor(..) | Key::Magnitude(_) | Key::Bias)
}

pub(super) fn knows(_: &Source) -> bool {
    false // by its keys alone
}

/// What the header's entry says of each component.
struct Settings {
    by_component: BTreeMap<String, Map<String, Value>>,
    configs: BTreeMap<String, PeftConfig>,
}

impl Settings {
    fn parse(text: Option<&String>, file: &str) -> Result<Option<Self>> {
        let Some(text) = text else { return Ok(None) };
        let wrong = |reason: String| Error::format(file, format!("header: {METADATA}: {reason}"));
        let by_component = split(parse_object(text).map_err(wrong)?);
        let mut configs = BTreeMap::new();
        for (component, settings) in &by_component {
            let mut object: Map<String, Value> =
                SETTINGS.iter().filter_map(|k| Some(((*k).to_owned(), settings.get(*k)?.clone()))).collect();
            if !object.contains_key("lora_alpha") {
                continue;
            }
            object.insert("peft_type".into(), "LORA".into());
            let config = peft::config::parse(&to_sorted_pretty(&object), file);
            configs.insert(component.clone(), config.map_err(|e| wrong(e.to_string()))?);
        }
        Ok(Some(Settings { by_component, configs }))
    }

    /// The component of a module, its path inside, and its configuration.
    fn of<'a, 'p>(&'a self, path: &'p str) -> Option<(&'p str, &'a PeftConfig, bool)> {
        let whole = || ("", path);
        let (component, rest) =
            path.split_once('.').filter(|(c, _)| self.configs.contains_key(*c)).unwrap_or_else(whole);
        let config = self.configs.get(component)?;
        let rslora = self.by_component.get(component).and_then(|o| o.get("use_rslora"));
        Some((rest, config, rslora == Some(&Value::Bool(true))))
    }
}

/// `unet.r` and so on, by component; keys without one under the empty name.
fn split(object: Map<String, Value>) -> BTreeMap<String, Map<String, Value>> {
    let mut out: BTreeMap<String, Map<String, Value>> = BTreeMap::new();
    for (key, value) in object {
        let (component, setting) = key.split_once('.').unwrap_or(("", &key));
        out.entry(component.to_owned()).or_default().insert(setting.to_owned(), value);
    }
    out
}

pub(super) fn read(source: Source, opts: &LoadOptions) -> Result<Loaded> {
    let file = source.file.clone();
    let Kind::Safetensors(content) = source.content else { return Err(source.unknown()) };
    build(content, opts, &file)
}

fn build(content: Container, opts: &LoadOptions, file: &str) -> Result<Loaded> {
    let settings = Settings::parse(content.metadata.get(METADATA), file)?;
    let mut carried = Carried::take(content.metadata, file)?;
    let mut found = Found::default();
    let mut pairs = Pairs::new(file);
    let mut alphas = Vec::new();
    for mut t in content.tensors {
        match classify(&t.name) {
            Key::Factor(path, side) => pairs.put(&path, side, t)?,
            Key::Alpha(path) => alphas.push((path, t)),
            Key::Magnitude(path) => {
                t.name = magnitude_key(&path);
                found.vary("dora", "DoRA needs the base weights at inference", t);
            }
            Key::Bias => found.vary("lora_bias", "the adapter carries biases", t),
            Key::Other if t.name.ends_with(".dora_scale") => {
                found.vary("dora", "DoRA needs the base weights at inference", t);
            }
            Key::Other => found.leave(t),
        }
    }
    for (path, t) in alphas {
        match pairs.slots.contains_key(&path) {
            true => pairs.put_alpha(&path, &t)?,
            false => found.leave(t),
        }
    }
    let (mut guessed, mut comfy) = (0, 0);
    for (path, mut slot) in pairs.slots {
        comfy += usize::from(path.starts_with("diffusion_model.") || path.starts_with("text_encoders."));
        let both = slot.both(&path, file)?;
        let key = both[0].0.clone();
        let said = settings.as_ref().and_then(|s| s.of(&path));
        let stored = slot.alpha.map(|(_, alpha)| alpha);
        let mut from_rank = false;
        let alpha = |rank: usize| match (stored, &said, opts.alpha) {
            (Some(alpha), _, _) => alpha,
            (None, Some((rest, config, _)), _) => config.alpha_for(rest),
            (None, None, Some(alpha)) => alpha,
            (None, None, None) => {
                from_rank = true;
                rank as f64
            }
        };
        let mut m = pairs::by_dims(&path, both, alpha, opts, file)?;
        guessed += usize::from(from_rank);
        if let Some((rest, config, rslora)) = said {
            let (want, place) = config.rank_for(rest);
            if want != m.rank {
                let reason = format!(
                    "tensor {}: {} rows, but {place} of {METADATA} gives module {} rank {want}",
                    show(&key),
                    m.rank,
                    show(&path)
                );
                return Err(Error::format(file, reason));
            }
            m.use_rslora = rslora && stored.is_none();
        }
        let (alpha, rslora) = (m.alpha, m.use_rslora);
        carried.restore(&path, &mut m, |own| !rslora && own.to_bits() == alpha.to_bits());
        found.add(m);
    }
    if guessed > 0 {
        found.notes.push(format!("{guessed} modules have no alpha: alpha = rank is taken (factor 1)"));
    }
    if comfy > 0 {
        found.notes.push(format!("{comfy} keys are of ComfyUI (diffusion_model., text_encoders.)"));
    }
    found.carried = carried;
    found.finish(opts, file)
}

/// Writes PEFT's key style of diffusers, with the settings of each component in the header.
pub(super) fn save(path: &Path, content: &Content) -> Result<Vec<String>> {
    let file = path.display().to_string();
    let parts = &content.loaded.parts;
    let mut tensors: Vec<Tensor> = Vec::with_capacity(2 * content.modules.len());
    let mut by_component: BTreeMap<&str, Vec<(String, ModuleParts)>> = BTreeMap::new();
    for m in &content.modules {
        for (t, end) in [(&m.a, ".lora_A.weight"), (&m.b, ".lora_B.weight")] {
            let key = format!("{}{end}", m.path);
            if !is_key(&key) || !matches!(classify(&key), Key::Factor(p, _) if p == m.path) {
                let want = "a path that can be read back from the keys of diffusers";
                return Err(Error::config("module path", show(&m.path), want));
            }
            tensors.push(Tensor { name: key, ..t.clone() });
        }
        let (component, rest) =
            m.path.split_once('.').filter(|(c, _)| COMPONENTS.contains(c)).unwrap_or(("", &m.path));
        by_component.entry(component).or_default().push((rest.to_owned(), (*m).clone()));
    }
    let mut dora = BTreeSet::new();
    for (path, t) in &content.magnitudes {
        let component = path.split_once('.').map(|(c, _)| c).filter(|c| COMPONENTS.contains(c));
        dora.insert(component.unwrap_or("").to_owned());
        tensors.push(Tensor { name: format!("{path}.lora_magnitude_vector"), ..(*t).clone() });
    }
    tensors.extend(content.extra.iter().map(|t| (*t).clone()));

    let mut old = match parts.header.get(METADATA).map(|t| parse_object(t)) {
        Some(Ok(object)) => split(object),
        _ => BTreeMap::new(),
    };
    let mut settings = Map::new();
    for (component, mut modules) in by_component {
        let object = old.remove(component).unwrap_or_default();
        let object = component_settings(object, &mut modules, dora.contains(component))?;
        let dot = if component.is_empty() { "" } else { "." };
        settings.extend(object.into_iter().map(|(k, v)| (format!("{component}{dot}{k}"), v)));
    }
    let carried = content.modules.iter().map(|m| (m.path.as_str(), *m));
    let mut header = Carried::give(parts, carried, "pt")?;
    header.insert(METADATA.into(), show_whole(&settings));
    fingerprint::stage(path, header, &tensors, |c| build(c, &fingerprint::as_it_is(), &file))?.commit()?;
    Ok(Vec::new())
}

fn show_whole(settings: &Map<String, Value>) -> String {
    Value::Object(settings.clone()).to_string()
}

/// A component's `LoraConfig`: what it had, with the scaling and the targets that its modules have.
fn component_settings(
    mut object: Map<String, Value>,
    modules: &mut [(String, ModuleParts)],
    dora: bool,
) -> Result<Map<String, Value>> {
    let mixed = modules.iter().any(|(_, m)| m.use_rslora != modules[0].1.use_rslora);
    if mixed {
        for (_, m) in modules.iter_mut() {
            (m.alpha, m.use_rslora) = (plain_alpha(m), false);
        }
    }
    let rows: Vec<(String, &ModuleParts)> = modules.iter().map(|(path, m)| (path.clone(), m)).collect();
    peft::set_scaling(&mut object, &rows)?;
    let targets: BTreeSet<&str> = rows.iter().map(|(path, _)| path.as_str()).collect();
    object.insert("target_modules".into(), json!(targets));
    if dora || object.contains_key("use_dora") {
        object.insert("use_dora".into(), json!(dora));
    }
    object.entry("init_lora_weights").or_insert(json!(true));
    if let Some(v) = object.get("target_parameters").filter(|v| !v.is_null()) {
        return Err(Error::config("target_parameters", show_value(v), "none in a file of diffusers"));
    }
    Ok(object)
}
