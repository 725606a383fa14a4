//! What a key of a PEFT weights file says.

use super::PREFIX;

/// Which factor a key holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Factor {
    A,
    B,
}

/// One key, understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Key<'a> {
    /// A LoRA factor of the module at `path`.
    Factor { prefix: &'a str, path: String, factor: Factor },
    /// A tensor of a variant whose maths differs from plain LoRA.
    Variant(&'static str),
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

const MARKS: [(&str, &str); 8] = [
    ("lora_embedding_A", "a LoRA on an embedding (lora_embedding_A)"),
    ("lora_embedding_B", "a LoRA on an embedding (lora_embedding_B)"),
    ("lora_magnitude_vector", "DoRA (lora_magnitude_vector)"),
    ("lora_diag", "KaSA (lora_diag)"),
    ("lora_monteclora_sampler", "MonteCLoRA (lora_monteclora_sampler)"),
    ("token_adapter", "trained token rows (token_adapter)"),
    ("trainable_tokens_delta", "trained token rows (trainable_tokens_delta)"),
    ("modules_to_save", "a replaced module (modules_to_save)"),
];

/// VeLoRA's projection of activations kept for the backward pass.
const VELORA: &str = "lora_velora_embed";

/// Understands a key: prefix and a `.default` adapter name are stripped.
pub(super) fn classify(key: &str) -> Key<'_> {
    let (prefix, rest) = split_prefix(key);
    let segments: Vec<&str> = rest.split('.').collect();
    for (mark, variant) in MARKS {
        if segments.contains(&mark) {
            return Key::Variant(variant);
        }
    }
    if segments.contains(&VELORA) {
        return Key::Training;
    }
    let Some(at) = segments.iter().rposition(|s| matches!(*s, "lora_A" | "lora_B")) else {
        return match rest.ends_with(".base_layer.bias") {
            true => Key::Variant("a trained bias of the base model (base_layer.bias)"),
            false => Key::Other,
        };
    };
    let factor = if segments[at] == "lora_A" { Factor::A } else { Factor::B };
    match (&segments[at + 1..], factor) {
        (["bias"] | ["default", "bias"], Factor::B) => Key::Variant("a bias in the adapter (lora_bias)"),
        (["weight"] | ["default", "weight"], _) if at > 0 && segments[at - 1] == "base_layer" => {
            Key::Variant("LoRA on raw parameters (target_parameters, base_layer.lora_A)")
        }
        (["weight"] | ["default", "weight"], _) if segments[..at].iter().any(|s| !s.is_empty()) => {
            Key::Factor { prefix, path: segments[..at].join("."), factor }
        }
        _ => Key::Other,
    }
}

/// Whether a tensor that is no factor has nothing to say about the weights.
pub(crate) fn is_only_for_training(key: &str) -> bool {
    matches!(classify(key), Key::Training)
}

/// The path that PEFT matches patterns and targets against: of a wrapped layer, the wrapper's.
pub(super) fn pattern_path(path: &str) -> &str {
    path.split_once(".base_layer.").map_or(path, |(outer, _)| outer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_understood() {
        for (key, prefix, path) in [
            ("base_model.model.m.q.lora_A.weight", PREFIX, "m.q"),
            (
                "base_model.model.base_model.model.m.q.lora_A.weight",
                "base_model.model.base_model.model.",
                "m.q",
            ),
            ("m.q.lora_A.weight", "", "m.q"),
            ("base_model.model.m.q.lora_A.default.weight", PREFIX, "m.q"),
            ("base_model.model.q.lora_A.weight", PREFIX, "q"),
        ] {
            assert_eq!(classify(key), Key::Factor { prefix, path: path.into(), factor: Factor::A }, "{key}");
        }
        for key in [
            "lora_A.weight",
            "base_model.model.lora_A.weight",
            "m.q.lora_A",
            "m.q.lora_A.other.weight",
            "x.bias",
        ] {
            assert_eq!(classify(key), Key::Other, "{key}");
        }
        assert_eq!(classify("base_model.model.m.q.lora_velora_embed"), Key::Training);
        for key in [
            "m.q.lora_B.bias",
            "m.q.lora_magnitude_vector",
            "m.q.lora_magnitude_vector.default.weight",
            "m.q.lora_diag",
            "m.e.lora_embedding_A",
            "m.e.lora_embedding_B.default",
            "m.e.token_adapter.trainable_tokens_delta",
            "m.experts.base_layer.lora_A.weight",
            "m.q.base_layer.bias",
            "head.modules_to_save.default.weight",
        ] {
            assert!(matches!(classify(key), Key::Variant(_)), "{key}");
        }
    }

    #[test]
    fn wrapped_layers_match_by_their_wrapper() {
        assert_eq!(pattern_path("m.attn.base_layer.out_proj"), "m.attn");
        assert_eq!(pattern_path("m.attn"), "m.attn");
    }
}
