//! What a fuzzer calls: any bytes at all must give a value or a typed error, and a value must survive
//! being written and read again. Shared by the fuzz targets, the runner of mutations in `tests/fuzz/` and
//! the plain loops of the tests. Entries say whether the bytes were read.

use std::path::Path;
use std::sync::OnceLock;

use microlora::Error;
use microlora::format::{
    LoadOptions, Loaded, Orientation, from_bytes, gguf as gguf_file, peft, quantized_from_bytes,
    quantized_to_bytes, read, read_bytes, save_style, to_bytes,
};

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

fn survives(loaded: &Loaded) {
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

/// Our single file.
pub fn single(data: &[u8]) -> bool {
    let mut was_read = false;
    for strict in [true, false] {
        if let Some(loaded) = known(watched(data.len(), || from_bytes(data, strict))) {
            survives(&loaded);
            was_read = true;
        }
    }
    was_read
}

/// Version 2 of our single file.
pub fn quantized(data: &[u8]) -> bool {
    let Some(loaded) = known(watched(data.len(), || quantized_from_bytes(data))) else { return false };
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
            survives(&loaded);
            was_read = true;
        }
    }
    was_read
}

/// Reads what lies at `path` in two ways; what is of `style` is written in it and read again.
fn at(path: &Path, len: usize, style: Option<&str>) -> bool {
    let told = LoadOptions {
        strict: false,
        alpha: Some(3.0),
        orientation: Some(Orientation::RankFirst),
        ..LoadOptions::default()
    };
    let mut was_read = false;
    for opts in [LoadOptions::default(), told] {
        let Some(loaded) = known(watched(len, || read(path, &opts))) else { continue };
        was_read |= style.is_none_or(|s| s == loaded.format);
        let Some(style) = style.filter(|s| *s == loaded.format) else {
            survives(&loaded);
            continue;
        };
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
    at(&path, len, style)
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
            survives(&loaded);
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
    at(dir.path(), data.len(), Some("mlx"))
}
