//! Key styles of other programs: known by content, written and read again, and mutated without harm.

use std::path::Path;

use microlora::Error;
use microlora::format::{
    FORMATS, LoadOptions, Loaded, ModuleKind, Orientation, STYLES, Tensor, TensorDtype, losses, read,
    resolve_names, save_style,
};

use super::samples::{STRICT, module_of, parts, safetensors, tensor};

const F32: TensorDtype = TensorDtype::F32;

fn place(dir: &Path, style: &str) -> std::path::PathBuf {
    dir.join(style)
}

/// An adapter of uniform rank under names that every style has room for.
fn sample(dtype: TensorDtype, use_rslora: bool) -> Loaded {
    let paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"];
    let modules = paths.iter().map(|p| module_of(p, 2, 0.3, [dtype; 2], use_rslora)).collect();
    let mut loaded = Loaded::default();
    loaded.parts.modules = modules;
    loaded
}

fn written(style: &str, loaded: &Loaded) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = place(dir.path(), style);
    save_style(&path, loaded, style, &[]).unwrap();
    std::fs::read(if style == "mlx" { path.join("adapters.safetensors") } else { path }).unwrap()
}

#[test]
fn every_style_has_a_reader() {
    for style in &STYLES {
        assert!(FORMATS.iter().any(|row| row.name == style.name), "{}", style.name);
    }
}

#[test]
fn modules_come_back_bit_for_bit() {
    for style in &STYLES {
        for (dtype, use_rslora) in
            [(F32, false), (F32, true), (TensorDtype::F16, true), (TensorDtype::BF16, false)]
        {
            let loaded = sample(dtype, use_rslora);
            let dir = tempfile::tempdir().unwrap();
            let path = place(dir.path(), style.name);
            save_style(&path, &loaded, style.name, &[]).unwrap();
            for mmap in [false, true] {
                let again = read(&path, &LoadOptions { mmap, ..STRICT }).unwrap();
                assert_eq!(again.format, style.name);
                assert!(again.variants.is_empty() && again.unused.is_empty());
                if style.name == "npz" && dtype == TensorDtype::BF16 {
                    assert!(again.parts.modules.iter().all(|m| m.a.dtype == F32));
                } else {
                    assert_eq!(again.parts.modules, loaded.parts.modules, "{} {dtype:?}", style.name);
                }
            }
            assert_eq!(written(style.name, &loaded), written(style.name, &loaded));
        }
    }
}

#[test]
fn a_changed_alpha_wins_over_the_header() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    save_style(&path, &sample(F32, true), "kohya", &[]).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (_, header) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let tensors: Vec<Tensor> = file
        .tensors()
        .into_iter()
        .map(|(name, v)| match name.ends_with(".alpha") {
            true => Tensor::new(name, F32, vec![], 8f32.to_le_bytes().to_vec()).unwrap(),
            false => Tensor::new(name, v.dtype(), v.shape().to_vec(), v.data().to_vec()).unwrap(),
        })
        .collect();
    let metadata = header.metadata().clone().unwrap();
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    std::fs::write(&path, safetensors(&tensors, Some(&metadata))).unwrap();
    let again = read(&path, &STRICT).unwrap();
    assert!(again.parts.modules.iter().all(|m| m.alpha == 8.0 && !m.use_rslora));
}

#[test]
fn mixed_ranks_are_an_error_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mlx");
    let loaded = Loaded { parts: parts(), ..Loaded::default() };
    let err = save_style(&path, &loaded, "mlx", &[]).unwrap_err();
    assert!(matches!(&err, Error::Config { arg, .. } if arg == "rank"), "{err}");
    assert!(!path.exists());
    let notes = save_style(&path, &loaded, "mlx", &["pad:rank".into(), "round:scale".into()]).unwrap();
    assert_eq!(notes.len(), 2, "{notes:?}");
    assert!(read(&path, &STRICT).unwrap().parts.modules.iter().all(|m| m.rank == 9));
}

#[test]
fn what_a_style_cannot_hold_is_named() {
    let mut loaded = sample(F32, false);
    let mut conv = module_of("unet.conv", 2, 2.0, [F32; 2], false);
    (conv.kind, conv.a) = (ModuleKind::Conv, tensor("a", F32, &[2, 6, 3, 3], 1));
    conv.b = tensor("b", F32, &[5, 2, 1, 1], 1);
    loaded.parts.modules.push(conv);
    loaded.variants.push(microlora::format::Variant {
        kind: "conv".into(),
        at: "unet.conv".into(),
        why: "a convolution".into(),
    });
    let dir = tempfile::tempdir().unwrap();
    for (style, held) in
        [("kohya", true), ("diffusers", true), ("flat", false), ("npz", false), ("mlx", false)]
    {
        assert_eq!(losses(&loaded, style, &[]).unwrap().is_empty(), held, "{style}");
        let saved = save_style(&place(dir.path(), style), &loaded, style, &[]);
        match saved {
            Ok(_) => assert!(held, "{style}"),
            Err(e) => assert!(!held && e.to_string().contains("drop:conv"), "{style}: {e}"),
        }
        save_style(&place(dir.path(), style), &loaded, style, &["drop:conv".into()]).unwrap();
        assert_eq!(read(&place(dir.path(), style), &STRICT).unwrap().parts.modules.len(), 2);
    }
    assert!(matches!(losses(&loaded, "lycoris", &[]), Err(Error::Config { .. })));
}

