//! What is not plain LoRA on linear layers: kept to the bit, refused for use, left out only by name.

use microlora::Error;
use microlora::format::{
    AdapterParts, Loaded, ModuleKind, PeftOptions, Tensor, TensorDtype, load, load_without, peft, read,
    read_bytes, save_peft, save_single_as_read, to_bytes,
};
use serde_json::{Value, json};

use super::samples::*;

const PREFIX: &str = "base_model.model.";

fn config(edit: &Value) -> String {
    let mut object = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "e", "c"]});
    object.as_object_mut().unwrap().extend(edit.as_object().unwrap().clone());
    object.to_string()
}

fn named(key: &str, shape: &[usize]) -> Tensor {
    tensor(&format!("{PREFIX}{key}"), TensorDtype::F32, shape, 7)
}

/// A variant as files hold it: settings, tensors beside the linear module `q`, its kinds.
struct Case {
    name: &'static str,
    edit: Value,
    tensors: Vec<Tensor>,
    kinds: &'static [&'static str],
}

fn cases() -> Vec<Case> {
    let case = |name, edit, tensors: &[(&str, &[usize])], kinds| Case {
        name,
        edit,
        tensors: tensors.iter().map(|(key, shape)| named(key, shape)).collect(),
        kinds,
    };
    vec![
        case("DoRA", json!({"use_dora": true}), &[("q.lora_magnitude_vector", &[5])], &["dora"]),
        case("magnitude alone", json!({}), &[("q.lora_magnitude_vector", &[5])], &["dora"]),
        case("lora_bias", json!({"lora_bias": true}), &[("q.lora_B.bias", &[5])], &["lora_bias"]),
        case(
            "bias all",
            json!({"bias": "all"}),
            &[("norm.bias", &[6]), ("q.base_layer.bias", &[5])],
            &["bias"],
        ),
        case("bias lora_only", json!({"bias": "lora_only"}), &[("q.base_layer.bias", &[5])], &["bias"]),
        case(
            "modules_to_save",
            json!({"modules_to_save": ["head"]}),
            &[("m.head.inner.bias", &[3]), ("m.head.inner.weight", &[3, 6])],
            &["modules_to_save"],
        ),
        case(
            "trained tokens",
            json!({"trainable_token_indices": {"e": [1, 3]}}),
            &[("e.token_adapter.trainable_tokens_delta", &[2, 6])],
            &["trainable_tokens"],
        ),
        case(
            "saved embeddings",
            json!({}),
            &[("m.embed_tokens.weight", &[9, 6]), ("m.lm_head.base_layer.weight", &[9, 6])],
            &["saved_embedding"],
        ),
        case(
            "embedding",
            json!({}),
            &[("e.lora_embedding_A", &[2, 9]), ("e.lora_embedding_B", &[6, 2])],
            &["embedding"],
        ),
        case(
            "convolutions",
            json!({"target_modules": ["q", "c", "g"]}),
            &[
                ("c.lora_A.weight", &[2, 4, 3, 3]),
                ("c.lora_B.weight", &[6, 2, 1, 1]),
                ("g.lora_A.weight", &[2, 4, 1]),
                ("g.lora_B.weight", &[4, 1, 1]),
            ],
            &["conv"],
        ),
        case(
            "experts",
            json!({"target_parameters": ["experts.w1", "experts.w2"]}),
            &[
                ("experts.base_layer.lora_A.weight", &[6, 10]),
                ("experts.base_layer.lora_B.weight", &[4, 6]),
                ("experts.lora_A.weight", &[6, 4]),
                ("experts.lora_B.weight", &[10, 6]),
            ],
            &["target_parameters"],
        ),
        case("QALoRA", json!({"use_qalora": true}), &[], &["qalora"]),
        case(
            "BD-LoRA",
            json!({"use_bdlora": {"nblocks": 2}, "target_modules": ["q", "d"]}),
            &[("d.lora_A.weight", &[2, 6]), ("d.lora_B.weight", &[5, 1])],
            &["bdlora"],
        ),
        case(
            "BD-LoRA beside an embedding",
            json!({"use_bdlora": {"nblocks": 2}}),
            &[("e.lora_embedding_A", &[2, 9]), ("e.lora_embedding_B", &[6, 2])],
            &["bdlora", "embedding"],
        ),
        case("KaSA", json!({"kasa_config": {}}), &[("q.lora_diag", &[2])], &["kasa"]),
        case("aLoRA", json!({"alora_invocation_tokens": []}), &[], &["alora"]),
        case("Arrow", json!({"arrow_config": {"top_k": 1}}), &[], &["arrow"]),
        case(
            "MonteCLoRA",
            json!({"monteclora_config": {"num_samples": 8}}),
            &[("q.lora_monteclora_sampler.std_prior", &[2])],
            &["monteclora"],
        ),
        case("replicated layers", json!({"layer_replication": [[0, 2]]}), &[], &["layer_replication"]),
        case("PiSSA", json!({"init_lora_weights": "pissa_niter_4"}), &[], &["init:pissa"]),
        case(
            "several",
            json!({"use_dora": true, "bias": "all", "modules_to_save": ["head"]}),
            &[("head.weight", &[3, 6]), ("norm.bias", &[6]), ("q.lora_magnitude_vector", &[5])],
            &["dora", "modules_to_save", "bias"],
        ),
    ]
}

