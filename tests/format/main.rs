//! Adapter files: round trips, every way to be refused, hostile bytes, full disks.

mod attacks;
mod disk;
mod entry;
mod hostile;
mod peft_dir;
mod refusals;
mod round_trip;
mod samples;
mod styles;
mod variants;
