//! Block codecs of the crate: packing, fixed points, rows, refusals. Bytes of llama.cpp: `test_quant.py`.

use microlora::Error;
use microlora::quant::{
    BLOCKS, BlockType, dequantize_rows, half_at, pack_scales, quantize_rows, unpack_scales,
};
use proptest::prelude::*;

#[test]
fn the_table_is_indexed_by_the_type() {
    for (i, row) in BLOCKS.iter().enumerate() {
        assert_eq!(row.kind as usize, i);
        assert_eq!(BlockType::ALL[i], row.kind);
        assert_eq!(BlockType::from_ggml(row.ggml), Some(row.kind));
        assert_eq!(row.name.parse::<BlockType>().unwrap(), row.kind);
        assert_eq!(row.kind.row_bytes(3 * row.elements), Some(3 * row.bytes));
        assert_eq!(row.kind.row_bytes(row.elements + 1), None);
        assert_eq!(row.kind.row_bytes(0), None);
        assert!(row.halves.iter().all(|&at| at + 2 <= row.bytes));
    }
    assert_eq!(BlockType::from_ggml(0), None);
}

fn block() -> impl Strategy<Value = Vec<f32>> {
    let number = prop_oneof![-1f32..1.0, -1e-6f32..1e-6, -1e4f32..1e4, Just(0.0), Just(-0.0), Just(0.5)];
    proptest::collection::vec(number, 256)
}

proptest! {
    #[test]
    fn scales_of_six_bits_pack_and_unpack(
        scales in prop::array::uniform8(0u8..64),
        mins in prop::array::uniform8(0u8..64),
    ) {
        prop_assert_eq!(unpack_scales(&pack_scales(&scales, &mins)), (scales, mins));
    }

    #[test]
    fn twelve_bytes_unpack_and_pack(bytes in prop::array::uniform12(any::<u8>())) {
        let (scales, mins) = unpack_scales(&bytes);
        prop_assert_eq!(pack_scales(&scales, &mins), bytes);
    }

    #[test]
    fn blocks_are_quantised_apart(a in block(), b in block()) {
        for row in &BLOCKS {
            let both: Vec<f32> = a.iter().chain(&b).copied().collect();
            let whole = quantize_rows(row.kind, "x", &both, 2, 256).unwrap();
            let mut parts = quantize_rows(row.kind, "x", &a, 1, 256).unwrap();
            parts.extend(quantize_rows(row.kind, "x", &b, 1, 256).unwrap());
            prop_assert_eq!(whole, parts);
        }
    }

    #[test]
    fn numbers_are_near(x in block()) {
        let top = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        for row in &BLOCKS {
            let bytes = quantize_rows(row.kind, "x", &x, 1, 256).unwrap();
            let back = dequantize_rows(row.kind, "x", &bytes, 1, 256).unwrap();
            let worst = x.iter().zip(&back).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            prop_assert!(worst <= 0.2 * top + 1e-6, "{}: {worst} of {top}", row.name);
        }
    }

    #[test]
    fn any_bytes_with_finite_scales_are_numbers(mut bytes in prop::collection::vec(any::<u8>(), 210)) {
        for row in &BLOCKS {
            for &at in row.halves {
                bytes[at + 1] &= 0x83;
            }
            let n = row.elements;
            let out = dequantize_rows(row.kind, "x", &bytes[..row.bytes], 1, n).unwrap();
            prop_assert!(out.iter().all(|v| v.is_finite()));
        }
    }

    /// What the quantiser makes of its own numbers has the same scale and the same codes, where the largest
    /// code stands for the largest number.
    #[test]
    fn a_second_pass_of_q8_0_keeps_codes(x in block()) {
        let once = quantize_rows(BlockType::Q8_0, "x", &x, 1, 256).unwrap();
        let back = dequantize_rows(BlockType::Q8_0, "x", &once, 1, 256).unwrap();
        let again = quantize_rows(BlockType::Q8_0, "x", &back, 1, 256).unwrap();
        for (a, b) in once.chunks_exact(34).zip(again.chunks_exact(34)) {
            let normal = half_at(a, 0) >= 1e-4;
            prop_assert!(!normal || a == b);
        }
    }
}

#[test]
fn refusals() {
    let q = |x: &[f32], cols| quantize_rows(BlockType::Q8_0, "x", x, 1, cols);
    assert!(matches!(q(&[1.0; 31], 31), Err(Error::Shape { .. })));
    assert!(matches!(q(&[1.0; 31], 32), Err(Error::Shape { .. })));
    assert!(matches!(q(&[f32::NAN; 32], 32), Err(Error::NonFinite { .. })));
    assert!(matches!(q(&[3e38; 32], 32), Err(Error::NonFinite { .. })));
    assert!(matches!(q(&[9e6; 32], 32), Err(Error::NonFinite { .. })));
    assert!(q(&[8e6; 32], 32).is_ok());
    let d = |bytes: &[u8], rows, cols| dequantize_rows(BlockType::Q8_0, "x", bytes, rows, cols);
    assert!(matches!(d(&[0; 33], 1, 32), Err(Error::Shape { .. })));
    assert!(matches!(d(&[0; 34], usize::MAX, 32), Err(Error::Shape { .. })));
    assert!(matches!(d(&[0xff; 34], 1, 32), Err(Error::NonFinite { .. })));
    assert!("q3_k".parse::<BlockType>().is_err());
}
