//! What a PEFT file can hold besides plain LoRA on linear layers: kept, named, and not run.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::super::json::{parse_object, show_value, to_sorted_pretty, truthy};
use super::super::{AdapterParts, ModuleKind, Variant};
use super::CONFIG_FILE;
use super::config::{self, PeftConfig};
use super::names::{Key, classify, split_prefix};
use crate::error::Result;

/// Each kind: what it changes, and the way out.
const KINDS: [(&str, &str); 17] = [
    ("dora", "DoRA rescales base weight and delta together and needs the base weights; merge it with PEFT"),
    ("lora_bias", "the adapter adds biases of its own (lora_B.bias); merge it with PEFT"),
    ("bias", "a trained bias of the base model; put it into the base model"),
    (
        "modules_to_save",
        "a whole module of the base is replaced (modules_to_save); put it into the base model",
    ),
    (
        "trainable_tokens",
        "rows of an embedding are replaced (trained tokens); write them into the base model",
    ),
    ("saved_embedding", "a whole embedding of the base model is replaced; put it into the base model"),
    (
        "target_parameters",
        "LoRA on raw parameters (target_parameters) packs all experts in one pair; AdapterFile.unpack_experts gives \
         each expert's factors",
    ),
    ("experts", "a LoRA on each expert of a mixture; only linear layers are run here"),
    ("embedding", "a LoRA on an embedding table; only linear layers are run here, merge it with PEFT"),
    ("conv", "a LoRA on a convolution; only linear layers are run here, merge it with PEFT"),
    ("qalora", "QALoRA pools its input by groups; run it with PEFT"),
    ("bdlora", "BD-LoRA stores a factor as stacked blocks; run it with PEFT"),
    ("kasa", "KaSA truncates the base weights and puts a diagonal between the factors; merge it with PEFT"),
    ("arrow", "Arrow routes between several adapters; load the single adapters"),
    (
        "alora",
        "an activated LoRA acts only behind the tokens that invoke it; run it with PEFT (left out, it acts on every \
         token)",
    ),
    ("monteclora", "MonteCLoRA samples around its factors (left out, the means run as plain LoRA)"),
    ("layer_replication", "names refer to a stack of replicated layers, not to the base model's own"),
];

/// Most places of one kind that are listed: a large file has one for each of its layers.
const MAX_LISTED: usize = 1024;

/// Settings that, switched on, make one of those kinds.
const SETTINGS: [(&str, &str); 12] = [
    ("use_dora", "dora"),
    ("use_qalora", "qalora"),
    ("use_bdlora", "bdlora"),
    ("alora_invocation_tokens", "alora"),
    ("arrow_config", "arrow"),
    ("target_parameters", "target_parameters"),
    ("layer_replication", "layer_replication"),
    ("monteclora_config", "monteclora"),
    ("kasa_config", "kasa"),
    ("lora_bias", "lora_bias"),
    ("modules_to_save", "modules_to_save"),
    ("trainable_token_indices", "trainable_tokens"),
];

/// Initialisations after which B·A still refers to the untouched base weights.
const SOUND_INITS: [&str; 4] = ["gaussian", "eva", "orthogonal", "mica"];
/// Those that change the base weights, known by how their names start.
const CHANGING_INITS: [&str; 5] = ["pissa", "olora", "corda", "lora_ga", "loftq"];

/// Embeddings and heads as models call them; saved whole where they were resized.
const EMBEDDINGS: [&str; 8] = [
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "tok_embeddings",
    "shared",
];

/// What a tensor that is no factor of a module is there for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// A part of that kind of variant.
    Part(&'static str),
    Training,
    Unused,
}

/// True when a setting belongs to one of the kinds.
pub(super) fn is_setting(key: &str) -> bool {
    SETTINGS.iter().any(|(k, _)| *k == key)
}

/// Every kind that a PEFT file can show, those of initialisations too.
pub(in super::super) fn kinds() -> impl Iterator<Item = String> {
    let inits = CHANGING_INITS.iter().chain(["unknown"].iter()).map(|k| format!("init:{k}"));
    KINDS.iter().map(|(kind, _)| (*kind).to_owned()).chain(inits)
}

fn variant(kind: &str, at: String) -> Variant {
    let why = KINDS.iter().find(|(k, _)| *k == kind).map_or("", |(_, why)| why);
    Variant { kind: kind.into(), at, why: why.into() }
}

/// The variants that a configuration switches on.
pub(super) fn of_settings(object: &Map<String, Value>) -> Vec<Variant> {
    let on = |key: &str, v: &Value| match key {
        // Empty tokens still switch aLoRA on, and an empty object of settings its method.
        "alora_invocation_tokens" => !v.is_null(),
        "use_bdlora" => !matches!(v, Value::Null | Value::Bool(false)),
        _ if key.ends_with("_config") => !v.is_null(),
        _ => truthy(v),
    };
    let is_on = |key: &str| object.get(key).is_some_and(|v| on(key, v));
    let settings = SETTINGS.iter().filter(|(key, _)| is_on(key));
    let mut out: Vec<Variant> =
        settings.map(|(key, kind)| variant(kind, format!("{CONFIG_FILE}: {key}"))).collect();
    out.extend(object.get("init_lora_weights").and_then(initialisation));
    out
}

