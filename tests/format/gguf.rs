//! GGUF adapters: round trips, golden bytes, row order, and every way to be refused.

use std::collections::BTreeMap;

use microlora::Error;
use microlora::format::gguf::{self, Encoding, GgufOptions, ROW_ORDER, Target, save_gguf};
use microlora::format::{
    AdapterParts, Along, FactorParts, Limits, LoadOptions, Loaded, ModuleKind, ModuleParts, Tensor,
    TensorDtype, load, read,
};
use proptest::prelude::*;

use crate::gguf_support::{Draft, Row, Value, array, bytes, f32, numbers, text, u32};
use crate::samples::{STRICT, module, module_of, tensor};

const F32: TensorDtype = TensorDtype::F32;

fn target(tensor: &str, heads: Option<usize>) -> Target {
    Target { tensor: tensor.into(), heads }
}

/// Writes modules at `<path>.weight` and reads the file.
fn written(modules: Vec<ModuleParts>, dtype: &str) -> microlora::Result<(Loaded, Vec<String>)> {
    let targets = modules.iter().map(|m| (m.path.clone(), target(&format!("{}.weight", m.path), None)));
    let targets = targets.collect();
    let parts = AdapterParts { modules, ..AdapterParts::default() };
    written_as(&parts, &targets, dtype)
}

fn written_as(
    parts: &AdapterParts,
    targets: &BTreeMap<String, Target>,
    dtype: &str,
) -> microlora::Result<(Loaded, Vec<String>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let opts = GgufOptions {
        architecture: "qwen2",
        targets,
        encoding: dtype.parse::<Encoding>()?,
        tokens: None,
        quantized: &[],
        drop_blocks: false,
    };
    let notes = save_gguf(&path, parts, &opts)?;
    Ok((read(&path, &LoadOptions::default())?, notes))
}

#[test]
fn a_file_by_hand_is_read() {
    let loaded = Draft::good().load().unwrap();
    let [m] = &loaded.parts.modules[..] else { panic!("{loaded:?}") };
    assert_eq!((m.path.as_str(), m.rank, m.alpha, m.use_rslora), ("blk.0.ffn_up", 2, 4.0, false));
    assert_eq!((&m.a.shape[..], &m.b.shape[..]), (&[2, 6][..], &[4, 2][..]));
    assert_eq!(&m.a.data[..], &numbers(12)[..]);
    assert!(loaded.variants.is_empty());
}

#[test]
fn every_byte_of_a_written_file_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.gguf");
    let pair = |name: &str, shape: &[usize]| {
        let n = shape.iter().product::<usize>() as u64;
        Tensor::new(name, F32, shape.to_vec(), numbers(n)).unwrap()
    };
    let m = ModuleParts {
        path: "up".into(),
        kind: ModuleKind::Linear,
        alpha: 4.0,
        rank: 2,
        use_rslora: false,
        a: pair("up.lora_a", &[2, 6]),
        b: pair("up.lora_b", &[4, 2]),
    };
    let targets = BTreeMap::from([("up".to_owned(), target("blk.0.ffn_up.weight", None))]);
    let opts = GgufOptions {
        architecture: "qwen2",
        targets: &targets,
        encoding: Encoding::Auto,
        tokens: None,
        quantized: &[],
        drop_blocks: false,
    };
    let parts = AdapterParts { modules: vec![m], ..AdapterParts::default() };
    save_gguf(&path, &parts, &opts).unwrap();
    let mut draft = Draft::good();
    let sha256 = draft.load().unwrap().fingerprint().unwrap();
    draft.set("microlora.weights_sha256", text(&sha256));
    assert_eq!(std::fs::read(&path).unwrap(), draft.build());
    assert_eq!(read(&path, &STRICT).unwrap().weights_sha256, Some(sha256));
}

#[test]
fn every_plain_type_keeps_its_bits() {
    for a in [F32, TensorDtype::F16, TensorDtype::BF16] {
        for b in [F32, TensorDtype::F16, TensorDtype::BF16] {
            let m = module_of("blk.0.attn_v", 3, 1.5, [a, b], false);
            let (loaded, notes) = written(vec![m.clone()], "auto").unwrap();
            assert_eq!(loaded.parts.modules, [m]);
            assert!(notes.is_empty());
        }
    }
}

