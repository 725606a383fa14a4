//! Adapters and files to test with.

use std::collections::BTreeMap;
use std::path::Path;

use microlora::format::{
    AdapterParts, Limits, LoadOptions, Loaded, MAX_HEADER, MAX_TENSORS, ModuleKind, ModuleParts, Tensor,
    TensorDtype, load,
};

pub const STRICT: LoadOptions =
    LoadOptions { mmap: false, strict: true, limits: LIMITS, alpha: None, orientation: None, packed: false };
pub const LENIENT: LoadOptions = LoadOptions { strict: false, ..STRICT };
const LIMITS: Limits =
    Limits { header_bytes: MAX_HEADER, tensors: MAX_TENSORS, total_bytes: 64 << 30, rank: 1 << 20 };

/// A tensor of small numbers that every dtype holds exactly.
pub fn tensor(name: &str, dtype: TensorDtype, shape: &[usize], seed: u8) -> Tensor {
    let n: usize = shape.iter().product();
    let value = |i: usize| f32::from((i as u8).wrapping_mul(7).wrapping_add(seed) % 32) - 16.0;
    let data: Vec<u8> = match dtype {
        TensorDtype::F32 => (0..n).flat_map(|i| value(i).to_le_bytes()).collect(),
        TensorDtype::F16 => (0..n).flat_map(|i| half::f16::from_f32(value(i)).to_le_bytes()).collect(),
        TensorDtype::BF16 => (0..n).flat_map(|i| half::bf16::from_f32(value(i)).to_le_bytes()).collect(),
        _ => vec![seed; n * dtype.bitsize() / 8],
    };
    Tensor::new(name, dtype, shape.to_vec(), data).unwrap()
}

/// A module of 6 inputs and 5 outputs.
pub fn module(path: &str, rank: usize, alpha: f64) -> ModuleParts {
    module_of(path, rank, alpha, [TensorDtype::F32; 2], false)
}

pub fn module_of(
    path: &str,
    rank: usize,
    alpha: f64,
    dtypes: [TensorDtype; 2],
    use_rslora: bool,
) -> ModuleParts {
    let a = tensor(&format!("{path}.lora_a"), dtypes[0], &[rank, 6], 3);
    let b = tensor(&format!("{path}.lora_b"), dtypes[1], &[5, rank], 5);
    ModuleParts { path: path.into(), kind: ModuleKind::Linear, alpha, rank, use_rslora, a, b }
}

/// Two layers of one rank and alpha, and one that differs.
pub fn parts() -> AdapterParts {
    let modules = vec![
        module("layers.0.q_proj", 2, 4.0),
        module("layers.1.q_proj", 2, 4.0),
        module("layers.1.v_proj", 9, 4.5),
    ];
    AdapterParts { modules, ..AdapterParts::default() }
}

/// A PEFT directory from any tensors and any configuration text.
pub fn write_dir(dir: &Path, config: &str, tensors: &[Tensor]) {
    std::fs::write(dir.join("adapter_config.json"), config).unwrap();
    std::fs::write(dir.join("adapter_model.safetensors"), safetensors(tensors, None)).unwrap();
}

/// A safetensors file as the reference implementation writes it.
pub fn safetensors(tensors: &[Tensor], metadata: Option<&[(&str, &str)]>) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|t| (&t.name, safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    let metadata = metadata.map(|m| m.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
    safetensors::serialize(views, metadata).unwrap()
}

/// The factors of one module under PEFT's keys.
pub fn pair(path: &str, rank: usize) -> Vec<Tensor> {
    let key = |f: &str| format!("base_model.model.{path}.lora_{f}.weight");
    vec![
        tensor(&key("A"), TensorDtype::F32, &[rank, 6], 3),
        tensor(&key("B"), TensorDtype::F32, &[5, rank], 5),
    ]
}

/// Loads a PEFT directory made of these.
pub fn load_dir(config: &str, tensors: &[Tensor], opts: &LoadOptions) -> microlora::Result<Loaded> {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), config, tensors);
    load(dir.path(), opts)
}

/// A safetensors file without the hash of its weights, which PEFT's own files lack.
fn without_hash(file: Vec<u8>) -> Vec<u8> {
    const KEY: &str = ",\"microlora.weights_sha256\":\"";
    let Some((len, rest)) = file.split_first_chunk::<8>() else { return file };
    let Some((head, data)) = rest.split_at_checked(u64::from_le_bytes(*len) as usize) else { return file };
    let head = std::str::from_utf8(head).unwrap_or_default();
    let Some(at) = head.find(KEY) else { return file };
    let mut text = format!("{}{}", &head[..at], &head[at + KEY.len() + 65..]).trim_end().to_owned();
    while text.len() % 8 != 0 {
        text.push(' ');
    }
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), data].concat()
}

/// Name to content of a directory; weights without their hash.
pub fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |e: std::fs::DirEntry| {
        let name = e.file_name().into_string().unwrap();
        (name, without_hash(std::fs::read(e.path()).unwrap_or_default()))
    };
    std::fs::read_dir(dir).unwrap().map(|e| read(e.unwrap())).collect()
}
