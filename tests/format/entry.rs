//! What a fuzzer calls: any bytes at all must give a value or a typed error, and a value must survive
//! being written and read again. Shared by the fuzz targets, the runner of mutations in `tests/fuzz/` and
//! the plain loops of the tests. Entries say whether the bytes were read.

#[path = "entry_base.rs"]
pub mod base;
#[path = "entry_inside.rs"]
mod inside;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

use microlora::Error;
use microlora::adapter::Adapter;
use microlora::format::scan as doctor;
use microlora::format::{
    Limits, LoadOptions, Loaded, Orientation, from_bytes, gguf as gguf_file, peft, quantized_from_bytes,
    quantized_to_bytes, read, read_bytes, save_style, to_bytes,
};
use microlora::quant::QuantAdapter;
use microlora::snapshot::Snapshot;

/// Called around each parser with the bytes of its files, where somebody counts what it takes.
pub static WATCH: OnceLock<Watch> = OnceLock::new();

/// Runs a parser on so many bytes, under the watch of the fuzz runner.
pub type Watch = fn(usize, &mut dyn FnMut());

fn watched<T>(len: usize, mut read: impl FnMut() -> T) -> T {
    let mut out = None;
    match WATCH.get() {
        Some(watch) => watch(len, &mut || out = Some(read())),
        None => out = Some(read()),
    }
    out.expect("it was called")
}

fn known<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Format { file, reason } | Error::Unsupported { file, reason }) => {
            assert!(!file.is_empty() && !reason.is_empty() && reason.len() < 20_000);
            None
        }
        Err(other) => panic!("not an error of a file: {other:?}"),
    }
}

/// What was read is of the file `data`, can be used or is refused for it, and can be written and read again.
fn survives(loaded: &Loaded, data: &[u8]) {
    inside::check(loaded, data);
    is_used(loaded);
    match to_bytes(&loaded.parts) {
        Ok(bytes) => {
            let again = read_bytes(&bytes, false).expect("what is written can be read");
            assert_eq!(to_bytes(&again.parts).expect("and written again"), bytes);
        }
        // Two names may become one in the other container: an error, not a loss.
        Err(Error::Config { arg, .. }) => assert_eq!(arg, "tensors"),
        Err(other) => panic!("read but not written: {other:?}"),
    }
}

/// An error of an argument as well as of a file.
fn typed<T>(result: Result<T, Error>) -> Option<T> {
    match result {
        Err(Error::Io { .. }) => panic!("an error of the system"),
        other => other.ok(),
    }
}

/// What becomes of a file after it was read.
fn is_used(loaded: &Loaded) {
    assert_eq!(loaded.fingerprint().expect("a fingerprint").len(), 64);
    let allow: Vec<String> = loaded.variants.iter().map(|v| format!("drop:{}", v.kind)).collect();
    if let Some(plain) = typed(loaded.clone().runnable("file", &allow)) {
        if let Some(modules) = &plain.quantized {
            let rest = microlora::format::AdapterParts { modules: Vec::new(), ..plain.parts.clone() };
            typed(QuantAdapter::from_parts(&rest, modules));
        }
        typed(Adapter::from_parts(&plain.parts));
    }
    typed(peft::unpack_experts(&loaded.parts, None));
    if loaded.parts.header.contains_key("general.architecture") {
        let of = |heads| loaded.parts.modules.iter().map(move |m| (m.path.clone(), (m.path.clone(), heads)));
        for heads in [None, Some(1), Some(2)] {
            let places: BTreeMap<_, _> = of(heads).collect();
            typed(gguf_file::translate(loaded.clone(), &places, "file"));
        }
    }
}

/// Our single file, as an adapter and as a learner's.
pub fn single(data: &[u8]) -> bool {
    let mut was_read = false;
    for strict in [true, false] {
        if let Some(loaded) = known(watched(data.len(), || from_bytes(data, strict))) {
            survives(&loaded, data);
            was_read = true;
        }
    }
    typed(Snapshot::from_bytes(data));
    was_read
}

/// Version 2 of our single file.
pub fn quantized(data: &[u8]) -> bool {
    let Some(loaded) = known(watched(data.len(), || quantized_from_bytes(data))) else { return false };
    inside::check(&loaded, data);
    is_used(&loaded);
    let modules = loaded.quantized.expect("a quantised adapter");
    match quantized_to_bytes(&loaded.parts, &modules) {
        Ok(bytes) => {
            let again = quantized_from_bytes(&bytes).expect("what is written can be read");
            assert_eq!(again.quantized.as_ref(), Some(&modules));
        }
        Err(Error::Config { arg, .. }) => assert_eq!(arg, "tensors"),
        Err(other) => panic!("read but not written: {other:?}"),
    }
    true
}

/// `adapter_config.json` alone.
pub fn config(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(data) else { return false };
    let parsed = watched(data.len(), || peft::config::parse(text, "adapter_config.json"));
    let Some(config) = known(parsed) else { return false };
    for path in ["", "q_proj", "model.layers.10.self_attn.q_proj", "é.base_layer.x\n"] {
        assert!(config.rank_for(path).0 > 0);
        assert!(config.alpha_for(path).is_finite());
    }
    true
}

/// Configuration and weights: two bytes of the configuration's length, the configuration, the weights.
fn both(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = data.split_first_chunk::<2>()?;
    Some(rest.split_at(rest.len().min(usize::from(u16::from_le_bytes(*len)))))
}

