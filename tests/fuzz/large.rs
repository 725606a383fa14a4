//! Files of 100 MB and more, sound ones and such as ask for what a large file may: each within the memory and
//! the time of its size. They are sparse, so that they are quickly made.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use microlora::Error;
use microlora::format::{LoadOptions, Orientation, read};

use super::{memory, run};

const SIZE: usize = 110_000_000;

/// A file that begins with `head` and is zeros up to `len`.
fn sparse(dir: &Path, head: &[u8], len: usize) -> std::path::PathBuf {
    let path = dir.join("a");
    let mut file = File::create(&path).unwrap();
    file.write_all(head).unwrap();
    file.set_len(len.max(head.len()) as u64).unwrap();
    path
}

/// Reads it within what its size allows; `Some` is a word of the refusal, `None` that it is read.
fn weigh(name: &str, path: &Path, opts: &LoadOptions, refusal: Option<&str>) {
    let len = std::fs::metadata(path).unwrap().len() as usize;
    assert!(len >= 100_000_000, "{name}: {len} bytes");
    weigh_as(len, name, path, opts, refusal);
}

/// [`weigh`], as if the file had `len` bytes.
fn weigh_as(len: usize, name: &str, path: &Path, opts: &LoadOptions, refusal: Option<&str>) {
    let mut got = None;
    let took = memory::measure(&mut || got = Some(read(path, opts)));
    took.check(len).unwrap_or_else(|e| panic!("{name}: {e}"));
    match (got.unwrap(), refusal) {
        (Ok(_), None) => {}
        (Err(Error::Format { reason, .. }), Some(word)) if reason.contains(word) => {}
        (got, want) => panic!("{name}: {:?}, expected {want:?}", got.map(|l| l.format)),
    }
    println!("{name}: {len} bytes, {took:?}");
}

/// A safetensors file of these tensors of f32.
fn safetensors(metadata: &str, tensors: &[(String, [usize; 2])]) -> (Vec<u8>, usize) {
    let mut end = 0;
    let mut header = format!("{{{metadata}");
    for (i, (name, shape)) in tensors.iter().enumerate() {
        let from = end;
        end += 4 * shape[0] * shape[1];
        let comma = if i == 0 && metadata.is_empty() { "" } else { "," };
        header.push_str(&format!(
            r#"{comma}"{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{from},{end}]}}"#
        ));
    }
    header.push('}');
    let head = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
    let len = head.len() + end;
    (head, len)
}

/// Factors of so many modules, `SIZE` bytes together.
fn factors(count: usize, name: impl Fn(usize, usize) -> String) -> Vec<(String, [usize; 2])> {
    let width = SIZE / 4 / 2 / count;
    (0..2 * count).map(|i| (name(i / 2, i % 2), if i % 2 == 0 { [1, width] } else { [width, 1] })).collect()
}