#[test]
fn scalings_are_folded_into_one_alpha() {
    let scaling =
        |m: &ModuleParts| m.alpha / if m.use_rslora { (m.rank as f64).sqrt() } else { m.rank as f64 };
    let value = |t: &Tensor, i: usize| f32::from_le_bytes(t.data[4 * i..4 * i + 4].try_into().unwrap());
    let mut modules = vec![
        module("blk.0.attn_v", 2, 4.0),
        module("blk.1.attn_v", 2, 4.0),
        module("blk.2.attn_v", 4, 16.0),
        module("blk.3.attn_v", 5, -0.3),
        module("blk.4.attn_v", 5, 0.0),
        module_of("blk.5.attn_v", 9, 8.0, [F32; 2], true),
    ];
    let (loaded, notes) = written(modules.clone(), "f32").unwrap();
    for (was, is) in modules.iter().zip(&loaded.parts.modules) {
        assert!(!is.use_rslora);
        assert_eq!(is.alpha, 4.0);
        for i in 0..was.b.data.len() / 4 {
            let (want, got) = (scaling(was) * f64::from(value(&was.b, i)), f64::from(value(&is.b, i)));
            assert!((want - scaling(is) * got).abs() <= 6e-8 * want.abs(), "{}", was.path);
        }
    }
    assert!(notes.iter().any(|n| n.contains("rounded") && n.contains("blk.3")), "{notes:?}");
    modules.truncate(3);
    let (_, notes) = written(modules, "auto").unwrap();
    assert!(notes.iter().any(|n| n.contains("exactly") && n.contains("blk.2") && !n.contains("blk.1")));
}

#[test]
fn an_alpha_of_zero_is_not_written() {
    let (loaded, _) = written(vec![module("blk.0.attn_v", 2, 0.0)], "f32").unwrap();
    let m = &loaded.parts.modules[0];
    assert_eq!(m.alpha, 1.0); // zero would mean a scaling of one
    assert!(m.b.data.iter().all(|b| b & 0x7f == 0));
}

#[test]
fn folding_into_halves_widens_what_would_be_rounded() {
    let halves = |path: &str, alpha| module_of(path, 2, alpha, [TensorDtype::F16; 2], false);
    let modules = vec![halves("blk.0.ffn_up", 4.0), halves("blk.1.ffn_up", 8.0), halves("blk.2.ffn_up", 0.3)];
    let (loaded, _) = written(modules, "auto").unwrap();
    let types: Vec<TensorDtype> = loaded.parts.modules.iter().map(|m| m.b.dtype).collect();
    assert_eq!(types, [TensorDtype::F16, TensorDtype::F16, F32]);
}

#[test]
fn numbers_that_a_type_cannot_hold_are_refused() {
    let mut m = module("blk.0.ffn_up", 2, 4.0);
    m.a.data = [1e5f32; 12].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into();
    let err = written(vec![m.clone()], "f16").unwrap_err();
    assert!(matches!(&err, Error::NonFinite { arg, .. } if arg == "blk.0.ffn_up.lora_a"), "{err}");
    written(vec![m], "bf16").unwrap();
}

#[test]
fn blocks_are_read_and_rows_that_are_none_fall_back() {
    for dtype in ["q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0"] {
        let mut m = module("blk.0.ffn_up", 2, 4.0);
        m.a = tensor("blk.0.ffn_up.lora_a", F32, &[2, 512], 3);
        let (loaded, notes) = written(vec![m], dtype).unwrap();
        let got = &loaded.parts.modules[0];
        assert_eq!((got.a.dtype, got.b.dtype), (F32, TensorDtype::F16), "{dtype}");
        let note = loaded.block_note().unwrap();
        assert!(note.contains(&format!("{dtype}: \"blk.0.ffn_up.lora_a\"")), "{note}");
        assert_eq!(loaded.weights_sha256, Some(loaded.fingerprint().unwrap()));
        assert!(notes[0].contains("lora_b") && !notes[0].contains("lora_a"), "{notes:?}");
        let near = |t: &Tensor| {
            t.data.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect::<Vec<_>>()
        };
        let want = near(&tensor("x", F32, &[2, 512], 3));
        let quantized = loaded.quantized.unwrap();
        assert!(
            matches!(&quantized[0].a, FactorParts::Blocks { kind, along: Along::Features, rows: 2, cols: 512, .. }
            if kind.as_str() == dtype)
        );
        assert!(matches!(&quantized[0].b, FactorParts::Plain(t) if t.dtype == TensorDtype::F16));
        assert!(near(&got.a).iter().zip(&want).all(|(a, b)| (a - b).abs() < 3.0), "{dtype}");
    }
}

