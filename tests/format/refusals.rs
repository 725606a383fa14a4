//! Each malformed or foreign file is a typed error that names the file, the tensor or the setting.

use std::path::Path;

use microlora::Error;
use microlora::format::{
    AdapterParts, LoadOptions, PeftOptions, Tensor, TensorDtype, from_bytes, load, save_peft, save_single,
    to_bytes,
};
use serde_json::{Value, json};

use super::samples::*;

fn config(edit: Value) -> String {
    let mut object = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]});
    object.as_object_mut().unwrap().extend(edit.as_object().unwrap().clone());
    object.to_string()
}

/// The kind of an error, and that its text names everything it should.
fn assert_refused(result: microlora::Result<impl std::fmt::Debug>, kind: &str, words: &[&str]) {
    let err = result.expect_err(&format!("should be refused: {words:?}"));
    let got = match &err {
        Error::Format { .. } => "format",
        Error::Unsupported { .. } => "unsupported",
        Error::Io { .. } => "io",
        _ => "argument",
    };
    assert_eq!(got, kind, "{err}");
    for word in words {
        assert!(err.to_string().contains(word), "{err} does not say {word}");
    }
}

#[test]
fn variants_that_change_the_maths_are_refused_even_when_lenient() {
    for (edit, word) in [
        (json!({"use_dora": true}), "use_dora"),
        (json!({"use_qalora": true}), "use_qalora"),
        (json!({"use_bdlora": {"nblocks": 2}}), "use_bdlora"),
        (json!({"alora_invocation_tokens": [1, 2]}), "alora_invocation_tokens"),
        (json!({"alora_invocation_tokens": []}), "alora_invocation_tokens"),
        (json!({"arrow_config": {"top_k": 1}}), "arrow_config"),
        (json!({"target_parameters": ["experts.w1"]}), "target_parameters"),
        (json!({"layer_replication": [[0, 4]]}), "layer_replication"),
        (json!({"monteclora_config": {"num_samples": 2}}), "monteclora_config"),
        (json!({"kasa_config": {"beta": 0.1}}), "kasa_config"),
        (json!({"lora_bias": true}), "lora_bias"),
        (json!({"modules_to_save": ["head"]}), "modules_to_save"),
        (json!({"trainable_token_indices": [1]}), "trainable_token_indices"),
        (json!({"init_lora_weights": "pissa"}), "pissa"),
        (json!({"init_lora_weights": "pissa_niter_16"}), "pissa_niter_16"),
        (json!({"init_lora_weights": "olora"}), "olora"),
        (json!({"init_lora_weights": "corda"}), "corda"),
        (json!({"init_lora_weights": "lora_ga"}), "lora_ga"),
        (json!({"init_lora_weights": "loftq"}), "loftq"),
        (json!({"init_lora_weights": "of the future"}), "of the future"),
        (json!({"init_lora_weights": 3}), "init_lora_weights"),
        (json!({"peft_type": "ADALORA"}), "ADALORA"),
        (json!({"peft_type": null}), "peft_type"),
        (json!({"rank_pattern": {"(?=q)q": 2}}), "look-around"),
        (json!({"alpha_pattern": {"(q)\\1": 2}}), "backreference"),
        (json!({"alpha_pattern": {"q(": 2}}), "alpha_pattern"),
    ] {
        for opts in [STRICT, LENIENT] {
            let got = load_dir(&config(edit.clone()), &pair("q", 2), &opts);
            assert_refused(got, "unsupported", &[word, "adapter_config.json"]);
        }
    }
}

