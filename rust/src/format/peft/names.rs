//! What a key of a PEFT weights file says.

use super::PREFIX;

/// Which factor a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Factor {
    A,
    B,
}

/// One key, understood as far as it can be without the configuration.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// A factor of the layer at `path`, of an embedding or of another.
    Factor { prefix: &'a str, path: String, factor: Factor, embedding: bool },
    /// A tensor of that kind of variant.
    Part(&'static str),
    /// A tensor that only training uses; kept, and not asked about.
    Training,
    /// Anything else.
    Other,
}

/// Splits the repeated `base_model.model.` from a key.
pub(super) fn split_prefix(key: &str) -> (&str, &str) {
    let mut rest = key;
    while let Some(shorter) = rest.strip_prefix(PREFIX) {
        rest = shorter;
    }
    key.split_at(key.len() - rest.len())
}

const MARKS: [(&str, &str); 6] = [
    ("lora_magnitude_vector", "dora"),
    ("lora_diag", "kasa"),
    ("lora_monteclora_sampler", "monteclora"),
    ("token_adapter", "trainable_tokens"),
    ("trainable_tokens_delta", "trainable_tokens"),
    ("modules_to_save", "modules_to_save"),
];

const FACTORS: [(&str, Factor, bool); 4] = [
    ("lora_A", Factor::A, false),
    ("lora_B", Factor::B, false),
    ("lora_embedding_A", Factor::A, true),
    ("lora_embedding_B", Factor::B, true),
];

/// VeLoRA's projection of activations kept for the backward pass.
const VELORA: &str = "lora_velora_embed";

/// Understands a key: prefix and a `.default` adapter name are stripped.
pub(super) fn classify(key: &str) -> Key<'_> {
    let (prefix, rest) = split_prefix(key);
    let segments: Vec<&str> = rest.split('.').collect();
    for (mark, kind) in MARKS {
        if segments.contains(&mark) {
            return Key::Part(kind);
        }
    }
    if segments.contains(&VELORA) {
        return Key::Training;
    }
    let found = segments.iter().enumerate().rev().find_map(|(at, s)| {
        let row = FACTORS.iter().find(|(name, ..)| name == s)?;
        Some((at, row.1, row.2))
    });
    let Some((at, factor, embedding)) = found else {
        return match rest {
            _ if rest.ends_with(".base_layer.bias") => Key::Part("bias"),
            _ if rest.ends_with(".base_layer.weight") => Key::Part("saved_embedding"),
            _ => Key::Other,
        };
    };
    let weight = if embedding { &[][..] } else { &["weight"][..] };
    let after = match &segments[at + 1..] {
        ["default", after @ ..] => after,
        after => after,
    };
    if (after, factor, embedding) == (&["bias"], Factor::B, false) {
        return Key::Part("lora_bias");
    }
    if after != weight || segments[..at].iter().all(|s| s.is_empty()) {
        return Key::Other;
    }
    Key::Factor { prefix, path: segments[..at].join("."), factor, embedding }
}

/// The keys of both factors under a prefix.
pub(super) fn keys(prefix: &str, path: &str, embedding: bool) -> [String; 2] {
    if embedding {
        ["A", "B"].map(|f| format!("{prefix}{path}.lora_embedding_{f}"))
    } else {
        ["A", "B"].map(|f| format!("{prefix}{path}.lora_{f}.weight"))
    }
}

/// The key as PEFT stores it: without the adapter's name behind LoRA's own part of it, and without the
/// `.weight` that a magnitude has in memory alone. Any other key is its own.
pub(super) fn stored_name(key: &str) -> String {
    const NAMED: [&str; 5] =
        ["lora_B", "lora_magnitude_vector", "lora_diag", "lora_monteclora_sampler", "trainable_tokens_delta"];
    let (prefix, rest) = split_prefix(key);
    let mut segments: Vec<&str> = rest.split('.').collect();
    let Some(mark) = segments.iter().rposition(|s| NAMED.contains(s)) else { return key.to_owned() };
    let named = segments.get(mark + 1) == Some(&"default");
    if named {
        segments.remove(mark + 1);
    }
    if segments[mark] == "lora_magnitude_vector" && segments[mark + 1..] == ["weight"] {
        segments.pop();
    } else if !named {
        return key.to_owned();
    }
    let prefix = if prefix.is_empty() { PREFIX } else { prefix };
    format!("{prefix}{}", segments.join("."))
}

/// Whether a tensor that is no factor has nothing to say about the weights.
pub(crate) fn is_only_for_training(key: &str) -> bool {
    matches!(classify(key), Key::Training)
}

