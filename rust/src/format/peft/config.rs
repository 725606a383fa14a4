//! `adapter_config.json`: what of it changes the maths, and what may be ignored.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use serde_json::{Map, Value};

use super::super::Variant;
use super::super::json::{self, show, show_list, show_value, truthy};
use super::super::pattern::{Table, whole};
use super::names::{names_path, pattern_path, wrapped_module};
use super::variants;
use crate::error::{Error, Result};

/// Defaults of PEFT for absent keys.
const DEFAULT_RANK: u64 = 8;
const DEFAULT_ALPHA: f64 = 8.0;
/// Most comparisons of names with tensors that a file may ask for.
const MAX_COMPARED: usize = 1 << 28;

/// Keys that plain LoRA inference does not depend on, whatever their value (or that are read below).
const NEUTRAL: [&str; 30] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias", // matters only with bias tensors, which are found by name
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config", // compresses activations kept for the backward pass; the forward pass is plain
];

/// The parts of a configuration that the maths depends on.
pub struct PeftConfig {
    rank: usize,
    alpha: f64,
    pub(super) use_rslora: bool,
    pub(super) bias: bool,
    ranks: Table<usize>,
    alphas: Table<f64>,
    targets: Targets,
    /// `target_parameters`, `modules_to_save`.
    parameters: Vec<String>,
    saved: Vec<String>,
    /// BD-LoRA: factors are stacked blocks.
    blocks: bool,
    /// What the settings make of the file beside plain LoRA.
    pub(super) variants: Vec<Variant>,
    /// Keys that are switched on and that nothing here knows.
    pub unknown: Vec<String>,
    /// What a reader should know and need not act on.
    pub notes: Vec<String>,
}

/// Parses a configuration; settings of variants are listed, other methods than LoRA refused.
/// `file` is named in errors.
pub fn parse(text: &str, file: &str) -> Result<PeftConfig> {
    let wrong = |reason: String| Error::format(file, reason);
    let object = json::parse_object(text).map_err(wrong)?;
    check_method(&object, file)?;
    let flag = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(v) => Err(wrong(format!("{key}: got {}, expected true or false", show_value(v)))),
    };
    let use_rslora = flag("use_rslora")?;
    for key in ["use_dora", "use_qalora", "lora_bias"] {
        flag(key)?;
    }
    for key in ["kasa_config", "monteclora_config", "arrow_config", "velora_config"] {
        if let Some(v) = object.get(key).filter(|v| !v.is_null() && !v.is_object()) {
            return Err(wrong(format!("{key}: got {}, expected an object", show_value(v))));
        }
    }
    let names = |key: &str| names_of(&object, key).map_err(wrong);
    let (parameters, saved) = (names("target_parameters")?, names("modules_to_save")?);
    let targets = Targets::of(&object).map_err(wrong)?;
    let variants = variants::of_settings(&object);
    let mut notes = Vec::new();
    if flag("fan_in_fan_out")? {
        notes.push("fan_in_fan_out: the base layers store (in, out); transpose before fusing".to_owned());
    }
    let bias = match object.get("bias") {
        None | Some(Value::Null) => false,
        Some(Value::String(s)) if s == "none" => false,
        Some(Value::String(s)) if s == "all" || s == "lora_only" => true,
        Some(v) => {
            return Err(wrong(format!("bias: got {}, expected none, all or lora_only", show_value(v))));
        }
    };
    let rank = object.get("r").map_or(Ok(DEFAULT_RANK as usize), |v| rank_of(v, "r")).map_err(wrong)?;
    let alpha =
        object.get("lora_alpha").map_or(Ok(DEFAULT_ALPHA), |v| alpha_of(v, "lora_alpha")).map_err(wrong)?;
    for (key, default) in [("r", DEFAULT_RANK as f64), ("lora_alpha", DEFAULT_ALPHA)] {
        if !object.contains_key(key) {
            notes.push(format!("{key}: missing, so PEFT's default {default} holds"));
        }
    }
    let ranks = table(&object, "rank_pattern", rank_of, file)?;
    let alphas = table(&object, "alpha_pattern", alpha_of, file)?;
    let known = |key: &str| NEUTRAL.contains(&key) || variants::is_setting(key);
    let unknown = object.iter().filter(|(k, v)| truthy(v) && !known(k)).map(|(k, _)| k.clone()).collect();
    let blocks = variants.iter().any(|v| v.kind == "bdlora");
    Ok(PeftConfig {
        rank,
        alpha,
        use_rslora,
        bias,
        ranks,
        alphas,
        targets,
        parameters,
        saved,
        blocks,
        variants,
        unknown,
        notes,
    })
}

