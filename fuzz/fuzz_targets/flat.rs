//! `lora_a` and `lora_b` in safetensors, from any bytes: `cargo +nightly fuzz run flat`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/format/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::flat(data);
});