/// The path that PEFT matches patterns and targets against: of a wrapped layer, the wrapper's.
pub(super) fn pattern_path(path: &str) -> &str {
    path.split_once(".base_layer.").map_or(path, |(outer, _)| outer)
}

/// The module whose parameters nested wrappers adapt: the path without their `.base_layer`.
pub(super) fn wrapped_module(path: &str) -> &str {
    let mut module = path;
    while let Some(outer) = module.strip_suffix(".base_layer") {
        module = outer;
    }
    module
}

/// Whether a setting's name means this path: itself, or what follows one of its dots.
pub(super) fn names_path(name: &str, path: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_understood() {
        let twice = "base_model.model.base_model.model.";
        for (key, prefix, path, embedding) in [
            ("base_model.model.m.q.lora_A.weight", PREFIX, "m.q", false),
            ("base_model.model.base_model.model.m.q.lora_A.weight", twice, "m.q", false),
            ("m.q.lora_A.weight", "", "m.q", false),
            ("base_model.model.m.q.lora_A.default.weight", PREFIX, "m.q", false),
            ("base_model.model.q.lora_A.weight", PREFIX, "q", false),
            ("base_model.model.m.e.lora_embedding_A", PREFIX, "m.e", true),
            ("m.e.lora_embedding_A.default", "", "m.e", true),
            ("m.experts.base_layer.lora_A.weight", "", "m.experts.base_layer", false),
        ] {
            let path = path.to_owned();
            assert_eq!(classify(key), Key::Factor { prefix, path, factor: Factor::A, embedding }, "{key}");
        }
        for (path, embedding) in [("m.q", false), ("m.e", true)] {
            for (key, factor) in keys(PREFIX, path, embedding).iter().zip([Factor::A, Factor::B]) {
                let want = Key::Factor { prefix: PREFIX, path: path.into(), factor, embedding };
                assert_eq!(classify(key), want);
            }
        }
        for key in [
            "lora_A.weight",
            "base_model.model.lora_A.weight",
            "m.q.lora_A",
            "m.q.lora_A.bias",
            "m.q.lora_A.other.weight",
            "m.e.lora_embedding_A.weight",
            "lora_embedding_A",
            "x.bias",
        ] {
            assert_eq!(classify(key), Key::Other, "{key}");
        }
        assert_eq!(classify("base_model.model.m.q.lora_velora_embed"), Key::Training);
        for (key, kind) in [
            ("m.q.lora_B.bias", "lora_bias"),
            ("m.q.lora_B.default.bias", "lora_bias"),
            ("m.q.lora_magnitude_vector", "dora"),
            ("m.q.lora_magnitude_vector.default.weight", "dora"),
            ("m.q.lora_diag", "kasa"),
            ("m.q.lora_monteclora_sampler.std_prior", "monteclora"),
            ("m.e.token_adapter.trainable_tokens_delta", "trainable_tokens"),
            ("m.q.base_layer.bias", "bias"),
            ("m.e.base_layer.weight", "saved_embedding"),
            ("head.modules_to_save.default.weight", "modules_to_save"),
        ] {
            assert_eq!(classify(key), Key::Part(kind), "{key}");
        }
    }

    #[test]
    fn names_in_memory_become_those_of_files() {
        for (key, want) in [
            ("m.q.lora_magnitude_vector.default.weight", "base_model.model.m.q.lora_magnitude_vector"),
            ("base_model.model.q.lora_magnitude_vector.weight", "base_model.model.q.lora_magnitude_vector"),
            ("base_model.model.q.lora_B.default.bias", "base_model.model.q.lora_B.bias"),
            ("q.lora_diag.default", "base_model.model.q.lora_diag"),
            ("q.lora_diag", "q.lora_diag"),
            ("x.default.lora_B.bias", "x.default.lora_B.bias"),
            ("head.modules_to_save.default.weight", "head.modules_to_save.default.weight"),
        ] {
            assert_eq!(stored_name(key), want);
        }
    }

    #[test]
    fn names_mean_whole_segments() {
        assert!(names_path("q", "q") && names_path("q", "m.q") && names_path("m.q", "x.m.q"));
        assert!(!names_path("q", "m.xq") && !names_path("m.q", "q") && !names_path("", "q"));
        assert_eq!(wrapped_module("m.e.base_layer.base_layer"), "m.e");
    }

    #[test]
    fn wrapped_layers_match_by_their_wrapper() {
        assert_eq!(pattern_path("m.attn.base_layer.out_proj"), "m.attn");
        assert_eq!(pattern_path("m.attn"), "m.attn");
    }
}
