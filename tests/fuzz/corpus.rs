//! The kept corpus, made by the writers themselves: `make fuzz-corpus`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use microlora::format::gguf::{GgufOptions, Target, save_gguf};
use microlora::format::{
    AdapterParts, Along, FactorParts, Loaded, ModuleKind, ModuleParts, PeftOptions, QuantModuleParts,
    TensorDtype, quantized_to_bytes, save_peft, save_style, to_bytes,
};
use microlora::journal::event::Event;
use microlora::journal::{DirLock, Header, Journal, Options};
use microlora::learn::{Feedback, TargetLoss};
use microlora::quant::{BlockType, quantize_rows};
use microlora::replay::Sample;

use super::format::base;
use super::run::corpus_of;
use super::samples::{module_of, pair, parts, safetensors, tensor};

const F32: TensorDtype = TensorDtype::F32;

fn put(target: &str, name: &str, bytes: &[u8]) {
    assert!(bytes.len() < 1 << 16, "{target}/{name}: {} bytes", bytes.len());
    fs::create_dir_all(corpus_of(target)).unwrap();
    fs::write(corpus_of(target).join(name), bytes).unwrap();
}

fn joined(config: &[u8], weights: &[u8]) -> Vec<u8> {
    [&(config.len() as u16).to_le_bytes()[..], config, weights].concat()
}

fn joined_dir(dir: &Path, weights: &str) -> Vec<u8> {
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    joined(&read("adapter_config.json"), &read(weights))
}

fn adapter(dtype: TensorDtype, use_rslora: bool) -> Loaded {
    let paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];
    let mut loaded = Loaded::default();
    loaded.parts.modules = paths.iter().map(|p| module_of(p, 2, 0.3, [dtype; 2], use_rslora)).collect();
    loaded
}

fn with_convolution() -> Loaded {
    let mut loaded = adapter(F32, false);
    let path = "model.layers.2.conv";
    let a = tensor(&format!("{path}.lora_a"), F32, &[2, 3, 3, 3], 1);
    let b = tensor(&format!("{path}.lora_b"), F32, &[4, 2, 1, 1], 2);
    let (kind, path) = (ModuleKind::Conv, path.into());
    loaded.parts.modules.push(ModuleParts { path, kind, alpha: 1.0, rank: 2, use_rslora: false, a, b });
    loaded
}

fn style(name: &str, loaded: &Loaded) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter");
    save_style(&path, loaded, name, &[]).unwrap();
    if name == "mlx" { joined_dir(&path, "adapters.safetensors") } else { fs::read(path).unwrap() }
}

