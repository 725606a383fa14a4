//! What a fuzzer calls of base models: the shards and the index of one, and the side-car of a fused one.

use std::fs;
use std::sync::OnceLock;

use microlora::Error;
use microlora::adapter::Adapter;
use microlora::format::{AdapterParts, ModuleKind, ModuleParts, Tensor, TensorDtype};
use microlora::fuse::{FuseOptions, fuse, unfuse};
use sha2::{Digest, Sha256};

use super::{both, watched};

const SHARD: &str = "model-1.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn numbers(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32 / 8.0 - 1.0).to_le_bytes()).collect()
}

fn tensor(name: &str, shape: &[usize]) -> Tensor {
    let data = numbers(shape.iter().product());
    Tensor::new(name, TensorDtype::F32, shape.to_vec(), data).expect("a tensor")
}

/// Two modules of that model.
pub fn adapter() -> Adapter {
    let module = |path: &str, inputs, outputs| ModuleParts {
        path: path.into(),
        kind: ModuleKind::Linear,
        alpha: 3.0,
        rank: 2,
        use_rslora: false,
        a: tensor("lora_a", &[2, inputs]),
        b: tensor("lora_b", &[outputs, 2]),
    };
    let modules = vec![module("m.q", 6, 5), module("m.k", 4, 6)];
    Adapter::from_parts(&AdapterParts { modules, ..AdapterParts::default() }).expect("an adapter")
}

/// A base model of one file, of the dtypes that can be fused.
pub fn base() -> Vec<u8> {
    let half: Vec<u8> = (0..24u16).flat_map(|i| (0x3c00 + 7 * i).to_le_bytes()).collect();
    let tensors = [
        tensor("m.q.weight", &[5, 6]),
        Tensor::new("m.k.weight", TensorDtype::F16, vec![6, 4], half).expect("a tensor"),
        Tensor::new("m.norm.weight", TensorDtype::BF16, vec![6], vec![1; 12]).expect("a tensor"),
    ];
    let views = tensors.iter().map(|t| {
        let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.data);
        (t.name.as_str(), view.expect("a tensor"))
    });
    safetensors::serialize(views, None).expect("a file")
}

/// The index of that model as one shard.
pub fn index() -> Vec<u8> {
    let names = ["m.q.weight", "m.k.weight", "m.norm.weight"];
    let rows: Vec<String> = names.iter().map(|n| format!("\"{n}\": \"{SHARD}\"")).collect();
    format!("{{\"metadata\": {{\"total_size\": 180}}, \"weight_map\": {{{}}}}}", rows.join(", ")).into_bytes()
}

/// The fused model and its side-car.
pub fn fused() -> &'static (Vec<u8>, Vec<u8>) {
    static FUSED: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    FUSED.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let [from, out, car] = ["base", "out", "car"].map(|n| dir.path().join(format!("{n}.safetensors")));
        fs::write(&from, base()).expect("a file");
        let opts = FuseOptions { sidecar: Some(&car), ..FuseOptions::default() };
        fuse(&from, &adapter(), &out, &opts, &mut |_, _| Ok(())).expect("a fused model");
        (fs::read(&out).expect("the model"), fs::read(&car).expect("its side-car"))
    })
}

/// An error that says what of the model is wrong; files that an index names may be missing.
fn refused(e: &Error) {
    let said = e.to_string();
    assert!(!said.is_empty() && said.len() < 20_000, "{} characters", said.len());
}

/// An index and its one shard, as the base of a model that an adapter is fused into.
pub fn model(data: &[u8]) -> bool {
    let Some((index, shard)) = both(data) else { return false };
    let dir = tempfile::tempdir().expect("a directory");
    let (from, out) = (dir.path().join("base"), dir.path().join("out"));
    fs::create_dir(&from).expect("a directory");
    fs::write(from.join(INDEX), index).expect("a file");
    fs::write(from.join(SHARD), shard).expect("a file");
    let adapter = adapter();
    let run = || fuse(&from, &adapter, &out, &FuseOptions::default(), &mut |_, _| Ok(()));
    match watched(data.len(), run) {
        Ok(report) => {
            let copy = fs::read(out.join(SHARD)).expect("the shard of the fused model");
            assert_eq!(copy.len(), shard.len());
            let changed = copy.iter().zip(shard).filter(|(a, b)| a != b).count();
            assert!(changed <= report.touched_bytes, "{changed} bytes changed");
            true
        }
        Err(e) => {
            refused(&e);
            assert!(!out.exists(), "a model that is not whole");
            false
        }
    }
}

/// A side-car, with the hashes it has and with those that its content should have.
pub fn sidecar(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let [model, out, car] = ["fused", "out", "car"].map(|n| dir.path().join(format!("{n}.safetensors")));
    fs::write(&model, &fused().0).expect("a file");
    let mut was_read = false;
    for data in std::iter::once(data.to_vec()).chain(mended(data)) {
        fs::write(&car, &data).expect("a file");
        match watched(data.len(), || unfuse(&model, &car, &out, &mut |_, _| Ok(()))) {
            Ok(_) => {
                assert_eq!(fs::read(&out).expect("the model").len(), fused().0.len());
                was_read = true;
            }
            Err(e) => {
                refused(&e);
                assert!(was_read || !out.exists(), "a model that is not whole");
            }
        }
    }
    was_read
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

/// The same with the hashes that its adapter and its records have: whoever makes a file can make these too.
pub fn mended(data: &[u8]) -> Option<Vec<u8>> {
    let len = usize::try_from(u64::from_le_bytes(*data.first_chunk::<8>()?)).ok()?;
    let head = data.get(8..len.checked_add(8)?)?;
    let body = &data[8 + len..];
    let mut header: serde_json::Value = serde_json::from_slice(head).ok()?;
    let at = |i: usize| usize::try_from(header.get("adapter")?.get("data_offsets")?.get(i)?.as_u64()?).ok();
    let hash = hex(body.get(at(0)?..at(1)?)?);
    let metadata = header.get_mut("__metadata__")?.as_object_mut()?;
    let records = metadata.get("records")?.as_str()?;
    let digest = hex(format!("microlora.fuse\n1\n{hash}\n{records}").as_bytes());
    metadata.insert("digest".into(), digest.into());
    metadata.insert("adapter_sha256".into(), hash.into());
    let text = header.to_string();
    Some([&(text.len() as u64).to_le_bytes(), text.as_bytes(), body].concat())
}
