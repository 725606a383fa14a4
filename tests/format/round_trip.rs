//! Nothing is lost, nothing is invented, and the same adapter gives the same bytes.

use std::collections::BTreeMap;

use microlora::format::{
    AdapterParts, LoadOptions, PeftOptions, TensorDtype, from_bytes, load, peft, save_peft, save_single,
    to_bytes,
};
use proptest::prelude::*;

use super::samples::*;

const DTYPES: [TensorDtype; 3] = [TensorDtype::F32, TensorDtype::F16, TensorDtype::BF16];

fn any_parts() -> impl Strategy<Value = AdapterParts> {
    let path = "[a-z]{1,3}(\\.[0-9a-z_]{1,4}){0,3}|[ -~]{0,7}[!-\\-/-~]|[é-ü]{1,3}\\.q";
    let modules = proptest::collection::btree_map(
        path,
        (1usize..12, -1e6..1e6f64, 0usize..3, 0usize..3, proptest::bool::weighted(0.3)),
        1..6,
    );
    let extra = proptest::collection::btree_map("[a-z.]{1,10}", (0usize..4, any::<u8>()), 0..3);
    let text = proptest::option::of(Just("{\"name\": \"é\", \"alpha\": 0.1}".to_owned()));
    let header = proptest::collection::btree_map("[a-z_]{1,6}", "[ -~é]{0,6}", 0..3);
    let prefix = proptest::option::of(Just("base_model.model.base_model.model.".to_owned()));
    (modules, extra, text, header, prefix).prop_map(|(modules, extra, text, header, prefix)| AdapterParts {
        modules: modules
            .into_iter()
            .map(|(p, (r, alpha, a, b, rs))| module_of(&p, r, alpha, [DTYPES[a], DTYPES[b]], rs))
            .collect(),
        config_json: text.clone(),
        metadata_json: text,
        peft_config: None,
        extra: extra
            .into_iter()
            .map(|(n, (len, seed))| tensor(&n, TensorDtype::I64, &[len, 2], seed))
            .collect(),
        prefix,
        header,
    })
}

/// Extra tensors come back in the order of the file.
fn sorted(mut parts: AdapterParts) -> AdapterParts {
    parts.extra.sort_by(|a, b| a.name.cmp(&b.name));
    parts
}

proptest! {
    #[test]
    fn single_file_gives_back_every_bit(parts in any_parts()) {
        let bytes = to_bytes(&parts).unwrap();
        let loaded = from_bytes(&bytes, true).unwrap();
        prop_assert_eq!(&sorted(loaded.parts.clone()), &sorted(parts));
        prop_assert!(loaded.unused.is_empty() && loaded.notes.is_empty());
        prop_assert_eq!(to_bytes(&loaded.parts).unwrap(), bytes);
    }

    #[test]
    fn reference_implementation_reads_what_we_write(parts in any_parts()) {
        let bytes = to_bytes(&parts).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        prop_assert_eq!(theirs.len(), 2 * parts.modules.len() + parts.extra.len());
        for m in &parts.modules {
            for (suffix, t) in [("lora_a", &m.a), ("lora_b", &m.b)] {
                let view = theirs.tensor(&format!("{}.{suffix}", m.path)).unwrap();
                prop_assert_eq!(view.data(), &t.data[..]);
                prop_assert_eq!((view.dtype(), view.shape()), (t.dtype, &t.shape[..]));
            }
        }
    }

    #[test]
    fn peft_directory_gives_back_every_bit(mut parts in any_parts(), rslora in any::<bool>()) {
        parts.modules.iter_mut().for_each(|m| m.use_rslora = rslora);
        let dir = tempfile::tempdir().unwrap();
        save_peft(dir.path(), &parts, &PeftOptions::default()).unwrap();
        let loaded = load(dir.path(), &LENIENT).unwrap();
        let text = loaded.parts.peft_config.clone();
        prop_assert_eq!(sorted(loaded.parts.clone()), sorted(AdapterParts { peft_config: text, ..parts }));
        let again = tempfile::tempdir().unwrap();
        save_peft(again.path(), &loaded.parts, &PeftOptions::default()).unwrap();
        prop_assert_eq!(contents(again.path()), contents(dir.path()));
        // and through our single file, without losing what PEFT needs
        let single = from_bytes(&to_bytes(&loaded.parts).unwrap(), true).unwrap();
        prop_assert_eq!(single.parts, loaded.parts);
    }
}

#[test]
fn files_load_mapped_and_copied_alike() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = parts();
    parts.extra.push(tensor("head.weight", TensorDtype::F64, &[3, 3], 1));
    let (single, pair) = (dir.path().join("adapter"), dir.path().join("peft"));
    save_single(&single, &parts).unwrap();
    save_peft(&pair, &parts, &PeftOptions::default()).unwrap();
    for path in [&single, &pair, &pair.join("adapter_model.safetensors")] {
        let copied = load(path, &LENIENT).unwrap();
        let mapped = load(path, &LoadOptions { mmap: true, ..LENIENT }).unwrap();
        assert_eq!(copied, mapped);
        let data = |l: &microlora::format::Loaded| l.parts.extra[0].data.clone();
        assert!(data(&mapped).is_mapped() && !data(&copied).is_mapped());
        // A file that is replaced does not change what was mapped before.
        let other = AdapterParts { extra: Vec::new(), ..parts.clone() };
        if path == &single {
            save_single(path, &other).unwrap();
        } else {
            save_peft(&pair, &other, &PeftOptions::default()).unwrap();
            save_peft(&pair, &parts, &PeftOptions::default()).unwrap();
        }
        assert_eq!(copied, mapped);
    }
}

#[test]
fn order_of_construction_is_the_only_order_in_the_bytes() {
    let mut shuffled = parts();
    shuffled.header = BTreeMap::from([("b".into(), "1".into()), ("a".into(), "2".into())]);
    let bytes = to_bytes(&shuffled).unwrap();
    for _ in 0..8 {
        assert_eq!(to_bytes(&shuffled.clone()).unwrap(), bytes);
        assert_eq!(to_bytes(&from_bytes(&bytes, true).unwrap().parts).unwrap(), bytes);
    }
}

#[test]
fn rank_may_exceed_the_layers_dimensions() {
    let parts = AdapterParts { modules: vec![module("q", 64, 1.0)], ..AdapterParts::default() };
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &parts, &PeftOptions::default()).unwrap();
    assert_eq!(load(dir.path(), &STRICT).unwrap().parts.modules, parts.modules);
}

#[test]
fn memory_and_directory_agree() {
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &parts(), &PeftOptions::default()).unwrap();
    let file = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let text = String::from_utf8(file("adapter_config.json")).unwrap();
    let loaded = peft::from_memory(&text, &file("adapter_model.safetensors"), true).unwrap();
    assert_eq!(loaded, load(dir.path(), &STRICT).unwrap());
}
