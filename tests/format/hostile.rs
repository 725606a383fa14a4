//! Bytes that somebody made: no panic, no abort, no memory beyond the file's, a typed error.

use microlora::format::{MAX_DIMS, MAX_HEADER, from_bytes, peft, to_bytes};
use microlora::{Error, format};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::entry;
use super::samples::*;

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn reason(bytes: &[u8]) -> String {
    match peft::from_memory(r#"{"peft_type": "LORA"}"#, bytes, true) {
        Err(Error::Format { file, reason }) => {
            assert_eq!(file, "adapter_model.safetensors");
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn each_broken_header_says_what_is_wrong() {
    let t = r#""t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    let deep = format!("{{\"t\":{}", "[".repeat(200_000));
    let dims =
        format!(r#"{{"t":{{"dtype":"F32","shape":[{}1],"data_offsets":[0,4]}}}}"#, "1,".repeat(MAX_DIMS));
    for (bytes, word) in [
        (vec![1, 2, 3], "3 bytes"),
        (u64::MAX.to_le_bytes().to_vec(), "limit"),
        ((MAX_HEADER as u64 + 1).to_le_bytes().to_vec(), "limit"),
        ((MAX_HEADER as u64).to_le_bytes().to_vec(), "truncated"),
        (file_of("{}", b""), "no lora_A"),
        (file_of("", b""), "'{'"),
        (file_of("[]", b""), "'{'"),
        (file_of(" {}", b""), "'{'"),
        (file_of("{} x", b""), "header"),
        (file_of("{\"t\":1}", b""), "\"t\""),
        (file_of(&deep, b""), "header"),
        (file_of(&dims, &[0; 4]), "16 dimensions"),
        (file_of(&format!("{{{t},{t}}}"), &[0; 4]), "\"t\" appears twice"),
        (file_of(&format!("{{{t}}}"), &[0; 3]), "truncated"),
        (file_of(&format!("{{{t}}}"), &[0; 5]), "5 bytes of data"),
        (file_of(r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#, &[0; 5]), "hole"),
        (
            file_of(&format!(r#"{{{t},"u":{{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}}}"#), &[0; 6]),
            "overlaps",
        ),
        (file_of(r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, &[0; 4]), "takes 8 bytes"),
        (file_of(r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, &[0; 4]), "\"t\""),
        (file_of(r#"{"t":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}"#, &[0; 1]), "overflows"),
        (file_of(r#"{"t":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]), "F99"),
        (file_of(r#"{"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, &[0; 4]), "-1"),
        (file_of(r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"scale":2}}"#, &[0; 4]), "scale"),
        (
            file_of(r#"{"t":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]),
            "dtype",
        ),
        (
            file_of(r#"{"t":{"dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,4]}}"#, &[0; 4]),
            "overflow",
        ),
        (file_of(r#"{"t":{"dtype":"F32","shape":[1e30],"data_offsets":[0,4]}}"#, &[0; 4]), "\"t\""),
        (
            file_of(
                r#"{"t":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}"#,
                &[0; 4],
            ),
            "overflows",
        ),
        (
            file_of(
                r#"{"t":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}"#,
                &[0; 4],
            ),
            "truncated",
        ),
        (file_of(r#"{"__metadata__":{"a":1}}"#, b""), "__metadata__"),
        (file_of(r#"{"__metadata__":{"a":"1","a":"2"}}"#, b""), "\"a\" appears twice"),
        (file_of(r#"{"__metadata__":{},"__metadata__":{}}"#, b""), "appears twice"),
        (file_of("{\"\u{fffd}", b""), "header"),
    ] {
        let got = reason(&bytes);
        assert!(got.contains(word), "{got:?} does not say {word:?}");
    }
    let mut not_utf8 = file_of("{\"abc\":1}", b"");
    not_utf8[11] = 0xff;
    assert!(reason(&not_utf8).contains("UTF-8"));
    let long = file_of(&format!("{{\"{}\":1}}", "x".repeat(100_000)), b"");
    assert!(reason(&long).len() < 1000);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = to_bytes(&parts()).unwrap();
    for n in 0..bytes.len() {
        assert!(matches!(from_bytes(&bytes[..n], false), Err(Error::Format { .. })), "{n} bytes");
    }
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(from_bytes(&longer, false), Err(Error::Format { .. })));
}

/// One to four random edits: a bit, a byte, a cut, a copy, an absurd number in place of a digit.
fn mutate(seed: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut out = seed.to_vec();
    for _ in 0..rng.next_u32() % 4 + 1 {
        if out.is_empty() {
            break;
        }
        // Most edits go to the header, where the meaning is.
        let reach = if rng.next_u32().is_multiple_of(4) { out.len() } else { out.len().min(600) };
        let at = rng.next_u32() as usize % reach;
        match rng.next_u32() % 7 {
            0 => out[at] ^= 1 << (rng.next_u32() % 8),
            1 => out[at] = rng.next_u32() as u8,
            2 => out.truncate(at),
            3 => drop(out.drain(at..(at + rng.next_u32() as usize % 16).min(out.len()))),
            4 => {
                let piece = out[at..(at + rng.next_u32() as usize % 64).min(out.len())].to_vec();
                out.splice(at..at, piece);
            }
            5 => {
                let tokens: [&[u8]; 8] =
                    [b"18446744073709551615", b"-1", b"1e999", b"null", b"\"\"", b"[[", b"{}", b"\\u0000"];
                out.splice(at..=at, tokens[rng.next_u32() as usize % 8].iter().copied());
            }
            _ => {
                if let Some(d) = out[at..].iter().position(u8::is_ascii_digit) {
                    out[at + d] = b'0' + (rng.next_u32() % 10) as u8;
                }
            }
        }
    }
    // A header of the right length lets the edit reach the JSON parser.
    if rng.next_u32().is_multiple_of(2) && out.len() > 8 && seed.len() > 8 && seed[8] == b'{' {
        let delta = out.len() as i64 - seed.len() as i64;
        let len = u64::from_le_bytes(seed[..8].try_into().unwrap()) as i64 + delta;
        out[..8].copy_from_slice(&len.to_le_bytes());
    }
    out
}

#[test]
fn ten_thousand_mutations_of_a_single_file() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut seed = parts();
    seed.config_json = Some("{\"rank\": 8}".into());
    seed.extra.push(tensor("head", format::TensorDtype::BF16, &[3], 1));
    let seed = to_bytes(&seed).unwrap();
    entry::single(&seed);
    for _ in 0..10_000 {
        entry::single(&mutate(&seed, &mut rng));
    }
}

#[test]
fn ten_thousand_mutations_of_a_configuration() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let seed = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4.5, "bias": "none", "use_rslora": true,
        "rank_pattern": {"q_(proj|x)": 3, "^a\\.b": 2, "layers\\.[0-9]+.q": 9}, "alpha_pattern": {"a.b{1,3}": 7}}"#;
    entry::config(seed);
    for _ in 0..10_000 {
        entry::config(&mutate(seed, &mut rng));
    }
}

#[test]
fn ten_thousand_mutations_of_a_peft_directory() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let text = r#"{"peft_type":"LORA","r":2,"lora_alpha":4,"rank_pattern":{"v":3}}"#;
    let weights = safetensors(&[pair("m.q", 2), pair("m.v", 3)].concat(), Some(&[("format", "pt")]));
    let join = |text: &[u8], weights: &[u8]| [&(text.len() as u16).to_le_bytes()[..], text, weights].concat();
    entry::peft_dir(&join(text.as_bytes(), &weights));
    for i in 0..10_000 {
        let text = if i % 4 == 0 { mutate(text.as_bytes(), &mut rng) } else { text.into() };
        entry::peft_dir(&join(&text, &mutate(&weights, &mut rng)));
    }
}

proptest! {
    #[test]
    fn any_bytes_at_all(data in proptest::collection::vec(any::<u8>(), 0..200), header in "[{\\[\"a-z0-9:,.\\]}]{0,80}") {
        entry::single(&data);
        entry::config(&data);
        entry::peft_dir(&data);
        entry::config(header.as_bytes());
        entry::single(&file_of(&header, &data));
    }

    #[test]
    fn what_we_accept_the_reference_accepts(seed in any::<u64>()) {
        let good = safetensors(&[pair("m.q", 8), pair("m.v", 8)].concat(), None);
        let bytes = mutate(&good, &mut ChaCha8Rng::seed_from_u64(seed));
        if let Ok(loaded) = peft::from_memory(r#"{"peft_type": "LORA"}"#, &bytes, false) {
            let theirs = safetensors::SafeTensors::deserialize(&bytes).expect("the reference reads it");
            prop_assert_eq!(theirs.len(), 2 * loaded.parts.modules.len() + loaded.parts.extra.len());
            for t in &loaded.parts.extra {
                prop_assert_eq!(theirs.tensor(&t.name).unwrap().data(), &t.data[..]);
            }
        }
    }
}
