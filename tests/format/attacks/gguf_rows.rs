//! Known attacks by GGUF files.

use super::*;

pub const GGUF_ATTACKS: &[Attack] = &[
    Attack {
        name: "GGUF: 2^64 - 1 tensors and keys",
        place: |d| gguf(d, u64::MAX, u64::MAX, &[0; 64]),
        kind: "format",
        words: &["tensor count", "limit"],
    },
    Attack {
        name: "GGUF: more keys than bytes",
        place: |d| gguf(d, 0, u64::MAX, &[0; 64]),
        kind: "format",
        words: &["key count"],
    },
    Attack {
        name: "GGUF: a string of 2^64 - 1 bytes",
        place: |d| gguf(d, 0, 1, &[&u64::MAX.to_le_bytes()[..], &[0; 64]].concat()),
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "GGUF: an array of 2^61 numbers",
        place: |d| {
            let array = [&9u32.to_le_bytes()[..], &4u32.to_le_bytes(), &(1u64 << 61).to_le_bytes(), &[0; 64]]
                .concat();
            gguf(d, 0, 1, &[text("a"), array].concat())
        },
        kind: "format",
        words: &["truncated"],
    },
    Attack {
        name: "GGUF: arrays nested a million deep",
        place: |d| {
            let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(1_000_000);
            gguf(d, 0, 1, &[text("a"), 9u32.to_le_bytes().to_vec(), nested].concat())
        },
        kind: "format",
        words: &["nested deeper"],
    },
    Attack {
        name: "GGUF: a repeated key",
        place: |d| gguf(d, 0, 2, &[gguf_key("a", "1"), gguf_key("a", "2")].concat()),
        kind: "format",
        words: &["\"a\" appears twice"],
    },
    Attack {
        name: "GGUF: a repeated tensor",
        place: |d| {
            let one: (&str, &[u64], u64) = ("q.weight.lora_a", &[2, 2], 0);
            gguf_tensors(d, &[one, one])
        },
        kind: "format",
        words: &["q.weight.lora_a", "twice"],
    },
    Attack {
        name: "GGUF: overlapping tensors",
        place: |d| gguf_tensors(d, &[("q.weight.lora_a", &[16, 1], 0), ("q.weight.lora_b", &[1, 8], 32)]),
        kind: "format",
        words: &["q.weight.lora_b", "overlaps"],
    },
    Attack {
        name: "GGUF: a shape whose product overflows",
        place: |d| gguf_tensors(d, &[("q.weight.lora_a", &[1 << 40, 1 << 40], 0)]),
        kind: "format",
        words: &["q.weight.lora_a", "overflows"],
    },
    Attack {
        name: "GGUF: a name that is not UTF-8",
        place: |d| gguf(d, 0, 1, &[&2u64.to_le_bytes()[..], b"\xff\xfe", &[0; 32]].concat()),
        kind: "format",
        words: &["UTF-8"],
    },
    Attack {
        name: "GGUF: a whole model given as an adapter",
        place: |d| gguf(d, 0, 1, &gguf_key("general.architecture", "llama")),
        kind: "unsupported",
        words: &["whole model", "llama"],
    },
];
