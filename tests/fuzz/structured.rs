//! Sound files with a field changed here and there: a length, an offset, a dimension, a type, a name, a setting,
//! also inside of the JSON texts that headers carry. Every row of the formats, under the same watch as the
//! mutations of bytes: what is read consists of bytes of the file (`inside`), or the error is one of a file.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::mutate::{archive, members};
use super::{TARGETS, run, watch};

/// One change: where, what, and a number for it.
#[derive(Clone, Debug)]
struct Edit {
    at: usize,
    from: usize,
    op: u8,
    number: u64,
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let number = prop_oneof![
        0u64..70,
        prop::sample::select(vec![
            255,
            256,
            0xffff,
            1 << 20,
            (1 << 31) - 1,
            1 << 31,
            u64::from(u32::MAX),
            1 << 32,
            1 << 62,
            i64::MAX as u64,
            1 << 63,
            u64::MAX - 3,
            u64::MAX,
        ]),
    ];
    let one = (any::<u16>(), any::<u16>(), any::<u8>(), number);
    prop::collection::vec(one, 1..4).prop_map(|all| {
        let edit = |(at, from, op, number)| Edit { at: at as usize, from: from as usize, op, number };
        all.into_iter().map(edit).collect()
    })
}

const WORDS: [&str; 28] = [
    "F32",
    "F16",
    "BF16",
    "F64",
    "I64",
    "U8",
    "I8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "F6_E2M3",
    "C64",
    "",
    "..",
    "a\0b",
    "__metadata__",
    "microlora",
    "mlx",
    "pt",
    "1",
    "2",
    "3",
    "lora_a",
    "base_model.model.m.q.lora_A.weight",
    "m.q.lora_b",
    "q4_k",
    "rank",
    "é",
];

/// Calls `f` at the k-th node, those of JSON texts in strings included; counts down otherwise.
fn visit(v: &mut Value, k: &mut usize, f: &mut dyn FnMut(&mut Value)) {
    let here = *k == 0;
    *k = k.wrapping_sub(1);
    if here {
        return f(v);
    }
    match v {
        Value::Array(list) => list.iter_mut().for_each(|v| visit(v, k, f)),
        Value::Object(map) => map.values_mut().for_each(|v| visit(v, k, f)),
        Value::String(text) if text.starts_with(['{', '[']) => {
            if let Ok(mut inner) = serde_json::from_str(text) {
                visit(&mut inner, k, f);
                *text = Value::to_string(&inner);
            }
        }
        _ => {}
    }
}

fn nodes(v: &mut Value) -> usize {
    let mut k = usize::MAX;
    visit(v, &mut k, &mut |_| {});
    usize::MAX - k
}

fn edit_json(root: &mut Value, e: &Edit) {
    let count = nodes(root);
    let mut other = Value::Null;
    visit(root, &mut (e.from % count), &mut |v| other = v.clone());
    visit(root, &mut (e.at % count), &mut |v| {
        let n = v.as_u64();
        match (e.op % 12, &mut *v) {
            (0, _) => *v = json!(e.number),
            (1, Value::Number(_)) => *v = json!(n.unwrap_or(0).wrapping_add(1)),
            (2, Value::Number(_)) => *v = json!(n.unwrap_or(0).wrapping_sub(1)),
            (3, Value::Number(_)) => *v = json!(n.unwrap_or(0).wrapping_mul(2)),
            (4, _) => {
                *v = [json!(null), json!(true), json!(-1), json!(1e300), json!([]), json!({})]
                    [e.number as usize % 6]
                    .clone();
            }
            (5, Value::Array(list)) => list.push(other.clone()),
            (5, Value::Object(map)) => drop(map.insert(WORDS[e.from % WORDS.len()].into(), other.clone())),
            (6, Value::Array(list)) => drop(list.pop()),
            (6, Value::Object(map)) => {
                if let Some(key) = map.keys().nth(e.from % map.len().max(1)).cloned() {
                    map.shift_remove(&key);
                }
            }
            (7, Value::Object(map)) => {
                let Some(key) = map.keys().nth(e.from % map.len().max(1)).cloned() else { return };
                let value = map.shift_remove(&key).unwrap_or_default();
                let new = match e.number % 4 {
                    0 => WORDS[e.at % WORDS.len()].into(),
                    1 => format!("{key}.default"),
                    2 => key.replace("lora_", "lora_magnitude_"),
                    _ => key.replace(['a', 'A'], "b"),
                };
                map.insert(new, value);
            }
            (8, Value::Array(list)) => list.reverse(),
            (9, _) => *v = json!(WORDS[e.from % WORDS.len()]),
            _ => *v = other.clone(),
        }
    });
}

/// Bits of a number of that dtype.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "C64" => 64,
        "F32" | "I32" => 32,
        "F16" | "BF16" | "I16" => 16,
        "U8" | "I8" | "BOOL" | "F8_E4M3" => 8,
        _ => return None,
    })
}