#[test]
fn rows_are_reordered_and_put_back() {
    let mut m = module("model.q_proj", 3, 6.0);
    m.b = tensor("model.q_proj.lora_b", F32, &[8, 3], 5);
    let parts = AdapterParts { modules: vec![m.clone()], ..AdapterParts::default() };
    let targets = BTreeMap::from([("model.q_proj".to_owned(), target("blk.0.attn_q.weight", Some(2)))]);
    let (loaded, _) = written_as(&parts, &targets, "f32").unwrap();
    let stored = &loaded.parts.modules[0];
    assert_ne!(stored.b.data, m.b.data);
    assert_eq!(stored.b.data[12..24], m.b.data[24..36]); // row 1 there is row 2 here: heads of four rows
    let places = BTreeMap::from([("blk.0.attn_q".to_owned(), ("model.q_proj".to_owned(), Some(2)))]);
    assert_eq!(gguf::translate(loaded.clone(), &places, "f").unwrap().parts.modules, [m]);
    let wrong = |heads| BTreeMap::from([("blk.0.attn_q".to_owned(), ("q".to_owned(), Some(heads)))]);
    assert!(matches!(gguf::translate(loaded.clone(), &wrong(3), "f"), Err(Error::Shape { .. })));
    assert!(matches!(gguf::translate(loaded, &BTreeMap::new(), "f"), Err(Error::Format { .. })));
}

#[test]
fn rows_of_blocks_move_whole() {
    let mut m = module("q", 32, 6.0);
    m.b = tensor("q.lora_b", F32, &[8, 32], 5);
    let parts = AdapterParts { modules: vec![m], ..AdapterParts::default() };
    let targets = BTreeMap::from([("q".to_owned(), target("blk.0.attn_q.weight", Some(2)))]);
    let (loaded, _) = written_as(&parts, &targets, "q8_0").unwrap();
    let places = BTreeMap::from([("blk.0.attn_q".to_owned(), ("q".to_owned(), Some(2)))]);
    let back = gguf::translate(loaded, &places, "f").unwrap();
    let quantized = back.quantized.unwrap();
    assert_eq!(quantized[0].path, "q");
    let FactorParts::Blocks { rows: 8, along: Along::Rank, data, .. } = &quantized[0].b else { panic!() };
    // Rows in blocks, in the model's order: the same as its rows put into blocks.
    let (plain, _) = written(parts.modules, "q8_0").unwrap();
    let FactorParts::Blocks { data: want, .. } = &plain.quantized.unwrap()[0].b else { panic!() };
    assert_eq!(data, want);
}

#[test]
fn only_an_architecture_that_keeps_the_order_is_used_without_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    for (architecture, tensor, runs) in [
        ("qwen2", "blk.0.attn_q", true),
        ("llama", "blk.0.attn_q", false),
        ("llama", "blk.0.attn_k", false),
        ("llama", "blk.0.attn_v", true),
        ("a-new-one", "blk.0.attn_q", false),
    ] {
        let mut draft = Draft::good();
        draft.set("general.architecture", text(architecture));
        draft.tensors.clear();
        draft.data.clear();
        draft.pair(&format!("{tensor}.weight"), 6, 4, 2);
        std::fs::write(&path, draft.build()).unwrap();
        let loaded = read(&path, &STRICT).unwrap();
        assert_eq!(loaded.format, "gguf");
        assert_eq!(loaded.variants.is_empty(), runs, "{architecture} {tensor}");
        match load(&path, &STRICT) {
            Ok(_) => assert!(runs),
            Err(e) => assert!(!runs && e.to_string().contains("base_config"), "{e}"),
        }
        assert!(gguf::keep_names(loaded).variants.is_empty());
    }
}