fn initialisation(value: &Value) -> Option<Variant> {
    let name = match value {
        Value::Null | Value::Bool(_) => return None,
        Value::String(s) => s.to_ascii_lowercase(),
        _ => String::new(),
    };
    if SOUND_INITS.contains(&name.as_str()) {
        return None;
    }
    let known = CHANGING_INITS.iter().find(|k| name.starts_with(**k)).unwrap_or(&"unknown");
    let why = format!(
        "initialised with {}, which changes the base weights: B A does not refer to the original model; \
         convert_to_plain makes it portable where the initial factors are at hand",
        show_value(value)
    );
    Some(Variant { kind: format!("init:{known}"), at: format!("{CONFIG_FILE}: init_lora_weights"), why })
}

/// What a tensor that is no factor of a module is there for.
pub(super) fn use_of(key: &str, config: Option<&PeftConfig>) -> Use {
    match classify(key) {
        Key::Part(kind) => Use::Part(kind),
        Key::Training => Use::Training,
        Key::Factor { embedding: true, .. } => Use::Unused,
        Key::Factor { path, .. } => config.and_then(|c| c.raw_kind(&path)).map_or(Use::Unused, Use::Part),
        Key::Other => {
            let (_, rest) = split_prefix(key);
            let module = rest.rsplit_once('.').map_or("", |(module, _)| module);
            let embedding = EMBEDDINGS.contains(&module.rsplit('.').next().unwrap_or(""));
            match config {
                Some(c) if c.saves(module) => Use::Part("modules_to_save"),
                Some(c) if c.bias && rest.ends_with(".bias") => Use::Part("bias"),
                Some(_) if embedding && (rest.ends_with(".weight") || rest.ends_with(".bias")) => {
                    Use::Part("saved_embedding")
                }
                _ => Use::Unused,
            }
        }
    }
}

/// Everything in these parts that is not plain LoRA on linear layers, as PEFT understands them.
pub(crate) fn of(parts: &AdapterParts, file: &str) -> Result<Vec<Variant>> {
    let config = match &parts.peft_config {
        Some(text) => Some(config::parse(text, file)?),
        None => None,
    };
    Ok(with(parts, config.as_ref()))
}

pub(super) fn with(parts: &AdapterParts, config: Option<&PeftConfig>) -> Vec<Variant> {
    let mut out = config.map_or_else(Vec::new, |c| c.variants.clone());
    let mut listed: HashMap<&'static str, usize> = HashMap::new();
    let mut add = |out: &mut Vec<Variant>, kind: &'static str, at: &str| {
        let count = listed.entry(kind).or_default();
        *count += 1;
        if *count <= MAX_LISTED {
            out.push(variant(kind, at.to_owned()));
        }
    };
    let parameters = out.iter().any(|v| v.kind == "target_parameters");
    for m in &parts.modules {
        let kind = match m.kind {
            ModuleKind::Linear => continue,
            ModuleKind::Experts if parameters => "target_parameters",
            kind => kind.as_str(),
        };
        add(&mut out, kind, &m.path);
    }
    for t in &parts.extra {
        if let Use::Part(kind) = use_of(&t.name, config) {
            add(&mut out, kind, &t.name);
        }
    }
    out
}

/// The configuration without the settings of any variant, for what is left when they are dropped.
pub(crate) fn plain_config(text: &str) -> Option<String> {
    let mut object = parse_object(text).ok()?;
    for (key, _) in SETTINGS {
        object.insert(key.into(), if key.starts_with("use_") { false.into() } else { Value::Null });
    }
    object.insert("lora_bias".into(), false.into());
    object.insert("bias".into(), "none".into());
    object.insert("init_lora_weights".into(), true.into());
    Some(to_sorted_pretty(&object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_has_a_kind_that_says_why() {
        for (key, kind) in SETTINGS {
            assert!(!variant(kind, String::new()).why.is_empty(), "{key}");
        }
        for key in ["q.lora_B.bias", "q.lora_diag", "q.base_layer.bias", "e.base_layer.weight"] {
            let Use::Part(kind) = use_of(key, None) else { panic!("{key}") };
            assert!(!variant(kind, String::new()).why.is_empty(), "{key}");
        }
    }

    #[test]
    fn initialisations_are_told_apart() {
        let kind = |v: Value| initialisation(&v).map(|v| v.kind);
        for sound in [Value::Null, true.into(), false.into(), "Gaussian".into(), "mica".into()] {
            assert_eq!(kind(sound), None);
        }
        for (value, want) in
            [("pissa", "pissa"), ("PiSSA_niter_16", "pissa"), ("loftq", "loftq"), ("new", "unknown")]
        {
            assert_eq!(kind(value.into()), Some(format!("init:{want}")));
        }
        assert_eq!(kind(3.into()).as_deref(), Some("init:unknown"));
    }
}
