//! The doctor's look at a safetensors file, from any bytes: `cargo +nightly fuzz run scan`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/format/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::scan(data);
});
