//! Adapter files: round trips, every way to be refused, hostile bytes, full disks.

mod attacks;
mod disk;
#[allow(dead_code)] // the runner of mutations calls all of its functions
mod entry;
mod gguf;
mod gguf_support;
mod hostile;
mod packed;
mod peft_dir;
mod quantized;
mod refusals;
mod round_trip;
mod samples;
mod styles;
mod variants;
