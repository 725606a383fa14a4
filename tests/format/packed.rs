//! Files that are read tensor by tensor into the kernels' order: the same content as a file that is read whole.

use microlora::adapter::Adapter;
use microlora::dtype::Dtype;
use microlora::factor::Factor;
use microlora::format::{
    AdapterParts, LoadOptions, ModuleKind, ModuleParts, PeftOptions, Tensor, TensorDtype, load, read,
    save_peft, save_single, save_single_as_read,
};
use proptest::prelude::*;

use super::samples::*;

/// A module whose factors alone make a file large.
fn large(path: &str, rank: usize, dtype: TensorDtype) -> ModuleParts {
    let a = tensor(&format!("{path}.lora_a"), dtype, &[rank, 3001], 3);
    let b = tensor(&format!("{path}.lora_b"), dtype, &[2111, rank], 5);
    ModuleParts { path: path.into(), kind: ModuleKind::Linear, alpha: 8.0, rank, use_rslora: false, a, b }
}

/// Modules of every dtype and of ranks beside the kernels' eight, a narrow one, and a tensor that is no factor.
fn parts() -> AdapterParts {
    let mut modules = vec![
        large("layers.0.q_proj", 8, TensorDtype::F32),
        large("layers.1.q_proj", 13, TensorDtype::F16),
        large("layers.2.q_proj", 3, TensorDtype::BF16),
    ];
    modules.push(ModuleParts { alpha: 8.0, ..module("layers.3.narrow", 4, 8.0) });
    let extra = vec![tensor("head.weight", TensorDtype::F64, &[30, 3], 1)];
    AdapterParts { modules, extra, ..AdapterParts::default() }
}

#[test]
fn a_large_file_gives_what_a_whole_read_gives() {
    let dir = tempfile::tempdir().unwrap();
    let parts = parts();
    let (single, pair) = (dir.path().join("adapter"), dir.path().join("peft"));
    save_single(&single, &parts).unwrap();
    save_peft(&pair, &parts, &PeftOptions::default()).unwrap();
    for path in [&single, &pair, &pair.join("adapter_model.safetensors")] {
        for mmap in [false, true] {
            let opts = LoadOptions { mmap, ..LENIENT };
            let (whole, packed) = (read(path, &opts).unwrap(), load(path, &opts).unwrap());
            assert_eq!(packed, whole);
            let adapter = Adapter::from_parts(&packed.parts).unwrap();
            assert_eq!(adapter, Adapter::from_parts(&whole.parts).unwrap());
            assert_eq!(adapter.to_parts().modules, whole.parts.modules);
        }
    }
}

#[test]
fn variants_of_a_large_file_are_read_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = parts();
    let conv = |name: &str, shape: &[usize]| tensor(name, TensorDtype::F32, shape, 2);
    parts.modules.push(ModuleParts {
        path: "conv".into(),
        kind: ModuleKind::Conv,
        alpha: 8.0,
        rank: 4,
        use_rslora: false,
        a: conv("conv.lora_a", &[4, 300, 3, 3]),
        b: conv("conv.lora_b", &[200, 4, 1, 1]),
    });
    let path = dir.path().join("adapter");
    let mut loaded = read_of(&parts, &path);
    loaded.parts = parts.clone();
    save_single_as_read(&path, &loaded, false).unwrap();
    let again = read(&path, &LoadOptions { packed: true, ..LENIENT }).unwrap();
    assert_eq!(again.parts, parts);
    assert_eq!(again.variants.iter().map(|v| v.kind.as_str()).collect::<Vec<_>>(), ["conv"]);
}

fn read_of(parts: &AdapterParts, path: &std::path::Path) -> microlora::format::Loaded {
    save_single(path, &AdapterParts { modules: parts.modules[..1].to_vec(), ..AdapterParts::default() })
        .unwrap();
    read(path, &LENIENT).unwrap()
}

#[test]
fn every_number_of_a_large_file_is_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q"]});
    for (which, shape) in [("A", [8, 9001]), ("B", [9001, 8])] {
        for at in [0, 1, 8, 8 * 9001 / 2 + 3, 8 * 9001 - 9, 8 * 9001 - 1] {
            let mut tensors = vec![
                tensor("base_model.model.q.lora_A.weight", TensorDtype::F32, &[8, 9001], 1),
                tensor("base_model.model.q.lora_B.weight", TensorDtype::F32, &[9001, 8], 2),
            ];
            let t = &mut tensors[usize::from(which == "B")];
            let mut data = t.data.to_vec();
            data[at * 4..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
            *t = Tensor::new(t.name.clone(), t.dtype, shape.to_vec(), data).unwrap();
            write_dir(dir.path(), &config.to_string(), &tensors);
            for mmap in [false, true] {
                let err = load(dir.path(), &LoadOptions { mmap, ..STRICT }).unwrap_err().to_string();
                assert!(err.contains(&format!("q.lora_{which}.weight")) && err.contains("NaN"), "{err}");
            }
        }
    }
}

/// A matrix of 16-bit patterns as `(rank, len)`, and as its transpose.
fn bits(rank: usize, len: usize, size: usize) -> [Vec<u8>; 2] {
    let word = |r: usize, c: usize| ((r * 1009 + c * 31 + 1) as u32 & 0x3fff_3fff).to_le_bytes();
    let rows = (0..rank).flat_map(|r| (0..len).flat_map(move |c| word(r, c)[..size].to_vec()));
    let columns = (0..len).flat_map(|c| (0..rank).flat_map(move |r| word(r, c)[..size].to_vec()));
    [rows.collect(), columns.collect()]
}

proptest! {
    #[test]
    fn both_orders_of_a_file_give_one_factor(rank in 1usize..40, len in 1usize..150, narrow: bool) {
        let (dtype, size) = if narrow { (Dtype::F16, 2) } else { (Dtype::F32, 4) };
        let [rows, columns] = bits(rank, len, size);
        let factor = Factor::from_bits(&rows, rank, len, dtype, false).unwrap();
        prop_assert_eq!(&Factor::from_bits(&columns, rank, len, dtype, true).unwrap(), &factor);
        prop_assert_eq!(factor.to_bits(false), rows);
        prop_assert_eq!(factor.to_bits(true), columns);
    }
}
