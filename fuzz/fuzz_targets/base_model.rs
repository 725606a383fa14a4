//! The index and a shard of a base model, from any bytes: `cargo +nightly fuzz run base_model`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/format/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::base::model(data);
});