/// Gives every tensor the offsets that its dtype and shape ask for, so that a change reaches what lies behind.
fn fit(header: &mut Value, data: &mut Vec<u8>) {
    let mut end = 0u64;
    let Some(map) = header.as_object_mut() else { return };
    for (_, info) in map.iter_mut().filter(|(name, _)| *name != "__metadata__") {
        let count = info["shape"]
            .as_array()
            .and_then(|shape| shape.iter().try_fold(1u64, |n, d| d.as_u64().and_then(|d| n.checked_mul(d))));
        let size = info["dtype"].as_str().and_then(bits);
        let Some(len) = count.zip(size).and_then(|(n, b)| n.checked_mul(b / 8)).filter(|n| *n < 1 << 16)
        else {
            continue;
        };
        if let Some(info) = info.as_object_mut() {
            info.insert("data_offsets".into(), json!([end, end + len]));
            end += len;
        }
    }
    data.resize(end as usize, 0x3c);
}

fn safetensors(file: &[u8], edits: &[Edit], fitted: bool) -> Vec<u8> {
    let len = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    let mut data = file[8 + len..].to_vec();
    let mut said = 0i64;
    for e in edits {
        match e.op {
            0..200 => edit_json(&mut header, e),
            200..215 => said += e.number as i64 % 9 - 4,
            215..230 => data.truncate(e.at % (data.len() + 1)),
            230..240 => data.extend_from_within(..e.at % (data.len() + 1)),
            _ => {
                let from = e.at % (data.len() + 1);
                let to = (from + 8).min(data.len());
                data[from..to].fill([0xff, 0, 0x7f][e.from % 3]);
            }
        }
    }
    if fitted {
        fit(&mut header, &mut data);
    }
    let text = header.to_string();
    let len = (text.len() as i64 + said).max(0) as u64;
    [&len.to_le_bytes(), text.as_bytes(), &data].concat()
}

/// Two bytes of length, JSON, safetensors.
fn pair(file: &[u8], edits: &[Edit], fitted: bool) -> Vec<u8> {
    let len = usize::from(u16::from_le_bytes(*file.first_chunk().unwrap()));
    let (text, weights) = file[2..].split_at(len);
    let mut config: Value = serde_json::from_slice(text).unwrap();
    let (of_config, of_weights): (Vec<Edit>, Vec<Edit>) =
        edits.iter().cloned().partition(|e| e.from % 2 == 0);
    of_config.iter().for_each(|e| edit_json(&mut config, e));
    let text = config.to_string();
    let weights = safetensors(weights, &of_weights, fitted);
    [&(text.len() as u16).to_le_bytes(), text.as_bytes(), &weights].concat()
}

/// Place and width of a field.
type Field = (usize, usize);

fn number(bytes: &[u8], (at, width): Field) -> u64 {
    bytes.iter().skip(at).take(width).rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn edit_fields(bytes: &mut Vec<u8>, fields: &[Field], edits: &[Edit]) {
    for e in edits {
        let field = fields[e.at % fields.len()];
        let (old, other) = (number(bytes, field), number(bytes, fields[e.from % fields.len()]));
        let new = match e.op {
            0..60 => e.number,
            60..100 => old.wrapping_add(1),
            100..140 => old.wrapping_sub(1),
            140..170 => old.wrapping_add(32),
            170..190 => old.wrapping_mul(2),
            190..230 => other,
            230..243 => {
                bytes.truncate(e.from % (bytes.len() + 1));
                continue;
            }
            _ => {
                bytes.extend(vec![e.op; e.number as usize % 70]);
                continue;
            }
        };
        for (i, byte) in new.to_le_bytes().iter().enumerate().take(field.1) {
            if let Some(slot) = bytes.get_mut(field.0 + i) {
                *slot = *byte;
            }
        }
    }
}

/// Counts, lengths, types, dimensions and offsets of a GGUF file.
fn gguf_fields(bytes: &[u8]) -> Vec<Field> {
    let mut out = vec![(4, 4), (8, 8), (16, 8)];
    let mut at = 24;
    let mut field = |at: &mut usize, width: usize| {
        let n = number(bytes, (*at, width));
        out.push((*at, width));
        *at += width;
        n as usize
    };
    for _ in 0..number(bytes, (16, 8)) {
        at += field(&mut at, 8);
        match field(&mut at, 4) {
            8 => at += field(&mut at, 8),
            9 => {
                assert_eq!(field(&mut at, 4), 4, "arrays of u32 alone");
                at += 4 * field(&mut at, 8);
            }
            _ => drop(field(&mut at, 4)),
        }
    }
    for _ in 0..number(bytes, (8, 8)) {
        at += field(&mut at, 8);
        for _ in 0..field(&mut at, 4) {
            field(&mut at, 8);
        }
        field(&mut at, 4);
        field(&mut at, 8);
    }
    out
}

/// Every field of every record of a zip archive.
fn zip_fields(bytes: &[u8]) -> Vec<Field> {
    const LOCAL: [Field; 8] = [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)];
    const CENTRAL: [Field; 10] =
        [(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (34, 2), (42, 4)];
    const END: [Field; 7] = [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)];
    let mut out = Vec::new();
    for (at, mark) in bytes.windows(4).enumerate() {
        let fields = match mark {
            b"PK\x03\x04" => &LOCAL[..],
            b"PK\x01\x02" => &CENTRAL,
            b"PK\x05\x06" => &END,
            _ => continue,
        };
        out.extend(fields.iter().map(|(offset, width)| (at + offset, *width)));
    }
    out
}