/// Both files of a PEFT directory.
pub fn peft_dir(data: &[u8]) -> bool {
    let Some((text, weights)) = both(data) else { return false };
    let Ok(text) = std::str::from_utf8(text) else { return false };
    let mut was_read = false;
    for strict in [true, false] {
        if let Some(loaded) = known(watched(data.len(), || peft::from_memory(text, weights, strict))) {
            survives(&loaded, weights);
            was_read = true;
        }
    }
    was_read
}

/// Reads what lies at `path` in three ways; what is of `style` is written in it and read again. `data` are the
/// bytes of its weights, `len` those that it counts as.
fn at(path: &Path, data: &[u8], len: usize, style: Option<&str>) -> bool {
    let told = LoadOptions {
        strict: false,
        alpha: Some(3.0),
        orientation: Some(Orientation::RankFirst),
        ..LoadOptions::default()
    };
    let mut was_read = false;
    let packed = LoadOptions { packed: true, ..LoadOptions::default() };
    for opts in [LoadOptions::default(), packed, told] {
        let Some(loaded) = known(watched(len, || read(path, &opts))) else { continue };
        was_read |= style.is_none_or(|s| s == loaded.format);
        let Some(style) = style.filter(|s| *s == loaded.format) else {
            survives(&loaded, data);
            continue;
        };
        inside::check(&loaded, data);
        is_used(&loaded);
        let dir = tempfile::tempdir().expect("a directory");
        let copy = dir.path().join("copy");
        match save_style(&copy, &loaded, style, &[]) {
            // It says its own orientation and scaling, so nothing is told to its reader.
            Ok(_) => {
                let again = read(&copy, &LoadOptions { strict: false, ..LoadOptions::default() });
                assert!(again.is_ok(), "what is written can be read: {again:?}");
            }
            // Not every content of a file has a place in its own style again: an error that says so.
            Err(
                Error::Format { .. }
                | Error::Unsupported { .. }
                | Error::Config { .. }
                | Error::Shape { .. }
                | Error::Dtype { .. },
            ) => {}
            Err(other) => panic!("read but not written: {other:?}"),
        }
    }
    was_read
}

fn file_of(data: &[u8], style: Option<&str>) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("adapter.safetensors");
    std::fs::write(&path, data).expect("a file");
    // Inflated members count as the file that they are the content of.
    let len = if style == Some("npz") { 3 * data.len() + (16 << 20) } else { data.len() };
    at(&path, data, len, style)
}

/// Any bytes as a file of any format.
pub fn file(data: &[u8]) -> bool {
    file_of(data, None)
}

/// Kohya's keys.
pub fn kohya(data: &[u8]) -> bool {
    file_of(data, Some("kohya"))
}

/// The keys of diffusers.
pub fn diffusers(data: &[u8]) -> bool {
    file_of(data, Some("diffusers"))
}

/// `lora_a` and `lora_b`.
pub fn flat(data: &[u8]) -> bool {
    file_of(data, Some("flat"))
}

/// A GGUF adapter, from memory and told how to name its modules.
pub fn gguf(data: &[u8]) -> bool {
    let opts = LoadOptions::default();
    match known(watched(data.len(), || gguf_file::from_memory(data, &opts))) {
        Some(loaded) => {
            survives(&loaded, data);
            true
        }
        None => false,
    }
}

/// A NumPy archive.
pub fn npz(data: &[u8]) -> bool {
    file_of(data, Some("npz"))
}

/// Both files of an MLX directory.
pub fn mlx(data: &[u8]) -> bool {
    let Some((text, weights)) = both(data) else { return false };
    let dir = tempfile::tempdir().expect("a directory");
    for (name, bytes) in [("adapter_config.json", text), ("adapters.safetensors", weights)] {
        std::fs::write(dir.path().join(name), bytes).expect("a file");
    }
    at(dir.path(), weights, data.len(), Some("mlx"))
}

/// The doctor's look at a safetensors file, sound or not.
pub fn scan(data: &[u8]) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("adapter.safetensors");
    std::fs::write(&path, data).expect("a file");
    let found = known(watched(data.len(), || doctor::scan(&path, &Limits::default())));
    let doctor::Scan { tensors, damage, .. } = found.expect("damage is no error");
    if let Some(damage) = damage {
        assert!(!damage.is_empty() && damage.len() < 20_000 && tensors.is_empty());
        return false;
    }
    // They lie one after another, up to the end.
    let mut left = data;
    for t in tensors.iter().rev() {
        left = left.strip_suffix(&*t.data).expect("the bytes of the file");
        if let Some(s) = watched(data.len(), || doctor::stats(t)) {
            let count = t.shape.iter().product::<usize>() as u64;
            assert!(s.nan + s.inf + s.zeros <= count && s.norm >= 0.0 && s.max_abs.is_finite());
        }
    }
    for (i, a) in tensors.iter().enumerate().take(12) {
        for b in tensors.iter().skip(i.saturating_sub(2)).take(4) {
            for experts in [false, true] {
                // Both factors are widened, and one is turned.
                let norm = watched(4 * data.len(), || doctor::delta_norm(a, b, experts));
                assert!(typed(norm).expect("a norm or none").is_none_or(|n| n >= 0.0));
            }
        }
    }
    true
}
