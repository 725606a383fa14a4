//! Adapter files: round trips, every way to be refused, hostile bytes, full disks.

mod attacks;
mod disk;
#[allow(dead_code)] // some are for the fuzz targets
mod entry;
mod gguf;
mod gguf_support;
mod hostile;
mod peft_dir;
mod quantized;
mod refusals;
mod round_trip;
mod samples;
mod styles;
mod variants;