/// Not run by itself: it writes into `fuzz/corpus/`.
#[test]
#[ignore = "writes the corpus anew"]
fn write_corpus() {
    let mut full = parts();
    full.config_json = Some("{\"rank\": 8, \"dropout\": 0.1}".into());
    full.metadata_json = Some("{\"name\": \"m\", \"tags\": [\"a\", \"b\"]}".into());
    full.extra.push(tensor("head", TensorDtype::BF16, &[3], 1));
    full.header.insert("note".into(), "x".into());
    let single = [("plain", to_bytes(&parts()).unwrap()), ("everything", to_bytes(&full).unwrap())];
    single.iter().for_each(|(name, bytes)| put("single", name, bytes));

    let quantized = |kind: BlockType, along: Along, b_cols: usize| {
        let blocks = |along, rows: usize, cols: usize| {
            let numbers: Vec<f32> = (0..rows * cols).map(|i| (i % 89) as f32 / 89.0 - 0.4).collect();
            let data = quantize_rows(kind, "x", &numbers, rows, cols).unwrap().into();
            FactorParts::Blocks { kind, along, rows, cols, data }
        };
        let (rows, rank) = if along == Along::Rank { (7, b_cols) } else { (3, 3) };
        let (a, b) = (blocks(Along::Features, rank, kind.elements()), blocks(along, rows, b_cols));
        vec![QuantModuleParts {
            path: "m.q".into(),
            kind: ModuleKind::Linear,
            alpha: 4.0,
            rank,
            use_rslora: false,
            a,
            b,
        }]
    };
    for (name, modules) in [
        ("q8_0", quantized(BlockType::Q8_0, Along::Rank, 32)),
        ("q4_k", quantized(BlockType::Q4K, Along::Features, 256)),
    ] {
        let bytes = quantized_to_bytes(&AdapterParts::default(), &modules).unwrap();
        put("quantized", name, &bytes);
        put("file", name, &bytes);
    }

    let targets: BTreeMap<String, Target> = (parts().modules.iter().enumerate())
        .map(|(i, m)| {
            let tensor = ["blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down.weight"][i];
            (m.path.clone(), Target { tensor: tensor.into(), heads: None })
        })
        .collect();
    let one = AdapterParts {
        modules: vec![module_of("layers.0.q_proj", 32, 4.0, [F32; 2], false)],
        ..AdapterParts::default()
    };
    let mut same = parts();
    same.modules.truncate(2);
    for (name, parts, encoding) in [("f32", &same, "auto"), ("f16", &same, "f16"), ("q8_0", &one, "q8_0")] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let targets = targets.iter().filter(|(k, _)| parts.modules.iter().any(|m| m.path == **k));
        let targets = targets.map(|(k, v)| (k.clone(), v.clone())).collect();
        let encoding = encoding.parse().unwrap();
        let opts = GgufOptions {
            architecture: "qwen2",
            targets: &targets,
            encoding,
            tokens: None,
            quantized: &[],
            drop_blocks: false,
        };
        save_gguf(&path, parts, &opts).unwrap();
        let bytes = fs::read(&path).unwrap();
        put("gguf", name, &bytes);
        put("file", &format!("gguf-{name}"), &bytes);
    }

    let patterns = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4.5, "bias": "none", "use_rslora": true,
        "rank_pattern": {"q_(proj|x)": 3, "^a\\.b": 2, "layers\\.[0-9]+.q": 9}, "alpha_pattern": {"a.b{1,3}": 7}}"#;
    put("peft_config", "patterns", patterns);
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &full, &PeftOptions::default()).unwrap();
    put("peft_config", "written", &fs::read(dir.path().join("adapter_config.json")).unwrap());
    put("peft_dir", "written", &joined_dir(dir.path(), "adapter_model.safetensors"));
    let text = br#"{"peft_type":"LORA","r":2,"lora_alpha":4,"rank_pattern":{"v":3}}"#;
    let weights = safetensors(&[pair("m.q", 2), pair("m.v", 3)].concat(), Some(&[("format", "pt")]));
    put("peft_dir", "pattern", &joined(text, &weights));
    let dora = br#"{"peft_type":"LORA","r":2,"lora_alpha":4,"use_dora":true,"modules_to_save":["head"]}"#;
    let mut tensors = pair("m.q", 2);
    tensors.push(tensor("base_model.model.m.q.lora_magnitude_vector", F32, &[5], 1));
    tensors.push(tensor("base_model.model.m.e.lora_embedding_A", F32, &[2, 9], 1));
    tensors.push(tensor("base_model.model.m.e.lora_embedding_B", F32, &[4, 2], 1));
    tensors.push(tensor("base_model.model.head.weight", F32, &[2, 2], 1));
    put("peft_dir", "kept", &joined(dora, &safetensors(&tensors, None)));

    for name in ["mlx", "kohya", "diffusers", "flat", "npz"] {
        put(name, "plain", &style(name, &adapter(F32, false)));
        put(name, "rslora-f16", &style(name, &adapter(TensorDtype::F16, true)));
        if matches!(name, "kohya" | "diffusers") {
            put(name, "convolution", &style(name, &with_convolution()));
        }
    }
    for name in ["kohya", "diffusers", "flat", "npz"] {
        put("file", name, &style(name, &adapter(F32, false)));
    }
    put("file", "single", &single[0].1);

    put("scan", "everything", &single[1].1);
    put("scan", "variants", &safetensors(&tensors, Some(&[("format", "pt")])));
    let (f64s, f16s) = (TensorDtype::F64, TensorDtype::F16);
    let experts = [tensor("e.lora_A", f16s, &[2, 3, 4], 1), tensor("e.lora_B", f64s, &[2, 5, 3], 1)];
    put("scan", "experts", &safetensors(&experts, None));
    put("base_model", "two-files", &joined(&base::index(), &base::base()));
    put("sidecar", "two-records", &base::fused().1);

    let sample = |feedback: Feedback| Sample {
        event: 1,
        module: Some(0),
        x: vec![0.5, 1.0, -2.0],
        base: None,
        feedback: Arc::new(feedback),
        quality: Some(0.5),
        weight: 1.0,
        advantage: 0.25,
    };
    let events: Vec<Vec<u8>> = [
        Feedback::target(vec![1.0, 2.0], TargetLoss::Mse).unwrap(),
        Feedback::reward(0.5, vec![1.0, 2.0]).unwrap(),
        Feedback::gradient(vec![1.0, 2.0]).unwrap(),
    ]
    .map(|f| Event::new(&sample(f)).unwrap().parts().concat())
    .into();
    events.iter().enumerate().for_each(|(i, e)| put("event", &format!("event-{i}"), e));

    let dir = tempfile::tempdir().unwrap();
    let lock = Arc::new(DirLock::acquire(dir.path()).unwrap());
    let options = Options { segment_bytes: 4096, ..Options::default() };
    let (mut journal, _) = Journal::open(&lock, options, &Header::new("scalar", [0; 32])).unwrap();
    for (id, event) in events.iter().enumerate() {
        journal.append(1, id as u64 + 1, &[&event[..]]).unwrap();
    }
    drop(journal);
    put("journal", "three-records", &fs::read(dir.path().join("journal-00000001.seg")).unwrap());
}