fn check_method(object: &Map<String, Value>, file: &str) -> Result<()> {
    match object.get("peft_type") {
        Some(Value::String(s)) if s == "LORA" => Ok(()),
        Some(v) => {
            let reason =
                format!("peft_type {}: only LORA is read here; convert it to LoRA with PEFT", show_value(v));
            Err(Error::unsupported(file, reason))
        }
        None => Err(Error::format(file, "no peft_type, so this is not a PEFT configuration")),
    }
}

/// A list of names, or none.
fn names_of(object: &Map<String, Value>, key: &str) -> Result<Vec<String>, String> {
    let wrong = |v: &Value| format!("{key}: got {}, expected a list of names", show_value(v));
    match object.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(v @ Value::Array(list)) => {
            let name = |item: &Value| item.as_str().map(str::to_owned).ok_or_else(|| wrong(v));
            list.iter().map(name).collect()
        }
        Some(v) => Err(wrong(v)),
    }
}

/// `target_modules`: which modules PEFT gives a LoRA.
pub(super) enum Targets {
    Nothing,
    AllLinear,
    Names(BTreeSet<String>),
    /// Compiled when asked for; `None` where only Python can run it, and of one that is too large.
    Pattern(String, OnceLock<Option<regex::Regex>>),
}

impl Targets {
    fn of(object: &Map<String, Value>) -> Result<Self, String> {
        Ok(match object.get("target_modules") {
            None | Some(Value::Null) => Targets::Nothing,
            Some(Value::String(s)) if s.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            Some(Value::String(s)) => Targets::Pattern(s.clone(), OnceLock::new()),
            Some(Value::Array(_)) => {
                Targets::Names(names_of(object, "target_modules")?.into_iter().collect())
            }
            Some(v) => {
                let got = show_value(v);
                return Err(format!("target_modules: got {got}, expected a list of names or a pattern"));
            }
        })
    }

    /// Whether it names every one of these paths; `None` for a pattern that only Python can run.
    pub(super) fn name_all<'a>(&self, mut paths: impl Iterator<Item = &'a str>) -> Option<bool> {
        match self {
            Targets::Nothing => Some(paths.next().is_none()),
            Targets::AllLinear => Some(true),
            // A path is named by itself or by what follows one of its dots.
            Targets::Names(names) => Some(paths.all(|p| {
                names.contains(p) || p.match_indices('.').any(|(i, _)| names.contains(&p[i + 1..]))
            })),
            Targets::Pattern(s, compiled) => {
                let pattern = compiled.get_or_init(|| whole(s).ok()).as_ref()?;
                Some(paths.all(|p| pattern.is_match(p)))
            }
        }
    }
}

fn rank_of(value: &Value, key: &str) -> Result<usize, String> {
    let rank =
        value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0 && n <= u32::MAX as usize);
    rank.ok_or_else(|| format!("{key}: got {}, expected a whole number of at least 1", show_value(value)))
}

fn alpha_of(value: &Value, key: &str) -> Result<f64, String> {
    let alpha = value.as_f64().filter(|a| a.is_finite());
    alpha.ok_or_else(|| format!("{key}: got {}, expected a finite number", show_value(value)))
}

fn table<T>(
    object: &Map<String, Value>,
    key: &str,
    read: impl Fn(&Value, &str) -> Result<T, String>,
    file: &str,
) -> Result<Table<T>> {
    let mut out = Table::default();
    match object.get(key) {
        None | Some(Value::Null) => {}
        Some(Value::Object(patterns)) => {
            for (pattern, value) in patterns {
                let value =
                    read(value, &format!("{key}[{}]", show(pattern))).map_err(|e| Error::format(file, e))?;
                out.push(pattern, value).map_err(|e| Error::unsupported(file, format!("{key}: {e}")))?;
            }
        }
        Some(v) => {
            let reason = format!("{key}: got {}, expected an object", show_value(v));
            return Err(Error::format(file, reason));
        }
    }
    Ok(out)
}

impl PeftConfig {
    /// Rank of a module, and which key says so.
    pub fn rank_for(&self, path: &str) -> (usize, &'static str) {
        self.ranks.find(pattern_path(path)).map_or((self.rank, "r"), |(_, &r)| (r, "rank_pattern"))
    }