#[test]
fn embeddings_and_experts_keep_their_own_shapes() {
    let (a, b) = (tensor("e.lora_a", F32, &[2, 7], 3), tensor("e.lora_b", F32, &[5, 2], 5));
    let kind = ModuleKind::Embedding;
    let embedding =
        ModuleParts { path: "token_embd".into(), kind, alpha: 4.0, rank: 2, use_rslora: false, a, b };
    let (a, b) = (tensor("x.lora_a", F32, &[3, 2, 7], 3), tensor("x.lora_b", F32, &[3, 5, 2], 5));
    let kind = ModuleKind::Experts;
    let experts = ModuleParts { path: "blk.0.ffn_up_exps".into(), kind, a, b, ..embedding.clone() };
    let (loaded, _) = written(vec![embedding.clone(), experts.clone()], "auto").unwrap();
    for (got, want) in loaded.parts.modules.iter().zip([embedding, experts]) {
        assert_eq!((got.kind, &got.a.shape, &got.b.shape), (want.kind, &want.a.shape, &want.b.shape));
        assert_eq!((&got.a.data, &got.b.data), (&want.a.data, &want.b.data));
    }
    let kinds: Vec<&str> = loaded.variants.iter().map(|v| v.kind.as_str()).collect();
    assert_eq!(kinds, ["embedding", "experts"]);
}

