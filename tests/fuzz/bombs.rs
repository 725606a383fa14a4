//! Small files that ask for much, and large ones of nothing: each within the memory and time of its size.

use std::io::Write;

use super::mutate::archive;
use super::{TARGETS, run, watch};

/// Makes the bytes of one.
type Make = fn() -> Vec<u8>;

fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// Tensors of no bytes, by the names that `name` makes.
fn empty_tensors(count: usize, name: impl Fn(usize) -> String) -> String {
    let one = |i| format!(r#""{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#, name(i));
    format!("{{{}}}", (0..count).map(one).collect::<Vec<_>>().join(","))
}

fn metadata(entries: &str) -> Vec<u8> {
    safetensors(&format!(r#"{{"__metadata__":{{{entries}}}}}"#), b"")
}

/// Our own file with a list of modules that it does not hold.
fn modules(count: usize) -> Vec<u8> {
    let one = |i| format!(r#"{{\"path\":\"{i}\",\"rank\":1,\"alpha\":1.0,\"use_rslora\":false}}"#);
    let list = (0..count).map(one).collect::<Vec<_>>().join(",");
    metadata(&format!(r#""format":"microlora","format_version":"1","modules":"[{list}]""#))
}

fn pair(config: &str, weights: Vec<u8>) -> Vec<u8> {
    [&(config.len() as u16).to_le_bytes()[..], config.as_bytes(), &weights].concat()
}

const LORA: &str = r#"{"peft_type":"LORA"}"#;

fn patterns(entries: impl Iterator<Item = String>) -> Vec<u8> {
    let list: Vec<String> = entries.map(|key| format!(r#""{key}":1"#)).collect();
    format!(r#"{{"peft_type":"LORA","rank_pattern":{{{}}}}}"#, list.join(",")).into_bytes()
}

fn deflated(len: usize) -> Vec<u8> {
    let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    let block = vec![0; 1 << 16];
    (0..len >> 16).for_each(|_| out.write_all(&block).unwrap());
    out.finish().unwrap()
}

/// An archive with one deflated member that says it is of `len` bytes.
fn zip_bomb(len: u32, packed: &[u8]) -> Vec<u8> {
    let mut bytes = archive(&[(b"m.lora_a.npy".to_vec(), packed.to_vec())]);
    let central = bytes.windows(4).rposition(|w| w == b"PK\x01\x02").unwrap();
    // Method, then the size in full, here and in the directory.
    for at in [8, central + 10] {
        bytes[at..at + 2].copy_from_slice(&8u16.to_le_bytes());
    }
    for at in [22, central + 24] {
        bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
    }
    bytes
}

fn gguf(tensors: u64, keys: u64, body: &[u8]) -> Vec<u8> {
    [&b"GGUF\x03\0\0\0"[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), body].concat()
}

fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

const INDEX: &str = r#"{"weight_map":{"m.q.weight":"model-1.safetensors"}}"#;

/// A pair of factors of f16 zeros.
fn factors(a: [usize; 2], b: [usize; 2]) -> Vec<u8> {
    let (one, two) = (2 * a[0] * a[1], 2 * b[0] * b[1]);
    let entry = |name: &str, shape: [usize; 2], offsets: [usize; 2]| {
        format!(r#""{name}":{{"dtype":"F16","shape":{shape:?},"data_offsets":{offsets:?}}}"#)
    };
    let header = [entry("lora_A", a, [0, one]), entry("lora_B", b, [one, one + two])].join(",");
    safetensors(&format!("{{{header}}}"), &vec![0; one + two])
}

/// A side-car that lists so many records and holds so many residuals.
fn sidecar(records: usize, residuals: usize) -> Vec<u8> {
    let hash = "0".repeat(64);
    let one = format!(
        r#"{{\"tensor\":\"m.q.weight\",\"module\":\"m.q\",\"dtype\":\"F32\",\"shape\":[5,6],\"layout\":\"out_in\",\"block_rows\":1,\"lossy\":0,\"original_sha256\":\"{hash}\",\"fused_sha256\":\"{hash}\"}}"#
    );
    let list = vec![one; records].join(",");
    let metadata = format!(
        r#"{{"__metadata__":{{"format":"microlora.fuse","format_version":"1","adapter_sha256":"","digest":"","records":"[{list}]"}}"#
    );
    let adapter = r#","adapter":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"#;
    let rest = empty_tensors(residuals, |i| format!("residual.{i}"));
    safetensors(&format!("{metadata}{adapter}{}", &rest[1..]), b"")
}

/// Name, targets, bytes.
const BOMBS: &[(&str, &[&str], Make)] = &[
    ("spaces", &["single", "file", "flat"], || safetensors(&format!("{{}}{}", " ".repeat(99_999_990)), b"")),
    ("zeros", &["file", "gguf", "journal"], || vec![0; 100_000_000]),
    ("a-million-tensors", &["single", "file", "kohya", "diffusers", "flat"], || {
        safetensors(&empty_tensors(1 << 20, |i| format!("{i:x}")), b"")
    }),
    ("a-million-factors", &["file", "kohya"], || {
        safetensors(&empty_tensors(1 << 20, |i| format!("lora_unet_{i:x}.lora_down.weight")), b"")
    }),
    ("as-many-as-may", &["single", "file", "kohya", "diffusers", "flat"], || {
        safetensors(&empty_tensors(15_000, |i| format!("lora_unet_{i:x}.lora_down.weight")), b"")
    }),
    ("as-many-flat", &["file", "flat"], || {
        safetensors(&empty_tensors(15_000, |i| format!("layers.{i:x}.lora_a")), b"")
    }),
    ("as-many-diffusers", &["file", "diffusers"], || {
        safetensors(&empty_tensors(15_000, |i| format!("unet.{i:x}.lora_A.weight")), b"")
    }),
    ("a-million-peft", &["peft_dir", "mlx"], || {
        let name = |i| format!("base_model.model.{i:x}.lora_A.weight");
        pair(LORA, safetensors(&empty_tensors(1 << 20, name), b""))
    }),
    ("as-many-peft", &["peft_dir"], || {
        let name = |i| format!("base_model.model.{:x}.lora_{}.weight", i / 2, ["A", "B"][i % 2]);
        pair(LORA, safetensors(&empty_tensors(15_000, name), b""))
    }),
    ("as-many-mlx", &["mlx"], || {
        let config = r#"{"fine_tune_type":"lora","lora_parameters":{"rank":1,"scale":1.0}}"#;
        let name = |i| format!("m.{:x}.lora_{}", i / 2, ["a", "b"][i % 2]);
        pair(config, safetensors(&empty_tensors(15_000, name), b""))
    }),
    ("a-long-name", &["single", "file", "kohya"], || {
        safetensors(&empty_tensors(1, |_| "x".repeat(20_000_000)), b"")
    }),
    ("long-names", &["single", "file", "flat"], || {
        safetensors(&empty_tensors(1000, |i| format!("{i}{}.lora_a", "x".repeat(20_000))), b"")
    }),
    ("long-names-peft", &["peft_dir"], || {
        let name = |i| format!("base_model.model.{i}{}.lora_A.weight", "x".repeat(20_000));
        pair(LORA, safetensors(&empty_tensors(1000, name), b""))
    }),
    ("an-escaped-name", &["single", "file"], || {
        safetensors(&empty_tensors(1, |_| "\\u0041".repeat(3_000_000)), b"")
    }),
    ("a-long-value", &["single", "file"], || metadata(&format!(r#""a":"{}""#, "\\n".repeat(10_000_000)))),
    ("a-large-value", &["single", "file"], || metadata(&format!(r#""a":"{}""#, "x".repeat(3_000_000)))),
    ("many-entries", &["single", "file"], || {
        metadata(&(0..60_000).map(|i| format!(r#""{i}":"""#)).collect::<Vec<_>>().join(","))
    }),
    ("too-many-entries", &["single", "file"], || {
        metadata(&(0..1_000_000).map(|i| format!(r#""{i}":"""#)).collect::<Vec<_>>().join(","))
    }),
    ("a-long-number", &["single", "file"], || {
        safetensors(&format!(r#"{{"a":{{"dtype":"U8","shape":[{}]}}}}"#, "1".repeat(10_000_000)), b"")
    }),
    ("deep", &["single", "file"], || safetensors(&format!("{{\"a\":{}", "[".repeat(10_000_000)), b"")),
    ("modules", &["single", "quantized", "file"], || modules(100_000)),
    ("many-modules", &["single", "file"], || modules(1_000_000)),
    ("values", &["peft_config"], || format!(r#"{{"a":[{}0]}}"#, "0,".repeat(8_000_000)).into_bytes()),
    ("objects", &["peft_config"], || format!(r#"{{"a":[{}0]}}"#, "{},".repeat(5_000_000)).into_bytes()),
    ("strings", &["peft_config"], || format!(r#"{{"a":[{}0]}}"#, r#""","#.repeat(5_000_000)).into_bytes()),
    ("keys", &["peft_config"], || {
        let keys: Vec<String> = (0..1_000_000).map(|i| format!(r#""{i}":0"#)).collect();
        format!("{{{}}}", keys.join(",")).into_bytes()
    }),
    ("nested", &["peft_config"], || format!(r#"{{"a":{}"#, "[".repeat(16_000_000)).into_bytes()),
    ("a-long-text", &["peft_config"], || format!(r#"{{"a":"{}"}}"#, "\\n".repeat(8_000_000)).into_bytes()),
    ("a-long-decimal", &["peft_config"], || format!(r#"{{"r":{}}}"#, "9".repeat(16_000_000)).into_bytes()),
    ("plain-patterns", &["peft_config"], || patterns((0..100_000).map(|i| format!("l.{i}.q")))),
    ("some-plain-patterns", &["peft_config"], || patterns((0..20_000).map(|i| format!("l.{i}.q")))),
    ("anchored-patterns", &["peft_config"], || patterns((0..20_000).map(|i| format!("^l.{i}.q")))),
    ("a-long-pattern", &["peft_config"], || patterns(["x".repeat(16_000_000)].into_iter())),
    ("long-patterns", &["peft_config"], || patterns((0..250).map(|i| format!("{i}{}", "x".repeat(60_000))))),
    ("expressions", &["peft_config"], || patterns((0..512).map(|i| format!("(a{i}|b)")))),
    ("large-expressions", &["peft_config"], || patterns((0..512).map(|i| format!("\\\\w{{{}}}", 10 + i)))),
    ("stacked-expressions", &["peft_config"], || {
        patterns((0..64).map(|i| format!("((((a{{{}}}){{10}}){{10}}){{10}}){{10}}", i + 1)))
    }),
    ("long-expressions", &["peft_config"], || {
        patterns((0..60).map(|i| format!("({i}|{})", "x".repeat(60_000))))
    }),
    ("classes", &["peft_config"], || patterns((0..60).map(|i| format!("{i}{}", "[a-z\\\\d]".repeat(6_000))))),
    ("a-long-target", &["peft_dir"], || {
        let long = "(x|y)?".repeat(10_000);
        let config =
            format!(r#"{{"peft_type":"LORA","r":1,"target_modules":"{long}","target_parameters":["w"]}}"#);
        let name = |i| format!("base_model.model.{:x}.lora_{}.weight", i / 2, ["A", "B"][i % 2]);
        pair(&config, safetensors(&empty_tensors(100, name), b""))
    }),
    ("many-members", &["npz", "file"], || {
        let member = |i| (format!("{i}.npy").into_bytes(), Vec::new());
        archive(&(0..60_000).map(member).collect::<Vec<_>>())
    }),
    ("zip-bomb", &["npz", "file"], || zip_bomb(1 << 28, &deflated(1 << 28))),
    ("zip-bomb-that-lies", &["npz", "file"], || zip_bomb(1 << 20, &deflated(1 << 26))),
    ("zip-bomb-that-boasts", &["npz", "file"], || zip_bomb(u32::MAX - 1, &deflated(1 << 16))),
    ("index-values", &["base_model"], || pair(&format!(r#"{{"a":[{}0]}}"#, "0,".repeat(30_000)), vec![])),
    ("a-million-tensors-of-a-base", &["base_model", "scan"], || {
        pair(INDEX, safetensors(&empty_tensors(1 << 20, |i| format!("{i:x}")), b""))
    }),
    ("as-many-of-a-base", &["base_model"], || {
        pair(INDEX, safetensors(&empty_tensors(15_000, |i| format!("{i:x}")), b""))
    }),
    ("a-great-rank", &["scan"], || factors([1 << 20, 1], [1, 1 << 20])),
    ("a-square", &["scan"], || factors([1 << 12, 1 << 12], [1 << 12, 1 << 12])),
    ("a-side-car-of-many", &["sidecar"], || sidecar(15_000, 15_000)),
    ("a-side-car-of-others", &["sidecar"], || sidecar(1, 15_000)),
    ("a-side-car-without", &["sidecar"], || sidecar(400_000, 1)),
    ("gguf-counts", &["gguf", "file"], || gguf(u64::MAX, u64::MAX, b"")),
    ("gguf-keys", &["gguf", "file"], || {
        let key = |i: u32| [gguf_text(&format!("{i:x}")), vec![0, 0, 0, 0, 1]].concat();
        gguf(0, 1_000_000, &(0..1_000_000).flat_map(key).collect::<Vec<_>>())
    }),
    ("gguf-tensors", &["gguf", "file"], || {
        let info = |i: u32| {
            let rest = [&1u32.to_le_bytes()[..], &1u64.to_le_bytes(), &[0; 4], &[0; 8]].concat();
            [gguf_text(&format!("{i:x}.lora_a")), rest].concat()
        };
        let keys = [
            gguf_text("general.type"),
            8u32.to_le_bytes().into(),
            gguf_text("adapter"),
            gguf_text("adapter.type"),
            8u32.to_le_bytes().into(),
            gguf_text("lora"),
            gguf_text("general.architecture"),
            8u32.to_le_bytes().into(),
            gguf_text("llama"),
        ];
        gguf(500_000, 3, &[keys.concat(), (0..500_000).flat_map(info).collect()].concat())
    }),
    ("gguf-arrays", &["gguf", "file"], || {
        let nested = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(1_000_000);
        gguf(0, 1, &[gguf_text("a"), 9u32.to_le_bytes().into(), nested].concat())
    }),
];

#[test]
fn bombs_do_not_go_off() {
    watch();
    let _alone = run::alone();
    for (name, targets, make) in BOMBS {
        let bytes = make();
        for target in *targets {
            let target = TARGETS.iter().find(|t| t.name == *target).expect("a target");
            run::bomb(target, name, &bytes);
        }
    }
}
