//! The settings that bound a file bind in every format, and exactly: what a file has is allowed, one less is not.

use std::fs;
use std::path::{Path, PathBuf};

use microlora::Error;
use microlora::format::{
    AdapterParts, FactorParts, Limits, LoadOptions, Loaded, PeftOptions, QuantModuleParts, STYLES,
    TensorDtype, from_bytes, read, save_peft, save_quantized, save_single, save_style,
};

use super::gguf_support::{Draft, array, f32};
use super::samples::*;

const RANK: usize = 3;

/// A file of two modules of rank 3 in every format, by name, and the file that its limits are about.
fn files(dir: &Path) -> Vec<(&'static str, PathBuf, PathBuf)> {
    let paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];
    let modules = paths.iter().map(|p| module_of(p, RANK, 0.3, [TensorDtype::F32; 2], false));
    let parts = AdapterParts { modules: modules.collect(), ..AdapterParts::default() };
    let mut out = Vec::new();
    let mut add = |name: &'static str, weights: &str| {
        let path = dir.join(name);
        let inside = if weights.is_empty() { path.clone() } else { path.join(weights) };
        out.push((name, path.clone(), inside));
        path
    };
    save_single(&add("safetensors", ""), &parts).unwrap();
    save_peft(&add("peft", "adapter_model.safetensors"), &parts, &PeftOptions::default()).unwrap();
    let plain: Vec<QuantModuleParts> = (parts.modules.iter())
        .map(|m| QuantModuleParts {
            path: m.path.clone(),
            kind: m.kind,
            alpha: m.alpha,
            rank: m.rank,
            use_rslora: false,
            a: FactorParts::Plain(m.a.clone()),
            b: FactorParts::Plain(m.b.clone()),
        })
        .collect();
    save_quantized(&add("quantised", ""), &AdapterParts::default(), &plain).unwrap();
    let loaded = Loaded { parts, ..Loaded::default() };
    for style in &STYLES {
        let weights = if style.name == "mlx" { "adapters.safetensors" } else { "" };
        save_style(&add(style.name, weights), &loaded, style.name, &[]).unwrap();
    }
    let mut draft = Draft::good();
    draft.tensors.clear();
    draft.data.clear();
    ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight"].iter().for_each(|n| draft.pair(n, 6, 5, RANK as u64));
    fs::write(add("gguf", ""), draft.build()).unwrap();
    out
}

/// The least value with which the file is read, every smaller one being refused by name.
fn least(path: &Path, name: &str, with: impl Fn(usize) -> Limits) -> usize {
    let reads = |n: usize| match read(path, &LoadOptions { limits: with(n), ..LENIENT }) {
        Ok(_) => true,
        Err(Error::Format { reason, .. }) if reason.contains(&format!("limits: {name}")) => false,
        Err(other) => panic!("{name} = {n}: {other}"),
    };
    let (mut no, mut yes) = (0, 1 << 20);
    assert!(reads(yes) && !reads(no), "{name} of {}", path.display());
    while no + 1 < yes {
        let n = (no + yes) / 2;
        *(if reads(n) { &mut yes } else { &mut no }) = n;
    }
    yes
}

#[test]
fn every_limit_is_exact_in_every_format() {
    let dir = tempfile::tempdir().unwrap();
    let all = Limits::default();
    for (name, path, weights) in files(dir.path()) {
        let bytes = fs::read(&weights).unwrap();
        let (tensors, header) = match name {
            "gguf" => (4, None),
            "npz" => {
                let end = bytes.len() - 22;
                let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
                (bytes[end + 10] as usize, Some(word(end + 12)))
            }
            _ => {
                let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
                (safetensors::SafeTensors::deserialize(&bytes).unwrap().len(), Some(len))
            }
        };
        assert_eq!(least(&path, "tensors", |tensors| Limits { tensors, ..all }), tensors, "{name}");
        assert_eq!(least(&path, "rank", |rank| Limits { rank, ..all }), RANK, "{name}");
        let total = least(&path, "total_bytes", |n| Limits { total_bytes: n as u64, ..all });
        assert_eq!(total, bytes.len(), "{name}");
        let found = least(&path, "header_bytes", |header_bytes| Limits { header_bytes, ..all });
        match header {
            Some(header) => assert_eq!(found, header, "{name}"),
            // Up to the padding before the data: the factors, each padded to 32 bytes.
            None => assert_eq!(found.next_multiple_of(32), bytes.len() - 2 * (96 + 64), "{name}"),
        }
    }
}

/// What a draft is refused for.
fn refusal(change: impl FnOnce(&mut Draft)) -> String {
    let mut draft = Draft::good();
    change(&mut draft);
    draft.load().unwrap_err().to_string()
}

#[test]
fn bounds_that_are_no_settings_are_exact_too() {
    let entries = |n: usize| {
        let all: Vec<String> = (0..n).map(|i| format!("\"{i}\":\"\"")).collect();
        let header = format!("{{\"__metadata__\":{{{}}}}}", all.join(","));
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        from_bytes(&file, true).unwrap_err().to_string()
    };
    assert!(entries(1 << 16).contains("not written by microlora"));
    assert!(entries((1 << 16) + 1).contains("more than 65536 entries"));

    let tokens = |d: &mut Draft, n: usize| {
        d.set("adapter.alora.invocation_tokens", array(4, n as u64, &vec![0; 4 * n]));
    };
    let mut most = Draft::good();
    tokens(&mut most, 1 << 16);
    most.load().unwrap();
    assert!(refusal(|d| tokens(d, (1 << 16) + 1)).contains("the limit is 262144"));
    for alpha in [f32::NAN, f32::INFINITY] {
        let said = refusal(|d| d.set("adapter.lora.alpha", f32(alpha)));
        assert!(said.contains("adapter.lora.alpha") && said.contains("finite"), "{said}");
    }
    assert!(refusal(|d| d.data.truncate(d.data.len() - 1)).contains("truncated"));
}

#[test]
fn many_keys_for_long_names_are_refused_before_they_are_tried() {
    let keys: Vec<String> = (0..4000).map(|i| format!("\"k{i}\":2")).collect();
    let config = format!(r#"{{"peft_type":"LORA","r":2,"rank_pattern":{{{}}}}}"#, keys.join(","));
    let tensors: Vec<_> = (0..10).flat_map(|i| pair(&format!("{i}{}", "x".repeat(110_000)), 2)).collect();
    let err = load_dir(&config, &tensors, &LENIENT).unwrap_err().to_string();
    assert!(err.contains("4000 pattern keys on 10 modules take too long"), "{err}");
}
