//! `adapter_config.json`: what of it changes the maths, and what may be ignored.

use serde_json::{Map, Value};

use super::super::json::{self, show, show_list, show_value, truthy};
use super::super::pattern::Table;
use super::names::pattern_path;
use crate::error::{Error, Result};

/// Defaults of PEFT for absent keys.
const DEFAULT_RANK: u64 = 8;
const DEFAULT_ALPHA: f64 = 8.0;

/// Keys that plain LoRA inference does not depend on, whatever their value (or that are read below).
const NEUTRAL: [&str; 30] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias", // matters only with bias tensors, which are refused where they appear
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

/// Keys that, switched on, make the file something else than plain LoRA on linear layers.
const REFUSED: [(&str, &str); 12] = [
    ("use_dora", "DoRA needs the base weights at inference; merge it with PEFT, or train without DoRA"),
    ("use_qalora", "QALoRA pools its input by groups; merge it with PEFT"),
    ("use_bdlora", "BD-LoRA stores block-diagonal factors; expand them to plain LoRA with PEFT"),
    ("alora_invocation_tokens", "an activated LoRA is switched by tokens of the prompt; run it with PEFT"),
    ("arrow_config", "Arrow routes between several adapters; load the single adapters"),
    ("target_parameters", "LoRA on raw parameters packs experts in one tensor; convert it to linear layers"),
    ("layer_replication", "names refer to a replicated layer stack; run it with PEFT"),
    ("monteclora_config", "MonteCLoRA samples its factors; save the mean as plain LoRA with PEFT"),
    ("kasa_config", "KaSA truncates the base weights and adds a diagonal; convert it with PEFT"),
    ("lora_bias", "the adapter carries biases; train with lora_bias=False, or merge it with PEFT"),
    ("modules_to_save", "whole modules of the base are replaced; load those with PEFT and save LoRA alone"),
    (
        "trainable_token_indices",
        "rows of the embedding are replaced; load those with PEFT and save LoRA alone",
    ),
];

/// Initialisations after which B·A still refers to the untouched base weights.
const SOUND_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];

/// The parts of a configuration that the maths depends on.
pub struct PeftConfig {
    rank: usize,
    alpha: f64,
    pub(super) use_rslora: bool,
    pub(super) bias: bool,
    ranks: Table<usize>,
    alphas: Table<f64>,
    /// Keys that are switched on and that nothing here knows.
    pub unknown: Vec<String>,
    /// What a reader should know and need not act on.
    pub notes: Vec<String>,
}

/// Parses a configuration and refuses every variant that is not plain LoRA. `file` is named in errors.
pub fn parse(text: &str, file: &str) -> Result<PeftConfig> {
    let wrong = |reason: String| Error::format(file, reason);
    let object = json::parse_object(text).map_err(wrong)?;
    check_variant(&object, file)?;
    let flag = |key: &str| match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        Some(v) => Err(wrong(format!("{key}: got {}, expected true or false", show_value(v)))),
    };
    let use_rslora = flag("use_rslora")?;
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
    let ranks = table(&object, "rank_pattern", rank_of, file)?;
    let alphas = table(&object, "alpha_pattern", alpha_of, file)?;
    let known = |key: &str| NEUTRAL.contains(&key) || REFUSED.iter().any(|(k, _)| *k == key);
    let unknown = object.iter().filter(|(k, v)| truthy(v) && !known(k)).map(|(k, _)| k.clone()).collect();
    Ok(PeftConfig { rank, alpha, use_rslora, bias, ranks, alphas, unknown, notes })
}

fn check_variant(object: &Map<String, Value>, file: &str) -> Result<()> {
    let unsupported = |reason: String| Err(Error::unsupported(file, reason));
    match object.get("peft_type") {
        Some(Value::String(s)) if s == "LORA" => {}
        Some(v) => {
            return unsupported(format!(
                "peft_type {}: only LORA is run here; convert it to LoRA with PEFT",
                show_value(v)
            ));
        }
        None => return Err(Error::format(file, "no peft_type, so this is not a PEFT configuration")),
    }
    for (key, why) in REFUSED {
        // An empty list of tokens still switches aLoRA on.
        let on = |v: &Value| if key == "alora_invocation_tokens" { !v.is_null() } else { truthy(v) };
        if let Some(v) = object.get(key).filter(|v| on(v)) {
            return unsupported(format!("{key} = {}: {why}", show_value(v)));
        }
    }
    match object.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(s)) if SOUND_INITS.contains(&s.to_ascii_lowercase().as_str()) => Ok(()),
        Some(v) => unsupported(format!(
            "init_lora_weights = {}: such an initialisation changes the base weights, so B·A does not refer to the \
             original model; save it again with PEFT's path_initial_model_for_weight_conversion",
            show_value(v)
        )),
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