#[test]
fn ours_and_theirs_beside_the_tensors_survive() {
    let parts = AdapterParts {
        modules: vec![module("blk.0.ffn_up", 2, 4.0)],
        config_json: Some(r#"{"rank":2}"#.into()),
        metadata_json: Some(r#"{"name":"ü"}"#.into()),
        peft_config: Some(r#"{"peft_type":"LORA"}"#.into()),
        prefix: Some("base_model.model.base_model.model.".into()),
        header: BTreeMap::from([
            ("format".into(), "pt".into()),
            ("adapter.lora.task_name".into(), "t".into()),
        ]),
        ..AdapterParts::default()
    };
    let targets = BTreeMap::from([("blk.0.ffn_up".to_owned(), target("blk.0.ffn_up.weight", None))]);
    let (mut loaded, _) = written_as(&parts, &targets, "auto").unwrap();
    assert_eq!(loaded.parts.header.remove("general.architecture").as_deref(), Some("qwen2"));
    assert_eq!(loaded.parts, parts);
}

#[test]
fn the_writer_refuses_what_llama_would() {
    let refuse = |modules: Vec<ModuleParts>, tensor: &str| {
        let targets = modules.iter().map(|m| (m.path.clone(), target(tensor, None))).collect();
        let parts = AdapterParts { modules, ..AdapterParts::default() };
        written_as(&parts, &targets, "auto").unwrap_err().to_string()
    };
    let m = || module("up", 2, 4.0);
    assert!(refuse(vec![m()], &format!("{}.weight", "x".repeat(50))).contains("bytes"));
    assert!(refuse(vec![m()], "blk.0.ffn_up").contains(".weight"));
    assert!(refuse(vec![m()], "token_embd.weight").contains("embedding"));
    assert!(refuse(vec![m(), module("other", 2, 4.0)], "blk.0.ffn_up.weight").contains("once"));
    assert!(refuse(vec![module("up", 2, 1e40)], "blk.0.ffn_up.weight").contains("alpha"));
    assert!(written(Vec::new(), "auto").unwrap_err().to_string().contains("no modules"));
    assert!("f64".parse::<Encoding>().is_err());
}

/// A file that is broken in one way, and a word of the message.
fn broken(change: impl FnOnce(&mut Draft), word: &str) {
    let mut draft = Draft::good();
    change(&mut draft);
    let err = draft.load().unwrap_err();
    assert!(matches!(err, Error::Format { .. } | Error::Unsupported { .. }), "{err:?}");
    assert!(err.to_string().contains(word), "expected {word:?} in: {err}");
}

#[test]
fn containers_that_lie_are_refused() {
    broken(|d| d.magic = *b"GGUG", "magic");
    broken(|d| d.version = 1, "version 1");
    broken(|d| d.version = 4, "version 4");
    broken(|d| d.version = 3u32.swap_bytes(), "big-endian");
    broken(|d| d.key_count = Some(u64::MAX), "do not fit");
    broken(|d| d.key_count = Some(5), "");
    broken(|d| d.tensor_count = Some(u64::MAX), "limit");
    broken(|d| d.tensor_count = Some(1 << 19), "do not fit");
    broken(|d| d.keys.push((b"a".to_vec(), Value(13, vec![]))), "value type 13");
    broken(|d| d.keys.push((b"a\xff".to_vec(), u32(1))), "UTF-8");
    broken(|d| d.set("general.architecture", text(b"\xff")), "UTF-8");
    broken(|d| d.keys.push(d.keys[0].clone()), "twice");
    broken(|d| d.keys.push((b"a".to_vec(), Value(8, u64::MAX.to_le_bytes().to_vec()))), "truncated");
    broken(|d| d.keys.push((b"a".to_vec(), array(4, 1 << 62, &[]))), "truncated");
    broken(|d| d.keys.push((b"a".to_vec(), array(8, 1 << 62, &[]))), "do not fit");
    broken(|d| d.keys.push((b"a".to_vec(), array(9, 1 << 62, &[]))), "do not fit");
    let mut deep = array(4, 0, &[]);
    for _ in 0..64 {
        deep = array(9, 1, &deep.1);
    }
    broken(|d| d.keys.push((b"a".to_vec(), deep)), "nested");
    for bad in [u32(0), u32(24), u32(1 << 30), f32(32.0)] {
        broken(|d| d.set("general.alignment", bad), "general.alignment");
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    broken(|d| d.tensors[0].dims.clear(), "dimensions");
    broken(|d| d.tensors[0].dims = vec![1; 5], "dimensions");
    broken(|d| d.tensors[0].dims[0] = 0, "dimension 0");
    broken(|d| d.tensors[0].dims = vec![1 << 62, 1 << 62], "overflows");
    broken(|d| d.tensors[0].dims = vec![1 << 62, 2], "overflows");
    broken(|d| d.tensors[0].kind = 6, "q5_0");
    broken(|d| d.tensors[0].kind = 999, "number 999");
    broken(|d| d.tensors[0].kind = 8, "whole blocks");
    broken(|d| d.tensors[1].offset = 33, "multiple of 32");
    broken(|d| d.tensors[1].offset = 32, "overlaps");
    broken(|d| d.tensors[1].offset = 0, "overlaps");
    broken(|d| d.tensors[1].offset = 96, "hole");
    broken(|d| d.tensors[1].offset = !31, "hole");
    broken(|d| d.data.truncate(64), "truncated");
    broken(|d| d.data.clear(), "truncated");
    broken(|d| d.data.extend([0; 64]), "after the last");
    broken(|d| d.tensors.push(Row { ..d.tensors[0].clone() }), "twice");
    broken(|d| d.tensors[0].name = b"\xff.lora_a".to_vec(), "UTF-8");
}

#[test]
fn what_is_no_adapter_is_refused() {
    broken(|d| d.set("general.type", text("model")), "whole model");
    broken(|d| d.unset("general.type"), "whole model");
    broken(|d| d.set("general.type", u32(1)), "expected string");
    broken(|d| d.set("adapter.type", text("control")), "adapter.type");
    broken(|d| d.unset("adapter.type"), "adapter.type");
    broken(|d| d.unset("general.architecture"), "general.architecture");
    for alpha in [u32(4), Value(12, 4f64.to_le_bytes().to_vec()), text("4")] {
        broken(|d| d.set("adapter.lora.alpha", alpha), "expected f32 exactly");
    }
    broken(|d| d.set("adapter.lora.alpha", f32(f32::NAN)), "finite");
    broken(|d| d.set("adapter.alora.invocation_tokens", array(5, 1, &[0; 4])), "array of u32");
    broken(|d| d.tensors[0].name = b"blk.0.ffn_up.weight.lora_c".to_vec(), "ends in");
    broken(|d| d.tensors[0].name = b"blk.0.ffn_up.lora_a".to_vec(), "<base tensor>.weight");
    broken(|d| d.tensors[0].name = b"blk.1.ffn_up.weight.lora_a".to_vec(), "without its");
    broken(|d| d.tensors[0].dims = vec![2, 6], "the first is transposed");
    broken(|d| d.tensors[1].dims = vec![4, 2], "the second is transposed");
    broken(|d| d.tensors[0].dims = vec![4, 3], "one rank");
    broken(|d| d.data[3] = 0x7f, "");
    broken(|d| d.data[..4].copy_from_slice(&f32::NAN.to_le_bytes()), "NaN");
    broken(|d| (d.tensors.clear(), d.data.clear()).1, "without a pair");
    broken(|d| d.set("microlora.config", text("[]")), "config");
}

#[test]
fn an_alpha_that_is_missing_scales_by_one() {
    for absent in [true, false] {
        let mut draft = Draft::good();
        if absent {
            draft.unset("adapter.lora.alpha")
        } else {
            draft.set("adapter.lora.alpha", f32(0.0))
        }
        let loaded = draft.load().unwrap();
        assert_eq!(loaded.parts.modules[0].alpha, 2.0);
        assert!(loaded.notes[0].contains("scaling is 1"));
    }
}

#[test]
fn norms_tokens_and_outer_ones_as_llama_takes_them() {
    let mut draft = Draft::good();
    draft.set("adapter.alora.invocation_tokens", array(4, 2, &[7, 0, 0, 0, 9, 0, 0, 0]));
    draft.set("tokenizer.ggml.tokens", array(8, 2, &[bytes("a"), bytes(b"\xff")].concat()));
    draft.tensor("blk.0.attn_norm.weight", &[4], 0, &numbers(4));
    draft.tensor("blk.1.ffn_up.weight.lora_a", &[6], 0, &numbers(6)); // rank 1: ggml writes one dimension
    draft.tensor("blk.1.ffn_up.weight.lora_b", &[1, 4], 0, &numbers(4));
    let loaded = draft.load().unwrap();
    let kinds: Vec<&str> = loaded.variants.iter().map(|v| v.kind.as_str()).collect();
    assert_eq!(kinds, ["alora", "modules_to_save"]);
    assert_eq!(loaded.parts.header["adapter.alora.invocation_tokens"], "[7, 9]");
    assert_eq!(loaded.parts.extra[0].name, "blk.0.attn_norm.weight");
    assert_eq!(loaded.parts.modules[1].rank, 1);
    assert!(!kinds.contains(&ROW_ORDER));
}

#[test]
fn limits_bind() {
    let bytes = Draft::good().build();
    let with = |limits: Limits| gguf::from_memory(&bytes, &LoadOptions { limits, ..LoadOptions::default() });
    let limits = Limits::default();
    with(limits).unwrap();
    for (tight, name) in [
        (Limits { header_bytes: 100, ..limits }, "header_bytes"),
        (Limits { tensors: 1, ..limits }, "tensors"),
        (Limits { rank: 1, ..limits }, "rank"),
    ] {
        assert!(with(tight).unwrap_err().to_string().contains(name));
    }
}

#[test]
fn version_2_and_other_alignments_are_read() {
    let mut draft = Draft::good();
    draft.version = 2;
    draft.load().unwrap();
    for alignment in [8, 64, 256] {
        let mut draft = Draft::good();
        draft.set("general.alignment", u32(alignment as u32));
        draft.alignment = alignment;
        draft.tensors.clear();
        draft.data.clear();
        draft.pair("blk.0.ffn_up.weight", 6, 4, 2);
        assert_eq!(draft.load().unwrap().parts.modules, Draft::good().load().unwrap().parts.modules);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_change_of_bytes_panics(at in 0usize..700, byte: u8, cut in 0usize..700, more in 0usize..40) {
        let mut data = Draft::good().build();
        let n = data.len();
        data[at % n] = byte;
        data.truncate(n - cut % n * usize::from(cut % 3 == 0));
        data.extend(std::iter::repeat_n(byte, more));
        let _ = gguf::from_memory(&data, &LoadOptions::default());
    }

    #[test]
    fn what_is_written_is_read(rank in 1usize..6, inputs in 1usize..40, outputs in 1usize..40, alpha in -9f32..9.0) {
        let mut m = module("blk.0.ffn_up", rank, f64::from(alpha));
        m.a = tensor("blk.0.ffn_up.lora_a", F32, &[rank, inputs], 3);
        m.b = tensor("blk.0.ffn_up.lora_b", F32, &[outputs, rank], 5);
        prop_assume!(alpha.is_normal());
        let (loaded, _) = written(vec![m.clone()], "auto").unwrap();
        prop_assert_eq!(&loaded.parts.modules[0], &m);
    }
}
