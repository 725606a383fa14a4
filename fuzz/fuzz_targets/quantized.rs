//! Version 2 of our single file, from any bytes: `cargo +nightly fuzz run quantized`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/format/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::quantized(data);
});
