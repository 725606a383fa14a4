//! Version 2 of the single file: quantised adapters, whole and damaged.

use microlora::format::{
    AdapterParts, Along, FactorParts, LoadOptions, ModuleKind, QuantModuleParts, from_bytes, load,
    quantized_from_bytes, quantized_to_bytes, read, save_quantized,
};
use microlora::quant::{BlockType, QuantAdapter, quantize_rows};
use microlora::{Adapter, Error};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::samples::*;

fn blocks(kind: BlockType, along: Along, rows: usize, cols: usize) -> FactorParts {
    let numbers: Vec<f32> = (0..rows * cols).map(|i| (i % 89) as f32 / 89.0 - 0.4).collect();
    let data = quantize_rows(kind, "x", &numbers, rows, cols).unwrap().into();
    FactorParts::Blocks { kind, along, rows, cols, data }
}

fn module_with(path: &str, rank: usize, a: FactorParts, b: FactorParts) -> QuantModuleParts {
    QuantModuleParts {
        path: path.into(),
        kind: ModuleKind::Linear,
        alpha: 4.0,
        rank,
        use_rslora: rank == 3,
        a,
        b,
    }
}

/// Every type, both directions, and plain sides.
fn modules() -> Vec<QuantModuleParts> {
    let plain = module("p", 3, 4.0);
    let mut out = vec![
        module_with("p", 3, FactorParts::Plain(plain.a), FactorParts::Plain(plain.b)),
        module_with(
            "r",
            32,
            blocks(BlockType::Q8_0, Along::Features, 32, 64),
            blocks(BlockType::Q4_0, Along::Rank, 7, 32),
        ),
    ];
    for kind in BlockType::ALL {
        let n = 2 * kind.elements();
        let (a, b) = (blocks(kind, Along::Features, 3, n), blocks(kind, Along::Features, 3, kind.elements()));
        out.push(module_with(kind.as_str(), 3, a, b));
    }
    out
}

fn rest() -> AdapterParts {
    let extra = vec![tensor("head", microlora::format::TensorDtype::BF16, &[3], 1)];
    AdapterParts { config_json: Some("{\"a\": 1}".into()), extra, ..AdapterParts::default() }
}

#[test]
fn what_is_written_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("any name");
    save_quantized(&path, &rest(), &modules()).unwrap();
    let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
    let bytes = quantized_to_bytes(&rest(), &modules()).unwrap();
    let twin = quantized_from_bytes(&bytes).unwrap();
    assert_eq!(twin.weights_sha256, None);
    assert!(text.contains(&format!("\"weights_sha256\":\"{}\"", twin.fingerprint().unwrap())));
    for mmap in [false, true] {
        let loaded = read(&path, &LoadOptions { mmap, ..STRICT }).unwrap();
        assert_eq!(loaded.quantized.as_deref().unwrap(), modules());
        assert_eq!(loaded.parts, rest());
        assert_eq!(loaded.weights_sha256, Some(loaded.fingerprint().unwrap()));
        let expanded = loaded.clone().expanded().unwrap();
        for (m, plain) in modules().iter().zip(&expanded.parts.modules) {
            assert_eq!((&m.path, m.rank, m.alpha), (&plain.path, plain.rank, plain.alpha));
            assert_eq!((plain.a.shape[0], plain.b.shape[1]), (m.rank, m.rank));
        }
        let adapter = QuantAdapter::from_parts(&loaded.parts, &loaded.quantized.unwrap()).unwrap();
        assert_eq!(Adapter::from_parts(&expanded.parts).unwrap(), adapter.dequantize().unwrap());
        assert_eq!(adapter.to_parts(), modules());
        assert_eq!(quantized_to_bytes(&adapter.rest, &adapter.to_parts()).unwrap(), bytes);
        let plain = adapter.dequantize().unwrap();
        assert_eq!((plain.modules.len(), plain.extra.len()), (modules().len(), 1));
    }
    for e in [load(&path, &STRICT).unwrap_err(), from_bytes(&bytes, true).unwrap_err()] {
        assert!(matches!(&e, Error::Unsupported { reason, .. } if reason.contains("dequantize")), "{e}");
    }
    let plain = microlora::format::to_bytes(&parts()).unwrap();
    assert!(matches!(quantized_from_bytes(&plain), Err(Error::Format { .. })));
}