fn kinds(loaded: &Loaded) -> Vec<&str> {
    let mut out: Vec<&str> = Vec::new();
    for v in &loaded.variants {
        assert!(!v.at.is_empty() && v.why.len() > 20, "{v:?}");
        if !out.contains(&v.kind.as_str()) {
            out.push(&v.kind);
        }
    }
    out
}

fn refusal(result: microlora::Result<Loaded>) -> String {
    match result {
        Err(Error::Unsupported { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_kind_is_kept_refused_and_written_back_as_it_was() {
    for Case { name, edit, tensors, kinds: want } in cases() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: &str| dir.path().join(n);
        std::fs::create_dir(at("in")).unwrap();
        let all = [pair("q", 2), tensors].concat();
        write_dir(&at("in"), &config(&edit), &all);
        let loaded = read(&at("in"), &STRICT).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(kinds(&loaded), want, "{name}");
        assert!(loaded.unused.is_empty());

        save_peft(&at("out"), &loaded.parts, &PeftOptions::default()).unwrap();
        let files = contents(&at("out"));
        assert_eq!(
            files["adapter_model.safetensors"],
            safetensors(&all, Some(&[("format", "pt")])),
            "{name}"
        );
        let now: Value = serde_json::from_slice(&files["adapter_config.json"]).unwrap();
        assert_eq!(now, serde_json::from_str::<Value>(&config(&edit)).unwrap(), "{name}");

        // Through a single file nothing is lost, and it is refused the same way.
        save_single_as_read(&at("one"), &loaded, false).unwrap();
        let single = read(&at("one"), &STRICT).unwrap();
        assert_eq!(single.variants, loaded.variants, "{name}");
        save_peft(&at("again"), &single.parts, &PeftOptions::default()).unwrap();
        assert_eq!(contents(&at("again")), files, "{name}");
        // A header that keeps quiet about them does not make it plain.
        let quiet = read_bytes(&to_bytes(&loaded.parts).unwrap(), true).unwrap();
        assert_eq!(quiet.variants, loaded.variants, "{name}");

        let allow: Vec<String> = want.iter().map(|k| format!("drop:{k}")).collect();
        let never = ["qalora", "bdlora", "kasa", "arrow"].contains(&want[0]);
        for path in [at("in"), at("one")] {
            let said = refusal(load(&path, &LENIENT));
            assert!(said.contains(want[0]), "{name}: {said}");
            if never {
                assert!(said.contains("nothing is left"), "{said}");
                refusal(load_without(&path, &STRICT, &allow));
                continue;
            }
            let list: Vec<String> = allow.iter().map(|a| format!("{a:?}")).collect();
            assert!(said.contains(&format!("allow=[{}]", list.join(", "))), "{name}: {said}");
            refusal(load_without(&path, &STRICT, &allow[1..]));
            refusal(load_without(&path, &STRICT, &["drop:nothing".to_owned()]));
            let left = load_without(&path, &STRICT, &allow).unwrap();
            let [q] = &left.parts.modules[..] else { panic!("{name}") };
            assert_eq!((&q.path[..], &q.a.data, &q.b.data), ("q", &all[0].data, &all[1].data));
            assert_eq!((left.variants.len(), left.parts.extra.len()), (0, 0));
            assert!(left.notes.iter().any(|n| n.contains(want[0])), "{:?}", left.notes);
            // What is left is a plain adapter, in a file too.
            save_peft(&at("plain"), &left.parts, &PeftOptions::default()).unwrap();
            assert_eq!(load(&at("plain"), &STRICT).unwrap().parts.modules, left.parts.modules);
        }
    }
}

fn read_tensors(edit: Value, tensors: &[Tensor]) -> microlora::Result<Loaded> {
    let dir = tempfile::tempdir().unwrap();
    write_dir(dir.path(), &config(&edit), tensors);
    read(dir.path(), &STRICT)
}

fn assert_format(result: microlora::Result<Loaded>, words: &[&str]) {
    let err = result.expect_err(&format!("{words:?}"));
    assert!(matches!(err, Error::Format { .. }), "{err}");
    for word in words {
        assert!(err.to_string().contains(word), "{err} does not say {word}");
    }
}

#[test]
fn variants_that_contradict_themselves_are_broken_files() {
    let plus =
        |more: &[(&str, &[usize])]| [pair("q", 2), more.iter().map(|(k, s)| named(k, s)).collect()].concat();
    let experts = json!({"target_parameters": ["experts.w1"]});
    for (edit, more, words) in [
        (
            json!({}),
            &[("e.lora_embedding_A", &[2usize, 9][..])][..],
            &["e", "without its lora_embedding_B"][..],
        ),
        (json!({}), &[("e.lora_embedding_B", &[6, 2])], &["without its lora_embedding_A"]),
        (
            json!({}),
            &[("e.lora_embedding_A", &[3, 9]), ("e.lora_embedding_B", &[6, 3])],
            &["3 rows", "rank 2"],
        ),
        (
            json!({}),
            &[("e.lora_embedding_A", &[2, 9]), ("e.lora_embedding_B", &[6, 3])],
            &["lora_embedding_B", "one rank"],
        ),
        (
            json!({}),
            &[("c.lora_A.weight", &[2, 4, 3]), ("c.lora_B.weight", &[6, 3, 1])],
            &["c.lora_B", "one rank"],
        ),
        (
            json!({}),
            &[("c.lora_A.weight", &[2, 4, 3]), ("c.lora_B.weight", &[6, 2])],
            &["c.lora_B", "three to five"],
        ),
        (experts.clone(), &[("experts.lora_A.weight", &[6, 4])], &["experts", "without its lora_B"]),
        (
            experts.clone(),
            &[("experts.lora_A.weight", &[5, 4]), ("experts.lora_B.weight", &[3, 5])],
            &["experts * rank", "rank 2"],
        ),
        (
            experts.clone(),
            &[("experts.lora_A.weight", &[6, 4]), ("experts.lora_B.weight", &[3, 4])],
            &["experts.lora_B"],
        ),
        (
            experts.clone(),
            &[("experts.lora_A.weight", &[6, 4, 1]), ("experts.lora_B.weight", &[3, 6])],
            &["two dimensions"],
        ),
        (
            json!({"use_dora": true}),
            &[("q.lora_magnitude_vector", &[5]), ("q.lora_magnitude_vector.default.weight", &[5])],
            &["both \"q.lora_magnitude_vector\""],
        ),
        (
            json!({"lora_bias": true}),
            &[("q.lora_B.bias", &[5]), ("q.lora_B.default.bias", &[5])],
            &["both \"q.lora_B.bias\""],
        ),
    ] {
        assert_format(read_tensors(edit, &plus(more)), words);
    }
    for (edit, key) in [
        (json!({"use_dora": true}), "q.lora_magnitude_vector"),
        (json!({"modules_to_save": ["head"]}), "head.weight"),
    ] {
        let nan =
            Tensor::new(format!("{PREFIX}{key}"), TensorDtype::F32, vec![1], f32::NAN.to_le_bytes().to_vec());
        let tensors = [pair("q", 2), vec![nan.unwrap()]].concat();
        assert_format(read_tensors(edit, &tensors), &[key, "NaN"]);
    }
    let many: Vec<String> = (0..1 << 16).map(|i| format!("m{i}.w")).collect();
    let tensors: Vec<Tensor> = (0..1 << 13).map(|i| named(&format!("t{i}"), &[1])).collect();
    assert_format(read_tensors(json!({"target_parameters": many}), &tensors), &["target_parameters"]);
}

#[test]
fn tensors_without_dimensions_come_back() {
    let tensors = [pair("q", 2), vec![named("head.scale", &[]), named("head.weight", &[3, 6])]].concat();
    let loaded = read_tensors(json!({"modules_to_save": ["head"]}), &tensors).unwrap();
    assert_eq!(loaded.parts.extra, tensors[2..]);
    let again = read_bytes(&to_bytes(&loaded.parts).unwrap(), true).unwrap();
    assert_eq!(again.parts, loaded.parts);
    assert_format(
        read_tensors(json!({}), &[named("q.lora_A.weight", &[]), named("q.lora_B.weight", &[5, 2])]),
        &["q.lora_A", "[]"],
    );
}

/// PEFT reads A as (experts, rank, in) and B as (out, rank, experts); here 3 experts of rank 2.
#[test]
fn packed_experts_come_apart_and_together() {
    let numbers = |n: usize| (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>();
    let tensor = |key: &str, shape: &[usize]| {
        let data = numbers(shape.iter().product());
        Tensor::new(format!("{PREFIX}{key}"), TensorDtype::F32, shape.to_vec(), data).unwrap()
    };
    let packed = [
        tensor("m.experts.base_layer.lora_A.weight", &[6, 10]),
        tensor("m.experts.base_layer.lora_B.weight", &[4, 6]),
        tensor("m.experts.lora_A.weight", &[6, 4]),
        tensor("m.experts.lora_B.weight", &[10, 6]),
    ];
    let edit = json!({"target_parameters": ["experts.w1", "experts.w2"], "target_modules": []});
    let loaded = read_tensors(edit.clone(), &packed).unwrap();
    assert!(loaded.parts.modules.is_empty());
    let apart = peft::unpack_experts(&loaded.parts, None).unwrap();
    assert_eq!(apart, peft::unpack_experts(&loaded.parts, Some(3)).unwrap());
    assert!(apart.extra.is_empty());
    let [outer, inner] = &apart.modules[..] else { panic!("{apart:?}") };
    assert_eq!((&inner.path[..], &outer.path[..]), ("m.experts.base_layer", "m.experts"));
    assert_eq!((outer.kind, outer.rank, outer.alpha), (ModuleKind::Experts, 2, 4.0));
    assert_eq!((&outer.a.shape[..], &outer.b.shape[..]), (&[3, 2, 4][..], &[3, 10, 2][..]));
    let at = |t: &Tensor, i: usize| f32::from_le_bytes(t.data[4 * i..4 * i + 4].try_into().unwrap());
    for e in 0..3 {
        for r in 0..2 {
            for o in 0..10 {
                assert_eq!(at(&outer.b, (e * 10 + o) * 2 + r), (o * 6 + r * 3 + e) as f32);
            }
            for i in 0..4 {
                assert_eq!(at(&outer.a, (e * 2 + r) * 4 + i), ((e * 2 + r) * 4 + i) as f32);
            }
        }
    }
    let dir = tempfile::tempdir().unwrap();
    save_peft(dir.path(), &apart, &PeftOptions::default()).unwrap();
    assert_eq!(
        contents(dir.path())["adapter_model.safetensors"],
        safetensors(&packed, Some(&[("format", "pt")]))
    );
    // A repeated prefix stays.
    let twice = |t: &Tensor| Tensor { name: format!("{PREFIX}{}", t.name), ..t.clone() };
    let doubled: Vec<Tensor> = packed.iter().map(twice).collect();
    let other = read_tensors(edit.clone(), &doubled).unwrap();
    let again = tempfile::tempdir().unwrap();
    let other = peft::unpack_experts(&other.parts, None).unwrap();
    save_peft(again.path(), &other, &PeftOptions::default()).unwrap();
    assert_eq!(
        contents(again.path())["adapter_model.safetensors"],
        safetensors(&doubled, Some(&[("format", "pt")]))
    );
    // In our own file they stay apart.
    let single = read_bytes(&to_bytes(&apart).unwrap(), true).unwrap();
    assert_eq!(single.parts, apart);
    assert_eq!(kinds(&single), ["target_parameters"]);
    let all = ["drop:target_parameters".to_owned()];
    assert!(refusal(load_without(dir.path(), &STRICT, &all)).contains("no linear module"));

    for wrong in [Some(2), Some(6), Some(usize::MAX)] {
        let err = peft::unpack_experts(&loaded.parts, wrong).unwrap_err();
        assert!(matches!(&err, Error::Config { arg, .. } if arg == "experts"), "{err}");
    }
    let plain = AdapterParts { peft_config: Some(config(&json!({}))), ..parts() };
    assert!(matches!(peft::unpack_experts(&plain, None), Err(Error::Config { .. })));

    // A pattern that names a parameter leaves open which pair it is of: then the number decides.
    let mut edit = edit;
    edit["rank_pattern"] = json!({"experts.w1": 3});
    edit["alpha_pattern"] = json!({"experts.w1": 9});
    let loaded = read_tensors(edit, &packed[2..]).unwrap();
    assert!(peft::unpack_experts(&loaded.parts, None).is_err());
    for (experts, rank, alpha) in [(3, 2, 4.0), (2, 3, 9.0)] {
        let apart = peft::unpack_experts(&loaded.parts, Some(experts)).unwrap();
        assert_eq!((apart.modules[0].rank, apart.modules[0].alpha), (rank, alpha));
        assert_eq!(apart.modules[0].a.shape, [experts, rank, 4]);
    }
}

#[test]
fn parameters_are_told_from_modules_by_their_settings() {
    let packed = |owner: &str| {
        [
            pair("q", 2),
            vec![
                named(&format!("{owner}.lora_A.weight"), &[6, 4]),
                named(&format!("{owner}.lora_B.weight"), &[3, 6]),
            ],
        ]
        .concat()
    };
    // By its module, by a name alone, and by the wrapper.
    for (names, owner) in [
        (json!(["m.experts.w"]), "m.experts"),
        (json!(["experts.w"]), "m.experts"),
        (json!(["w"]), "m.experts"),
        (json!(["other.w"]), "m.experts.base_layer"),
    ] {
        let loaded = read_tensors(json!({"target_parameters": names}), &packed(owner)).unwrap();
        assert_eq!((loaded.parts.modules.len(), loaded.parts.extra.len()), (1, 2), "{names}");
    }
    // A module whose name is only alike stays a module, and then its rank is wrong.
    for names in [json!(["xperts.w"]), json!(["n.experts.w"]), json!([])] {
        let got = read_tensors(json!({"target_parameters": names}), &packed("m.experts"));
        assert_format(got, &["6 rows", "rank 2"]);
    }
}

#[test]
fn of_many_places_of_one_kind_some_are_listed() {
    let biases = (0..3000).map(|i| named(&format!("layers.{i}.bias"), &[1]));
    let tensors: Vec<Tensor> = pair("q", 2).into_iter().chain(biases).collect();
    let loaded = read_tensors(json!({"bias": "all"}), &tensors).unwrap();
    assert_eq!((loaded.parts.extra.len(), loaded.variants.len()), (3000, 1024));
    let left = loaded.runnable("f", &["drop:bias".to_owned()]).unwrap();
    assert_eq!((left.variants.len(), left.notes.len()), (0, 1));
}

/// Variants that a header may list.
const MOST: usize = 1 << 14;

#[test]
fn headers_that_lie_about_variants_are_refused() {
    let write = |variants: &str| {
        let entries = [
            ("format", "microlora"),
            ("format_version", "1"),
            ("modules", r#"[{"path":"q","rank":2,"alpha":4.0,"use_rslora":false}]"#),
            ("variants", variants),
        ];
        let factors = [
            tensor("q.lora_a", TensorDtype::F32, &[2, 6], 1),
            tensor("q.lora_b", TensorDtype::F32, &[5, 2], 2),
        ];
        read_bytes(&safetensors(&factors, Some(&entries)), true)
    };
    let said = write(r#"[{"kind":"loha","at":"q.hada","why":"another product"}]"#).unwrap();
    assert_eq!(said.variants.len(), 1);
    assert!(refusal(said.runnable("f", &[])).contains("drop:loha"));
    let many: Vec<Value> =
        (0..=MOST).map(|i| json!({"kind": format!("k{i}\n"), "at": "", "why": ""})).collect();
    assert_format(write(&Value::from(many.clone()).to_string()), &["variants", "at most"]);
    let many = write(&Value::from(many[..MOST].to_vec()).to_string()).unwrap();
    assert_eq!(many.variants.len(), MOST);
    assert!(refusal(many.runnable("f", &[])).len() < 20_000);
    for wrong in ["{}", "[1]", r#"[{"kind":"x"}]"#, r#"[{"kind":"x","at":"","why":"","more":1}]"#] {
        assert_format(write(wrong), &["variants"]);
    }
}
