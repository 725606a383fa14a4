//! PEFT directories: names, ranks, alphas, patterns, and configurations that stay as they were.

use std::collections::BTreeMap;

use microlora::Error;
use microlora::format::{AdapterParts, PeftOptions, TensorDtype, load, save_peft};
use serde_json::{Value, json};

use super::samples::*;

/// What PEFT 0.21.2 writes for a plain adapter, in its key order.
const PEFT_CONFIG: &str = r#"{"alora_invocation_tokens": null, "alpha_pattern": {"v_proj": 7}, "arrow_config": null,
 "auto_mapping": {"base_model_class": "M", "parent_library": "m"}, "base_model_name_or_path": null, "bias": "none",
 "corda_config": null, "ensure_weight_tying": false, "eva_config": null, "exclude_modules": null,
 "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, "kasa_config": null,
 "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {}, "lora_alpha": 4,
 "lora_bias": false, "lora_dropout": 0.05, "lora_ga_config": null, "megatron_config": null,
 "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null, "peft_type": "LORA",
 "peft_version": "0.21.2", "qalora_group_size": 16, "r": 2, "rank_pattern": {"layers.1.q_proj": 3}, "revision": null,
 "target_modules": ["v_proj", "q_proj"], "target_parameters": null, "task_type": null,
 "trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false,
 "velora_config": null}"#;

fn config(edit: Value) -> String {
    let mut object: Value = serde_json::from_str(PEFT_CONFIG).unwrap();
    object.as_object_mut().unwrap().extend(edit.as_object().unwrap().clone());
    object.to_string()
}

fn plain() -> String {
    config(json!({"rank_pattern": {}, "alpha_pattern": {}}))
}

fn read_config(dir: &std::path::Path) -> Value {
    serde_json::from_slice(&contents(dir)["adapter_config.json"]).unwrap()
}

fn resave(config: &str, tensors: &[microlora::format::Tensor], opts: &PeftOptions) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let loaded = load_dir(config, tensors, &LENIENT).unwrap();
    save_peft(dir.path(), &loaded.parts, opts).unwrap();
    dir
}

#[test]
fn files_of_peft_come_back_as_they_were() {
    let mut tensors =
        [pair("layers.0.q_proj", 2), pair("layers.0.v_proj", 2), pair("layers.1.q_proj", 3)].concat();
    let dir = resave(PEFT_CONFIG, &tensors, &PeftOptions::default());
    let files = contents(dir.path());
    assert_eq!(files["adapter_model.safetensors"], safetensors(&tensors, Some(&[("format", "pt")])));
    assert_eq!(read_config(dir.path()), serde_json::from_str::<Value>(PEFT_CONFIG).unwrap());
    let text = String::from_utf8(files["adapter_config.json"].clone()).unwrap();
    assert!(
        text.starts_with(
            "{\n  \"alora_invocation_tokens\": null,\n  \"alpha_pattern\": {\n    \"v_proj\": 7\n"
        ),
        "{text}"
    );
    assert_eq!(files.len(), 2);

    // Unknown settings and opaque tensors stay too.
    tensors.push(tensor("base_model.model.head.weight", TensorDtype::F64, &[2, 2], 9));
    let edited = config(json!({"unknown_key": {"z": [1, 2.5], "a": "é"}}));
    let dir = resave(&edited, &tensors, &PeftOptions::default());
    assert_eq!(read_config(dir.path()), serde_json::from_str::<Value>(&edited).unwrap());
    assert_eq!(
        contents(dir.path())["adapter_model.safetensors"],
        safetensors(&tensors, Some(&[("format", "pt")]))
    );
}

#[test]
fn ranks_and_alphas_come_from_the_first_matching_pattern() {
    let edited = config(json!({
        "alpha_pattern": {r"layers\.0\..*": 1.5, "v_proj": 7, "^layers.1.q_proj": 11}, "use_rslora": true}));
    let tensors =
        [pair("layers.0.v_proj", 2), pair("layers.1.q_proj", 3), pair("layers.1.v_proj", 2), pair("k", 2)];
    let got = load_dir(&edited, &tensors.concat(), &STRICT).unwrap().parts;
    let seen: Vec<_> = got.modules.iter().map(|m| (m.path.as_str(), m.rank, m.alpha, m.use_rslora)).collect();
    assert_eq!(
        seen,
        [
            ("k", 2, 4.0, true),
            ("layers.0.v_proj", 2, 1.5, true),
            ("layers.1.q_proj", 3, 11.0, true),
            ("layers.1.v_proj", 2, 7.0, true)
        ]
    );
    // Sorted keys would give layers.0.v_proj another alpha: "^..." < "layers..." < "v_proj" keeps it.
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &got, &PeftOptions::default()).unwrap();
    assert_eq!(load(dir.path(), &STRICT).unwrap().parts.modules, got.modules);
}

