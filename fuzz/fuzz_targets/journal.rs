//! A segment of the journal, and an event, from any bytes: `cargo +nightly fuzz run journal`.
#![no_main]

#[path = "../../tests/journal/entry.rs"]
mod entry;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    entry::segment(data);
    entry::event(data);
});