#[test]
fn sound_settings_pass() {
    for edit in [
        json!({"init_lora_weights": "gaussian"}),
        json!({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}),
        json!({"init_lora_weights": "orthogonal"}),
        json!({"init_lora_weights": "mica"}),
        json!({"init_lora_weights": false, "loftq_config": {"loftq_bits": 4}}),
        json!({"velora_config": {"num_groups": 4}}),
        json!({"bias": "lora_only", "use_dora": null, "rank_pattern": null}),
        json!({"future_key": null, "future_flag": false, "future_list": []}),
    ] {
        let loaded =
            load_dir(&config(edit.clone()), &pair("q", 2), &STRICT).unwrap_or_else(|e| panic!("{edit}: {e}"));
        assert!(loaded.unused.is_empty());
    }
    let mut velora = pair("q", 2);
    velora.push(tensor("base_model.model.q.lora_velora_embed", TensorDtype::F32, &[4], 1));
    let loaded = load_dir(&config(json!({"velora_config": {"num_groups": 4}})), &velora, &STRICT).unwrap();
    assert_eq!((loaded.unused.len(), &loaded.parts.extra[..]), (0, &velora[2..]));
    let defaults = load_dir(r#"{"peft_type": "LORA"}"#, &pair("q", 8), &STRICT).unwrap().parts;
    assert_eq!((defaults.modules[0].rank, defaults.modules[0].alpha), (8, 8.0));
}

#[test]
fn what_nothing_uses_is_an_error_or_a_list() {
    let mut tensors = pair("q", 2);
    tensors.push(tensor("base_model.model.embed.weight", TensorDtype::F32, &[2, 2], 1));
    tensors.push(tensor("q.lora_down.weight", TensorDtype::U8, &[0], 1));
    let text = config(json!({"future_key": 3}));
    assert_refused(load_dir(&text, &tensors, &STRICT), "unsupported", &["future_key", "strict=False"]);
    let named = ["base_model.model.embed.weight", "q.lora_down.weight", "strict=False"];
    assert_refused(load_dir(&config(json!({})), &tensors, &STRICT), "format", &named);
    let loaded = load_dir(&text, &tensors, &LENIENT).unwrap();
    assert_eq!(
        loaded.unused,
        ["base_model.model.embed.weight", "q.lora_down.weight", "adapter_config.json: future_key"]
    );
    assert_eq!(loaded.parts.extra.len(), 2);
    assert_eq!(loaded.parts.extra[0], tensors[2]);
}

#[test]
fn wrong_factors_are_named() {
    let key = |f: &str| format!("base_model.model.q.lora_{f}.weight");
    let (a, b) = (key("A"), key("B"));
    let t = |name: &str, dtype, shape: &[usize]| tensor(name, dtype, shape, 1);
    let f32s = |a_shape: &[usize], b_shape: &[usize]| {
        vec![t(&a, TensorDtype::F32, a_shape), t(&b, TensorDtype::F32, b_shape)]
    };
    let text = config(json!({}));
    let check = |tensors: Vec<Tensor>, kind: &str, words: &[&str]| {
        for opts in [STRICT, LENIENT, LoadOptions { mmap: true, ..STRICT }] {
            assert_refused(load_dir(&text, &tensors, &opts), kind, words);
        }
    };
    check(f32s(&[2, 6], &[5, 2])[..1].to_vec(), "format", &[&a, "without its lora_B"]);
    check(f32s(&[2, 6], &[5, 2])[1..].to_vec(), "format", &[&b, "without its lora_A"]);
    check(f32s(&[2, 6], &[5, 3]), "format", &[&a, &b, "[5, 3]"]);
    check(f32s(&[3, 6], &[5, 3]), "format", &[&a, "3 rows", "rank 2", "r of the configuration"]);
    check(f32s(&[12], &[5, 2]), "format", &[&a, "[12]"]);
    check(f32s(&[2, 6], &[10]), "format", &[&b, "[10]"]);
    check(f32s(&[2, 0], &[5, 2]), "format", &[&a, "[2, 0]"]);
    check(f32s(&[0, 6], &[5, 0]), "format", &[&a, "[0, 6]"]);
    check(
        vec![t(&a, TensorDtype::F64, &[2, 6]), t(&b, TensorDtype::F32, &[5, 2])],
        "unsupported",
        &[&a, "F64"],
    );
    check(
        vec![t(&a, TensorDtype::F32, &[2, 6]), t(&b, TensorDtype::F8_E4M3, &[5, 2])],
        "unsupported",
        &[&b, "F8"],
    );
    check(Vec::new(), "format", &["no lora_A"]);
    let mut twice = f32s(&[2, 6], &[5, 2]);
    twice.push(t("q.lora_A.default.weight", TensorDtype::F32, &[2, 6]));
    check(twice, "format", &[&a, "q.lora_A.default.weight", "both lora_A of module \"q\""]);
    for (dtype, bad) in [
        (TensorDtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (TensorDtype::F16, half::f16::INFINITY.to_le_bytes().to_vec()),
        (TensorDtype::BF16, half::bf16::NEG_INFINITY.to_le_bytes().to_vec()),
    ] {
        let mut data = vec![0; 12 * bad.len()];
        data[11 * bad.len()..].copy_from_slice(&bad);
        let tensors =
            vec![Tensor::new(a.clone(), dtype, vec![2, 6], data).unwrap(), t(&b, TensorDtype::F32, &[5, 2])];
        check(tensors, "format", &[&a, "NaN or infinity"]);
    }
    let by_pattern = config(json!({"rank_pattern": {"q": 3}}));
    let words = [a.as_str(), "rank_pattern", "rank 3"];
    assert_refused(load_dir(&by_pattern, &f32s(&[2, 6], &[5, 2]), &STRICT), "format", &words);
}

#[test]
fn wrong_configurations_are_named() {
    for (text, words) in [
        ("", &["JSON"][..]),
        ("[]", &["not a JSON object"]),
        ("{}", &["peft_type"]),
        (r#"{"peft_type": "LORA", "r": 2, "r": 2}"#, &["\"r\" appears twice"]),
        (r#"{"peft_type": "LORA", "lora_alpha": NaN}"#, &["JSON"]),
        (r#"{"peft_type": "LORA", "lora_alpha": 1e999}"#, &["JSON"]),
        (r#"{"peft_type": "LORA", "lora_alpha": "4"}"#, &["lora_alpha: got \"4\", expected a finite number"]),
        (r#"{"peft_type": "LORA", "r": 0}"#, &["r: got", "0"]),
        (r#"{"peft_type": "LORA", "r": -1}"#, &["-1"]),
        (r#"{"peft_type": "LORA", "r": 2.5}"#, &["2.5"]),
        (r#"{"peft_type": "LORA", "r": true}"#, &["true"]),
        (r#"{"peft_type": "LORA", "r": 99999999999999999999}"#, &["r: got"]),
        (r#"{"peft_type": "LORA", "use_rslora": 1}"#, &["use_rslora", "1"]),
        (r#"{"peft_type": "LORA", "bias": "some"}"#, &["bias", "some"]),
        (r#"{"peft_type": "LORA", "use_dora": "yes"}"#, &["use_dora: got \"yes\", expected true or false"]),
        (r#"{"peft_type": "LORA", "modules_to_save": "head"}"#, &["modules_to_save", "list of names"]),
        (r#"{"peft_type": "LORA", "target_parameters": [1]}"#, &["target_parameters", "list of names"]),
        (r#"{"peft_type": "LORA", "target_modules": {"q": 1}}"#, &["target_modules", "list of names"]),
        (r#"{"peft_type": "LORA", "kasa_config": [1]}"#, &["kasa_config", "an object"]),
        (r#"{"peft_type": "LORA", "rank_pattern": [1]}"#, &["rank_pattern", "object"]),
        (r#"{"peft_type": "LORA", "rank_pattern": {"q": 0}}"#, &["rank_pattern", "\"q\"", "0"]),
        (r#"{"peft_type": "LORA", "alpha_pattern": {"q": null}}"#, &["alpha_pattern", "null"]),
    ] {
        let got = load_dir(text, &pair("q", 2), &STRICT);
        assert_refused(got, "format", &[words, &["adapter_config.json"]].concat());
    }
}

#[test]
fn foreign_files_are_refused_by_content() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (content, kind, word) in [
        (&b"PK\x03\x04rest of a torch archive"[..], "unsupported", "pickle"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "unsupported", "pickle"),
        (b"\x80\x04\x95", "unsupported", "pickle"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "format", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "format", "git lfs pull"),
        (b"{\"peft_type\": \"LORA\"}", "format", "directory"),
        (b"", "format", "0 bytes"),
        (b"\x02\0\0\0\0\0\0\0{}", "format", "adapter_config.json"),
    ] {
        let path = at("adapter.safetensors");
        std::fs::write(&path, content).unwrap();
        for mmap in [false, true] {
            let got = load(&path, &LoadOptions { mmap, ..STRICT });
            assert_refused(got, kind, &[word, "adapter.safetensors"]);
        }
    }
    assert_refused(load(&at("missing"), &STRICT), "io", &["missing"]);
    #[cfg(unix)]
    assert_refused(load(Path::new("/dev/zero"), &STRICT), "format", &["/dev/zero", "regular"]);
    assert_refused(from_bytes(&safetensors(&pair("q", 2), None), true), "format", &["microlora"]);
}

#[test]
fn incomplete_directories_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    assert_refused(load(root, &STRICT), "format", &["adapter_config.json"]);
    std::fs::create_dir(root.join("german")).unwrap();
    write_dir(&root.join("german"), &config(json!({})), &pair("q", 2));
    assert_refused(load(root, &STRICT), "format", &["adapter_config.json", "\"german\""]);
    std::fs::write(root.join("adapter_config.json"), config(json!({}))).unwrap();
    assert_refused(load(root, &STRICT), "format", &["adapter_model.safetensors"]);
    std::fs::write(root.join("adapter_model.bin"), b"PK\x03\x04").unwrap();
    assert_refused(load(root, &STRICT), "unsupported", &["adapter_model.bin", "pickle"]);
    write_dir(root, &config(json!({})), &pair("q", 2));
    assert_eq!(load(root, &STRICT).unwrap().parts.modules.len(), 1);
    // The weights alone, without the configuration that gives their scaling.
    std::fs::remove_file(root.join("adapter_config.json")).unwrap();
    assert_refused(load(&root.join("adapter_model.safetensors"), &STRICT), "format", &["scaling"]);
}

#[test]
fn single_files_that_contradict_themselves_are_refused() {
    let modules = r#"[{"path":"q","rank":2,"alpha":4.0,"use_rslora":false}]"#;
    let good = [("format", "microlora"), ("format_version", "1"), ("modules", modules)];
    let factors = || {
        vec![
            tensor("q.lora_a", TensorDtype::F32, &[2, 6], 1),
            tensor("q.lora_b", TensorDtype::F32, &[5, 2], 2),
        ]
    };
    let with = |edit: &[(&'static str, &'static str)], tensors: &[Tensor]| {
        let mut all = good.to_vec();
        all.retain(|(k, _)| !edit.iter().any(|(e, _)| e == k));
        all.extend(edit.iter().filter(|(_, v)| !v.is_empty()));
        from_bytes(&safetensors(tensors, Some(&all)), true)
    };
    with(&[], &factors()).unwrap();
    assert_refused(with(&[("format_version", "3")], &factors()), "unsupported", &["version 3", "upgrade"]);
    assert_refused(with(&[("format_version", "")], &factors()), "format", &["format_version"]);
    assert_refused(with(&[("format_version", "one")], &factors()), "format", &["one"]);
    assert_refused(with(&[("modules", "")], &factors()), "format", &["modules"]);
    assert_refused(with(&[("modules", "{}")], &factors()), "format", &["modules"]);
    assert_refused(with(&[("surprise", "x")], &factors()), "format", &["surprise"]);
    assert_refused(with(&[("config", "not json")], &factors()), "format", &["config"]);
    assert_refused(with(&[], &factors()[..1]), "format", &["modules", "at most 0 items"]);
    let mut more = factors();
    more.push(tensor("stray", TensorDtype::F32, &[1], 1));
    assert_refused(with(&[], &more), "format", &["stray", "strict=False"]);
    for (text, word) in [
        (r#"[{"path":"q","rank":3,"alpha":4.0,"use_rslora":false}]"#, "rank 3"),
        (r#"[{"path":"q","rank":2,"alpha":null,"use_rslora":false}]"#, "modules"),
        (r#"[{"path":"q","rank":2,"alpha":1e999,"use_rslora":false}]"#, "modules"),
        (r#"[{"path":"q","rank":2,"rank":2,"alpha":4.0,"use_rslora":false}]"#, "duplicate"),
        (r#"[{"path":"q","rank":2,"alpha":4.0,"use_rslora":false,"x":1}]"#, "unknown field"),
        (r#"[{"path":"k","rank":2,"alpha":4.0,"use_rslora":false}]"#, "k.lora_a"),
    ] {
        assert_refused(with(&[("modules", text)], &factors()), "format", &[word]);
    }
    let text = r#"[{"path":"q\n","rank":2,"alpha":4.0,"use_rslora":false}]"#;
    let named = [
        tensor("q\n.lora_a", TensorDtype::F32, &[2, 6], 1),
        tensor("q\n.lora_b", TensorDtype::F32, &[5, 2], 2),
    ];
    assert_refused(with(&[("modules", text)], &named), "format", &["control characters"]);
}

#[test]
fn writers_check_what_they_are_given() {
    let dir = tempfile::tempdir().unwrap();
    let mut cases: Vec<(AdapterParts, &str)> = Vec::new();
    let mut add = |word: &'static str, edit: &dyn Fn(&mut AdapterParts)| {
        let mut p = parts();
        edit(&mut p);
        cases.push((p, word));
    };
    add("layers.0.q_proj.alpha", &|p| p.modules[0].alpha = f64::NAN);
    add("layers.0.q_proj.lora_a", &|p| p.modules[0].rank = 3);
    add("layers.0.q_proj.lora_b", &|p| p.modules[0].b.shape = vec![10]);
    add("layers.0.q_proj.lora_a", &|p| p.modules[0].a.data = vec![0; 3].into());
    add("layers.0.q_proj.lora_a", &|p| p.modules[0].a.data = vec![0xff; 48].into());
    add("layers.0.q_proj.lora_a", &|p| p.modules[0].a = tensor("x", TensorDtype::I64, &[2, 6], 1));
    add("twice", &|p| p.modules[1].path = "layers.0.q_proj".into());
    add("module path", &|p| p.modules[0].path = "a\nb".into());
    add("module path", &|p| p.modules[0].path.clear());
    add("twice", &|p| {
        p.extra = vec![tensor("x", TensorDtype::F32, &[1], 1), tensor("x", TensorDtype::F32, &[1], 1)]
    });
    for (p, word) in &cases {
        assert_refused(to_bytes(p), "argument", &[word]);
        assert_refused(save_single(&dir.path().join("x"), p), "argument", &[word]);
        assert_refused(save_peft(&dir.path().join("y"), p, &PeftOptions::default()), "argument", &[word]);
    }
    let mut mixed = parts();
    mixed.modules[1].use_rslora = true;
    assert_refused(save_peft(dir.path(), &mixed, &PeftOptions::default()), "argument", &["use_rslora"]);
    for path in [".", "base_model.model.q", "q.base_layer", "q.lora_diag", "q.modules_to_save.q"] {
        let odd = AdapterParts { modules: vec![module(path, 2, 1.0)], ..AdapterParts::default() };
        let got = save_peft(dir.path(), &odd, &PeftOptions::default());
        assert_refused(got, "argument", &["module path", path]);
        assert_eq!(from_bytes(&to_bytes(&odd).unwrap(), true).unwrap().parts, odd);
    }
    let odd = AdapterParts { extra: pair("k", 2), ..parts() };
    assert_refused(
        save_peft(dir.path(), &odd, &PeftOptions::default()),
        "argument",
        &["extra tensor", "k.lora_A"],
    );
    let none = AdapterParts::default();
    assert_refused(save_peft(dir.path(), &none, &PeftOptions::default()), "argument", &["no modules"]);
    let foreign = AdapterParts { peft_config: Some(config(json!({"peft_type": "IA3"}))), ..parts() };
    assert_refused(save_peft(dir.path(), &foreign, &PeftOptions::default()), "unsupported", &["IA3"]);
    assert!(contents(dir.path()).is_empty());
}