/// The header of one array changed, in an archive that is sound again.
fn npy(file: &[u8], e: &Edit) -> Vec<u8> {
    const KINDS: [&str; 10] =
        ["'<f4'", "'>f4'", "'<f2'", "'>f2'", "'<f8'", "'|O'", "'<i8'", "'|u1'", "'<c8'", "'|S9'"];
    let mut all = members(file);
    let at = e.at % all.len();
    let (other, member) = (all[e.from % all.len()].1.clone(), &mut all[at]);
    let len = usize::from(u16::from_le_bytes([member.1[8], member.1[9]]));
    let mut text = String::from_utf8(member.1[10..10 + len].to_vec()).unwrap();
    let mut data = member.1[10 + len..].to_vec();
    match e.op % 7 {
        0 => {
            let from = text.find("'<").or(text.find("'|")).unwrap();
            let to = from + text[from..].find(',').unwrap();
            text.replace_range(from..to, KINDS[e.from % KINDS.len()]);
        }
        1 => text = text.replace("False", "True"),
        2 => {
            let digit = text.rfind(|c: char| c.is_ascii_digit()).unwrap_or(0);
            text.replace_range(digit..=digit, &e.number.to_string());
        }
        3 => text = text.replacen('(', &format!("({}, ", e.number), 1),
        4 => data.truncate(e.from % (data.len() + 1)),
        5 => member.0 = [&member.0[..e.from % member.0.len()], b".npy"].concat(),
        _ => member.1.clone_from(&other),
    }
    if e.op % 7 < 5 {
        let len = text.len() as u16;
        member.1 = [&member.1[..8], &len.to_le_bytes(), text.as_bytes(), &data].concat();
    }
    archive(&all)
}

fn archives(file: &[u8], edits: &[Edit], whole: bool) -> Vec<u8> {
    if whole {
        return edits.iter().take(1).fold(file.to_vec(), |file, e| npy(&file, e));
    }
    let mut out = file.to_vec();
    let fields = zip_fields(&out);
    edit_fields(&mut out, &fields, edits);
    out
}

fn containers(file: &[u8], edits: &[Edit], _: bool) -> Vec<u8> {
    let mut out = file.to_vec();
    edit_fields(&mut out, &gguf_fields(file), edits);
    out
}

fn json_text(file: &[u8], edits: &[Edit], _: bool) -> Vec<u8> {
    let mut value: Value = serde_json::from_slice(file).unwrap();
    edits.iter().for_each(|e| edit_json(&mut value, e));
    value.to_string().into_bytes()
}

macro_rules! rows {
    ($($name:ident: $change:ident;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

            $(
                #[test]
                fn $name(seed in any::<u16>(), edits in edits(), fitted in any::<bool>()) {
                    watch();
                    let target = TARGETS.iter().find(|t| t.name == stringify!($name)).expect("a row");
                    let seeds = run::seeds(target);
                    let seed = &seeds[seed as usize % seeds.len()];
                    run::one(target, &$change(seed, &edits, fitted));
                }
            )*
        }

        /// Every parser of files of strangers has a row, which reads what is not changed.
        #[test]
        fn every_parser_has_a_row() {
            let mut rows = vec!["file", "journal", "event"]; // any of the others; nobody's but one's own
            $(
                rows.push(stringify!($name));
                let target = TARGETS.iter().find(|t| t.name == stringify!($name)).expect("a row");
                for seed in run::seeds(target) {
                    assert!(run::one(target, &$change(&seed, &[], false)), "{}", target.name);
                }
            )*
            assert!(TARGETS.iter().all(|t| rows.contains(&t.name)) && rows.len() == TARGETS.len());
        }
    };
}

rows! {
    single: safetensors;
    quantized: safetensors;
    peft_config: json_text;
    peft_dir: pair;
    mlx: pair;
    kohya: safetensors;
    diffusers: safetensors;
    flat: safetensors;
    gguf: containers;
    npz: archives;
    scan: safetensors;
    base_model: pair;
    sidecar: safetensors;
}
