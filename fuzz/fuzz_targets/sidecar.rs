//! The side-car of a fused model, from any bytes: `cargo +nightly fuzz run sidecar`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/format/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::base::sidecar(data);
});
