//! A segment of a journal, from any bytes: `cargo +nightly fuzz run journal`.
#![no_main]

#[allow(dead_code)] // each target calls one of its functions
#[path = "../../tests/journal/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::segment(data);
});