#[test]
fn orientation_that_is_told_must_fit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let pair = [tensor("lora_a", F32, &[6, 2], 1), tensor("lora_b", F32, &[2, 5], 1)];
    std::fs::write(&path, safetensors(&pair, None)).unwrap();
    let opts = LoadOptions { alpha: Some(2.0), ..STRICT };
    let loaded = read(&path, &opts).unwrap();
    assert_eq!((loaded.parts.modules[0].rank, loaded.parts.modules[0].path.as_str()), (2, "lora"));
    let wrong = LoadOptions { orientation: Some(Orientation::RankFirst), ..opts };
    assert!(read(&path, &wrong).unwrap_err().to_string().contains("rank_first"));
}

#[test]
fn names_are_resolved_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let file = [
        tensor("lora_unet_a_b.lora_down.weight", F32, &[2, 6], 1),
        tensor("lora_unet_a_b.lora_up.weight", F32, &[5, 2], 1),
    ];
    std::fs::write(&path, safetensors(&file, None)).unwrap();
    let cases: [(&[&str], Result<&str, &str>); 4] = [
        (&["a.b"], Ok("a.b")),
        (&["unet.a_b"], Ok("unet.a_b")),
        (&["a.b", "a_b"], Err("may be")),
        (&["a.c"], Err("no module")),
    ];
    for (names, want) in cases {
        let mut loaded = read(&path, &STRICT).unwrap();
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        match (resolve_names(&mut loaded, &names, "a"), want) {
            (Ok(()), Ok(want)) => assert_eq!(loaded.parts.modules[0].path, want),
            (Err(e), Err(want)) => assert!(e.to_string().contains(want), "{e}"),
            (got, _) => panic!("{names:?}: {got:?}"),
        }
    }
}

/// Any bytes give a value or an error of a file; a value can be written and read again.
#[test]
fn mutated_files_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    for style in &STYLES {
        let good = written(style.name, &sample(F32, false));
        let mut state = 1u64;
        let mut next = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        for round in 0..400 {
            let mut bad = good.clone();
            for _ in 0..=next(3) {
                let at = next(bad.len());
                bad[at] = next(256) as u8;
            }
            if round % 8 == 0 {
                bad.truncate(next(bad.len()));
            }
            std::fs::write(&path, &bad).unwrap();
            let opts =
                LoadOptions { alpha: Some(1.0), strict: round % 2 == 0, mmap: round % 3 == 0, ..STRICT };
            match read(&path, &opts) {
                Ok(loaded) => {
                    let lost: Vec<String> = losses(&loaded, "kohya", &[])
                        .unwrap()
                        .into_iter()
                        .map(|(kind, _)| format!("drop:{kind}"))
                        .collect();
                    let again = dir.path().join("again");
                    match save_style(&again, &loaded, "kohya", &lost) {
                        Ok(_) => drop(read(&again, &opts).unwrap()),
                        Err(Error::Config { .. }) => {}
                        Err(e) => panic!("{}: {e:?}", style.name),
                    }
                }
                Err(Error::Format { file, reason } | Error::Unsupported { file, reason }) => {
                    assert!(!file.is_empty() && reason.len() < 20_000);
                }
                Err(e) => panic!("{}: not an error of a file: {e:?}", style.name),
            }
        }
    }
}

#[test]
fn ranks_of_diffusers_settings_must_be_those_of_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let tensors = [
        tensor("unet.q.lora_A.weight", TensorDtype::F32, &[2, 6], 1),
        tensor("unet.q.lora_B.weight", TensorDtype::F32, &[5, 2], 2),
    ];
    for (settings, sound) in [
        (r#"{"unet.r":2,"unet.lora_alpha":4}"#, true),
        (r#"{"unet.r":3,"unet.lora_alpha":4}"#, false),
        (r#"{"unet.r":2,"unet.lora_alpha":4,"unet.rank_pattern":{"q":1}}"#, false),
    ] {
        let file = safetensors(&tensors, Some(&[("lora_adapter_metadata", settings)]));
        std::fs::write(&path, file).unwrap();
        match read(&path, &STRICT) {
            Ok(loaded) => assert!(sound && loaded.parts.modules[0].alpha == 4.0, "{settings}"),
            Err(e) => assert!(!sound && e.to_string().contains("unet.q.lora_A.weight"), "{settings}: {e}"),
        }
    }
}