#[test]
fn parts_that_do_not_fit_are_not_written() {
    let wrong = |a, b, rank| quantized_to_bytes(&rest(), &[module_with("m", rank, a, b)]).unwrap_err();
    let a = || blocks(BlockType::Q8_0, Along::Features, 3, 64);
    let good = || blocks(BlockType::Q8_0, Along::Features, 3, 32);
    for e in [
        wrong(a(), good(), 4),
        wrong(a(), blocks(BlockType::Q8_0, Along::Rank, 3, 32), 3),
        wrong(a(), FactorParts::Plain(module("m", 2, 1.0).b), 3),
        wrong(FactorParts::Plain(module("m", 3, 1.0).b), good(), 3),
    ] {
        assert!(matches!(&e, Error::Shape { arg, .. } if arg.starts_with("m.lora_")), "{e}");
    }
    let FactorParts::Blocks { kind, along, rows, cols, data } = a() else { panic!() };
    let cut = data.slice(1..data.len()).unwrap();
    wrong(FactorParts::Blocks { kind, along, rows, cols, data: cut }, good(), 3);
    let mut twice = modules();
    twice[1].path = "p".into();
    assert!(quantized_to_bytes(&rest(), &twice).is_err());
    twice[1].path = "\n".into();
    assert!(quantized_to_bytes(&rest(), &twice).is_err());
}

#[test]
fn ten_thousand_mutations_of_a_quantised_file() {
    let seed = quantized_to_bytes(&rest(), &modules()[..3]).unwrap();
    let header = 8 + u64::from_le_bytes(seed[..8].try_into().unwrap()) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut whole = 0;
    for _ in 0..10_000 {
        let mut data = seed.clone();
        for _ in 0..rng.next_u32() % 3 + 1 {
            let reach = if rng.next_u32().is_multiple_of(2) { data.len() } else { header };
            let at = rng.next_u32() as usize % reach;
            match rng.next_u32() % 4 {
                0 => data[at] ^= 1 << (rng.next_u32() % 8),
                1 => data[at] = rng.next_u32() as u8,
                2 if at > 8 => data.truncate(at.max(9)),
                _ => {
                    let digit = data[at..header.max(at)].iter().position(u8::is_ascii_digit);
                    if let Some(d) = digit.filter(|d| at + d >= 8) {
                        data[at + d] = b'0' + (rng.next_u32() % 10) as u8;
                    }
                }
            }
            if data.len() < header {
                break;
            }
        }
        match quantized_from_bytes(&data) {
            Err(Error::Format { reason, .. } | Error::Unsupported { reason, .. }) => {
                assert!(!reason.is_empty())
            }
            Err(other) => panic!("not an error of a file: {other:?}"),
            Ok(loaded) => {
                whole += 1;
                let adapter = QuantAdapter::from_parts(&loaded.parts, &loaded.quantized.unwrap()).unwrap();
                let plain: Adapter = adapter.dequantize().unwrap();
                assert!(plain.modules.iter().all(|(_, l)| l.a.is_finite() && l.b.is_finite()));
                let again = quantized_to_bytes(&adapter.rest, &adapter.to_parts()).unwrap();
                let twice = quantized_from_bytes(&again).unwrap();
                assert_eq!(quantized_to_bytes(&twice.parts, &twice.quantized.unwrap()).unwrap(), again);
            }
        }
    }
    assert!(whole > 100, "{whole}: changed codes are still an adapter");
}

#[test]
fn plain_sides_that_are_not_finite_are_refused() {
    let plain = module("p", 3, 4.0);
    let side = |bits: u32| {
        let mut data = plain.a.data.to_vec();
        data[..4].copy_from_slice(&bits.to_le_bytes());
        FactorParts::Plain(
            microlora::format::Tensor::new("a", plain.a.dtype, plain.a.shape.clone(), data).unwrap(),
        )
    };
    for (bits, sound) in [(0x3f80_0000, true), (0x7fc0_0000, false), (0xff80_0000, false)] {
        let modules = [module_with("p", 3, side(bits), FactorParts::Plain(plain.b.clone()))];
        let bytes = quantized_to_bytes(&AdapterParts::default(), &modules).unwrap();
        match quantized_from_bytes(&bytes) {
            Ok(_) => assert!(sound, "{bits:x}"),
            Err(e) => assert!(!sound && e.to_string().contains("\"p.lora_a\": contains NaN"), "{e}"),
        }
    }
}