#[test]
fn patterns_that_sorting_would_change_are_rewritten() {
    let edited = config(json!({"rank_pattern": {}, "alpha_pattern": {"v_proj": 7, "layers.0.v_proj": 1}}));
    let tensors =
        [pair("layers.0.v_proj", 2), pair("layers.1.v_proj", 2), pair("layers.0.q_proj", 2)].concat();
    let got = load_dir(&edited, &tensors, &STRICT).unwrap().parts;
    assert_eq!(got.modules.iter().map(|m| m.alpha).collect::<Vec<_>>(), [4.0, 7.0, 7.0]);
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &got, &PeftOptions::default()).unwrap();
    assert_eq!(load(dir.path(), &STRICT).unwrap().parts.modules, got.modules);
    let now = read_config(dir.path());
    assert_eq!(now["alpha_pattern"], json!({"^layers\\.0\\.q_proj": 4}));
    assert_eq!((&now["lora_alpha"], &now["target_modules"]), (&json!(7), &json!(["v_proj", "q_proj"])));
}

#[test]
fn fresh_configurations_hold_what_peft_needs() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = parts();
    parts.metadata_json = Some(r#"{"base_model": "org/model"}"#.into());
    parts.config_json = Some(r#"{"dropout": 0.25}"#.into());
    save_peft(dir.path(), &parts, &PeftOptions::default()).unwrap();
    let now = read_config(dir.path());
    for (key, want) in [
        ("peft_type", json!("LORA")),
        ("r", json!(2)),
        ("lora_alpha", json!(4)),
        ("lora_dropout", json!(0.25)),
        ("rank_pattern", json!({"^layers\\.1\\.v_proj": 9})),
        ("alpha_pattern", json!({"^layers\\.1\\.v_proj": 4.5})),
        ("target_modules", json!(["layers.0.q_proj", "layers.1.q_proj", "layers.1.v_proj"])),
        ("base_model_name_or_path", json!("org/model")),
        ("task_type", Value::Null),
        ("inference_mode", json!(true)),
        ("use_rslora", json!(false)),
    ] {
        assert_eq!(now[key], want, "{key}");
    }
    let loaded = load(dir.path(), &STRICT).unwrap();
    assert_eq!(loaded.parts.metadata_json, parts.metadata_json);
    assert_eq!(loaded.parts.config_json, parts.config_json);
    parts.metadata_json = Some(r#"{"base_model": ""}"#.into());
    save_peft(dir.path(), &parts, &PeftOptions::default()).unwrap();
    assert_eq!(read_config(dir.path())["base_model_name_or_path"], Value::Null);
    save_peft(dir.path(), &parts, &PeftOptions { base_model: Some("other"), ..PeftOptions::default() })
        .unwrap();
    assert_eq!(read_config(dir.path())["base_model_name_or_path"], json!("other"));
}

#[test]
fn layer_paths_put_short_names_into_a_model() {
    let parts = AdapterParts {
        modules: vec![module("q_proj", 2, 4.0), module("v_proj", 3, 6.0)],
        ..AdapterParts::default()
    };
    let map = BTreeMap::from([
        ("q_proj".to_owned(), vec!["m.layers.0.q_proj".to_owned(), "m.layers.1.q_proj".to_owned()]),
        ("v_proj".to_owned(), vec!["m.layers.1.v_proj".to_owned()]),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let opts = PeftOptions { layer_paths: Some(&map), ..PeftOptions::default() };
    save_peft(dir.path(), &parts, &opts).unwrap();
    let got = load(dir.path(), &STRICT).unwrap().parts.modules;
    let seen: Vec<_> = got.iter().map(|m| (m.path.as_str(), m.rank, m.alpha)).collect();
    let want = [("m.layers.0.q_proj", 2, 4.0), ("m.layers.1.q_proj", 2, 4.0), ("m.layers.1.v_proj", 3, 6.0)];
    assert_eq!(seen, want);
    assert_eq!(got[0].a.data, parts.modules[0].a.data);
    assert_eq!(got[1].b.data, parts.modules[0].b.data);

    let refused = |map: &[(&str, &[&str])]| {
        let owned = |p: &[&str]| p.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let map: BTreeMap<_, _> = map.iter().map(|(k, v)| (k.to_string(), owned(v))).collect();
        let dir = tempfile::tempdir().unwrap();
        let opts = PeftOptions { layer_paths: Some(&map), ..PeftOptions::default() };
        let err = save_peft(&dir.path().join("new"), &parts, &opts).unwrap_err();
        assert!(contents(dir.path()).is_empty());
        err
    };
    assert!(matches!(refused(&[("k_proj", &["m.k"])]), Error::UnknownModule { got, .. } if got == "k_proj"));
    for map in [
        &[("q_proj", &["m.q"][..])][..],
        &[("q_proj", &["m.q"]), ("v_proj", &[])],
        &[("q_proj", &["m.q"]), ("v_proj", &["m.q"])],
        &[("q_proj", &["m.q"]), ("v_proj", &["m..v"])],
        &[("q_proj", &["m.q"]), ("v_proj", &[""])],
    ] {
        assert!(matches!(refused(map), Error::Config { arg, .. } if arg == "layer_paths"));
    }
}

#[test]
fn renamed_modules_are_targeted_by_their_new_paths() {
    let edited =
        config(json!({"rank_pattern": {}, "alpha_pattern": {"q": 9}, "target_modules": "(?!x)layers.*",
        "layers_to_transform": [0]}));
    let tensors = pair("layers.0.q", 2);
    // A pattern that only Python can run stays while the names stay.
    let dir = resave(&edited, &tensors, &PeftOptions::default());
    assert_eq!(read_config(dir.path()), serde_json::from_str::<Value>(&edited).unwrap());
    let map = BTreeMap::from([("layers.0.q".to_owned(), vec!["h.0.query".to_owned()])]);
    let dir = resave(&edited, &tensors, &PeftOptions { layer_paths: Some(&map), ..PeftOptions::default() });
    let now = read_config(dir.path());
    assert_eq!(now["target_modules"], json!(["h.0.query"]));
    assert_eq!((&now["lora_alpha"], &now["alpha_pattern"]), (&json!(9), &json!({})));
    assert_eq!(now["layers_to_transform"], Value::Null);
}

#[test]
fn prefixes_and_adapter_names_are_understood() {
    let rename = |from: &str, to: &str| {
        let mut tensors = pair("m.q", 2);
        tensors.iter_mut().for_each(|t| t.name = t.name.replace(from, to));
        tensors
    };
    let usual = safetensors(&pair("m.q", 2), Some(&[("format", "pt")]));
    let twice = rename("base_model.model.", "base_model.model.base_model.model.");
    for tensors in [rename("base_model.model.", ""), rename(".weight", ".default.weight")] {
        let loaded = load_dir(&plain(), &tensors, &STRICT).unwrap();
        assert_eq!(loaded.parts.modules[0].path, "m.q");
        let dir = resave(&plain(), &tensors, &PeftOptions::default());
        assert_eq!(contents(dir.path())["adapter_model.safetensors"], usual);
    }
    let dir = resave(&plain(), &twice, &PeftOptions::default());
    assert_eq!(
        contents(dir.path())["adapter_model.safetensors"],
        safetensors(&twice, Some(&[("format", "pt")]))
    );
}

#[test]
fn notes_tell_unmatched_patterns_and_transposed_layers() {
    let edited = config(json!({"fan_in_fan_out": true, "bias": "all"}));
    let notes = load_dir(&edited, &pair("layers.0.q_proj", 2), &STRICT).unwrap().notes;
    assert_eq!(notes.len(), 3);
    assert!(notes[0].contains("fan_in_fan_out"));
    assert!(notes[1].contains("rank_pattern") && notes[1].contains("layers.1.q_proj"));
    assert!(notes[2].contains("alpha_pattern") && notes[2].contains("v_proj"));
}