fn ours(count: usize) -> (String, Vec<(String, [usize; 2])>) {
    let one = |i| format!(r#"{{\"path\":\"{i:x}\",\"rank\":1,\"alpha\":1.0,\"use_rslora\":false}}"#);
    let list = (0..count).map(one).collect::<Vec<_>>().join(",");
    let metadata =
        format!(r#""__metadata__":{{"format":"microlora","format_version":"1","modules":"[{list}]"}}"#);
    (metadata, factors(count, |i, side| format!("{i:x}.lora_{}", ["a", "b"][side])))
}

#[test]
fn large_safetensors() {
    let _alone = run::alone();
    let dir = tempfile::tempdir().unwrap();
    let (strict, lenient) = (LoadOptions::default(), LoadOptions { strict: false, ..LoadOptions::default() });
    for (count, refusal) in [(1, None), (30_000, None)] {
        let (metadata, tensors) = ours(count);
        let (head, len) = safetensors(&metadata, &tensors);
        let path = sparse(dir.path(), &head, len);
        weigh(&format!("{count} modules"), &path, &strict, refusal);
        let packed = LoadOptions { packed: true, ..strict };
        weigh(&format!("{count} modules, packed"), &path, &packed, refusal);
    }
    for (style, names) in
        [("kohya", ["lora_down.weight", "lora_up.weight"]), ("diffusers", ["lora_A.weight", "lora_B.weight"])]
    {
        let tensors = factors(30_000, |i, side| format!("lora_unet_{i:x}.{}", names[side]));
        let (head, len) = safetensors("", &tensors);
        weigh(style, &sparse(dir.path(), &head, len), &strict, None);
    }
    // A row of one number takes sixteen in the kernels' order: not while the file is read.
    let list = r#"[{\"path\":\"m\",\"rank\":1048576,\"alpha\":1.0,\"use_rslora\":false}]"#;
    let metadata =
        format!(r#""__metadata__":{{"format":"microlora","format_version":"1","modules":"{list}"}}"#);
    let narrow = [("m.lora_a".into(), [1 << 20, 12]), ("m.lora_b".into(), [15, 1 << 20])];
    let (head, len) = safetensors(&metadata, &narrow);
    let packed = LoadOptions { packed: true, ..strict };
    weigh("narrow rows, packed", &sparse(dir.path(), &head, len), &packed, None);
    let told = LoadOptions { alpha: Some(1.0), orientation: Some(Orientation::RankLast), ..strict };
    let (head, len) = safetensors("", &[("lora_a".into(), [SIZE / 8, 1]), ("lora_b".into(), [1, SIZE / 8])]);
    weigh("turned", &sparse(dir.path(), &head, len), &told, None);

    // Headers that ask for all that a file of their size may have, and for more.
    let empty = |i| format!(r#""{i:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#);
    let all = (0..1 << 20).map(empty).collect::<Vec<_>>().join(",");
    let head = [&(all.len() as u64 + 2).to_le_bytes(), format!("{{{all}}}").as_bytes()].concat();
    weigh("a hole behind a million tensors", &sparse(dir.path(), &head, SIZE), &lenient, Some("memory"));
    for text in [
        format!(r#"{{"a":{}"#, "[".repeat(99_000_000)),
        format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, "\\n".repeat(49_000_000)),
        format!(r#"{{"{}":1}}"#, "x".repeat(99_000_000)),
        format!(r#"{{"a":{{"shape":[{}]}}}}"#, "0,".repeat(49_000_000)),
        format!(r#"{{"a":{{"shape":[{}]}}}}"#, "9".repeat(99_000_000)),
    ] {
        let head = [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        weigh(&text[..20], &sparse(dir.path(), &head, SIZE), &lenient, Some(""));
    }
}

fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat()
}

/// A GGUF file of an adapter with more keys and these tensors: name, dimensions, offset.
fn gguf(keys: u64, more: &[u8], tensors: &[(String, [u64; 2], u64)]) -> Vec<u8> {
    let named = [("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "qwen2")];
    let mut out =
        [&b"GGUF\x03\0\0\0"[..], &(tensors.len() as u64).to_le_bytes(), &(keys + 3).to_le_bytes()].concat();
    for (key, value) in named {
        out.extend([text(key), 8u32.to_le_bytes().into(), text(value)].concat());
    }
    out.extend(more);
    for (name, dims, offset) in tensors {
        out.extend(text(name));
        out.extend(2u32.to_le_bytes());
        out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        out.extend([[0; 4].as_slice(), &offset.to_le_bytes()].concat());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out
}

#[test]
fn large_gguf() {
    let _alone = run::alone();
    let dir = tempfile::tempdir().unwrap();
    let opts = LoadOptions::default();
    let factors = |count: u64| -> Vec<_> {
        let width = SIZE as u64 / 8 / count / 8 * 8;
        let name = |i: u64, side: u64| format!("blk.{i}.ffn_up.weight.lora_{}", ["a", "b"][side as usize]);
        let dims = |side| if side == 0 { [width, 1] } else { [1, width] };
        (0..2 * count).map(|i| (name(i / 2, i % 2), dims(i % 2), 4 * width * i)).collect()
    };
    for count in [1, 10_000] {
        let tensors = factors(count);
        let head = gguf(0, &[], &tensors);
        let len = head.len() + tensors.iter().map(|(_, d, _)| 4 * (d[0] * d[1]) as usize).sum::<usize>();
        weigh(&format!("gguf, {count} modules"), &sparse(dir.path(), &head, len), &opts, None);
    }
    let keys: Vec<u8> =
        (0..1_000_000u32).flat_map(|i| [text(&format!("{i:x}")), vec![0, 0, 0, 0, 1]].concat()).collect();
    let path = sparse(dir.path(), &gguf(1_000_000, &keys, &[]), SIZE);
    weigh("gguf, a million keys", &path, &opts, Some("memory"));
    let strings = [text("a"), 9u32.to_le_bytes().into(), 8u32.to_le_bytes().into()].concat();
    let strings = [&strings[..], &12_000_000u64.to_le_bytes(), &vec![0; 96_000_000]].concat();
    let path = sparse(dir.path(), &gguf(1, &strings, &[]), SIZE);
    weigh("gguf, 12 million strings", &path, &opts, Some("after the last tensor"));
    let long = [text("a"), 8u32.to_le_bytes().into(), text(&"x".repeat(99_000_000))].concat();
    weigh("gguf, a text of 99 MB", &sparse(dir.path(), &gguf(1, &long, &[]), SIZE), &opts, Some("memory"));
}

/// A stored or deflated member of a zip archive.
struct Member {
    name: String,
    crc: u32,
    size: usize,
    packed: Option<Vec<u8>>,
    content: Vec<u8>,
}

fn npy(name: &str, descr: &str, fortran: bool, shape: &str, bytes: usize) -> Member {
    let order = if fortran { "True" } else { "False" };
    let header = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n");
    let head = [&b"\x93NUMPY\x01\0"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes()].concat();
    let content = [&head[..], &vec![0; bytes]].concat();
    let (crc, size) = (crc32fast::hash(&content), content.len());
    Member { name: format!("{name}.npy"), crc, size, packed: None, content }
}

fn deflated(mut m: Member) -> Member {
    let mut out = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(&m.content).unwrap();
    m.packed = Some(out.finish().unwrap());
    m
}

fn archive(members: &[Member]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for m in members {
        let body = m.packed.as_ref().unwrap_or(&m.content);
        let method = if m.packed.is_some() { 8 } else { 0 };
        let mut common = vec![20, 0, 0, 0, method, 0, 0, 0, 0x21, 0];
        common.extend(m.crc.to_le_bytes());
        common.extend((body.len() as u32).to_le_bytes());
        common.extend((m.size as u32).to_le_bytes());
        common.extend((m.name.len() as u16).to_le_bytes());
        common.extend([0, 0]);
        directory.extend(
            [&b"PK\x01\x02\x14\0"[..], &common, &[0; 10], &(out.len() as u32).to_le_bytes()].concat(),
        );
        directory.extend(m.name.as_bytes());
        out.extend([&b"PK\x03\x04"[..], &common, m.name.as_bytes(), body].concat());
    }
    let (count, at, size) = (members.len() as u16, out.len() as u32, directory.len() as u32);
    out.extend(&directory);
    out.extend([&b"PK\x05\x06\0\0\0\0"[..], &count.to_le_bytes(), &count.to_le_bytes()].concat());
    out.extend([&size.to_le_bytes()[..], &at.to_le_bytes(), &[0, 0]].concat());
    out
}

#[test]
fn large_npz() {
    let _alone = run::alone();
    let dir = tempfile::tempdir().unwrap();
    let told = |orientation| LoadOptions {
        alpha: Some(1.0),
        orientation: Some(orientation),
        ..LoadOptions::default()
    };
    let (first, last) = (told(Orientation::RankFirst), told(Orientation::RankLast));
    let n = SIZE / 4 / 10;
    for (name, descr, fortran, opts, wide) in [
        ("npz", "<f4", false, first, (9, 1)),
        ("npz, turned", "<f4", false, last, (9, 1)),
        ("npz, turned back", "<f4", true, last, (5, 5)),
        ("npz, big-endian", ">f4", false, first, (1, 9)),
        ("npz, big-endian and turned", ">f4", true, first, (9, 1)),
        ("npz, big-endian and turned back", ">f4", true, last, (5, 5)),
    ] {
        let shape = |k: usize, side: usize| match (side, opts.orientation) {
            (0, Some(Orientation::RankFirst)) | (1, Some(Orientation::RankLast)) => format!("(1, {})", k * n),
            _ => format!("({}, 1)", k * n),
        };
        let member = |side: usize, k: usize| {
            npy(["lora_a", "lora_b"][side], descr, fortran, &shape(k, side), 4 * k * n)
        };
        let bytes = archive(&[member(0, wide.0), member(1, wide.1)]);
        weigh(name, &sparse(dir.path(), &bytes, 0), &opts, None);
    }
    let many: Vec<Member> = (0..40_000)
        .map(|i| {
            let (name, side) = (format!("{:x}", i / 2), i % 2);
            let shape = if side == 0 { "(1, 700)" } else { "(700, 1)" };
            npy(&format!("{name}.{}", ["lora_a", "lora_b"][side]), "<f4", false, shape, 2800)
        })
        .collect();
    weigh("npz, many members", &sparse(dir.path(), &archive(&many), 0), &first, None);
    drop(many);
    // What is deflated may inflate to twice the file, and counts at that.
    let stored = npy("x.lora_a", "<f4", false, &format!("(1, {})", SIZE / 4), SIZE);
    let b = npy("x.lora_b", "<f4", false, &format!("({}, 1)", SIZE / 2), 2 * SIZE);
    let path = sparse(dir.path(), &archive(&[stored, deflated(b)]), 0);
    weigh_as(3 * SIZE, "npz, inflated", &path, &first, None);
}