    /// Alpha of a module.
    pub fn alpha_for(&self, path: &str) -> f64 {
        self.alphas.find(pattern_path(path)).map_or(self.alpha, |(_, &a)| a)
    }

    /// Whether `target_modules` names all of these paths; `None` where only Python can say.
    pub(super) fn targets_all<'a>(&self, paths: impl Iterator<Item = &'a str>) -> Option<bool> {
        self.targets.name_all(paths)
    }

    /// Whether a module, or one around it, is in `modules_to_save` (by the end of its path, as PEFT does).
    pub(super) fn saves(&self, module: &str) -> bool {
        let ends = module.match_indices('.').map(|(i, _)| i).chain([module.len()]);
        let mut around = ends.map(|end| &module[..end]);
        !self.saved.is_empty() && around.any(|m| self.saved.iter().any(|name| m.ends_with(name.as_str())))
    }

    /// The kind of a pair of factors that is kept as it lies, because it is no pair of one layer.
    pub(super) fn raw_kind(&self, path: &str) -> Option<&'static str> {
        if self.is_parameter(path) {
            return Some("target_parameters");
        }
        self.blocks.then_some("bdlora")
    }

    /// Whether factors at this path adapt raw parameters of a module.
    fn is_parameter(&self, path: &str) -> bool {
        let module = wrapped_module(path);
        if module.len() < path.len() {
            return true;
        }
        let mut of_any_module = false;
        for target in &self.parameters {
            match target.rsplit_once('.') {
                Some((owner, _)) if names_path(owner, module) => return true,
                Some(_) => {}
                None => of_any_module = true,
            }
        }
        of_any_module && self.targets.name_all([pattern_path(path)].into_iter()) != Some(true)
    }

    /// Rank and alpha that the parameter behind a path can have: its name is not in the key, so there
    /// may be several.
    pub(super) fn parameter_scalings(&self, path: &str) -> Vec<(usize, f64)> {
        let module = wrapped_module(path);
        let of = |target: &String| match target.rsplit_once('.') {
            Some((owner, name)) => names_path(owner, module).then(|| format!("{module}.{name}")),
            None => Some(format!("{module}.{target}")),
        };
        let mut keys: Vec<String> = self.parameters.iter().filter_map(of).collect();
        if keys.is_empty() {
            keys.push(module.to_owned());
        }
        let mut out: Vec<(usize, f64)> = Vec::new();
        for key in keys {
            let scaling = (self.rank_for(&key).0, self.alpha_for(&key));
            if !out.contains(&scaling) {
                out.push(scaling);
            }
        }
        out
    }

    /// Refuses lists of names whose use on that many tensors would take too long.
    pub(super) fn check_names_work(&self, tensors: usize, file: &str) -> Result<()> {
        let nameless = self.parameters.iter().filter(|t| !t.contains('.')).count();
        let patterns = tensors.saturating_mul(nameless).saturating_mul(self.ranks.len() + self.alphas.len());
        let compared = tensors.saturating_mul(self.parameters.len() + self.saved.len());
        if compared <= MAX_COMPARED && patterns <= MAX_COMPARED >> 6 {
            return Ok(());
        }
        let reason = format!(
            "{} names in target_parameters and modules_to_save for {tensors} tensors",
            self.parameters.len() + self.saved.len()
        );
        Err(Error::format(file, reason))
    }

    /// Refuses pattern tables whose use on these paths would take too long.
    pub(super) fn check_work(&self, paths: &[&str], file: &str) -> Result<()> {
        let both = self.ranks.check_work(paths).and_then(|()| self.alphas.check_work(paths));
        both.map_err(|e| Error::format(file, e))
    }

    /// A note for each table with keys that match no module.
    pub(super) fn unmatched_notes(&self, paths: &[&str]) -> Vec<String> {
        let paths: Vec<&str> = paths.iter().map(|p| pattern_path(p)).collect();
        let tables = [
            ("rank_pattern", self.ranks.unmatched(&paths)),
            ("alpha_pattern", self.alphas.unmatched(&paths)),
        ];
        let note =
            |(name, keys): (&str, Vec<&str>)| format!("{name}: no module matches {}", show_list(&keys));
        tables.into_iter().filter(|(_, keys)| !keys.is_empty()).map(note).collect()
    }
}
